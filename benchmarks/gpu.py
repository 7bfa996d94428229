"""What a GPU makes of a 4B hybrid model: `make bench-gpu`, one command that fits ten minutes.

Qwen3.5-4B with random weights: LoRA and NF4, padded and packed, with and without the kernels that are
installed, ours beside a TRL script and Unsloth where it is installed, and a sweep of batch and length. Tokens
a second, the share of the card's own bf16 rate, peak memory beside the plan's. The arms that say most come
first: those for which no time is left are named. Writes gpu.md and gpu.json. `--dry-run`: the first arms on a
tiny model, on any machine, in this process.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import runpy
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks import jobs, machine
from benchmarks.train import PACKAGES, RESULTS, measured
from lora_recipes.core.files import OUTPUTS, ROOT, now, write

KERNELS = {  # module -> package
    "fla": "flash-linear-attention",
    "causal_conv1d": "causal-conv1d",
    "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel",
    "unsloth": "unsloth",
}
FAST = "fla,causal_conv1d"
WARM = 3  # batches before the clock starts


@dataclass(frozen=True)
class Arm:
    """One training; `without` names packages that count as not installed."""

    name: str
    job: jobs.Job
    command: jobs.Command
    without: str = ""


def big(folder: Path) -> dict[str, Any]:
    """`model:` of Qwen3.5-4B with random weights: its contract, with a tokenizer that is made here."""
    contract = yaml.safe_load((ROOT / "configs/models/qwen35_4b.yaml").read_text())
    small = yaml.safe_load((ROOT / "benchmarks/models/qwen35_16m.yaml").read_text())
    own = {key: small[key] for key in ("architecture", "chat_template", "tokenizer")}
    file = folder / "qwen35_4b_random.yaml"
    write(file, yaml.safe_dump({k: v for k, v in contract.items() if k != "name_or_path"} | own))
    return {"contract": str(file), "weights": "random", "dtype": "bfloat16"}


def arms(section: dict[str, Any]) -> Iterator[Arm]:
    """All of them, by weight."""
    ours, script = jobs.CONTENDERS[jobs.OURS], jobs.CONTENDERS[jobs.FIRST]
    job = jobs.Job("qwen35_4b", "mixed", rows=80, batch=4, steps=20, given=section)
    nf4 = replace(job, given=section | {"quantize": "nf4"})
    yield Arm("lora-recipes, LoRA, padded", job, jobs.CONTENDERS[f"{jobs.OURS}, padded"])
    yield Arm("TRL script, LoRA", job, script)
    yield Arm("lora-recipes, LoRA", job, ours)
    yield Arm("lora-recipes, NF4", nf4, ours)
    yield Arm("TRL script, NF4", nf4, script)
    if any(importlib.util.find_spec(name) for name in FAST.split(",")):
        yield Arm("lora-recipes, LoRA, without fla and causal-conv1d", job, ours, FAST)
    yield Arm("lora-recipes, LoRA, packed", job, jobs.CONTENDERS[f"{jobs.OURS}, packed"])
    if importlib.util.find_spec("unsloth"):
        yield Arm("Unsloth, LoRA", job, jobs.script("unsloth", "unsloth_script.py"))
    for length, batches in {2048: (1, 4, 16), 512: (1, 16, 64), 8192: (1, 4)}.items():
        for batch in batches:
            swept = replace(job, rows=12 * batch, batch=batch, full=length, steps=12)
            yield Arm(f"lora-recipes, LoRA, {batch} x {length}", swept, ours)


def rate() -> float:
    """Operations a second of a bf16 product of two square matrices: the card's, measured. Loads torch."""
    import torch

    cuda = torch.cuda.is_available()
    size, times = (8192, 50) if cuda else (256, 1)
    one, other = (
        torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if cuda else "cpu") for _ in "ab"
    )
    for _ in range(2):  # the first warms up
        began = time.monotonic()
        for _ in range(times):
            one @ other
        if cuda:
            torch.cuda.synchronize()
        spent = time.monotonic() - began
    return 2 * size**3 * times / spent


def inside(words: list[str], folder: Path, name: str, threads: int, trains: bool = True) -> dict[str, Any]:
    """As train.measured, in this process: a dry run pays the imports once."""
    from transformers import Trainer

    from benchmarks.clock import sitecustomize as clock

    file = folder / "clock.jsonl"
    file.unlink(missing_ok=True)
    before, os.environ["BENCH_CLOCK"] = sys.argv, str(file)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context((folder / f"{name}.log").open("w"))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        stack.callback(clock.clocked(Trainer))
        stack.callback(setattr, sys, "argv", before)
        module = words[1] == "-m"
        sys.argv = words[2:] if module else words[1:]
        with contextlib.suppress(SystemExit):
            (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
    del os.environ["BENCH_CLOCK"]
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return {"failed": (folder / f"{name}.log").read_text()[-300:]}
    return {"whole_s": 0.0, "load": machine.load()} | json.loads(lines[-1])


def planned(words: list[str]) -> dict[str, Any]:
    """Of the run that the command left: the planned peak in bytes, parameters and those that are trained."""
    if "--outputs" not in words:
        return {}
    folder = Path(words[words.index("--outputs") + 1]) / Path(words[words.index("train") + 1]).stem
    plan = json.loads((folder / "run.json").read_text())["plan"]
    model = plan["model"]
    return {
        "planned_peak": plan["memory"]["peak_bytes"],
        "trainable": model["trainable"],
        "base": model["base"],
    }


def line(run: dict[str, Any], card: float, base: int, trainable: int) -> str:
    """One arm in Markdown.

    The share counts 4 operations a parameter of the base and 6 of the adapter for each position: forward, and
    backward without gradients of frozen weights; what attention computes beside its projections is left out.
    """
    if "failed" in run:
        return f"| {run['arm']} | {run['failed'].replace('|', '/').replace(chr(10), ' ')} |" + " |" * 5
    share = run["positions"] / run["seconds"] * (4 * base + 6 * trainable) / card
    peak, plan = run.get("gpu_peak"), run.get("planned_peak")
    cells = [f"{run['tokens'] / run['seconds']:,.0f}", f"{share:.1%}"]
    cells += [f"{1 - run['tokens'] / run['positions']:.0%}", f"{peak / 2**30:.2f}" if peak else "no GPU"]
    cells += [f"{plan / 2**30:.2f}" if plan else "", f"{run['start_s']:.0f}"]
    return f"| {run['arm']} | {' | '.join(cells)} |"


def report(result: dict[str, Any]) -> str:
    """The table, and what it stands on."""
    there = [name for name, found in result["kernels"].items() if found]
    lacks = [name for name, found in result["kernels"].items() if not found]
    known = next((run for run in result["runs"] if "base" in run), {"base": 0, "trainable": 0})
    lines = [
        "# A 4B hybrid on a GPU" + " (a dry run: a tiny model, figures of nothing)" * result["dry"],
        "",
        f"`{result['command']}`, {result['date']}",
        f"{result['device']}; bf16 {result['rate'] / 1e12:.1f} TFLOP/s measured; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        f"Installed: {', '.join(there) or 'none of the kernels'}; not: {', '.join(lacks) or 'none'}.",
        "",
        "| what | tokens/s | share of the bf16 rate | padding | peak, GiB | planned | start, s |",
        "| --- |" + " ---: |" * 6,
        *(line(run, result["rate"], known["base"], known["trainable"]) for run in result["runs"]),
        "",
        f"The first {WARM} batches are not in the figures. The share counts 4 operations a parameter of the"
        " base and 6 of the adapter for each position, padding included; attention itself is left out.",
    ]
    if result["left"]:
        lines += ["", f"No time was left for: {'; '.join(result['left'])}."]
    return "\n".join([*lines, ""])


def main(words: list[str] | None = None) -> None:
    """Measure arm after arm until the time is up; write what was found after each."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--dry-run", action="store_true", help="a tiny model, on any machine")
    options.add_argument("--limit", type=float, default=570, help="seconds after which no arm begins")
    options.add_argument("--outputs", type=Path, default=OUTPUTS / "_bench")
    options.add_argument(
        "--results", type=Path, help="(default: benchmarks/results/; of a dry run, --outputs)"
    )
    given = options.parse_args(words)
    began, folder = time.monotonic(), given.outputs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = given.results or (folder if given.dry_run else RESULTS)
    import torch

    cuda = torch.cuda.is_available()
    if not (cuda or given.dry_run):
        options.error("there is no GPU here; --dry-run shows that the command works, on a tiny model")
    tiny = {"contract": "tiny_qwen35", "weights": "random", "dtype": "float32"}
    chosen = list(arms(tiny if given.dry_run else big(folder)))
    if given.dry_run:
        chosen = [
            replace(arm, job=replace(arm.job, rows=4, batch=2, steps=2, kind="short")) for arm in chosen[:2]
        ]
    os.environ["BENCH_WARM"] = "1" if given.dry_run else str(WARM)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu", *(words or sys.argv[1:])]),
        "date": now(),
        "device": torch.cuda.get_device_name() if cuda else machine.processor(),
        "versions": machine.versions(*PACKAGES),
        "kernels": {p: importlib.util.find_spec(name) is not None for name, p in KERNELS.items()},
        "dry": given.dry_run,
        "rate": rate(),
        "runs": [],
        "left": [],
    }
    for arm in chosen:
        if time.monotonic() - began > given.limit:
            result["left"].append(arm.name)
            continue
        os.environ["BENCH_WITHOUT"] = arm.without
        setting = jobs.prepared(arm.job, folder, cpu=not cuda, here=given.dry_run)
        command = arm.command(setting)
        name = "".join(c if c.isalnum() else "_" for c in arm.name)
        run = (inside if given.dry_run else measured)(command, setting.folder, name, os.cpu_count() or 1)
        result["runs"].append({"arm": arm.name} | run | ({} if "failed" in run else planned(command)))
        print(f"{arm.name}: {run.get('failed') or round(run['seconds'], 1)}", flush=True)
        write(results / "gpu.json", json.dumps(result, indent=1) + "\n")
        write(results / "gpu.md", report(result))
    print("\n" + report(result))


if __name__ == "__main__":
    main()
