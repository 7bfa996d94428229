"""What the program says when something is wrong: one error family, and the nearest name."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

MOST = 100  # problems that are told at once; the rest is counted


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
    the first.
    """

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
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
    names = sorted(set(names))
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return lowered[close[0]] if close else min(names, key=lambda n: (abs(len(n) - len(word)), n), default="")


def listed(items: Iterable[str], most: int = 20) -> str:
    """`items` joined by commas, cut after `most` with a count of the rest."""
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
