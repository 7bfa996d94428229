"""What a server must answer: a few rows as it renders them, asked of base and adapter by PEFT at the end of
training.
"""

from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_recipes.core import safetensors
from lora_recipes.core.locate import local
from lora_recipes.core.provenance import Probe, Provenance
from lora_recipes.data.row import Row
from lora_recipes.model.initialise import Start
from lora_recipes.recipe.base import Base, Resolved
from lora_recipes.recipe.recipe import Recipe

MOST, LONGEST = 4, 256  # probes, and tokens of each


def provenance(
    model: PeftModel, start: Start, tokenizer: PreTrainedTokenizerBase, resolved: Resolved, rows: list[Row]
) -> Provenance:
    """What a merge and a server need to know of the run that trained `model`, and what they must agree
    with. `start`: how its adapter began.
    """
    recipe, base = resolved.recipe, resolved.base
    return Provenance(
        recipe=recipe.name,
        name_or_path=base.weights,
        revision=recipe.model.revision,
        fingerprint=fingerprint(base),
        dtype=recipe.model.dtype,
        quantize=recipe.model.quantize,
        chat_template_kwargs=recipe.data.chat_template_kwargs,
        probes=probes(model, start, tokenizer, recipe, rows),
    )


def fingerprint(base: Base) -> str | None:
    """Which weights the base has; None for a hub model that is not in the cache as safetensors."""
    folder = local(base.weights, base.revision)
    try:
        return safetensors.fingerprint(folder) if folder else None
    except OSError:
        return None


def probes(
    model: PeftModel, start: Start, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: list[Row]
) -> list[Probe]:
    """What `model` answers with and without its adapter to a few of `rows` (the shortest of the first 50), as
    a server renders them.
    """
    was_training = model.training
    model.eval()
    found: list[Probe] = []
    for row in sorted(rows[:50], key=lambda r: len(r.key)):
        if len(found) < MOST and (said := served(row, tokenizer, recipe)):
            prompt, options, prompt_ids, ids = said
            ids = ids[:LONGEST]
            with start.base_of(model):
                base = logprobs(model, ids)
            found.append(Probe(prompt, len(prompt_ids), ids, base, logprobs(model, ids), options))
    model.train(was_training)
    return found


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """Log-probability (nats) of each token but the first."""
    device = next(model.parameters()).device
    tensor = torch.tensor([ids], device=device)
    logits = (
        model(input_ids=tensor, use_cache=False).logits[0, -len(ids) : -1].float()
    )  # prompt tuning puts virtual tokens before them
    return [round(x, 6) for x in logits.log_softmax(-1).gather(-1, tensor[0, 1:, None])[:, 0].tolist()]


def served(
    row: Row, tokenizer: Any, recipe: Recipe
) -> tuple[str | list[dict[str, Any]], dict[str, Any], list[int], list[int]] | None:
    """A row as a server sees it: the prompt, what goes to the chat template with it, the prompt's tokens, and
    those of prompt and reply.

    A plain text is all prompt. None for a conversation that no server would be asked to go on with.
    """
    if not row.conversational:
        text = row.value.get("prompt", "") + row.value.get("completion", row.value.get("text", ""))
        ids = list(tokenizer(text)["input_ids"])
        return text, {}, ids, ids
    last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=0)
    reply = row.messages[last].get("content")
    options = row.options | {
        "chat_template_kwargs": recipe.data.chat_template_kwargs | row.value.get("chat_template_kwargs", {})
    }
    given = {"tools": options.get("tools"), **options["chat_template_kwargs"]}
    try:
        prompt = tokenizer.apply_chat_template(
            row.messages[:last], add_generation_prompt=True, return_dict=True, **given
        )["input_ids"]
    except (TemplateError, IndexError):
        return None
    if not (last and isinstance(reply, str) and reply):
        return None
    return (
        row.messages[:last],
        options,
        list(prompt),
        [*prompt, *tokenizer(reply, add_special_tokens=False)["input_ids"]],
    )
