"""The table of what does not go together. Each row here is a recipe that breaks a rule. Written down beside
it: the key that the message must name, with its line; and the remedy, which must help.
"""

import functools
import re
from dataclasses import dataclass, field

import pytest
import yaml

from lora_recipes.core import cli
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.yamlfile import shown
from lora_recipes.planning import plan
from lora_recipes.recipe import check, rules
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.layout import Layout


@dataclass(frozen=True)
class Case:
    """The shipped recipe `name` with `change` is refused at `key`; with `remedy` too it is not. A change is
    `section.key=value` words, `-section.key` taking one out. `facts` of the model or the machine that the
    tiny ones have not; `mended`: these after the remedy; `said`: what the message must tell to do, where no
    key that the remedy sets says it.
    """

    key: str
    name: str
    change: str
    remedy: str = ""
    facts: dict = field(default_factory=dict)
    mended: dict = field(default_factory=dict)
    said: str = ""


def under(kind):
    """Two processes of a kind of layout."""
    return {"layout": Layout(kind, 2)}


DEPTHS = "learning_rates.last=3e-3 learning_rates.middle=1e-3 learning_rates.early=1e-3"
ALL_DEPTHS = f"{DEPTHS} learning_rates.embeddings=1e-3"
RATIO = "learning_rates.loraplus_lr_ratio=16"
NO_RATES = "-learning_rates.last -learning_rates.middle -learning_rates.early -learning_rates.embeddings"
CONV = {"linear_attention": True, "causal_conv1d": False}
ONE = {"layout": Layout()}
VALUES = {
    "lora.use_qalora": "true",
    "lora.alora_invocation_tokens": "[1]",
    "lora.layer_replication": "[[0, 2]]",
    "lora.use_bdlora": "{target_modules_bd_a: [q_proj], nblocks: 2}",
    "lora.arrow_config": "{top_k: 2}",
    "lora.ensure_weight_tying": "true",
    "lora.megatron_config": "{a: 1}",
    "lora.use_dora": "true",
    "lora.lora_bias": "true",
    "lora.rank_pattern": "{q_proj: 2}",
    "lora.alpha_pattern": "{q_proj: 2}",
    "lora.modules_to_save": "[norm]",
    "lora.trainable_token_indices": "[1]",
    "lora.target_parameters": "[q_proj.weight]",
    "train.fsdp": "full_shard",
    "train.fsdp_config": "{version: 2}",
    "train.deepspeed": "x.json",
    "train.accelerator_config": "{split_batches: true}",
    "train.parallelism_config": "{tp_size: 2}",
}


def without(keys, name="tiny_facts", also="", **facts):
    """A case for each of `keys`, given with `also`: the remedy is to remove it."""
    return [
        Case(k, name, f"{also} {k}={VALUES[k]}", f"-{k}", said="[Rr]emove", **facts) for k in keys.split()
    ]


CASES = [
    # lora:
    *without("lora.use_qalora lora.alora_invocation_tokens lora.layer_replication lora.use_bdlora"),
    *without("lora.arrow_config lora.ensure_weight_tying lora.megatron_config"),
    Case("lora.task_type", "tiny_facts", "lora.task_type=SEQ_CLS", "lora.task_type=CAUSAL_LM"),
    Case("lora.task_type", "tiny_classify", "lora.task_type=CAUSAL_LM", "lora.task_type=SEQ_CLS"),
    Case(
        "train.use_liger_kernel",
        "tiny_classify",
        "train.use_liger_kernel=true",
        "-train.use_liger_kernel",
        said="remove it",
    ),
    *(
        Case("task", "tiny_classify", "", "", under(kind), ONE, said="ddp")
        for kind in ("FSDP2", "ZeRO-2", "ZeRO-3")
    ),
    Case(
        "model.quantize",
        "tiny_facts",
        "model.quantize=nf4",
        "",
        {"bitsandbytes": False},
        {"bitsandbytes": True},
        re.escape(cli.extra("bitsandbytes")),
    ),
    Case("lora.bias", "tiny_facts", "lora.bias=all", "lora.bias=none", {"has_bias": False}),
    *(
        Case(
            "lora.init_lora_weights",
            "tiny_facts",
            "lora.init_lora_weights=lora_ga",
            f"lora.init_lora_weights={other}",
        )
        for other in ("pissa", "gaussian", "orthogonal")
    ),
    # A and B taken out of the base
    *(
        Case(
            "lora.init_lora_weights",
            "tiny_facts",
            f"lora.init_lora_weights={kind} model.quantize=nf4",
            remedy,
            said=said,
        )
        for kind in ("pissa", "olora", "corda", "pissa_niter_4")
        for remedy, said in (
            ("-model.quantize", "remove model.quantize"),
            ("lora.init_lora_weights=loftq", "loftq"),
        )
    ),
    Case(
        "model.new_tokens",
        "tiny_facts",
        "lora.init_lora_weights=olora model.new_tokens=[x]",
        "-model.new_tokens",
        said="remove",
    ),
    Case(
        "model.adapter_dtype",
        "tiny_facts",
        "lora.init_lora_weights=pissa model.adapter_dtype=bfloat16",
        "-model.adapter_dtype",
        said="float32",
    ),
    *without(
        "lora.use_dora lora.lora_bias lora.rank_pattern lora.alpha_pattern lora.modules_to_save",
        also="lora.init_lora_weights=pissa",
    ),
    *without("lora.trainable_token_indices lora.target_parameters", also="lora.init_lora_weights=olora"),
    Case("lora.init_lora_weights", "tiny_facts", "lora.init_lora_weights=eva", "lora.eva_config={rho: 1.0}"),
    Case("lora.init_lora_weights", "tiny_facts", "lora.init_lora_weights=loftq", "model.quantize=nf4"),
    Case(
        "lora.loftq_config",
        "tiny_facts",
        "lora.init_lora_weights=loftq model.quantize=nf4 lora.loftq_config={loftq_bits: 4}",
        "-lora.loftq_config",
        said="remove",
    ),
    # peft:
    Case(
        "model.attn_implementation",
        "tiny_facts",
        "model.attn_implementation=sdpa",
        "model.attn_implementation=eager",
        {"attention": ("it has no sdpa", "its package is missing")},
        said="eager",
    ),
    Case("model.quantize", "tiny_ia3", "model.quantize=nf4", "-model.quantize", said="remove"),
    Case("train.packing", "tiny_prompt_tuning", "train.packing=true", "train.packing=false"),
    Case("train.packing", "tiny_prefix_tuning", "train.packing=true", "train.packing=false"),
    Case(
        "train.gradient_checkpointing",
        "tiny_prefix_tuning",
        "train.gradient_checkpointing=true",
        "train.gradient_checkpointing=false",
    ),
    Case(
        "peft.peft_type", "tiny_prefix_tuning", "", "peft.peft_type=PROMPT_TUNING", {"linear_attention": True}
    ),
    *(
        Case("train.save_strategy", "tiny_adalora", f"train.save_strategy={when}", "train.save_strategy='no'")
        for when in ("steps", "epoch")
    ),
    # the base itself; packing; new tokens
    Case("model.quantize", "tiny_full", "model.quantize=nf4", "-model.quantize", said="remove"),
    Case("model.quantize", "tiny_freeze", "model.quantize=nf4", "-model.quantize", said="remove"),
    Case("train.packing", "tiny_facts", "train.packing=true", "train.packing=false", CONV),
    Case("train.packing", "tiny_facts", "train.packing=true", "train.packing_strategy=wrapped", CONV),
    Case(
        "train.padding_free",
        "tiny_facts",
        "train.padding_free=true train.max_length=null",
        "",
        CONV,
        CONV | {"causal_conv1d": True},
        said="install causal-conv1d",
    ),
    Case(
        "train.max_length",
        "tiny_facts",
        "train.packing=true train.max_length=null",
        "train.max_length=32",
        said="a number",
    ),
    Case("model.new_tokens", "tiny_facts", "model.new_tokens=[x,x]", "model.new_tokens=[x]", said="keep one"),
    Case(
        "model.new_tokens",
        "tiny_ia3",
        "model.new_tokens=[x]",
        "-model.new_tokens",
        said="lora:, full:, or freeze:",
    ),
    Case(
        "model.new_tokens",
        "tiny_freeze",
        "model.new_tokens=[x] freeze.embeddings=false",
        "freeze.embeddings=true",
    ),
    Case(
        "model.new_tokens",
        "tiny_facts",
        "model.new_tokens=[x] model.quantize=nf4",
        "-model.quantize",
        said="remove",
    ),
    *without("lora.trainable_token_indices lora.modules_to_save", also="model.new_tokens=[x]"),
    # learning_rates:
    Case(
        "learning_rates",
        "tiny_facts",
        f"{RATIO} learning_rates.last=3e-3",
        "-learning_rates.last",
        said="one of the two",
    ),
    Case("learning_rates.loraplus_lr_ratio", "tiny_full", RATIO, "-learning_rates", said="remove"),
    Case("learning_rates", "tiny_facts", ALL_DEPTHS, f"{NO_RATES} {RATIO}"),
    Case(
        "learning_rates", "tiny_full", f"{DEPTHS} train.learning_rate=3e-3", "learning_rates.embeddings=1e-3"
    ),
    Case(
        "train.learning_rate",
        "tiny_full",
        f"{ALL_DEPTHS} train.learning_rate=1e-5",
        "train.learning_rate=3e-3",
        said="the same",
    ),
    Case(
        "train.optim",
        "tiny_facts",
        f"{RATIO} train.optim=adafactor",
        "train.optim=adamw_torch",
        {"plain_optimizer": False},
        {"plain_optimizer": True},
    ),
    # warm_start:
    Case("warm_start", "tiny_full", "warm_start.from_recipe=tiny_base", "-warm_start", said="remove"),
    Case(
        "warm_start", "tiny_warm_start", "warm_start.from_adapter=x", "-warm_start.from_adapter", said="give"
    ),
    *without("lora.use_dora lora.target_parameters", "tiny_warm_start"),
    Case(
        "lora.init_lora_weights",
        "tiny_warm_start",
        "lora.init_lora_weights=orthogonal",
        "-lora.init_lora_weights",
        said="remove",
    ),
    Case("warm_start.from_recipe", "tiny_warm_start", "model.quantize=nf4", "-model.quantize", said="remove"),
    Case(
        "warm_start.from_recipe",
        "tiny_warm_start",
        "",
        "",
        {"warm": "tiny_facts"},
        {"warm": "tiny_full"},
        said="full: or freeze:",
    ),
    Case(
        "warm_start.from_recipe",
        "tiny_warm_start",
        "",
        "",
        {"warm": "tiny_full", "same_base": False},
        {"warm": "tiny_full"},
        said="same model: in both",
    ),
    # several processes
    *without(
        "train.fsdp train.fsdp_config train.deepspeed train.accelerator_config train.parallelism_config"
    ),
    Case("ACCELERATE", "tiny_facts", "", "", under("FSDP1"), under("FSDP2"), said="FSDP2"),
    *(
        Case(key, name, change, "", under("DDP"), ONE, said="one process")
        for key, name, change in (
            ("warm_start", "tiny_warm_start", ""),
            ("model.new_tokens", "tiny_facts", "model.new_tokens=[x]"),
            ("lora.init_lora_weights", "tiny_loftq", ""),
        )
    ),
    *(
        Case(
            "model.quantize",
            "tiny_facts",
            "model.quantize=nf4",
            "",
            under(kind),
            under("DDP"),
            said="ACCELERATE=ddp",
        )
        for kind in ("FSDP2", "ZeRO-2", "ZeRO-3")
    ),
    *(
        Case(key, name, "", "", under(kind), under("DDP"), said="ACCELERATE=ddp")
        for key, name in (("full", "tiny_full"), ("freeze", "tiny_freeze"), ("peft", "tiny_ia3"))
        for kind in ("FSDP2", "ZeRO-3")
    ),
    *(
        Case(k, "tiny_facts", f"{k}={VALUES[k]}", "", under(kind), under("DDP"), said="ACCELERATE=ddp")
        for k in ("lora.use_dora", "lora.modules_to_save", "lora.trainable_token_indices")
        for kind in ("FSDP2", "ZeRO-2")
    ),
    Case(
        "lora.init_lora_weights",
        "tiny_facts",
        "lora.init_lora_weights=orthogonal",
        "",
        under("ZeRO-3"),
        under("DDP"),
        said="ACCELERATE=ddp",
    ),
    Case(
        "model.adapter_dtype",
        "tiny_facts",
        "model.dtype=bfloat16",
        "model.adapter_dtype=bfloat16",
        under("ZeRO-2"),
    ),
    Case("learning_rates", "tiny_facts", RATIO, "", under("FSDP2"), under("DDP"), said="ACCELERATE=ddp"),
]
SET = re.compile(r"(-?)([\w.]+)(?:=(\{[^}]*\}|\[\[.*?\]\]|\[[^\]]*\]|\S+))?")


@functools.cache
def shipped(name):
    """That recipe, as YAML."""
    return recipes.load(name).to_yaml()


def written(case, path, *changes):
    """The shipped recipe with `changes`, as a file of its own: loaded, and its text."""
    sections = yaml.load(shipped(case.name), yaml.CSafeLoader)
    for out, key, value in SET.findall(" ".join(changes)):
        section, _, name = key.partition(".")
        if not out:
            sections.setdefault(section, {})[name] = yaml.safe_load(value)
            if section == "learning_rates" or name == "learning_rate":
                sections[section][name] = float(value)  # YAML's own grammar takes 3e-3 for a text
        elif name:
            sections[section].pop(name, None)
        else:
            del sections[section]
    path.write_text(yaml.dump(sections, Dumper=yaml.CSafeDumper, sort_keys=False), encoding="utf-8")
    return recipes.load(str(path))


def place(path, key):
    """Where `key` stands in the file, by eye: its line, or its section's where it is not written."""
    lines, (section, _, name) = path.read_text(encoding="utf-8").splitlines(), key.partition(".")
    first = lines.index(next(line for line in lines if line.startswith(f"{section}:")))
    inside = next(
        (i for i in range(first + 1, len(lines)) if not lines[i].startswith((" ", "-"))), len(lines)
    )
    found = [i for i in range(first, inside) if name and lines[i].startswith(f"  {name}:")]
    return f"{shown(path)}:{(found or [first])[0] + 1} {key}"


def facts_of(values):
    given = {k: v for k, v in values.items() if k != "warm"}
    return rules.Facts(warm=recipes.load(values["warm"]) if "warm" in values else None, **given)


def named(case):
    return f"{case.key} / {case.name} {case.change} {case.facts.get('layout', '')}".strip()


@pytest.mark.parametrize("case", CASES, ids=named)
def test_what_does_not_go_together_is_told_at_its_line_and_the_remedy_helps(case, tmp_path):
    recipe = written(case, tmp_path / "x.yaml", case.change)
    (problem,) = rules.problems(recipe, facts_of(case.facts))
    where = case.key if case.key.isupper() else place(tmp_path / "x.yaml", case.key)
    assert problem.where == where and problem.found
    values = [value.strip("'{}") for out, _, value in SET.findall(case.remedy) if not out]
    keys = [key for out, key, _ in SET.findall(case.remedy) if not out]
    told = [
        key.partition(".")[2] in problem.do or value in problem.do
        for key, value in zip(keys, values, strict=True)
    ]
    assert re.search(case.said, problem.do) if case.said else told and all(told)
    assert not re.search(r"\{(?!rho: 1.0\})", f"{problem.found}{problem.do}"), "a name that was not filled in"
    mended = written(case, tmp_path / "x.yaml", case.change, case.remedy)
    assert rules.problems(mended, facts_of(case.mended or case.facts)) == []


def test_every_rule_is_broken_by_one_of_the_cases(tmp_path):
    """Those that loading applies are broken in test_recipe.py, rules.SETTINGS in test_settings.py."""
    broken = set()
    for i, case in enumerate(CASES):
        recipe = written(case, tmp_path / f"{i}.yaml", case.change)
        broken |= {id(r) for r in rules.RULES if not r.early and r.broken(recipe, facts_of(case.facts))}
    here = [r for r in rules.RULES if not r.early and r not in rules.SETTINGS]
    assert [(r.key, r.against) for r in here if id(r) not in broken] == []


@pytest.mark.parametrize("name", recipes.names())
def test_no_shipped_recipe_breaks_a_rule(name):
    assert rules.problems(recipes.load(name), rules.Facts()) == []


def test_every_key_of_the_table_is_a_key_of_the_schema():
    sections = check.schema()["properties"]
    for rule in rules.RULES:
        section, _, key = rule.key.partition(".")
        assert "{" in rule.key or section == "ACCELERATE" or section in sections
        assert not key or key in sections[section]["properties"] or section == "peft"


@pytest.mark.parametrize(
    "override",
    ["use_rslora=true", "use_dora=true", "init_lora_weights=gaussian", "trainable_token_indices=[1, 2]"],
)
def test_a_variant_that_needs_nothing_else_is_planned(override, tmp_path):
    made = plan.make(resolve(recipes.load("tiny_facts", [f"lora.{override}"]), tmp_path))
    assert made.facts.model.trainable >= 4096


def test_the_plan_tells_all_broken_rules_at_once(tmp_path):
    overrides = ["lora.use_qalora=true", "lora.bias=all", "model.new_tokens=[x,x]"]
    with pytest.raises(RecipeError) as error:
        plan.make(resolve(recipes.load("tiny_facts", overrides), tmp_path))
    assert len(error.value.problems) == 3
