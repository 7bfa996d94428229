"""LoRA variants that would pass through PEFT and not be what the recipe says: refused at plan time, each with
its reason.
"""

import pytest

from lora_recipes.core.errors import RecipeError
from lora_recipes.planning import plan
from lora_recipes.recipe import recipe as recipes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("init_lora_weights=lora_ga", "it would be ordinary LoRA"),
        ("use_qalora=true", "has no effect"),
        ("alora_invocation_tokens=[1, 2]", "active only after its tokens"),
        ("layer_replication=[[0, 2], [0, 2]]", "changes the depth"),
        ("task_type=SEQ_CLS", "causal language models"),
        ("bias=all", "no module of this model has a bias"),
        ("ensure_weight_tying=true", "another number of trained parameters"),
    ],
)
def test_a_variant_that_would_not_do_what_it_says_is_refused(override, said, tmp_path):
    with pytest.raises(RecipeError) as error:
        plan.make(recipes.load("tiny_facts", [f"lora.{override}"]), tmp_path)
    assert said in str(error.value) and f"lora.{override.partition('=')[0]}" in str(error.value)


@pytest.mark.parametrize(
    "override",
    ["use_rslora=true", "use_dora=true", "init_lora_weights=gaussian", "trainable_token_indices=[1, 2]"],
)
def test_a_variant_that_needs_nothing_else_is_planned(override, tmp_path):
    assert plan.make(recipes.load("tiny_facts", [f"lora.{override}"]), tmp_path).facts.model.trainable >= 4096
