"""What vLLM refuses of an adapter, and the ranks it serves. Imports no torch.

The rules are those of vLLM 0.32 (vllm/lora/peft_helper.py, config/lora.py).
"""

from collections.abc import Collection, Iterator
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.adapter_folder import rank
from lora_recipes.core.errors import Problem, RecipeError

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
