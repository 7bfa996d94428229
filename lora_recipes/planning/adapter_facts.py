"""What the plan says of an adapter before it is trained: exact counts, bytes, whether vLLM serves it, whether
it merges.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PromptLearningConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from lora_recipes.core import adapter_folder
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.record import AdapterFacts
from lora_recipes.model import build
from lora_recipes.recipe.base import Base
from lora_recipes.recipe.recipe import Recipe, as_saved
from lora_recipes.recipe.sections import Lora, Peft
from lora_recipes.serving import rules

Said = tuple[AdapterFacts, str, list[str]]  # facts for machines, a line for people, warnings


def counts(model: PreTrainedModel, config: PeftConfig, recipe: Recipe) -> tuple[int, int, int]:
    """Trainable and total parameters as PEFT counts them, and the bytes of the adapter's tensors. `model`
    (meta) gets the adapter.
    """
    try:
        peft_model = get_peft_model(model, build.shapes(config), low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(
            Problem(recipe.at(recipe.method), f"PEFT refuses it on this model: {error}")
        ) from None
    trainable, total = peft_model.get_nb_trainable_parameters()
    # AdaLoRA's `ranknum`, a number a module, is trainable on the meta device only.
    trainable -= sum(
        p.numel() for n, p in peft_model.named_parameters() if p.requires_grad and "ranknum" in n
    )
    if isinstance(config, PromptLearningConfig):  # saved as what the encoder makes of its tokens
        encoder: Any = peft_model.prompt_encoder["default"]
        tokens = torch.zeros(1, peft_model.prompt_tokens["default"].numel(), dtype=torch.int64, device="meta")
        tokens = tokens[:, : config.num_virtual_tokens] if config.peft_type == "PREFIX_TUNING" else tokens
        state = {"prompt_embeddings": encoder(tokens)}
    else:
        state = get_peft_model_state_dict(peft_model)
    return trainable, total, sum(t.numel() * t.element_size() for t in state.values())


def published(base: Base) -> dict[str, Any]:
    """The config.json of the base, as far as it is known: vLLM goes by its `architectures`."""
    if base.contract:
        return base.contract.config | {"architectures": [base.contract.architecture]}
    if base.maker and not Path(base.weights).is_dir():
        return published(base.maker.base)
    found: dict[str, Any] = base.real_config().to_dict()
    return found


def lora(section: Lora, config: LoraConfig, size: int, adapted: list[str], base: dict[str, Any]) -> Said:
    """Of a `lora:` section. `size`: bytes of its tensors as they train; `adapted`: the names of its
    modules; `base`: the config.json of the base.
    """
    saved = as_saved(section)
    rank = adapter_folder.rank(saved)
    size *= saved["r"] // section.r
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    made = {key: getattr(config, key) for key in ("trainable_token_indices", "target_parameters")}
    classifies = str(config.task_type) == "SEQ_CLS"
    faults = list(rules.config_faults(saved | made))
    if without := rules.z_without_qkv(set(adapted)):
        faults.append(("target_modules", *without))
    faults += [("target_modules", *said) for said in rules.class_faults(base, adapted)]
    served = None if faults or classifies else rules.max_lora_rank(rank)
    merges = not config.lora_bias  # PEFT merges that only where the base has a bias too
    facts = AdapterFacts(
        r=config.r, scaling=scaling, bytes=size, rank=rank, max_lora_rank=served, merges=merges
    )
    patterns = (
        " (others by rank_pattern, alpha_pattern)" if config.rank_pattern or config.alpha_pattern else ""
    )
    parts = [
        f"r {config.r}, alpha {config.lora_alpha}, scaling {scaling:g}{patterns}",
        f"{size:,} bytes of tensors",
    ]
    if config.target_parameters:
        parts.append(f"added to the weight itself in each pass: {listed(config.target_parameters, 4)}")
    if saved["r"] != config.r:
        parts.append(f"saved for the untouched base with r {saved['r']}")
    parts.append("merges" if merges else "merges only where the base has a bias")
    if classifies:  # a LoRA request of vLLM's brings no head
        parts.append("vLLM's classify endpoint serves it merged")
        faults = []
    else:
        alone = "vLLM cannot serve it as an adapter"
        parts.append(alone if faults else f"vLLM needs --max-lora-rank {served}")
    return (
        facts,
        "; ".join(parts),
        [
            *(f"lora.{key}: {found}: {do}" for key, found, do in faults),
            *rules.untried(base),
        ],
    )


def other(section: Peft, config: PeftConfig, size: int) -> Said:
    """Of a `peft:` section."""
    kind, merges = section.peft_type, not config.is_prompt_learning
    parts = [kind, f"{size:,} bytes of tensors"]
    if kind == "ADALORA":
        parts.append(
            f"ranks from {section.init_r} to {section.target_r} in the mean, cut step by step by importance"
        )
    parts.append("merges" if merges else "has no weights to merge: PEFT uses it")
    parts.append("vLLM serves only LoRA as an adapter" + (": serve the merged model" if merges else ""))
    facts = AdapterFacts(peft_type=kind, bytes=size, merges=merges, max_lora_rank=None)
    return facts, "; ".join(parts), []
