"""LoRA variants that PEFT accepts by a field and that would not do here what the field says. Imports no torch.

Run on the tiny model: eva, lora_ga and use_qalora trained ordinary LoRA; pissa and olora an adapter that is wrong on the base it names;
layer_replication, aLoRA and tied token indices failed later. The rest is from PEFT's own description of the field.
"""

from collections.abc import Iterator

from lora_recipes.messages import Problem
from lora_recipes.recipe import Recipe

NEEDS_DATA = (
    "is computed from data, gradients or quantised weights before training, which this launcher does not do: it would be ordinary LoRA"
)
CHANGES_BASE = "changes the base's weights: the adapter that is saved would be wrong on the base that it names"
INITS = {"eva": NEEDS_DATA, "lora_ga": NEEDS_DATA, "loftq": NEEDS_DATA, "corda": NEEDS_DATA, "olora": CHANGES_BASE, "pissa": CHANGES_BASE}
FIELDS = {
    "use_qalora": "has no effect on a base that is not quantised by GPTQ",
    "alora_invocation_tokens": "is active only after its tokens; the rows would have to hold them",
    "layer_replication": "changes the depth of the base; the probes and the server have the old one",
    "use_bdlora": "is for sharded serving; no server here takes it",
    "arrow_config": "routes between adapters that are trained already",
    "ensure_weight_tying": "gives another number of trained parameters than PEFT's own count on a model without weights",
    "megatron_config": "needs Megatron-LM",
}


def problems(recipe: Recipe, tied: bool, has_bias: bool) -> Iterator[Problem]:
    """What of the recipe's `lora:` would not do what it says. `tied`: are the embeddings lm_head too; `has_bias`: has any module one?"""
    lora = recipe.lora
    init = lora.get("init_lora_weights")
    if isinstance(init, str) and (reason := INITS.get(init.lower().split("_niter_")[0])):
        do = "use true, gaussian or orthogonal"
        yield Problem(recipe.at("lora", "init_lora_weights"), f"{init} {reason}", do)
    for field, reason in FIELDS.items():
        if lora.get(field):
            yield Problem(recipe.at("lora", field), reason, "remove it")
    if (task := lora.get("task_type", "CAUSAL_LM")) != "CAUSAL_LM":
        yield Problem(recipe.at("lora", "task_type"), f"{task}: SFTTrainer trains causal language models", "write CAUSAL_LM, or remove it")
    if lora.get("bias", "none") != "none" and not has_bias:
        yield Problem(recipe.at("lora", "bias"), "no module of this model has a bias: nothing more would be trained", "write none")
    if lora.get("trainable_token_indices") and tied:
        do = "untie the embeddings, or train them whole: modules_to_save: [embed_tokens]"
        yield Problem(recipe.at("lora", "trainable_token_indices"), "TRL's loss reads lm_head.weight, which is the tied embedding", do)
