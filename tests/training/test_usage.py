"""Memory while training runs: recorded beside the plan, and explained when it did not suffice."""

import json
import subprocess
import sys

import pytest
import torch

from lora_recipes.core import files
from lora_recipes.core.record import FinishedRun
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import gate
from lora_recipes.memory.fits import GIB, Memory
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training import usage
from lora_recipes.training.usage import Usage
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


def test_a_run_that_outgrows_its_memory_ends_with_a_clear_error(trained, tmp_path):
    """A real one: the process may not have more than 6 GiB of addresses, and a batch of 257 rows of Qwen3.5
    wants more.
    """
    script = str(files.ROOT / "scripts" / "train.py")
    words = [
        "tiny_qwen35_style",
        "train.per_device_train_batch_size=257",
        "train.gradient_accumulation_steps=1",
        "train.eval_strategy='no'",
    ]
    words += [
        "data.train=[{path: data/companion/train.jsonl, weight: 2.0}]",
        "data.limits={duplicates: 1.0}",
        "--outputs",
        str(tmp_path),
    ]
    limited = f"ulimit -v {6 * 2**20}; exec {sys.executable} {script} " + " ".join(f'"{w}"' for w in words)
    done = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, timeout=300, cwd=files.ROOT
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "out of memory at step 1: " in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "tiny_qwen35_style" / "run.json").read_text())["status"] == "failed"
