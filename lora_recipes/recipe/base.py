"""A recipe with everything that it names found: a verb resolves it once and passes it down."""

import copy
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, hub, locate
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.recipe import contract as contracts
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.contract import Contract
from lora_recipes.recipe.recipe import Recipe

OWN_CODE = (
    "brings Python code of its own (auto_map), which is never run here: plan, memory, merge and vLLM would"
    " each have to trust it"
)
WITHOUT_CODE = (
    "name a checkpoint of a class that transformers has; where it is one under another name, write that"
    " model_type into its config.json and remove auto_map"
)


def unread(error: Exception, what: str, do: str) -> tuple[str, str]:
    """What to say of `what` (a config, a tokenizer, a model), which transformers cannot load because of
    `error`: what was found, and what to do (`do`, unless the reason is code of its own)."""
    if "trust_remote_code" in str(error):
        return f"{what} {OWN_CODE}", WITHOUT_CODE
    if unknown := re.search(r"model type `([^`]+)`", str(error)):
        import transformers

        found = f"{what} names the model_type {unknown[1]!r}, which transformers {transformers.__version__}"
        near = nearest(unknown[1], transformers.CONFIG_MAPPING)
        return f"{found} does not know", f"a newer transformers may know it; the nearest it has is {near}"
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    first += f" {more[0].strip()}" if first.endswith(":") and more else ""
    return f"{what} cannot be loaded: {first}", do


@dataclass(frozen=True)
class Base:
    """The base that `recipe` names. `weights`: where they are, a folder or a hub id. `maker`: the recipe that
    trains it (model.from_recipe), resolved.
    """

    recipe: Recipe
    weights: str
    contract: Contract | None = None
    maker: "Resolved | None" = None

    @property
    def said(self) -> str:
        """The base as the recipe names it, in words where it has no name."""
        model = self.recipe.model
        if model.weights == "random":
            return "random weights"
        if model.weights == "package":
            assert self.contract and self.contract.package, "_weights asks for it"
            package = self.contract.package
            return f"{package.holds}, of the package {package.name} {package.version}"
        return model.name_or_path or model.from_recipe or self.weights

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit on the hub."""
        return self.recipe.model.revision

    @property
    def at(self) -> str:
        """Where the recipe names it."""
        return self.recipe.at("model", "from_recipe" if self.maker else "name_or_path")

    @property
    def name(self) -> str:
        """The folder or hub id, to be read by people."""
        return shown(Path(self.weights)) if Path(self.weights).is_dir() else self.weights

    @property
    def folder(self) -> Path | None:
        """Its weights on this machine: a folder, or the cache's; None where they would have to be fetched, or
        made."""
        return locate.local(self.weights, self.revision)

    def config(self) -> Any:
        """The transformers.PreTrainedConfig of the base, all its parts: from the contract where there is one
        (no network), else from the folder or the hub. Read once; each call gives a copy, as libraries write
        into it."""
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        if self.contract is None:
            if self.maker and not Path(self.weights).is_dir():
                return self.maker.base.config()
            real = self.real_config()
            if real.is_encoder_decoder:
                found = (
                    f"{self.name} is an encoder-decoder ({type(real).__name__}): its decoder reads an encoder"
                )
                do = "name a checkpoint that continues text by itself (its class ends in ForCausalLM)"
                raise RecipeError(Problem(self.at, found, do))
            return real
        try:
            made = AutoConfig.for_model(**self.contract.config)
        except (ValueError, TypeError, StrictDataclassError) as error:
            found = f"transformers cannot build {self.contract.name}: {error}"
            raise RecipeError(Problem(self.recipe.at("model", "contract"), found)) from None
        if made.get_text_config() is not made:
            made.architectures = [self.contract.architecture]
        return made

    def real_config(self) -> Any:
        """The transformers.PreTrainedConfig of the weights themselves: the folder's, or the hub's."""
        return _config(self, self.revision)


@dataclass(frozen=True)
class Folder:
    """A base, or a whole model, that is a folder here and that no recipe names."""

    folder: Path

    @property
    def weights(self) -> str:
        """Where they are."""
        return str(self.folder)

    @property
    def at(self) -> str:
        """Where a fault of it is."""
        return self.name

    @property
    def name(self) -> str:
        """The folder, to be read by people."""
        return shown(self.folder)

    def real_config(self) -> Any:
        """The transformers.PreTrainedConfig of the weights."""
        return _config(self, None)


def _config(source: Base | Folder, revision: str | None) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    local = Path(source.weights).is_dir()
    if not local and not hub.is_id(source.weights):
        do = "a folder that holds a checkpoint, or owner/name of one on the hub"
        raise RecipeError(Problem(source.at, f"{source.name} is no folder here", do))
    silent = "" if local else hub.silent()
    try:
        return AutoConfig.from_pretrained(
            source.weights,
            revision=revision or "main",
            local_files_only=bool(silent),
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        if silent and "trust_remote_code" not in str(error):
            found = f"{source.name} is not on this machine, and {silent}"
            do = (
                f"name a folder that holds it; or, with a network, fetch it into the cache: hf download"
                f" {source.name}; a plan alone also goes by model.contract: one of configs/models/, or a"
                f" file that {cli.command('contract', MODEL='FOLDER')} makes"
            )
            raise RecipeError(Problem(source.at, found, do)) from None
        do = "check the name, the network and the login; with model.contract a plan needs neither"
        if local:
            do = "its config.json is not one that transformers reads: fetch the checkpoint anew"
        raise RecipeError(Problem(source.at, *unread(error, f"the config of {source.name}", do))) from None


@dataclass(frozen=True)
class Resolved:
    """`recipe`, and what it names. `outputs`: the folder of all runs. `tokenizer`: the contract whose
    tokenizer is used, if one is. `warm`: the full update that A and B begin from (warm_start.from_recipe).
    """

    recipe: Recipe
    outputs: Path
    base: Base
    tokenizer: Contract | None = None
    warm: "Resolved | None" = None

    @property
    def folder(self) -> RunFolder:
        """Where the run is."""
        return RunFolder(self.outputs / self.recipe.name)

    @property
    def result(self) -> Path:
        """What the run leaves."""
        return self.folder.result(self.recipe.method)

    def by(self, recipe: Recipe) -> "Resolved":
        """The same base under another recipe, whose `model:` names the same."""
        return replace(self, recipe=recipe)


def resolve(recipe: Recipe, outputs: Path) -> Resolved:
    """Find everything that `recipe` names. RecipeError for a contract, a recipe or a base that is none."""
    return _resolve(recipe, outputs.absolute(), [])  # adapter_config.json names its base by it


def _resolve(recipe: Recipe, outputs: Path, chain: list[str]) -> Resolved:
    model, chain = recipe.model, [*chain, recipe.name]
    maker = _maker(recipe, model.from_recipe, outputs, chain) if model.from_recipe else None
    contract = None
    if model.contract:
        contract = contracts.load(model.contract, recipe.at("model", "contract"), recipe.path.parent)
    contract = contract or (maker.base.contract if maker else None)
    tokenizer = None
    if model.tokenizer is None or (contract and model.tokenizer == contract.name):
        tokenizer = contract
    elif model.tokenizer in contracts.names():
        tokenizer = contracts.load(model.tokenizer)
    warm = None
    if recipe.warm_start and recipe.warm_start.from_recipe:
        warm = _resolve(
            recipes.load(recipe.warm_start.from_recipe, beside=recipe.path.parent), outputs, chain
        )
    if model.weights == "package" and not (contract and contract.package):
        have = [name for name in contracts.names() if contracts.load(name).package]
        found = f"the contract {model.contract} names no package"
        raise RecipeError(
            Problem(recipe.at("model", "weights"), found, f"those that do: {listed(have)}; or name_or_path")
        )
    return Resolved(
        recipe,
        outputs,
        Base(recipe, _weights(recipe, outputs, maker, contract), contract, maker),
        tokenizer,
        warm,
    )


def _maker(recipe: Recipe, name: str, outputs: Path, chain: list[str]) -> Resolved:
    """The recipe that trains the base, resolved. It must be a `full:` or `freeze:` one, which leaves a whole
    model.
    """
    where, maker = recipe.at("model", "from_recipe"), recipes.load(name, beside=recipe.path.parent)
    if not maker.whole:
        do = "name a full: or freeze: recipe, or merge the adapter first"
        raise RecipeError(Problem(where, f"{name} trains an adapter, not a model", do))
    if maker.name in chain:
        circle = " -> ".join([*chain, maker.name])
        raise RecipeError(
            Problem(where, f"the recipes build on each other in a circle: {circle}", "break it")
        )
    return _resolve(maker, outputs, chain)


def _weights(recipe: Recipe, outputs: Path, maker: Resolved | None, contract: Contract | None) -> str:
    """Where the base's weights are. RecipeError when the folder holds an adapter."""
    model = recipe.model
    if maker:
        return str(maker.result)
    if model.weights != "pretrained":
        assert contract is not None, "rules.py asks for it"
        return str(outputs / "_bases" / f"{contract.name}-{model.dtype}")
    assert model.name_or_path is not None, "rules.py asks for one of the three"
    path = recipe.file(model.name_or_path)
    if (path / "adapter_config.json").is_file():
        do = "TRL would reset that adapter in silence. Name the base it was trained on, or merge it first"
        found = f"{shown(path)} is an adapter, not a base model"
        raise RecipeError(Problem(recipe.at("model", "name_or_path"), found, do))
    return str(path) if path.is_dir() else model.name_or_path
