"""The table of docs/methods.md: each recipe of configs/recipes/methods planned on the tiny base, its
section's memory on Qwen3-8B.

`python -m benchmarks.methods` prints it; nothing is trained. Qwen3-8B as in qwen3_8b_fact (8 x 64 tokens,
checkpointing, bfloat16).
"""

import dataclasses
import tempfile
from pathlib import Path

from lora_recipes.memory import fits, memory
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.recipe import METHODS, Recipe


def on_8b(recipe: Recipe) -> Recipe:
    """qwen3_8b_fact with the method of `recipe`."""
    large = recipes.load("qwen3_8b_fact")
    sections = {name: section for name, section in large.sections.items() if name not in METHODS}
    model = large.model.given | {
        key: recipe.model.given[key] for key in ("quantize", "new_tokens") if key in recipe.model.given
    }
    # Prefix tuning cannot be checkpointed; without it the activations of 36 layers are kept.
    prefixed = recipe.peft is not None and recipe.peft.peft_type == "PREFIX_TUNING"
    train = large.train.given | ({"gradient_checkpointing": False} if prefixed else {})
    return dataclasses.replace(
        large, sections=sections | {"model": model, "train": train, recipe.method: recipe.settings}
    )


def main() -> None:
    """Print the rows."""
    print("| recipe | trainable | adapter on vLLM | merges | peak on Qwen3-8B, GiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted((recipes.RECIPES / "methods").glob("*.yaml")):
            recipe = recipes.load(file.stem)
            facts = plan.make(resolve(recipe, Path(folder))).facts
            peak = memory.plan(resolve(on_8b(recipe), Path(folder)))
            adapter = facts.adapter
            served = "whole model" if adapter is None else "yes" if adapter.max_lora_rank else "no"
            merges = "-" if adapter is None else "yes" if adapter.merges else "no"
            note = " (at least)" if peak.unknown else ""
            cells = [
                file.stem,
                f"{facts.model.trainable:,}",
                served,
                merges,
                fits.gib(peak.peak_bytes) + note,
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
