"""Learning rates that differ between parameters: LoRA+ (B faster than A), and rates by depth for training the
base itself.

LoRA+: Hayou et al., arXiv 2402.12354. The rates by depth are absolute; train.learning_rate must be the one of
the last blocks, so that the plan's curve and the logged rate are that of the first parameter group.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig

from lora_recipes.core.errors import Problem
from lora_recipes.recipe.recipe import Recipe

DEPTHS = ("last", "middle", "early", "embeddings")


def problems(recipe: Recipe, arguments: SFTConfig) -> Iterator[Problem]:
    """A `learning_rates:` section that its method, its optimizer or train.learning_rate would not follow."""
    given = recipe.learning_rates
    ratio, depths = "loraplus_lr_ratio" in given, [d for d in DEPTHS if d in given]
    where = recipe.at("learning_rates")
    if "learning_rates" in recipe.sections and ratio == bool(depths):
        yield Problem(
            where,
            "either loraplus_lr_ratio or rates by depth",
            f"one of the two; by depth all of {', '.join(DEPTHS)}",
        )
        return
    if ratio and recipe.method != "lora":
        yield Problem(
            recipe.at("learning_rates", "loraplus_lr_ratio"),
            f"{recipe.method}: has no A and B",
            "write lora:, or remove it",
        )
    if depths and not recipe.whole:
        yield Problem(
            where,
            f"rates by depth are for full: and freeze:, not {recipe.method}:",
            "remove it, or loraplus_lr_ratio",
        )
    if depths and len(depths) < len(DEPTHS):
        yield Problem(where, f"only {', '.join(depths)}", f"say all of {', '.join(DEPTHS)}")
    elif depths and given["last"] != arguments.learning_rate:
        found = f"{arguments.learning_rate:g} is not learning_rates.last, {given['last']:g}"
        yield Problem(
            recipe.at("train", "learning_rate"), found, "write the same: the rates by depth are what is used"
        )
    if given and (arguments.optim_target_modules or not plain(arguments)):
        yield Problem(
            recipe.at("train", "optim"),
            f"{arguments.optim} sorts the parameters itself",
            "adamw_torch, or another plain optimizer",
        )


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


def groups(model: PreTrainedModel, recipe: Recipe, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups by depth, each split into what decays and what does not (norms and biases), `last`
    first; none is empty.
    """
    decays = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    blocks = model.config.get_text_config().num_hidden_layers
    found: dict[tuple[str, bool], list[Any]] = {(d, decay): [] for d in DEPTHS for decay in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[depth(name, blocks), name in decays].append(parameter)
    return [
        {"params": parameters, "lr": recipe.learning_rates[d], "weight_decay": weight_decay if decay else 0.0}
        for (d, decay), parameters in found.items()
        if parameters
    ]


def said(model: PreTrainedModel, recipe: Recipe, rate: float) -> str:
    """What the plan says of the section: the rate of A and of B, or how many parameters have which rate.
    Empty without the section.
    """
    given = recipe.learning_rates
    if ratio := given.get("loraplus_lr_ratio"):
        embedding = given.get("loraplus_lr_embedding", 1e-6)
        return f"LoRA+: A {rate:g}, B {ratio * rate:g} ({ratio:g} times), LoRA on embeddings {embedding:g}"
    counts = dict.fromkeys(DEPTHS if given else (), 0)
    for name, parameter in model.named_parameters() if given else ():
        counts[depth(name, model.config.get_text_config().num_hidden_layers)] += (
            parameter.numel() if parameter.requires_grad else 0
        )
    return "; ".join(f"{d} {given[d]:g} ({count:,} parameters)" for d, count in counts.items())


def factory(recipe: Recipe, arguments: SFTConfig) -> tuple[Any, dict[str, Any]] | None:
    """What SFTTrainer takes as `optimizer_cls_and_kwargs`; None without the section.

    transformers calls it with the model as it will be trained, after FSDP has sharded it
    (Trainer.create_optimizer).
    """
    given = recipe.learning_rates
    if not given:
        return None

    def make(model: Any) -> torch.optim.Optimizer:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if "loraplus_lr_ratio" not in given:
            return cls(groups(model, recipe, arguments.weight_decay), **options)
        options |= given | {
            "loraplus_weight_decay": arguments.weight_decay
        }  # PEFT's own default is 0, whatever train: says
        return create_loraplus_optimizer(model, cls, **options)

    maker: Callable[[], Callable[[Any], torch.optim.Optimizer]] = lambda: make  # noqa: E731
    return maker, {}
