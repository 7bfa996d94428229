"""Merge an adapter into its base, and prove it: `make merge RECIPE=x`. Reads the adapter folder, not what the
recipe meant.

Nothing is compared with what it was made from. The adapter, as PEFT loads the saved files on the class that
trained them, is held against the log-probabilities that training recorded; the written folder, read back,
against that adapter and against the record; and its tensors against the files of base and adapter.

An adapter that was trained on an NF4 base learned to correct that base, rounding and all: it is merged into
the *dequantised* weights, never into the 4-bit ones, and not into those that were never quantised (facts and
figures: docs/serving.md).
"""

import functools
import json
import os
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import base_fit, cli, files, locate, lock, provenance, stops, weights
from lora_recipes.core import head as core_head
from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.core.files import now, replace_folder, write
from lora_recipes.core.head import Head
from lora_recipes.core.provenance import Called, Probe, Provenance
from lora_recipes.core.record import Merged
from lora_recipes.core.run_folder import foreign, merged_files, noted
from lora_recipes.core.yamlfile import shown
from lora_recipes.model import answers, attach, checkpoint, embeddings, heads, merge_head, shards, stored
from lora_recipes.model.shards import Shards
from lora_recipes.recipe.base import Folder
from lora_recipes.recipe.rules import PROMPTS
from lora_recipes.serving import export
from lora_recipes.serving.live import apart

# How far the answers may be from base + adapter: a multiple of what moving each rounded weight at random by
# at most one step of its dtype does to the same answers. Rounding moves it by half a step at most.
STEPS = 8
# How far log-probabilities may be from those that training recorded: share of the adapter's own effect, and
# multiple of what the same base is off by on this machine.
NEAR, NOISE = 0.02, 3
LAST_DIGIT = 1e-6  # nats: the record is rounded to it
PROBES = ("The", "Once upon a time", "Question: what is two and two? Answer:", "Guten Morgen, wie")
PROCESSORS = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)  # vLLM wants them of two-part models
ASKED = 16  # tokens of each probe, which is said again to that length: one batch without padding
GREEDY = 16  # tokens generated from each


@dataclass(frozen=True)
class Answer:
    """The tokens [p, n] of the probes, each with a greedy continuation, and a model's logits for them
    (float32, [p, n, vocabulary]; of a classifier [p, classes], and nothing continues the probes).
    """

    ids: torch.Tensor
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Difference:
    """How far one model is from another: mean KL (nats a token), logit differences, and greedy tokens that
    agree.
    """

    kl_mean: float
    logit_max: float
    logit_mean: float
    greedy_equal: int
    greedy_total: int


@dataclass(frozen=True)
class Recorded:
    """Against what training recorded: mean absolute differences of log-probabilities, nats a token.

    `effect`: of the adapter on its base, in the record. `noise`: the base's answers here against the record,
    and another arithmetic than training's. `adapter`: the saved adapter's answers against the record;
    `merged`: the merged model's. `rounding`: what moving the merged weights by a step of their dtype does.
    """

    effect: float
    noise: float
    adapter: float
    merged: float = 0.0
    rounding: float = 0.0

    @property
    def allowed(self) -> float:
        """The largest difference that is taken for the trained adapter."""
        return NEAR * self.effect + NOISE * self.noise + STEPS * self.rounding + LAST_DIGIT


@dataclass(frozen=True)
class Job:
    """What is merged: the `adapter`, what training `known`, the base's folder `source`; stored in `dtype`,
    computed in `arithmetic`. `head`: of a classifier, what its outputs are.
    """

    adapter: Adapter
    known: Provenance | None
    source: Path
    dtype: str
    arithmetic: str = "float32"
    head: Head | None = None
    shards: Shards | None = None
    whole: str = ""
    unasked: str = ""

    @property
    def architecture(self) -> str:
        """The class that the checkpoint names; a two-part one holds more than the text model that trains."""
        return str(Folder(self.source).real_config().architectures[0])

    @property
    def tokens(self) -> list[int]:
        """The rows of the embeddings that were trained by themselves."""
        found = self.adapter.config.get("trainable_token_indices") or []
        return found if isinstance(found, list) else [i for each in found.values() for i in each]

    @property
    def probes(self) -> Sequence[Probe | Called]:
        """What training asked."""
        return (self.known.probes or self.known.called) if self.known else []

    @property
    def recorded(self) -> list[float]:
        """PEFT's log-probabilities with the adapter, at the end of training."""
        return [x for probe in self.probes for x in probe.adapter]


@dataclass(frozen=True)
class Wanted:
    """Base + adapter before the merge (`attached`), and what it answers (`asked`), from what was saved and
    recorded alone. `dequantised`: the weights of a base that was trained in 4 bits, by module; `notes`: what
    the record does not prove.
    """

    attached: Any = None
    asked: Answer = field(default_factory=lambda: Answer(torch.empty(0)))
    record: Recorded | None = None
    notes: list[str] = field(default_factory=list)
    dequantised: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def merge(
    folder: Path,
    output: Path,
    base: Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    unproven: bool = False,
    unasked: bool = False,
) -> dict[str, Any]:
    """Merge the adapter in `folder` into its base and write a whole model to `output`; returns what
    merge.json says.

    `base` replaces the one that adapter_config.json names; `unproven` takes an adapter without provenance;
    `unasked` leaves out the model's answers, so that it is never loaded.
    RecipeError when the adapter does not fit or was changed since training, memory does not suffice, or the
    merged model is not base + adapter, or answers otherwise than training recorded; then nothing is left.
    """
    kept = "nothing was written; what stood there is as it was"
    with (
        files.writing(output.parent, "while merging", lambda: kept),
        lock.runs([folder], "merges", lock.place(output)),
    ):
        merged = _whole(folder, output, base, dtype, force, unproven, unasked)
        if merged["arithmetic"] is None:  # no proof of what it answers
            return merged
        sha256, known = files.sha256(adapters.read(folder, anything=True).file), merged.get("recorded") or {}
        proof = Merged(
            at=merged["at"],
            adapter_sha256=sha256,
            dtype=merged["dtype"],
            apart=known.get("merged"),
            allowed=known.get("allowed"),
            not_proven=merged["not_proven"],
        )
        noted(folder, merged=proof)
        return merged


def _whole(
    folder: Path,
    output: Path,
    base: Path | None,
    dtype: str | None,
    force: bool,
    unproven: bool,
    unasked: bool,
) -> dict[str, Any]:
    began = time.monotonic()
    said = _place(output, force)
    lock.unserved(output)
    adapter = adapters.read(folder, anything=True)
    if (kind := adapter.config["peft_type"]) in PROMPTS:
        do = "its virtual tokens stand before each text: use it by PEFT"
        raise RecipeError(Problem(shown(folder), f"{kind} has no weights to merge", do))
    name = adapter.config.get("base_model_name_or_path") or "(none named)"
    source = base.absolute() if base else locate.local(name, adapter.config.get("revision"))
    if source is None or not (source / "config.json").is_file():
        do = f"give its folder: {cli.command(BASE='path')} (a hub model: hf download it first)"
        raise RecipeError(Problem(shown(folder), f"its base {source or name} is not a folder here", do))
    known = provenance.read(folder)
    raise_if(base_fit.fit(adapter, source, known))
    raise_if(export.sound(adapter) if kind == "LORA" else [])
    notes = provenance.not_proven(folder, known, unproven, "merges")
    job = Job(adapter, known, source, dtype or _dtype(source))
    if kind == "LORA" and adapter.config.get("task_type") == "SEQ_CLS":
        job = replace(job, head=core_head.needed(folder))
        merge_head.fits(folder, source)
    found, why = shards.of(adapter, source, job.dtype, getattr(transformers, job.architecture), known)
    job = _in_memory(replace(job, shards=found, whole=why), unasked)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        record = _merge(job, temporary, notes)
        record |= {"seconds": round(time.monotonic() - began, 2), "at": now(), "removed": said}
        record["files"] = sorted(p.name for p in temporary.iterdir())
        write(temporary / "merge.json", json.dumps(record, indent=2) + "\n")
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _place(output: Path, force: bool) -> list[str]:
    """RecipeError when no merged model may stand at `output`. What a merge that was killed has left beside it
    goes, and is named.
    """
    if output.exists() or output.is_symlink():
        if not (output / "merge.json").is_file():
            raise RecipeError(
                Problem(
                    shown(output), "is there, and is no merged model (no merge.json in it)", "move it away"
                )
            )
        if not force:
            raise RecipeError(
                Problem(shown(output), "is already there", f"{cli.command(FORCE=True)} replaces it")
            )
        if own := foreign(output, merged_files(output)):
            found = f"holds what no merge wrote: {listed(own, 3)}"
            raise RecipeError(Problem(shown(output), found, "move it away: the folder is replaced whole"))
    notes = []
    for folder in sorted(output.parent.glob(f".{output.name}.*.tmp")):
        shutil.rmtree(folder, ignore_errors=True)
        notes.append(f"{shown(folder)} was left by a merge that was killed, and is gone")
    return notes


def _dtype(source: Path) -> str:
    config = Folder(source).real_config()
    return str(config.dtype or config.get_text_config().dtype or torch.float32).removeprefix("torch.")


def _in_memory(job: Job, unasked: bool) -> Job:
    """`job` with the arithmetic in which the model is asked, or why it is not. RecipeError where it has to be
    loaded, and memory does not suffice.
    """
    if unasked and job.shards:
        return replace(job, unasked="by your choice")
    if unasked:
        do = "leave out --unasked (UNASKED=1): the model is loaded, and asked"
        raise RecipeError(Problem(shown(job.adapter.path), f"does not merge shard by shard: {job.whole}", do))
    kind, found = _arithmetic(job)
    if kind:
        return replace(job, arithmetic=kind)
    if job.shards:
        return replace(job, unasked=found)
    do = f"{cli.command(DTYPE='bfloat16')} needs half, or use a larger machine"
    do = do if job.dtype == "float32" else "merge on a larger machine"
    found = f"{found}, and it does not merge shard by shard: {job.whole}"
    raise RecipeError(Problem(shown(job.source), found, do))


def _arithmetic(job: Job) -> tuple[str, str]:
    """float32 where memory suffices for it, else the dtype that is stored; empty where it suffices for
    neither, and what is needed.

    That is the text model once and a quarter more for the adapter and the answers; what is being written, if
    that is not done shard by shard; and for an adapter that was trained in 4 bits the dequantised weights.
    """
    numbers = sum(_count(shape) for shape in weights.shapes(job.source).values())
    free, size = psutil.virtual_memory().available, getattr(torch, job.dtype).itemsize
    more = (0 if job.shards else size) + (4 if job.known and job.known.quantize else 0)
    for kind in ("float32", job.dtype):
        needed = int(numbers * (1.25 * getattr(torch, kind).itemsize + more))
        if needed <= free:
            return kind, ""
    return "", f"{job.dtype} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _merge(job: Job, target: Path, notes: list[str]) -> dict[str, Any]:
    """Hold the saved adapter against the record; merge it on the class that trained it; write the class that
    the checkpoint names; read that back, and hold it against all three.
    """
    has_own = (job.adapter.path / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        job.adapter.path if has_own else job.source, trust_remote_code=False
    )
    wanted = Wanted(notes=_unasked(job)) if job.unasked else _wanted(job, tokenizer)
    facts: dict[str, Any] = {
        "adapter": shown(job.adapter.path),
        "base": str(job.source),
        "architecture": job.architecture,
        "dtype": job.dtype,
        "arithmetic": None if job.unasked else job.arithmetic,
        "shards": len(weights.files(job.source)) if job.shards else None,
        "not_by_shards": job.whole or None,
        **wanted.facts,
    }
    attached = job.shards.attached if job.shards else wanted.attached
    changes = stored.changes(attached, job.adapter)
    facts["modules"] = _layers(attached, job.adapter)
    wanted = replace(wanted, attached=None)
    check = functools.partial(stored.check, job.adapter, job.source, target, changes)
    if job.shards:
        dequantised = job.shards.rounded if job.unasked else wanted.dequantised
        job.shards.write(target, dequantised)
        facts |= check(job.shards.names, dequantised, cast(Any, attached.get_base_model()))
    else:
        _write(attached, job, target, wanted.dequantised)
    del attached  # before the next model is loaded
    tokenizer.save_pretrained(target)
    merged = _read_back(job, target, tokenizer)
    if job.head:
        facts |= {"architecture": replace(job, source=target).architecture, **asdict(job.head)}
    if not job.shards:
        facts |= check(list(merged.state_dict()), wanted.dequantised, merged)
    judged, apart = ({}, 0.0) if job.unasked else _judge(merged, wanted, changes, job)
    facts |= judged
    for name in PROCESSORS:
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, target / name)
    if job.known:  # the hashes are the adapter's, not these
        replace(job.known, files={}, adapter_config={}, apart=apart).save(target)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    notes = [*notes, *wanted.notes, *_not_compared(facts["tensors_not_compared"], job)]
    return facts | {"not_proven": notes, "max_rss_bytes": peak}


def _read_back(job: Job, target: Path, tokenizer: Any) -> PreTrainedModel:
    """The merged model in `target`, which gets the last of its settings; without weights where it is not
    asked.
    """
    if job.head:
        merge_head.seal(target, job.head, tokenizer)
        return attach.merged(target, job.head, dtype=getattr(torch, job.arithmetic))
    unasked = job.shards.whole if job.shards and job.unasked else None
    merged: PreTrainedModel = unasked if unasked is not None else _load(target, job.arithmetic, job)
    stops.save(target, stops.settings(target), attach.stops(job.adapter.path, tokenizer, merged))
    return merged


def _unasked(job: Job) -> list[str]:
    """What is not shown where the model is not asked, for a person."""
    return [
        f"the merged model was not asked ({job.unasked}): each of its tensors was held against the files of"
        " base and adapter; its answers were held against nothing, neither base + adapter by PEFT nor what"
        " training recorded"
    ]


def _not_compared(names: list[str], job: Job) -> list[str]:
    """What the answers alone were asked of, for a person."""
    if not names:
        return []
    kind = job.adapter.config["peft_type"]
    return [
        f"{len(names)} stored tensors were not computed here ({kind}: {listed(names, 3)}): of them only the"
        " answers were compared, with those of base + adapter by PEFT"
    ]


def _wanted(job: Job, tokenizer: Any) -> Wanted:
    """What the merged model must answer, and the base's own weights with the adapter, not merged yet."""
    # A tokenizer may have tokens that the embedding has no row for.
    config = Folder(job.source).real_config().get_text_config()
    rows = min(len(tokenizer), config.vocab_size)
    chance = torch.randint(0, rows, (1, ASKED), generator=torch.Generator().manual_seed(0))
    texts = [tokenizer(text, return_tensors="pt")["input_ids"].repeat(1, ASKED) for text in PROBES]
    probes = Answer(torch.cat([chance, *(ids[:, :ASKED] for ids in texts)]))
    ask = _again if job.head else _continued
    if job.known is None:
        attached = _attach(_load(job.source, job.arithmetic, job), job)
        return Wanted(attached, ask(attached, probes))
    attached = _trained(job)
    asked = ask(attached, probes)
    record = _against_record(attached, job)
    dequantised = stored.dequantised(attached) if job.known.quantize else {}
    # Are these answers already what the merged model must give, by the same device and arithmetic?
    same = job.known.dtype == job.arithmetic and attached.device.type == "cpu"
    notes = _as_recorded(record, job) if same or not job.head else []
    if same and not dequantised:
        return Wanted(attached, asked, record, notes)
    said = _logprobs(attached, job)
    del attached  # before the next model is loaded
    attached, facts = _attach(_load(job.source, job.arithmetic, job), job), {}
    if dequantised:
        usual = _difference(asked, _again(attached, asked))
        facts = {"quantize": job.known.quantize, "unquantised_base": asdict(usual)}
        stored.put(dequantised, attached.get_base_model())
    if not same:
        asked = _again(attached, asked)
        if record and job.head:
            record = replace(record, noise=apart(_logprobs(attached, job), said))
            notes = _as_recorded(record, job)
    return Wanted(attached, asked, record, notes, dequantised, facts)


def _judge(
    merged: PreTrainedModel, wanted: Wanted, changes: stored.Changes, job: Job
) -> tuple[dict[str, Any], float]:
    """What the merged model answers, against what it must; and how far it is from the record as it is used,
    in the arithmetic of its own dtype. `merged` is of no further use then. RecipeError when it is another
    model.
    """
    again, said = _again(merged, wanted.asked), _logprobs(merged, job)
    _move(merged, job, changes)
    moved, said_moved = _again(merged, again), _logprobs(merged, job)
    found, rounding = _difference(wanted.asked, again), _difference(again, moved)
    _within(found, rounding, job, again.logits.abs().max().item())
    facts, record = asdict(found) | {"rounding": asdict(rounding)}, wanted.record
    used = apart(said, job.recorded) if record else 0.0
    if record:
        record = replace(record, merged=apart(said, job.recorded), rounding=apart(said_moved, said))
    # What the arithmetic of its own dtype does to the same weights: every user of the merged model has that.
    for kind in sorted({job.dtype, job.known.dtype if job.known else job.dtype} - {job.arithmetic}):
        coarse: Any = merged.to(getattr(torch, kind))
        if job.head:
            coarse.score.float()  # as it is used
        if kind == job.dtype:
            facts["noise"] = asdict(_difference(moved, _again(coarse, moved)))
            used += apart(_logprobs(coarse, job), said_moved) if record else 0.0
        if record and job.known and kind == job.known.dtype:
            record = replace(record, noise=record.noise + apart(_logprobs(coarse, job), said_moved))
    if record:
        if record.merged > record.allowed:
            raise _otherwise("the merged model", record.merged, record, job)
        facts["recorded"] = asdict(record) | {"allowed": record.allowed}
    return facts, used


def _load(folder: Path, dtype: str, job: Job) -> PreTrainedModel:
    """The text model in `folder` as training loads it, on the CPU; or, for an adapter of another tool whose
    names are those of the two-part class, that class. A classifier, with a head that is not trained yet.
    """
    options = {"dtype": getattr(torch, dtype)}
    model = checkpoint.load(Folder(folder), **options)
    if job.head:
        return heads.of(model, job.head.labels, job.head.pooling).eval()
    names = dict(model.named_modules())
    if any(module.replace(".base_layer", "") not in names for module in job.adapter.modules):
        model = checkpoint.load(Folder(folder), getattr(transformers, job.architecture), **options)
    embeddings.grow(model, job.tokens)
    return model.eval()


def _attach(model: PreTrainedModel, job: Job) -> PeftModel:
    """`model` with the saved adapter. RecipeError when that does not go on it whole."""
    return attach.attach(model, {"default": job.adapter})


def _layers(attached: PeftModel, adapter: Adapter) -> int:
    """How many modules carry the adapter. RecipeError when it is not all there."""
    lora = adapter.config["peft_type"] == "LORA"
    layers = sum(isinstance(m, LoraLayer if lora else BaseTunerLayer) for m in attached.modules())
    holds = len(adapter.modules) if lora else layers
    if layers == 0 or layers != holds:
        found = f"PEFT attached {layers} modules, the adapter holds {holds}"
        raise RecipeError(Problem(shown(adapter.path), found, "the adapter does not fit this base"))
    return layers


def _trained(job: Job) -> PeftModel:
    """The saved adapter on its base as it was trained: same class, same dtype, same 4 bits."""
    if job.head:
        return attach.on_base(job.adapter, job.source, job.known, job.head)
    model = attach.base(job.source, job.known)
    embeddings.grow(model, job.tokens)
    return _attach(model, job)


def _logprobs(model: torch.nn.Module, job: Job) -> list[float]:
    said = heads.logprobs if job.head else answers.logprobs
    return [x for probe in job.probes for x in said(model, probe.input_ids)]


def _against_record(attached: PeftModel, job: Job) -> Recorded | None:
    """The saved adapter's answers, and its base's, against those that training recorded; None when it asked
    nothing.
    """
    if not job.recorded:
        return None
    alone = [x for probe in job.probes for x in probe.base]
    noise = 0.0
    # The base's new rows, as they began, are gone; a head was never on the base alone: what another
    # arithmetic does to its answers is measured instead (_wanted), where there is memory for that.
    if not job.tokens and not (job.head and job.arithmetic == "float32"):
        with heads.untouched(attached) if job.head else attached.disable_adapter():
            noise = apart(_logprobs(attached, job), alone)
    return Recorded(apart(job.recorded, alone), noise, apart(_logprobs(attached, job), job.recorded))


def _as_recorded(record: Recorded | None, job: Job) -> list[str]:
    """What the record cannot prove. RecipeError when the saved adapter is not the one that was trained, or
    the base not its base.
    """
    assert job.known
    if record is None:
        return ["training recorded no answers: that the adapter answers as it did then is not shown"]
    if record.noise > record.effect and not job.head:
        found = (
            f"the base alone is {record.noise:.2g} nats a token from what training recorded, the adapter's"
        )
        found += f" own effect is {record.effect:.2g}"
        if job.known.fingerprint is None:
            do = f"another base? Give the one that it was trained on: {cli.command(BASE='path')}"
            raise RecipeError(Problem(shown(job.adapter.path), found, do))
        return [f"{found}: its answers prove nothing here"]
    if record.adapter > record.allowed:
        raise _otherwise("the saved adapter", record.adapter, record, job)
    if record.noise > record.effect:
        found = f"arithmetic moves the answers by {record.noise:.2g} nats, LoRA by {record.effect:.2g}: they"
        return [f"{found} show the head, not LoRA"]
    return []


def _otherwise(what: str, off: float, record: Recorded, job: Job) -> RecipeError:
    found = f"{what} answers otherwise than training recorded: {off:.2g} nats a token apart, at most"
    found += f" {record.allowed:.2g} allowed (the adapter's effect is {record.effect:.2g})"
    do = "nothing was written; adapter or base were changed after training: copy them again"
    return RecipeError(Problem(shown(job.adapter.path), found, do))


def _write(attached: PeftModel, job: Job, target: Path, dequantised: dict[str, torch.Tensor]) -> None:
    """Merge, module by module in float32, and write the class that the checkpoint names, each tensor rounded
    once.
    """
    if job.arithmetic != "float32":  # where the whole model is too large for it
        base = weights.tensors(job.source)
        for name, module in attached.get_base_model().named_modules():
            weight: Any = getattr(getattr(module, "base_layer", None), "weight", None)
            if isinstance(module, ParamWrapper):
                parameter = module.get_param()
                kind, parameter.data = parameter.dtype, parameter.data.float()
                module.merge(safe_merge=True)
                module.get_param().data = module.get_param().data.to(kind)
            elif isinstance(module, BaseTunerLayer) and weight is not None:
                own = base_fit.own_name(f"{name}.weight", base)
                exact = dequantised.get(name, base[own].tensor() if own else weight.data)
                kind, weight.data = weight.dtype, exact.float()
                module.merge(safe_merge=True)
                weight.data = weight.data.to(kind)
    text: Any = attached.merge_and_unload(safe_merge=True)
    kind = getattr(torch, job.dtype)
    if job.head:
        target.mkdir(parents=True)
        text.to(kind).save_pretrained(target)
        return
    whole = checkpoint.load(Folder(job.source), getattr(transformers, job.architecture), dtype=kind)
    embeddings.grow(whole, job.tokens)
    head, tied = whole.get_output_embeddings(), text.config.get_text_config().tie_word_embeddings
    if whole.config.get_text_config().tie_word_embeddings and not tied:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in (whole.config, whole.config.get_text_config()):
            config.tie_word_embeddings = False
    places = whole.state_dict()
    for name, tensor in text.state_dict().items():
        own = base_fit.own_name(name, places)
        if own is None or places[own].shape != tensor.shape:
            found = f"{name} of {type(text).__name__} has no place in {job.architecture}"
            raise RecipeError(Problem(shown(job.source), found, "serve the adapter unmerged"))
        places[own].copy_(tensor)
    target.mkdir(parents=True)
    whole.save_pretrained(target)


@torch.no_grad()
def _move(model: PreTrainedModel, job: Job, changes: stored.Changes) -> None:
    """Move each weight that was rounded at random by at most one step of the dtype in which it is stored."""
    every = _dtype(job.source) != job.dtype
    generator, step = torch.Generator().manual_seed(0), torch.finfo(getattr(torch, job.dtype)).eps
    parameter: torch.Tensor
    for name, parameter in model.named_parameters():
        if every or name in changes.updates or changes.touches(name):
            chance = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.add_((parameter.float() * chance * step).to(parameter))


@torch.no_grad()
def _continued(model: PreTrainedModel | PeftModel, probes: Answer) -> Answer:
    """`probes`, each continued greedily by GREEDY tokens, past any end."""
    config = GenerationConfig(do_sample=False, min_new_tokens=GREEDY, max_new_tokens=GREEDY, pad_token_id=0)
    ids = probes.ids.to(next(model.parameters()).device)
    asked = cast(Any, model)  # its type knows no generate
    ids = asked.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return _again(model, Answer(ids))


@torch.no_grad()
def _again(model: PreTrainedModel | PeftModel, answer: Answer) -> Answer:
    """`model` asked for the same tokens."""
    device = next(model.parameters()).device
    logits = model(input_ids=answer.ids.to(device), use_cache=False).logits.float().cpu()
    return Answer(answer.ids.cpu(), logits)


def _difference(before: Answer, after: Answer) -> Difference:
    one, two = before.logits, after.logits
    kl = largest = mean = 0.0
    for left, right in zip(one, two, strict=True):  # a probe at a time: a vocabulary in float64 is large
        given, answered = left.double().log_softmax(-1), right.double().log_softmax(-1)
        divergence = torch.nn.functional.kl_div(answered, given, log_target=True, reduction="none").sum(-1)
        off = (left - right).abs()
        kl, mean = kl + divergence.mean().item() / len(one), mean + off.mean().item() / len(one)
        largest = max(largest, off.max().nan_to_num(nan=torch.inf).item())
    found = Difference(max(kl, 0.0), largest, mean, 0, 0)
    if one.dim() == 2:
        return found
    best, other = (logits[:, -GREEDY - 1 : -1].argmax(-1) for logits in (one, two))
    return replace(found, greedy_equal=int((best == other).sum()), greedy_total=best.numel())


def _within(found: Difference, rounding: Difference, job: Job, size: float) -> None:
    """RecipeError unless `found` is of the size of `rounding`, or of the last digits of logits of `size`."""
    last = torch.finfo(getattr(torch, job.arithmetic)).eps * size
    allowed = Difference(
        STEPS**2 * (rounding.kl_mean + last**2),
        STEPS * (rounding.logit_max + last),
        STEPS * (rounding.logit_mean + last),
        0,
        0,
    )
    if not all(getattr(found, k) <= getattr(allowed, k) for k in ("kl_mean", "logit_max", "logit_mean")):
        said = f"the merged model is not base + adapter: {_told(found)}; rounding explains {_told(allowed)}"
        do = "nothing was written; serve the adapter unmerged"
        raise RecipeError(Problem(shown(job.adapter.path), said, do))


def _told(found: Difference) -> str:
    off = f"logits off by {found.logit_max:.1e} (mean {found.logit_mean:.1e})"
    return f"KL {found.kl_mean:.1e} nats a token, {off}"


def report(record: dict[str, Any], output: Path) -> str:
    """merge.json for a person."""
    lines = [
        (
            f"{record['modules']} modules merged into {record['architecture']} in {record['dtype']},"
            f" {record['seconds']:.1f} s, peak memory {record['max_rss_bytes'] / 2**30:.2f} GiB"
        ),
        (
            f"written shard by shard (files: {record['shards']})"
            if record["shards"]
            else f"merged in the whole model: {record['not_by_shards']}"
        ),
    ]
    if record["arithmetic"]:
        total = record["greedy_total"]
        same = f", {record['greedy_equal']} of {total} greedy tokens equal" if total else ""
        against = f"base in {record['quantize']} + adapter" if "quantize" in record else "base + adapter"
        lines.append(
            f"against {against}: KL {record['kl_mean']:.1e} nats a token, logits differ by at most"
            f" {record['logit_max']:.1e} (mean {record['logit_mean']:.1e}){same}"
        )
    if usual := record.get("unquantised_base"):
        lines.append(f"(on the base that was never quantised, the usual way: KL {usual['kl_mean']:.1e})")
    lost, computed = 100 * record["lost_in_rounding"], record["tensors_computed"]
    said = f" tensors are base + adapter, rounded once ({lost:.2g} % of the update lost in that)"
    lines.append(
        f"as stored, computed anew in float64: {computed}{said if computed else ' tensors'};"
        f" {record['tensors_of_the_base']} are the base's own"
    )
    if noise := record.get("noise"):
        lines.append(
            f"computing in {record['dtype']} moves its answers by KL {noise['kl_mean']:.1e}, logits by at"
            f" most {noise['logit_max']:.1e}; the figures above are of {record['arithmetic']}"
        )
    if known := record.get("recorded"):
        lines.append(
            f"against what training recorded: {known['merged']:.1e} nats a token apart,"
            f" {known['allowed']:.1e} allowed; the adapter's effect is {known['effect']:.1e}"
        )
    lines += merge_head.notes(record)
    lines += [f"NOTE        {note}" for note in record["removed"]]
    lines += [f"NOT PROVEN  {note}" for note in record["not_proven"]]
    return "\n".join([*lines, f"{shown(output)}/  with merge.json"])
