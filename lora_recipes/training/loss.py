"""Before the first step: is the loss that TRL trains that of the model's own answers, and do they come from
what stands before them alone?

TRL computes the loss from the weights of lm_head and the hidden states before it (trl/trainer/utils.py,
add_fused_lm_head); what a class does to its logits besides is read from a few names in its config. A plan
asks a small twin of the class (model/twin.py); here the base is asked, with its adapter, on a row of the run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.record import LossCheck
from lora_recipes.data.render import IGNORED, Example
from lora_recipes.model import lm_head
from lora_recipes.recipe.base import Resolved

TOKENS = 128  # of the row: its logits are 78 MB with a vocabulary of 152,000, in float32
EXACT = 1e-4  # share of the loss that float32 is off by at most, on the way to it
STEPS = 1  # of the logits' dtype / sqrt(n) in the mean of n tokens: 3.5 deviations of rounding each


@torch.no_grad()
def check(trainer: Any, rows: Sequence[Example], resolved: Resolved) -> LossCheck | None:
    """TRL's loss of a row of `rows` against the cross entropy of the model's own logits for it, in eval mode;
    None where none of the first 50 has a trained token. RecipeError when they differ, or when a later token
    changes the logits of earlier ones. Changes nothing.
    """
    row = next((cut for cut in map(_cut, rows[:50]) if cut), None)
    if row is None:
        return None
    model = trainer.model
    batch = {k: _to(v, trainer.args.device) for k, v in trainer.data_collator([row]).items()}
    labels, was_training = batch.pop("labels"), model.training
    model.eval()
    with lm_head.of_labels(trainer.args.torch_compile):
        found = model(**batch, labels=labels, use_cache=False, fused_lm_head=True)
    logits = model(**batch, use_cache=False).logits
    virtual, end = logits.shape[1] - labels.shape[1], len(row["input_ids"]) - 1
    ids = row["input_ids"]
    batch["input_ids"][0, end] = next((other for other in ids if other != ids[end]), 0)
    changed = model(**batch, use_cache=False).logits
    model.train(was_training)
    tokens, step = int(found.label_mask.sum()), torch.finfo(logits.dtype).eps * logits.abs().max().item()
    trained = -found.log_probs.sum().item() / tokens
    wanted = torch.cat([labels.new_full((virtual,), IGNORED), labels[0]])  # those of a prompt have none
    own = cross_entropy(logits[0, :-1].float(), wanted[1:], ignore_index=IGNORED).item()
    ahead = (changed - logits)[0, : virtual + end].abs().max().item()
    checked = LossCheck(trl=trained, own=own, tokens=tokens, allowed=EXACT * own + STEPS * step / tokens**0.5)
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    if not abs(trained - own) <= checked.allowed:
        said = f"TRL would train {name} for another loss than its own: {trained:.4f} against {own:.4f} nats a"
        said += f" token, at most {checked.allowed:.1g} apart allowed ({rows[0].where} and on)"
        do = "TRL takes lm_head alone, and the class does more to its logits: name another base"
        raise RecipeError(Problem(resolved.base.at, said, do))
    if ahead > 4 * step + EXACT * logits.std().item():
        said = f"{name} looks ahead: the last token changes its answers to earlier ones by up to {ahead:.2g}"
        raise RecipeError(Problem(resolved.base.at, said, "name a decoder, a checkpoint that continues text"))
    return checked


def _cut(row: Example) -> dict[str, list[int]] | None:
    """At most TOKENS of `row`, from half of them before its first trained token on; None without one."""
    first = next((i for i, label in enumerate(row.labels) if i and label != IGNORED), None)
    if first is None:
        return None
    begin = max(0, first - TOKENS // 2)
    part = slice(begin, begin + TOKENS)
    return {"input_ids": row.input_ids[part], "labels": row.labels[part]}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
