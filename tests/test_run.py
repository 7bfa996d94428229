"""The run folder: which checkpoints are whole, and what may not differ on resume."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lora_recipes import recipe as recipes
from lora_recipes import run
from lora_recipes.messages import RecipeError


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the files that a trainer saves."""
    folder = tmp_path / "checkpoints" / "checkpoint-10"
    folder.mkdir(parents=True)
    save_file({"a.lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(100)}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 10}')
    return folder


def test_a_whole_checkpoint_has_no_fault(checkpoint):
    assert run.fault(checkpoint) is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_each_missing_or_cut_file_is_named(checkpoint, name):
    file = checkpoint / name
    os.truncate(file, file.stat().st_size - 5)
    assert any(word in run.fault(checkpoint) for word in (name, "weights"))
    file.unlink()
    assert any(word in run.fault(checkpoint) for word in (name, "no weights"))


def test_a_flipped_byte_in_the_optimizer_is_noticed(checkpoint):
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    at = content.find(b"\x00\x00\x80\x3f" * 4)  # four floats of 1.0
    content[at] ^= 1
    file.write_bytes(content)
    assert "corrupt" in run.fault(checkpoint)


def test_every_rank_must_have_left_its_random_state(checkpoint):
    assert run.fault(checkpoint, ranks=2) == "rng_state_0.pth is missing (the save was cut off)"


def test_the_newest_whole_checkpoint_is_taken_by_number_not_by_name(checkpoint):
    partial = checkpoint.with_name("checkpoint-100")
    partial.mkdir()
    found, skipped = run.newest_whole(checkpoint.parent)
    assert found == checkpoint and skipped == ["checkpoint-100 skipped: no weights (*.safetensors)"]


def test_a_broken_run_json_is_said(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "fini')
    with pytest.raises(RecipeError, match="broken JSON"):
        _ = run.RunFolder(tmp_path).finished


def test_differences_name_both_values_and_leave_out_what_is_only_shown(tmp_path):
    folder = run.RunFolder(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipes.load("tiny_facts").to_yaml())
    folder.write_record({"resume_facts": {"processes": 1}})
    changed = recipes.load("tiny_facts", ["train.seed=1", "train.logging_steps=1", "lora.lora_alpha=8"])
    assert run.differences(folder, changed, {"processes": 2}) == [
        "lora.lora_alpha: the run began with 4, now it is 8",
        "train.seed: the run began with 42, now it is 1",
        "processes: the run began with 1, now it is 2",
    ]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    run.write(tmp_path / "new" / "run.json", json.dumps({"a": 1}))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]
