"""Which settings fit a card, and the same recipe by other methods: recipes varied, their memory rehearsed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lora_recipes.data.gate import Gate
from lora_recipes.memory import fits, memory
from lora_recipes.memory.fits import FITS, NOT, UNKNOWN, Memory, Option
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import METHODS, Recipe

ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}  # for a recipe that has none


def fit(
    resolved: Resolved, card_gb: float, gate: Gate | None = None, seconds: float = memory.SECONDS
) -> list[Option]:
    """The settings of a recipe that fit a card of `card_gb` x 10^9 bytes, fastest first, all with the same
    examples a step.

    For each base (as it is, and in NF4 for an adapter) and with and without checkpointing: the largest batch
    that fits, and the largest that is likely to where that is larger. `gate` as in memory.plan.
    """
    options = _options(resolved.recipe)
    setups = [memory.of_recipe(resolved.by(varied), gate) for varied, _ in options]
    found: list[Option] = []
    with memory.Rehearsals(setups, seconds) as rehearsals:
        for kind in sorted({(o.checkpointing, o.quantised) for _, o in options}):
            ordered = [i for i, (_, o) in enumerate(options) if (o.checkpointing, o.quantised) == kind]
            found += _largest([(options[i][1], i) for i in ordered], rehearsals, card_gb)
    return sorted(found, key=lambda option: option.cost)


def _largest(
    options: list[tuple[Option, int]], rehearsals: memory.Rehearsals, card_gb: float
) -> Iterator[Option]:
    """From the largest batch down: the first that is likely to fit, and the first that does; or the first of
    which it is not known.
    """
    likely = False
    for option, index in options:
        done = replace(option, memory=rehearsals[index])
        verdict = done.memory.verdict(card_gb)
        if verdict in (FITS, UNKNOWN) or (verdict != NOT and not likely):
            yield done
        if verdict in (FITS, UNKNOWN):
            return
        likely = likely or verdict != NOT


def _options(recipe: Recipe) -> list[tuple[Recipe, Option]]:
    """Every batch size, with and without checkpointing, on the base as it is and in NF4; memories are not
    known yet.
    """
    train = recipe.train
    effective = train.per_device_train_batch_size * train.gradient_accumulation_steps
    nothing = Memory({}, "", 0, 0)
    found = []
    for quantised in (False, True) if recipe.method == "lora" else (False,):
        for checkpointing in (False, True):
            for batch in fits.batches(effective):
                wanted = {
                    "per_device_train_batch_size": batch,
                    "gradient_accumulation_steps": effective // batch,
                    "gradient_checkpointing": checkpointing,
                }
                overrides = [
                    f"train.{k}={str(v).lower()}" for k, v in wanted.items() if getattr(train, k) != v
                ]
                if quantised != (recipe.model.quantize is not None):
                    overrides.append(f"model.quantize={'nf4' if quantised else 'null'}")
                option = Option(
                    tuple(overrides), batch, effective // batch, checkpointing, quantised, nothing
                )
                found.append((varied(recipe, recipe.method, quantised, wanted), option))
    return found


def varied(recipe: Recipe, method: str, quantised: bool, train: dict[str, Any] | None = None) -> Recipe:
    """`recipe` trained by its own method, `lora` or `full`, on a base in NF4 or not, with other values in its
    train section.
    """
    sections = {name: section for name, section in recipe.sections.items() if name not in METHODS}
    sections[method] = recipe.sections.get(method) or ({} if method == "full" else ADAPTER)
    sections["model"] = {k: v for k, v in recipe.model.given.items() if k != "quantize"} | (
        {"quantize": "nf4"} if quantised else {}
    )
    sections["train"] = recipe.train.given | (train or {})
    return replace(recipe, sections=sections)


def plain(recipe: Recipe) -> Recipe | None:
    """`recipe` as LoRA without a variant; None where it is that."""
    if recipe.lora is None:
        return varied(recipe, "lora", recipe.model.quantize is not None)
    variants = ("use_dora", "use_rslora", "init_lora_weights")
    kept = {key: value for key, value in recipe.lora.given.items() if key not in variants}
    return replace(recipe, sections=recipe.sections | {"lora": kept}) if kept != recipe.lora.given else None


def compare(
    resolved: Resolved, gate: Gate | None = None, seconds: float = memory.SECONDS
) -> dict[str, Memory]:
    """The memory of a recipe as full fine-tuning, as LoRA and as QLoRA, all else equal."""
    kinds = {"full": ("full", False), "LoRA": ("lora", False), "QLoRA": ("lora", True)}
    setups = [memory.of_recipe(resolved.by(varied(resolved.recipe, *kind)), gate) for kind in kinds.values()]
    with memory.Rehearsals(setups, seconds) as rehearsals:
        return {name: rehearsals[i] for i, name in enumerate(kinds)}
