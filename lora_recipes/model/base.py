"""The base model of a recipe before its weights: where it comes from, its config, and the model on the meta
device.
"""

from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.recipe.base import contract_of, path
from lora_recipes.recipe.recipe import Recipe


def real_config(recipe: Recipe, outputs: Path) -> PreTrainedConfig:
    """The config of the weights themselves: the folder's, or the hub's."""
    name = path(recipe, outputs)
    try:
        return AutoConfig.from_pretrained(name, revision=recipe.model.get("revision", "main"))
    except (OSError, ValueError) as error:
        do = "check the name, the network and the login; with model.contract a plan needs neither"
        found = f"the config of {name} cannot be read: {str(error).splitlines()[0]}"
        raise RecipeError(Problem(recipe.at("model", "name_or_path"), found, do)) from None


def text_config(recipe: Recipe, outputs: Path) -> PreTrainedConfig:
    """The config of the text model: from the contract when there is one (no network), else from the folder or
    the hub.
    """
    if contract := contract_of(recipe):
        try:
            return AutoConfig.for_model(**contract.config).get_text_config()
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise RecipeError(
                Problem(recipe.at("model", "contract"), f"transformers cannot build {contract.name}: {error}")
            ) from None
    return real_config(recipe, outputs).get_text_config()


def contract_differences(recipe: Recipe, outputs: Path) -> list[str]:
    """Where the real checkpoint's config departs from the contract; empty when they agree or when either is
    missing.
    """
    contract = contract_of(recipe)
    if contract is None or recipe.model.get("weights") == "random":
        return []
    return contract.differences(real_config(recipe, outputs).get_text_config().to_dict())


def meta_model(recipe: Recipe, outputs: Path) -> PreTrainedModel:
    """The text model without weights (meta device), as AutoModelForCausalLM will build it. Takes no
    memory.
    """
    config = text_config(recipe, outputs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model["dtype"]))
    if contract := contract_of(recipe):
        found = contract.departures({name: parameter.shape for name, parameter in model.named_parameters()})
        where, do = recipe.at("model", "contract"), f"correct configs/models/{contract.name}.yaml"
        raise_if(
            [
                Problem(where, f"transformers {transformers.__version__} builds {departure}", do)
                for departure in found
            ]
        )
    return model
