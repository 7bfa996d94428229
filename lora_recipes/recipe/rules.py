"""What does not go together: keys, methods and layouts, each row with the reason and the remedy.

One table, `RULES`. Loading a recipe applies the rows that are `early`, a plan all of them; docs/rules.md is
written from it. What a single key may hold is the schema's; what a model has is seen by planning. No torch.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, nearest
from lora_recipes.recipe import check
from lora_recipes.recipe.layout import DDP, FSDP2, ONE, SINGLE, ZERO2, ZERO3, Layout
from lora_recipes.recipe.recipe import METHODS, MUTATE, Recipe, initialisation
from lora_recipes.recipe.sections import Train

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
DEPTHS = ("last", "middle", "early", "embeddings")
KINDS = (ONE, DDP, FSDP2, ZERO2, ZERO3)


@dataclass(frozen=True)
class Facts:
    """What rules need to know beside the recipe.

    `layout`: where it will run. Of the model: has any module a bias, has it linear-attention layers, and
    what transformers says against model.attn_implementation, of its class and of this machine;
    `causal_conv1d`, `bitsandbytes`: is that package here; `plain_optimizer`: does train.optim take parameter
    groups. `warm`: the recipe of warm_start.from_recipe, and `same_base`: is its base this recipe's?
    `doubtful`: sections with a fault that is told already, "" being the file as a whole.

    Of the libraries: what they say against train.optim, train.report_to and train.use_liger_kernel on this
    machine ("": nothing), and `ignored`, the keys that this optimizer does not read. Of the model: has it
    router logits (experts), has it a Conv1D of GPT-2's kind? `accelerator`: has this machine one?
    `foreign`: its kind where it is not CUDA's (mps, xpu). `steps`, `per_epoch`, `warmup`: optimizer steps,
    once they are counted."""

    layout: Layout = SINGLE
    has_bias: bool = True
    linear_attention: bool = False
    attention: tuple[str, str] = ("", "")
    causal_conv1d: bool = True
    plain_optimizer: bool = True
    bitsandbytes: bool = True
    warm: Recipe | None = None
    same_base: bool = True
    doubtful: frozenset[str] = frozenset()
    optimizer: str = ""
    reporting: str = ""
    liger: str = ""
    ignored: tuple[str, ...] = ()
    router: bool = True
    conv1d: bool = True
    accelerator: bool = True
    foreign: str = ""
    steps: int | None = None
    per_epoch: int = 1
    warmup: int = 0


Words = dict[str, Any]  # what {names} in a rule's texts stand for, besides {method} and {layout}
Broken = Callable[[Recipe, Facts], "Words | bool | None"]


@dataclass(frozen=True)
class Rule:
    """`key` does not go with `against`, because of `found`; `do` says what helps. The texts may hold {names}.

    `broken` says whether a recipe breaks it, or what the names stand for where it does. `early`: is the
    recipe alone enough to know, and everything else in vain until it is mended? `sections`: those that it
    reads: not asked while one of them has a fault of its own. `counted`: is it asked once the steps are
    counted? `warns`: does the run go on, and the plan says it? `here`: is it about the device that is
    there, so that a plan warns of it and training refuses it?"""

    key: str
    against: str
    found: str
    do: str
    broken: Broken = field(repr=False)
    early: bool = False
    sections: tuple[str, ...] = ()
    counted: bool = False
    warns: bool = False
    here: bool = False


def at_load(recipe: Recipe, doubtful: set[str | int]) -> list[Problem]:
    """The early rules. `doubtful`: the sections with a fault already told, "" being the file as a whole: what
    seems to be missing there may be misspelled.
    """
    facts = Facts(doubtful=frozenset(map(str, doubtful)))
    rules = [r for r in RULES if r.early and not ({"", *r.sections} & facts.doubtful and r.sections)]
    return list(_problems(rules, recipe, facts))


def problems(recipe: Recipe, facts: Facts) -> list[Problem]:
    """Every other rule that `recipe` breaks: those about the number of steps where `facts` has it, else the
    rest.
    """
    return list(_problems(_asked(facts, warns=False), recipe, facts))


def warnings(recipe: Recipe, facts: Facts) -> list[str]:
    """What goes on, but hardly as it was meant: asked as `problems` is, a line for each."""
    found = _problems(_asked(facts, warns=True), recipe, facts)
    return [f"{problem.where}: {problem.found}; {problem.do}" for problem in found]


def on_device(recipe: Recipe, facts: Facts) -> list[Problem]:
    """What would fail on the device that is there, where it is trained."""
    return list(_problems([r for r in RULES if r.here], recipe, facts))


def _asked(facts: Facts, warns: bool) -> list["Rule"]:
    counted = facts.steps is not None
    return [r for r in RULES if not r.early and r.warns == warns and r.counted == counted]


def of_layout(recipe: Recipe, layout: Layout) -> list[Problem]:
    """The rules about several processes: known before a library is asked, which would say it otherwise."""
    rules = [*_LAYOUT, _CLASSIFY[-1]]
    return list(_problems(rules, recipe, Facts(layout)))


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
    if model.weights != "pretrained" or len(sources) == 1:
        return None
    return {"what": "name_or_path and from_recipe exclude each other" if sources else "no base model"}


def held_out(recipe: Recipe) -> bool:
    """Is there anything to evaluate on: data.eval, or what classify.validation holds out?"""
    return bool(recipe.data.eval) or (recipe.classify is not None and recipe.classify.validation is not None)


def _evaluates(recipe: Recipe) -> bool:
    return recipe.train.eval_strategy != "no"


def _sources(given: Any) -> list[dict[str, Any]]:
    """The sources of data.train, data.eval or data.kept that are more than a path."""
    return [s for s in given if isinstance(s, dict)] if isinstance(given, list) else []


def _shares(recipe: Recipe, facts: Facts) -> Words | None:
    """Shares that are no shares of a whole: said of data.train."""
    sources = recipe.data.train if isinstance(recipe.data.train, list) else [recipe.data.train]
    given = [s for s in sources if isinstance(s, dict) and "share" in s]
    if not given:
        return None
    total = sum(s["share"] for s in given)
    if len(given) < len(sources):
        return {"what": f"{len(given)} of {len(sources)} sources have a share"}
    if any("weight" in s for s in given):
        return {"what": "a source has both share and weight"}
    return None if abs(total - 1) < 1e-6 else {"what": f"the shares add up to {total:g}"}


_EVALUATION = ("data", "train", "early_stopping", "classify")
_FIRST = [
    Rule(
        "data.train",
        "shares that are no shares of a whole",
        "{what}",
        "give each source a share, without a weight; together they are 1",
        _shares,
        early=True,
        sections=("data",),
    ),
    *(
        Rule(
            f"data.{which}",
            "a share of held-out rows",
            "held-out rows are not mixed by shares",
            "share is for data.train",
            lambda r, f, which=which: any("share" in s for s in _sources(getattr(r.data, which))),  # type: ignore[misc]
            early=True,
            sections=("data",),
        )
        for which in ("eval", "kept")
    ),
    Rule(
        "data.mix",
        "no shares",
        "no source has a share",
        "give each source of data.train one, or remove data.mix",
        lambda r, f: "mix" in r.data.given and not any("share" in s for s in _sources(r.data.train)),
        early=True,
        sections=("data",),
    ),
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
        "one of name_or_path, from_recipe, or weights: random or package with a contract",
        _bases,
        early=True,
        sections=("model",),
    ),
    Rule(
        "model.weights",
        "random or package without model.contract",
        "{weights} weights need model.contract",
        "name one of configs/models/",
        lambda r, f: (
            r.model.weights != "pretrained" and not r.model.contract and {"weights": r.model.weights}
        ),
        early=True,
        sections=("model",),
    ),
    Rule(
        "model.from_recipe",
        "model.weights: random or package",
        "{weights} weights and from_recipe exclude each other",
        "keep one",
        lambda r, f: (
            r.model.weights != "pretrained"
            and r.model.from_recipe is not None
            and {"weights": r.model.weights}
        ),
        early=True,
        sections=("model",),
    ),
    Rule(
        "train.eval_strategy",
        "no data.eval",
        "there is nothing to evaluate on",
        "set data.eval, or eval_strategy: 'no'",
        lambda r, f: _evaluates(r) and not held_out(r),
        early=True,
        sections=_EVALUATION,
    ),
    Rule(
        "early_stopping",
        "no data.eval",
        "early stopping needs data.eval",
        "name an eval file or remove the section",
        lambda r, f: r.early_stopping is not None and not held_out(r),
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
    Rule(
        "train.dataset_text_field",
        "data.columns.text",
        "data.columns.text names the column of texts",
        "remove one of the two",
        lambda r, f: "dataset_text_field" in r.train.given and "text" in r.data.columns,
        early=True,
        sections=("data", "train"),
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
            if r.lora
            and "task_type" in r.lora.given
            and r.lora.task_type != "CAUSAL_LM"
            and r.classify is None
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


# ---- task: classify: a head is trained with the adapter. What is about writing text does nothing there; the
# rest of what is refused was not tried

HEADS = ("score", "classifier")  # the names that PEFT takes for the head of a SEQ_CLS model
_WRITES = "is about writing text, which task: classify does not do"


def _classifies(broken: Callable[[Recipe], "Words | bool | None"]) -> Broken:
    """Asked of classifiers. Not by `r.classify`: that is no value yet where a key of it is misspelled."""
    return lambda r, f: broken(r) if "classify" in r.sections else None


def _on_head(recipe: Recipe) -> Words | None:
    given = recipe.lora.target_modules if recipe.lora else None
    entries = [given] if isinstance(given, str) else given or []
    for entry in entries:
        if set(re.split(r"\W+", entry)) & set(HEADS):  # a name, or a pattern that names it
            return {"entry": entry}
    return None


def _odd_columns(recipe: Recipe) -> Words | None:
    sources = [s for s in (recipe.data.train, recipe.data.eval) if isinstance(s, list)]
    given = [
        recipe.data.columns,
        *(s.get("columns", {}) for its in sources for s in its if isinstance(s, dict)),
    ]
    odd = [name for columns in given for name in columns if name not in ("text", "label")]
    return {"odd": odd[0]} if odd else None


def _no_file(recipe: Recipe) -> Words | None:
    labels = recipe.classify.labels if recipe.classify else None
    return {"labels": labels} if isinstance(labels, str) and not labels.endswith(".txt") else None


def _labels_twice(recipe: Recipe) -> Words | None:
    labels = recipe.classify.labels if recipe.classify else None
    twice = [name for name in labels if labels.count(name) > 1] if isinstance(labels, list) else []
    return {"name": twice[0]} if twice else None


def _begins_otherwise(recipe: Recipe) -> Words | None:
    begins = recipe.lora.init_lora_weights if recipe.lora else True
    return {"init": begins} if begins not in (True, False, "gaussian", "orthogonal") else None


_CLASSIFY = [
    Rule(
        "{method}",
        "task: classify",
        "{method}: with task: classify was not tried here",
        "write lora:",
        _classifies(lambda r: any(m in r.sections for m in METHODS if m != "lora")),
        early=True,
    ),
    *(
        Rule(
            section,
            "task: classify",
            f"{section}: {why}",
            "remove it",
            _classifies(lambda r, section=section: section in r.sections),  # type: ignore[misc]
            early=True,
        )
        for section, why in (
            ("probes", "asks for words, and task: classify has classes"),
            ("evaluate", "asks for code, and task: classify has classes"),
            ("warm_start", "with task: classify was not tried here"),
            ("learning_rates", "with task: classify was not tried here"),
        )
    ),
    *(
        Rule(
            key,
            "task: classify",
            _WRITES,
            "remove it",
            _classifies(lambda r, key=key: key.split(".")[1] in r.sections[key.split(".")[0]]),  # type: ignore[misc]
            early=True,
            sections=("data", "model"),
        )
        for key in (
            "data.kept",
            "data.rows",
            "data.chat_template_kwargs",
            "model.chat_template",
            "model.new_tokens",
        )
    ),
    Rule(
        "data.format",
        "task: classify",
        "task: classify reads rows of text and label",
        "remove it; data.columns names other fields: {{text: ..., label: ...}}",
        _classifies(lambda r: r.data.format is not None),
        early=True,
        sections=("data",),
    ),
    Rule(
        "data.columns",
        "task: classify, but for text and label",
        "task: classify reads no {odd}",
        "it reads text and label: {{text: ..., label: ...}}",
        _classifies(_odd_columns),
        early=True,
        sections=("data",),
    ),
    Rule(
        "data.columns",
        "any other task",
        "no label is read without task: classify",
        "write task: classify, or remove it",
        lambda r, f: r.classify is None and "label" in r.data.columns,
        early=True,
        sections=("data", "classify", "task"),
    ),
    Rule(
        "train.dataset_text_field",
        "task: classify",
        "is read by TRL alone",
        "write data.columns: {{text: ...}}",
        _classifies(lambda r: "dataset_text_field" in r.train.given),
        early=True,
        sections=("train",),
    ),
    Rule(
        "classify.validation",
        "data.eval",
        "there is data.eval already",
        "remove one of the two",
        _classifies(lambda r: bool(r.classify and r.classify.validation is not None and r.data.eval)),
        early=True,
        sections=("data", "classify"),
    ),
    Rule(
        "classify.labels",
        "a text that is no .txt file",
        "{labels!r} is no text file",
        "a list of names, or a .txt file with one a line",
        _classifies(_no_file),
        early=True,
        sections=("classify",),
    ),
    Rule(
        "classify.labels",
        "a name twice",
        "{name!r} stands there twice",
        "each class has one place",
        _classifies(_labels_twice),
        early=True,
        sections=("classify",),
    ),
    Rule(
        "lora.target_modules",
        "the head of task: classify",
        "{entry!r} is the head: it trains whole, and is saved with the adapter (modules_to_save)",
        "remove it",
        _classifies(_on_head),
        early=True,
        sections=("lora",),
    ),
    Rule(
        "lora.modules_to_save",
        "task: classify",
        "holds the head, score, by itself; another module beside it was not tried here",
        "remove it",
        _classifies(lambda r: r.lora is not None and r.lora.modules_to_save is not None),
        early=True,
        sections=("lora",),
    ),
    Rule(
        "lora.trainable_token_indices",
        "task: classify",
        "with task: classify was not tried here",
        "remove it",
        _classifies(lambda r: r.lora is not None and bool(r.lora.trainable_token_indices)),
        early=True,
        sections=("lora",),
    ),
    Rule(
        "lora.task_type",
        "task: classify, but SEQ_CLS",
        "{task} is not the task of a classifier",
        "write SEQ_CLS, or remove it",
        _classifies(
            lambda r: (
                {"task": r.lora.task_type}
                if r.lora and r.lora.given.get("task_type", "SEQ_CLS") != "SEQ_CLS"
                else None
            )
        ),
        sections=("lora",),
    ),
    Rule(
        _INIT,
        "task: classify, where the base or the data decide",
        "an initialisation by {init} with task: classify was not tried here",
        "remove it",
        _classifies(_begins_otherwise),
        early=True,
        sections=("lora",),
    ),
    Rule(
        "train.use_liger_kernel",
        "task: classify",
        "Liger's loss is that of a language model",
        "remove it",
        _classifies(lambda r: r.train.use_liger_kernel),
    ),
    Rule(
        "task",
        "FSDP2, ZeRO-2 and ZeRO-3",
        "task: classify under {layout} was not shown to work here",
        cli.command(ACCELERATE="ddp"),
        lambda r, f: r.classify is not None and f.layout.kind in (FSDP2, ZERO2, ZERO3),
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
_BNB = cli.extra("bitsandbytes")
_BASE = [
    Rule(
        "model.quantize",
        "no bitsandbytes",
        "{quantize} needs the package bitsandbytes, which is not installed",
        _BNB,
        lambda r, f: (
            {"quantize": r.model.quantize} if r.model.quantize is not None and not f.bitsandbytes else None
        ),
    ),
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
        "an attention that the class has not",
        "transformers refuses it: {said}",
        "remove it: transformers then chooses what the class has; or write eager",
        lambda r, f: _attention(r, f.attention[0]),
    ),
    Rule(
        "model.attn_implementation",
        "an attention whose package is missing",
        "training would fail on this machine: {said}",
        "install the package where it is trained, or remove the key",
        lambda r, f: _attention(r, f.attention[1]),
        warns=True,
        here=True,
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


def _full_update(recipe: Recipe) -> bool:
    """Do A and B begin from one? An adapter is taken as it is."""
    return recipe.warm_start is not None and recipe.warm_start.from_recipe is not None


_WARM = [
    Rule(
        "warm_start",
        "peft:, freeze: and full:",
        "{method}: has no A and B to begin with",
        "write lora:, or remove it",
        lambda r, f: r.warm_start is not None and r.lora is None,
    ),
    Rule(
        "warm_start",
        "none or both of its keys",
        "A and B begin from one thing",
        "give from_recipe: or from_adapter:",
        lambda r, f: (
            r.warm_start is not None
            and (r.warm_start.from_recipe is None) == (r.warm_start.from_adapter is None)
        ),
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
            ("use_dora", lambda r, f: _full_update(r) and _given("use_dora")(r, f)),
            ("init_lora_weights", lambda r, f: r.lora is not None and r.lora.init_lora_weights is not True),
            ("target_parameters", lambda r, f: _full_update(r) and _given("target_parameters")(r, f)),
        )
    ),
    Rule(
        "warm_start.from_recipe",
        "model.quantize",
        "the update of a 4-bit base is not defined here",
        "remove model.quantize",
        _warm(lambda r, f: _full_update(r) and r.model.quantize is not None),
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


# ---- settings of train: and lora: that do nothing, or fail when the model is loaded already. What was found
# is what transformers 5.23, trl 1.16 and peft 0.21 do


def _says(recipe: Recipe, name: str) -> bool:
    """Does train: say `name`, and not what it would be anyway?"""
    default = next(f.default for f in fields(Train) if f.name == name)
    return recipe.train.given.get(name, default) not in (None, default)


def _idle(name: str, against: str, found: str, do: str, read: Callable[[Recipe], bool]) -> Rule:
    """train.`name` is not read by anything unless `read`."""
    return Rule(f"train.{name}", against, found, do, lambda r, f: _says(r, name) and not read(r), warns=True)


def _keeps_best(recipe: Recipe) -> bool:
    """Is the model after training the best of its evaluations?"""
    asked: bool = recipe.train.given.get("load_best_model_at_end", recipe.early_stopping is not None)
    return asked


def _reads_metric(recipe: Recipe) -> bool:
    schedule = recipe.train.lr_scheduler_type
    return (
        _keeps_best(recipe)
        or recipe.early_stopping is not None
        or recipe.train.save_strategy == "best"
        or schedule in ("reduce_lr_on_plateau", "greedy")
    )


def _reports(recipe: Recipe, to: str = "") -> bool:
    asked = recipe.train.report_to
    names = [asked] if isinstance(asked, str) else asked or []
    return bool(set(names) & {to, "all"}) if to else bool(set(names) - {"none"})


# What SFTTrainer.evaluate returns; aux_loss where there are experts.
METRICS: tuple[str, ...] = ("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss")
METRICS += ("runtime", "samples_per_second", "steps_per_second")
CLASS_METRICS = ("loss", "accuracy", "macro_f1", "calibration_error", *METRICS[-3:])  # of task: classify
# What torch.utils.checkpoint.checkpoint takes and YAML can hold; `selective` is TRL's.
CHECKPOINTING: tuple[str, ...] = (
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "early_stop",
    "debug",
)
CHECKPOINTING += ("selective",)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# accelerate.utils.DynamoBackend, without "no"
COMPILERS = {
    *("eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt"),
    *("onnxrt", "tensorrt", "aot_torchxla_trace_once", "torchxla_trace_once", "tvm", "hpu_backend", "neuron"),
}


def _unpaired(recipe: Recipe) -> list[str]:
    """What of optim_args is no key=value, as transformers reads it (Trainer.get_optimizer_cls_and_kwargs)."""
    return [pair for pair in (recipe.train.optim_args or "=").split(",") if pair.count("=") != 1]


# Not read by every optimizer, with what they are where nothing is said.
OPTIMIZER_KEYS = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "optim_args": None,
    "optim_target_modules": None,
}


def _metric(recipe: Recipe) -> str:
    return (recipe.train.metric_for_best_model or "loss").removeprefix("eval_")


def _no_metric(recipe: Recipe, facts: Facts) -> Words | None:
    measured = METRICS if recipe.classify is None else CLASS_METRICS
    known = [m for m in measured if m != "aux_loss" or facts.router]
    if not recipe.train.metric_for_best_model or _metric(recipe) in known:
        return None
    close = nearest(_metric(recipe), known)
    return {"metric": _metric(recipe), "close": close, "all": ", ".join(f"eval_{m}" for m in known)}


def _wrong_way(recipe: Recipe, facts: Facts) -> Words | None:
    best = {"loss": False, "aux_loss": False, "entropy": False, "mean_token_accuracy": True}
    best |= {"accuracy": True, "macro_f1": True, "calibration_error": False}
    metric, said = _metric(recipe), recipe.train.greater_is_better
    taken = not metric.endswith("loss") if said is None else said  # as TrainingArguments has it
    if metric not in best or taken == best[metric] or not _reads_metric(recipe):
        return None
    worst, right = "greatest" if taken else "smallest", str(best[metric]).lower()
    how = "not said: true" if said is None else str(said).lower()
    return {"metric": metric, "said": how, "worst": worst, "right": right}


def _unknown_option(recipe: Recipe, facts: Facts) -> Words | None:
    given = recipe.train.gradient_checkpointing_kwargs
    names = given if isinstance(given, dict) else {}
    unknown = [name for name in names if name not in CHECKPOINTING]
    return {"unknown": ", ".join(unknown), "known": ", ".join(CHECKPOINTING)} if unknown else None


def _compiler(recipe: Recipe, facts: Facts) -> Words | None:
    name = recipe.train.torch_compile_backend
    if not name or name.lower() in COMPILERS:
        return None
    return {"name": name, "close": nearest(name, COMPILERS), "all": ", ".join(sorted(COMPILERS))}


def _tokens_seen(recipe: Recipe, facts: Facts) -> Words | None:
    said = recipe.train.include_num_input_tokens_seen
    return {"said": said} if isinstance(said, str) and said not in ("all", "non_padding", "no") else None


def _compile_mode(recipe: Recipe, facts: Facts) -> Words | None:
    mode = recipe.train.torch_compile_mode
    return (
        {"mode": mode, "close": nearest(mode, COMPILE_MODES)} if mode and mode not in COMPILE_MODES else None
    )


def _float16_by(recipe: Recipe) -> str:
    """The key that asks for float16: train.fp16, or the dtype that it follows."""
    asked = {name: recipe.train.given[name] for name in ("bf16", "fp16") if name in recipe.train.given}
    if asked:
        return "train.fp16" if asked.get("fp16") else ""
    return "model.dtype" if recipe.model.dtype == "float16" else ""


def _saves_less(recipe: Recipe) -> bool:
    """Is there an evaluation in whose step nothing is saved?"""
    train = recipe.train
    every = train.eval_steps or train.logging_steps
    return (
        _keeps_best(recipe)
        and (train.eval_strategy, train.save_strategy) == ("steps", "steps")
        and every != train.save_steps
    )


_TRAIN = [
    Rule(
        "train.metric_for_best_model",
        "what an evaluation does not measure",
        "no evaluation measures {metric!r}: it would fail at the first one",
        "eval_{close}? It measures {all}",
        _no_metric,
    ),
    Rule(
        "train.greater_is_better",
        "a metric that is better the other way",
        "{said} with {metric}: the {worst} is the worst, and would be kept",
        "set it to {right}",
        _wrong_way,
    ),
    Rule(
        "train.restore_callback_states_from_checkpoint",
        "early_stopping:",
        "false: a resumed run would count the patience from nothing again",
        "remove it",
        lambda r, f: (
            r.early_stopping is not None
            and r.train.given.get("restore_callback_states_from_checkpoint") is False
        ),
    ),
    Rule(
        "train.load_best_model_at_end",
        "eval_strategy: 'no'",
        "without evaluations there is no best one",
        "set eval_strategy and data.eval, or remove it",
        lambda r, f: _keeps_best(r) and not _evaluates(r),
    ),
    Rule(
        "train.save_strategy",
        "best with eval_strategy: 'no'",
        "without evaluations there is no best one: nothing would be saved",
        "set eval_strategy and data.eval, or save_strategy: steps",
        lambda r, f: r.train.save_strategy == "best" and not _evaluates(r),
    ),
    Rule(
        "train.save_strategy",
        "best without metric_for_best_model",
        "best of what is not said",
        "set metric_for_best_model: eval_loss",
        lambda r, f: (
            r.train.save_strategy == "best"
            and _evaluates(r)
            and not r.train.metric_for_best_model
            and not _keeps_best(r)
        ),
    ),
    Rule(
        "train.eval_on_start",
        "no data.eval",
        "there is nothing to evaluate on",
        "set data.eval, or remove it",
        lambda r, f: r.train.eval_on_start and not held_out(r),
    ),
    Rule(
        "train.padding_free",
        "max_length without packing",
        "TRL does not cut rows that are neither padded nor packed, and refuses a max_length",
        "set train.packing: true, or max_length: null",
        lambda r, f: r.train.padding_free and not r.train.packing and r.train.max_length is not None,
    ),
    Rule(
        "train.gradient_checkpointing_kwargs",
        "names that torch does not take",
        "torch.utils.checkpoint has no {unknown}",
        "it takes {known}",
        _unknown_option,
    ),
    Rule(
        "train.torch_compile_backend",
        "other words",
        "accelerate has no compiler {name!r}",
        "{close}? They are {all}",
        _compiler,
    ),
    Rule(
        "train.include_num_input_tokens_seen",
        "other words",
        "{said!r} would count them all, padding too",
        "all, non_padding or no",
        _tokens_seen,
    ),
    Rule(
        "train.label_smoothing_factor",
        "loss_type: dft",
        "the loss of loss_type: dft is not smoothed",
        "remove one of the two",
        lambda r, f: _says(r, "label_smoothing_factor") and r.train.loss_type == "dft",
    ),
    Rule(
        "train.activation_offloading",
        "a CPU",
        "offloads from an accelerator: training would fail on this machine, which has none",
        "remove it, or train on a GPU",
        lambda r, f: r.train.activation_offloading and not f.accelerator,
        warns=True,
        here=True,
    ),
    *(
        Rule(
            key,
            "float16 on a CPU",
            "accelerate computes in float32 on a CPU, not in float16: training is refused on this machine",
            "write model.dtype: float32 or bfloat16, or train on a GPU",
            lambda r, f, key=key: not f.accelerator and _float16_by(r) == key,  # type: ignore[misc]
            warns=True,
            here=True,
        )
        for key in ("train.fp16", "model.dtype")
    ),
    Rule(
        "train.use_cpu",
        "false, with an accelerator that is not CUDA's",
        "the trainer would take {device}, on which precision, NF4 and memory were never tried here",
        "remove it: this machine then trains on its CPU",
        lambda r, f: {"device": f.foreign} if f.foreign and r.train.given.get("use_cpu") is False else None,
    ),
    Rule(
        "train.torch_compile_mode",
        "other words",
        "torch.compile has no mode {mode!r}",
        "{close}?",
        _compile_mode,
    ),
    *(
        Rule(
            f"train.{name}",
            "dataloader_num_workers: 0",
            "needs processes that load the rows",
            "set dataloader_num_workers, or remove it",
            lambda r, f, name=name: _says(r, name) and not r.train.dataloader_num_workers,  # type: ignore[misc]
        )
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context")
    ),
    Rule(
        "train.optim_args",
        "no text of pairs",
        "{found!r} is no key=value",
        "write optim_args: key=value, key=value",
        lambda r, f: {"found": _unpaired(r)[0].strip()} if _unpaired(r) else None,
    ),
    Rule(
        "train.dataset_num_proc",
        "below 1",
        "no process would prepare the rows; what is asked is not what would be done",
        "remove it: the rows are prepared before the trainer has them",
        lambda r, f: r.train.dataset_num_proc is not None and r.train.dataset_num_proc < 1,
    ),
    Rule(
        "train.optim",
        "a package or a key that is missing",
        "{said}",
        "install it, or write another optimizer: adamw_torch is always there",
        lambda r, f: {"said": f.optimizer} if f.optimizer and not _unpaired(r) else None,
    ),
    Rule(
        "train.report_to",
        "a package that is missing, or another word",
        "{said}",
        "mend that, or report_to: none: metrics.jsonl and loss.png are always written",
        lambda r, f: {"said": f.reporting} if f.reporting else None,
    ),
    Rule(
        "train.use_liger_kernel",
        "a missing package",
        "{said}",
        "install it, or remove it",
        lambda r, f: {"said": f.liger} if f.liger and r.train.use_liger_kernel else None,
    ),
    Rule(
        "train.liger_kernel_config",
        "fused_linear_cross_entropy: true",
        "TRL computes the loss in pieces by itself, and refuses Liger's",
        "remove fused_linear_cross_entropy",
        lambda r, f: bool((r.train.liger_kernel_config or {}).get("fused_linear_cross_entropy")),
    ),
    Rule(
        "train.router_aux_loss_coef",
        "a model without experts",
        "the model has no router whose loss could be weighed",
        "remove it",
        lambda r, f: bool(r.train.router_aux_loss_coef) and not f.router,
    ),
    *(
        Rule(
            f"train.{name}",
            "an optimizer that does not read it",
            "{optim} does not read it",
            "remove it, or write an optimizer that does",
            lambda r, f, name=name: {"optim": r.train.optim} if name in f.ignored else None,  # type: ignore[misc]
            warns=True,
        )
        for name in OPTIMIZER_KEYS
    ),
    Rule(
        "train.save_only_model",
        "RESUME",
        "checkpoints without the optimizer: this run cannot be resumed",
        "remove it, if that is not meant",
        lambda r, f: r.train.save_only_model and r.train.save_strategy != "no",
        warns=True,
    ),
    Rule(
        "train.save_steps",
        "other eval_steps, where the best is kept",
        "evaluations in whose step nothing is saved: the best of them would be lost, and an earlier one kept",
        "set save_steps to the same as eval_steps",
        lambda r, f: _saves_less(r),
        warns=True,
    ),
    Rule(
        "train.neftune_noise_alpha",
        "packing and padding_free",
        "NEFTune divides the noise by the length of the packed row, not of each text in it: less noise than"
        " the number says",
        "set packing and padding_free to false, if it is to be the paper's",
        lambda r, f: bool(r.train.neftune_noise_alpha) and (r.train.packing or r.train.padding_free),
        warns=True,
    ),
    Rule(
        "train.truncation_mode",
        "packing",
        "packing cuts rows at their end, whatever this says",
        "remove it, or set packing: false",
        lambda r, f: r.train.truncation_mode == "keep_end" and r.train.packing,
        warns=True,
    ),
    *(
        _idle(
            name,
            f"eval_strategy other than {'steps' if name == 'eval_steps' else 'steps or epoch'}",
            found,
            "set eval_strategy, or remove it",
            read,
        )
        for name, found, read in (
            (
                "eval_steps",
                "nothing is evaluated every so many steps",
                lambda r: r.train.eval_strategy == "steps",
            ),
            ("eval_delay", "nothing is evaluated while training", _evaluates),
        )
    ),
    *(
        _idle(
            name,
            "no data.eval",
            "there is nothing to evaluate on",
            "set data.eval, or remove it",
            held_out,
        )
        for name in ("per_device_eval_batch_size", "eval_packing")
    ),
    _idle(
        "save_steps",
        "save_strategy other than steps",
        "nothing is saved every so many steps",
        "set save_strategy: steps, or remove it",
        lambda r: r.train.save_strategy == "steps",
    ),
    *(
        _idle(
            name,
            "save_strategy: 'no'",
            "no checkpoint is saved",
            "set save_strategy, or remove it",
            lambda r: r.train.save_strategy != "no",
        )
        for name in ("save_total_limit", "save_on_each_node")
    ),
    _idle(
        "logging_steps",
        "logging_strategy other than steps",
        "nothing is logged every so many steps",
        "set logging_strategy: steps, or remove it",
        lambda r: r.train.logging_strategy == "steps",
    ),
    *(
        _idle(
            name,
            "nothing that asks for the best",
            "nothing asks which evaluation is the best",
            "set load_best_model_at_end or early_stopping:, or remove it",
            _reads_metric,
        )
        for name in ("metric_for_best_model", "greater_is_better")
    ),
    _idle(
        "packing_strategy",
        "packing: false",
        "nothing is packed",
        "set packing: true, or remove it",
        lambda r: r.train.packing or bool(r.train.eval_packing),
    ),
    _idle(
        "gradient_checkpointing_kwargs",
        "gradient_checkpointing: false",
        "nothing is checkpointed",
        "set gradient_checkpointing: true, or remove it",
        lambda r: r.train.gradient_checkpointing,
    ),
    _idle(
        "liger_kernel_config",
        "use_liger_kernel: false",
        "Liger's kernels are not used",
        "set use_liger_kernel: true, or remove it",
        lambda r: r.train.use_liger_kernel,
    ),
    _idle(
        "run_name",
        "no report_to",
        "only report_to reads it: the run folder has the recipe's name",
        "set report_to, or remove it",
        _reports,
    ),
    *(
        _idle(
            name,
            "report_to without trackio",
            "only trackio reads it",
            "set report_to: trackio, or remove it",
            lambda r: _reports(r, "trackio"),
        )
        for name in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    ),
    *(
        Rule(
            f"lora.{name}_config",
            f"init_lora_weights other than {name}",
            f"init_lora_weights is not {name}: PEFT does not read it",
            f"set init_lora_weights: {name}, or remove it",
            lambda r, f, name=name: (  # type: ignore[misc]
                r.lora is not None
                and bool(getattr(r.lora, f"{name}_config"))
                and initialisation(r.lora) != name
            ),
        )
        for name in ("eva", "corda", "loftq")
    ),
    Rule(
        _INIT,
        "false",
        "A and B both begin at random: before the first step the model is another one than its base",
        "remove it: B begins at zero",
        lambda r, f: r.lora is not None and r.lora.init_lora_weights is False,
        warns=True,
    ),
    Rule(
        "lora.fan_in_fan_out",
        "a model without Conv1D",
        "for GPT-2's Conv1D; PEFT sets it back to false for the linear layers of this model",
        "remove it",
        lambda r, f: r.lora is not None and r.lora.fan_in_fan_out and not f.conv1d,
        warns=True,
    ),
]


# ---- the same, once the steps are counted


def _every(said: float, total: int) -> int:
    """The steps between two; below 1 it is a share of all (TrainerState.compute_steps)."""
    return max(math.ceil(total * said), 1) if said < 1 else int(said)


def evaluations(recipe: Recipe, total: int, per_epoch: int) -> int:
    """How often a run of `total` steps evaluates (transformers' DefaultFlowCallback, which also does it in
    the last step).
    """
    train = recipe.train
    if train.eval_strategy == "epoch":
        ends = range(1, math.ceil(total / per_epoch) + 1)
        return sum(train.eval_delay <= min(epoch, total / per_epoch) for epoch in ends)
    if train.eval_strategy != "steps":
        return 0
    every, first = _every(train.eval_steps or train.logging_steps, total), max(math.ceil(train.eval_delay), 1)
    return total // every - (first - 1) // every + bool(total % every) if first <= total else 0


def _too_few(recipe: Recipe, facts: Facts) -> Words | None:
    total = facts.steps or 0
    found = evaluations(recipe, total, facts.per_epoch)
    if not _keeps_best(recipe) or not _evaluates(recipe) or found > 1:
        return None
    said = "evaluates once, in the last step" if found else "never evaluates"
    by_steps = recipe.train.eval_strategy == "steps"
    do = "" if by_steps else "set eval_strategy: steps and "
    return {"total": total, "said": said, "do": do, "half": max(total // 2, 1)}


def _impatient(recipe: Recipe, facts: Facts) -> Words | None:
    total = facts.steps or 0
    found = evaluations(recipe, total, facts.per_epoch)
    stopping = recipe.early_stopping
    if stopping is None or found < 2 or found > stopping.early_stopping_patience + 1:
        return None
    return {"found": found, "patience": stopping.early_stopping_patience}


def _beyond(name: str, strategy: str) -> Broken:
    """train.`name`, said, is more than there are steps."""

    def found(recipe: Recipe, facts: Facts) -> Words | None:
        said, total = getattr(recipe.train, name), facts.steps or 0
        if getattr(recipe.train, strategy) != "steps" or not said or _every(said, total) <= total:
            return None
        return {"said": int(said), "total": total}

    return found


def _no_log(recipe: Recipe, facts: Facts) -> Words | None:
    train, total = recipe.train, facts.steps or 0
    if train.logging_first_step or (train.logging_strategy == "epoch"):
        return None
    if train.logging_strategy == "steps" and _every(train.logging_steps, total) <= total:
        return None
    said = f"every {train.logging_steps:g} steps" if train.logging_strategy == "steps" else "never"
    return {"said": said, "total": total}


def _long_warmup(recipe: Recipe, facts: Facts) -> Words | None:
    total, warmup = facts.steps or 0, facts.warmup
    if warmup < total or recipe.train.lr_scheduler_type in ("constant", "reduce_lr_on_plateau"):
        return None
    peak = recipe.train.learning_rate
    return {"warmup": warmup, "total": total, "rate": peak, "reached": peak * (total - 1) / max(warmup, 1)}


_AT_ONCE = "{said} is beyond the last of {total} steps"
_COUNTED = [
    Rule(
        "train.eval_strategy",
        "one evaluation or none, where the best is kept (load_best_model_at_end, early_stopping:)",
        "a run of {total} steps {said}: there is nothing to choose from",
        "{do}eval_steps of {half} or less (save_steps the same); or keep the last: remove"
        " load_best_model_at_end and early_stopping:",
        _too_few,
        counted=True,
    ),
    Rule(
        "early_stopping.early_stopping_patience",
        "too few evaluations",
        "{found} evaluations: {patience} without improvement are over no earlier than the run",
        "evaluate more often, or a smaller patience",
        _impatient,
        counted=True,
        warns=True,
    ),
    Rule(
        "train.eval_steps",
        "fewer steps",
        f"{_AT_ONCE}: it evaluates once, at the end",
        "a smaller number",
        lambda r, f: None if _keeps_best(r) else _beyond("eval_steps", "eval_strategy")(r, f),
        counted=True,
        warns=True,
    ),
    Rule(
        "train.save_steps",
        "fewer steps",
        f"{_AT_ONCE}: it saves once, at the end",
        "a smaller number, or save_strategy: 'no'",
        lambda r, f: _beyond("save_steps", "save_strategy")(r, f) if _says(r, "save_steps") else None,
        counted=True,
        warns=True,
    ),
    Rule(
        "train.eval_delay",
        "fewer steps",
        "{delay:g} is beyond the end: nothing is evaluated while training",
        "a smaller number",
        lambda r, f: (
            {"delay": r.train.eval_delay}
            if _evaluates(r) and not _keeps_best(r) and not evaluations(r, f.steps or 0, f.per_epoch)
            else None
        ),
        counted=True,
        warns=True,
    ),
    Rule(
        "train.logging_steps",
        "fewer steps",
        "{said}, in a run of {total}: no training loss is logged, and none that is no number is seen",
        "a smaller number, or logging_first_step: true",
        _no_log,
        counted=True,
        warns=True,
    ),
    Rule(
        "train.warmup_steps",
        "fewer steps",
        "the warm-up takes {warmup} steps, the run {total}: the rate ends at {reached:.2g}, not {rate:g}",
        "a smaller number; below 1 it is a share of all steps",
        _long_warmup,
        counted=True,
        warns=True,
    ),
]


# ---- numbers far from what is usual: a slip of the finger, most often


def _usual(key: str, low: float, high: float, source: str, methods: tuple[str, ...] = METHODS) -> Rule:
    """A number is said that is not between `low` and `high`, which `source` makes usual."""
    section, name = key.split(".")

    def found(recipe: Recipe, facts: Facts) -> Words | None:
        value = recipe.sections.get(section, {}).get(name)
        counts = name != "num_train_epochs" or recipe.train.max_steps < 0  # else max_steps decides
        if not isinstance(value, int | float) or recipe.method not in methods or not counts:
            return None
        if low <= value <= high:
            return None
        return {"value": value}

    against = f"numbers outside {low:g} to {high:g}"
    if methods != METHODS:
        against += f" ({', '.join(f'{m}:' for m in methods)})"
    return Rule(
        key,
        against,
        f"{{value:g}} is far from what is usual, {low:g} to {high:g} ({source})",
        "is it what you mean?",
        found,
        warns=True,
    )


def _scaled(recipe: Recipe, facts: Facts) -> Words | None:
    lora = recipe.lora
    if lora is None:
        return None
    scaling = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    return None if 1 / 32 <= scaling <= 32 else {"scaling": scaling}


def _weighed(recipe: Recipe, facts: Facts) -> Words | None:
    weights = [s["weight"] for s in _sources(recipe.data.train) if "weight" in s]
    far = [w for w in weights if not 0.001 <= w <= 10]
    return {"weight": far[0]} if far else None


_FULL_RATE = (
    1e-7,
    5e-3,
    "1e-6 to 5e-5 for a trained model, 6e-4 and more for a new small one: arXiv 2005.14165",
)
_NUMBERS = [
    _usual(
        "train.learning_rate",
        1e-6,
        3e-2,
        "LoRA 1e-4 to 2e-3, arXiv 2106.09685; QLoRA 1e-4 to 2e-4, arXiv 2305.14314; tiny models more",
        ("lora",),
    ),
    _usual("train.learning_rate", *_FULL_RATE, ("full", "freeze")),
    _usual("train.learning_rate", 1e-6, 1, "prompt tuning 0.3, arXiv 2104.08691; others less", ("peft",)),
    *(_usual(f"learning_rates.{depth}", *_FULL_RATE) for depth in DEPTHS),
    _usual("learning_rates.loraplus_lr_ratio", 1, 64, "16: arXiv 2402.12354"),
    _usual("learning_rates.loraplus_lr_embedding", 0, 1e-2, "PEFT's default 1e-6"),
    _usual("train.num_train_epochs", 0, 100, "few; after 4 a repeated row gives ever less: arXiv 2305.16264"),
    _usual("train.weight_decay", 0, 0.3, "0 to 0.1: arXiv 1711.05101, 2005.14165"),
    _usual("train.max_grad_norm", 0, 10, "transformers 1, QLoRA 0.3; 0 does not clip"),
    _usual("train.label_smoothing_factor", 0, 0.3, "0.1: arXiv 1512.00567"),
    _usual("train.neftune_noise_alpha", 0, 30, "5 to 15: arXiv 2310.05914"),
    _usual("train.router_aux_loss_coef", 0, 0.1, "0.001 to 0.01: arXiv 2101.03961"),
    _usual("train.adam_beta1", 0.5, 0.99, "transformers 0.9"),
    _usual("train.adam_beta2", 0.8, 0.9999, "transformers 0.999, arXiv 2005.14165 0.95"),
    _usual("train.adam_epsilon", 1e-12, 1e-4, "transformers 1e-8"),
    _usual("lora.lora_dropout", 0, 0.5, "0 to 0.1: arXiv 2106.09685, 2305.14314"),
    _usual("early_stopping.early_stopping_threshold", 0, 1, "transformers 0; a loss in nats a token"),
    Rule(
        "lora.lora_alpha",
        "a scaling outside 1/32 to 32",
        "with r it scales the adapter by {scaling:.3g}; usual is 0.25 to 2 (QLoRA 16/64, LoRA alpha = r,"
        " others 2 r)",
        "is it what you mean?",
        _scaled,
        warns=True,
    ),
    Rule(
        "data.train",
        "a weight outside 0.001 to 10",
        "the weight {weight:g} takes each row {weight:g} times; after 4 times one gives ever less (arXiv"
        " 2305.16264)",
        "is it what you mean?",
        _weighed,
        warns=True,
    ),
]

SETTINGS: tuple[Rule, ...] = (*_TRAIN, *_COUNTED, *_NUMBERS)

_EVALUATE = [
    Rule(
        "evaluate.k",
        "fewer samples (evaluate.n)",
        "of {n} samples there are no {k} to choose",
        "set evaluate.n to {k} or more, or a smaller k",
        lambda r, f: (
            {"k": max(r.evaluate.k), "n": r.evaluate.n} if max(r.evaluate.k) > r.evaluate.n else None
        ),
        early=True,
        sections=("evaluate",),
    ),
    Rule(
        "evaluate.n",
        "evaluate.temperature: 0",
        "{n} greedy samples of a task are one and the same",
        "a temperature (0.2 for pass@1, 0.8 for more: arXiv 2107.03374), or n: 1",
        lambda r, f: {"n": r.evaluate.n} if r.evaluate.n > 1 and not r.evaluate.temperature else None,
        early=True,
        sections=("evaluate",),
    ),
]


def _attention(recipe: Recipe, said: str) -> Words | None:
    return {"said": said} if said and recipe.model.attn_implementation not in (None, "eager") else None


RULES: tuple[Rule, ...] = (
    *_FIRST,
    *_LORA,
    *_CLASSIFY,
    *_PEFT,
    *_BASE,
    *_RATES,
    *_WARM,
    *_LAYOUT,
    *SETTINGS,
    *_EVALUATE,
)
