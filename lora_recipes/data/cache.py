"""What is kept between commands: a folder for each content, so that the same rows are not read twice, nor the
same step rehearsed (memory/kept.py). Of rows: a changed row, tokenizer, template or setting, or another
version of this code, is another content.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import config

from lora_recipes.core import files, lock
from lora_recipes.core.errors import RecipeError
from lora_recipes.data import sources, stops
from lora_recipes.data.stand_in import Characters
from lora_recipes.recipe.base import Resolved

LIBRARIES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers", "trl")
# Keys of train: that decide what a row is made into.
DECIDES = (
    "assistant_only_loss",
    "completion_only_loss",
    "dataset_text_field",
    "eos_token",
    "max_length",
    "packing",
    "packing_strategy",
    "pad_token",
    "truncation_mode",
)
FACTS = "facts.json"  # written last: a folder without it is not whole
STEP = "step-"  # how the names of folders begin that are not of rows: of rehearsed steps


def place() -> Path:
    """Where all is kept: beside what `datasets` keeps (HF_DATASETS_CACHE, HF_HOME)."""
    return Path(config.HF_DATASETS_CACHE) / "lora_recipes"


def content(resolved: Resolved) -> list[list[str | None]] | None:
    """What stands for the bytes of all sources; None where one has no content that can be named (a stream of
    the hub without its commit).
    """
    data = resolved.recipe.data
    found = [_sources(given, resolved) for given in (data.train, data.eval)]
    return None if any(None in sources_of for sources_of in found) else found


def key(content: list[list[str | None]], resolved: Resolved, tokenizer: Any, sample: int | None) -> str:
    """What decides the rows, as one hash."""
    recipe = resolved.recipe
    train = {name: getattr(recipe.train, name) for name in DECIDES}
    data = {k: v for k, v in recipe.sections["data"].items() if k not in ("limits", "kept", "batching")}
    what: list[Any] = [content, *_code(), train, data, sample]
    what += [recipe.model.new_tokens, _tokenizer(tokenizer), stops.of_base(resolved)]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def _code() -> tuple[list[str], dict[str, str]]:
    """Hashes of this room's files, and the versions of the libraries behind it: once a process."""
    hashes = [files.sha256(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashes, {name: version(name) for name in LIBRARIES}


def _sources(given: Any, resolved: Resolved) -> list[str | None]:
    entries = [given] if isinstance(given, str) else given or []
    return [sources.content({"path": e} if isinstance(e, str) else e, resolved.recipe) for e in entries]


def _tokenizer(tokenizer: Any) -> list[Any]:
    if isinstance(tokenizer, Characters):
        return [tokenizer.chat_template]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    files_of = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    whole = hashlib.sha256(files_of.encode()).hexdigest()
    return [type(tokenizer).__name__, whole, tokenizer.special_tokens_map, tokenizer.chat_template]


def whole(folder: Path) -> dict[str, Any] | None:
    """What facts.json says of a kept folder; None where the folder is not there, or not as it was written:
    each file has its size (`files`), and the SHA-256 that is told of it (`sha256`).
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        same = bool(facts["files"]) and all(
            (folder / name).stat().st_size == size for name, size in facts["files"].items()
        )
        same = same and all(
            files.sha256(folder / name) == told for name, told in facts.get("sha256", {}).items()
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return facts if same else None


def taken(
    final: Path, doing: str, build: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool] | None:
    """The facts of the kept folder `final`, and were they there before: else `build` makes them, in a folder
    that is moved into place. None where nothing can be written there.

    One process at a time makes a folder (`doing` what, says its lock), the others wait and take what it made.
    """
    if facts := whole(final):
        return facts, True
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(final.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return None
    with lock.held(final, doing, wait=True):
        if facts := whole(final):  # another process made them meanwhile
            return facts, True
        temporary = unfinished(final)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        try:
            facts = build(temporary)
            files.replace_folder(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return facts, False


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def unfinished(final: Path) -> Path:
    """Where what `final` will hold is made: by one process at a time, which holds its lock."""
    return final.with_name(f".{final.name}.tmp")


def kept(steps: bool = False) -> list[Path]:
    """The folders of kept rows, or of rehearsed steps, the one that was made last first."""
    found = [f for f in place().glob("[!.]*") if f.is_dir()] if place().is_dir() else []
    chosen = [f for f in found if f.name.startswith(STEP) == steps]
    return sorted(chosen, key=lambda f: f.stat().st_mtime, reverse=True)


def lines() -> list[str]:
    """What is kept, in words: the rows one by one, the rehearsed steps by number."""
    rows, steps = kept(), kept(steps=True)
    said = [
        f"{what} kept: {len(found)}, {files.size(sum(map(size, found)))}, in {place()}"
        for what, found in (("rehearsed steps", steps), ("checked rows", rows))
        if found or what == "checked rows"
    ]
    for folder in rows:
        facts = whole(folder) or {}
        names = ", ".join(
            str(e["path"]) for which in ("train", "eval") for e in facts.get(which, {}).get("entries", [])
        )
        said.append(f"{files.size(size(folder)):>10}  {facts.get('made', 'not whole')}  {names}")
    return said


def clear() -> str:
    """Remove all that is kept, and what killed processes left; what was freed, in words. What is being made
    stays. Who reads rows now keeps reading: their files go when they are closed.
    """
    freed = 0
    for folder in [*kept(), *kept(steps=True), *place().glob(".*.tmp")]:
        final = folder.with_name(folder.name.removeprefix(".").removesuffix(".tmp"))
        with contextlib.suppress(RecipeError), lock.held(final, "removes them"):
            freed += size(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return f"{files.size(freed)} removed from {place()}"
