"""What the plan says of each recipe in tests/cases. What comes of those that it lets through is tested in the
rooms: labels in data/, merged models in model/test_merge.py, ends of replies in training/test_finish.py.
"""

from pathlib import Path

import pytest

from lora_recipes.core.errors import RecipeError
from lora_recipes.planning import plan as plans
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve

# name: the plan's warning; None where it has nothing to warn of
PLANNED: dict[str, str | None] = {
    "alpha_full_name": None,
    "beyond_positions": "6 rows are longer than the 256 positions",
    "bigger_tokenizer": "81 tokens that the base's embedding (1,024 rows) has not",
    "eos_proof": None,
    "gemma_end_of_turn": None,
    "gemma_end_of_turn_eager": None,
    "message_train_false": None,
    "message_weight": None,
    "moe_shared_expert": None,
    "nf4_no_bnb": None,
    "pattern_full_name": None,
    "qwen_base_eos": None,
    "qwen_base_eos_set": None,
    "save_only_model": "checkpoints without the optimizer: this run cannot be resumed",
    "system_field": None,
    "target_regex": None,
    "ultrachat": "set data.rows: assistant_turn",
}
# name: where, and what is found or to be done
REFUSED = {
    "best_metric_typo": ("train.metric_for_best_model", "no evaluation measures 'accuracy'"),
    "double_bos_text": ("double_bos_text.jsonl:1", "which the tokenizer adds itself"),
    "dpo_rows": ("dpo_rows.jsonl:1", "preference data"),
    "eval_never": ("train.eval_strategy", "evaluates once, in the last step"),
    "ids_beyond": ("ids_beyond.jsonl:1", "'<extra_190>' is number 1,095"),
    "moe_qwen3": ("lora.target_modules[2]", "lora.target_parameters: [mlp.experts.gate_up_proj]"),
    "prequantised": ("model.name_or_path", "is quantised already (bitsandbytes"),
    "prequantised_nf4": ("model.name_or_path", "is quantised already (bitsandbytes"),
    "remote_code": ("model.name_or_path", "Python code of its own (auto_map)"),
    "tools_mixed": ("tools_mixed.jsonl:21", "the chat template leaves out tools"),
}
# name: the line of the plan that says what a person may not expect
SAID = {
    "qwen_base_eos": ("reply ends", "labels <|im_end|> (by the chat template"),
    "moe_shared_expert": ("coverage", "shared_expert"),
    "system_field": ("note", "train: the system column of 6 rows is their system turn"),
}


def test_every_case_has_its_outcome_here():
    cases = {path.stem for path in (Path(__file__).parent / "cases").glob("*.yaml")}
    assert cases == PLANNED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", PLANNED)
def test_what_is_planned_warns_of_just_that(case, tmp_path, name):
    plan = plans.make(resolve(recipes.load(str(case(name))), tmp_path / "outputs"))
    told = PLANNED[name]
    assert len(plan.warnings) == (told is not None) and (told or "") in "".join(map(str, plan.warnings))
    if name in SAID:
        label, words = SAID[name]
        text = plan.text()
        assert words in text[text.index(f"\n{label} ") :]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_where_and_why(case, tmp_path, name):
    with pytest.raises(RecipeError) as error:
        plans.make(resolve(recipes.load(str(case(name))), tmp_path / "outputs"))
    where, words = REFUSED[name]
    first = error.value.problems[0]
    assert first.where.endswith(where) and words in f"{first.found}: {first.do}"
