"""How do time and memory grow: with rows, their length, the rank, adapters combined, arms of an ablation?

`make bench SCALING=1`. The dense 14M model; one axis at a time, all else as in make bench. Where a script
written by hand does the same, it stands beside. Writes scaling.md and scaling.json.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import jobs
from benchmarks.train import among, begun, heading, measured, parser
from lora_recipes.core.files import write

TRAINED: dict[str, list[jobs.Job]] = {
    "rows": [jobs.Job(rows=count) for count in (64, 256, 1024)],
    "length": [jobs.Job(rows=16, batch=2, full=n) for n in (256, 512, 1024, 2048)],
    "rank": [jobs.Job(rows=64, rank=rank) for rank in (4, 16, 64, 256)],
}
COUNTS = {"adapters": (2, 4, 8, 16), "arms": (1, 2, 4)}
AXES = [*TRAINED, *COUNTS]


def points(axis: str, folder: Path) -> Iterator[tuple[int, str, list[str], Path]]:
    """Of an axis: the value, who, the command, and the folder that it runs in."""
    for job in TRAINED.get(axis, []):
        setting = jobs.prepared(job, folder, cpu=True)
        value = {"rows": job.rows, "length": job.train["max_length"], "rank": job.rank}[axis]
        for name in (jobs.FIRST, jobs.OURS):
            yield value, name, jobs.CONTENDERS[name](setting), setting.folder
    if axis in TRAINED:
        return
    setting = jobs.prepared(jobs.Job(rows=80), folder, cpu=True)
    ours = [sys.executable, "-m", "lora_recipes"]
    train = jobs.CONTENDERS[jobs.OURS](setting)
    recipe = Path(train[train.index("train") + 1])
    if axis == "adapters":
        # The same one under many names: what combining costs does not depend on its numbers.
        one = setting.folder.parent / recipe.stem / "adapter"
        if not one.is_dir():
            measured(train, setting.folder, "adapter", 1)
    for value in COUNTS[axis]:
        if axis == "adapters":
            named = [f"a{n}={one}" for n in range(value)]
            words = ["combine", *named, "--weights", *[f"{1 / value:.6f}"] * value, "--method", "cat"]
            words += ["--name", f"combined_{value}", "--force", "--unproven"]
        else:
            rates = ",".join(f"{number}e-4" for number in range(1, value + 1))
            words = ["ablate", str(recipe), f"train.learning_rate={rates}", "--force"]
        yield value, jobs.OURS, [*ours, *words, "--outputs", str(setting.folder.parent)], setting.folder


def table(axis: str, runs: list[dict[str, Any]]) -> list[str]:
    """One axis in Markdown: medians, of the training where there is one, else of the command."""
    names = list(dict.fromkeys(run["contender"] for run in runs))
    # A clock's: the processes of an ablation are children of a server, whose processor time nobody is told.
    what = "training: processor s" if axis in TRAINED else "command: s"
    head = [axis, *(f"{n}, {what} | start, processor s | peak memory, MiB" for n in names)]
    lines = [f"| {' | '.join(head)} |", "| ---: |" + " ---: |" * 3 * len(names)]
    for value in dict.fromkeys(run["value"] for run in runs):
        cells = [f"{value:,}"]
        for name in names:
            own = [r for r in runs if (r["value"], r["contender"]) == (value, name)]
            if failed := [r["failed"] for r in own if "failed" in r]:
                cells += [failed[0].replace("|", "/"), "", ""]
                continue
            spent = [r["cpu_s"] if axis in TRAINED else r["whole_s"] for r in own]
            start = [f"{median(r['start_cpu_s'] for r in own):.1f}"] if axis in TRAINED else [""]
            cells += [f"{median(spent):.1f} ({min(spent):.1f}-{max(spent):.1f})", *start]
            cells += [f"{median(r['rss_peak'] for r in own) / 2**20:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(result: dict[str, Any]) -> str:
    """All axes."""
    lines = [
        *heading("How time and memory grow", result),
        "The dense 14M model of make bench, r 8 on every linear layer, 256 short chats, 8 a step, but for"
        " what the axis says: `length`: 16 chats that nearly fill so many tokens, 2 a step; `rank`: 64 chats;"
        " `adapters`: that many combined by `cat`; `arms`: an ablation of that many rates on 80 chats,"
        " planning and report included. Medians of the rounds, in brackets the least and the most.",
    ]
    for axis in dict.fromkeys(run["axis"] for run in result["runs"]):
        own = [run for run in result["runs"] if run["axis"] == axis]
        lines += ["", f"## {axis[0].upper()}{axis[1:]}", "", *table(axis, own)]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure every axis; write what was found after each."""
    options = parser(__doc__)
    options.add_argument("--only", type=among(*AXES), default=AXES, help=f"of {' '.join(AXES)}")
    given = options.parse_args()
    result = begun("scaling", given.threads)
    for axis in given.only:
        for number in range(1, given.rounds + 1):
            for value, name, words, folder in points(axis, given.outputs.resolve()):
                file = f"{axis}_{value}_{'ours' if name == jobs.OURS else 'trl'}"
                one = measured(words, folder, file, given.threads, trains=axis in TRAINED)
                told = {"axis": axis, "value": value, "contender": name, "round": number}
                result["runs"].append(told | one)
                said = one.get("failed") or f"{one['whole_s']:.1f} s in all"
                print(f"{axis} {value}  round {number}  {name:<14} {said}", flush=True)
        write(given.results / "scaling.json", json.dumps(result, indent=1) + "\n")
        write(given.results / "scaling.md", report(result))
    print("\n" + report(result))


if __name__ == "__main__":
    main()
