"""Memory while training runs: what was measured beside what was planned, and what to do when it did not
suffice.
"""

import resource
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem
from lora_recipes.core.record import MemoryUse
from lora_recipes.data.gate import Gate
from lora_recipes.memory import choices
from lora_recipes.memory.fits import GIB, Memory, gib
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.layout import DDP, ONE, Layout
from lora_recipes.recipe.recipe import Recipe

SAID = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA, and of the CPU's allocator

# A run is refused where its planned peak is that many times what the device has. The plan's worst error is
# 1.37 % (docs/memory.md), and a process holds more than its tensors: what is refused would not fit.
BEYOND = 1.1
CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit, beyond which the kernel kills


@dataclass(frozen=True)
class Usage:
    """Bytes at their peak: what PyTorch had `allocated` and `reserved` on a GPU; `rss` of the process, and
    `before` training began.
    """

    rss: int
    before: int
    allocated: int | None = None
    reserved: int | None = None

    def facts(self, planned: Memory) -> MemoryUse:
        """For run.json."""
        return MemoryUse(
            max_rss_bytes=self.rss,
            rss_before_bytes=self.before,
            planned_peak_bytes=planned.peak_bytes,
            max_allocated_bytes=self.allocated,
            max_reserved_bytes=self.reserved,
        )

    def line(self, planned: Memory) -> str:
        """Planned against measured. RSS holds the libraries and PyTorch's caches too, so that it is no
        measure of the plan.
        """
        said = f"{'at least ' * bool(planned.unknown)}{gib(planned.peak_bytes)} GiB"
        if self.allocated is None or self.reserved is None:
            grown = (
                f"the process grew from {gib(self.before)} to {gib(self.rss)} GiB of RSS, libraries and"
                " caches included"
            )
            return f"peak memory: {said} of tensors planned; {grown}"
        apart = 100 * (planned.peak_bytes / self.allocated - 1)
        real = f"{gib(self.allocated)} allocated ({apart:+.1f} %), {gib(self.reserved)} reserved"
        return f"peak memory: {said} planned, {real}"


def now() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def measured(before: int) -> Usage:
    """The peaks so far; `before` is what `now` said as training began."""
    rss = max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, before
    )  # the kernel counts the peak in batches, a little late
    if not torch.cuda.is_available():
        return Usage(rss, before)
    return Usage(rss, before, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def out_of_memory(
    error: Exception, resolved: Resolved, gate: Gate, planned: Memory, step: int
) -> Problem | None:
    """What an out-of-memory error means: when, planned against available, and the first settings that would
    fit. None for other errors.
    """
    if not (
        isinstance(error, torch.OutOfMemoryError | MemoryError | RuntimeError)
        and any(word in str(error) for word in SAID)
    ):
        return None
    room, device = _room(resolved.recipe, psutil.virtual_memory().available)
    found = (
        f"out of memory at step {step + 1}: {gib(planned.peak_bytes)} GiB planned, {room / GIB:.1f} GiB on"
        f" {device}"
    )
    fitting = [o for o in choices.fit(resolved, room / 10**9, gate) if not o.memory.unknown][:3]
    do = (
        "no batch, checkpointing or NF4 makes it fit: a shorter train.max_length, a smaller base or a larger"
        " device"
    )
    settings = [
        f"{cli.command(SET=list(o.overrides))} ({gib(o.memory.peak_bytes)} GiB)"
        for o in fitting
        if o.overrides
    ]
    if settings:
        do = "with the same examples a step would fit: " + "; ".join(settings)
    elif fitting:
        do = "by the plan it fits as it is: is something else using the device?"
    return Problem(resolved.recipe.at("train"), found, do)


def _room(recipe: Recipe, free: int) -> tuple[int, str]:
    """The bytes of the device that trains, and its name; of a CPU `free`, within what this process may
    have.
    """
    if torch.cuda.is_available() and not recipe.train.use_cpu:
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]  # ulimit -v; -1 where there is none
    if CGROUP.is_file() and (said := CGROUP.read_text(encoding="ascii").strip()).isdigit():  # or "max"
        limits.append(int(said))
    return min([free, *(limit for limit in limits if limit > 0)]), "this machine"


def beyond(planned: Memory, resolved: Resolved, gate: Gate, layout: Layout) -> list[Problem]:
    """Is the planned peak clearly more than the device has? Before anything is loaded: later the kernel would
    end the process, without a word.

    Only what was planned by a step on fake tensors, with nothing that the plan leaves out, on whole weights:
    the errors of the rest are not known. On a CPU swap counts as memory.
    """
    unplanned = planned.unknown or any(line.startswith("not planned:") for line in planned.assumptions)
    swapping = psutil.virtual_memory().total + psutil.swap_memory().total
    room, device = _room(resolved.recipe, swapping)
    if unplanned or layout.kind not in (ONE, DDP) or planned.peak_bytes <= BEYOND * room:
        return []
    recipe, evaluates = resolved.recipe, "evaluation" in planned.at
    rows = gate.evaluation if evaluates else gate.train
    longest = int(rows.lengths.argmax())
    found = (
        f"{gib(planned.peak_bytes)} GiB are planned, at {planned.at}; {device} has {gib(room)} GiB; the"
        f" longest row is {rows.where(longest)} with {rows.length[longest]:,} tokens, train.max_length is"
        f" {recipe.train.max_length if recipe.train.max_length is not None else 'null'}"
    )
    size = "train.per_device_eval_batch_size" if evaluates else "train.per_device_train_batch_size"
    ways = "train.gradient_checkpointing=true or model.quantize=nf4"
    do = (
        f"a smaller train.max_length or {size}, {ways}"
        f" ({cli.command('plan', RECIPE=recipe.name, FIT=f'{room / 10**9:.0f}')} lists what fits);"
        f" {cli.command(OVERSIZED=True)} trains all the same"
    )
    return [Problem(recipe.at("train", "max_length"), found, do)]
