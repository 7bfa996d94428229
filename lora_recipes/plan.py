"""What would be trained, computed before anything is: `make plan RECIPE=x`. No weights; no network when the recipe has a contract."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import get_scheduler
from trl import SFTConfig, pack_dataset

from lora_recipes import adapter, build, data, render, targets
from lora_recipes.messages import Problem, RecipeError, raise_if
from lora_recipes.recipe import Recipe
from lora_recipes.render import Characters, Counts, Example
from lora_recipes.run import RunFolder
from lora_recipes.steps import Steps, chart

# Share of rows (or turns) above which training stops; any share above 0 warns. A recipe's data.limits replaces them.
LIMITS = {"truncated": 0.1, "duplicates": 0.1, "train_in_eval": 0.1, "unfaithful": 1.0, "no_end_of_turn": 1.0}


@dataclass
class Plan:
    """Everything the plan found: `facts` for machines, `lines` for people, `warnings`; and what training takes over from it."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    train: list[Example] = field(default_factory=list)
    evaluation: list[Example] = field(default_factory=list)

    def say(self, label: str, text: str) -> None:
        """Add a labelled line; further lines of `text` are set under the first."""
        first, *rest = text.split("\n")
        self.lines += [f"{label:<12}{first}", *(f"{'':<12}{line}" for line in rest)]

    def __str__(self) -> str:
        return "\n".join([*self.lines, *(f"WARNING     {w}" for w in self.warnings)])


def make(recipe: Recipe, outputs: Path, devices: int = 1, network: bool = False) -> Plan:
    """The plan of `recipe` on `devices` processes. RecipeError lists all that is wrong with its targets, its data and its numbers.

    `network`: may the tokenizer be fetched? Training does; a plan only looks in the cache.
    """
    plan = Plan()
    arguments = build.sft_config(recipe, RunFolder(outputs / recipe.name))
    plan.facts |= {"recipe": recipe.name, "method": recipe.method, "overrides": list(recipe.overrides.values())}
    changed = f" with {' '.join(recipe.overrides.values())}" if recipe.overrides else ""
    plan.say("recipe", f"{recipe.name}{changed}")
    _model(plan, recipe, outputs)
    tokens = _data(plan, recipe, outputs, network)
    _steps(plan, recipe, arguments, devices, tokens)
    _example(plan, recipe, outputs, network)
    return plan


def _model(plan: Plan, recipe: Recipe, outputs: Path) -> None:
    model = build.meta_model(recipe, outputs)
    config = build.lora_config(recipe)
    problems = targets.problems(model, config, recipe) if config else []
    raise_if(problems + _packing(model, recipe))
    base = model.num_parameters()
    source = recipe.model.get("name_or_path") or recipe.model.get("from_recipe", "")
    source = "random weights" if recipe.model.get("weights") == "random" else source
    contract = build.contract_of(recipe)
    known = f", contract {contract.name}" if contract else ""
    words, why = build.precision(recipe)
    compute = next((k for k, on in words.items() if on), "float32")
    plan.say("base", f"{source}{known}: {type(model).__name__}, weights in {recipe.model['dtype']}, compute in {compute} ({why})")
    facts = {"name_or_path": source, "class": type(model).__name__, "dtype": recipe.model["dtype"], "base": base}
    if config is None:
        plan.facts["model"] = facts | {"trainable": base, "total": base, "share_percent": 100.0}
        plan.say("parameters", f"{base:,}, all trained (full fine-tuning)")
        return
    found = targets.coverage(model, targets.matched(model, config))
    trainable, total, size = _counts(model, config)
    plan.facts["model"] = facts | {"trainable": trainable, "total": total, "share_percent": 100 * trainable / total}
    plan.say("parameters", f"base {base:,} + adapter = {total:,}; trainable {trainable:,} ({100 * trainable / total:.4f} %)")
    _adapter(plan, recipe, config, size)
    plan.facts["coverage"] = [vars(c) for c in found]
    plan.say("coverage", "\n".join(map(str, found)))


def _counts(model: torch.nn.Module, config: LoraConfig) -> tuple[int, int, int]:
    """Trainable and total parameters as PEFT counts them, and the bytes of the adapter's tensors. `model` (meta) gets the adapter."""
    try:
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(Problem("lora", f"PEFT refuses it on this model: {error}")) from None
    trainable, total = peft_model.get_nb_trainable_parameters()
    state = get_peft_model_state_dict(peft_model)
    return trainable, total, sum(t.numel() * t.element_size() for t in state.values())


def _adapter(plan: Plan, recipe: Recipe, config: LoraConfig, size: int) -> None:
    rank = adapter.rank(recipe.lora)
    served = adapter.max_lora_rank(rank)
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    plan.facts["adapter"] = {"r": config.r, "scaling": scaling, "bytes": size, "rank": rank, "max_lora_rank": served}
    serving = f"vLLM needs --max-lora-rank {served}" if served else "vLLM cannot serve it"
    plan.say("adapter", f"r {config.r}, alpha {config.lora_alpha}, scaling {scaling:g}; {size:,} bytes of tensors; {serving}")
    if served is None:
        plan.warnings.append(f"rank {rank} is above {max(adapter.MAX_LORA_RANKS)}, the largest that vLLM serves: it can only be merged")


def _packing(model: torch.nn.Module, recipe: Recipe) -> list[Problem]:
    train = recipe.train
    bfd = train.get("packing") and train.get("packing_strategy", "bfd") != "wrapped"
    types = getattr(model.config.get_text_config(), "layer_types", None) or []  # type: ignore[union-attr, operator]
    if not ((bfd or train.get("padding_free")) and "linear_attention" in types) or importlib.util.find_spec("causal_conv1d"):
        return []
    do = "install causal-conv1d (CUDA), or set train.packing: false; packing_strategy: wrapped runs, but lets rows see each other"
    key = "packing" if bfd else "padding_free"
    return [Problem(recipe.at("train", key), "linear-attention layers cannot keep packed rows apart without causal-conv1d", do)]


def _tokenizer(recipe: Recipe, outputs: Path, network: bool) -> Any:
    """The tokenizer, or characters under the contract's chat template when it is neither cached nor to be fetched."""
    contract = build.contract_of(recipe)
    try:
        return build.tokenizer(recipe, outputs, local_files_only=bool(contract) and not network)
    except RecipeError:
        if contract is None or network:
            raise
        return build.characters(recipe)


def _data(plan: Plan, recipe: Recipe, outputs: Path, network: bool) -> Counts:
    splits = {which: data.read(recipe, which) for which in ("train", "eval")}
    if recipe.data.get("rows") == "assistant_turn":
        splits = {which: data.by_assistant_turn(split) for which, split in splits.items()}
    tokenizer = _tokenizer(recipe, outputs, network)
    plan.train = render.examples(splits["train"], tokenizer, recipe)
    plan.evaluation = render.examples(splits["eval"], tokenizer, recipe)
    counts = render.counts(plan.train, tokenizer, recipe)
    train, other = splits["train"], splits["eval"]
    twice, both = train.duplicates, data.in_both(train, other)
    plan.facts["data"] = {
        "train": vars(counts) | {"format": train.rows[0].format, "sha256": train.sha256, "duplicates": len(twice)},
        "eval": vars(render.counts(plan.evaluation, tokenizer, recipe)) | {"sha256": other.sha256, "train_in_eval": len(both)},
    }
    plan.say("data", f"train {counts.rows:,} rows ({train.rows[0].format}), eval {len(other.rows):,} rows")
    if counts.tokens is None:
        name = recipe.model.get("name_or_path")
        plan.say("tokens", f"not counted: the tokenizer of {name} is not in the cache and a plan fetches nothing (training counts them)")
    else:
        share = 100 * (counts.supervised or 0) / max(counts.tokens, 1)
        plan.say("tokens", f"{counts.tokens:,} in train, {counts.supervised:,} supervised ({share:.1f} %), longest row {counts.longest:,}")
    if counts.turns:
        share = 100 * counts.faithful / counts.turns
        plan.say("turns", f"{counts.faithful:,} of {counts.turns:,} trained turns stand after the prompt a server renders ({share:.1f} %)")
    if kwargs := recipe.data.get("chat_template_kwargs"):
        plan.say("serve with", f"chat_template_kwargs {kwargs}, as trained")
    plan.lines += [f"{'note':<12}{note}" for split in splits.values() for note in split.notes]
    shares = {name: counts.share(name) for name in ("truncated", "unfaithful", "no_end_of_turn")}
    shares |= {"duplicates": len(twice) / counts.rows, "train_in_eval": len(both) / max(len(other.rows), 1)}
    where = {"duplicates": twice[0].where if twice else "", "train_in_eval": both[0].where if both else ""}
    _limits(plan, recipe, shares, where)
    if counts.dropped:
        plan.warnings.append(f"{counts.dropped} rows are dropped: after truncation nothing in them is trained (raise train.max_length)")
    return counts


def _limits(plan: Plan, recipe: Recipe, shares: dict[str, float], where: dict[str, str]) -> None:
    said = {
        "truncated": ("of the rows are cut at train.max_length", "raise train.max_length, or shorten the rows"),
        "duplicates": ("of the rows are exact duplicates", "remove them"),
        "train_in_eval": ("of the eval rows stand in train too", "split anew; the eval loss would flatter"),
        "unfaithful": ("of the trained turns stand after tokens that no server renders", "set data.rows: assistant_turn"),
        "no_end_of_turn": (
            "of the trained turns are not trained to stop (no end-of-turn token)",
            "check tokenizer.eos_token and truncation",
        ),
    }
    limits, problems = LIMITS | recipe.data.get("limits", {}), []
    for name, share in shares.items():
        text = f"{100 * share:.1f} % {said[name][0]}" + (f", first {where[name]}" if where.get(name) else "")
        if share > limits[name]:
            do = f"{said[name][1]}; or raise data.limits.{name} (now {limits[name]:g})"
            problems.append(Problem(recipe.at("data", "limits", name), text, do))
        elif share > 0:
            plan.warnings.append(f"{text}: {said[name][1]}")
    raise_if(problems)


def _steps(plan: Plan, recipe: Recipe, arguments: SFTConfig, devices: int, counts: Counts) -> None:
    rows = counts.rows - counts.dropped
    if arguments.packing:
        if counts.tokens is None:
            plan.say("steps", "not counted: packing needs the tokens")
            return
        packed = pack_dataset(build.dataset(plan.train), arguments.max_length, arguments.packing_strategy)
        plan.say("packing", f"{rows:,} rows into {len(packed):,} of up to {arguments.max_length} tokens ({arguments.packing_strategy})")
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
    plan.facts["steps"] = {
        "examples": steps.examples,
        "per_epoch": steps.per_epoch,
        "total": steps.total,
        "warmup": steps.warmup,
        "devices": devices,
    }
    plan.say("steps", str(steps))
    share = f"ceil({steps.total} x {arguments.warmup_steps:g}) = " if 0 < arguments.warmup_steps < 1 else ""
    plan.say("warm-up", f"{share}{steps.warmup} steps")
    kind = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    plan.facts["learning_rate"] = {"peak": arguments.learning_rate, "lr_scheduler_type": kind}
    plan.say("schedule", f"{kind}, peak {arguments.learning_rate:g}")
    if rate := _rate(arguments, steps):
        plan.lines += chart(rate, steps.total)


def _rate(arguments: SFTConfig, steps: Steps) -> Callable[[int], float] | None:
    """The learning rate at each step, from the scheduler that the trainer will use; None for one that follows a metric."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    kwargs = arguments.lr_scheduler_kwargs or {}
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, steps.warmup, steps.total, kwargs)
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return None
    return lambda step: arguments.learning_rate * schedule.lr_lambdas[0](step)


def _example(plan: Plan, recipe: Recipe, outputs: Path, network: bool) -> None:
    tokenizer = _tokenizer(recipe, outputs, network)
    first = min(plan.train[:50], key=lambda e: len(e.input_ids))
    unit = "characters shown, not tokens" if isinstance(tokenizer, Characters) else "trained between >> and <<"
    plan.say("example", f"{first.where} ({unit})\n{render.shown(first, tokenizer, recipe).strip()}")
