"""How many steps, and at which learning rate: the arithmetic of transformers.Trainer, said aloud."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lora_recipes.core.errors import Problem
from lora_recipes.recipe.recipe import Recipe


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run over `rows` rows (after packing), as Trainer.set_initial_training_values
    counts them.
    """

    rows: int
    per_device: int
    accumulation: int
    devices: int
    epochs: float
    max_steps: int = -1
    warmup_steps: float = 0
    drop_last: bool = False

    @property
    def examples(self) -> int:
        """Examples that go into one optimizer step."""
        return self.per_device * self.accumulation * self.devices

    @property
    def batches(self) -> int:
        """Batches that each device sees in one pass over the rows.

        accelerate's BatchSamplerShard fills the last round of batches with rows from the start of the epoch,
        so that all devices have equally many; with drop_last it leaves that round out.
        """
        whole, rest = divmod(self.rows, self.per_device * self.devices)
        return whole if self.drop_last else whole + bool(rest)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return max(math.ceil(self.batches / self.accumulation), 1)

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run. Any negative max_steps means: as many as the epochs have."""
        return self.max_steps if self.max_steps >= 0 else math.ceil(self.epochs * self.per_epoch)

    @property
    def passes(self) -> float:
        """How many times the rows are passed over by the end, as Trainer's log counts its `epoch`."""
        whole, steps = divmod(self.total, self.per_epoch)
        return whole + steps * self.accumulation / max(self.batches, 1)

    @property
    def last(self) -> int:
        """Examples in the last step of a pass, which may be fewer than `examples`."""
        batches = self.batches - (self.per_epoch - 1) * self.accumulation
        # One device gets a short last batch; several get theirs filled up (see `batches`).
        missing = -self.rows % self.per_device if self.devices == 1 and not self.drop_last else 0
        return batches * self.per_device * self.devices - missing

    @property
    def warmup(self) -> int:
        """Steps of warm-up: a value of warmup_steps below 1 is a share of all steps
        (TrainingArguments.get_warmup_steps).
        """
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(self.total * self.warmup_steps)

    @property
    def warmup_said(self) -> str:
        """The arithmetic of `warmup`, e.g. `750 x 0.03 = 22.5, rounded up: 23 steps`."""
        share = 0 < self.warmup_steps < 1
        said = (
            _product(str(self.total), self.warmup_steps, self.total, self.warmup)
            if share
            else _count(self.warmup, "step")
        )
        return said + (" (the whole run)" if self.warmup >= self.total else "")

    def problems(self, recipe: Recipe) -> list[Problem]:
        """Numbers with which Trainer trains nothing, in silence or with a misleading message; 0 steps it
        makes one.
        """
        if self.max_steps == 0:
            return [
                Problem(
                    recipe.at("train", "max_steps"),
                    "0 steps",
                    "remove it (the epochs decide), or give a number above 0",
                )
            ]
        if self.batches == 0:
            found = (
                f"drop_last leaves none of the {self.rows} rows: a batch takes"
                f" {self.per_device * self.devices}"
            )
            do = "set dataloader_drop_last: false, or a smaller per_device_train_batch_size"
            return [Problem(recipe.at("train", "dataloader_drop_last"), found, do)]
        return []

    def __str__(self) -> str:
        """The arithmetic, e.g. `2 x 2 x 1 device = 4 examples a step, ceil(1000 / 4) x 3 = 750 steps`."""
        device = "device" if self.devices == 1 else "devices"
        examples = (
            f"{self.per_device} x {self.accumulation} x {self.devices} {device} ="
            f" {_count(self.examples, 'example')} a step"
        )
        if self.max_steps >= 0:
            return (
                f"{examples}, max_steps = {_count(self.total, 'step')} ({self.passes:.2f} epochs of"
                f" {self.rows:,} rows)"
            )
        steps = _product(self._per_epoch_said, self.epochs, self.per_epoch, self.total)
        rest = (
            f" (an epoch's last step has {self.last})"
            if self.last < self.examples and self.total >= self.per_epoch
            else ""
        )
        return f"{examples}, {steps}{rest}"

    @property
    def _per_epoch_said(self) -> str:
        """The shortest formula that gives `per_epoch`.

        ceil(ceil(rows / a) / b) is ceil(rows / (a x b)); the same does not hold for floor(rows / a), so
        drop_last is said in two parts.
        """
        if not self.drop_last:
            return f"ceil({self.rows} / {self.examples})"
        batches = f"floor({self.rows} / {self.per_device * self.devices})"
        return batches if self.accumulation == 1 else f"ceil({batches} / {self.accumulation})"


def _product(said: str, factor: float, number: int, rounded: int) -> str:
    """`<said> x factor = rounded steps`, with the product itself where it is not whole.

    The product is the computer's, as Trainer rounds it up: 100 x 0.07 is 7.000000000000001, and so 8 steps.
    """
    factor = int(factor) if factor == int(factor) else factor
    product = number * factor
    between = "" if product == rounded else f"{product}, rounded up: "
    return f"{said} x {factor} = {between}{_count(rounded, 'step')}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def chart(rate: Callable[[int], float], total: int, width: int = 60, height: int = 5) -> list[str]:
    """A curve of the learning rate over `total` (at least 1) steps in plain characters, the peak on its first
    line.

    A column shows the highest rate of its steps, so that a short peak is not lost between two columns (0.1 s
    for 100,000 steps).
    """
    width = min(width, total)
    edges = [i * total // width for i in range(width + 1)]
    rates = [max(map(rate, range(first, after))) for first, after in pairwise(edges)]
    peak = max(rates)
    lines = []
    for level in range(height, 0, -1):
        bar = "".join("#" if r > peak * (level - 0.5) / height else " " for r in rates).rstrip()
        lines.append(f"  {peak * level / height:8.1e} |{bar}")
    last = f"{total:>{max(width - 1, len(str(total)) + 1)}}" if total > 1 else ""
    return [*lines, f"  {'step':>8} +1{last}"]
