"""What would be trained, computed before anything is: `make plan RECIPE=x`. No weights; no network when the
recipe has a contract.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, get_scheduler
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, pack_dataset

from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.record import (
    AdapterFacts,
    CoverageFacts,
    HeadFacts,
    LayoutFacts,
    ModelFacts,
    PlanFacts,
    RateFacts,
    StepFacts,
)
from lora_recipes.data import labels, new_tokens
from lora_recipes.data.gate import Gate
from lora_recipes.data.labels import LabelGate
from lora_recipes.memory import blocks, choices, memory
from lora_recipes.memory.fits import Memory, gib
from lora_recipes.model import (
    batching,
    build,
    checkpoint,
    embeddings,
    experts,
    freeze,
    heads,
    parts,
    probes,
    rates,
    reach,
    router,
    targets,
    twin,
)
from lora_recipes.model.batching import AS_GIVEN, Batching
from lora_recipes.planning import adapter_facts, machine, space, trackers
from lora_recipes.planning import processes as layouts
from lora_recipes.planning.processes import Sizes
from lora_recipes.planning.steps import Steps, chart
from lora_recipes.recipe import rules
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.layout import SINGLE, Layout
from lora_recipes.recipe.recipe import Recipe, document

# The labels that stand in the short plan.
SHORT = (
    "recipe",
    "layout",
    "base",
    "parameters",
    "adapter",
    "coverage",
    "head",
    "data",
    "classes",
    "tokens",
    "turns",
    "reply ends",
    "steps",
    "batching",
    "reports to",
    "quantised",
    "memory",
)


@dataclass
class Plan:
    """What was found: `facts` for machines, `lines` for people, `warnings`; and the `gate`, whose rows
    training takes over; `here`: those of the warnings that training on this device would fail by. `facts` are
    there once `make` has counted the model. `batches`: how the rows become batches.
    """

    gate: Gate
    layout: Layout = SINGLE
    sizes: Sizes | None = None
    batches: Batching = AS_GIVEN
    facts: PlanFacts = field(init=False)
    lines: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    here: list[Problem] = field(default_factory=list)

    def say(self, label: str, text: str) -> None:
        """Add a labelled text; its further lines are set under the first."""
        self.lines.append((label, text))

    def text(self) -> str:
        """The whole plan: what a person must act on first."""
        return _set([*self._warned(), *self.lines])

    def short(self, whole: str) -> str:
        """What a person reads before training: the warnings, and a line each of what matters most. `whole`:
        where the rest is.
        """
        said = [(label, text) for label, text in self.lines if label in SHORT]
        cut = [(label, text if label == "coverage" else text.partition("\n")[0]) for label, text in said]
        return _set([*self._warned(), *cut, ("plan", f"the whole: {whole}")])

    def _warned(self) -> list[tuple[str, str]]:
        return [("WARNING", warning) for warning in self.warnings]


def _set(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{label:<12}" + text.replace("\n", f"\n{'':<12}") for label, text in lines)


def make(
    resolved: Resolved,
    layout: Layout = SINGLE,
    network: bool = False,
    rows: Callable[[Resolved, bool], Gate] = labels.gate,
    sample: int | None = None,
) -> Plan:
    """The plan of a recipe on the processes of `layout`. RecipeError lists all that is wrong with its
    targets, its data and its numbers.

    `network`: may the tokenizer be fetched? Training does; a plan only looks in the cache. `rows`: what gives
    the tokenised data. `sample`: look at the first rows of each source alone.
    """
    recipe = resolved.recipe
    raise_if(rules.of_layout(recipe, layout))
    arguments = build.sft_config(recipe, resolved.folder)
    model, config = build.meta_model(resolved.base), build.peft_config(recipe)
    trained = checkpoint.planned(resolved.base)
    config = config and targets.of_text(config, model)
    of_base = checkpoint.check(resolved.base, model)
    known = _facts(resolved, model, arguments, layout)
    raise_if(rules.problems(recipe, known) + _named(model, recipe, trained) + _unread(recipe))
    if trained.beside and config and not config.is_prompt_learning:
        raise_if(checkpoint.unnamed(resolved.base, targets.matched(model, config)))
    raise_if(twin.problems(model, config, recipe, resolved.base))
    plan = Plan(labels.gate(resolved, network, sample) if sample else rows(resolved, network), layout)
    plan.warnings += _sampled(sample)
    if plan.gate.counts.tokens is not None:
        raise_if(probes.problems(plan.gate.tokenizer, recipe))
    new = new_tokens.ids(plan.gate.tokenizer, recipe, model.config.get_text_config().vocab_size)
    model = _classifier(plan, resolved, model, trained)
    plan.warnings += of_base + reach.check(model, new, plan.gate, recipe)
    changed = f" with {' '.join(recipe.overrides.values())}" if recipe.overrides else ""
    plan.say("recipe", f"{recipe.name}{changed}")
    if layout != SINGLE:
        plan.say("layout", str(layout))
    plan.sizes = _sizes(model, recipe)
    if trained.beside:
        plan.say("parts", parts.said(trained))
    counted, adapter, coverage = _model(plan, resolved, model, config)
    plan.facts = PlanFacts(
        recipe=recipe.name,
        method=recipe.method,
        overrides=list(recipe.overrides.values()),
        resolved=document(recipe.anywhere()),
        layout=LayoutFacts(kind=layout.kind, processes=layout.processes),
        model=counted,
        adapter=adapter,
        coverage=coverage,
        data=plan.gate.facts,
        head=_head(plan.gate, recipe, model),
        stops=plan.gate.stops.facts() if recipe.classify is None else None,
    )
    if different := rates.said(model, recipe, arguments.learning_rate):
        plan.say("rates", different)
    for label, text in heads.lines(plan.facts.head):
        plan.say(label, text)
    for label, text in labels.lines(plan.gate, recipe):
        plan.say(label, text)
    plan.batches = batching.chosen(resolved, plan.gate)
    _steps(plan, recipe, arguments, layout.processes)
    if plan.facts.steps:
        build.peft_config(recipe, plan.facts.steps.total)  # does AdaLoRA's schedule fit into the steps?
        plan.warnings += _by_steps(recipe, known, plan.facts.steps)
    told = list(arguments.report_to or [])
    if trackers_said := trackers.said(recipe.train.report_to, told, resolved.folder.path):
        plan.say("reports to", trackers_said)
    plan.say("example", labels.example(plan.gate, recipe))
    plan.warnings += rules.warnings(recipe, replace(known, steps=None)) + plan.gate.warnings
    plan.warnings += trackers.warnings(told)
    plan.here = rules.on_device(recipe, known)
    return plan


def _sampled(sample: int | None) -> list[str]:
    """What to know of a plan of a `sample` of the rows."""
    said = "rows of each source alone were looked at: counts, steps and memory are of those, and faults of"
    return [f"the first {sample:,} {said} later rows are not seen"] if sample else []


def _unread(recipe: Recipe) -> list[Problem]:
    return heads.problems(recipe) if recipe.classify else []


def _classifier(
    plan: Plan, resolved: Resolved, model: PreTrainedModel, trained: parts.Trained
) -> PreTrainedModel:
    """`model`, or of task: classify the classifier that is made of it, which is what trains."""
    rows, classify = plan.gate, resolved.recipe.classify
    if isinstance(rows, LabelGate) and classify:
        made = heads.of(model, rows.names, classify.pooling)
        if heads.loaded_as(made.config) is None:
            said = "transformers has no class for sequence classification of this family: the adapter is used"
            plan.warnings.append(f"{said} by predict, and is not merged or served")
        return made
    plan.warnings += twin.warnings(trained, resolved.base.config())
    return model


def _head(rows: Gate, recipe: Recipe, model: PreTrainedModel) -> HeadFacts | None:
    if not (isinstance(rows, LabelGate) and recipe.classify):
        return None
    size = cast(Any, model).score.weight.numel()
    return HeadFacts(pooling=recipe.classify.pooling, parameters=size, classes=rows.classes)


def _facts(resolved: Resolved, model: PreTrainedModel, arguments: SFTConfig, layout: Layout) -> rules.Facts:
    """What the rules need to know beside the recipe."""
    warm, config = resolved.warm, model.config.get_text_config()
    return rules.Facts(
        layout,
        has_bias=any(name.endswith(".bias") for name, _ in model.named_parameters()),
        linear_attention="linear_attention" in (getattr(config, "layer_types", None) or []),
        attention=build.attention_refused(model, resolved.recipe.model.attn_implementation),
        causal_conv1d=importlib.util.find_spec("causal_conv1d") is not None,
        bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
        plain_optimizer=resolved.recipe.learning_rates is None or rates.plain(arguments),
        warm=warm.recipe if warm else None,
        same_base=warm is None or warm.base.weights == resolved.base.weights,
        optimizer=machine.optimizer(arguments),
        reporting=trackers.problem(resolved.recipe.train.report_to, list(arguments.report_to or [])),
        liger=machine.liger(),
        ignored=machine.ignored(arguments, resolved.recipe),
        router=hasattr(config, "output_router_logits"),
        conv1d=any(isinstance(module, Conv1D) for module in model.modules()),
        accelerator=torch.accelerator.is_available() and not resolved.recipe.train.use_cpu,
        foreign=machine.foreign(),
    )


def _by_steps(recipe: Recipe, known: rules.Facts, steps: StepFacts) -> list[str]:
    """Warnings about settings that the number of steps makes idle. RecipeError for what it makes vain."""
    counted = replace(known, steps=steps.total, per_epoch=steps.per_epoch, warmup=steps.warmup)
    raise_if(rules.problems(recipe, counted))
    return rules.warnings(recipe, counted)


def _named(model: PreTrainedModel, recipe: Recipe, trained: parts.Trained) -> list[Problem]:
    """What the recipe names that this model does not have."""
    config = build.peft_config(recipe)  # as written: towers are not excluded yet
    if recipe.freeze:
        return freeze.problems(model, recipe.freeze, recipe)
    prompts = config is None or config.is_prompt_learning
    return [] if prompts else targets.problems(model, config, recipe, trained)


def add_memory(
    plan: Plan, resolved: Resolved, accelerator: bool = True, found: Memory | None = None
) -> Memory:
    """Add the predicted peak memory to the plan: on a GPU, or as it runs on this CPU.

    It takes seconds for a model of billions of parameters, so it is asked for apart; `found` where that was
    done before.
    """
    found = found or memory.plan(resolved, plan.gate, cuda=accelerator)
    counts = plan.facts.model.total, plan.facts.model.trainable
    if not found.unknown and counts != (here := (found.parameters, found.trainable)):
        ran = f"{here[0]:,} parameters, {here[1]:,} trained"
        why = f"it was run for {ran}, not {counts[0]:,} and {counts[1]:,}"
        found = replace(found, unknown=why, parts=dict.fromkeys(found.parts, 0))
    whole = found
    if plan.layout != SINGLE:
        assert plan.sizes
        sizes = replace(plan.sizes, trainable=found.trainable)
        parts, said = layouts.per_device(plan.layout, found.parts, sizes)
        found = replace(
            found,
            parts=parts,
            assumptions=(*found.assumptions, f"each of {plan.layout}, by arithmetic", *said),
        )
    plan.facts.memory = found.facts()
    plan.warnings += space.warning(plan.facts, plan.gate.tokenizer, whole, resolved)
    for label, text in found.lines():
        if accelerator or label != "cards":
            plan.say(label, text)
    return found


def beside_lora(plan: Plan, resolved: Resolved, here: Memory) -> None:
    """Add the peak memory of the same recipe as plain LoRA; nothing where it is that already. `here`: the
    recipe's own.
    """
    if (plain := choices.plain(resolved.recipe)) is None:
        return
    beside = memory.plan(resolved.by(plain), plan.gate)
    if here.unknown or beside.unknown:
        plan.say("with LoRA", f"not known: {here.unknown or beside.unknown}")
        return
    peak = beside.peak_bytes
    assert plan.facts.memory, "add_memory comes first: `here` is what it found"
    plan.facts.memory = replace(plan.facts.memory, lora_peak_bytes=peak)
    kind = "the same without its variant" if resolved.recipe.lora else "r 16 on all linear modules"
    plan.say("with LoRA", f"peak {gib(peak)} GiB ({kind}): here {100 * (here.peak_bytes / peak - 1):+.1f} %")


def _model(
    plan: Plan, resolved: Resolved, model: PreTrainedModel, config: PeftConfig | None
) -> tuple[ModelFacts, AdapterFacts | None, list[CoverageFacts] | None]:
    """Say what the model is and what of it is trained; the same as facts. `model`, on the meta device, gets
    the new tokens' rows and the adapter.
    """
    recipe, contract = resolved.recipe, resolved.base.contract
    base, kind = model.num_parameters(), type(model).__name__
    indices = new_tokens.ids(plan.gate.tokenizer, recipe, model.config.get_text_config().vocab_size)
    embeddings.grow(model, indices)
    plan.warnings += (
        new_tokens.unseen(plan.gate.unseen, indices, recipe) if plan.gate.counts.tokens is not None else []
    )
    words, why = build.precision(recipe)
    compute = next((k for k, on in words.items() if on), "float32")
    known = f", contract {contract.name}" if contract else ""
    weights = recipe.model.quantize or recipe.model.dtype
    plan.say(
        "base", f"{resolved.base.said}{known}: {kind}, weights in {weights}, compute in {compute} ({why})"
    )
    attention, reason = build.attention(model, recipe.model.attn_implementation)
    plan.say("attention", f"{attention}: {reason}")
    total = trainable = model.num_parameters()
    active, passed = experts.said(model)
    size, found, adapted = 0, [], []
    if recipe.freeze:
        trainable = freeze.apply(model, recipe.freeze)
    if config:
        config = targets.resolved(model, embeddings.training(config, model, indices))
        adapted = [] if config.is_prompt_learning else targets.matched(model, config)
        parameters = targets.matched_parameters(model, config)
        found = targets.coverage(model, [*adapted, *parameters]) if adapted or parameters else []
        routed = router.lines(model, recipe, [*adapted, *parameters])
        trainable, total, size = adapter_facts.counts(model, config, recipe)
    share = 100 * trainable / total
    facts = ModelFacts(
        name_or_path=resolved.base.said,
        licence=contract.package.licence if contract and contract.package else None,
        class_=kind,
        dtype=recipe.model.dtype,
        base=base,
        trainable=trainable,
        total=total,
        share_percent=share,
        active=active,
        attention=attention,
    )
    passed = f"\n{passed}" if passed else ""
    if config is None:
        parts = freeze.parts(model, recipe.freeze) if recipe.freeze else []
        base = model.num_parameters()  # new tokens included
        said = (
            f"trainable {trainable:,} ({share:.4f} %): {', '.join(parts)}"
            if parts
            else "all trained (full fine-tuning)"
        )
        said += "; a whole model, served as it is"
        plan.say("parameters", f"{base:,}, {said}{passed}")
        plan.lines += router.lines(model, recipe)
        return facts, None, None
    trained = f"trainable {trainable:,} ({share:.4f} %)"
    plan.say("parameters", f"base {base:,} + adapter = {total:,}; {trained}{passed}")
    if recipe.lora:
        adapter, said, faults = adapter_facts.lora(
            recipe.lora, cast(LoraConfig, config), size, adapted, adapter_facts.published(resolved.base)
        )
    else:
        assert recipe.peft, "the other methods have no PeftConfig"
        adapter, said, faults = adapter_facts.other(recipe.peft, config, size)
    plan.say("adapter", said)
    plan.warnings += faults
    plan.say("coverage", "\n".join(map(str, found)) or "no module: virtual tokens before each text")
    plan.lines += routed
    coverage = [
        CoverageFacts(kind=c.kind, layers=c.layers, adapted=list(c.adapted), left=list(c.left)) for c in found
    ]
    return facts, adapter, coverage


def _sizes(model: PreTrainedModel, recipe: Recipe) -> Sizes:
    """What the memory of several processes is computed from; `trainable` comes later."""
    layers = blocks.stack(parts.decoder(model)) or [model]
    tied: list[Any] = [
        m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    ]
    ends = {id(m.weight): m.weight.numel() for m in tied}
    width = getattr(torch, recipe.model.dtype).itemsize
    trained = width if recipe.whole else getattr(torch, recipe.model.adapter_dtype).itemsize
    return Sizes(
        0,
        max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        sum(ends.values()),
        width,
        trained,
    )


def _steps(plan: Plan, recipe: Recipe, arguments: SFTConfig, devices: int) -> None:
    rows = plan.gate.counts.rows - plan.gate.counts.dropped
    if arguments.packing:
        if plan.gate.counts.tokens is None:
            plan.say("steps", "not counted: packing needs the tokens")
            return
        packed = pack_dataset(plan.gate.train.dataset, arguments.max_length or 0, arguments.packing_strategy)
        plan.say(
            "packing",
            f"{rows:,} rows into {len(packed):,} of up to {arguments.max_length} tokens"
            f" ({arguments.packing_strategy})",
        )
        rows = len(packed)
    steps = Steps(
        rows,
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        devices,
        arguments.num_train_epochs,
        arguments.max_steps,
        arguments.warmup_steps,
        arguments.dataloader_drop_last,
    )
    raise_if(steps.problems(recipe))
    plan.facts.steps = StepFacts(
        examples=steps.examples,
        per_epoch=steps.per_epoch,
        total=steps.total,
        warmup=steps.warmup,
        devices=devices,
    )
    plan.say("steps", str(steps))
    plan.facts.batching = plan.batches.facts(plan.gate.counts.tokens, steps.per_epoch)
    plan.say("batching", batching.said(plan.facts.batching))
    kind = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    if steps.warmup and kind in ("constant", "reduce_lr_on_plateau"):
        plan.warnings.append(f"the schedule {kind} ignores train.warmup_steps: constant_with_warmup has one")
    else:
        plan.say("warm-up", steps.warmup_said)
    plan.facts.learning_rate = RateFacts(peak=arguments.learning_rate, lr_scheduler_type=kind)
    rate = _rate(recipe, arguments, steps)
    drawn = chart(rate, steps.total) if rate else []
    plan.say("schedule", "\n".join([f"{kind}, peak {arguments.learning_rate:g}", *drawn]))


def _rate(recipe: Recipe, arguments: SFTConfig, steps: Steps) -> Callable[[int], float] | None:
    """The learning rate at each step, from the scheduler that the trainer will use; None for one that follows
    a metric.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    kwargs: Any = arguments.lr_scheduler_kwargs or {}
    try:
        schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, steps.warmup, steps.total, kwargs)
    except (TypeError, ValueError, ArithmeticError) as error:
        do = "its arguments are those of transformers/optimization.py"
        raise RecipeError(
            Problem(recipe.at("train", "lr_scheduler_kwargs"), f"the schedule refuses them: {error}", do)
        ) from None
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return None
    return lambda step: arguments.learning_rate * schedule.lr_lambdas[0](step)
