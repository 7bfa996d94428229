"""The trained loss is the model's own, or the run is refused before its first step."""

import json
from pathlib import Path

import pytest

from lora_recipes.core.errors import RecipeError
from lora_recipes.model import build
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import Shared, train


def test_a_right_loss_is_recorded(trained):
    found = json.loads((trained / "tiny_facts" / "run.json").read_text())["loss_check"]
    assert found["tokens"] > 0 and abs(found["trl"] - found["own"]) < 1e-5 < found["allowed"]


def louder(resolved):
    """The base with a class that does one per cent more to its logits than its head, as soft caps do."""
    base = build.model(resolved)

    class Louder(type(base)):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = 1.01 * found.logits
            return found

    base.__class__ = Louder
    return base


def both_ways(resolved):
    """The base with attention that looks ahead."""
    base = build.model(resolved)
    base.config.is_causal = False
    return base


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (louder, r"TRL would train Louder for another loss than its own: \d\.\d{4} against \d\.\d{4} nats"),
        (both_ways, "Qwen3ForCausalLM looks ahead: the last token changes"),
    ],
)
def test_another_loss_is_refused_with_both_figures_and_leaves_nothing(trained, write_recipe, model, said):
    recipe = recipes.load(str(write_recipe("tiny_facts", "other_loss")))
    resolved = resolve(recipe, trained)
    with pytest.raises(RecipeError, match=said):
        train(resolved, shared=Shared(model=model))
    assert not Path(resolved.folder.path).exists()
