"""What a run writes to the disk, in bytes, and whether there is room for it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig

from lora_recipes.core import cli
from lora_recipes.core.files import free_bytes
from lora_recipes.core.record import PlanFacts
from lora_recipes.core.yamlfile import shown
from lora_recipes.memory.fits import Memory
from lora_recipes.model import build
from lora_recipes.recipe.base import Resolved

SMALL = 2**18  # bytes: run.json, plan.txt, loss.png, the card and what PEFT answered; 60 to 150 KB are usual


@dataclass(frozen=True)
class Space:
    """Bytes of the `result` and of one `checkpoint`, and how many checkpoints are `kept`."""

    result: int
    checkpoint: int
    kept: int

    @property
    def total(self) -> int:
        """All that stands at once."""
        return self.result + self.kept * self.checkpoint


def result(facts: PlanFacts, tokenizer: Any) -> int:
    """Bytes of the adapter's tensors, or of the model's where that is trained, of the tokenizer (None: of
    none), and of the small files.
    """
    width = getattr(torch, facts.model.dtype).itemsize
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = len(backend.to_str(pretty=True).encode()) if backend else 0
    return SMALL + words + (facts.adapter.bytes if facts.adapter else facts.model.total * width)


def needed(facts: PlanFacts, tokenizer: Any, memory: Memory, arguments: SFTConfig) -> Space:
    """What the run writes. A checkpoint is the weights that are trained and the optimiser's state, as the
    memory was planned; the trainer removes an old one only after it has written the next.
    """
    size = result(facts, tokenizer)
    return Space(size, size + memory.parts.get("optimiser", 0), _kept(facts, arguments))


def _kept(facts: PlanFacts, arguments: SFTConfig) -> int:
    strategy = getattr(arguments.save_strategy, "value", arguments.save_strategy)
    if strategy == "no" or facts.steps is None:
        return 0
    every = float(arguments.save_steps) if strategy == "steps" else facts.steps.per_epoch
    every = math.ceil(every * facts.steps.total) if every < 1 else every
    limit = arguments.save_total_limit
    count = math.ceil(facts.steps.total / max(every, 1))
    return min(count, limit + 1) if limit else count


def warning(facts: PlanFacts, tokenizer: Any, memory: Memory, resolved: Resolved) -> list[str]:
    """A sentence when the disk has no room for the run; else nothing."""
    arguments = build.sft_config(resolved.recipe, resolved.folder)
    space, free = needed(facts, tokenizer, memory, arguments), free_bytes(resolved.folder.path)
    if free is None or space.total <= free:
        return []
    what = "adapter" if facts.adapter else "model"
    return [
        f"the disk has {_mib(free)} free in {shown(resolved.outputs)}/, the run writes about"
        f" {_mib(space.total)}: the {what} {_mib(space.result)}, and {space.kept} checkpoints of"
        f" {_mib(space.checkpoint)} at once: free some space, name another"
        f" {cli.command(OUTPUTS='dir')}, or set train.save_total_limit"
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
