"""The prompts and rules of `synthesise`: text files with named places, which users copy and edit."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_recipes.core import files
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.yamlfile import shown

FOLDER = files.ROOT / "data" / "prompts"
RULES = "rules.txt"
# prompt -> the places that its text must have; other words in braces are text like any other
PLACES = {
    "teacher": ("instruction",),
    "self_instruct": ("examples", "count"),
    "evol_constraints": ("instruction",),
    "evol_deepen": ("instruction",),
    "evol_combine": ("instruction", "other"),
    "evol_domain": ("instruction", "domain"),
    "judge": ("question", "first", "second"),  # of evaluation/ab.py
}
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt file: where it is, its text and the hash of its bytes."""

    path: Path
    text: str
    sha256: str

    @property
    def name(self) -> str:
        """As provenance has it."""
        return self.path.name

    def fill(self, **values: str) -> str:
        """The text with each place filled. A place inside a value stays as it is."""
        return _PLACE.sub(lambda match: values.get(match[1], match[0]), self.text)


@dataclass(frozen=True)
class Rule:
    """One line of rules.txt: a row whose instruction or answer (`of`) it finds is dropped, by `reason`."""

    of: str
    pattern: re.Pattern[str]
    reason: str


def load(names: Iterable[str], folder: Path | None) -> dict[str, Prompt]:
    """The prompts `names`, from `folder` where it has them, else the shipped ones. RecipeError names every
    file that cannot be read, and every place that is missing.
    """
    found, problems = {}, _strangers(folder)
    for name in names:
        try:
            prompt = _read(name, folder)
        except RecipeError as error:
            problems += error.problems
            continue
        has = _PLACE.findall(prompt.text)
        for place in PLACES[name]:
            if place not in has:
                near = nearest(place, has)
                typed = f"; it has {listed(f'{{{other}}}' for other in has)}" if near else ""
                do = f"write {{{place}}} where the {place} is to stand{typed}"
                problems.append(Problem(shown(prompt.path), f"has no place {{{place}}}", do))
        found[name] = prompt
    raise_if(problems)
    return found


def rules(folder: Path | None) -> tuple[list[Rule], Prompt]:
    """The rules of rules.txt, from `folder` or the shipped ones, and the file itself."""
    file, found, problems = _read(RULES.removesuffix(".txt"), folder), [], []
    for number, line in enumerate(file.text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        of, _, pattern = line.partition(":")
        where = f"{shown(file.path)}:{number}"
        if of not in ("instruction", "answer") or not pattern.strip():
            do = "instruction: REGEX, or answer: REGEX; a comment begins with #"
            problems.append(Problem(where, f"is no rule: {line[:60]!r}", do))
            continue
        try:
            compiled = re.compile(pattern.strip(), re.DOTALL)
        except re.error as error:
            problems.append(Problem(where, f"is no regular expression of Python: {error}"))
            continue
        found.append(Rule(of, compiled, f"the {of} matches {RULES}:{number}"))
    raise_if(problems)
    return found, file


def _strangers(folder: Path | None) -> list[Problem]:
    """A folder that is none, and text files in it that nothing would read: a misspelled name is silent."""
    if folder is None:
        return []
    if not folder.is_dir():
        return [Problem(shown(folder), "is no folder", f"copy {shown(FOLDER)} and edit what is in it")]
    known = {f"{name}.txt" for name in PLACES} | {RULES}
    return [
        Problem(shown(file), "would not be read", f"did you mean {nearest(file.name, known)}?")
        for file in sorted(folder.glob("*.txt"))
        if file.name not in known
    ]


def _read(name: str, folder: Path | None) -> Prompt:
    own = folder / f"{name}.txt" if folder else None
    file = own if own and own.exists() else FOLDER / f"{name}.txt"
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte {raw[error.start]:#x})"
        raise RecipeError(Problem(shown(file), found, "save the file as UTF-8")) from None
    return Prompt(file, text, hashlib.sha256(raw).hexdigest())
