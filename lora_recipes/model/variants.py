"""Variants of LoRA, and other methods of PEFT, that would not do here what the recipe says. Imports no torch.

Run on the tiny model: lora_ga and use_qalora trained ordinary LoRA; layer_replication and aLoRA failed later.
The rest is from PEFT's own description of the field. What EVA, CorDA, LoftQ, PiSSA and OLoRA need is done in
start.py, where it can be.
"""

from collections.abc import Iterator
from typing import Any

from lora_recipes.core.errors import Problem
from lora_recipes.recipe.recipe import Recipe

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
MUTATE = ("pissa", "olora", "corda")  # take the first A and B out of the base

# What PEFT's conversion for the untouched base drops or gets wrong (lora/model.py, subtract_mutated_init: it
# keeps lora_A and lora_B).
NOT_CONVERTED = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)
FIELDS = {
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


def problems(recipe: Recipe, has_bias: bool) -> Iterator[Problem]:
    """What of the recipe's `lora:` would not do what it says. `has_bias`: has any module one?"""
    lora = recipe.lora
    yield from _initialisation(recipe)
    for field, reason in FIELDS.items():
        if lora.get(field):
            yield Problem(recipe.at("lora", field), reason, "remove it")
    if (task := lora.get("task_type", "CAUSAL_LM")) != "CAUSAL_LM":
        yield Problem(
            recipe.at("lora", "task_type"),
            f"{task}: SFTTrainer trains causal language models",
            "write CAUSAL_LM, or remove it",
        )
    if lora.get("bias", "none") != "none" and not has_bias:
        yield Problem(
            recipe.at("lora", "bias"),
            "no module of this model has a bias: nothing more would be trained",
            "write none",
        )


def initialisation(recipe: Recipe) -> str:
    """`pissa`, `eva`, ...: the kind of lora.init_lora_weights that is a word, without its number of
    iterations; else empty.
    """
    init = recipe.lora.get("init_lora_weights")
    return init.lower().split("_niter_")[0] if isinstance(init, str) else ""


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """The `lora:` section as adapter_config.json will say it: of twice the rank where A and B were taken out
    of the base.
    """
    lora, kind = recipe.lora, initialisation(recipe)
    if kind not in MUTATE:
        return lora | ({"init_lora_weights": True} if kind == "loftq" else {})
    alpha = lora["lora_alpha"] * (2**0.5 if lora.get("use_rslora") else 2)
    return lora | {"r": 2 * lora["r"], "lora_alpha": alpha, "init_lora_weights": True}


def _taken_from_base(recipe: Recipe, kind: str) -> Iterator[Problem]:
    """What does not go with an adapter that is converted for the untouched base when it is saved."""
    lora, model = recipe.lora, recipe.model
    if "quantize" in model:
        do = "loftq is made for it; or remove model.quantize"
        yield Problem(
            recipe.at("lora", "init_lora_weights"),
            f"{kind} takes its part out of whole weights, not out of 4-bit ones",
            do,
        )
    if model.get("new_tokens"):
        yield Problem(
            recipe.at("model", "new_tokens"),
            f"are lost when a {kind} adapter is saved for the untouched base",
            "remove one",
        )
    for field in (f for f in NOT_CONVERTED if lora.get(f)):
        yield Problem(
            recipe.at("lora", field),
            f"is lost when a {kind} adapter is saved for the untouched base",
            "remove one of the two",
        )
    if model.get("adapter_dtype", "float32") != "float32":
        do = "remove it: float32"
        yield Problem(
            recipe.at("model", "adapter_dtype"),
            f"{kind} takes A and B out of the base; rounded, they are not its part",
            do,
        )


def _initialisation(recipe: Recipe) -> Iterator[Problem]:
    """What an initialisation needs to be what it says."""
    lora, model, kind = recipe.lora, recipe.model, initialisation(recipe)
    where = recipe.at("lora", "init_lora_weights")
    if kind == "lora_ga":
        found = (
            "lora_ga is computed from gradients before training, which this launcher does not do: it would be"
            " ordinary LoRA"
        )
        yield Problem(where, found, "use eva, pissa, true, gaussian or orthogonal")
    if kind in MUTATE:
        yield from _taken_from_base(recipe, kind)
    if kind == "eva" and (lora.get("eva_config") or {}).get("rho", 2.0) != 1:
        do = "write eva_config: {rho: 1.0}"
        yield Problem(
            where,
            "with rho above 1 (PEFT's default is 2) EVA chooses each module's rank from the data: nothing to"
            " plan with",
            do,
        )
    if kind == "loftq":
        if "quantize" not in model:
            do = "set model.quantize: nf4"
            yield Problem(
                where,
                "without it PEFT replaces the base by a rounded copy, which the adapter would need ever"
                " after",
                do,
            )
        elif lora.get("loftq_config"):
            found = "A and B are the SVD of what NF4 rounded away: one step, 4 bits"
            yield Problem(recipe.at("lora", "loftq_config"), found, "remove it")


def peft_problems(recipe: Recipe, arguments: Any, linear_attention: bool) -> Iterator[Problem]:
    """What of a `peft:` section would fail later, or do something else. `arguments`: the SFTConfig, with the
    defaults of TRL.

    Each was run on the tiny models: prefix tuning with checkpointing and on linear attention stops in the
    first step.
    """
    kind, train = recipe.peft["peft_type"], recipe.train
    if "quantize" in recipe.model:
        yield Problem(
            recipe.at("model", "quantize"),
            f"{kind} on a 4-bit base is not tried here",
            "write lora:, or remove it",
        )
    if kind in PROMPTS and (arguments.packing or arguments.padding_free):
        do = "set train.packing: false"
        yield Problem(
            recipe.at("train", "packing"),
            "virtual tokens stand once before a packed row, not before each text in it",
            do,
        )
    if kind == "PREFIX_TUNING" and arguments.gradient_checkpointing:
        do = "set train.gradient_checkpointing: false"
        yield Problem(
            recipe.at("train", "gradient_checkpointing"),
            "the second forward pass would see the prefix twice",
            do,
        )
    if kind == "PREFIX_TUNING" and linear_attention:
        do = "PROMPT_TUNING, P_TUNING or lora:"
        yield Problem(
            recipe.at("peft", "peft_type"),
            "linear-attention layers have no keys and values to put a prefix before",
            do,
        )
    if kind == "ADALORA" and train.get("save_strategy") != "no":
        found = "a checkpoint holds no importance scores: a resumed run would allocate other ranks"
        yield Problem(recipe.at("train", "save_strategy"), found, "set train.save_strategy: 'no'")
