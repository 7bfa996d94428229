"""The base model of a recipe before its weights: where it comes from, its config, and the model on the meta device."""

from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lora_recipes import contract as contracts
from lora_recipes import recipe as recipes
from lora_recipes.contract import Contract
from lora_recipes.messages import Problem, RecipeError, raise_if
from lora_recipes.recipe import Recipe, rooted
from lora_recipes.run import RunFolder
from lora_recipes.yamlfile import shown


def contract_of(recipe: Recipe) -> Contract | None:
    """The recipe's contract; a base that another recipe trains has that recipe's."""
    if name := recipe.model.get("contract"):
        return contracts.load(name, recipe.at("model", "contract"))
    return contract_of(recipe_of(recipe)) if recipe.model.get("from_recipe") else None


def recipe_of(recipe: Recipe) -> Recipe:
    """The recipe named by model.from_recipe. It must be a `full:` or `freeze:` one: what it leaves is a whole model."""
    where, chain, last = recipe.at("model", "from_recipe"), [recipe.name], recipe
    while name := last.model.get("from_recipe"):
        last = recipes.load(name)
        if not last.whole:
            raise RecipeError(
                Problem(where, f"{name} trains an adapter, not a model", "name a full: or freeze: recipe, or merge the adapter first")
            )
        if name in chain:
            raise RecipeError(Problem(where, f"the recipes build on each other in a circle: {' -> '.join([*chain, name])}", "break it"))
        chain.append(name)
    return recipes.load(recipe.model["from_recipe"])


def path(recipe: Recipe, outputs: Path) -> str:
    """Where the base's weights are: a hub id or a folder. RecipeError when the folder holds an adapter."""
    model = recipe.model
    if name := model.get("from_recipe"):
        return str(RunFolder(outputs / name).result("full"))
    if model.get("weights") == "random":
        return str(outputs / "_bases" / f"{model['contract']}-{model['dtype']}")
    path = rooted(model["name_or_path"])
    if (path / "adapter_config.json").is_file():
        do = "TRL would reset that adapter in silence. Name the base it was trained on, or merge it first"
        raise RecipeError(Problem(recipe.at("model", "name_or_path"), f"{shown(path)} is an adapter, not a base model", do))
    return str(path) if path.is_dir() else model["name_or_path"]


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
    """The config of the text model: from the contract when there is one (no network), else from the folder or the hub."""
    if contract := contract_of(recipe):
        try:
            return AutoConfig.for_model(**contract.config).get_text_config()
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise RecipeError(Problem(recipe.at("model", "contract"), f"transformers cannot build {contract.name}: {error}")) from None
    return real_config(recipe, outputs).get_text_config()


def contract_differences(recipe: Recipe, outputs: Path) -> list[str]:
    """Where the real checkpoint's config departs from the contract; empty when they agree or when either is missing."""
    contract = contract_of(recipe)
    if contract is None or recipe.model.get("weights") == "random":
        return []
    return contract.differences(real_config(recipe, outputs).get_text_config().to_dict())


def meta_model(recipe: Recipe, outputs: Path) -> PreTrainedModel:
    """The text model without weights (meta device), as AutoModelForCausalLM will build it. Takes no memory."""
    config = text_config(recipe, outputs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model["dtype"]))
    if contract := contract_of(recipe):
        found = contract.departures({name: parameter.shape for name, parameter in model.named_parameters()})
        where, do = recipe.at("model", "contract"), f"correct configs/models/{contract.name}.yaml"
        raise_if([Problem(where, f"transformers {transformers.__version__} builds {departure}", do) for departure in found])
    return model
