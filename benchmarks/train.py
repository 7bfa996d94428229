"""How fast does a recipe train, beside a script by hand, a bare loop and other trainers? `make bench`.

Every contender trains one epoch of the same rows on the same base, by an adapter of the same rank on the same
layers, with the same seed: a command of its own, as its users start it. Rounds are interleaved, and ratios
are taken within a round. By default the dense 14M model on 256 short chats, 3 rounds. `make bench-peers`
makes the other trainers' environments; those that are there take part. Writes train.md, train.json and a
chart.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import jobs, machine, peers
from lora_recipes.core.files import OUTPUTS, ROOT, now, write

RESULTS, CHART = ROOT / "benchmarks/results", ROOT / "docs/bench.png"
LIMIT = 3600  # seconds that one command may take
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def measured(words: list[str], folder: Path, name: str, threads: int, trains: bool = True) -> dict[str, Any]:
    """One command: what the clock inside found, and around it `whole_s` and the load. `failed`
    says in its own words why there is nothing. Its output is in `folder`, as `name`.log.
    """
    clock, log = folder / "clock.jsonl", folder / f"{name}.log"
    clock.unlink(missing_ok=True)
    environment = os.environ | {
        "BENCH_BEGAN": str(time.monotonic()),
        "BENCH_CLOCK": str(clock),
        "HF_DATASETS_CACHE": str(folder / f"{name}_cache"),  # of its own: nobody finds another's rows
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",  # telemetry waits for a network
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": str(threads),
        "PATH": f"{Path(words[0]).parent}:{os.environ['PATH']}",  # an environment's own launchers
        "PYTHONPATH": str(ROOT / "benchmarks/clock"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    load, began = machine.load(), time.monotonic()
    with log.open("w") as output:
        try:
            code: Any = subprocess.run(
                words, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"more than {LIMIT} s"
        except OSError as error:
            code = str(error)
    around = {"whole_s": time.monotonic() - began, "load": load}
    lines = [json.loads(line) for line in clock.read_text().splitlines()] if clock.exists() else []
    around["rss_peak"] = max((line["rss_peak"] for line in lines), default=0)
    trained = [line for line in lines if "steps" in line]
    if code or not (trained or not trains):
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raised = [line for line in said if "Error" in line][-1:]
        last = " ".join(raised or said[-2:]) or "nothing was said"
        return around | {"failed": f"{last[:300]} (exit {code})"}
    return around | (trained[-1] if trained else {})


def rounds(
    setting: jobs.Setting, contenders: dict[str, jobs.Command], count: int, threads: int
) -> list[dict[str, Any]]:
    """Every contender in turn, `count` times, each time another one first."""
    found = []
    names = list(contenders)
    for number in range(1, count + 1):
        turn = (number - 1) % len(names)
        for name in names[turn:] + names[:turn]:
            file = "".join(c if c.isalnum() else "_" for c in name)
            one = measured(contenders[name](setting), setting.folder, file, threads)
            found.append({"job": setting.job.name, "contender": name, "round": number} | one)
            said = one.get("failed") or f"{one['seconds']:7.1f} s  {one['cpu_s']:7.1f} processor s"
            print(f"{setting.job.name}  round {number}  {name:<36} {said}", flush=True)
    for cache in setting.folder.glob("*_cache"):
        shutil.rmtree(cache)
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each contender of one job: medians, and [median, least, most] of the ratios to the TRL script of the
    same round. One that failed has its words instead.
    """
    first = {r["round"]: r for r in runs if r["contender"] == jobs.FIRST and "failed" not in r}
    rows = []
    for name in dict.fromkeys(r["contender"] for r in runs):
        own = [r for r in runs if r["contender"] == name and "failed" not in r]
        if not own:
            rows.append({"contender": name} | {k: r for k, r in _last(runs, name).items() if k == "failed"})
            continue
        row: dict[str, Any] = {"contender": name, "rounds": len(own), "versions": _versions(own[-1])}
        for key in ("seconds", "cpu_s", "start_s", "start_cpu_s", "rss_peak"):
            row[key] = _spread([r[key] for r in own])
        row["first_start_s"] = min(own, key=lambda r: r["round"])["start_s"]
        row |= {key: own[-1].get(key) for key in ("steps", "positions", "tokens", "loss")}
        for key in ("seconds", "cpu_s"):
            ratios = [r[key] / first[r["round"]][key] for r in own if r["round"] in first]
            row[f"{key}_ratio"] = _spread(ratios) if ratios else None
        rows.append(row)
    return rows


def _last(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return [r for r in runs if r["contender"] == name][-1]


def _versions(run: dict[str, Any]) -> dict[str, str]:
    return {package: run[package] for package in PACKAGES if run.get(package)}


def _spread(values: list[float]) -> list[float]:
    return [median(values), min(values), max(values)]


def _said(values: list[float] | None, digits: int) -> str:
    if values is None:
        return ""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return middle if low == high else f"{middle} ({low}-{high})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of one job in Markdown."""
    lines = [
        "| who | seconds | processor s | x TRL script | x, processor s | tokens/s | padding | steps |"
        " start, s: first, then | peak memory, MiB |",
        "| --- |" + " ---: |" * 9,
    ]
    tokens = next((r["tokens"] for r in rows if r["contender"] == jobs.FIRST and "tokens" in r), None)
    for row in rows:
        if "failed" in row:
            words = row["failed"].replace("|", "/")
            lines.append(f"| {row['contender']} | did not train: {words} |" + " |" * 8)
            continue
        cells = [_said(row["seconds"], 1), _said(row["cpu_s"], 1)]
        cells += [_said(row["seconds_ratio"], 2), _said(row["cpu_s_ratio"], 2)]
        cells += [f"{tokens / row['seconds'][0]:,.0f}" if tokens else ""]
        cells += [f"{1 - row['tokens'] / row['positions']:.0%}" if row["positions"] else ""]
        cells += [str(row["steps"]), f"{row['first_start_s']:.1f}, {row['start_s'][0]:.1f}"]
        cells += [f"{row['rss_peak'][0] / 2**20:,.0f}"]
        lines.append(f"| {row['contender']} | {' | '.join(cells)} |")
    return lines


def begun(module: str, threads: int) -> dict[str, Any]:
    """What stands beside the `runs` of benchmarks/`module`.py: the command, the machine, the versions."""
    return {
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
        "date": now(),
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": machine.versions(*PACKAGES),
        "runs": [],
    }


def heading(title: str, result: dict[str, Any]) -> list[str]:
    """The same for a person, in Markdown, with the load that the runs met."""
    loads = [run["load"] for run in result["runs"]]
    said = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return [
        f"# {title}",
        "",
        f"`{result['command']}`, {result['date']}",
        f"{result['processor']}, {result['cores']} cores, threads of each: {result['threads']}; load average"
        f" before each command {min(loads):.1f} to {max(loads):.1f}.",
        f"{said}.",
        "",
    ]


def report(result: dict[str, Any]) -> str:
    """All tables, with what they do and do not say."""
    lines = [
        *heading("How fast a recipe trains", result),
        "One epoch of the rows; seconds are of the training itself, without imports, load and preparation,"
        " which `start` has. Medians, in brackets the least and the most of the rounds; ratios within a"
        " round. Where others use the cores too, seconds say little: read the processor's. `tokens/s`: the"
        " rows' own tokens, the same for all. `padding`: of the positions that were computed.",
    ]
    for job in dict.fromkeys(run["job"] for run in result["runs"]):
        own = [run for run in result["runs"] if run["job"] == job]
        rows = summary(own)
        lines += ["", f"## {job[0].upper()}{job[1:]}", "", *table(rows)]
        others = {r["contender"]: r["versions"] for r in rows if r.get("versions")}
        for name, versions in others.items():
            if differs := {k: v for k, v in versions.items() if v != result["versions"].get(k)}:
                lines += ["", f"{name}: with {', '.join(f'{k} {v}' for k, v in differs.items())}."]
    return "\n".join([*lines, ""])


def chart(result: dict[str, Any], file: Path) -> None:
    """The ratios to the TRL script, a panel for each job; bars are medians, lines the least and the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summed = {}
    for job in dict.fromkeys(run["job"] for run in result["runs"]):
        rows = summary([run for run in result["runs"] if run["job"] == job])
        if told := [row for row in rows if row.get("cpu_s_ratio")]:
            summed[job] = told
    height = sum(len(rows) for rows in summed.values()) * 0.28 + 0.7 * len(summed) + 0.5
    shares = [len(rows) + 1 for rows in summed.values()]
    figure, axes = pyplot.subplots(
        len(summed), figsize=(8, height), layout="constrained", squeeze=False, height_ratios=shares
    )
    for axis, (job, rows) in zip(axes[:, 0], summed.items(), strict=True):
        rows = rows[::-1]
        middle = [row["cpu_s_ratio"][0] for row in rows]
        apart = [[r["cpu_s_ratio"][0] - r["cpu_s_ratio"][1] for r in rows]]
        apart += [[r["cpu_s_ratio"][2] - r["cpu_s_ratio"][0] for r in rows]]
        ours = ["C0" if row["contender"].startswith(jobs.OURS) else "0.7" for row in rows]
        axis.barh([row["contender"] for row in rows], middle, xerr=apart, color=ours, ecolor="0.2")
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set(title=job, xlabel="processor time of the training, as a multiple of the TRL script's")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def among(*known: str) -> Callable[[str], list[str]]:
    """An option of words that are among `known`; argparse says what is not."""

    def read(text: str) -> list[str]:
        if wrong := [word for word in text.split() if word not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {' '.join(known)}")
        return text.split()

    return read


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def chosen(only: list[str]) -> dict[str, jobs.Command]:
    """The contenders that are here; of them the first, and those with one of the words of `only`."""
    all_ = jobs.CONTENDERS | peers.contenders()
    if strange := [w for w in only if not any(w.lower() in n.lower() for n in all_)]:
        raise SystemExit(
            f"ONLY: no contender here has {strange[0]!r} in its name; there are {'; '.join(all_)}"
        )
    if not only:
        return all_
    return {n: c for n, c in all_.items() if n == jobs.FIRST or any(w.lower() in n.lower() for w in only)}


def parser(told: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks of training share."""
    made = argparse.ArgumentParser(description=(told or "").splitlines()[0])
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--threads", type=positive, default=os.cpu_count(), help="of each contender")
    made.add_argument(
        "--outputs", type=Path, default=OUTPUTS / "_bench", help="bases, logs and what is trained"
    )
    made.add_argument("--results", type=Path, default=RESULTS)
    return made


def main() -> None:
    """Measure every job in turn; write what was found after each."""
    options = parser(__doc__)
    options.add_argument(
        "--model", type=among(*jobs.MODELS), default=["dense"], help=f"of {' '.join(jobs.MODELS)}"
    )
    options.add_argument(
        "--rows", type=among(*jobs.ROWS), default=["short"], help=f"of {' '.join(jobs.ROWS)}"
    )
    options.add_argument("--count", type=positive, default=256, help="rows")
    options.add_argument("--batch", type=positive, default=8)
    options.add_argument("--only", type=str.split, default=[], help="contenders with one of these words")
    given = options.parse_args()
    contenders = chosen(given.only)
    outputs: Path = given.outputs.resolve()
    result = begun("train", given.threads)
    for model in given.model:
        for kind in given.rows:
            job = jobs.Job(model, kind, given.count, batch=given.batch)
            setting = jobs.prepared(job, outputs, cpu=True)
            result["runs"] += rounds(setting, contenders, given.rounds, given.threads)
            write(given.results / "train.json", json.dumps(result, indent=1) + "\n")
            write(given.results / "train.md", report(result))
            chart(result, CHART if given.results == RESULTS else given.results / "train.png")
    print("\n" + report(result))


if __name__ == "__main__":
    main()
