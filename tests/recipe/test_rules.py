"""The table of what does not go together: every row can be broken, says what to do, and names real keys."""

import re

import pytest

from lora_recipes.core.errors import RecipeError
from lora_recipes.planning import plan
from lora_recipes.recipe import check, rules
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.layout import Layout

FOUR = "learning_rates.last=3e-3 learning_rates.middle=1e-3 learning_rates.early=1e-3"
PAIR = "learning_rates.loraplus_lr_ratio=16"
SHARDED = Layout("ZeRO-3", 2)

# For each rule: a shipped recipe, the overrides that break it, and the facts of the model or of the machine
# that it needs besides, where the tiny models have none. Early rules are broken in test_recipe.py.
BROKEN: dict[tuple[str, str], tuple[str, str, dict]] = {
    ("lora.task_type", "anything but CAUSAL_LM"): ("tiny_facts", "lora.task_type=SEQ_CLS", {}),
    ("lora.bias", "a model without biases"): ("tiny_facts", "lora.bias=all", {"has_bias": False}),
    ("lora.init_lora_weights", "lora_ga"): ("tiny_facts", "lora.init_lora_weights=lora_ga", {}),
    ("lora.init_lora_weights", "model.quantize"): (
        "tiny_facts",
        "lora.init_lora_weights=pissa model.quantize=nf4",
        {},
    ),
    ("model.new_tokens", "init_lora_weights: pissa, olora or corda"): (
        "tiny_facts",
        "lora.init_lora_weights=olora model.new_tokens=[x]",
        {},
    ),
    ("model.adapter_dtype", "init_lora_weights: pissa, olora or corda"): (
        "tiny_facts",
        "lora.init_lora_weights=pissa model.adapter_dtype=bfloat16",
        {},
    ),
    ("lora.init_lora_weights", "eva with eva_config.rho above 1"): (
        "tiny_facts",
        "lora.init_lora_weights=eva",
        {},
    ),
    ("lora.init_lora_weights", "loftq without model.quantize"): (
        "tiny_facts",
        "lora.init_lora_weights=loftq",
        {},
    ),
    ("lora.loftq_config", "init_lora_weights: loftq"): (
        "tiny_facts",
        "lora.init_lora_weights=loftq model.quantize=nf4 lora.loftq_config={loftq_bits: 4}",
        {},
    ),
    ("model.quantize", "peft:"): ("tiny_ia3", "model.quantize=nf4", {}),
    ("train.packing", "PROMPT_TUNING, P_TUNING, PREFIX_TUNING"): (
        "tiny_prompt_tuning",
        "train.packing=true",
        {},
    ),
    ("train.gradient_checkpointing", "PREFIX_TUNING"): (
        "tiny_prefix_tuning",
        "train.gradient_checkpointing=true",
        {},
    ),
    ("peft.peft_type", "PREFIX_TUNING on linear attention"): (
        "tiny_prefix_tuning",
        "",
        {"linear_attention": True},
    ),
    ("train.save_strategy", "ADALORA"): ("tiny_adalora", "train.save_strategy=steps", {}),
    ("model.quantize", "full: and freeze:"): ("tiny_full", "model.quantize=nf4", {}),
    ("train.packing", "linear attention without causal-conv1d"): (
        "tiny_facts",
        "train.packing=true",
        {"linear_attention": True, "causal_conv1d": False},
    ),
    ("train.padding_free", "linear attention without causal-conv1d"): (
        "tiny_facts",
        "train.padding_free=true",
        {"linear_attention": True, "causal_conv1d": False},
    ),
    ("train.max_length", "packing with max_length: null"): (
        "tiny_facts",
        "train.packing=true train.max_length=null",
        {},
    ),
    ("model.new_tokens", "one token twice"): ("tiny_facts", "model.new_tokens=[x,x]", {}),
    ("model.new_tokens", "peft:"): ("tiny_ia3", "model.new_tokens=[x]", {}),
    ("model.new_tokens", "freeze: without embeddings"): (
        "tiny_freeze",
        "model.new_tokens=[x] freeze.embeddings=false",
        {},
    ),
    ("model.new_tokens", "model.quantize"): ("tiny_facts", "model.new_tokens=[x] model.quantize=nf4", {}),
    ("learning_rates", "both kinds, or none"): ("tiny_facts", f"{PAIR} learning_rates.last=3e-3", {}),
    ("learning_rates.loraplus_lr_ratio", "peft:, freeze: and full:"): ("tiny_full", PAIR, {}),
    ("learning_rates", "rates by depth under lora: and peft:"): ("tiny_facts", FOUR, {}),
    ("learning_rates", "some depths without the others"): ("tiny_full", FOUR, {}),
    ("train.learning_rate", "another learning_rates.last"): (
        "tiny_full",
        f"{FOUR} learning_rates.embeddings=1e-3 train.learning_rate=1e-5",
        {},
    ),
    ("train.optim", "learning_rates: with an optimizer that sorts the parameters"): (
        "tiny_facts",
        PAIR,
        {"plain_optimizer": False},
    ),
    ("warm_start", "peft:, freeze: and full:"): ("tiny_full", "warm_start.from_recipe=tiny_base", {}),
    ("warm_start.from_recipe", "model.quantize"): ("tiny_warm_start", "model.quantize=nf4", {}),
    ("warm_start.from_recipe", "a recipe that trains an adapter"): (
        "tiny_warm_start",
        "",
        {"warm": "tiny_facts"},
    ),
    ("warm_start.from_recipe", "a recipe on another base"): (
        "tiny_warm_start",
        "",
        {"warm": "tiny_full", "same_base": False},
    ),
    ("ACCELERATE", "other layouts"): ("tiny_facts", "", {"layout": Layout("FSDP1", 2)}),
    ("warm_start", "several processes"): ("tiny_warm_start", "", {"layout": Layout("DDP", 2)}),
    ("model.new_tokens", "several processes"): (
        "tiny_facts",
        "model.new_tokens=[x]",
        {"layout": Layout("DDP", 2)},
    ),
    ("lora.init_lora_weights", "loftq in several processes"): ("tiny_loftq", "", {"layout": SHARDED}),
    ("model.quantize", "FSDP2"): ("tiny_facts", "model.quantize=nf4", {"layout": Layout("FSDP2", 2)}),
    ("model.quantize", "ZeRO-3"): ("tiny_facts", "model.quantize=nf4", {"layout": SHARDED}),
    ("model.quantize", "ZeRO-2"): ("tiny_facts", "model.quantize=nf4", {"layout": Layout("ZeRO-2", 2)}),
    ("{method}", "peft: and freeze: under FSDP2, ZeRO-2 and ZeRO-3; full: under FSDP2 and ZeRO-3"): (
        "tiny_full",
        "",
        {"layout": SHARDED},
    ),
    ("lora.init_lora_weights", "a word, under FSDP2, ZeRO-2 and ZeRO-3"): (
        "tiny_facts",
        "lora.init_lora_weights=orthogonal",
        {"layout": SHARDED},
    ),
    ("model.adapter_dtype", "another model.dtype, under ZeRO-2 and ZeRO-3"): (
        "tiny_facts",
        "model.dtype=bfloat16",
        {"layout": SHARDED},
    ),
    ("learning_rates", "FSDP2, ZeRO-2 and ZeRO-3"): ("tiny_facts", PAIR, {"layout": SHARDED}),
}
# Families of rows that differ in the field alone: what to write for it.
VALUES = {
    "alora_invocation_tokens": "[1]",
    "layer_replication": "[[0, 2]]",
    "use_bdlora": "{target_modules_bd_a: [q_proj], nblocks: 2}",
    "arrow_config": "{top_k: 2}",
    "megatron_config": "{a: 1}",
    "rank_pattern": "{q_proj: 2}",
    "alpha_pattern": "{q_proj: 2}",
    "modules_to_save": "[norm]",
    "trainable_token_indices": "[1]",
    "target_parameters": "[q_proj.weight]",
    "fsdp": "full_shard",
    "fsdp_config": "{version: 2}",
    "deepspeed": "x.json",
    "accelerator_config": "{split_batches: true}",
    "parallelism_config": "{tp_size: 2}",
}
WITH = {
    "init_lora_weights: pissa, olora or corda": ("tiny_facts", "lora.init_lora_weights=pissa", {}),
    "model.new_tokens": ("tiny_facts", "model.new_tokens=[x]", {}),
    "warm_start:": ("tiny_warm_start", "", {}),
    "FSDP2, ZeRO-2 and ZeRO-3": ("tiny_facts", "", {"layout": SHARDED}),
}


def breaks(rule):
    """A recipe that breaks `rule`, and the facts beside it."""
    if (rule.key, rule.against) in BROKEN:
        name, overrides, facts = BROKEN[rule.key, rule.against]
    else:
        name, overrides, facts = WITH.get(rule.against, ("tiny_facts", "", {}))
        field = rule.key.rpartition(".")[2]
        value = "orthogonal" if field == "init_lora_weights" else VALUES.get(field, "true")
        overrides += f" {rule.key}={value}"
    words = re.findall(r"\S+=(?:\{[^}]*\}|\[\[.*?\]\]|\[[^\]]*\]|\S+)", overrides)
    facts = {k: recipes.load(v) if k == "warm" else v for k, v in facts.items()}
    return recipes.load(name, words), rules.Facts(**facts)


LATE = [rule for rule in rules.RULES if not rule.early]


@pytest.mark.parametrize("rule", LATE, ids=[f"{r.key} / {r.against}" for r in LATE])
def test_every_rule_is_broken_by_a_recipe_and_says_where_what_and_what_to_do(rule):
    recipe, facts = breaks(rule)
    found = [p for p in rules.problems(recipe, facts) if p.do == rule.do or "{" in rule.do]
    key = rule.key.format(method=recipe.method)
    told = [
        p
        for p in found
        if key in p.where and re.match(re.sub(r"\\{.*?\\}", ".*", re.escape(rule.found)), p.found)
    ]
    assert told, f"{[str(p) for p in rules.problems(recipe, facts)]}"
    assert all(p.do and "{" not in re.sub(r"\{rho: 1.0\}", "", f"{p.found}{p.do}") for p in told)


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
