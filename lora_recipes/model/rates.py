"""Learning rates that differ between parameters: LoRA+ (B faster than A), and rates by depth for training the
base itself.

LoRA+: Hayou et al., arXiv 2402.12354. The rates by depth are absolute; train.learning_rate must be the one of
the last blocks, so that the plan's curve and the logged rate are that of the first parameter group.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig

from lora_recipes.recipe.recipe import Recipe
from lora_recipes.recipe.rules import DEPTHS
from lora_recipes.recipe.sections import LearningRates


def plain(arguments: SFTConfig) -> bool:
    """Is train.optim a torch.optim.Optimizer that takes parameter groups?"""
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError):
        return False
    return (
        isinstance(cls, type)
        and issubclass(cls, torch.optim.Optimizer)
        and not {"params", "model", "optimizer_dict"} & set(options)
    )


def depth(name: str, blocks: int) -> str:
    """`embeddings`; or `early`, `middle`, `last`: the third of the `blocks` in which the parameter `name`
    lies.

    What comes after the blocks, the final norm and an lm_head of its own, is `last`.
    """
    if match := re.search(r"\.layers\.(\d+)\.", name):
        return ("early", "middle", "last")[3 * int(match[1]) // blocks]
    return "embeddings" if "embed" in name else "last"


def groups(model: PreTrainedModel, rates: LearningRates, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups by depth, each split into what decays and what does not (norms and biases), `last`
    first; none is empty.
    """
    decays = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it reads no self
    blocks = model.config.get_text_config().num_hidden_layers
    found: dict[tuple[str, bool], list[Any]] = {(d, decay): [] for d in DEPTHS for decay in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[depth(name, blocks), name in decays].append(parameter)
    return [
        {"params": parameters, "lr": rates.given[d], "weight_decay": weight_decay if decay else 0.0}
        for (d, decay), parameters in found.items()
        if parameters
    ]


def said(model: PreTrainedModel, recipe: Recipe, rate: float) -> str:
    """What the plan says of the section: the rate of A and of B, or how many parameters have which rate.
    Empty without the section.
    """
    rates = recipe.learning_rates
    if rates is None:
        return ""
    if ratio := rates.loraplus_lr_ratio:
        embedding = rates.loraplus_lr_embedding or 1e-6
        return f"LoRA+: A {rate:g}, B {ratio * rate:g} ({ratio:g} times), LoRA on embeddings {embedding:g}"
    counts = dict.fromkeys(DEPTHS, 0)
    for name, parameter in model.named_parameters():
        counts[depth(name, model.config.get_text_config().num_hidden_layers)] += (
            parameter.numel() if parameter.requires_grad else 0
        )
    return "; ".join(f"{d} {rates.given[d]:g} ({count:,} parameters)" for d, count in counts.items())


def factory(recipe: Recipe, arguments: SFTConfig) -> tuple[Any, dict[str, Any]] | None:
    """What SFTTrainer takes as `optimizer_cls_and_kwargs`; None without the section.

    transformers calls it with the model as it will be trained, after FSDP has sharded it
    (Trainer.create_optimizer).
    """
    rates = recipe.learning_rates
    if rates is None:
        return None

    def make(model: Any) -> torch.optim.Optimizer:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if rates.loraplus_lr_ratio is None:
            return cls(groups(model, rates, arguments.weight_decay), **options)
        # PEFT's own default is 0, whatever train: says.
        options |= rates.given | {"loraplus_weight_decay": arguments.weight_decay}
        return create_loraplus_optimizer(model, cls, **options)

    maker: Callable[[], Callable[[Any], torch.optim.Optimizer]] = lambda: make  # noqa: E731
    return maker, {}
