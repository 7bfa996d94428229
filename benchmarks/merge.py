"""What a merge costs: in the whole model as it was before, shard by shard, and without asking the model.

`python -m benchmarks.merge [ROUNDS]` (default: 3) writes benchmarks/results/merge.md and .json. The base has
the shape of Qwen3-0.6B with random numbers in bfloat16, in files of at most 320 MB; the adapter, of rank 16,
is on every linear layer. Each figure is of a process of its own, from after its imports; the kinds take
turns.
"""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_recipes.core import weights
from lora_recipes.core.files import ROOT, write

RESULTS = ROOT / "benchmarks/results"
KINDS = {
    "copy": "the base's files copied, no merge",
    "model": "in the whole model, asked (before)",
    "shards": "shard by shard, asked",
    "unasked": "shard by shard, UNASKED=1",
}


def make(folder: Path) -> None:
    """The base and the adapter in `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.cases import families

    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(config).bfloat16()
    model: Any = empty.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder / "base", max_shard_size="320MB")
    families.tokenizer().save_pretrained(folder / "base")
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(folder / "adapter"))


def one(kind: str, folder: Path) -> dict[str, Any]:
    """Merge in this process, as `kind` does; what it took."""
    from lora_recipes.model import merge

    if kind == "model":
        merge.shards.of = lambda *_: (None, "measured")
    before, began, spent = _peak(), time.monotonic(), _seconds()
    if kind == "copy":
        shutil.copytree(folder / "base", folder / "merged")
    else:
        merge.merge(
            folder / "adapter", folder / "merged", folder / "base", unproven=True, unasked=kind == "unasked"
        )
    wall, spent = time.monotonic() - began, _seconds() - spent
    return {"kind": kind, "wall_s": wall, "cpu_s": spent, "memory": _peak() - before}


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak() -> int:
    """The most that this process has held, in bytes. Not ru_maxrss, which begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measured(kind: str, folder: Path) -> dict[str, Any]:
    """As `one`, in a process of its own."""
    code = "import sys, json; from pathlib import Path; from benchmarks.merge import one\n"
    code += "print(json.dumps(one(sys.argv[1], Path(sys.argv[2]))))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, kind, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    shutil.rmtree(folder / "merged")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: list[dict[str, Any]], sizes: dict[str, int]) -> str:
    """The measurements for people: medians."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    names = ("peft", "safetensors", "torch", "transformers")
    mib = {name: f"{size / 2**20:,.0f}" for name, size in sizes.items()}
    lines = [
        "# Merging: in the model, and shard by shard",
        "",
        f"`python -m benchmarks.merge` on {os.cpu_count()} cores (one thread), load {load} at the end; Python"
        f" {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}.",
        f"The base: 596 M parameters in bfloat16, {mib['base']} MiB, the largest file {mib['largest']} MiB;"
        f" the adapter {mib['adapter']} MiB. Medians of {len(found) // len(KINDS)}, each in a process of its"
        " own. Memory is the peak above what the process held after its imports.",
        "",
        "| | wall s | processor s | memory, MiB |",
        "|---|---|---|---|",
    ]
    for kind, said in KINDS.items():
        runs = [m for m in found if m["kind"] == kind]
        wall, cpu, memory = (statistics.median(m[k] for m in runs) for k in ("wall_s", "cpu_s", "memory"))
        lines.append(f"| {said} | {wall:.1f} | {cpu:.1f} | {memory / 2**20:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder)
        files = [path.stat().st_size for path in weights.files(folder / "base")]
        adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        sizes = {"base": sum(files), "largest": max(files), "adapter": adapter}
        found = []
        for _ in range(rounds):
            for kind in KINDS:
                found.append(measured(kind, folder))
                print(found[-1], flush=True)
    write(RESULTS / "merge.json", json.dumps({"sizes": sizes, "runs": found}, indent=2) + "\n")
    write(RESULTS / "merge.md", table(found, sizes))
    print(table(found, sizes))


if __name__ == "__main__":
    main()
