"""The merged model in fewer bits, and what that lost: `make export RECIPE=x FORMAT=w8a8`.

The figures are of the export as a server loads it: vLLM starts on the folder and is asked the held-out rows;
the merged model, asked the same by transformers in float32, is the other side. What no server here can load
is kept, and said to be not loaded: nothing of it is verified.
"""

import contextlib
import math
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lora_recipes.core import cli, files, interval, lock, provenance
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.record import Exported, Loss, Lost
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import read
from lora_recipes.data.render import IGNORED
from lora_recipes.evaluation import evaluate
from lora_recipes.model import attach, quantise
from lora_recipes.model.quantise import Job, Layers
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import command, live, server
from lora_recipes.serving.endpoint import Endpoint

COUNT = 20  # likeliest tokens that are compared one by one; as many as vLLM says unless told otherwise
NOT_LOADED = 1  # exit code

Example = tuple[list[int], list[int]]  # tokens and labels of a row


@dataclass(frozen=True)
class Row:
    """What a row came to on both sides: summed losses of its `tokens` trained tokens (nats); over its
    `predicted` tokens the summed KL (nats), and how often the likeliest is the `same`.
    """

    merged: float
    exported: float
    tokens: int
    kl: float
    same: int
    predicted: int


def export(
    name: str, outputs: Path, chosen: str, overrides: Sequence[str] = (), force: bool = False
) -> tuple[Exported, str]:
    """Write outputs/<name>/exports/<chosen>/ and measure it; returns its record and what to print.

    `overrides`: data.eval=, data.kept= only. RecipeError where it cannot be made; then nothing is left.
    """
    run = RunFolder(outputs / recipes.run_of(name, outputs))
    job = quantise.job(run, chosen, force)
    kept = "nothing was written; what stood there is as it was"
    with (
        files.writing(job.target.parent, "while exporting", lambda: kept),
        lock.runs([job.source], "exports"),
    ):
        return _export(job, overrides)


def _export(job: Job, overrides: Sequence[str]) -> tuple[Exported, str]:
    asked = evaluate.recipe(job.run, job.run.path.name, overrides)
    if not (sets := evaluate.sets_of(asked)):
        do = f"name held-out rows: {cli.command(SET='data.eval=data/x/eval.jsonl')}"
        raise RecipeError(Problem(asked.at("data"), "no rows to measure on: no data.eval, no data.kept", do))
    which, split = next(iter(sets.items()))
    tokenizer = AutoTokenizer.from_pretrained(job.source, trust_remote_code=False)
    examples, _ = evaluate.made(split, tokenizer, resolve(asked, job.run.path.parent))
    if not any(label != IGNORED for _, labels in examples for label in labels[1:]):
        do = "look at train.max_length and the rows"
        raise RecipeError(Problem(asked.at("data", which), "no token of these rows is in the loss", do))
    layers = quantise.layers(job)
    temporary = job.target.with_name(f".{job.target.name}.{os.getpid()}.tmp")
    for left in [*job.target.parent.glob(f".{job.target.name}.*.tmp")]:
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        quantise.write(job, layers, temporary)
        found = _written(job, layers, temporary)
        try:
            served, by = _served(job, temporary, [ids for ids, _ in examples])
        except RecipeError as error:
            found = replace(found, not_loaded=error.problems[0].found)
        else:
            found = replace(found, lost=_lost(job, examples, served, by, split))
        files.replace_folder(temporary, job.target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # others stand there, or it was never made
            job.target.parent.rmdir()
    record = job.run.outcome()
    job.run.write_record(replace(record, exports=(record.exports or {}) | {job.name: found}))
    return found, report(job, found)


def _written(job: Job, layers: Layers, folder: Path) -> Exported:
    return Exported(
        at=files.now(),
        source=shown(job.source),
        by=f"compressed-tensors {_version('compressed_tensors')}",
        layers=len(layers.quantised),
        group_size=layers.group_size,
        bytes=_size(folder),
        merged_bytes=_size(job.source),
    )


def _version(package: str) -> str:
    """Of a package in the serving environment."""
    found = next(command.ENVIRONMENT.glob(f"lib/python*/site-packages/{package}-*.dist-info"))
    return found.name.removesuffix(".dist-info").rpartition("-")[2]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _served(job: Job, folder: Path, rows: list[list[int]]) -> tuple[list[list[dict[int, float]]], str]:
    """What vLLM answers when it has loaded `folder`: the log-probabilities of each row, and what answered.
    RecipeError where it does not load, or not answer.
    """
    build = command.vllm()
    assert build
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    longest = max(len(ids) for ids in rows) + 1
    extra = ["--max-model-len", str(longest), "--enable-scale-out"]  # the latter has what `likeliest` asks
    options = command.Options(port=port, extra=extra, outputs=job.run.path)
    ready = command.prepare({job.run.path.name: folder}, None, options, build)
    log = job.run.path.parent.absolute() / "_serve" / f"{port}.log"
    print(f"starting vLLM {build[1]} on it; what it says goes to {shown(log)}", flush=True)
    with server.running(ready, options, log):
        endpoint, known = Endpoint(options.url, timeout=server.START), provenance.read(folder)
        answers = [endpoint.likeliest(ready.base_name, ids, COUNT) for ids in rows]
        if known and known.probes:
            proof = live.prove(endpoint, ready.base_name, {ready.base_name: known})[0]
            replace(known, apart=proof.apart or 0.0).save(folder)
    dtype = ready.command[ready.command.index("--dtype") + 1]
    return answers, f"{build[0]} {build[1]} in {dtype}"


def _lost(
    job: Job, examples: list[Example], served: list[list[dict[int, float]]], by: str, split: read.Split
) -> Lost:
    quantise.room(job.source, 5, "asking the merged model in float32")
    model = attach.plain(job.source, torch.float32)
    rows = [_row(model, ids, labels, said) for (ids, labels), said in zip(examples, served, strict=True)]
    tokens, predicted = sum(row.tokens for row in rows), sum(row.predicted for row in rows)
    changes = [row.exported - row.merged for row in rows]
    means = [math.fsum(getattr(row, side) for row in rows) / tokens for side in ("merged", "exported")]
    merged, exported = (Loss(loss=mean, perplexity=math.exp(min(mean, 700.0))) for mean in means)
    return Lost(
        server=by,
        rows=len(rows),
        sha256=split.sha256,
        tokens=tokens,
        merged=merged,
        exported=exported,
        half=interval.per_unit(changes, [row.tokens for row in rows]).half,
        predicted=predicted,
        kl=math.fsum(row.kl for row in rows) / predicted,
        same=sum(row.same for row in rows) / predicted,
    )


@torch.no_grad()
def _row(model: Any, ids: list[int], labels: list[int], said: list[dict[int, float]]) -> Row:
    """One row: the answers of the merged `model` against what the server `said`."""
    given = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
    trained = [i for i, label in enumerate(labels[1:]) if label != IGNORED]
    pairs = list(zip(given, said, strict=True))
    return Row(
        merged=-math.fsum(given[i, ids[i + 1]].item() for i in trained),
        exported=-math.fsum(said[i][ids[i + 1]] for i in trained),
        tokens=len(trained),
        kl=math.fsum(_kl(p, q) for p, q in pairs),
        same=sum(max(q, key=q.__getitem__) == int(p.argmax()) for p, q in pairs),
        predicted=len(pairs),
    )


def _kl(given: torch.Tensor, said: dict[int, float]) -> float:
    """KL (nats) of what was `said` of some tokens, and of all others as one, from the log-probabilities
    `given` [vocabulary]. Taking tokens together only makes it smaller (Cover and Thomas, Elements of
    Information Theory, 2006, theorem 2.7.1).
    """
    known = [(given[token].item(), logprob) for token, logprob in said.items()]
    rest = [max(1 - math.fsum(math.exp(pair[side]) for pair in known), 1e-7) for side in (0, 1)]
    known.append((math.log(rest[0]), math.log(rest[1])))
    return math.fsum(math.exp(p) * (p - q) for p, q in known)


def report(job: Job, found: Exported) -> str:
    """The export for a person."""
    shared = f", one scale for {found.group_size} numbers" if found.group_size else ""
    lines = [
        f"{shown(job.target)}/  {job.name} by {found.by}: {found.layers} linear layers in"
        f" {job.format.bits} bits{shared}, the rest in 16",
        f"weights     {files.size(found.merged_bytes)} -> {files.size(found.bytes)},"
        f" {found.bytes / found.merged_bytes:.3f} of the merged model",
    ]
    if (lost := found.lost) is None:
        return "\n".join([*lines, f"NOT LOADED  {found.not_loaded}: nothing of it is verified here"])
    change = interval.Mean(lost.exported.loss - lost.merged.loss, lost.half, lost.rows)
    lines += [
        f"loss        {lost.merged.loss:.4f} -> {lost.exported.loss:.4f} nats a token, {change.signed('row')}"
        f" ({lost.rows:,} rows, {lost.tokens:,} trained tokens)"
        + ("" if change.shown or lost.half is None else "; no difference shown"),
        f"KL          at least {lost.kl:.2g} nats a token from the merged model in float32"
        f" ({lost.predicted:,} tokens; the {COUNT} likeliest, all others as one)",
        f"likeliest   the same token in {100 * lost.same:.1f} %",
        f"loaded by   {lost.server}",
    ]
    gained = _gained(job, lost)
    if gained is not None and change.value > gained:
        found_ = (
            f"that is more than training gained ({gained:.4f} nats a token): the base is better than this"
        )
        lines.append(f"WARNING     {found_}")
    return "\n".join(lines)


def _gained(job: Job, lost: Lost) -> float | None:
    """By how much training bettered the loss on these rows, as the last evaluation found; None: not asked."""
    known = job.run.outcome().evaluation
    asked = next((s for s in known.sets.values() if s.sha256 == lost.sha256), None) if known else None
    return asked.base.loss - asked.trained.loss if asked else None
