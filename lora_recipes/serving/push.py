"""Publish an adapter on the Hugging Face Hub: what the project made, in one commit, and looked at again once
it is there. Imports no torch.

The token is that of HF_TOKEN alone: which account publishes is said for this command, not by a login of long
ago. It goes to huggingface_hub and nowhere else; what the hub answers is told without it.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from lora_recipes import __version__
from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import cli, locate, lock, provenance, release_folder, yamlfile
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.core.files import sha256
from lora_recipes.core.record import Run
from lora_recipes.core.release_folder import MANIFEST
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.recipe.recipe import document
from lora_recipes.serving import export

CARD, RECIPE, WEIGHTS = "README.md", "recipe.yaml", "adapter_model.safetensors"
_TOKENIZER = (
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece|chat_template|generation_config)"
    r"[^/]*\.(json|txt|model|jinja)"
)
# What is taken of a folder whose provenance.json does not list its files.
ADAPTER = re.compile(
    rf"README\.md|adapter_config\.json|{re.escape(WEIGHTS)}|provenance\.json|labels\.json|{_TOKENIZER}"
)
# What may not stay in a repository beside another adapter: a loader would take it for part of that one.
MODEL = re.compile(
    rf"{ADAPTER.pattern}|recipe\.yaml|manifest\.json|adapter_model\.bin|config\.json"
    r"|(pytorch_)?model[^/]*\.(safetensors|bin)(\.index\.json)?"
)
OF_THE_HUB = ".gitattributes"  # the hub makes it with the repository
SECRET = re.compile(rb"\bhf_[A-Za-z]{34}\b")  # a token of the hub


@dataclass(frozen=True)
class Package:
    """What is published of the adapter in `folder`: name in the repository -> file here. `left`: what lies
    there and is not published; `notes`: what to know before.
    """

    folder: Path
    files: dict[str, Path]
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name, or the folder's."""
        return self.folder.parent.name if self.folder.name == "adapter" else self.folder.name

    def lines(self) -> list[str]:
        """Every file with its size in bytes, for a person."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return [
            f"files       {len(sizes)}, {sum(sizes.values()):,} bytes",
            *(f"            {size:>13,}  {name}" for name, size in sizes.items()),
            *([f"left out    {listed(self.left)}: no file of the adapter"] if self.left else []),
            *(f"note        {note}" for note in self.notes),
        ]


@dataclass(frozen=True)
class Remote:
    """A repository as it is: its last `commit`, whether it is `private`, and file -> hash: SHA-256 where the
    file is large, else git's.
    """

    commit: str | None
    private: bool
    files: dict[str, str]

    def lacks(self, package: Package) -> list[str]:
        """The files of `package` that are not there, or are other ones there."""
        found = []
        for name, path in package.files.items():
            there = self.files.get(name, "")
            here = sha256(path) if len(there) == 64 else git_hash(path.read_bytes()) if there else ""
            if not there or there != here:
                found.append(name)
        return found


def push(
    word: str,
    outputs: Path,
    repo: str | None,
    public: bool = False,
    force: bool = False,
    unproven: bool = False,
    dry_run: bool = False,
) -> None:
    """Publish the adapter that `word` means (a recipe, or a folder) as the repository `repo` (owner/name),
    private unless `public`, and print what was done.

    `force` replaces another model that is there; `unproven` takes an adapter for which no provenance.json
    vouches; `dry_run` lists, and asks the hub nothing. RecipeError says what stands in the way.
    """
    named = _named(repo)
    hub = None if dry_run else Hub(named)
    folder = locate.adapter(word, outputs)
    with lock.runs([folder], "publishes"):
        package = pack(folder, unproven, public)
        sight = "public" if public else "private"
        print("\n".join([f"to          {named}, {sight}", *package.lines()]), flush=True)
        if hub:
            print(hub.publish(package, public, force), flush=True)
        else:
            print("dry run     nothing is sent; what is there already was not looked at")


def _named(repo: str | None) -> str:
    """`repo`, which must be owner/name."""
    do = f"give {cli.command(REPO='owner/name')}: letters, digits, - _ . and one slash, at most 96 characters"
    if not repo:
        raise RecipeError(Problem(cli.command("push"), "no repository is named", do))
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(Problem(cli.command(REPO=repo), f"no name on the hub: {error}", do)) from None
    if "/" not in repo:
        raise RecipeError(Problem(cli.command(REPO=repo), "names no owner", do))
    return repo


def pack(folder: Path, unproven: bool = False, public: bool = False) -> Package:
    """What of the adapter in `folder` is published. RecipeError where it was changed since training, where
    nothing vouches for it and nobody asked for that (`unproven`), or where a file holds a token.
    """
    adapter = adapters.read(folder, anything=True)
    if adapter.config["peft_type"] == "LORA":
        raise_if(export.sound(adapter))
    known = provenance.read(folder)
    raise_if(provenance.edited(folder, known) if known else [])
    notes = provenance.not_proven(
        folder, known, unproven, "publishes", only_hashes=True, looked_at="its tensors are sound"
    )
    present = sorted(p.name for p in folder.iterdir())
    own = (CARD, provenance.CONFIG, WEIGHTS, provenance.FILE)
    ours = {*known.files, *own} if known and known.files else {n for n in present if ADAPTER.fullmatch(n)}
    if released := release_folder.read(folder):
        ours |= {*released.files, MANIFEST}
    files = {name: folder / name for name in present if name in ours}
    if recipe := _recipe(folder):
        files[RECIPE] = recipe
    if CARD not in files:
        notes.append(f"no {CARD}: the repository will have no model card")
    raise_if(_secrets(files))
    if known and public:
        quoted = len(known.probes) + len(known.called)
        notes.append(f"{provenance.FILE} quotes {quoted} texts of the rows: they become public")
    if places := _places(files, adapter.config.get("base_model_name_or_path")):
        notes.append(f"{places}: who loads it gives the base ({cli.command(BASE='folder')})")
    return Package(folder, files, [name for name in present if name not in files], notes)


def _recipe(folder: Path) -> Path | None:
    """The recipe of the run that left `folder`, or one that was published with it. RecipeError where it is
    not what the run was trained with.
    """
    run = RunFolder(folder.parent)
    record = run.record if folder.name == "adapter" else None
    file = (run.path if record else folder) / RECIPE
    if not file.is_file():
        return None
    if isinstance(record, Run) and yamlfile.load(file)[0] != document(record.plan.resolved):
        do = "put back what run.json says (plan.resolved), or move the file away: it is left out then"
        raise RecipeError(Problem(shown(file), "is not what the run was trained with", do))
    return file


def _secrets(files: dict[str, Path]) -> list[Problem]:
    """Every text that holds a token of the hub."""
    token = os.environ.get("HF_TOKEN", "").strip().encode()
    found = []
    for path in files.values():
        content = b"" if path.suffix == ".safetensors" else path.read_bytes()
        if SECRET.search(content) or (token and token in content):
            do = "take it out, and make a new one: whoever has read the file has it"
            found.append(Problem(shown(path), "holds a token of the hub", do))
    return found


def _places(files: dict[str, Path], base: Any) -> str:
    """Which files name the base as a folder of this machine; empty where none does."""
    if not isinstance(base, str) or not Path(base).is_absolute():
        return ""
    holds = [n for n, p in files.items() if p.suffix != ".safetensors" and base.encode() in p.read_bytes()]
    return f"{listed(holds)}: the base is a folder of this machine, {base}"


class Hub:
    """The repository `repo` on the hub, as the owner of HF_TOKEN sees it. What the hub refuses, and a hub
    that does not answer, are RecipeErrors that do not hold the token.
    """

    def __init__(self, repo: str):
        self.repo, self.token = repo, _token()
        self.api = HfApi(token=self.token, library_name="lora-recipes", library_version=__version__)
        self.user = ""

    def publish(self, package: Package, public: bool, force: bool) -> str:
        """Make the repository if it is not there, send what differs in one commit, look whether it arrived.
        Returns what was done.
        """
        with self._asking("nothing was sent"):
            self.user = str(self.api.whoami()["name"])
            there = self._look()
        made = there is None
        if there is None:
            with self._asking("nothing was sent"):
                self.api.create_repo(self.repo, private=not public)
                there = self._look()
        if there is None:
            found = "was made, and the hub does not show it yet"
            raise RecipeError(Problem(self.repo, found, "the same command once more, in a minute"))
        raise_if(self._visible(there, public, made))
        differ = there.lacks(package)
        others = sorted(set(there.files) - set(package.files) - {OF_THE_HUB})
        stale = [name for name in others if MODEL.fullmatch(name)]
        if not differ and not stale:
            return f"the same    nothing to do: {self.repo} holds these files, commit {there.commit}"
        present = [name for name in differ if name in there.files]
        if (present or others) and not force:
            raise RecipeError(Problem(self.repo, *self._occupied(present, others)))
        return self._commit(package, there, differ, stale)

    def _occupied(self, present: list[str], others: list[str]) -> tuple[str, str]:
        """(found, do) for a repository that holds something else."""
        said = [f"has another {listed(present)}"] * bool(present) + [f"holds {listed(others)}"] * bool(others)
        stay = "files that are of no model stay" if others else "what it replaces stays in the history"
        return " and ".join(said), f"name another repository; {cli.command(FORCE=True)} replaces it ({stay})"

    def _visible(self, there: Remote, public: bool, made: bool) -> list[Problem]:
        """A repository that is not as private, or as public, as was asked."""
        if there.private is not public:
            return []
        settings = f"{self.api.endpoint}/{self.repo}/settings"
        if made:
            found = f"was made {'private' if there.private else 'public'}, whatever was asked; it is empty"
            return [Problem(self.repo, found, f"its owner's rules say so: change it at {settings}")]
        if there.private:
            do = f"leave {cli.command(PUBLIC=True)} out, or make it public at {settings}"
            return [Problem(self.repo, "is private", do)]
        do = f"{cli.command(PUBLIC=True)} publishes for everybody; or make it private at {settings}"
        return [Problem(self.repo, "is public: everybody would see the adapter", do)]

    def _commit(self, package: Package, there: Remote, differ: list[str], stale: list[str]) -> str:
        operations: list[Any] = [CommitOperationAdd(n, package.files[n]) for n in differ]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
        message = f"{package.name}, by lora-recipes {__version__}"
        with (
            self._asking("a commit is whole or not there"),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            done = self.api.create_commit(
                self.repo, operations, commit_message=message, parent_commit=there.commit
            )
            now = self._look(done.oid)
        if lost := now.lacks(package) if now else [*package.files]:
            do = "look for a .gitignore there; the same command again sends what is missing"
            raise RecipeError(Problem(self.repo, f"does not hold what was sent: {listed(lost)}", do))
        gone = [f"removed     {listed(stale)}: of the model before; the history keeps it"] if stale else []
        said = [f"note        {self._safe(_words(w.message))}" for w in caught]
        return "\n".join([*said, *gone, f"published   {len(differ)} files as {self.user}: {done.commit_url}"])

    def _look(self, revision: str | None = None) -> Remote | None:
        """The repository as it is now; None where there is none that HF_TOKEN may see."""
        try:
            info = self.api.model_info(self.repo, revision=revision, files_metadata=True)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 404:
                return None
            raise
        files = {s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) or "" for s in info.siblings or []}
        if info.id.lower() != self.repo.lower():
            raise RecipeError(
                Problem(self.repo, f"is called {info.id} now", f"name it: {cli.command(REPO=info.id)}")
            )
        return Remote(info.sha, bool(info.private), files)

    @contextlib.contextmanager
    def _asking(self, left: str) -> Iterator[None]:
        """Inside, what the hub or the way to it refuses becomes a RecipeError; `left`: what stands then."""
        try:
            yield
        except RecipeError:
            raise
        except Exception as error:  # every kind of network, hub and format error
            if isinstance(error, OSError) and error.errno and error.filename:
                raise  # a file here
            found, do = (self._safe(text) for text in self._why(error))
            raise RecipeError(Problem(self.repo, found, f"{do}; {left}")) from None

    def _safe(self, text: str) -> str:
        """`text` without the token: a server may repeat what it was sent."""
        return text.replace(self.token, "(HF_TOKEN)")

    def _why(self, error: BaseException) -> tuple[str, str]:
        """(found, do)."""
        while isinstance(error, RuntimeError) and error.__cause__:  # of an upload's thread
            error = error.__cause__
        at = self.api.endpoint
        if isinstance(error, HfHubHTTPError):
            return self._refused(error)
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: huggingface_hub asks nothing of the network", "unset it"
        if isinstance(error, HTTPError | OSError):
            found = f"asking {at} failed: {_words(error)}"
            return found, "look at the network, the proxy and HF_ENDPOINT, then the same command again"
        if isinstance(error, ValueError) and type(error).__name__ == "JSONDecodeError":
            found = f"what answers at {at} is not the hub: no JSON"
            return found, "look at HF_ENDPOINT, and for a proxy that answers with a page of its own"
        if isinstance(error, ValueError):
            return f"refused: {_words(error)}", "do what it says"
        return f"the hub's answer was not understood: {_words(error)}", "look at HF_ENDPOINT"

    def _refused(self, error: HfHubHTTPError) -> tuple[str, str]:
        """(found, do) for an answer that is an error."""
        code, said = error.response.status_code, _words(error.server_message or error)
        said = f"({code}: {said})"
        owner, at = self.repo.partition("/")[0], self.api.endpoint
        who = f"it belongs to {self.user or 'nobody that the hub knows'}"
        if code == 401:
            return f"the hub does not know HF_TOKEN {said}", f"make one that may write: {at}/settings/tokens"
        if code in (403, 404):
            do = f"{who}: name a repository of its owner's, or take a token that may write there"
            return f"HF_TOKEN may not write there, or there is no {owner} {said}", do
        if code == 409:
            return f"there is something of that name {said}", "name another repository, or wait and try again"
        if code == 412:
            return f"was changed by somebody else meanwhile {said}", "look at it, then the same command again"
        if code == 429:
            return f"the hub was asked too often {said}", "wait a while, then the same command again"
        if code >= 500:
            return f"the hub has a fault of its own {said}", "wait a while, then the same command again"
        return f"the hub refuses it {said}", "do what it says"


def _token() -> str:
    """HF_TOKEN. RecipeError where it is not set, or cannot be one; never with its value."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        do = "make one that may write (https://huggingface.co/settings/tokens), and set it for this command;"
        do += " of `hf auth login`: HF_TOKEN=$(hf auth token)"
        raise RecipeError(Problem("HF_TOKEN", "is not set: nobody publishes", do))
    if not re.fullmatch(r"[!-~]+", token):
        found = "holds a space, a line's end or a character that no token has"
        raise RecipeError(Problem("HF_TOKEN", found, "copy it again, without quotation marks"))
    return token


def _words(said: object) -> str:
    """What an error or a server says, on one line."""
    return " ".join(str(said).split())[:300] or type(said).__name__
