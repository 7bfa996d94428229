"""The base of a recipe: its contract, where its weights are, the recipe that makes it. Imports no torch."""

from pathlib import Path

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.run_folder import RunFolder, run_name
from lora_recipes.core.yamlfile import shown
from lora_recipes.recipe import contract as contracts
from lora_recipes.recipe import recipe as recipes
from lora_recipes.recipe.contract import Contract
from lora_recipes.recipe.recipe import Recipe


def contract_of(recipe: Recipe) -> Contract | None:
    """The recipe's contract; a base that another recipe trains has that recipe's."""
    if name := recipe.model.get("contract"):
        return contracts.load(name, recipe.at("model", "contract"))
    return contract_of(recipe_of(recipe)) if recipe.model.get("from_recipe") else None


def recipe_of(recipe: Recipe) -> Recipe:
    """The recipe named by model.from_recipe. It must be a `full:` or `freeze:` one: what it leaves is a whole
    model.
    """
    where, chain, last = recipe.at("model", "from_recipe"), [recipe.name], recipe
    while name := last.model.get("from_recipe"):
        last = recipes.load(name, beside=last.path.parent)
        if not last.whole:
            raise RecipeError(
                Problem(
                    where,
                    f"{name} trains an adapter, not a model",
                    "name a full: or freeze: recipe, or merge the adapter first",
                )
            )
        if last.name in chain:
            raise RecipeError(
                Problem(
                    where,
                    f"the recipes build on each other in a circle: {' -> '.join([*chain, last.name])}",
                    "break it",
                )
            )
        chain.append(last.name)
    return recipes.load(recipe.model["from_recipe"], beside=recipe.path.parent)


def path(recipe: Recipe, outputs: Path) -> str:
    """Where the base's weights are: a hub id or a folder. RecipeError when the folder holds an adapter."""
    model = recipe.model
    if name := model.get("from_recipe"):
        return str(RunFolder(outputs / run_name(name)).result("full"))
    if model.get("weights") == "random":
        return str(outputs / "_bases" / f"{model['contract']}-{model['dtype']}")
    path = recipe.file(model["name_or_path"])
    if (path / "adapter_config.json").is_file():
        do = "TRL would reset that adapter in silence. Name the base it was trained on, or merge it first"
        raise RecipeError(
            Problem(recipe.at("model", "name_or_path"), f"{shown(path)} is an adapter, not a base model", do)
        )
    return str(path) if path.is_dir() else model["name_or_path"]
