"""The load-balancing loss of a mixture of experts: SFTTrainer adds it to the loss by the config of the base
(TRL 1.16, sft_trainer.py), whether or not the router is trained.
"""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from lora_recipes.model import targets
from lora_recipes.recipe.recipe import Recipe


def name_experts(model: PreTrainedModel) -> None:
    """Give the config of `model` the `num_experts` that TRL's loss asks it for, where its class has another
    name for it (Granite: num_local_experts)."""
    config: Any = model.config.get_text_config()
    if not hasattr(config, "output_router_logits") or hasattr(config, "num_experts"):
        return
    if len(counts := set(targets.experts(model).values())) == 1:
        config.num_experts = counts.pop()


def coefficient(model: PreTrainedModel, recipe: Recipe) -> float:
    """The share of the load-balancing loss in the loss that is trained, as SFTTrainer takes it; 0: none."""
    config, given = model.config.get_text_config(), recipe.train.given.get("router_aux_loss_coef")
    if not hasattr(config, "output_router_logits"):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if given is None else given)


def lines(model: PreTrainedModel, recipe: Recipe, adapted: Collection[str] = ()) -> list[tuple[str, str]]:
    """The plan's line on it: is that loss trained, and are the routers? None without routed experts.
    `adapted`: names of the modules and parameters that carry an adapter."""
    if not targets.experts(model):
        return []
    share, routers = coefficient(model, recipe), targets.routers(model)
    whose = "train" if "router_aux_loss_coef" in recipe.train.given else "the base's config.json"
    text = f"load-balancing loss x {share:g} in the trained loss (router_aux_loss_coef of {whose})"
    if not hasattr(model.config.get_text_config(), "output_router_logits"):
        text = f"no load-balancing loss ({type(model).__name__} gives no router logits)"
    elif not share:
        text = f"no load-balancing loss (router_aux_loss_coef of {whose}: 0 or none)"
    if recipe.whole:
        trained = any(p.requires_grad for name in routers for p in model.get_submodule(name).parameters())
    else:
        trained = bool(routers & {name.removesuffix(".weight") for name in adapted})
    return [("router", f"{text}; routers {'trained' if trained else 'frozen'}")]
