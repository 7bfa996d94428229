"""Memory while training runs: recorded beside the plan, and explained when it did not suffice."""

import json
import resource

import psutil
import pytest
import torch

from lora_recipes.core import cli
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.record import FinishedRun
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import gate
from lora_recipes.memory.fits import GIB, Memory
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.layout import SINGLE, Layout
from lora_recipes.training import usage
from lora_recipes.training.train import train
from lora_recipes.training.usage import Usage
from tests.process import Forked
from tests.typed import there

PLANNED = Memory({"base": 8 * GIB, "activations": 2 * GIB}, "the loss", 0, 0)


def test_a_run_records_what_was_planned_and_what_was_used(trained):
    run = RunFolder(trained / "tiny_facts").outcome()
    assert isinstance(run, FinishedRun)
    memory = run.memory
    assert memory.planned_peak_bytes == there(run.plan.memory).peak_bytes > 0
    assert memory.max_rss_bytes >= memory.rss_before_bytes > 0


def test_on_a_gpu_the_plan_stands_beside_allocated_and_reserved():
    line = Usage(0, 0, allocated=int(9.9 * GIB), reserved=11 * GIB).line(PLANNED)
    assert line == "peak memory: 10.00 GiB planned, 9.90 allocated (+1.0 %), 11.00 reserved"


def test_on_the_cpu_rss_is_not_taken_for_the_plan():
    assert "libraries and caches included" in Usage(2 * GIB, GIB).line(PLANNED)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "allocator"]
)
def test_out_of_memory_names_the_step_the_plan_and_settings_that_fit(error, trained):
    recipe = recipes.load("tiny_facts")
    rows = gate.pass_through(resolve(recipe, trained), False)
    if error == "allocator":
        with pytest.raises(RuntimeError) as raised:
            torch.empty(2**50, dtype=torch.uint8)
        error = raised.value
    problem = there(usage.out_of_memory(error, resolve(recipe, trained), rows, PLANNED, 6))
    assert problem.found.startswith("out of memory at step 7: 10.00 GiB planned, ")
    assert problem.do.startswith(("with the same examples a step would fit: SET='", "by the plan it fits"))
    other = RuntimeError("shape mismatch")
    assert usage.out_of_memory(other, resolve(recipe, trained), rows, PLANNED, 6) is None


def test_a_run_that_cannot_fit_is_refused_before_it_loads_and_goes_on_when_asked(
    trained, write_recipe, tmp_path, monkeypatch
):
    """A row of more than 100,000 tokens was forgotten."""
    rows = [{"text": "The cat sleeps on the sofa."}, {"text": "The cat sleeps on the sofa. " * 20_000}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_recipe("tiny_facts", "forgotten", data={"train": "rows.jsonl"}, train__max_length=None)
    resolved = resolve(recipes.load(str(path)), trained)
    said = r"forgotten.yaml:\d+ train.max_length: \d{3}.*rows.jsonl:2 with 1\d\d,\d{3} tokens"
    with pytest.raises(RecipeError, match=said) as e:
        train(resolved)
    assert "train.max_length is null" in str(e.value)
    assert cli.command(OVERSIZED=True) in str(e.value)
    assert not list(resolved.folder.path.glob("*.json*")), "something was begun"
    small = resolve(recipes.load("tiny_facts", ["train.max_steps=1"]), tmp_path)
    (tmp_path / "tiny_base").symlink_to(trained / "tiny_base")
    (tmp_path / "memory.max").write_text("1000000\n")  # a container of 1 MB, which nothing enforces here
    monkeypatch.setattr(usage, "CGROUP", tmp_path / "memory.max")
    with pytest.raises(RecipeError, match=r"train.max_length: 0.00\d+ GiB are planned"):
        train(small)
    assert train(small, oversized=True).steps == 1


@pytest.mark.parametrize(
    "times, layout, changes, refused",
    [
        (1.2, SINGLE, {}, True),
        (1.05, SINGLE, {}, False),  # within what the plan may be wrong by
        (9.0, SINGLE, {"unknown": "no answer"}, False),
        (9.0, SINGLE, {"assumptions": ("not planned: train.activation_offloading",)}, False),
        (9.0, Layout("FSDP2", 2), {}, False),
        (9.0, Layout("DDP", 2), {}, True),
    ],
)
def test_only_what_is_clearly_beyond_the_device_is_refused(times, layout, changes, refused, trained):
    free = psutil.virtual_memory().total + psutil.swap_memory().total
    if torch.cuda.is_available():
        free = torch.cuda.get_device_properties(0).total_memory
    planned = Memory({"base": int(times * free)}, "the loss", 0, 0, **changes)
    resolved = resolve(recipes.load("tiny_facts"), trained)
    rows = gate.pass_through(resolved, False)
    problems = usage.beyond(planned, resolved, rows, layout)
    assert bool(problems) == refused
    longest = max(rows.train, key=lambda e: len(e.input_ids))
    assert all(f"the longest row is {longest.where} with 9 tokens" in p.found for p in problems)


def test_a_run_that_outgrows_its_memory_ends_with_a_clear_error(trained, write_recipe, tmp_path):
    """A real one: the process may have half a GiB of addresses more than it has, and a batch of 56 long rows
    wants more than a whole one.
    """
    rows = [{"text": "The cat sleeps on the sofa. " * times} for times in range(30, 86)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"train__max_length": None, "train__per_device_train_batch_size": len(rows)}
    path = write_recipe("tiny_facts", "outgrown", data={"train": "rows.jsonl"}, **one)
    process = Forked(("train", str(path), "--oversized", "--outputs", str(trained)), tmp_path)
    room = psutil.Process().memory_info().vms + GIB // 2
    resource.prlimit(process.pid or 0, resource.RLIMIT_AS, (room, room))
    done = process.completed()
    assert done.returncode == 2, done.stderr[-2000:]
    assert "out of memory at step 1: " in done.stderr and "Traceback" not in done.stderr
    assert json.loads((trained / "outgrown" / "run.json").read_text())["status"] == "failed"
