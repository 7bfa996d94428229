"""In which dtype should the adapter of a 4-bit base train? Both, over learning rates and seeds, on the tiny
models.

`python -m benchmarks.adapter_dtype` (about ten minutes on two cores) writes
benchmarks/results/adapter_dtype.md and .json.
"""

import contextlib
import io
import json
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lora_recipes.core.files import ROOT, write
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import gate
from lora_recipes.model import build
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train

RECIPES = {"tiny_facts": 40, "tiny_qwen35_style": 20}  # steps
RATES = ("2e-5", "1e-4", "2e-4", "1e-3", "3e-3")
SEEDS = (1, 2, 3)


def initial(name: str, overrides: list[str], outputs: Path) -> dict[str, torch.Tensor]:
    """The adapter before its first step, as the trainer makes it from the seed."""
    recipe = recipes.load(name, overrides)
    rows = gate.pass_through(resolve(recipe, outputs), False)
    arguments, base = (
        build.sft_config(recipe, RunFolder(outputs / "none")),
        build.model(resolve(recipe, outputs)),
    )
    made: Any = build.trainer(
        resolve(recipe, outputs), arguments, base, rows.tokenizer, rows.train.part(np.arange(4)), None, []
    )[0]
    return {
        n.replace(".default", ""): p.detach().float()
        for n, p in made.model.named_parameters()
        if p.requires_grad
    }


def arm(name: str, rate: str, seed: int, dtype: str, outputs: Path) -> dict[str, float]:
    """One run: the loss of its last logged steps, and the share of lora_A's entries that moved at all."""
    overrides = [
        f"train.learning_rate={rate}",
        f"train.seed={seed}",
        "model.quantize=nf4",
        f"model.adapter_dtype={dtype}",
    ]
    overrides += [f"train.max_steps={RECIPES[name]}", "train.eval_strategy='no'", "train.save_strategy='no'"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        before = initial(name, overrides, outputs)
        record = train(resolve(recipes.load(name, overrides), outputs), force=True)
        after = load_file(outputs / name / "adapter" / "adapter_model.safetensors")
    moved = [(after[n].float() != before[n]).float().mean().item() for n in after if "lora_A" in n]
    return {"loss": record.metrics["train_loss"], "moved": statistics.fmean(moved)}


def main() -> None:
    """Run every arm, print and write the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        train(resolve(recipes.load("tiny_base"), Path(folder)))
        for name in RECIPES:
            build.random_base(resolve(recipes.load("tiny_qwen35_style"), Path(folder)))
            for rate in RATES:
                for dtype in ("bfloat16", "float32"):
                    runs = [arm(name, rate, seed, dtype, Path(folder)) for seed in SEEDS]
                    rows.append({"recipe": name, "learning_rate": rate, "dtype": dtype, "runs": runs})
                    print(line(rows[-1]), flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")}
    result = {
        "device": f"CPU ({platform.machine()})",
        "versions": versions,
        "seeds": SEEDS,
        "steps": RECIPES,
        "rows": rows,
    }
    folder_ = ROOT / "benchmarks" / "results"
    write(folder_ / "adapter_dtype.json", json.dumps(result, indent=1) + "\n")
    head = [
        (
            "| recipe | learning rate | adapter | lora_A entries moved | train loss, mean of 3 seeds (least,"
            " most) |"
        ),
        "|---|---|---|---|---|",
    ]
    write(
        folder_ / "adapter_dtype.md",
        "\n".join(["# The adapter's dtype on an NF4 base", "", *head, *map(line, rows), ""]),
    )


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    losses, moved = [r["loss"] for r in row["runs"]], statistics.fmean(r["moved"] for r in row["runs"])
    spread = f"{statistics.fmean(losses):.4f} ({min(losses):.4f}, {max(losses):.4f})"
    return f"| {row['recipe']} | {row['learning_rate']} | {row['dtype']} | {moved:.1%} | {spread} |"


if __name__ == "__main__":
    main()
