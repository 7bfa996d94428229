"""What vLLM refuses of an adapter, and the classes, modules and ranks that it serves. Imports no torch.

The rules are those of vLLM 0.32 (vllm/lora/peft_helper.py, config/lora.py, worker_manager.py, lora_model.py);
what its classes take stands in vllm.json, which scripts/vllm_table.py makes of them.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.adapter_folder import rank
from lora_recipes.core.errors import Problem, RecipeError, listed

VLLM = "0.32"
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank

# init_lora_weights that leave the base as it is; all others subtract something from it when PEFT loads the
# adapter.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
UNSUPPORTED = {
    "use_dora": ("DoRA", f"merge it ({cli.command('merge')}) and serve the merged model"),
    "lora_bias": ("a bias in lora_B (lora_bias)", "train without lora_bias, or merge"),
    "alora_invocation_tokens": ("activated LoRA", "merge, or serve it elsewhere"),
    "layer_replication": ("layer replication", "merge, or serve it elsewhere"),
    "use_bdlora": ("block-diagonal LoRA", "merge, or serve it elsewhere"),
    "use_qalora": ("QALoRA", "merge, or serve it elsewhere"),
    "trainable_token_indices": ("trained token embeddings", "merge it and serve the merged model"),
}
HEADS = ("lm_head", "embed_out")  # no module of the class that runs transformers' own code


def max_lora_rank(needed: int) -> int | None:
    """The smallest `--max-lora-rank` that serves rank `needed`; None when vLLM has none."""
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= needed), None)


def rank_to_serve(ranks: list[int], given: int | None = None) -> int:
    """The `--max-lora-rank` for adapters of these ranks: the smallest that fits, or `given` when that is
    allowed and large enough.
    """
    needed = max(ranks)
    fits = max_lora_rank(needed)
    if fits is None:
        raise RecipeError(
            Problem(
                f"rank {needed}",
                f"above {MAX_LORA_RANKS[-1]}, the largest vLLM {VLLM} serves",
                "merge the adapter instead",
            )
        )
    if given is not None and given not in MAX_LORA_RANKS:
        raise RecipeError(
            Problem(
                f"--max-lora-rank {given}", f"not one of {', '.join(map(str, MAX_LORA_RANKS))}", f"use {fits}"
            )
        )
    if given is not None and given < needed:
        raise RecipeError(
            Problem(f"--max-lora-rank {given}", f"below the adapter's rank {needed}", f"use {fits}")
        )
    return given or fits


def config_faults(config: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, found, what to do) for each setting that vLLM refuses or misreads; of an adapter_config.json or a
    recipe's `lora:`.
    """
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        yield (
            "peft_type",
            f"vLLM {VLLM} serves only LoRA, not {kind}",
            "merge it, where it merges, or use it by PEFT",
        )
        return
    for key, (name, do) in UNSUPPORTED.items():
        if config.get(key):
            yield key, f"vLLM {VLLM} serves no {name}", do
    if experts := [p for p in config.get("target_parameters") or [] if not p.endswith(".weight")]:
        yield (
            "target_parameters",
            f"an adapter on {', '.join(experts)} is not served: vLLM {VLLM} takes routed experts under other"
            " names than PEFT's, on a GPU only, and nothing here has shown that it answers the same",
            f"merge it ({cli.command('merge')}) and serve the merged model",
        )
    if config.get("bias", "none") != "none":
        yield (
            "bias",
            f"vLLM {VLLM} serves no adapter with bias: {config['bias']}",
            "train with bias: none, or merge",
        )
    saved = [m for m in config.get("modules_to_save") or [] if m not in ("classifier", "score")]
    if saved:
        yield (
            "modules_to_save",
            f"vLLM {VLLM} serves no whole modules ({', '.join(saved)}) in an adapter",
            "merge it and serve the merged model",
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        do = (
            "save it with path_initial_model_for_weight_conversion (PEFT), which turns it into a plain LoRA,"
            " or merge"
        )
        yield (
            "init_lora_weights",
            f"{init} changes the base model; on the untouched base the adapter would be wrong",
            do,
        )
    needed = rank(config)
    if max_lora_rank(needed) is None:
        yield (
            "r",
            f"rank {needed} is above {MAX_LORA_RANKS[-1]}, the largest vLLM {VLLM} serves",
            "lower r, or merge",
        )


def z_without_qkv(modules: Collection[str]) -> tuple[str, str] | None:
    """(found, what to do) when a linear-attention layer has an adapter on in_proj_z and none on
    in_proj_qkv.
    """
    if any(
        m.endswith(".in_proj_z") and m.replace(".in_proj_z", ".in_proj_qkv") not in modules for m in modules
    ):
        return (
            "in_proj_z is adapted without in_proj_qkv",
            f"vLLM {VLLM} joins the two and cannot load z alone: train both, or merge",
        )
    return None


@functools.cache
def table() -> dict[str, Any]:
    """What the classes of vLLM take of an adapter: vllm.json."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("vllm.json").read_text(encoding="ascii"))
    return found


def served_class(config: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """The architecture of a config.json that vLLM goes by, and what the table says of it; None where it has
    no class of its own.
    """
    known: dict[str, Any] = table()["classes"]
    names = config.get("architectures") or [table()["types"].get(config.get("model_type"))]
    name = next((name for name in names if name in known), names[0])
    return name, known.get(name)


def no_class(config: dict[str, Any]) -> tuple[str, str] | None:
    """(found, what to do) when no class of vLLM runs the model at all."""
    name, entry = served_class(config)
    if entry is not None or name is None or name in table()["fallback"]:
        return None
    return f"vLLM {VLLM} has no class {name}", "use the model by transformers, and the adapter by PEFT"


def untried(config: dict[str, Any]) -> list[str]:
    """What to know of a model that vLLM has no class for and runs, if it can, by transformers' own code."""
    name, _ = served_class(config)
    said = f"vLLM {VLLM} has no class {name} and tries transformers' own code, which was not tried here"
    return [f"{said}: only the start tells"] if name in table()["fallback"] else []


def experts(config: dict[str, Any]) -> int:
    """How many routed experts a layer of the model has, by its config.json; 0 for a dense one."""
    text = config.get("text_config") or config
    counts = [
        value
        for key, value in text.items()
        if "experts" in key and type(value) is int and not re.search("shared|per_tok|size", key)
    ]
    return max(counts, default=0)


def class_faults(config: dict[str, Any], modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """(found, what to do) for what the class that vLLM loads for a base does not take of an adapter.
    `config`: the base's config.json; `modules`: those adapted, whole names or their last parts.
    """
    name, entry = served_class(config)
    if alone := no_class(config):
        yield alone
    if name is None or entry is None:
        return
    if not entry.get("lora", True):
        yield f"vLLM {VLLM} serves {name}, but no LoRA on it", "merge it and serve the merged model"
        return
    takes = _modules(config, entry)
    leaves = {m.rsplit(".", 1)[-1]: m for m in modules if ".experts" not in m}
    refused = [leaf for leaf in leaves if not takes(leaf)]
    if refused:
        said = f"; it takes {', '.join(entry['modules'])}" if "modules" in entry else ""
        yield (
            f"vLLM {VLLM} takes no adapter on {listed(refused, 5)} of {name}{said}",
            "leave it out of target_modules, or merge and serve the merged model",
        )


def _modules(config: dict[str, Any], entry: dict[str, Any]) -> Callable[[str], bool]:
    """Does the class take an adapter on a module of that (last part of a) name?"""
    if "ignored" in entry or entry.get("backend"):  # transformers' own modules, all that are linear
        return lambda leaf: leaf not in (*HEADS, *entry.get("ignored", []))
    if "modules" not in entry:  # its class could not be read
        return lambda leaf: True
    inner = config.get("text_config") if entry.get("inner") else None
    if inner is None:
        return lambda leaf: leaf in entry["modules"]
    within = served_class(inner)[1]
    also = _modules(inner, within) if within else lambda leaf: True
    return lambda leaf: leaf in entry["modules"] or also(leaf)
