"""Named arms at every point of a grid: their names and their overrides. Imports no torch."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lora_recipes.core import yamlfile
from lora_recipes.core.yamlfile import Key


def expanded(content: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, Key]]]]:
    """Each arm's name, and its overrides with where each was written: the named arms at every point of the
    grid.
    """
    grid = content.get("grid", {})
    initials = short(grid)
    varied = [key for key in grid if len(grid[key]) > 1] or ([] if "arms" in content else list(grid))
    points = itertools.product(*([(key, i) for i in range(len(grid[key]))] for key in grid))
    for (name, texts), point in itertools.product(content.get("arms", {"": []}).items(), list(points)):
        words = [f"{initials[key]}{_word(grid[key][i])}" for key, i in point if key in varied]
        overrides: list[tuple[str, Key]] = [(text, ("arms", name, i)) for i, text in enumerate(texts or [])]
        overrides += [(f"{key}={written(grid[key][i])}", ("grid", key, i)) for key, i in point]
        yield "_".join(filter(None, [name, *words])), overrides


def short(keys: Iterable[str]) -> dict[str, str]:
    """The initials of each key's words, r for lora.r and lr for train.learning_rate; the whole key where two
    would have the same.
    """
    found = {key: "".join(word[0] for word in key.rpartition(".")[2].split("_") if word) for key in keys}
    alike = {s for s in found.values() if list(found.values()).count(s) > 1}
    return {key: key if s in alike else s for key, s in found.items()}


def _word(value: Any) -> str:
    """A value as part of a folder's name: 1e-3, 0.05, q_proj+v_proj."""
    if isinstance(value, float):
        small = f"{value:.10e}"
        mantissa, _, exponent = small.partition("e")
        return (
            f"{value:.10g}"
            if 0.01 < abs(value) < 1e4 or not value
            else f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        )
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", value if isinstance(value, str) else json.dumps(value))


def written(value: Any) -> str:
    """A value as an override holds it, which reads back the same: JSON, but a plain word without quotation
    marks.
    """
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z0-9_./-]+", value)
        and yamlfile.parse(value, "")[0] == value
    ):
        return value
    return json.dumps(value, ensure_ascii=False)
