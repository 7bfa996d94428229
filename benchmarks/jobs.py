"""What make bench trains, and the commands that train it: one base, one file of rows, one adapter, many
contenders.

A contender is a command of its own, started as its users start it; benchmarks/clock measures inside.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import chats
from lora_recipes.core.files import ROOT

HERE = ROOT / "benchmarks"
MODELS = {
    "dense": {"contract": str(HERE / "models/qwen3_14m.yaml"), "weights": "random", "dtype": "float32"},
    "hybrid": {"contract": str(HERE / "models/qwen35_16m.yaml"), "weights": "random", "dtype": "float32"},
    "smollm2": {"contract": "smollm2_135m", "weights": "package", "dtype": "float32"},
}
# kind of rows -> the turns of a chat, one of these at random, and where a row is cut
ROWS = {"short": ((1, 2), 512), "mixed": ((1, 1, 1, 2, 2, 3, 5, 8), 1024), "long": ((10, 11, 12), 2048)}
TURN = 200  # tokens that a turn has at most, nearly always
PACKED: dict[str, Any] = {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
GROUPED: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
Command = Callable[["Setting"], list[str]]
_BASE = "import sys; from benchmarks.jobs import base; print(base(*sys.argv[1:]))"


@dataclass(frozen=True)
class Job:
    """One epoch of `rows` chats of a kind on a model, by LoRA of rank `rank` on every linear layer."""

    model: str = "dense"
    kind: str = "short"
    rows: int = 256
    rank: int = 8
    batch: int = 8
    full: int | None = None  # rows that nearly fill so many tokens, in place of the kind's
    steps: int | None = None  # an epoch is cut there
    given: Mapping[str, Any] | None = None  # a `model:` section in place of the named one

    @property
    def section(self) -> dict[str, Any]:
        """The recipe's `model:`."""
        return dict(self.given or MODELS[self.model])

    @property
    def turns(self) -> tuple[int, ...]:
        """How many turns a chat has: one of these."""
        return (max(self.full // TURN, 1),) if self.full else ROWS[self.kind][0]

    @property
    def lora(self) -> dict[str, Any]:
        """Fields of LoraConfig."""
        return {"r": self.rank, "lora_alpha": 2 * self.rank, "target_modules": "all-linear"}

    @property
    def train(self) -> dict[str, Any]:
        """Fields of SFTConfig: those that the job states; all others stay TRL's defaults."""
        return {
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.batch,
            "max_length": self.full or ROWS[self.kind][1],
            "learning_rate": 2e-4,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 10,
            "seed": 42,
            **({"max_steps": self.steps} if self.steps else {}),
        }

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}, {self.kind} rows"


@dataclass(frozen=True)
class Setting:
    """A job on the disk: the base as a checkpoint, the rows as prompt and completion and as messages."""

    job: Job
    base: Path
    rows: Path
    chats: Path
    folder: Path
    cpu: bool

    def written(self, name: str, value: Any) -> Path:
        """`value` as a file of JSON, which is YAML too."""
        file = self.folder / name
        file.write_text(json.dumps(value, indent=1) + "\n")
        return file

    def output(self, name: str) -> str:
        """An empty place for what a contender saves."""
        folder = self.folder / f"{name}_output"
        shutil.rmtree(folder, ignore_errors=True)
        return str(folder)

    def trl(self, name: str, **more: Any) -> dict[str, Any]:
        """The job for a script that calls TRL: on a CPU its bf16 is off, as model.dtype asks here."""
        owned = {"output_dir": self.output(name), "report_to": "none", "use_cpu": self.cpu, "bf16": False}
        return {
            "base": str(self.base),
            "rows": str(self.rows),
            "dtype": self.job.section["dtype"],
            "quantize": self.job.section.get("quantize"),
            "lora": self.job.lora,
            "train": self.job.train | owned | more,
        }


def base(recipe: str, outputs: str) -> str:
    """Make the base of the recipe in that file, unless it is there; its folder. Loads torch."""
    from lora_recipes.recipe import load
    from lora_recipes.recipe.base import resolve
    from lora_recipes.training.train import prepare_base

    found = resolve(load.load(recipe), Path(outputs))
    prepare_base(found)
    return found.base.weights


def prepared(job: Job, folder: Path, cpu: bool, here: bool = False) -> Setting:
    """Write the rows of `job` and its base below `folder`, unless that is there; the base in a process of its
    own, or `here`.
    """
    kind = f"full{job.full}" if job.full else job.kind
    own = folder / f"{job.model}_{kind}_{job.rows}_r{job.rank}"
    own.mkdir(parents=True, exist_ok=True)
    pairs, whole = own / "rows.jsonl", own / "chats.jsonl"
    with pairs.open("w") as rows, whole.open("w") as conversations:
        for line in chats(job.rows, job.turns):
            messages = json.loads(line)["messages"]
            rows.write(json.dumps({"prompt": messages[:-1], "completion": messages[-1:]}) + "\n")
            conversations.write(line)
    setting = Setting(job, Path(), pairs, whole, own, cpu)
    recipe = setting.written("base.yaml", _recipe(setting))
    if here:
        return replace(setting, base=Path(base(str(recipe), str(folder))))
    words = [sys.executable, "-c", _BASE, str(recipe), str(folder)]
    made = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return replace(setting, base=Path(made.stdout.splitlines()[-1]))


def _recipe(setting: Setting, batching: str = "auto", **more: Any) -> dict[str, Any]:
    job = setting.job
    return {
        "model": job.section,
        "data": {"train": str(setting.rows), "batching": batching},
        "lora": job.lora,
        "train": job.train | more,
    }


def script(name: str, file: str = "trl_script.py", **more: Any) -> Command:
    """One of contenders/, with settings of TRL's beside those of the job."""
    return lambda s: [
        sys.executable,
        str(HERE / "contenders" / file),
        str(s.written(f"{name}.json", s.trl(name, **more))),
    ]


def _ours(name: str, batching: str = "auto", **more: Any) -> Command:
    def command(s: Setting) -> list[str]:
        recipe = s.written(f"{name}.yaml", _recipe(s, batching, **more))
        # Beside the folder of the job: there the base is, made once.
        words = ["train", str(recipe), "--outputs", str(s.folder.parent), "--force"]
        return [sys.executable, "-m", "lora_recipes", *words]

    return command


def _trl_sft(name: str, **more: Any) -> Command:
    def command(s: Setting) -> list[str]:
        job = s.trl(name, **more)
        train = {k: v for k, v in job["train"].items() if v is not None}
        lora = {
            "use_peft": True,
            "lora_r": s.job.rank,
            "lora_alpha": 2 * s.job.rank,
            "lora_target_modules": "all-linear",
        }
        data = {"datasets": [{"path": "json", "data_files": job["rows"]}]}
        asked = {"model_name_or_path": job["base"], "dtype": job["dtype"], **data, **lora, **train}
        trl = str(Path(sys.executable).with_name("trl"))
        return [trl, "sft", "--config", str(s.written(f"{name}.yaml", asked))]

    return command


FIRST = "TRL script"  # what all others are held against
OURS = "lora-recipes"
CONTENDERS: dict[str, Command] = {
    FIRST: script("trl_script"),
    "TRL script, grouped by length": script("trl_grouped", **GROUPED),
    "TRL script, packed": script("trl_packed", **PACKED),
    "bare loop, packed": script("bare", "bare_loop.py"),
    OURS: _ours("ours"),
    f"{OURS}, padded": _ours("ours_padded", "as_given"),
    f"{OURS}, grouped by length": _ours("ours_grouped", "as_given", **GROUPED),
    f"{OURS}, packed": _ours("ours_packed", "as_given", **PACKED),
    "trl sft, its defaults": _trl_sft("sft_defaults", gradient_checkpointing=None),
    "trl sft, packed": _trl_sft("sft_packed", **PACKED),
}
