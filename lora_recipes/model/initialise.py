"""How A and B begin where PEFT's constructor alone is not enough: from data (EVA, CorDA), from the base
(PiSSA, OLoRA), from what NF4 rounded away (LoftQ), from the SVD of a full update, or from an adapter that was
trained before (`warm_start:`).

PiSSA, OLoRA and CorDA take their part out of the base: W = W' + s B0 A0. The adapter is saved as what was
learned, s (B A - B0 A0), of twice the rank, which is right on the untouched base (PEFT's
path_initial_model_for_weight_conversion).
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import base_fit, weights
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.locate import local
from lora_recipes.core.record import WarmStart
from lora_recipes.core.yamlfile import shown
from lora_recipes.data.render import Example
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import MUTATE, Recipe, initialisation

ROWS = 256  # rows of the training data that EVA and CorDA see at most


@dataclass(frozen=True)
class Start:
    """How an adapter began. `state`: its first A and B by parameter name, where they were taken out of the
    base. `errors`: of a warm start, by module.
    """

    state: dict[str, torch.Tensor] | None = None
    errors: dict[str, float] | None = None

    def lost(self) -> WarmStart | None:
        """How much of the update a warm start leaves out: |delta - s B A| / |delta|, the `mean` of all
        modules and the `worst`. None for another start.
        """
        if not self.errors:
            return None
        module, worst = max(self.errors.items(), key=lambda item: item[1])
        return WarmStart(mean=sum(self.errors.values()) / len(self.errors), worst=worst, module=module)

    @contextlib.contextmanager
    def base_of(self, model: PeftModel) -> Iterator[None]:
        """`model` answers as the untouched base: without the adapter, or with the A and B that were taken out
        of the base.
        """
        if self.state is None:
            with model.disable_adapter():
                yield
            return
        now = {n: p.detach().clone() for n, p in model.named_parameters() if n in self.state}
        _put(model, self.state)
        try:
            yield
        finally:
            _put(model, now)

    def convert(self, model: Any, folder: Path) -> None:
        """Write the adapter into `folder` anew where PEFT's own way of saving is not right for the untouched
        base: where A and B were taken out of it; and without the whole embedding that PEFT adds when the
        vocabulary has grown. `model` is of no further use then.
        """
        config = model.peft_config["default"]
        if self.state is not None:
            # Else PEFT would take A0 and B0 out of the base again when it loads them for the conversion.
            config.init_lora_weights = True
            with tempfile.TemporaryDirectory() as temporary:
                initial = f"{temporary}/initial"
                with self.base_of(model):
                    model.save_pretrained(initial)
                model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=initial)
        elif getattr(config, "trainable_token_indices", None):
            model.save_pretrained(str(folder), save_embedding_layers=False)


def batches(rows: Sequence[Example], device: torch.device, size: int) -> list[dict[str, torch.Tensor]]:
    """The first rows, `size` at once, padded on the right, as a model takes them."""
    found = []
    for i in range(0, min(len(rows), ROWS), size):
        part = rows[i : i + size]
        long = max(len(r.input_ids) for r in part)
        made = {
            "input_ids": [r.input_ids + [0] * (long - len(r.input_ids)) for r in part],
            "labels": [list(r.labels) + [-100] * (long - len(r.labels)) for r in part],
            "attention_mask": [[1] * len(r.input_ids) + [0] * (long - len(r.input_ids)) for r in part],
        }
        found.append({key: torch.tensor(value, device=device) for key, value in made.items()})
    return found


def before(base: PreTrainedModel, config: Any, recipe: Recipe, rows: Sequence[Example]) -> None:
    """CorDA looks at the base itself, before it carries an adapter: the covariance of each module's inputs
    over the training data.
    """
    if initialisation(recipe.lora) != "corda":
        return

    @torch.no_grad()
    def run_model() -> None:
        for batch in batches(rows, base.device, 1):  # peft 0.21 takes the covariance of one row at a time
            base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    base.eval()
    preprocess_corda(base, config, run_model)


def begin(model: Any, resolved: Resolved, rows: Sequence[Example]) -> dict[str, float] | None:
    """Set A and B of the trainer's own PEFT model `model` where its constructor was not enough. Returns the
    errors of a warm start.
    """
    recipe = resolved.recipe
    how = initialisation(recipe.lora)
    if how == "eva":
        training, found = model.training, batches(rows, next(model.parameters()).device, 8)
        try:
            initialize_lora_eva_weights(
                model.eval(), found, gather_distributed_inputs=False, show_progress_bar=False
            )
        except (ValueError, RuntimeError) as error:
            do = "more rows, a smaller r, or another initialisation"
            found_ = f"eva cannot begin: {str(error).splitlines()[0]}"
            raise RecipeError(Problem(recipe.at("lora", "init_lora_weights"), found_, do)) from error
        model.train(training)
    elif how == "loftq":
        folder = local(resolved.base.weights, resolved.base.revision)
        assert folder is not None, "the base was loaded from it"
        # One step of LoftQ; PEFT's replace_lora_weights_loftq (0.21) runs on CUDA only and forgets the
        # scaling.
        warm(model, folder)
    elif resolved.warm:
        return warm(model, resolved.warm.result)
    elif recipe.warm_start and recipe.warm_start.from_adapter:
        go_on(model, recipe)
    return None


def go_on(model: Any, recipe: Recipe) -> None:
    """Set every tensor of the adapter of `model` to those of warm_start.from_adapter. RecipeError where that
    is of another shape or scaling.
    """
    assert recipe.warm_start and recipe.warm_start.from_adapter
    at, adapter = recipe.at("warm_start", "from_adapter"), adapters.read(given_adapter(recipe), anything=True)
    saved = load_file(adapter.file)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    differ = [n for n in {**own, **saved} if n not in own or n not in saved or own[n].shape != saved[n].shape]
    scales = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and any(
            abs(scale - adapters.scaling(adapter.config, name.removeprefix("base_model.model."))) > 1e-6
            for scale in module.scaling.values()
        )
    ]
    if differ or scales:
        what = f"has other tensors: {listed(differ, 3)}" if differ else f"has another scaling: {scales[0]}"
        do = "the lora: section must be the one that it was trained with"
        raise RecipeError(Problem(at, f"{shown(adapter.path)} {what}", do))
    set_peft_model_state_dict(model, saved)


def given_adapter(recipe: Recipe) -> Path:
    """The folder of warm_start.from_adapter."""
    assert recipe.warm_start and recipe.warm_start.from_adapter
    return recipe.file(recipe.warm_start.from_adapter)


def copies(recipe: Recipe) -> int:
    """How many copies of A and B `first` keeps."""
    return int(initialisation(recipe.lora) in MUTATE)


def first(model: Any, recipe: Recipe) -> dict[str, torch.Tensor] | None:
    """The first A and B, in the dtype in which they train, where the base lacks them; else None."""
    if initialisation(recipe.lora) not in MUTATE:
        return None
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def warm(model: torch.nn.Module, folder: Path) -> dict[str, float]:
    """Set s B A to the best rank-r part of `folder`'s weights - the model's, module by module (Eckart and
    Young).

    From a full update: what it changed. From the base's own folder on a 4-bit model: what the rounding lost.

    Returns each module's relative error |delta - s B A| / |delta| (Frobenius): the tail of its singular
    values.
    """
    stored, errors = weights.tensors(folder), {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        parts: Any = module
        layer, key = module.get_base_layer(), name.removeprefix("base_model.model.")
        own = base_fit.own_name(f"{key}.weight", stored)
        assert own is not None, key
        full = stored[own].tensor().to(layer.weight.device)
        delta = full.float() - dequantize_module_weight(layer).float()
        delta = delta.T if parts.fan_in_fan_out else delta
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        for adapter, rank in module.r.items():
            root = (values[:rank] / module.scaling[adapter]).sqrt()
            parts.lora_B[adapter].weight.copy_(left[:, :rank] * root)
            parts.lora_A[adapter].weight.copy_(root[:, None] * right[:rank])
            errors[key] = float(values[rank:].norm() / values.norm().clamp(min=1e-30))
    return errors


@torch.no_grad()
def _put(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])
