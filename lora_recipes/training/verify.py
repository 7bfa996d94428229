"""Does the trainer hold what was planned, did every adapted module learn, and is what was saved what was
learned?
"""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.provenance import CONFIG
from lora_recipes.core.record import PlanFacts
from lora_recipes.recipe.recipe import Recipe


def as_planned(trainer: Any, recipe: Recipe, planned: PlanFacts) -> None:
    """RecipeError unless the trainer holds what the plan (`planned`: its facts) said: trainable parameters,
    batches, and steps an epoch.
    """
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    if not recipe.whole and trainable in (0, total):
        found = (
            f"{trainable:,} of {total:,} parameters are trainable: {'everything' if trainable else 'nothing'}"
            " would be trained"
        )
        do = "an adapter trains a small share; look at target_modules and modules_to_save"
        raise RecipeError(Problem(recipe.at(recipe.method), found, do))
    if trainable != planned.model.trainable:
        found = f"{trainable:,} trainable parameters, {planned.model.trainable:,} planned"
        raise RecipeError(Problem(recipe.at(recipe.method), found, "please report this"))
    steps = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    assert planned.steps, "training has tokens, so the plan has counted its steps"
    kind = planned.batching.kind if planned.batching else "as given"
    held = (
        trainer.args.train_sampling_strategy == "group_by_length",
        getattr(trainer, "padding_free", False),
    )
    if kind != "as given" and held != (kind == "by length", kind == "flattened"):
        raise RecipeError(Problem(recipe.at("train"), f"the batches are not {kind}", "please report this"))
    if steps != planned.steps.per_epoch:
        found = (
            f"{len(trainer.train_dataset):,} rows give {steps} steps an epoch,"
            f" {planned.steps.per_epoch} planned"
        )
        raise RecipeError(Problem(recipe.at("train"), found, "please report this"))


def untrained(model: torch.nn.Module) -> list[str]:
    """The adapted modules whose A or B is not finite, or all zero: a zero factor means that nothing was
    learned there.
    """
    found = []
    for name, module in model.named_modules():
        for kind in (
            ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
            if isinstance(module, LoraLayer)
            else ()
        ):
            for factor in getattr(module, kind).values():
                weight = getattr(factor, "weight", factor)
                if not weight.isfinite().all():
                    found.append(f"{name}.{kind} is not finite")
                elif not weight.any():
                    found.append(f"{name}.{kind} is all zero")
    return found


def written(model: Any, folder: Path, began: dict[str, torch.Tensor] | None) -> list[str]:
    """What in the adapter's files in `folder`, read back, is not what the PEFT `model` holds: its tensors,
    bit for bit, and its config. `began`: A0 and B0 by parameter name, where the base lacks them (PiSSA and
    the like): such an adapter is saved as [A, A0] and [B, -B0].
    """
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    first = {name.replace(".default", ""): tensor for name, tensor in (began or {}).items()}
    for name, tensor in held.items():
        if name in first and ".lora_A." in name:
            held[name] = torch.cat([tensor, first[name]])
        elif name in first and ".lora_B." in name:
            held[name] = torch.cat([tensor, -first[name]], dim=1)
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        config = _plain(PeftConfig.from_pretrained(str(folder)).to_dict())
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        return [f"cannot be read back: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    whole = {name for name in saved if ".base_layer." in name}  # of an adapted embedding
    wrong = [f"{name} is missing" for name in held if name not in saved]
    wrong += [f"{name} is nothing of the model's" for name in saved if name not in held and name not in whole]
    wrong += [f"{name} is another" for name in held if name in saved and not _same(held[name], saved[name])]
    meant = _plain(model.peft_config["default"].to_dict())
    free = {"inference_mode", *(("r", "lora_alpha", "rank_pattern", "alpha_pattern") if began else ())}
    keys = [key for key in meant if key not in free and meant[key] != config.get(key)]
    return wrong + [f"{CONFIG} {key} is {config.get(key)!r}, was {meant[key]!r}" for key in keys]


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose sets, and lists in their place (target_modules), are in one order."""
    return {k: sorted(map(str, v)) if isinstance(v, set | list) else v for k, v in config.items()}


def _same(held: torch.Tensor, saved: torch.Tensor) -> bool:
    return held.dtype == saved.dtype and torch.equal(held.detach().cpu(), saved)


def incomplete(folder: Path, planned: int) -> list[str]:
    """What is wrong with a saved LoRA adapter, in the file: all `planned` numbers there, A and B finite and
    not all zero?

    Where weights are divided over processes the model in memory cannot be asked, and a save that did not
    gather them is cut short.
    """
    saved = {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    wrong = [f"{name} is not finite" for name, tensor in saved.items() if not tensor.isfinite().all()]
    wrong += [f"{name} is all zero" for name, tensor in saved.items() if not tensor.any()]
    count = sum(tensor.numel() for tensor in saved.values())
    return [*wrong, f"{count:,} of {planned:,} numbers were saved"] if count != planned else wrong


def taken(checkpoint: Path, skips: bool) -> str | None:
    """What is wrong with the steps of a whole checkpoint: those that its schedule and its optimiser have
    taken against the one in its name. `skips`: float16 leaves out steps whose gradients overflow.
    """
    step, found = int(checkpoint.name.split("-")[1]), {}
    for name in ("scheduler.pt", "optimizer.pt"):
        if not (checkpoint / name).is_file():
            continue  # DeepSpeed keeps them elsewhere
        try:
            found[name] = _steps(torch.load(checkpoint / name, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever a broken pickle leads to
            return f"{name} cannot be loaded: {type(error).__name__}"
    for name, steps in found.items():
        if steps is not None and (steps > step or (steps < step and not skips)):
            return f"{name} has taken {steps} steps, and the folder is {checkpoint.name}"
    return None


def _steps(state: dict[str, Any]) -> int | None:
    """The steps that a schedule or an optimiser has taken; None where it does not count them."""
    if "last_epoch" in state:
        return None if "num_bad_epochs" in state else int(state["last_epoch"])  # those follow a metric
    counts = [int(each["step"]) for each in state["state"].values() if "step" in each]
    return max(counts, default=None)
