"""The base model without weights, as it will be built; and does the checkpoint say what the contract says?"""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lora_recipes.core.errors import Problem, raise_if
from lora_recipes.recipe.base import Base


def contract_differences(base: Base, real: PreTrainedConfig) -> list[str]:
    """Where the checkpoint's config (`real`) departs from the contract; empty when they agree or there is
    none."""
    if base.contract is None or base.recipe.model.weights == "random":
        return []
    return base.contract.differences(real.get_text_config().to_dict())


def meta_model(base: Base) -> PreTrainedModel:
    """The text model on the meta device, as AutoModelForCausalLM will build it. Takes no memory."""
    with torch.device("meta"):
        dtype = getattr(torch, base.recipe.model.dtype)
        model = AutoModelForCausalLM.from_config(base.text_config(), dtype=dtype)
    if contract := base.contract:
        found = contract.departures({name: parameter.shape for name, parameter in model.named_parameters()})
        where, do = base.recipe.at("model", "contract"), f"correct configs/models/{contract.name}.yaml"
        built = f"transformers {transformers.__version__} builds"
        raise_if([Problem(where, f"{built} {departure}", do) for departure in found])
    return model
