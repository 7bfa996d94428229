"""An adapter folder: reading it, its rank, and the settings that vLLM refuses. Imports no torch.

The rules are those of vLLM 0.32 (vllm/lora/peft_helper.py, config/lora.py).
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes import weights
from lora_recipes.messages import Problem, RecipeError
from lora_recipes.weights import Tensor
from lora_recipes.yamlfile import shown

VLLM = "0.32"
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
# init_lora_weights that leave the base as it is; all others subtract something from it when PEFT loads the adapter.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
UNSUPPORTED = {
    "use_dora": ("DoRA", "merge it (make merge) and serve the merged model"),
    "lora_bias": ("a bias in lora_B (lora_bias)", "train without lora_bias, or merge"),
    "alora_invocation_tokens": ("activated LoRA", "merge, or serve it elsewhere"),
    "layer_replication": ("layer replication", "merge, or serve it elsewhere"),
    "use_bdlora": ("block-diagonal LoRA", "merge, or serve it elsewhere"),
    "use_qalora": ("QALoRA", "merge, or serve it elsewhere"),
    "trainable_token_indices": ("trained token embeddings", "merge it and serve the merged model"),
}
_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.weight)?$")


def rank(config: dict[str, Any]) -> int:
    """The largest rank in an adapter_config.json (or a recipe's `lora:` section): r, or a larger value of rank_pattern."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def max_lora_rank(needed: int) -> int | None:
    """The smallest `--max-lora-rank` that serves rank `needed`; None when vLLM has none."""
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= needed), None)


def rank_to_serve(ranks: list[int], given: int | None = None) -> int:
    """The `--max-lora-rank` for adapters of these ranks: the smallest that fits, or `given` when that is allowed and large enough."""
    needed = max(ranks)
    fits = max_lora_rank(needed)
    if fits is None:
        raise RecipeError(
            Problem(f"rank {needed}", f"above {MAX_LORA_RANKS[-1]}, the largest vLLM {VLLM} serves", "merge the adapter instead")
        )
    if given is not None and given not in MAX_LORA_RANKS:
        raise RecipeError(Problem(f"--max-lora-rank {given}", f"not one of {', '.join(map(str, MAX_LORA_RANKS))}", f"use {fits}"))
    if given is not None and given < needed:
        raise RecipeError(Problem(f"--max-lora-rank {given}", f"below the adapter's rank {needed}", f"use {fits}"))
    return given or fits


def config_faults(config: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, found, what to do) for each setting that vLLM refuses or misreads; of an adapter_config.json or a recipe's `lora:`."""
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        yield "peft_type", f"vLLM {VLLM} serves only LoRA, not {kind}", "merge it, where it merges, or use it by PEFT"
        return
    for key, (name, do) in UNSUPPORTED.items():
        if config.get(key):
            yield key, f"vLLM {VLLM} serves no {name}", do
    if config.get("bias", "none") != "none":
        yield "bias", f"vLLM {VLLM} serves no adapter with bias: {config['bias']}", "train with bias: none, or merge"
    saved = [m for m in config.get("modules_to_save") or [] if m not in ("classifier", "score")]
    if saved:
        yield (
            "modules_to_save",
            f"vLLM {VLLM} serves no whole modules ({', '.join(saved)}) in an adapter",
            "merge it and serve the merged model",
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        do = "save it with path_initial_model_for_weight_conversion (PEFT), which turns it into a plain LoRA, or merge"
        yield "init_lora_weights", f"{init} changes the base model; on the untouched base the adapter would be wrong", do
    needed = rank(config)
    if max_lora_rank(needed) is None:
        yield "r", f"rank {needed} is above {MAX_LORA_RANKS[-1]}, the largest vLLM {VLLM} serves", "lower r, or merge"


def z_without_qkv(modules: Collection[str]) -> tuple[str, str] | None:
    """(found, what to do) when a linear-attention layer has an adapter on in_proj_z and none on in_proj_qkv."""
    if any(m.endswith(".in_proj_z") and m.replace(".in_proj_z", ".in_proj_qkv") not in modules for m in modules):
        return "in_proj_z is adapted without in_proj_qkv", f"vLLM {VLLM} joins the two and cannot load z alone: train both, or merge"
    return None


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as it is on disk: adapter_config.json, and the tensors of adapter_model.safetensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def file(self) -> Path:
        """The tensors' file."""
        return self.path / "adapter_model.safetensors"

    @property
    def modules(self) -> dict[str, dict[str, str]]:
        """Adapted module (as PEFT named it, without its prefix) -> {"A": tensor name, "B": tensor name}."""
        found: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            if match := _KEY.match(name):
                found.setdefault(match["module"], {})[match["kind"][-1]] = name
        return found


def read(path: Path, anything: bool = False) -> Adapter:
    """The adapter in the folder `path`. RecipeError when it is none, or when a file is missing, cut or broken.

    `anything`: take PEFT's other types too, which no server here does.
    """
    config, file = _config(path, anything), path / "adapter_model.safetensors"
    if not file.is_file():
        patterns = ("*.distcp", "global_step*", "pytorch_model_fsdp*", "zero_*", "*.bin", "*.pt")
        left = [p.name for pattern in patterns for p in path.glob(pattern)]
        found = "no adapter_model.safetensors" + (f", but {', '.join(left[:3])}: sharded or pickled training state" if left else "")
        raise RecipeError(Problem(shown(path), found, "save a complete adapter (consolidate the shards) as safetensors"))
    try:
        return Adapter(path, config, weights.header(file))
    except ValueError as error:
        raise RecipeError(Problem(shown(file), str(error), "copy the adapter again, or take an earlier checkpoint")) from None


def _config(path: Path, anything: bool) -> dict[str, Any]:
    file = path / "adapter_config.json"
    if not file.is_file():
        do = "give the folder that holds adapter_config.json" if path.is_dir() else "train it first, or check the path"
        raise RecipeError(Problem(shown(path), "no adapter_config.json in it" if path.is_dir() else "no such folder", do))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(Problem(shown(file), f"broken JSON: {error}", "copy the adapter again")) from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA" and anything and isinstance(config, dict) and isinstance(kind, str):
        return config
    if kind != "LORA":
        raise RecipeError(Problem(shown(file), f"peft_type is {kind}, not LORA", "vLLM does not look, and would serve it wrongly"))
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]:
        raise RecipeError(Problem(shown(file), f"has no {', '.join(missing)}", "it is not one that PEFT wrote"))
    if not (isinstance(config["r"], int) and config["r"] > 0):
        raise RecipeError(Problem(shown(file), f"r is {config['r']!r}", "a whole number above 0"))
    ranks = config.get("rank_pattern") or {}
    if not (isinstance(ranks, dict) and all(isinstance(r, int) for r in ranks.values())):
        raise RecipeError(Problem(shown(file), f"rank_pattern is {ranks!r}", "module names with whole numbers"))
    if not isinstance(config["lora_alpha"], int | float):
        raise RecipeError(Problem(shown(file), f"lora_alpha is {config['lora_alpha']!r}", "a number"))
    if not isinstance(config.get("base_model_name_or_path", ""), str | None):
        raise RecipeError(Problem(shown(file), "base_model_name_or_path is no text", "the base's folder or hub id"))
    return config
