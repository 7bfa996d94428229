"""How rows become batches: chosen where the recipe is silent, with the reason, so that little is computed for
padding and no row sees another. The rows of a step stay as many as the recipe says, and so do the steps.

Flattened (TRL's padding_free): the rows of a batch end to end, without padding, each with its own positions.
Whether a class keeps them apart is asked of its small twin (model/twin.py). By length: padded, rows of like
length together, in another order of the rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_recipes.core.record import BatchFacts
from lora_recipes.data.gate import Gate
from lora_recipes.data.labels import LabelGate
from lora_recipes.model import checkpoint, parts, twin
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.recipe.rules import PROMPTS
from lora_recipes.recipe.sections import Train

Array = np.ndarray[Any, Any]
Kind = Literal["flattened", "by length", "padded", "as given"]

# Keys of train: that say how rows become batches: a recipe with one of them is obeyed.
SAYS = (
    "packing",
    "packing_strategy",
    "eval_packing",
    "padding_free",
    "pad_to_multiple_of",
    "train_sampling_strategy",
)
# Keys of train: with which a flat row was not tried here, or is another thing.
UNTRIED = (
    "accelerator_config",
    "parallelism_config",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
)
GAIN = 0.05  # share of a step's arithmetic that another order, or another form, must save
# A multiplication in the scores of attention costs at most so many in a frozen linear layer: 1.2 to 1.8
# under sdpa, 1.5 to 1.7 under eager, measured on one core in float32, forward and backward, with a hidden
# size of 256, in batches of 512 to 2,048 tokens (eager: 1,024), padded and flat.
SCORES = 2.0
ATTENTIONS = ("sdpa", "eager")  # under which a twin is asked
WIDEST = 4096  # tokens of a flat row under sdpa: a mask of 16 MiB
MOST = 100_000  # rows that padding is counted over; more say the same


@dataclass(frozen=True)
class Batching:
    """How the rows of a run become batches, and `why`. `padding`: the share of the computed tokens that is
    padding, 0 to 1, and `before`: what it is without the choice; None where it is not counted.
    """

    kind: Kind
    why: str
    padding: float | None = None
    before: float | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of SFTConfig that make it so. TRL takes no max_length beside padding_free; the rows are
        cut already.
        """
        if self.kind == "flattened":
            return {"padding_free": True, "max_length": None}
        return {"train_sampling_strategy": "group_by_length"} if self.kind == "by length" else {}

    @property
    def resumed(self) -> str | None:
        """What a resumed run must choose again; None where nothing was chosen."""
        return self.kind if self.fields else None

    def facts(self, tokens: int | None, steps: int) -> BatchFacts:
        """For run.json. `tokens` of an epoch of `steps`."""
        each = tokens / steps if tokens is not None else None
        return BatchFacts(
            kind=self.kind, why=self.why, padding=self.padding, before=self.before, tokens_per_step=each
        )


AS_GIVEN = Batching("as given", "nothing was chosen")


def said(facts: BatchFacts) -> str:
    """`facts` in words, for a plan."""
    key = {"flattened": " (train.padding_free)", "by length": " (group_by_length)"}.get(facts.kind, "")
    text = f"{facts.kind}{key}: {facts.why}"
    if facts.padding is not None:
        was = f", without that {facts.before:.1%}" if facts.before not in (None, facts.padding) else ""
        text += f"\npadding {facts.padding:.1%} of what is computed{was}"
    if facts.tokens_per_step is not None:
        text += f"; {facts.tokens_per_step:,.0f} tokens a step in the mean"
    same = {
        "flattened": "; steps, and the rows of each, are as without",
        "by length": "; as many steps and rows",
    }
    return text + same.get(facts.kind, "")


class ByLength(LengthGroupedSampler):
    """transformers' sampler, with an order that `seed` and the epoch decide. Its own takes what the global
    generator has come to: another in a resumed run, and in each of several processes.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer says it before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The rows of a pass, by their places."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def sampler(lengths: Array, train: Any) -> ByLength:
    """The order by length of rows of `lengths` tokens. `train`: TrainingArguments, or a recipe's section."""
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return ByLength(rows, lengths.tolist(), train.seed if train.data_seed is None else train.data_seed)


def row_lengths(dataset: Any) -> Array:
    """Tokens of each row of a prepared data set."""
    batches = (batch["input_ids"].combine_chunks() for batch in dataset.with_format("arrow").iter(1000))
    return np.concatenate([batch.value_lengths().to_numpy() for batch in batches])


def chosen(resolved: Resolved, gate: Gate | None) -> Batching:
    """The choice for the rows of `gate`. It costs a question to the twin of the base, which a process asks
    once.
    """
    recipe, train = resolved.recipe, resolved.recipe.train
    if recipe.classify or isinstance(gate, LabelGate):
        return Batching("as given", "task: classify: batches by length may be batches by class")
    if says := [key for key in SAYS if key in train.given]:
        return Batching("as given", f"the recipe says train.{says[0]}", *_given(train, gate))
    if recipe.data.batching == "as_given":
        return Batching("as given", "the recipe says data.batching: as_given", *_given(train, gate))
    if gate is None or gate.counts.tokens is None:
        return Batching("as given", "the tokens are not counted (training counts them, and chooses)")
    lengths = _trained(gate)
    padded = _Batches.of(lengths, _random(lengths, train), train)
    if padded.padding < GAIN:
        return Batching("padded", "there is little padding", padded.padding, padded.padding)
    config = checkpoint.planned(resolved.base).config
    model = parts.build(config, getattr(torch, recipe.model.dtype))
    against = _not_flat(model, recipe, lengths, padded)
    if not against:
        attention = recipe.model.attn_implementation or _own(model)
        how = "is told where a row ends" if "flash" in attention else "asked of a small twin of it"
        why = f"{type(model).__name__} under {attention} keeps rows apart ({how})"
        return Batching("flattened", why, 0.0, padded.padding)
    grouped = _Batches.of(lengths, np.fromiter(sampler(lengths, train), int), train)
    if grouped.padding < padded.padding - GAIN:
        return Batching("by length", f"not flattened: {against}", grouped.padding, padded.padding)
    return Batching("padded", f"not flattened: {against}", padded.padding, padded.padding)


def _own(model: PreTrainedModel) -> str:
    return str(parts.decoder(model).config._attn_implementation)


def _trained(gate: Gate) -> Array:
    """Tokens of the rows that train."""
    return gate.train.lengths[gate.train.dropped == 0][:MOST]


def _random(lengths: Array, train: Train) -> Array:
    return torch.randperm(len(lengths), generator=torch.Generator().manual_seed(train.seed)).numpy()


@dataclass(frozen=True)
class _Batches:
    """Of each batch of an epoch: how many `rows`, the `longest` of them and the `tokens` of all."""

    rows: Array
    longest: Array
    tokens: Array

    @classmethod
    def of(cls, lengths: Array, order: Array, train: Train) -> "_Batches":
        size = train.per_device_train_batch_size
        filled = np.zeros(-(-len(order) // size) * size, dtype=np.int64)
        filled[: len(order)] = lengths[order]
        table = filled.reshape(-1, size)
        return cls((table > 0).sum(1), table.max(1), table.sum(1))

    @property
    def padding(self) -> float:
        """Share of the computed tokens that is padding."""
        return float(1 - self.tokens.sum() / max((self.rows * self.longest).sum(), 1))


def _given(train: Train, gate: Gate | None) -> tuple[float | None, float | None]:
    """The padding where the recipe decides."""
    if gate is None or gate.counts.tokens is None or train.train_sampling_strategy == "batch_rebalance":
        return None, None
    if train.padding_free or train.packing:
        return 0.0, None
    if train.pad_to_multiple_of not in (None, "auto"):
        return None, None
    lengths = _trained(gate)
    orders = {
        "sequential": lambda: np.arange(len(lengths)),
        "group_by_length": lambda: np.fromiter(sampler(lengths, train), int),
    }
    order = orders.get(train.train_sampling_strategy, lambda: _random(lengths, train))()
    return _Batches.of(lengths, order, train).padding, None


def _not_flat(model: PreTrainedModel, recipe: Recipe, lengths: Array, padded: _Batches) -> str:
    """Why rows are not laid end to end; empty where they are."""
    train, asked = recipe.train, recipe.model.attn_implementation
    if recipe.peft and recipe.peft.peft_type in PROMPTS:
        return "virtual tokens would stand once before a flat row, not before each text in it"
    if train.neftune_noise_alpha:
        return "NEFTune's noise would be divided by the length of the flat row"
    if untried := [key for key in UNTRIED if train.given.get(key)]:
        return f"it was not tried with train.{untried[0]}"
    if asked and asked not in ATTENTIONS and "flash" not in asked:
        return f"it was not tried under {asked}"
    wrong = twin.packed(model, asked)
    if wrong is None:
        return f"no small twin of {type(model).__name__} runs here to ask"
    if wrong:
        return f"{type(model).__name__} does not keep rows apart: {wrong}"
    flash = "flash" in (asked or "") and model._supports_flash_attn
    return "" if flash else _dear(model, asked or _own(model), lengths, padded, train)


def _dear(model: PreTrainedModel, attention: str, lengths: Array, padded: _Batches, train: Train) -> str:
    """Why the scores of a flat row, each token by each, cost more than the padding that it saves."""
    config: Any = parts.decoder(model).config
    heads = getattr(config, "num_attention_heads", 1)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = [m for m in parts.decoder(model).modules() if isinstance(m, nn.Linear | Conv1D)]
    linear = sum(m.weight.numel() for m in layers)  # not the head, which takes labelled positions: lm_head.py
    scores = SCORES * 2 * width * getattr(config, "num_hidden_layers", 1)
    before = linear * (padded.rows * padded.longest).sum() + scores * (padded.rows * padded.longest**2).sum()
    flat = linear * padded.tokens.sum() + scores * (padded.tokens**2).sum()
    if flat > (1 - GAIN) * before:
        return f"its scores would cost more than the padding does (by arithmetic {flat / before:.2f} times)"
    longest = np.sort(lengths)[::-1][: train.per_device_train_batch_size]
    total, most = int(longest.sum()), int(longest[0])
    if attention != "sdpa" and total**2 > len(longest) * most**2:
        return f"{attention} holds whole score matrices: {total:,} x {total:,} of the longest rows"
    if total > WIDEST:
        return f"the longest batch would be a row of {total:,} tokens, with a mask of each by each"
    return ""
