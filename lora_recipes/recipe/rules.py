"""What does not go together: keys, methods and layouts, each row with the reason and the remedy.

One table, `RULES`. Loading a recipe applies the rows that are `early`, a plan all of them; docs/rules.md is
written from it. What a single key may hold is the schema's; what a model has is seen by planning. No torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem
from lora_recipes.recipe import check
from lora_recipes.recipe.layout import DDP, FSDP2, ONE, SINGLE, ZERO2, ZERO3, Layout
from lora_recipes.recipe.recipe import METHODS, MUTATE, Recipe, initialisation

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
DEPTHS = ("last", "middle", "early", "embeddings")
KINDS = (ONE, DDP, FSDP2, ZERO2, ZERO3)


@dataclass(frozen=True)
class Facts:
    """What rules need to know beside the recipe.

    `layout`: where it will run. Of the model: has any module a bias, has it linear-attention layers, and has
    its attention a form for torch's scaled_dot_product_attention (sdpa); `causal_conv1d`: is that package
    here; `plain_optimizer`: does train.optim take parameter groups. `warm`: the recipe of
    warm_start.from_recipe, and `same_base`: is its base this recipe's? `doubtful`: sections with a fault
    that is told already, "" being the file as a whole."""

    layout: Layout = SINGLE
    has_bias: bool = True
    linear_attention: bool = False
    has_sdpa: bool = True
    causal_conv1d: bool = True
    plain_optimizer: bool = True
    warm: Recipe | None = None
    same_base: bool = True
    doubtful: frozenset[str] = frozenset()


Words = dict[str, Any]  # what {names} in a rule's texts stand for, besides {method} and {layout}
Broken = Callable[[Recipe, Facts], "Words | bool | None"]


@dataclass(frozen=True)
class Rule:
    """`key` does not go with `against`, because of `found`; `do` says what helps. The texts may hold {names}.

    `broken` says whether a recipe breaks it, or what the names stand for where it does. `early`: is the
    recipe alone enough to know, and everything else in vain until it is mended? `sections`: those that it
    reads: not asked while one of them has a fault of its own."""

    key: str
    against: str
    found: str
    do: str
    broken: Broken = field(repr=False)
    early: bool = False
    sections: tuple[str, ...] = ()


def at_load(recipe: Recipe, doubtful: set[str | int]) -> list[Problem]:
    """The early rules. `doubtful`: the sections with a fault already told, "" being the file as a whole: what
    seems to be missing there may be misspelled.
    """
    facts = Facts(doubtful=frozenset(map(str, doubtful)))
    rules = [r for r in RULES if r.early and not ({"", *r.sections} & facts.doubtful and r.sections)]
    return list(_problems(rules, recipe, facts))


def problems(recipe: Recipe, facts: Facts) -> list[Problem]:
    """Every other rule that `recipe` breaks."""
    return list(_problems([r for r in RULES if not r.early], recipe, facts))


def of_layout(recipe: Recipe, layout: Layout) -> list[Problem]:
    """The rules about several processes: known before a library is asked, which would say it otherwise."""
    return list(_problems(_LAYOUT, recipe, Facts(layout)))


def _problems(rules: list[Rule], recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    for rule in rules:
        if broken := rule.broken(recipe, facts):
            words = {
                "method": next((m for m in METHODS if m in recipe.sections), ""),
                "layout": facts.layout.kind,
            }
            words |= broken if isinstance(broken, dict) else {}
            key = rule.key.format(**words)
            where = cli.command(**{key: ""}) if key.isupper() else recipe.at(*filter(None, key.split(".")))
            yield Problem(where, rule.found.format(**words), rule.do.format(**words))


# ---- which method, which base, what is evaluated


def _methods(recipe: Recipe, facts: Facts) -> Words | None:
    methods = [m for m in METHODS if m in recipe.sections]
    misspelled = facts.doubtful - set(check.schema()["properties"])
    if len(methods) == 1 or (misspelled and not methods):
        return None
    both = f"both {' and '.join(f'{m}:' for m in methods)} are given"
    return {"what": both if methods else "no method section", "last": methods[-1] if methods else ""}


def _bases(recipe: Recipe, facts: Facts) -> Words | None:
    model = recipe.model
    sources = [key for key in (model.name_or_path, model.from_recipe) if key]
    if model.weights == "random" or len(sources) == 1:
        return None
    return {"what": "name_or_path and from_recipe exclude each other" if sources else "no base model"}


def _evaluates(recipe: Recipe) -> bool:
    return recipe.train.eval_strategy != "no"


_EVALUATION = ("data", "train", "early_stopping")
_FIRST = [
    Rule(
        "{last}",
        "another method section, or none",
        "{what}",
        "exactly one of lora:, peft: (other adapters), freeze: (the last blocks), full: (every weight)",
        _methods,
        early=True,
    ),
    Rule(
        "model",
        "name_or_path with from_recipe, or neither",
        "{what}",
        "one of name_or_path, from_recipe, or weights: random with a contract",
        _bases,
        early=True,
        sections=("model",),
    ),
    Rule(
        "model.weights",
        "random without model.contract",
        "random weights need model.contract",
        "name one of configs/models/",
        lambda r, f: r.model.weights == "random" and not r.model.contract,
        early=True,
        sections=("model",),
    ),
    Rule(
        "model.from_recipe",
        "model.weights: random",
        "random weights and from_recipe exclude each other",
        "keep one",
        lambda r, f: r.model.weights == "random" and bool(r.model.from_recipe),
        early=True,
        sections=("model",),
    ),
    Rule(
        "train.eval_strategy",
        "no data.eval",
        "there is nothing to evaluate on",
        "set data.eval, or eval_strategy: 'no'",
        lambda r, f: _evaluates(r) and not r.data.eval,
        early=True,
        sections=_EVALUATION,
    ),
    Rule(
        "early_stopping",
        "no data.eval",
        "early stopping needs data.eval",
        "name an eval file or remove the section",
        lambda r, f: r.early_stopping is not None and not r.data.eval,
        early=True,
        sections=_EVALUATION,
    ),
    Rule(
        "train.eval_strategy",
        "early_stopping: and eval_strategy: 'no'",
        "early stopping needs eval_strategy",
        "steps or epoch",
        lambda r, f: r.early_stopping is not None and not _evaluates(r),
        early=True,
        sections=_EVALUATION,
    ),
    Rule(
        "train.save_strategy",
        "early_stopping: and save_strategy: 'no'",
        "early stopping needs save_strategy",
        "steps, epoch or best",
        lambda r, f: r.early_stopping is not None and r.train.save_strategy == "no",
        early=True,
        sections=_EVALUATION,
    ),
]


# ---- lora: what would not do here what the field says Run on the tiny model: lora_ga and use_qalora trained
# ordinary LoRA; layer_replication and aLoRA failed later. The rest is from PEFT's own description of the
# field. What the initialisations need is done in model/initialise.py, where it can be.

_NOT_HERE = {
    "use_qalora": "has no effect on a base that is not quantised by GPTQ",
    "alora_invocation_tokens": "is active only after its tokens; the rows would have to hold them",
    "layer_replication": "changes the depth of the base; the probes and the server have the old one",
    "use_bdlora": "is for sharded serving; no server here takes it",
    "arrow_config": "routes between adapters that are trained already",
    "ensure_weight_tying": (
        "gives another number of trained parameters than PEFT's own count on a model without weights"
    ),
    "megatron_config": "needs Megatron-LM",
}
# What PEFT's conversion for the untouched base drops or gets wrong (lora/model.py, subtract_mutated_init: it
# keeps lora_A and lora_B).
_NOT_CONVERTED = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)
_INIT = "lora.init_lora_weights"
_TAKEN = "init_lora_weights: pissa, olora or corda"


def _given(field: str) -> Broken:
    return lambda r, f: r.lora is not None and bool(getattr(r.lora, field))


def _mutates(recipe: Recipe) -> str:
    """The initialisation, where it takes A and B out of the base."""
    found = initialisation(recipe.lora)
    return found if found in MUTATE else ""


def _mutated(broken: Callable[[Recipe], bool]) -> Broken:
    return lambda r, f: {"kind": _mutates(r)} if _mutates(r) and broken(r) else None


def _lora_field(field: str) -> Callable[[Recipe], bool]:
    return lambda r: r.lora is not None and bool(getattr(r.lora, field))


def _beside_new_tokens(broken: Callable[[Recipe], bool]) -> Broken:
    return lambda r, f: bool(r.model.new_tokens) and broken(r)


_LORA = [
    *(
        Rule(f"lora.{name}", "this launcher", why, "remove it", _given(name))
        for name, why in _NOT_HERE.items()
    ),
    Rule(
        "lora.task_type",
        "anything but CAUSAL_LM",
        "{task}: SFTTrainer trains causal language models",
        "write CAUSAL_LM, or remove it",
        lambda r, f: (
            {"task": r.lora.task_type}
            if r.lora and "task_type" in r.lora.given and r.lora.task_type != "CAUSAL_LM"
            else None
        ),
    ),
    Rule(
        "lora.bias",
        "a model without biases",
        "no module of this model has a bias: nothing more would be trained",
        "write none",
        lambda r, f: r.lora is not None and r.lora.bias != "none" and not f.has_bias,
    ),
    Rule(
        _INIT,
        "lora_ga",
        "lora_ga is computed from gradients before training, which this launcher does not do: it would be"
        " ordinary LoRA",
        "use eva, pissa, true, gaussian or orthogonal",
        lambda r, f: initialisation(r.lora) == "lora_ga",
    ),
    Rule(
        _INIT,
        "model.quantize",
        "{kind} takes its part out of whole weights, not out of 4-bit ones",
        "loftq is made for it; or remove model.quantize",
        _mutated(lambda r: r.model.quantize is not None),
    ),
    Rule(
        "model.new_tokens",
        _TAKEN,
        "are lost when a {kind} adapter is saved for the untouched base",
        "remove one",
        _mutated(lambda r: bool(r.model.new_tokens)),
    ),
    *(
        Rule(
            f"lora.{name}",
            _TAKEN,
            "is lost when a {kind} adapter is saved for the untouched base",
            "remove one of the two",
            _mutated(_lora_field(name)),
        )
        for name in _NOT_CONVERTED
    ),
    Rule(
        "model.adapter_dtype",
        _TAKEN,
        "{kind} takes A and B out of the base; rounded, they are not its part",
        "remove it: float32",
        _mutated(lambda r: r.model.adapter_dtype != "float32"),
    ),
    Rule(
        _INIT,
        "eva with eva_config.rho above 1",
        "with rho above 1 (PEFT's default is 2) EVA chooses each module's rank from the data: nothing to plan"
        " with",
        "write eva_config: {{rho: 1.0}}",
        lambda r, f: (
            r.lora is not None
            and initialisation(r.lora) == "eva"
            and (r.lora.eva_config or {}).get("rho", 2.0) != 1
        ),
    ),
    Rule(
        _INIT,
        "loftq without model.quantize",
        "without it PEFT replaces the base by a rounded copy, which the adapter would need ever after",
        "set model.quantize: nf4",
        lambda r, f: initialisation(r.lora) == "loftq" and r.model.quantize is None,
    ),
    Rule(
        "lora.loftq_config",
        "init_lora_weights: loftq",
        "A and B are the SVD of what NF4 rounded away: one step, 4 bits",
        "remove it",
        lambda r, f: (
            r.lora is not None
            and initialisation(r.lora) == "loftq"
            and r.model.quantize is not None
            and bool(r.lora.loftq_config)
        ),
    ),
]


# ---- peft: each was run on the tiny models; prefix tuning with checkpointing and on linear attention stops
# in ---- the first step


def _peft(broken: Callable[[Recipe, Facts, str], bool]) -> Broken:
    return lambda r, f: (
        {"kind": r.peft.peft_type} if r.peft is not None and broken(r, f, r.peft.peft_type) else None
    )


_PEFT = [
    Rule(
        "model.quantize",
        "peft:",
        "{kind} on a 4-bit base is not tried here",
        "write lora:, or remove it",
        _peft(lambda r, f, kind: r.model.quantize is not None),
    ),
    Rule(
        "train.packing",
        "PROMPT_TUNING, P_TUNING, PREFIX_TUNING",
        "virtual tokens stand once before a packed row, not before each text in it",
        "set train.packing: false",
        _peft(lambda r, f, kind: kind in PROMPTS and (r.train.packing or r.train.padding_free)),
    ),
    Rule(
        "train.gradient_checkpointing",
        "PREFIX_TUNING",
        "the second forward pass would see the prefix twice",
        "set train.gradient_checkpointing: false",
        _peft(lambda r, f, kind: kind == "PREFIX_TUNING" and r.train.gradient_checkpointing),
    ),
    Rule(
        "peft.peft_type",
        "PREFIX_TUNING on linear attention",
        "linear-attention layers have no keys and values to put a prefix before",
        "PROMPT_TUNING, P_TUNING or lora:",
        _peft(lambda r, f, kind: kind == "PREFIX_TUNING" and f.linear_attention),
    ),
    Rule(
        "train.save_strategy",
        "ADALORA",
        "a checkpoint holds no importance scores: a resumed run would allocate other ranks",
        "set train.save_strategy: 'no'",
        _peft(lambda r, f, kind: kind == "ADALORA" and r.train.save_strategy != "no"),
    ),
]


# ---- the base itself; new tokens; packing


def _twice(recipe: Recipe, facts: Facts) -> Words | None:
    new = recipe.model.new_tokens
    twice = sorted({token for token in new if new.count(token) > 1})
    return {"tokens": ", ".join(map(repr, twice))} if twice else None


def _bfd(recipe: Recipe) -> bool:
    """Are rows packed so that they are kept apart?"""
    return recipe.train.packing and recipe.train.packing_strategy != "wrapped"


_APART = "linear-attention layers cannot keep packed rows apart without causal-conv1d"
_INSTALL = (
    "install causal-conv1d (CUDA), or set train.packing: false; packing_strategy: wrapped runs, but lets"
    " rows see each other"
)
_BASE = [
    Rule(
        "model.quantize",
        "full: and freeze:",
        "4-bit weights are frozen, {method}: trains them",
        "remove it, or write lora:",
        lambda r, f: r.whole and r.model.quantize is not None,
    ),
    Rule(
        "train.packing",
        "linear attention without causal-conv1d",
        _APART,
        _INSTALL,
        lambda r, f: _bfd(r) and f.linear_attention and not f.causal_conv1d,
    ),
    Rule(
        "train.padding_free",
        "linear attention without causal-conv1d",
        _APART,
        _INSTALL,
        lambda r, f: r.train.padding_free and not _bfd(r) and f.linear_attention and not f.causal_conv1d,
    ),
    Rule(
        "train.max_length",
        "packing with max_length: null",
        "packing needs a length to pack to",
        "give a number",
        lambda r, f: r.train.packing and r.train.max_length is None,
    ),
    Rule(
        "model.attn_implementation",
        "sdpa for a model without it",
        "transformers has no sdpa for this model: its attention does more than that function can",
        "remove it (transformers then takes eager), or write eager",
        lambda r, f: r.model.attn_implementation == "sdpa" and not f.has_sdpa,
    ),
    Rule("model.new_tokens", "one token twice", "{tokens} is listed twice", "keep one", _twice),
    Rule(
        "model.new_tokens",
        "peft:",
        "peft: does not train new embeddings",
        "write lora:, full:, or freeze: with embeddings: true",
        lambda r, f: bool(r.model.new_tokens) and r.method == "peft",
    ),
    Rule(
        "model.new_tokens",
        "freeze: without embeddings",
        "the embeddings are frozen: new ones would stay noise",
        "set freeze.embeddings: true",
        lambda r, f: bool(r.model.new_tokens) and r.freeze is not None and not r.freeze.embeddings,
    ),
    Rule(
        "model.new_tokens",
        "model.quantize",
        "new tokens on a 4-bit base are not tried here",
        "remove model.quantize",
        lambda r, f: bool(r.model.new_tokens) and r.model.quantize is not None,
    ),
    *(
        Rule(
            f"lora.{name}",
            "model.new_tokens",
            "new_tokens chooses the rows that are trained",
            "remove one of the two",
            _beside_new_tokens(_lora_field(name)),
        )
        for name in ("trainable_token_indices", "modules_to_save")
    ),
]


# ---- learning_rates:


def _depths(recipe: Recipe) -> list[str]:
    return [d for d in DEPTHS if recipe.learning_rates and d in recipe.learning_rates.given]


def _ratio(recipe: Recipe) -> bool:
    return recipe.learning_rates is not None and recipe.learning_rates.loraplus_lr_ratio is not None


def _one_kind(recipe: Recipe) -> bool:
    """Does `learning_rates:` say either a ratio or rates by depth?"""
    return recipe.learning_rates is not None and _ratio(recipe) != bool(_depths(recipe))


def _some_depths(recipe: Recipe, facts: Facts) -> Words | None:
    found = _depths(recipe)
    return {"depths": ", ".join(found)} if _one_kind(recipe) and 0 < len(found) < len(DEPTHS) else None


def _other_rate(recipe: Recipe, facts: Facts) -> Words | None:
    if not (_one_kind(recipe) and len(_depths(recipe)) == len(DEPTHS)) or recipe.learning_rates is None:
        return None
    rate, last = recipe.train.learning_rate, recipe.learning_rates.last
    return {"rate": rate, "last": last} if rate != last else None


_RATES = [
    Rule(
        "learning_rates",
        "both kinds, or none",
        "either loraplus_lr_ratio or rates by depth",
        f"one of the two; by depth all of {', '.join(DEPTHS)}",
        lambda r, f: r.learning_rates is not None and not _one_kind(r),
    ),
    Rule(
        "learning_rates.loraplus_lr_ratio",
        "peft:, freeze: and full:",
        "{method}: has no A and B",
        "write lora:, or remove it",
        lambda r, f: _one_kind(r) and _ratio(r) and r.method != "lora",
    ),
    Rule(
        "learning_rates",
        "rates by depth under lora: and peft:",
        "rates by depth are for full: and freeze:, not {method}:",
        "remove it, or loraplus_lr_ratio",
        lambda r, f: _one_kind(r) and bool(_depths(r)) and not r.whole,
    ),
    Rule(
        "learning_rates",
        "some depths without the others",
        "only {depths}",
        f"say all of {', '.join(DEPTHS)}",
        _some_depths,
    ),
    Rule(
        "train.learning_rate",
        "another learning_rates.last",
        "{rate:g} is not learning_rates.last, {last:g}",
        "write the same: the rates by depth are what is used",
        _other_rate,
    ),
    Rule(
        "train.optim",
        "learning_rates: with an optimizer that sorts the parameters",
        "{optim} sorts the parameters itself",
        "adamw_torch, or another plain optimizer",
        lambda r, f: (
            {"optim": r.train.optim}
            if _one_kind(r) and (r.train.optim_target_modules or not f.plain_optimizer)
            else None
        ),
    ),
]


# ---- warm_start:


def _warm(broken: Broken) -> Broken:
    def found(recipe: Recipe, facts: Facts) -> Words | bool:
        if recipe.warm_start is None or recipe.lora is None or not broken(recipe, facts):
            return False
        other = facts.warm
        return {"name": other.name, "file": other.path.name} if other else True

    return found


_WARM = [
    Rule(
        "warm_start",
        "peft:, freeze: and full:",
        "{method}: has no A and B to begin with",
        "write lora:, or remove it",
        lambda r, f: r.warm_start is not None and r.lora is None,
    ),
    *(
        Rule(
            f"lora.{name}",
            "warm_start:",
            "A and B come from warm_start:",
            "remove one of the two",
            _warm(own),
        )
        for name, own in (
            ("use_dora", _given("use_dora")),
            ("init_lora_weights", lambda r, f: r.lora is not None and r.lora.init_lora_weights is not True),
            ("target_parameters", _given("target_parameters")),
        )
    ),
    Rule(
        "warm_start.from_recipe",
        "model.quantize",
        "the update of a 4-bit base is not defined here",
        "remove model.quantize",
        _warm(lambda r, f: r.model.quantize is not None),
    ),
    Rule(
        "warm_start.from_recipe",
        "a recipe that trains an adapter",
        "{name} trains an adapter: there is no full update",
        "name a full: or freeze: recipe",
        _warm(lambda r, f: f.warm is not None and not f.warm.whole),
    ),
    Rule(
        "warm_start.from_recipe",
        "a recipe on another base",
        "{name} was trained on another base",
        "the same model: in both ({file})",
        _warm(lambda r, f: f.warm is not None and f.warm.whole and not f.same_base),
    ),
]


# ---- several processes: FSDP2 and DeepSpeed hold parameters where PEFT and this project do not look for them


def _several(broken: Callable[[Recipe], bool]) -> Broken:
    return lambda r, f: f.layout.kind != ONE and broken(r)


def _under(kinds: tuple[str, ...], broken: Callable[[Recipe], bool]) -> Broken:
    return lambda r, f: f.layout.kind in kinds and broken(r)


_DIVIDED = (FSDP2, ZERO2, ZERO3)
_NOT_SHOWN = "was not shown to work in several processes ({layout})"
_DDP = cli.command(ACCELERATE="ddp")
_SMALL = f"{_DDP} (4-bit weights are small), or remove quantize"


def _quantised(recipe: Recipe) -> bool:
    return recipe.model.quantize is not None


def _deepspeed_dtype(recipe: Recipe, facts: Facts) -> Words | None:
    dtype = recipe.model.dtype
    if facts.layout.kind not in (ZERO2, ZERO3) or recipe.method != "lora" or dtype == "float32":
        return None
    return {"dtype": dtype} if recipe.model.adapter_dtype != dtype else None


def _initialised(recipe: Recipe, facts: Facts) -> Words | None:
    if facts.layout.kind not in _DIVIDED or recipe.lora is None or recipe.lora.init_lora_weights is True:
        return None
    return {"init": recipe.lora.init_lora_weights}


def _trains_with(field: str) -> Broken:
    return lambda r, f: bool(getattr(r.train, field))


_LAYOUT = [
    *(
        Rule(
            f"train.{name}",
            "any recipe",
            "where to train is no part of a recipe",
            f"remove it: {cli.command('train', ACCELERATE='name')}, a file of configs/accelerate/",
            _trains_with(name),
        )
        for name in ("fsdp", "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config")
    ),
    Rule(
        "ACCELERATE",
        "other layouts",
        "{layout} was not shown to work here",
        f"one of {', '.join(KINDS[1:])}",
        lambda r, f: f.layout.kind not in KINDS,
    ),
    Rule(
        "warm_start",
        "several processes",
        f"warm_start {_NOT_SHOWN}",
        "train in one process",
        _several(lambda r: r.warm_start is not None),
    ),
    Rule(
        "model.new_tokens",
        "several processes",
        f"new_tokens {_NOT_SHOWN}",
        "train in one process",
        _several(lambda r: bool(r.model.new_tokens)),
    ),
    Rule(
        _INIT,
        "loftq in several processes",
        f"init_lora_weights {_NOT_SHOWN}",
        "train in one process",
        _several(lambda r: initialisation(r.lora) == "loftq"),
    ),
    Rule(
        "model.quantize",
        FSDP2,
        "FSDP2 leaves 4-bit weights of integer storage whole on each device (accelerate 1.15,"
        " fsdp2_prepare_model)",
        _SMALL,
        _under((FSDP2,), _quantised),
    ),
    Rule(
        "model.quantize",
        ZERO3,
        "ZeRO-3 would cut the packed 4-bit weights apart from their scales (bitsandbytes stores them as"
        " uint8)",
        _SMALL,
        _under((ZERO3,), _quantised),
    ),
    Rule(
        "model.quantize",
        ZERO2,
        "NF4 under {layout} was not shown to work here",
        _DDP,
        _under((ZERO2,), _quantised),
    ),
    Rule(
        "{method}",
        "peft: and freeze: under FSDP2, ZeRO-2 and ZeRO-3; full: under FSDP2 and ZeRO-3",
        "{method}: under {layout} was not shown to work here",
        _DDP,
        lambda r, f: (
            f.layout.kind in _DIVIDED
            and (r.method not in ("lora", "full") or (r.method == "full" and f.layout.sharded))
        ),
    ),
    *(
        Rule(
            f"lora.{name}",
            "FSDP2, ZeRO-2 and ZeRO-3",
            f"{name} under {{layout}} was not shown to work here",
            _DDP,
            _under(_DIVIDED, _lora_field(name)),
        )
        for name in ("use_dora", "modules_to_save", "trainable_token_indices")
    ),
    Rule(
        _INIT,
        "a word, under FSDP2, ZeRO-2 and ZeRO-3",
        "an initialisation by {init} under {layout} was not shown to work here",
        _DDP,
        _initialised,
    ),
    Rule(
        "model.adapter_dtype",
        "another model.dtype, under ZeRO-2 and ZeRO-3",
        "DeepSpeed trains the adapter in the base's {dtype} (its optimiser keeps float32 copies), not in"
        " float32",
        f"set model.adapter_dtype={{dtype}}, or {_DDP}",
        _deepspeed_dtype,
    ),
    Rule(
        "learning_rates",
        "FSDP2, ZeRO-2 and ZeRO-3",
        "learning_rates: under {layout} was not shown to work here",
        _DDP,
        _under(_DIVIDED, lambda r: r.learning_rates is not None),
    ),
]

RULES: tuple[Rule, ...] = (*_FIRST, *_LORA, *_PEFT, *_BASE, *_RATES, *_WARM, *_LAYOUT)
