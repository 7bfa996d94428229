"""A mixture of experts in numbers: which parameters its routed experts are, and how many a token passes."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Routed:
    """The routed experts of one layer: their module, how many, how many a token passes (None: not known), and
    their parameters.
    """

    module: nn.Module
    experts: int
    chosen: int | None
    parameters: list[nn.Parameter]


def routed(model: PreTrainedModel) -> list[Routed]:
    """Those of each layer: modules whose name or class says experts, with one tensor for all of them
    (experts, ., .), or a list of one module each. Shared experts, which every token passes, are none.
    """
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2].lower()
        if "shared" in last or not ("expert" in last or "Expert" in type(module).__name__):
            continue
        if isinstance(module, nn.ModuleList):
            experts, parameters = len(module), list(module.parameters())
        else:
            own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
            experts = next((p.shape[0] for p in own if p.dim() == 3), 0)
            parameters = [p for p in own if p.dim() == 3 or p.shape[0] == experts]
        if experts > 1 and parameters:
            found.append(Routed(module, experts, _chosen(model, name), parameters))
    return found


def _chosen(model: PreTrainedModel, name: str) -> int | None:
    """How many experts a token passes: what the module, its router or its neighbours call top_k, else the
    config's num_experts_per_tok.
    """
    above: Any = model.get_submodule(name.rpartition(".")[0])
    owners = [model.get_submodule(name), above, *above.children()]
    asked = [getattr(owner, "top_k", None) for owner in owners]
    asked.append(getattr(model.config.get_text_config(), "num_experts_per_tok", None))
    return next((value for value in asked if isinstance(value, int)), None)


def said(model: PreTrainedModel) -> tuple[int | None, str]:
    """How many parameters of `model` a token passes, and a sentence of it. None: all, or it is not known."""
    layers = routed(model)
    if not layers:
        return None, ""
    if any(layer.chosen is None for layer in layers):
        return None, "a mixture of experts; how many of them a token passes is not known"
    idle = sum(
        sum(p.numel() for p in layer.parameters) * (layer.experts - (layer.chosen or 0)) // layer.experts
        for layer in layers
    )
    active = model.num_parameters() - idle
    kinds = sorted({(layer.chosen, layer.experts) for layer in layers if layer.chosen})
    words = ", ".join(f"{chosen} of {experts}" for chosen, experts in kinds)
    return active, f"a token passes {active:,} of them: {words} experts in {len(layers)} layers, and the rest"
