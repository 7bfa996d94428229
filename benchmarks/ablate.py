"""Many arms in one process, or a launch for each? Both in turn, several rounds, the same adapters: what the
sharing saves.

`python -m benchmarks.ablate` (about five minutes on two cores) writes benchmarks/results/ablate.md.
"""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lora_recipes.ablation import spec
from lora_recipes.core.files import ROOT, write

RECIPE, VALUES, ROUNDS = "tiny_facts", ("1", "2", "4", "8"), 3


def seconds(*commands: list[str]) -> float:
    """Wall time of commands one after another."""
    began = time.monotonic()
    for command in commands:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - began


def main() -> None:
    """Run both ways in turn, print and write the table."""
    over, loads = f"lora.r={','.join(VALUES)}", []
    found: dict[str, list[float]] = {"one process": [], "a launch each": []}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "scripts/train.py", "tiny_base", "--outputs", folder],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        for _ in range(ROUNDS):
            outputs = Path(folder) / "round"
            shutil.rmtree(outputs, ignore_errors=True)
            shutil.copytree(Path(folder) / "tiny_base", outputs / "tiny_base")
            loads.append(os.getloadavg()[0])
            found["one process"].append(
                seconds(["scripts/ablate.py", RECIPE, over, "--outputs", str(outputs)])
            )
            launches, made = [], spec.quick(RECIPE, [over]).runs()
            for value in VALUES:
                launches.append(
                    ["scripts/train.py", RECIPE, f"lora.r={value}", "--outputs", str(outputs), "--force"]
                )
            found["a launch each"].append(0.0)
            for launch, run in zip(launches, made, strict=True):
                found["a launch each"][-1] += seconds(launch)
                alone, ours = (
                    outputs / name / "adapter" / "adapter_model.safetensors"
                    for name in (RECIPE, run.recipe.name)
                )
                assert alone.read_bytes() == ours.read_bytes(), f"{run} is not what its launch makes"
    lines = ["# Arms of an ablation in one process, or a launch for each", ""]
    lines += [
        f"`python -m benchmarks.ablate`: {RECIPE}, {over} ({len(VALUES)} arms, 40 steps each), {ROUNDS}"
        " rounds, both ways in turn; "
    ]
    lines[-1] += (
        "the adapters of both are the same bytes. Planning, imports and (one process) the report are in the"
        " time."
    )
    lines += ["", "| | seconds, median | range |", "| --- | ---: | ---: |"]
    lines += [
        f"| {way} | {statistics.median(times):.1f} | {min(times):.1f}-{max(times):.1f} |"
        for way, times in found.items()
    ]
    ratios = sorted(one / many for one, many in zip(*found.values(), strict=True))
    lines += [
        "",
        f"Ratio within a round: {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}). ",
    ]
    said = ", ".join(f"{load:.1f}" for load in loads)
    lines[-1] += (
        f"{platform.machine()}, {os.cpu_count()} cores shared with others, load average at the start of each"
        f" round: {said}."
    )
    write(ROOT / "benchmarks" / "results" / "ablate.md", "\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
