"""How many steps, and at which learning rate: the arithmetic of transformers.Trainer, said aloud."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run over `rows` rows (after packing), as Trainer.set_initial_training_values counts them."""

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
    def per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        share = self.rows / (self.per_device * self.devices)
        batches = math.floor(share) if self.drop_last else math.ceil(share)
        return max(math.ceil(batches / self.accumulation), 1)

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.per_epoch)

    @property
    def warmup(self) -> int:
        """Steps of warm-up: a value of warmup_steps below 1 is a share of all steps."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(self.total * self.warmup_steps)

    def __str__(self) -> str:
        device = "device" if self.devices == 1 else "devices"
        examples = f"{self.per_device} x {self.accumulation} x {self.devices} {device} = {self.examples} examples a step"
        rounded = "floor" if self.drop_last else "ceil"
        if self.max_steps > 0:
            return f"{examples}, max_steps = {self.total} steps ({self.total * self.examples / self.rows:.2f} epochs of {self.rows:,} rows)"
        epoch = f"{rounded}({self.rows} / {self.examples})"
        return f"{examples}, {epoch} x {self.epochs:g} = {self.total} steps"


def chart(rate: Callable[[int], float], total: int, width: int = 60, height: int = 5) -> list[str]:
    """A curve of the learning rate over `total` steps in plain characters, the peak on its first line."""
    width = min(width, total)
    rates = [rate(round(i * (total - 1) / max(width - 1, 1))) for i in range(width)]
    peak = max(rates) or 1.0
    lines = []
    for level in range(height, 0, -1):
        bar = "".join("#" if r > peak * (level - 0.5) / height else " " for r in rates).rstrip()
        lines.append(f"  {peak * level / height:8.1e} |{bar}")
    return [*lines, f"  {'step':>8} +{'1':<{width - len(str(total))}}{total}"]
