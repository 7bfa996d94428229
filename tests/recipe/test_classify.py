"""task: classify in a recipe: what does not go with it is told when the recipe is loaded."""

import pytest
import yaml

from lora_recipes.core.errors import RecipeError
from lora_recipes.recipe import load as recipes


def test_the_task_survives_being_written_and_read(tmp_path):
    recipe = recipes.load("tiny_classify")
    assert recipe.classify and recipe.classify.pooling == "mean"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = recipes.load(str(tmp_path / "again.yaml"))
    assert yaml.safe_load(recipe.to_yaml())["task"] == "classify"
    assert again.sections == recipe.sections


def test_its_section_may_be_left_out(tmp_path):
    file = tmp_path / "x.yaml"
    content = yaml.safe_load(recipes.load("tiny_classify").to_yaml())
    del content["classify"]
    file.write_text(yaml.safe_dump(content))
    found = recipes.load(str(file)).classify
    assert found and (found.pooling, found.labels, found.validation) == ("mean", None, None)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("classify.pooling=means", "'means' is not one of mean, last"),
        ("lora.target_modules=[q_proj, score]", "'score' is the head"),
        ("lora.target_modules=.*score", "'.*score' is the head"),
        ("lora.modules_to_save=[score]", "holds the head, score, by itself"),
        ("lora.init_lora_weights=pissa", "an initialisation by pissa"),
        ("data.format=messages", "reads rows of text and label"),
        ("data.rows=assistant_turn", "is about writing text"),
        ("data.columns={prompt: x}", "reads no prompt"),
        ("classify.labels=[a, b, a]", "'a' stands there twice"),
        ("classify.labels=classes.json", "'classes.json' is no text file"),
        ("classify.validation=0.1", "there is data.eval already"),
        ("classify.validation=1.5", "1.5 is out of range"),
        ("classify.class_weight=balance", "'balance' is not"),
        ("probes.keep=[{prompt: a, answer: b}]", "asks for words"),
        ("train.dataset_text_field=body", "is read by TRL alone"),
    ],
)
def test_what_does_not_go_with_it_is_told_at_once(word, said):
    with pytest.raises(RecipeError, match=word.split("=")[0].replace(".", r"\.")) as raised:
        recipes.load("tiny_classify", [word])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "classfy"}, "'classfy' is not one of classify"),
        ({"task": None}, "is not one of classify"),
        ({"full": {}, "lora": ...}, "full: with task: classify was not tried here"),
    ],
)
def test_another_task_or_method_is_refused(changes, said, tmp_path):
    content = yaml.safe_load(recipes.load("tiny_classify").to_yaml()) | changes
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}))
    with pytest.raises(RecipeError) as raised:
        recipes.load(str(file))
    assert said in str(raised.value)


def test_its_section_without_the_task_is_refused():
    with pytest.raises(RecipeError, match="is read only with task: classify"):
        recipes.load("tiny_facts", ["classify.pooling=last"])
    with pytest.raises(RecipeError, match="no label is read without task: classify"):
        recipes.load("tiny_facts", ["data.columns={label: kind}"])


def test_only_a_metric_that_is_measured_can_be_the_best():
    from lora_recipes.recipe import rules

    wrong = recipes.load("tiny_classify", ["train.metric_for_best_model=eval_mean_token_accuracy"])
    found = [problem.found for problem in rules.problems(wrong, rules.Facts())]
    assert any("no evaluation measures 'mean_token_accuracy'" in each for each in found)
    other = recipes.load("tiny_classify", ["train.greater_is_better=false"])
    assert any("the smallest is the worst" in p.found for p in rules.problems(other, rules.Facts()))
