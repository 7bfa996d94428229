"""Tie an adapter to its recipe, rows, evaluation, versions and the commit of its source: `make release
RECIPE=x TAG=lora-v1.2.3` leaves a folder, a manifest, a model card and an annotated tag.

Everything is looked at first, and all that stands in the way is told at once; the exit code is that of the
first thing.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from yaml import YAMLError

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import cli, files, git, locate, lock, provenance, record, release_folder
from lora_recipes.core.errors import Exit, Problem, RecipeError
from lora_recipes.core.files import now, sha256
from lora_recipes.core.record import FinishedRun, Manifest, Merged, Released, ReleasedData, Served
from lora_recipes.core.release_folder import MANIFEST
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import labels, read, sources
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.serving import push
from lora_recipes.training import card

Refusal = tuple[Exit, list[Problem]]


@dataclass(frozen=True)
class Checked:
    """What may be released as `name`: the `run` of `recipe`, of the commit of `source`; `notes`: what is not
    proven of it.
    """

    name: str
    folder: RunFolder
    run: FinishedRun
    recipe: Recipe
    source: git.Repository
    notes: list[str]

    @property
    def adapter(self) -> Path:
        """Its adapter's folder."""
        return self.folder.result("lora")


def release(
    word: str, outputs: Path, tag: str, source: Path, unproven: bool = False, dry_run: bool = False
) -> str:
    """Release the adapter of the run that `word` means as `tag`, at the commit of the repository `source`;
    returns what was done, for a person.

    `unproven` takes an adapter that no merge and no server has proven, and says so in the manifest;
    `dry_run` writes nothing. RecipeError, with a code for each kind (errors.Exit), says what stands in the
    way.
    """
    outputs = outputs.absolute()
    folder = locate.run_folder(recipes.run_of(word, outputs), outputs)
    with lock.runs([folder.result("lora")], "releases", outputs / release_folder.FOLDER):
        checked = check(folder, outputs, tag, source, unproven)
        data, digests = rows(checked, outputs)
        if dry_run:
            lines = [*told(manifest(checked, tag, data)), "dry run     nothing is written, no tag is made"]
            return "\n".join(lines)
        made = write(checked, outputs, tag, data, digests)
        release_folder.deploy(folder.path, made, release_folder.place(outputs, tag), "release", made.at)
    place = release_folder.place(outputs, tag)
    publish = cli.command("push", TAG=tag, REPO="owner/name")
    return "\n".join([*told(made), f"wrote       {shown(place)}/; {publish} publishes it"])


def check(folder: RunFolder, outputs: Path, tag: str, source: Path, unproven: bool) -> Checked:
    """The run in `folder`, where nothing stands in the way of its release."""
    repository = git.repository(source)
    recipe = dataclasses.replace(recipes.load(str(folder.path / "recipe.yaml")), name=folder.path.name)
    run = folder.run
    assert isinstance(run, FinishedRun), "locate.run_folder asks for it"
    _raise_if([*_place(repository, outputs, tag), *_adapter(folder, run, unproven)])
    push.pack(folder.result("lora"), unproven=True)  # its tensors, its recipe, and no secret in a file
    return Checked(folder.path.name, folder, run, recipe, repository, _notes(folder, run, unproven))


def free(repository: git.Repository, outputs: Path, tag: str) -> None:
    """RecipeError where a release could not be made as `tag` at the commit of `repository`."""
    _raise_if(_place(repository, outputs, tag))


def _raise_if(refused: list[Refusal]) -> None:
    """All that was found in one error, with the code of the first."""
    refused = [(code, problems) for code, problems in refused if problems]
    if refused:
        raise RecipeError([p for _, problems in refused for p in problems], refused[0][0])


def _place(repository: git.Repository, outputs: Path, tag: str) -> list[Refusal]:
    """What of the tag, and of the commit, stands in the way."""
    return [*_tag(repository, outputs, tag), (Exit.DIRTY, _dirty(repository, outputs))]


def _tag(repository: git.Repository, outputs: Path, tag: str) -> list[Refusal]:
    """No name that git takes, or one that is there already."""
    if problem := git.name_problem(repository.root, tag):
        return [(Exit.NO_TAG_NAME, [problem])]
    found, place = [], release_folder.place(outputs, tag)
    if there := repository.tagged(tag):
        do = f"take another; what it is of: git show {there}"
        said = "" if there == tag else f", as {there}, which leaves no room for it"
        found.append(Problem(f"tag {tag}", f"is in {shown(repository.root)} already{said}", do))
    if place.exists():
        left = "" if found else ", though git has no such tag: a release was cut off there"
        found.append(Problem(shown(place), f"is already there{left}", "take another tag, or move it away"))
    nobody = repository.tagger()
    return [(Exit.TAG_EXISTS, found), (Exit.REFUSED, [nobody] if nobody else [])]


def _dirty(repository: git.Repository, outputs: Path) -> list[Problem]:
    """Files that the commit does not hold as they are."""
    changed = repository.dirty(outputs)
    do = "commit them, or put them away (git stash -u): the tag would name a commit without them"
    return [Problem(shown(repository.root), git.changes(changed), do)] if changed else []


def _adapter(folder: RunFolder, run: FinishedRun, unproven: bool) -> list[Refusal]:
    """An adapter that is not as training saved it, that nothing has proven, or that nobody has evaluated."""
    result, name = folder.result("lora"), folder.path.name
    known, hashed = provenance.read(result), sha256(adapters.read(result, anything=True).file)
    edited = provenance.edited(result, known) if known else []
    refused: list[Refusal] = [(Exit.CHANGED, edited)]
    where = shown(folder.path / "run.json")
    if not unproven and not (known and known.files):
        do = f"train it anew, or {cli.command(UNPROVEN=True)} releases it as it is"
        missing = Problem(shown(result / provenance.FILE), "does not vouch for the adapter", do)
        refused.append((Exit.NOT_VERIFIED, [missing]))
    if not any(_proofs(run, hashed)) and not unproven:
        before = "they were of other weights" if run.merged or run.served else "no merge and no server did"
        do = f"{cli.command('merge', RECIPE=name)} or {cli.command('serve', RECIPE=name)} proves it;"
        do += f" {cli.command(UNPROVEN=True)} releases it as it is, and says so"
        found = f"has no proof that these weights answer as they did in training: {before}"
        refused.append((Exit.NOT_VERIFIED, [Problem(where, found, do)]))
    evaluated = run.evaluation
    if not run.scores and (evaluated is None or evaluated.adapter_sha256 != hashed):
        found = "has no evaluation" if evaluated is None else "has an evaluation, of other weights"
        do = cli.command("eval", RECIPE=name)
        refused.append((Exit.NOT_EVALUATED, [Problem(where, found, do)]))
    return refused


def _proofs(run: FinishedRun, hashed: str) -> tuple[Merged | None, Served | None]:
    """What has proven the weights with this hash."""
    merged = run.merged if run.merged and run.merged.adapter_sha256 == hashed else None
    return merged, run.served if run.served and run.served.adapter_sha256 == hashed else None


def _notes(folder: RunFolder, run: FinishedRun, unproven: bool) -> list[str]:
    """What is not proven of what is released, or is to know."""
    result = folder.result("lora")
    known = provenance.read(result)
    notes = provenance.not_proven(result, known, unproven, "releases", only_hashes=True)
    merged, served = _proofs(run, sha256(result / push.WEIGHTS))
    if not merged and not served:
        notes.append("no merge and no server has proven that it answers as it did in training")
    notes += merged.not_proven if merged else []
    notes += [f"vLLM cannot serve it as it is: {fault}" for fault in run.not_servable or []]
    notes += run.evaluation.notes if run.evaluation else []
    if run.git.dirty:
        notes.append("it was trained by code that differed from its commit (run_git)")
    return list(dict.fromkeys(notes))


# ---- the rows


def rows(checked: Checked, outputs: Path) -> tuple[ReleasedData, list[bytes]]:
    """What the manifest says of the rows, and the hash of each row of data.train as it is read now.
    RecipeError where they are not those that were trained.
    """
    recipe, run = checked.recipe, checked.run
    facts = labels.gate(resolve(recipe, outputs), network=False).facts
    problems, do = [], "put them back, or train and evaluate on those that are there"
    for which in ("train", "eval"):
        if getattr(facts, which).sha256 != getattr(run.plan.data, which).sha256:
            problems.append(Problem(recipe.at("data", which), "has other rows than were trained with", do))
    if problems:
        raise RecipeError(problems, Exit.OTHER_DATA)
    digests = [read.content(row) for row in training_rows(recipe)]
    data = ReleasedData(
        train_rows=facts.train.rows,
        train_sha256=facts.train.sha256,
        eval_rows=facts.eval.rows,
        eval_sha256=facts.eval.sha256,
        sources=hashes(recipe, checked.source),
        rows_sha256="",
    )
    return data, digests


def training_rows(recipe: Recipe) -> Sequence[read.Row]:
    """The rows of data.train as they are read, before weights and shares."""
    if recipe.classify:
        return labels.splits(recipe)[0].rows
    reader = read.Reader(recipe, "train")
    found = [row for _, row in reader]
    read.raise_first(reader.faults, "data.train")
    return found


def hashes(recipe: Recipe, repository: git.Repository) -> dict[str, str]:
    """Each file of data.train, data.eval and data.kept -> its SHA-256: by its path in the commit, or by its
    name alone where the commit does not hold it; a data set on the hub by its id.
    """
    found: dict[str, str] = {}
    for which in ("train", "eval", "kept"):
        given = getattr(recipe.data, which) or []
        for entry in [given] if isinstance(given, str) else given:
            source = {"path": entry} if isinstance(entry, str) else entry
            path = recipe.file(source["path"])
            members = sources.named(path)
            for file in members:
                hashed = sha256(file)
                name = repository.holds(file) or f"not in the commit: {file.name}"
                if found.get(name, hashed) != hashed:  # of two folders
                    name += f" ({hashed[:12]})"
                found[name] = hashed
            if not members:
                found[str(source["path"])] = sources.content(source, recipe) or "not known"
    return found


# ---- what is written


def manifest(
    checked: Checked, tag: str, data: ReleasedData, written: dict[str, str] | None = None
) -> Manifest:
    """The manifest; `written`: its files, name -> SHA-256."""
    run, hashed = checked.run, sha256(checked.adapter / push.WEIGHTS)
    merged, served = _proofs(run, hashed)
    return Manifest(
        tag=tag,
        at=now(),
        recipe=checked.name,
        commit=checked.source.commit,
        run_git=run.git,
        run_ended=run.ended,
        versions=run.versions,
        base=run.base,
        adapter_sha256=hashed,
        files=written or {},
        data=data,
        evaluated=run.evaluation.at if run.evaluation else run.ended,
        losses=run.evaluation.sets if run.evaluation else {},
        scores=run.scores,
        merged=merged,
        served=served,
        notes=checked.notes,
    )


def write(checked: Checked, outputs: Path, tag: str, data: ReleasedData, digests: list[bytes]) -> Manifest:
    """Make the folder, then the tag; where the tag cannot be made the folder goes again."""
    place = release_folder.place(outputs, tag)
    temporary = place.with_name(f".{place.name}.tmp")
    with files.writing(place, "while releasing", lambda: "nothing is released"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            made = _folder(checked, temporary, tag, data, digests)
            temporary.rename(place)
            try:
                hashed = sha256(place / MANIFEST)
                checked.source.tag(tag, message(made, hashed))
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # where it holds no other release
                place.parent.rmdir()
    before = checked.run.released or []
    new = Released(tag=tag, at=made.at, commit=made.commit, manifest_sha256=hashed)
    checked.folder.write_record(dataclasses.replace(checked.run, released=[*before, new]))
    return made


def _folder(checked: Checked, folder: Path, tag: str, data: ReleasedData, digests: list[bytes]) -> Manifest:
    for name, path in push.pack(checked.adapter, unproven=True).files.items():
        shutil.copyfile(path, folder / name)
    data = dataclasses.replace(data, rows_sha256=release_folder.write_rows(folder, digests))
    _card(checked, folder, manifest(checked, tag, data))
    written = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != release_folder.ROWS}
    made = manifest(checked, tag, data, written)
    files.write(folder / MANIFEST, record.dumps(made))
    assert release_folder.read(folder) == made, "read back"
    return made


def _card(checked: Checked, folder: Path, made: Manifest) -> None:
    """The adapter's model card with what is released; one that is missing is written anew. RecipeError where
    huggingface_hub does not read it.
    """
    file = folder / push.CARD
    if not file.is_file():
        card.write(folder, checked.recipe, checked.run)
    try:
        known = ModelCard.load(file)
        known.data.model_name = known.data.model_name or made.recipe
        held = made.losses.get("eval")
        if held:
            loss = round(held.trained.loss, 4)
            known.data.eval_results = [
                EvalResult("text-generation", "held-out", f"{made.recipe} eval", "loss", loss)
            ]
        known.text = "\n".join([known.text.rstrip(), "", f"## Release {made.tag}", "", *_said(made), ""])
        known.save(file)
        ModelCard.load(file)
    except (ValueError, TypeError, AttributeError, YAMLError) as error:
        found = f"is no model card that the hub takes: {str(error).splitlines()[0]}"
        do = f"mend its metadata, or remove {push.CARD}: it is written anew"
        raise RecipeError(Problem(shown(checked.adapter / push.CARD), found, do)) from None


def _said(made: Manifest) -> list[str]:
    """What the card says of the release."""
    lines = [f"- {label}: {text}" for label, text in _facts(made) if label != "NOTE"]
    lines.append(f"- {MANIFEST}: the SHA-256 of every file, and of the rows")
    return [*lines, *(f"- not proven, or to know: {note}" for note in made.notes)]


def _facts(made: Manifest) -> list[tuple[str, str]]:
    """What is said of a release everywhere: label and text."""
    losses = [
        (
            {"eval": "held out", "kept": "kept"}.get(which, which),
            f"loss {one.trained.loss:.4f}, the base's {one.base.loss:.4f} ({one.rows:,} rows, nats a token)",
        )
        for which, one in made.losses.items()
    ]
    scores = made.scores
    proven = [f"a merge in {made.merged.dtype}"] if made.merged else []
    proven += [f"a server, vLLM {made.served.vllm}"] if made.served else []
    return [
        ("commit", made.commit),
        ("adapter", f"{made.adapter_sha256} (SHA-256)"),
        ("rows", f"{made.data.train_rows:,} trained, {made.data.eval_rows:,} held out"),
        *losses,
        *([("accuracy", f"{scores.accuracy:.4f} of {scores.rows:,} held-out rows")] if scores else []),
        ("proven by", " and ".join(proven) or "nothing"),
        *(("NOTE", note) for note in made.notes),
    ]


def told(made: Manifest) -> list[str]:
    """The same for a person."""
    return [f"{label:11} {text}" for label, text in [("release", made.tag), *_facts(made)]]


def message(made: Manifest, hashed: str) -> str:
    """Of the tag."""
    facts = [f"{label}: {text}" for label, text in _facts(made) if label != "commit"]
    return "\n".join([f"{made.recipe}, {made.tag}", "", *facts, f"{MANIFEST}: {hashed} (SHA-256)"])
