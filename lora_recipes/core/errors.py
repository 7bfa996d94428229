"""What the program says when something is wrong: one error family with its exit codes, and the nearest
name.
"""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

MOST = 100  # problems that are told at once; the rest is counted


class Exit(IntEnum):
    """How a command ends, for those that call it (docs/release.md); `told` says it in words."""

    told: str

    def __new__(cls, code: int, told: str) -> "Exit":
        """A member is its code, with the words beside it."""
        made = int.__new__(cls, code)
        made._value_, made.told = code, told
        return made

    DONE = 0, "done; of retrain: promoted"
    UNPROVEN = 1, "serve: not what was trained; ablate: an arm failed"
    REFUSED = 2, "a mistake in the call, the recipe or the machine"
    NO_GIT = 10, "release, retrain: there is no git on this machine"
    NO_REPOSITORY = 11, "release, retrain: the folder is no git repository, or has no commit"
    DIRTY = 12, "release, retrain: files differ from the commit"
    NO_TAG_NAME = 13, "release, retrain: git takes no tag of that name"
    TAG_EXISTS = 14, "release, retrain: the tag is there already, in git or in outputs/_releases/"
    NOT_VERIFIED = 15, "release: neither a merge nor a server has proven this adapter"
    CHANGED = 16, "release, push, retrain: an adapter or a release is not as it was saved"
    NOT_EVALUATED = 17, "release: no evaluation of this adapter is on record"
    OTHER_DATA = 18, "release: the rows are not those that were trained"
    NOTHING_NEW = 20, "retrain: no row is new since what is deployed"
    NOT_BETTER = 21, "retrain: trained, and not better by its interval; what is deployed stays"
    FAILED = 22, "retrain: something broke on the way; what is deployed stays"
    DRIFT = 30, "monitor: the loss on the answers is higher by its interval"
    TOO_FEW = 31, "monitor: one answer shows nothing"
    NO_ENDPOINT = 40, "passk, style, ab: no server answers, or it stopped in the middle; its answers are kept"
    NO_SOURCE = 50, "repo-model: SOURCE is no folder, .py file or installed package"
    NO_PYTHON = 51, "repo-model: there is no Python in SOURCE"
    NO_DOCSTRINGS = 52, "repo-model, extract: nothing in SOURCE has a docstring to ask by"
    ONE_MODULE = 53, "repo-model, extract: all of it is in one module: nothing can be held out"
    INTERRUPTED = 130, "Ctrl-C"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` (file:line section.key), what was `found`, and what to `do` about
    it.
    """

    where: str
    found: str
    do: str = ""

    def __str__(self) -> str:
        """Where and what, and on a line of its own what to do."""
        return f"{self.where}: {self.found}" + (f"\n    -> {self.do}" if self.do else "")


class RecipeError(ValueError):
    """A mistake of the user's, or of the machine they are on. Carries every problem that was found, not only
    the first; `code`: how the command ends.
    """

    def __init__(self, problems: Problem | Iterable[Problem], code: Exit = Exit.REFUSED):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.code = code
        rest = len(self.problems) - MOST
        said = [*map(str, self.problems[:MOST]), *([f"... and {rest:,} more"] if rest > 0 else [])]
        super().__init__("\n".join(said))


def raise_if(problems: list[Problem]) -> None:
    """Raise one RecipeError that holds all `problems`, if there are any."""
    if problems:
        raise RecipeError(problems)


def nearest(word: str, names: Iterable[str]) -> str:
    """The name most like `word`, case aside; where none is like it, one of about the same length. Empty if
    there are no names.
    """
    return _nearest(word, tuple(sorted(set(names))))


@functools.lru_cache(maxsize=4096)  # 2 ms among the 170 keys of train:
def _nearest(word: str, names: tuple[str, ...]) -> str:
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return lowered[close[0]] if close else min(names, key=lambda n: (abs(len(n) - len(word)), n), default="")


def listed(items: Iterable[str], most: int = 20) -> str:
    """`items` joined by commas, cut after `most` with a count of the rest."""
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
