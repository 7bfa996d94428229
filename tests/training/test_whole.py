"""Whole means whole: what a resumed run reads is what was saved, to the bit, and steps are counted, not
believed.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_recipes.core import checkpoints, safetensors, weights
from lora_recipes.core.checkpoints import SUMS, fault, seal
from lora_recipes.core.errors import RecipeError
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training import verify, watch
from lora_recipes.training.train import miscounted, train
from tests.typed import there

FOUR = [
    "train.max_steps=4",
    "train.save_strategy=steps",
    "train.save_steps=2",
    "train.logging_steps=1",
    "train.eval_strategy='no'",
]


def resumed(outputs):
    return train(resolve(recipes.load("tiny_facts", FOUR), outputs), resume=True)


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """A run of four steps with its checkpoints after two and four."""
    outputs = tmp_path_factory.mktemp("four")
    shutil.copytree(trained / "tiny_base", outputs / "tiny_base")
    train(resolve(recipes.load("tiny_facts", FOUR), outputs))
    return outputs


@pytest.fixture
def cut(finished, tmp_path):
    """The same, as if its process had been killed after the third step; outputs and the checkpoint."""
    outputs = Path(shutil.copytree(finished, tmp_path / "outputs"))
    run = outputs / "tiny_facts"
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"failed"', 1))
    shutil.rmtree(run / "adapter")
    (run / "checkpoints" / "checkpoint-4").rename(tmp_path / "last")
    return outputs, run / "checkpoints" / "checkpoint-2"


def flip(file: Path, at: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= bit
    file.write_bytes(content)


def adapter(outputs: Path) -> bytes:
    return (outputs / "tiny_facts" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_one_flipped_bit_anywhere_in_any_file_of_a_checkpoint_is_named(cut):
    _, checkpoint = cut
    files = [p for p in checkpoint.rglob("*") if p.is_file()]
    names = {p.name for p in files}
    assert {"trainer_state.json", "adapter_config.json", "tokenizer.json", "training_args.bin"} <= names
    assert fault(checkpoint) is None and checkpoints.proven(checkpoint)
    passed = []
    for file in files:
        size = file.stat().st_size
        for at in sorted({0, 1, size // 4, size // 2, 3 * size // 4, size - 2, size - 1} & set(range(size))):
            for bit in (1, 128):
                flip(file, at, bit)
                said = fault(checkpoint)
                if not said or not (file.name in said or file.name == SUMS):
                    passed.append((file.name, at, bit, said))
                flip(file, at, bit)
    assert not passed and fault(checkpoint) is None


@pytest.mark.parametrize("damage", ["truncated", "gone", "longer", "swapped"])
def test_every_other_damage_of_every_file_is_named(cut, damage):
    _, checkpoint = cut
    for file in [p for p in checkpoint.rglob("*") if p.is_file() and p.name != SUMS]:
        content = file.read_bytes()
        if damage == "gone":
            file.unlink()
        else:
            changed = {"truncated": content[:-1], "longer": content + b"\0", "swapped": content[::-1]}[damage]
            file.write_bytes(changed)
        said = fault(checkpoint)
        assert said and (file.name in said or "weights" in said), (file.name, said)
        file.write_bytes(content)
    assert fault(checkpoint) is None


def test_a_manifest_that_was_cut_does_not_pass_for_an_earlier_versions(cut):
    _, checkpoint = cut
    lines = (checkpoint / SUMS).read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        (checkpoint / SUMS).write_text("".join(lines[:kept]))
        said = fault(checkpoint)
        assert said, kept


def test_a_run_killed_after_its_last_step_takes_no_more_steps(trained, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(trained / "tiny_base", outputs / "tiny_base")
    resolved = resolve(recipes.load("tiny_facts", [*FOUR, "train.per_device_train_batch_size=3"]), outputs)
    assert there(train(resolved).plan.steps).per_epoch == 3, "the last step should be within an epoch"
    before, run = adapter(outputs), outputs / "tiny_facts"
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"failed"', 1))
    shutil.rmtree(run / "adapter")
    assert train(resolved, resume=True).steps == 4
    assert adapter(outputs) == before


def as_before(checkpoint: Path) -> None:
    """The checkpoint as earlier versions left it: hashes of the weights alone."""
    lines = (checkpoint / SUMS).read_text().splitlines(keepends=True)
    (checkpoint / SUMS).write_text("".join(line for line in lines if line.endswith(".safetensors\n")))


def test_a_checkpoint_of_an_earlier_version_is_said_to_be_unproven_and_goes_on(cut, finished, capsys):
    outputs, checkpoint = cut
    as_before(checkpoint)
    assert resumed(outputs).steps == 4
    assert "WARNING     checkpoint-2 is unproven: an earlier version saved it" in capsys.readouterr().out
    assert adapter(outputs) == adapter(finished)


def test_no_damage_of_an_unproven_checkpoint_breaks_the_check_itself(cut):
    _, checkpoint = cut
    as_before(checkpoint)
    for name in ("scheduler.pt", "optimizer.pt", "rng_state.pth", "trainer_state.json", SUMS):
        file = checkpoint / name
        size = file.stat().st_size
        for at in range(0, size, max(size // 14, 1)):
            for bit in (1, 128):
                flip(file, at, bit)
                assert isinstance(fault(checkpoint), str | None)
                assert isinstance(verify.taken(checkpoint, skips=False), str | None)
                flip(file, at, bit)


def test_a_step_that_was_changed_is_not_believed(cut):
    """Even where all hashes were made anew: the number stands in the folder's name, in the schedule and in
    the optimiser too.
    """
    outputs, checkpoint = cut
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"global_step": 4}))
    assert "trainer_state.json is truncated or corrupt" in (fault(checkpoint) or "")
    seal(checkpoint)
    with pytest.raises(RecipeError, match=r"trainer_state.json says step 4, and the folder is checkpoint-2"):
        resumed(outputs)
    renamed = checkpoint.rename(checkpoint.with_name("checkpoint-4"))
    with pytest.raises(RecipeError, match=r"scheduler.pt has taken 2 steps, and the folder is checkpoint-4"):
        resumed(outputs)
    schedule = torch.load(renamed / "scheduler.pt", weights_only=True)
    torch.save(schedule | {"last_epoch": 4}, renamed / "scheduler.pt")
    seal(renamed)
    with pytest.raises(RecipeError, match=r"optimizer.pt has taken 2 steps, and the folder is checkpoint-4"):
        resumed(outputs)
    assert not (outputs / "tiny_facts" / "adapter").exists()


def test_a_run_that_was_cut_off_after_its_last_step_ends_without_another(cut, finished, tmp_path):
    outputs, checkpoint = cut
    (tmp_path / "last").rename(checkpoint.with_name("checkpoint-4"))
    done = resumed(outputs)
    assert done.steps == 4 and adapter(outputs) == adapter(finished)
    assert "train_loss" not in done.metrics, "no step was trained, so there is no loss of it"


@pytest.mark.parametrize(
    ("taken", "ended", "said"),
    [
        (0, 2, "no step was trained: the trainer stopped at step 2 of 4"),
        (0, 4, "the trainer counts 4 steps; 0 were taken after step 2"),
        (1, 4, "the trainer counts 4 steps; 1 were taken after step 2"),
        (2, 4, None),
        (1, 3, None),  # early stopping
    ],
)
def test_steps_are_counted_and_a_result_with_none_is_none(taken, ended, said):
    assert miscounted(2, taken, ended, 4) == said
    assert (
        miscounted(3, 0, 3, 4) and miscounted(3, 0, 3, 4, last=True) is None
    )  # stopped early, cut off after


def test_a_run_whose_steps_do_not_add_up_leaves_no_result(cut, monkeypatch):
    """A trainer that counts each step twice."""

    def twice(self, args, state, control, **kwargs):
        self.taken += 1
        state.global_step += 1

    monkeypatch.setattr(watch.Counted, "on_step_end", twice)
    outputs, _ = cut
    with pytest.raises(RecipeError, match="the trainer counts 6 steps; 2 were taken after step 2"):
        resumed(outputs)
    assert not (outputs / "tiny_facts" / "adapter").exists()


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pytorch_model.bin"])
def test_damage_in_the_middle_of_the_base_stops_a_resume(pickled, cut):
    outputs, _ = cut
    file = outputs / "tiny_base" / "model" / "model.safetensors"
    tensor = max(safetensors.header(file).values(), key=lambda t: t.end - t.start)
    assert tensor.end - tensor.start > 3 * 4096
    at = (tensor.start + tensor.end) // 2
    if pickled:
        around = file.read_bytes()[at - 32 : at + 32]
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
        file = file.with_name("pytorch_model.bin")
        at = file.read_bytes().index(around) + 32
    flip(file, at)
    with pytest.raises(RecipeError, match="base weights: the run began with sha256:"):
        resumed(outputs)


def test_another_config_of_the_base_stops_a_resume(cut):
    outputs, _ = cut
    file = outputs / "tiny_base" / "model" / "config.json"
    text, found = re.subn(r'"rms_norm_eps": [^,]+', '"rms_norm_eps": 1e-05', file.read_text())
    assert found == 1
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"another config\.json of the base"):
        resumed(outputs)


def test_every_byte_of_a_base_counts_and_earlier_fingerprints_are_answered_in_kind(finished, tmp_path):
    folder = Path(shutil.copytree(finished / "tiny_base" / "model", tmp_path / "base"))
    file, now = folder / "model.safetensors", weights.fingerprint(folder)
    earlier = weights.fingerprint(folder, like="0" * 64)
    assert now.startswith("sha256:") and re.fullmatch("[0-9a-f]{64}", earlier)
    assert weights.fingerprint(folder, like=now) == now
    for tensor in safetensors.header(file).values():
        for at in (tensor.start, (tensor.start + tensor.end) // 2, tensor.end - 1):
            flip(file, at)
            assert weights.fingerprint(folder) != now
            flip(file, at)
    assert weights.fingerprint(folder) == now and weights.fingerprint(folder, like=earlier) == earlier


def test_the_best_checkpoint_is_read_only_when_it_is_whole(cut):
    _, checkpoint = cut
    watch.best_is_whole(None)
    watch.best_is_whole(str(checkpoint))
    flip(checkpoint / "adapter_model.safetensors", 2000)
    with pytest.raises(RecipeError, match="the best checkpoint so far cannot be used: adapter_model"):
        watch.best_is_whole(str(checkpoint))
    with pytest.raises(RecipeError, match="it is not there"):
        watch.best_is_whole(str(checkpoint.with_name("checkpoint-7")))


def test_a_damaged_line_of_the_metrics_is_said_and_stops_nothing(cut, capsys):
    outputs, _ = cut
    file = outputs / "tiny_facts" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0].replace(b'"step"', b'"st\xe5p"') + b"".join(lines[1:]))
    assert resumed(outputs).steps == 4
    assert "metrics.jsonl: damaged lines are left out: 1" in capsys.readouterr().out
