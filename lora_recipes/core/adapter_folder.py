"""An adapter folder: reading it, its rank, and the scaling of a module. Imports no torch."""

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes.core import safetensors
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.safetensors import Tensor
from lora_recipes.core.yamlfile import shown

_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.weight)?$")


def ends(name: str, entry: str) -> bool:
    """Is `entry` the name of a module, or the end of it, as PEFT reads a list of names?"""
    return name == entry or name.endswith(f".{entry}")


def rank(config: dict[str, Any]) -> int:
    """The largest rank in an adapter_config.json (or a recipe's `lora:` section): r, or a larger value of
    rank_pattern.
    """
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def matched(pattern: dict[str, Any], module: str) -> Any:
    """What a rank_pattern or alpha_pattern says of `module`, by PEFT's rule (get_pattern_key), which is
    vLLM's too; None when nothing.
    """
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), None)


def scaling(config: dict[str, Any], module: str) -> float:
    """The factor of B A in `module` (as PEFT named it), from an adapter_config.json alone: alpha / r, and
    with use_rslora alpha / sqrt(r) (arXiv 2312.03732).
    """
    r, alpha = (matched(config.get(f"{key}_pattern") or {}, module) for key in ("rank", "alpha"))
    r, alpha = config["r"] if r is None else r, config["lora_alpha"] if alpha is None else alpha
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def parameters(config: dict[str, Any], module: str) -> list[str]:
    """What target_parameters names of `module` (as the adapter's tensors name it): names of its parameters.

    PEFT wraps a module once for each of them, and calls what it has wrapped `base_layer`.
    """
    owner = f".{module.replace('.base_layer', '')}"
    found = (entry.rpartition(".") for entry in config.get("target_parameters") or [])
    return [leaf for of, _, leaf in found if not of or owner.endswith(f".{of}")]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as it is on disk: adapter_config.json, and the tensors of adapter_model.safetensors
    by name.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def file(self) -> Path:
        """The tensors' file."""
        return self.path / "adapter_model.safetensors"

    @functools.cached_property  # asked for each module of a model in turn
    def modules(self) -> dict[str, dict[str, str]]:
        """Adapted module (as PEFT named it, without its prefix) -> {"A": tensor name, "B": tensor name}."""
        found: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            if match := _KEY.match(name):
                found.setdefault(match["module"], {})[match["kind"][-1]] = name
        return found


def read(path: Path, anything: bool = False) -> Adapter:
    """The adapter in the folder `path`. RecipeError when it is none, or when a file is missing, cut or
    broken.

    `anything`: take PEFT's other types too, which no server here does.
    """
    config, file = _config(path, anything), path / "adapter_model.safetensors"
    if not file.is_file():
        patterns = ("*.distcp", "global_step*", "pytorch_model_fsdp*", "zero_*", "*.bin", "*.pt")
        left = [p.name for pattern in patterns for p in path.glob(pattern)]
        found = "no adapter_model.safetensors" + (
            f", but {', '.join(left[:3])}: sharded or pickled training state" if left else ""
        )
        raise RecipeError(
            Problem(shown(path), found, "save a complete adapter (consolidate the shards) as safetensors")
        )
    try:
        return Adapter(path, config, safetensors.header(file))
    except ValueError as error:
        raise RecipeError(
            Problem(shown(file), str(error), "copy the adapter again, or take an earlier checkpoint")
        ) from None


def _config(path: Path, anything: bool) -> dict[str, Any]:
    file = path / "adapter_config.json"
    if not file.is_file():
        do = (
            "give the folder that holds adapter_config.json"
            if path.is_dir()
            else "train it first, or check the path"
        )
        raise RecipeError(
            Problem(shown(path), "no adapter_config.json in it" if path.is_dir() else "no such folder", do)
        )
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(Problem(shown(file), f"broken JSON: {error}", "copy the adapter again")) from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA" and anything and isinstance(config, dict) and isinstance(kind, str):
        return dict(config)
    if kind != "LORA":
        raise RecipeError(
            Problem(
                shown(file),
                f"peft_type is {kind}, not LORA",
                "vLLM does not look, and would serve it wrongly",
            )
        )
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]:
        raise RecipeError(
            Problem(shown(file), f"has no {', '.join(missing)}", "it is not one that PEFT wrote")
        )
    if not (isinstance(config["r"], int) and config["r"] > 0):
        raise RecipeError(Problem(shown(file), f"r is {config['r']!r}", "a whole number above 0"))
    _patterns(config, file)
    if not isinstance(config["lora_alpha"], int | float):
        raise RecipeError(Problem(shown(file), f"lora_alpha is {config['lora_alpha']!r}", "a number"))
    if not isinstance(config.get("base_model_name_or_path", ""), str | None):
        raise RecipeError(
            Problem(shown(file), "base_model_name_or_path is no text", "the base's folder or hub id")
        )
    found: dict[str, Any] = config
    return found


def _patterns(config: dict[str, Any], file: Path) -> None:
    """RecipeError unless rank_pattern and alpha_pattern hold module names, or regular expressions, with
    numbers.
    """
    for key, kind, said in (
        ("rank_pattern", int, "module names with whole numbers"),
        ("alpha_pattern", (int, float), "module names with numbers"),
    ):
        pattern = config.get(key) or {}
        if not (isinstance(pattern, dict) and all(isinstance(value, kind) for value in pattern.values())):
            raise RecipeError(Problem(shown(file), f"{key} is {pattern!r}", said))
        for name in pattern:
            try:
                re.compile(name)
            except re.error as error:
                found = f"{key}: {name!r} is no module name and no regular expression: {error}"
                raise RecipeError(Problem(shown(file), found, "it is not one that PEFT wrote")) from None
