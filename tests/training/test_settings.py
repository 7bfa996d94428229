"""Settings that do nothing or fail late, in whole plans and runs of the cases: told before training, or at
its end.
"""

import pytest

from lora_recipes.core.errors import RecipeError
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.finish import worse
from lora_recipes.training.train import train


@pytest.fixture
def planned(case, tmp_path):
    """The plan of a case; its RecipeError as text where it is refused."""

    def make(name, *overrides, **changes):
        recipe = recipes.load(str(case(name, **changes)), overrides)
        return plan.make(resolve(recipe, tmp_path / "outputs"))

    return make


@pytest.mark.parametrize("metric", ["eval_accuracy", "accuracy", "eval_los"])
def test_a_metric_that_no_evaluation_measures_is_refused_with_the_ones_that_it_does(metric, planned):
    with pytest.raises(
        RecipeError, match=r"best_metric_typo.yaml:\d+ train.metric_for_best_model: no evaluation"
    ):
        planned("best_metric_typo", train__metric_for_best_model=metric)


@pytest.mark.parametrize("every", [500, 5, 4])
def test_the_best_of_one_evaluation_is_refused(every, planned):
    with pytest.raises(RecipeError, match=r"a run of 4 steps evaluates once.*\n.*eval_steps of 2 or less"):
        planned("eval_never", train__eval_steps=every, train__save_steps=every)


def test_two_evaluations_are_enough_to_choose_from(planned):
    assert planned("eval_never", train__eval_steps=2, train__save_steps=2).warnings == []


def test_what_numbers_say_of_a_run_is_warned_of(planned):
    made = planned(
        "save_only_model",
        "train.learning_rate=2e4",
        "train.warmup_steps=100",
        "lora.lora_alpha=8000",
        "train.report_to=none",
        train__logging_steps=50,
    )
    for key in ("learning_rate: 20000", "warmup_steps", "lora_alpha", "logging_steps", "save_only_model"):
        assert [w for w in made.warnings if f".{key}" in w], key


def test_a_package_that_is_missing_is_told_by_the_plan(planned):
    with pytest.raises(RecipeError, match=r"train.optim: .*galore_torch"):
        planned("save_only_model", "train.optim=galore_adamw")
    with pytest.raises(RecipeError, match=r"train.report_to: .*did you mean wandb"):
        planned("save_only_model", "train.report_to=wandbb")


def test_a_token_that_the_tokenizer_does_not_have_is_told(case, tmp_path):
    recipe = recipes.load(str(case("save_only_model")), ["train.pad_token=<nope>"])
    with pytest.raises(RecipeError, match=r"train.pad_token: '<nope>' is not in the vocabulary"):
        train(resolve(recipe, tmp_path / "outputs"))


def test_the_key_and_not_the_checkpoint_is_blamed_for_a_run_that_cannot_be_resumed(case, tmp_path):
    resolved = resolve(recipes.load(str(case("save_only_model", train__max_steps=2))), tmp_path / "outputs")
    done = train(resolved)
    assert any("cannot be resumed" in warning for warning in done.warnings)
    record = resolved.folder.path / "run.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "failed"'))
    with pytest.raises(RecipeError, match=r"train.save_only_model: the checkpoints were saved without"):
        train(resolved, resume=True)


def test_a_resume_with_another_lora_alpha_is_told(case, tmp_path):
    path = case("save_only_model", train__max_steps=2, train__save_only_model=False)
    train(resolve(recipes.load(str(path)), tmp_path / "outputs"))
    changed = resolve(recipes.load(str(path), ["lora.lora_alpha=16"]), tmp_path / "outputs")
    record = changed.folder.path / "run.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "failed"'))
    with pytest.raises(RecipeError, match=r"lora.lora_alpha: the run began with 8, now it is 16"):
        train(changed, resume=True)


def test_a_run_that_ends_worse_than_it_began_says_so_last(case, tmp_path, capsys):
    path = case("eval_never", train__eval_steps=2, train__save_steps=2, train__load_best_model_at_end=False)
    train(resolve(recipes.load(str(path), ["train.learning_rate=20"]), tmp_path / "outputs"))
    last = capsys.readouterr().out.rstrip().splitlines()[-2:]
    assert any("held-out loss ends higher" in line for line in last), last


def test_only_a_rise_is_a_rise():
    recipe = recipes.load("tiny_facts")
    rising, falling = [{"loss": 2.0}, {"loss": 2.5}], [{"loss": 2.5}, {"loss": 2.0}, {"eval_loss": 1.0}]
    assert "2.0000 at first, 2.5000 at last" in worse(rising, recipe)[0]
    assert worse(falling, recipe) == [] and worse([], recipe) == [] and worse([{"loss": 3.0}], recipe) == []
    assert worse([{"loss": 2.0}, {"loss": 2.05}], recipe) == []
    scattered = [{"loss": loss} for loss in (1.99, 2.42, 1.53, 2.22, 1.83, 1.54, 1.39, 2.09)]
    assert worse(scattered, recipe) == [], "of a run that has learned"
    diverging = [{"loss": loss} for loss in (2.0, 2.1, 2.0, 2.3, 2.6, 2.9, 3.4)]
    assert "2.0000 at first, 3.4000 at last" in worse(diverging, recipe)[0]
    assert "held-out" in worse([{"eval_loss": 1.0}, {"eval_loss": 0.9}, {"eval_loss": 1.1}], recipe)[0]
