"""`labels.json`: what a classifier, adapter or merged, must tell beside its weights. Imports no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import write
from lora_recipes.core.yamlfile import shown

FILE = "labels.json"


@dataclass(frozen=True)
class Head:
    """`labels`: the classes in the order of the head's outputs; `pooling`: mean or last, what goes into it.
    `max_length` (tokens, None: as long as it is) and `truncation_mode`: how a text was cut in training.
    """

    labels: list[str]
    pooling: str
    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def cut(self, ids: list[int]) -> list[int]:
        """The tokens of a text as training took them."""
        if self.max_length is None:
            return ids
        return ids[-self.max_length :] if self.truncation_mode == "keep_end" else ids[: self.max_length]

    def save(self, folder: Path) -> None:
        """Write labels.json into `folder`."""
        write(folder / FILE, json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n")


def read(folder: Path) -> Head | None:
    """The head of the adapter or model in `folder`; None where it has none."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        head = Head(**found)
        if head.pooling not in ("mean", "last") or len(set(head.labels)) != len(head.labels):
            raise KeyError("pooling is mean or last, labels are names, each once")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        found = f"is not as training wrote it: {type(error).__name__}: {error}"
        raise RecipeError(Problem(shown(file), found, "copy the adapter again")) from None
    return head


def needed(folder: Path) -> Head:
    """The same; RecipeError where there is none."""
    if (found := read(folder)) is None:
        do = "name one that task: classify trained"
        raise RecipeError(Problem(shown(folder), f"no {FILE} in it: it is no classifier", do))
    return found
