"""Two of one run: started together, or one while the other is at work."""

import json
import shutil
import signal
import time

import pytest
import yaml

from lora_recipes.__main__ import main
from lora_recipes.ablation.reuse import Kept
from lora_recipes.ablation.spec import Run
from lora_recipes.core import lock
from lora_recipes.core.errors import RecipeError
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.process import Forked, together

TRAIN = ("train", "tiny_facts", "train.logging_steps=1")


@pytest.fixture
def outputs(trained, tmp_path):
    shutil.copytree(trained / "tiny_base", tmp_path / "outputs" / "tiny_base")
    return tmp_path / "outputs"


@pytest.fixture
def at_work(outputs, tmp_path):
    """A run that takes its time, after its first steps; the outputs folder and its process."""
    words = ["train.max_steps=1000000", "train.save_strategy=steps", "train.save_steps=20"]
    # each checkpoint stays: a test names one
    process = Forked((*TRAIN, *words, "--outputs", str(outputs)), tmp_path)
    try:
        end = time.monotonic() + 600
        while not list((outputs / "tiny_facts" / "checkpoints").glob("checkpoint-*/SHA256SUMS")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        yield outputs, process
    finally:
        process.kill()
        process.wait()


def test_a_run_at_work_is_left_alone_by_every_verb_until_it_is_killed(at_work, trained, capsys):
    outputs, process = at_work
    recipe, short = outputs / "tiny_facts" / "recipe.yaml", recipes.load("tiny_facts", ["train.max_steps=2"])
    before = recipe.read_bytes()
    for resume, force in ((False, False), (False, True), (True, False)):
        with pytest.raises(
            RecipeError, match=rf"tiny_facts: is in use by process {process.pid} on .*which trains"
        ):
            train(resolve(short, outputs), resume, force)
    outcome = Kept()(Run("tiny_facts", 0, short), {"force": True}, outputs, lone=True)
    assert outcome.failed and f"is in use by process {process.pid}" in outcome.said
    newest = max(
        (outputs / "tiny_facts" / "checkpoints").glob("checkpoint-*"), key=lambda p: p.stat().st_mtime
    )
    shutil.copytree(trained / "tiny_facts", outputs / "other")
    for words in (
        ["merge", str(newest)],
        ["eval", "tiny_facts"],
        [
            "combine",
            str(outputs / "other" / "adapter"),
            f"one={newest}",
            "--weights",
            "1",
            "1",
            "--name",
            "sum",
        ],
    ):
        assert main([*words, "--outputs", str(outputs)]) == 2
        assert f"is in use by process {process.pid}" in capsys.readouterr().err
    record = (outputs / "tiny_facts" / "run.json").read_bytes()
    # nor by two processes of one group
    done, _ = together(2, *TRAIN, "train.max_steps=2", "--force", "--outputs", str(outputs))
    assert done.returncode == 2 and f"is in use by process {process.pid}" in done.stderr, done.stderr[-2000:]
    assert (outputs / "tiny_facts" / "run.json").read_bytes() == record
    assert process.poll() is None and recipe.read_bytes() == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(RecipeError, match="holds an unfinished run"):
        train(resolve(short, outputs))
    assert train(resolve(short, outputs), force=True).steps == 2


def test_of_two_that_start_together_one_trains_and_its_record_is_its_own(outputs, tmp_path):
    both = {}
    for steps in (3, 5):
        (tmp_path / f"{steps}").mkdir()
        words = (*TRAIN, f"train.max_steps={steps}", "--outputs", str(outputs))
        both[steps] = Forked(words, tmp_path / f"{steps}")
    done = {steps: process.completed() for steps, process in both.items()}
    said = {steps: one.stderr for steps, one in done.items()}
    codes = {steps: one.returncode for steps, one in done.items()}
    assert sorted(codes.values()) == [0, 2], said
    won, lost = sorted(codes, key=lambda steps: codes[steps])
    assert "is in use by process" in said[lost] or "holds a finished run" in said[lost]
    run = json.loads((outputs / "tiny_facts" / "run.json").read_text())
    recipe = yaml.safe_load((outputs / "tiny_facts" / "recipe.yaml").read_text())
    assert (run["status"], run["steps"], recipe["train"]["max_steps"]) == ("finished", won, won)


def test_what_a_server_reads_is_not_replaced(trained, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    shutil.copytree(trained, outputs)
    adapter, merged = outputs / "tiny_facts" / "adapter", outputs / "tiny_facts" / "merged"
    before = (adapter / "adapter_model.safetensors").read_bytes()
    with lock.served([adapter]):
        with pytest.raises(RecipeError, match="which serves it since"):
            train(resolve(recipes.load("tiny_facts"), outputs), force=True)
        assert main(["merge", "tiny_facts", "--outputs", str(outputs), "--force"]) == 0
        combine = ["combine", f"a={adapter}", f"b={adapter}", "--weights", "0.7", "0.3", "--name", "both"]
        combine += ["--method", "linear", "--outputs", str(outputs), "--force"]
        assert main(combine) == 0
    with lock.served([outputs / "both" / "adapter"]):
        assert main(combine)
        assert "both: is in use by process" in capsys.readouterr().err
    with lock.served([merged]):
        assert main(["merge", "tiny_facts", "--outputs", str(outputs), "--force"])
        assert "merged: is in use by process" in capsys.readouterr().err
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
