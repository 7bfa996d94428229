"""train.report_to: what is missing or unknown is told before training, and where TensorBoard's files go."""

import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lora_recipes.planning import trackers
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train


def test_every_tracker_of_transformers_is_known():
    assert set(trackers.TRACKERS) == set(INTEGRATION_TO_CALLBACK)


ABSENT = [n for n, t in trackers.TRACKERS.items() if t.package and not t.here() and not t.installed]


@pytest.mark.parametrize("name", ABSENT)
def test_a_tracker_that_is_not_here_is_told_with_its_package_as_transformers_would_refuse_it(name):
    assert trackers.problem(name, [name]).startswith(f"{name} is not installed here: pip install ")
    if name not in ("neptune", "flyte", "dagshub", "mlflow"):  # theirs say less, or leave a broken object
        with pytest.raises((RuntimeError, ImportError)) as error:
            INTEGRATION_TO_CALLBACK[name]()
        assert trackers.TRACKERS[name].package.split()[0] in str(error.value)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("wandbb", "did you mean wandb?"),
        (["tensorbord"], "did you mean tensorboard?"),
        (["none", "flyte"], "none stands alone"),
        (["all", "flyte"], "all stands alone"),
        (["flyte", "flyte"], "named 2 times"),
        (None, "no tracker None"),
        ("", "no tracker ''"),
        ("all", "no tracker is installed here"),
        ("kubeflow", "needs KUBEFLOW_TRAINER_SERVER_URL"),
    ],
)
def test_what_cannot_be_told_is_said(asked, found):
    assert found in trackers.problem(asked, [])


@pytest.mark.parametrize("asked", ["none", ["none"], []])
def test_nothing_is_a_good_answer(asked):
    assert trackers.problem(asked, []) == ""


def test_all_problems_of_a_list_are_told_at_once():
    said = trackers.problem(["flyte", "nothing"], [])
    assert "pip install flytekit" in said and "no tracker 'nothing'" in said


def test_variables_are_named_and_secrets_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("SWANLAB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    said = trackers.said("all", ["wandb", "tensorboard"], tmp_path)
    assert "WANDB_API_KEY" in said and "secret" not in said
    assert "all that are here: wandb, tensorboard" in said and "tensorboard in " in said
    assert trackers.said("none", [], tmp_path) == ""
    (only,) = trackers.warnings(["wandb"])
    assert "WANDB_DISABLED is in the environment, and nothing reads it" in only
    (only,) = trackers.warnings(["swanlab"])
    assert "SWANLAB_MODE=disabled" in only and "records nothing" in only
    assert trackers.warnings(["tensorboard"]) == []


def test_tensorboard_has_one_folder_whenever_the_run_goes_on(monkeypatch, tmp_path):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert trackers.tensorboard(tmp_path) == tmp_path / "tensorboard"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    assert trackers.tensorboard(tmp_path / "run") == tmp_path / "mine"


LOOK = """
from lora_recipes.planning import trackers
print([trackers.problem(name, [name]) for name in ("wandb", "clearml")])
"""


def test_a_package_that_is_here_is_found_and_not_imported(tmp_path):
    for name in ("wandb", "clearml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("['', '']\n"), done.stderr


def test_a_resumed_run_tells_tensorboard_each_step_once(case, tmp_path):
    path = case("save_only_model", train__save_only_model=False, train__report_to="tensorboard")
    resolved = resolve(recipes.load(str(path)), tmp_path / "outputs")
    train(resolved)
    folder = resolved.folder
    (folder.checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    record = folder.path / "run.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "failed"'))
    train(resolved, resume=True)
    told = EventAccumulator(str(folder.path / "tensorboard"))
    told.Reload()
    assert [event.step for event in told.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
