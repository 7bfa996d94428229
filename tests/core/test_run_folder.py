"""The run folder: which checkpoints are whole, and what may not differ on resume."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_recipes.core import checkpoints, files, record, run_folder
from lora_recipes.core.errors import RecipeError
from lora_recipes.recipe import load as recipes
from lora_recipes.training import resume
from tests.typed import there

RUN = record.loads(Path(__file__).with_name("run_before_schema.json").read_text(), "run.json")


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the files that a trainer saves."""
    folder = tmp_path / "checkpoints" / "checkpoint-10"
    folder.mkdir(parents=True)
    save_file({"a.lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(100)}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 10}')
    checkpoints.seal(folder)
    return folder


def test_a_whole_checkpoint_has_no_fault(checkpoint):
    assert checkpoints.fault(checkpoint) is None


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "SHA256SUMS",
    ],
)
def test_each_missing_or_cut_file_is_named(checkpoint, name):
    file = checkpoint / name
    os.truncate(file, file.stat().st_size - 5)
    assert any(word in there(checkpoints.fault(checkpoint)) for word in (name, "weights", "not the content"))
    file.unlink()
    assert any(word in there(checkpoints.fault(checkpoint)) for word in (name, "no weights"))


def test_a_flipped_byte_in_the_optimizer_is_noticed(checkpoint):
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    at = content.find(b"\x00\x00\x80\x3f" * 4)  # four floats of 1.0
    content[at] ^= 1
    file.write_bytes(content)
    assert "corrupt" in there(checkpoints.fault(checkpoint))


def test_every_rank_must_have_left_its_random_state(checkpoint):
    assert checkpoints.fault(checkpoint, ranks=2) == "rng_state_0.pth is missing (the save was cut off)"


def test_the_newest_whole_checkpoint_is_taken_by_number_not_by_name(checkpoint):
    partial = checkpoint.with_name("checkpoint-100")
    partial.mkdir()
    found, skipped = checkpoints.newest_whole(checkpoint.parent)
    assert found == checkpoint and skipped == ["checkpoint-100 skipped: no weights (*.safetensors)"]


def test_a_broken_run_json_is_said(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "fini')
    with pytest.raises(RecipeError, match=r"run\.json: cannot be read"):
        _ = run_folder.RunFolder(tmp_path).finished


@pytest.mark.parametrize("status", [None, "failed", "running"])
def test_what_came_of_a_run_is_asked_only_of_one_that_ended_well(tmp_path, status):
    folder = run_folder.RunFolder(tmp_path / "mine")
    if status:
        folder.write_record(replace(RUN, status=status))
    with pytest.raises(RecipeError, match=r"mine: holds no finished run\n    -> make train RECIPE=mine"):
        folder.outcome()
    folder.write_record(RUN)
    assert folder.outcome() == RUN


def test_differences_name_both_values_and_leave_out_what_is_only_shown(tmp_path):
    folder = run_folder.RunFolder(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipes.load("tiny_facts").to_yaml())
    folder.write_record(RUN)
    changed = recipes.load("tiny_facts", ["train.seed=1", "train.logging_steps=1", "lora.lora_alpha=8"])
    assert resume.differences(folder, changed, {"layout": "DDP, 2 processes"}) == [
        "lora.lora_alpha: the run began with 4, now it is 8",
        "train.seed: the run began with 42, now it is 1",
        "layout: the run began with one process, now it is DDP, 2 processes",
    ]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    files.write(tmp_path / "new" / "run.json", json.dumps({"a": 1}))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]


def test_a_flipped_byte_in_the_weights_is_noticed(checkpoint):
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert (
        checkpoints.fault(checkpoint)
        == "adapter_model.safetensors is corrupt (not the content that was saved)"
    )


def test_somebody_elses_files_survive_a_new_run_and_a_finished_run_is_kept_aside(tmp_path):
    folder = run_folder.RunFolder(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter").mkdir()
    folder.write_record(RUN)
    folder.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".replaced", "notes.txt"]
    folder.write_record(replace(RUN, status="failed"))
    folder.clear()
    assert (tmp_path / ".replaced" / "adapter").is_dir(), "a failed run does not push out the finished one"


def test_files_of_a_run_without_its_record_are_not_overwritten(tmp_path):
    files.write(tmp_path / "adapter" / "adapter_config.json", "{}")
    with pytest.raises(RecipeError, match=r"holds adapter, but no run\.json"):
        resume.may_start(run_folder.RunFolder(tmp_path), resume=False, force=False)


def test_a_run_that_was_refused_or_killed_before_it_began_does_not_stop_the_next(tmp_path):
    folder = run_folder.RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    resume.may_start(folder, resume=False, force=False)
    folder.unbegun()
    assert not folder.path.exists()
    files.write(folder.path / "notes.txt", "mine")
    folder.unbegun()
    assert (folder.path / "notes.txt").is_file()


@pytest.mark.parametrize("content", ["[]", "7", '{"status": "fini'])
def test_force_needs_no_readable_record(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RecipeError, match="FORCE=1 trains anew"):
        resume.may_start(run_folder.RunFolder(tmp_path), resume=False, force=False)
    resume.may_start(run_folder.RunFolder(tmp_path), resume=False, force=True)
    run_folder.RunFolder(tmp_path).clear()
    assert not (tmp_path / "run.json").exists()
