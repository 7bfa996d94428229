"""A disk that takes no more: before the first step, at the end, and while a model is merged."""

import contextlib
import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from lora_recipes.__main__ import main
from lora_recipes.core.errors import RecipeError
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train


def fill(disk: Path, leave: int = 0) -> Path:
    """Take all of the disk but `leave` bytes."""
    spare, file = disk / "spare", disk / "full"
    spare.write_bytes(bytes(leave))
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))
    spare.unlink()
    return file


@pytest.fixture
def outputs(trained, small_disk):
    """An outputs folder on a small disk, with the base of tiny_facts in it."""
    disk = small_disk("4m")
    shutil.copytree(trained / "tiny_base", disk / "tiny_base")
    return disk


def short(outputs, **keys):
    given = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "'no'"} | keys
    return resolve(recipes.load("tiny_facts", [f"train.{k}={v}" for k, v in given.items()]), outputs)


def test_a_full_disk_stops_a_run_before_its_first_step_and_the_same_command_goes_on(outputs):
    full = fill(outputs, leave=200_000)  # the adapter has 16 KB, but what is beside it counts too
    with pytest.raises(RecipeError) as error:
        train(short(outputs))
    assert re.search(
        r"tiny_facts: the disk is full \(0\.\d MiB free\) before the first step", str(error.value)
    )
    assert "-> free some space; then begin again" in str(error.value)
    assert not list((outputs / "tiny_facts").glob(".*")), "nothing half written stays on a full disk"
    full.unlink()
    assert train(short(outputs)).steps == 3


def test_the_finished_run_that_was_to_be_replaced_is_kept(outputs, trained):
    shutil.copytree(trained / "tiny_facts", outputs / "tiny_facts")
    fill(outputs, leave=100_000)
    with pytest.raises(RecipeError, match=r"the run that it was to replace is kept in .*replaced/"):
        train(short(outputs), force=True)
    kept = outputs / "tiny_facts" / ".replaced" / "adapter" / "adapter_model.safetensors"
    assert kept.read_bytes() == (trained / "tiny_facts" / "adapter" / kept.name).read_bytes()


def beside(outputs: Path, then) -> threading.Thread:
    """Somebody else on the disk: `then(reserved)` as soon as the run has taken the space for its result."""

    def act():
        reserved, end = outputs / "tiny_facts" / ".reserved", time.monotonic() + 600
        while not (reserved.is_file() and reserved.stat().st_size) and time.monotonic() < end:
            time.sleep(0.001)
        then(reserved)

    other = threading.Thread(target=act)
    other.start()
    return other


def test_the_space_of_the_result_is_taken_before_the_first_step(outputs):
    """Somebody else fills the disk while it trains: the result is saved all the same."""
    other = beside(outputs, lambda reserved: fill(outputs, leave=16_384))  # metrics.jsonl needs a page
    done = train(short(outputs, save_strategy="'no'"))
    other.join()
    assert done.status == "finished" and (outputs / "full").is_file()
    assert not (outputs / "tiny_facts" / ".reserved").exists()


@pytest.mark.parametrize(
    ("saved", "said"),
    [("'no'", "then begin again"), ("steps", "checkpoint-3 is whole: RESUME=1")],
)
def test_a_disk_that_is_full_at_the_end_is_said_and_what_is_left(outputs, saved, said):
    def steal(reserved):
        reserved.unlink()
        fill(outputs, leave=28_672 if saved == "'no'" else 150_000)

    other = beside(outputs, steal)
    with pytest.raises(RecipeError) as error:
        train(short(outputs, save_strategy=saved))
    other.join()
    assert re.search(
        r"the disk is full .* while saving the result\n    -> free some space; ", str(error.value)
    )
    assert said in str(error.value)
    record = json.loads((outputs / "tiny_facts" / "run.json").read_text())
    assert record["status"] == "failed" and "the disk is full" in record["error"]
    assert not list((outputs / "tiny_facts").glob(".*")) and not (outputs / "tiny_facts" / "adapter").exists()
    if saved == "steps":
        (outputs / "full").unlink()
        assert train(short(outputs, save_strategy=saved), resume=True).steps == 3


def test_merge_says_it_and_leaves_nothing_half(outputs, trained, capsys):
    (outputs / "tiny_facts").mkdir()
    for part in ("adapter", "run.json"):  # others may have merged it where it was trained
        copy = shutil.copytree if part == "adapter" else shutil.copy
        copy(trained / "tiny_facts" / part, outputs / "tiny_facts" / part)
    fill(outputs, leave=100_000)
    before = sorted(outputs.rglob("*"))
    assert main(["merge", "tiny_facts", "--outputs", str(outputs)]) == 2
    said = capsys.readouterr().err
    assert "the disk is full (" in said and "-> free some space" in said and "Traceback" not in said
    after = sorted(p for p in outputs.rglob("*") if p.name != ".tiny_facts.lock")  # empty: nobody has it
    assert after == before


def test_a_disk_without_room_is_said_by_the_plan(outputs):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 200}
    warned = plan.make(short(outputs, **keys))
    plan.add_memory(warned, short(outputs, **keys))
    (line,) = [line for line in warned.warnings if "the disk has" in line]
    found = re.search(
        r"free in .*, the run writes about ([\d.]+) MiB: the adapter [\d.]+ MiB, and (\d+) checkp", line
    )
    assert found and float(found[1]) > 4 and found[2] == "200"
    limited = plan.make(short(outputs, **keys, save_total_limit=1))
    plan.add_memory(limited, short(outputs, **keys, save_total_limit=1))
    assert not [line for line in limited.warnings if "the disk has" in line]
