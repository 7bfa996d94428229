"""Peak memory before anything is loaded: a recipe's own training step on fake tensors, in a process of its
own with a time limit.
"""

import contextlib
import importlib.util
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PromptEncoderConfig, PromptTuningConfig
from transformers import PreTrainedConfig
from trl import pack_dataset

from lora_recipes.data import new_tokens
from lora_recipes.data.gate import Gate
from lora_recipes.data.labels import LabelGate, Texts
from lora_recipes.data.render import IGNORED
from lora_recipes.data.rows import Rows
from lora_recipes.memory import blocks, fake, fits, kept, kernels, rehearsal
from lora_recipes.memory.fits import Memory
from lora_recipes.memory.rehearsal import Batch, Setup
from lora_recipes.memory.storages import Stretch
from lora_recipes.model import batching, build, checkpoint, experts, initialise, parts, peft_callbacks
from lora_recipes.recipe.base import Resolved

SECONDS = 60.0  # of processor time, for one recipe; a 4B takes a few
PATIENCE = 10  # times as long by the clock, for a busy machine
PLACES = {
    "embedding": "the embedding",
    "forward": "the forward pass of a layer",
    "head": "the loss",
    "backward head": "the backward pass of the loss",
    "backward": "the backward pass of a layer",
    "clip": "gradient clipping",
    "optimizer": "the optimiser's step",
    "evaluation": "an evaluation pass",
    "evaluation head": "the loss of an evaluation pass",
}


def plan(resolved: Resolved, gate: Gate | None = None, seconds: float = SECONDS, cuda: bool = True) -> Memory:
    """The predicted peak of training a recipe on one GPU, or (`cuda` false) as it runs on the CPU.

    `gate`: the data as it will be trained, for the lengths of its rows; without it, or where its tokens are
    not counted, each row is taken to be train.max_length long. `seconds`: the limit in processor time, after
    which the peak is not known, and why is said.
    """
    setup = of_recipe(resolved, gate, cuda)
    with Rehearsals([setup], seconds) as rehearsals:
        return rehearsals[0]


def of_recipe(resolved: Resolved, gate: Gate | None = None, cuda: bool = True) -> Setup:
    """What decides the memory of a recipe, through the same functions that training builds with."""
    recipe = resolved.recipe
    config = checkpoint.planned(resolved.base).config
    arguments = build.sft_config(recipe, resolved.folder, batching.chosen(resolved, gate))
    text = config.get_text_config()
    adapter = build.peft_config(recipe)
    attention = recipe.model.attn_implementation
    masked = attention in (None, "sdpa", "eager")  # FlashAttention takes lengths instead of a mask
    counted = gate is not None and gate.counts.tokens is not None
    train, held_out = (gate.train, gate.evaluation) if gate else (None, None)
    size = arguments.per_device_train_batch_size
    virtual = isinstance(adapter, PromptTuningConfig | PromptEncoderConfig)
    flat = arguments.padding_free
    batch = _batch(train, counted, size, arguments.packing, flat, text, arguments, virtual)
    evaluation = None
    if (
        held_out is not None
        and len(held_out)
        and str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no"
    ):
        packing = arguments.packing if arguments.eval_packing is None else arguments.eval_packing
        size = arguments.per_device_eval_batch_size
        evaluation = _batch(held_out, counted, size, packing, False, text, arguments, virtual)
    if not masked:
        batch = replace(batch, padded=False, packed=False)
        evaluation = evaluation and replace(evaluation, padded=False, packed=False)
    return Setup(
        config,
        getattr(torch, recipe.model.dtype),
        arguments,
        batch,
        adapter and build.shapes(adapter),
        getattr(torch, recipe.model.adapter_dtype),
        build.nf4(recipe.model.dtype) if recipe.model.quantize == "nf4" else None,
        attention,
        frozenset(p for p in kernels.used(fake.modeling_of(config)) if importlib.util.find_spec(p)),
        cuda,
        evaluation,
        freeze=recipe.freeze,
        new_tokens=tuple(new_tokens.ids(gate.tokenizer if gate else None, recipe, text.vocab_size)),
        copies=initialise.copies(recipe) + peft_callbacks.copies(recipe),
        head=(tuple(gate.names), recipe.classify.pooling)
        if isinstance(gate, LabelGate) and recipe.classify
        else None,
    )


def _batch(
    examples: Rows | Texts | None,
    counted: bool,
    rows: int,
    packing: bool,
    flat: bool,
    config: PreTrainedConfig,
    arguments: Any,
    virtual: bool,
) -> Batch:
    """The largest batch: the longest rows, padded to the longest; packed or padding-free rows laid end to
    end. `virtual`: tokens of a prompt that is trained stand before each row.
    """
    free = flat or (packing and arguments.packing_strategy in ("bfd", "bfd_split"))
    if examples is None or not counted:
        rows = min(rows, len(examples)) if examples is not None and not packing else rows
        width = arguments.max_length or config.max_position_embeddings
        return (
            Batch(1, rows * width, rows * width - 1, packed=True)
            if free
            else Batch(rows, width, rows * (width - 1 + virtual), padded=rows > 1)
        )
    if isinstance(examples, Texts):
        wide = np.sort(examples.lengths)[::-1][:rows]
        differ = len(wide) > 1 and bool(examples.lengths.min() < wide[0])
        return Batch(len(wide), int(wide[0]), len(wide), padded=differ)
    data: Any = examples.dataset
    if packing:
        data = pack_dataset(data, arguments.max_length, arguments.packing_strategy)
    lengths, losses = _shapes(data, virtual)
    longest = np.sort(lengths)[::-1][:rows]
    supervised = int(np.sort(losses)[::-1][:rows].sum())
    if free:
        several = "seq_lengths" in data.column_names and any(len(s) > 1 for s in data["seq_lengths"])
        return Batch(1, int(longest.sum()), supervised, packed=len(longest) > 1 or several)
    padded = len(longest) > 1 and bool(lengths.min() < longest[0])
    return Batch(len(longest), int(longest[0]), supervised, padded=padded)


def _shapes(data: Any, virtual: bool) -> tuple[Any, Any]:
    """Of each row of a prepared data set its tokens, and how many of its labels have a loss: all but the
    first of each text in it, which nothing stands before unless it is `virtual`.
    """
    lengths, losses = [], []
    packed = "seq_lengths" in data.column_names
    for batch in data.with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks()
        widths = labels.value_lengths().to_numpy()
        texts = batch["seq_lengths"].combine_chunks().flatten().to_numpy() if packed else widths[widths > 0]
        supervised = labels.flatten().to_numpy() != IGNORED
        if not virtual:
            supervised[np.cumsum(texts) - texts] = False
        ends, sums = np.cumsum(widths), np.concatenate([[0], np.cumsum(supervised)])
        lengths.append(widths)
        losses.append(sums[ends] - sums[ends - widths])
    return np.concatenate(lengths), np.concatenate(losses)


class Rehearsals:
    """A process of its own that rehearses setups one after another: what goes wrong there, or takes too long,
    ends there. What was rehearsed before is taken as it was found then.
    """

    def __init__(self, setups: Sequence[Setup], seconds: float):
        self.setups, self.seconds = list(setups), seconds
        self.process: Any = None

    def __enter__(self) -> "Rehearsals":
        """The process starts with the first question."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None

    def __getitem__(self, index: int) -> Memory:
        """The memory of the setup `index`; where it cannot be rehearsed the least that it needs."""
        return kept.of(self.setups[index], lambda: self._rehearsed(index))

    def _rehearsed(self, index: int) -> Memory:
        if self.process is None:
            self._start()
        began, found = time.monotonic(), f"no answer within {self.seconds:g} s"
        try:
            self.pipe.send(index)
            if self.pipe.poll(self.seconds * PATIENCE):
                found = self.pipe.recv()
            else:
                self.__exit__()
        except (EOFError, OSError):  # killed: at its limit, or by the system
            self.__exit__()
        memory = least(self.setups[index], found) if isinstance(found, str) else found
        return replace(memory, rehearsed=f"in {time.monotonic() - began:.1f} s")

    def _start(self) -> None:
        # A forked process has all modules already, which takes seconds to import; with CUDA begun it could
        # not ask about devices.
        fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self.setups, self.seconds), daemon=True)
        self.process.start()
        other.close()


def _work(pipe: Any, setups: list[Setup], seconds: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            index = pipe.recv()
            used, limit = time.process_time(), resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds), limit))
            try:
                pipe.send(rehearsed(setups[index]))
            except Exception as error:  # whatever a library raises on fake tensors; the plan says it
                pipe.send(
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
                )


def rehearsed(setup: Setup) -> Memory:
    """The memory of `setup`, in this process: from a few of the blocks, or, where those cannot stand alone,
    from all of them.
    """
    whole = rehearsal.whole(setup)
    peaks, paged = _peaks(setup, whole)
    stretch = max(peaks, key=lambda s: sum(peaks[s].values()))
    held = {name: peaks[stretch].get(name, 0) for name in fits.PARTS}
    held["workspace"] = fits.WORKSPACE if setup.cuda else 0
    notes = (
        (f"paged: {fits.gib(paged)} GiB of optimiser state in paged memory, not in the peak",)
        if paged
        else ()
    )
    assumed = tuple(assumptions(setup, whole))
    return Memory(
        held, PLACES[stretch[0]], *whole.parameters, assumed, notes=notes, quantised=rehearsal.unpacked(whole)
    )


def _peaks(setup: Setup, whole: rehearsal.Whole) -> tuple[dict[Stretch, blocks.Parts], int]:
    """The peak of each stretch by part, and the bytes in paged memory."""
    if whole.blocks is not None and (few := blocks.few(whole.kinds)):
        try:
            return _of_few(setup, whole, few)
        except Exception:  # a library's, for a block that needs its neighbours; all of them have those
            pass
    run = rehearsal.run(setup, whole)
    return {stretch: peak.parts for stretch, peak in run.peaks.items()}, run.paged


def _of_few(setup: Setup, whole: rehearsal.Whole, few: blocks.Few) -> tuple[dict[Stretch, blocks.Parts], int]:
    """The same, from a few blocks. LookupError where their parameters do not make up the whole model's."""
    first = rehearsal.run(setup, whole, few.first)
    more = {kind: rehearsal.run(setup, whole, chosen) for kind, chosen in few.more.items()}

    def counted(of: str) -> int:
        return blocks.counted(few, getattr(first, of), {kind: getattr(r, of) for kind, r in more.items()})

    if (counted("parameters"), counted("trainable")) != whole.parameters:
        raise LookupError(f"blocks of one kind differ: {counted('parameters'):,} parameters")
    peaks = blocks.extended(few, first.peaks, {kind: run.peaks for kind, run in more.items()})
    return peaks, counted("paged")


def least(setup: Setup, why: str) -> Memory:
    """What is held whatever a step does, for one that could not be run: weights, adapter, gradients. By
    shapes alone. `why` says why it could not.
    """
    try:
        whole = rehearsal.whole(setup)
    except Exception as error:  # whatever a library raises
        why = f"{why}; {type(error).__name__}: {error}"
        return Memory(dict.fromkeys(fits.PARTS, 0), "", 0, 0, unknown=why)
    model, packed = whole.model, {id(m.weight) for m in whole.model.modules() if fake.in_4bit(m)}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(
        p.numel() * rehearsal.NF4_BITS / 8 if id(p) in packed else p.nbytes
        for p in model.parameters()
        if not p.requires_grad
    )
    held = dict.fromkeys(fits.PARTS, 0)
    held |= {"base": int(frozen) + sum(b.nbytes for b in model.buffers()), "gradients": trained}
    held["adapter" if setup.peft_config else "base"] += trained
    assumed, left = tuple(assumptions(setup, whole)), rehearsal.unpacked(whole)
    return Memory(held, "", *whole.parameters, assumed, unknown=why, quantised=left)


def assumptions(setup: Setup, whole: rehearsal.Whole) -> Iterator[str]:
    """What the prediction takes for granted, a line each."""
    arguments, batch = setup.arguments, setup.batch
    shape = (
        "one row of sequences end to end"
        if batch.packed
        else "padded"
        if batch.padded
        else "all of one length"
    )
    trained = f", {batch.supervised:,} of them supervised" if setup.head is None else ""
    yield f"batch: {batch.rows} x {batch.width:,} tokens ({shape}){trained}"
    kernel = (
        "FlashAttention's kernel"
        if not (batch.packed or batch.padded)
        else "with a mask, so not FlashAttention's kernel"
    )
    attention, _ = build.attention(whole.base, setup.attention)
    if attention != "none":
        scores = ", whole score matrices" if attention == "eager" else f", {kernel}"
        yield f"attention: {attention}{scores}"
    if any(layer.chosen for layer in experts.routed(whole.base)):
        how = parts.decoder(whole.base).config._experts_implementation
        least = " (on a GPU compute capability 8.0 or more)" if setup.cuda and how == "grouped_mm" else ""
        yield f"experts: {how}{least}; each token's copy for each of its experts, whichever those are"
    if setup.head is None:
        yield "loss: TRL's fused head, tiles of 4,096 tokens x 32,768 words; no logits are built"
    for package in kernels.used(fake.modeling_of(setup.config)):
        name = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}[package]
        yield f"linear attention: {name}" + (
            " (by its source)" if package in setup.fast else " is not installed: the torch fallback"
        )
    if setup.peft_config:
        quantised = (
            " (TRL's bfloat16 would lose small updates), base: NF4, double quantisation"
            if setup.quantize
            else ""
        )
        more = quantised if setup.adapter == torch.float32 else ""
        yield f"adapter: {str(setup.adapter).removeprefix('torch.')}{more}"
    yield f"checkpointing: {'on' if arguments.gradient_checkpointing else 'off'}"
    yield f"optimiser: {getattr(arguments.optim, 'value', arguments.optim)}; gradients accumulated in place"
    for field in ("activation_offloading", "use_liger_kernel", "torch_compile", "deepspeed", "fsdp"):
        if getattr(arguments, field, None):
            yield f"not planned: train.{field}"
