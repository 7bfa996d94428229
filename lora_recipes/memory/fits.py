"""Does it fit: predicted peak memory by part, what a card must hold beside it, and the settings that fit.
Arithmetic; imports no torch.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from lora_recipes.core.record import MemoryFacts, ProcessBytes

MIB, GIB = 2**20, 2**30
CARDS = (
    16,
    24,
    40,
    48,
    80,
)  # GB; a card of N GB is counted as N x 10^9 bytes, of which it shows at least as much


def published_runs() -> list[dict[str, str]]:
    """The published runs on a Tesla T4 that stand in vram_t4.csv beside this file (its first line says how
    they were trained). All have peak_allocated_mib, peak_reserved_mib and process_mib, in MiB.
    """
    text = Path(__file__).with_name("vram_t4.csv").read_text(encoding="ascii")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


# reserved / allocated at the peak of those runs, and what nvidia-smi shows beside the reserved memory.
_RATIOS = [float(run["peak_reserved_mib"]) / float(run["peak_allocated_mib"]) for run in published_runs()]
RESERVED_MEDIAN, RESERVED_WORST = median(_RATIOS), max(_RATIOS)
CONTEXT = 141 * MIB

# A cuBLAS handle takes 8.125 MiB (PyTorch's default, :4096:2:16:8), and the thread that runs the backward
# pass has its own.
WORKSPACE = 2 * (4096 * 2 + 16 * 8) * 1024
PARTS = ("base", "adapter", "gradients", "optimiser", "activations", "workspace")
FITS, LIKELY, NOT, UNKNOWN = "fits", "likely", "does not", "not known"


@dataclass(frozen=True)
class Memory:
    """What training is predicted to hold at its peak, in bytes by part, and what was assumed.

    `at`: in which part of a step the peak is. `unknown`: why the peak is not known; `parts` are then the
    least that is held, and no card is said to hold it. `parameters`, `trainable`: of the model that was run.
    `quantised`: what of a base in NF4 is packed, and what is not. `rehearsed`: when that was, in words.
    """

    parts: dict[str, int]
    at: str
    parameters: int
    trainable: int
    assumptions: tuple[str, ...] = ()
    unknown: str = ""
    quantised: str = ""
    rehearsed: str = field(default="", compare=False)
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated would say; at least that, where the peak is `unknown`."""
        return sum(self.parts.values())

    def process_bytes(self, ratio: float = RESERVED_MEDIAN) -> int:
        """What nvidia-smi would show: reserved memory by `ratio`, and the CUDA context."""
        return int(self.peak_bytes * ratio) + CONTEXT

    def verdict(self, card_gb: float) -> str:
        """`fits` (with the worst reserve that was seen), `likely` (with the median one) or `does not`; `not
        known` where the peak is not, and the least that is held would fit. `card_gb`: in 10^9 bytes.
        """
        room = card_gb * 10**9
        if self.unknown:
            return UNKNOWN if self.peak_bytes <= room else NOT
        if self.process_bytes(RESERVED_WORST) <= room:
            return FITS
        return LIKELY if self.process_bytes() <= room else NOT

    def facts(self) -> MemoryFacts:
        """For machines."""
        return MemoryFacts(
            peak_bytes=self.peak_bytes,
            parts=self.parts,
            at=self.at,
            method="not known" if self.unknown else "one training step on fake tensors",
            why_closed=self.unknown,
            assumptions=list(self.assumptions),
            notes=list(self.notes),
            cards_gb={str(card): self.verdict(card) for card in CARDS},
            process_bytes=ProcessBytes(median=self.process_bytes(), worst=self.process_bytes(RESERVED_WORST)),
        )

    def lines(self) -> list[tuple[str, str]]:
        """For people: (label, text) pairs."""
        parts = " + ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size)
        assumed = [("assumed", "\n".join([*self.assumptions, *self.notes]))]
        assumed += [("rehearsed", self.rehearsed)] if self.rehearsed else []
        quantised = [("quantised", self.quantised)] if self.quantised else []
        if self.unknown:
            least = f"\nat least {gib(self.peak_bytes)} GiB: {parts}" if parts else ""
            said = f"not known, and neither is what fits: {self.unknown}{least}"
            return [*quantised, ("memory", said), *assumed]
        return [
            *quantised,
            ("memory", f"peak {gib(self.peak_bytes)} GiB, at {self.at}\n{parts}"),
            *assumed,
            ("cards", verdicts(self)),
        ]


def gib(size: float) -> str:
    """Bytes as GiB, small ones with as many figures as they need."""
    value = size / GIB
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}" if value >= 0.001 else f"{value:.6f}"


def verdicts(memory: Memory) -> str:
    """The verdict for each common card, and what it counts with."""
    low, high = gib(memory.process_bytes()), gib(memory.process_bytes(RESERVED_WORST))
    cards = ", ".join(f"{card} GB {memory.verdict(card)}" for card in CARDS)
    reserve = f"reserved / allocated {RESERVED_MEDIAN:.3f} (median) to {RESERVED_WORST:.3f} (worst)"
    return f"{cards}\na process of {low} to {high} GiB: {reserve}, context 141 MiB, as on a T4"


@dataclass(frozen=True)
class Option:
    """Settings that do the same optimisation steps, as overrides of the recipe, and their predicted
    memory.
    """

    overrides: tuple[str, ...]
    batch: int
    accumulation: int
    checkpointing: bool
    quantised: bool
    memory: Memory

    @property
    def cost(self) -> tuple[float, int]:
        """For ordering, lowest first: checkpointing takes 20-30 % more time, 4 bits about 30 %, large batches
        less (not measured).
        """
        return (1.25 if self.checkpointing else 1.0) * (1.3 if self.quantised else 1.0), -self.batch


def batches(effective: int) -> list[int]:
    """The batch sizes that make `effective` examples a step by accumulation, largest first."""
    return [b for b in range(effective, 0, -1) if effective % b == 0]


def table(options: Iterable[Option], card_gb: float) -> list[str]:
    """One line an option, and a head."""
    head = (
        f"{'batch x accumulation':<22}{'checkpointing':<15}{'base':<8}{'peak GiB':>9}  {card_gb:g} GB   set"
    )
    lines = [head]
    for option in options:
        size = f"{option.batch} x {option.accumulation}"
        words = ("on" if option.checkpointing else "off"), ("nf4" if option.quantised else "as is")
        peak = (">=" if option.memory.unknown else "") + gib(option.memory.peak_bytes)
        verdict = option.memory.verdict(card_gb)
        why = f"  ({option.memory.unknown})" if option.memory.unknown else ""
        lines.append(
            f"{size:<22}{words[0]:<15}{words[1]:<8}{peak:>9}  {verdict:<8}{' '.join(option.overrides)}{why}"
        )
    return (
        lines
        if len(lines) > 1
        else [f"nothing fits {card_gb:g} GB: a shorter train.max_length, a smaller base or a larger card"]
    )


def comparison(memories: dict[str, Memory]) -> list[str]:
    """The same recipe by several methods, a line each: every part in GiB."""
    lines = [f"{'GiB':<8}" + "".join(f"{name:>12}" for name in (*PARTS, "peak")) + "  smallest card"]
    for name, memory in memories.items():
        sizes = [*(memory.parts.get(part, 0) for part in PARTS), memory.peak_bytes]
        card = next(
            (f"{c} GB {memory.verdict(c)}" for c in CARDS if memory.verdict(c) in (FITS, LIKELY)),
            f"not known, at least this: {memory.unknown}" if memory.unknown else f"none up to {CARDS[-1]} GB",
        )
        lines.append(f"{name:<8}" + "".join(f"{gib(size):>12}" for size in sizes) + f"  {card}")
    return lines
