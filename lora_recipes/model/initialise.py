"""How A and B begin where PEFT's constructor alone is not enough: from data (EVA, CorDA), from the base
(PiSSA, OLoRA), from what NF4 rounded away (LoftQ), or from the SVD of a full update (`warm_start:`).

PiSSA, OLoRA and CorDA take their part out of the base: W = W' + s B0 A0. The adapter is saved as what was
learned, s (B A - B0 A0), of twice the rank, which is right on the untouched base (PEFT's
path_initial_model_for_weight_conversion).
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from transformers import PreTrainedModel

from lora_recipes.core import base_fit, safetensors
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.locate import local
from lora_recipes.core.record import FinishedRun, WarmStart
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.data.render import Example
from lora_recipes.model.variants import MUTATE, initialisation
from lora_recipes.recipe import base as bases
from lora_recipes.recipe import recipe as recipes
from lora_recipes.recipe.recipe import Recipe

ROWS = 256  # rows of the training data that EVA and CorDA see at most


@dataclass
class Start:
    """`state`: the first A and B by parameter name, where they were taken out of the base. `errors`: of a
    warm start, by module.
    """

    state: dict[str, torch.Tensor] | None = None
    errors: dict[str, float] | None = None


def batches(rows: list[Example], device: torch.device, size: int) -> list[dict[str, torch.Tensor]]:
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


def before(base: PreTrainedModel, config: Any, recipe: Recipe, rows: list[Example]) -> None:
    """CorDA looks at the base itself, before it carries an adapter: the covariance of each module's inputs
    over the training data.
    """
    if initialisation(recipe) != "corda":
        return

    @torch.no_grad()
    def run_model() -> None:
        for batch in batches(rows, base.device, 1):  # peft 0.21 takes the covariance of one row at a time
            base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    base.eval()
    preprocess_corda(base, config, run_model)


def begin(model: Any, recipe: Recipe, rows: list[Example], outputs: Path | None) -> None:
    """Set A and B of the trainer's own PEFT model, and keep in `model.lora_start` what is needed at the
    end.
    """
    kind, start = initialisation(recipe), Start()
    if kind == "eva":
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
    elif kind == "loftq":
        assert outputs is not None
        folder = local(bases.path(recipe, outputs), recipe.model.get("revision"))
        assert folder is not None, "the base was loaded from it"
        warm(
            model,
            folder,
            # one step of LoftQ; PEFT's replace_lora_weights_loftq (0.21) runs on CUDA only and forgets the
            # scaling
        )
    elif "warm_start" in recipe.sections:
        assert outputs is not None
        start.errors = warm(
            model, RunFolder(outputs / recipes.load(recipe.warm_start["from_recipe"]).name).result("full")
        )
    model.lora_start = start


def copies(recipe: Recipe) -> int:
    """How many copies of A and B `keep` keeps."""
    return int(initialisation(recipe) in MUTATE)


def keep(model: Any, recipe: Recipe) -> None:
    """Remember the first A and B, in the dtype in which they train, where the base lacks them."""
    if initialisation(recipe) in MUTATE:
        model.lora_start.state = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }


@torch.no_grad()
def warm(model: torch.nn.Module, folder: Path) -> dict[str, float]:
    """Set s B A to the best rank-r part of `folder`'s weights - the model's, module by module (Eckart and
    Young).

    From a full update: what it changed. From the base's own folder on a 4-bit model: what the rounding lost.

    Returns each module's relative error |delta - s B A| / |delta| (Frobenius): the tail of its singular
    values.
    """
    names, errors = safetensors.shapes(folder), {}
    where = {name: file for file in safetensors.files(folder) for name in safetensors.header(file)}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        parts: Any = module
        layer, key = module.get_base_layer(), name.removeprefix("base_model.model.")
        own = base_fit.renamed(key, names)
        assert own is not None, key
        with safe_open(where[f"{own}.weight"], "pt", device=str(layer.weight.device)) as file:
            delta = file.get_tensor(f"{own}.weight").float() - dequantize_module_weight(layer).float()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        for adapter, rank in module.r.items():
            root = (values[:rank] / module.scaling[adapter]).sqrt()
            parts.lora_B[adapter].weight.copy_(left[:, :rank] * root)
            parts.lora_A[adapter].weight.copy_(root[:, None] * right[:rank])
            errors[key] = float(values[rank:].norm() / values.norm().clamp(min=1e-30))
    return errors


def lost(model: Any) -> WarmStart | None:
    """How much of the update a warm start leaves out: |delta - s B A| / |delta|, the `mean` of all modules
    and the `worst`. None for another
    start.
    """
    start: Start | None = getattr(model, "lora_start", None)
    if start is None or not start.errors:
        return None
    module, worst = max(start.errors.items(), key=lambda item: item[1])
    return WarmStart(mean=sum(start.errors.values()) / len(start.errors), worst=worst, module=module)


def warm_problems(recipe: Recipe, outputs: Path) -> list[Problem]:
    """A warm start that is not of this base, or not there. Nothing without the section."""
    if "warm_start" not in recipe.sections:
        return []
    where = recipe.at("warm_start", "from_recipe")
    if recipe.method != "lora":
        return [
            Problem(
                recipe.at("warm_start"),
                f"{recipe.method}: has no A and B to begin with",
                "write lora:, or remove it",
            )
        ]
    found = []
    for field in ("use_dora", "init_lora_weights", "target_parameters"):
        if recipe.lora.get(field, True) is not True or (field == "use_dora" and recipe.lora.get(field)):
            found.append(
                Problem(recipe.at("lora", field), "A and B come from warm_start:", "remove one of the two")
            )
    if "quantize" in recipe.model:
        found.append(
            Problem(where, "the update of a 4-bit base is not defined here", "remove model.quantize")
        )
    other = recipes.load(recipe.warm_start["from_recipe"])
    if not other.whole:
        return [
            *found,
            Problem(
                where,
                f"{other.name} trains an adapter: there is no full update",
                "name a full: or freeze: recipe",
            ),
        ]
    if bases.path(other, outputs) != bases.path(recipe, outputs):
        return [
            *found,
            Problem(
                where,
                f"{other.name} was trained on another base",
                f"the same model: in both ({other.path.name})",
            ),
        ]
    return found


def warm_ready(recipe: Recipe, outputs: Path) -> list[Problem]:
    """At training: was the full update trained, and on the weights that the base has now?"""
    if "warm_start" not in recipe.sections:
        return []
    name, base = recipes.load(recipe.warm_start["from_recipe"]).name, local(bases.path(recipe, outputs))
    run, where = RunFolder(outputs / name), recipe.at("warm_start", "from_recipe")
    if not (isinstance(done := run.run, FinishedRun)):
        return [Problem(where, f"{shown(run.path)} holds no finished run", f"make train RECIPE={name}")]
    if done.resume_facts.base_weights != (base and safetensors.fingerprint(base)):
        return [
            Problem(
                where,
                f"{name} was trained on other weights than the base has now",
                f"make train RECIPE={name} FORCE=1",
            )
        ]
    return []


@contextlib.contextmanager
def base_of(model: PeftModel) -> Iterator[None]:
    """`model` answers as the untouched base: without the adapter, or with the A and B that were taken out of
    the base.
    """
    start: Start | None = getattr(model, "lora_start", None)
    if start is None or start.state is None:
        with model.disable_adapter():
            yield
        return
    now = {n: p.detach().clone() for n, p in model.named_parameters() if n in start.state}
    _put(model, start.state)
    try:
        yield
    finally:
        _put(model, now)


@torch.no_grad()
def _put(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])


def convert(model: Any, folder: Path) -> None:
    """Write the adapter into `folder` anew where PEFT's own way of saving is not right for the untouched
    base.

    Where A and B were taken out of it; and without the whole embedding that PEFT adds when the vocabulary has
    grown.
    """
    start: Start | None = getattr(model, "lora_start", None)
    if start is None:
        return
    config = model.peft_config["default"]
    if start.state is not None:
        config.init_lora_weights = (
            True  # else PEFT would take A0 and B0 out of the base again when it loads them for the conversion
        )
        with tempfile.TemporaryDirectory() as temporary:
            with base_of(model):
                model.save_pretrained(f"{temporary}/initial")
            model.save_pretrained(
                str(folder), path_initial_model_for_weight_conversion=f"{temporary}/initial"
            )
    elif getattr(config, "trainable_token_indices", None):
        model.save_pretrained(str(folder), save_embedding_layers=False)
