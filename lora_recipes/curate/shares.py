"""Shares of a whole as they are typed. Imports no torch."""

from collections.abc import Sequence
from fractions import Fraction

from lora_recipes.core.errors import Problem, raise_if


def read(words: Sequence[str], option: str) -> dict[str, Fraction]:
    """`SOURCE=SHARE` words: shares of 1 by name, whatever their sum is. RecipeError names what is none."""
    problems, found = [], dict[str, Fraction]()
    for word in words:
        name, _, share = word.rpartition("=")
        try:
            value = Fraction(share)
        except (ValueError, ZeroDivisionError):
            value = Fraction(0)
        if not name or value <= 0:
            problems.append(Problem(f"{option} {word}", "is no SOURCE=SHARE above 0", "e.g. rows.jsonl=0.7"))
        elif name in found:
            problems.append(Problem(f"{option} {word}", f"{name} stands twice", "give its share once"))
        found[name] = value
    raise_if(problems)
    return {name: value / sum(found.values()) for name, value in found.items()}
