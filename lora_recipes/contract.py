"""Contracts: the architecture of each base model, as transformers builds it. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes import yamlfile
from lora_recipes.messages import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.recipe import ROOT

CONTRACTS = ROOT / "configs" / "models"
_KEYS = {"name_or_path", "architecture", "chat_template", "parameters", "config", "shapes", "tokenizer"}
_REQUIRED = {"architecture", "parameters", "config"}


@dataclass(frozen=True)
class Contract:
    """One file of configs/models/.

    `config` is what transformers' AutoConfig takes; `parameters` counts the text model (tied weights once); `shapes` are [out, in] of
    projections, by the end of the module's name; `architecture` is the class that the published checkpoint names; `tokenizer`, for
    the models we build ourselves, says how to make one.
    """

    name: str
    architecture: str
    parameters: int
    config: dict[str, Any]
    name_or_path: str | None = None
    chat_template: str | None = None
    shapes: dict[str, list[int]] | None = None
    tokenizer: dict[str, Any] | None = None

    @property
    def text_config(self) -> dict[str, Any]:
        """The text model's part of `config`."""
        return self.config.get("text_config", self.config)

    def differences(self, config: dict[str, Any]) -> list[str]:
        """Where a real checkpoint's (text) config says something else than this contract, one line for each key."""
        ours = {k: v for k, v in self.text_config.items() if k != "model_type"}
        return [f"{k}: the contract says {v}, the checkpoint {config.get(k)}" for k, v in ours.items() if config.get(k) != v]


def names() -> list[str]:
    """The contracts in configs/models/."""
    return sorted(p.stem for p in CONTRACTS.glob("*.yaml"))


def load(name: str, where: str = "model.contract") -> Contract:
    """The contract `name`; RecipeError with the nearest name when there is none, or with the file's faults."""
    path = CONTRACTS / f"{name}.yaml"
    if not path.is_file():
        do = f"did you mean {nearest(name, names())}? The contracts are {listed(names())}"
        raise RecipeError(Problem(where, f"no contract {name!r} in configs/models/", do))
    return read(path)


def read(path: Path) -> Contract:
    """The contract in the file `path`, its keys checked."""
    content, lines = yamlfile.load(path)
    at = yamlfile.shown(path)
    problems = [
        Problem(f"{at}:{lines[(key,)]} {key}", "unknown key", f"did you mean {nearest(key, _KEYS)}?") for key in content if key not in _KEYS
    ] + [Problem(f"{at}:1", f"{key!r} is missing", "see configs/models/qwen3_4b.yaml") for key in sorted(_REQUIRED - set(content))]
    if not problems and not (isinstance(content["config"], dict) and "model_type" in content["config"]):
        problems = [Problem(f"{at}:{lines[('config',)]} config", "names no model_type", "e.g. model_type: qwen3")]
    raise_if(problems)
    return Contract(path.stem, **content)
