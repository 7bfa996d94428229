"""What checking rows costs, beside TRL's own preparation of the same rows: processor time, memory, disk.

`python -m benchmarks.rows [ROWS ...]` (default: 1000 10000 100000) writes benchmarks/results/rows.md and
.json. Each figure is of a process of its own, from after its imports to a trainer that has its data set. The
chats are made of the companion's sentences, the tokenizer and the template are SmolLM2's.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_recipes.core.files import OUTPUTS, ROOT, size, write

RESULTS = ROOT / "benchmarks/results"
TRL = 100_000  # rows that TRL is asked to prepare at most
OVERRIDES = ["data.eval=null", "train.eval_strategy='no'", "data.kept=null", "data.limits={near_in_eval: 1}"]


def chats(count: int, turns: Sequence[int] = (1, 2, 3)) -> Iterator[str]:
    """Lines of JSONL: conversations of as many turns as one of `turns`, no two the same."""
    rng, rows = random.Random(1), (ROOT / "data/companion/train.jsonl").read_text().splitlines()
    pairs = [(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in map(json.loads, rows)]
    for number in range(count):
        messages = []
        for turn, (asked, said) in enumerate(rng.choices(pairs, k=rng.choice(turns))):
            messages.append({"role": "user", "content": f"{asked} ({number}.{turn})"})
            messages.append({"role": "assistant", "content": said})
        yield json.dumps({"messages": messages}) + "\n"


def one(kind: str, file: Path, outputs: Path) -> dict[str, Any]:
    """Prepare the rows of `file` in this process, as `kind` does; what it took."""
    import torch
    from datasets import load_dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from lora_recipes.core.run_folder import RunFolder
    from lora_recipes.data import gate, tokenizer
    from lora_recipes.model import build
    from lora_recipes.recipe import load as recipes
    from lora_recipes.recipe.base import resolve
    from lora_recipes.training.train import prepare_base

    torch.set_num_threads(1)
    recipe = recipes.load("smollm2_style", [f"data.train={file}", *OVERRIDES])
    resolved = resolve(recipe, outputs)
    prepare_base(resolved)
    tokens = tokenizer.load(resolved, local_files_only=True)
    config = Qwen3Config(
        vocab_size=len(tokens),
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Qwen3ForCausalLM(config)
    model.config._name_or_path = "tiny"
    before, began, spent = _memory(), time.monotonic(), _seconds()
    if kind == "trl":
        arguments = SFTConfig(
            output_dir=str(outputs / "trl"), max_length=384, report_to="none", use_cpu=True, bf16=False
        )
        rows = load_dataset("json", data_files=str(file), split="train")
        made = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokens)
    else:
        arguments = build.sft_config(recipe, RunFolder(outputs / "ours"))
        checked = gate.pass_through(resolved, False)
        made = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=checked.train.dataset,
            processing_class=checked.tokenizer,
        )
    data: Any = made.train_dataset
    count = sum(len(ids) for ids in data[:100]["input_ids"])
    return {
        "cpu_s": _seconds() - spent,
        "wall_s": time.monotonic() - began,
        "memory_before": before,
        "memory_peak": _memory(),
        "first_100_tokens": count,
    }


def _seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _memory() -> int:
    """The most that this process, or one of those that it began, has held at once: bytes."""
    used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(used) * 1024


def measured(kind: str, file: Path, outputs: Path, cache: Path) -> dict[str, Any]:
    """As `one`, in a process of its own; with what it left on the disk."""
    code = "import sys, json; from pathlib import Path; from benchmarks.rows import one\n"
    code += "print(json.dumps(one(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))"
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, kind, str(file), str(outputs)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"cache": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())}


def table(found: list[dict[str, Any]]) -> str:
    """The measurements for people."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    names = ("datasets", "tokenizers", "transformers", "trl")
    lines = [
        "# Rows: checked, beside TRL's own preparation",
        "",
        f"`python -m benchmarks.rows` on {os.cpu_count()} cores, load {load} at the end; Python"
        f" {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}.",
        "Chats of one to three turns, SmolLM2's tokenizer, max_length 384. `first`: all checks, nothing kept"
        " yet; `second`: the same rows again. Memory is the most that one process held, less what it held"
        " after its imports.",
        "",
        "| rows | of | processor s | a row, ms | wall s | memory, MiB | on the disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in found:
        grown = max(m["memory_peak"] - m["memory_before"], 0) / 2**20
        lines.append(
            f"| {m['rows']:,} | {m['kind']} | {m['cpu_s']:.1f} | {1000 * m['cpu_s'] / m['rows']:.2f} |"
            f" {m['wall_s']:.1f} | {grown:.0f} | {size(m['cache'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every number of rows, in turn; write what was found after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--outputs", type=Path, default=OUTPUTS, help="where the base is, or is made")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for rows in given.rows:
            file = Path(temporary) / "rows.jsonl"
            with file.open("w") as lines:
                lines.writelines(chats(rows))
            for kind in ("trl", "first", "second"):
                if kind == "trl" and rows > TRL:
                    continue
                cache = Path(temporary) / ("trl" if kind == "trl" else "ours")
                found.append(
                    {"rows": rows, "kind": kind} | measured(kind, file, given.outputs.resolve(), cache)
                )
                print(json.dumps(found[-1]), flush=True)
                write(RESULTS / "rows.json", json.dumps(found, indent=1) + "\n")
                write(RESULTS / "rows.md", table(found))
            for name in ("trl", "ours"):
                shutil.rmtree(Path(temporary) / name, ignore_errors=True)


if __name__ == "__main__":
    main()
