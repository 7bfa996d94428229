"""Short runs on a real language model, SmolLM2-135M from its package: made once for all processes of a test
run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_recipes.core import files, lock
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import Resolved, resolve

NAME = "smollm2_style"
KINDS = {
    "float32": [],
    "bfloat16": ["model.dtype=bfloat16", "train.save_strategy='no'"],
    "nf4": ["model.quantize=nf4", "train.save_strategy='no'"],
    "narrow": ["lora.r=4", "train.save_strategy='no'"],
}
ROWS, STEPS = 4, 2  # one whole epoch of two examples a step
SHORT = [
    "train.num_train_epochs=1",
    "train.max_steps=-1",
    "train.per_device_train_batch_size=1",
    "train.gradient_accumulation_steps=2",
    "train.max_length=80",
    "train.warmup_steps=0",
    "train.learning_rate=3.0e-3",  # two steps of it are more than the noise of bfloat16
    "train.eval_strategy='no'",
    "train.save_strategy=steps",
    "train.save_steps=1",
    "train.logging_steps=1",
]


@dataclass(frozen=True)
class Real:
    """The runs in `folder`, which every process of a test run shares."""

    folder: Path

    def words(self, kind: str, *more: str) -> list[str]:
        """The overrides of a short run: the shortest rows of the recipe, none of them cut. `more`: others, in
        place of those of the same key.
        """
        rows = [f"data.{which}={self.folder / which}.jsonl" for which in ("train", "eval")]
        return list({word.split("=")[0]: word for word in [*rows, *SHORT, *KINDS[kind], *more]}.values())

    def resolved(self, kind: str, *more: str, outputs: Path | None = None) -> Resolved:
        """A short run of that kind, into `outputs` or where all share it; its base is there."""
        from lora_recipes.training.train import prepare_base

        outputs = outputs or self.folder / kind
        outputs.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (outputs / "_bases").symlink_to(self.folder / "_bases")
        found = resolve(recipes.load(NAME, self.words(kind, *more)), outputs)
        prepare_base(found)
        return found

    def base(self, kind: str) -> Path:
        """The checkpoint that a run of that kind trains on."""
        self.resolved(kind)
        return self.folder / "_bases" / f"smollm2_135m-{'bfloat16' if kind == 'bfloat16' else 'float32'}"

    def run(self, kind: str) -> Path:
        """The run folder of a finished run of that kind; the first who asks trains it."""
        from lora_recipes.training.train import train

        with self.alone(kind):
            run = RunFolder(self.folder / kind / NAME)
            if not run.finished:
                train(self.resolved(kind))
        return run.path

    def merged(self, kind: str) -> Path:
        """The merged model of that run; the first who asks merges it."""
        from lora_recipes.model.merge import merge

        run = self.run(kind)
        with self.alone(f"{kind}-merged"):
            if not (run / "merged").exists():
                merge(run / "adapter", run / "merged")
        return run / "merged"

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """One process at a time makes what is called `name`."""
        with lock.held(self.folder / name, "makes it for the tests", wait=True):
            yield


def make(folder: Path) -> Real:
    """The rows of the runs, unless another process has written them."""
    real = Real(folder)
    (folder / "_bases").mkdir(parents=True, exist_ok=True)
    with real.alone("rows"):
        for which, count in (("train", ROWS), ("eval", 2)):
            rows = (files.ROOT / "data" / "companion" / f"{which}.jsonl").read_text().splitlines()
            if not (target := folder / f"{which}.jsonl").exists():
                target.write_text("\n".join(sorted(rows, key=len)[:count]) + "\n")
    return real
