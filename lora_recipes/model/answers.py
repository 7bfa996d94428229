"""What a server must answer: a few rows as it renders them, asked of base and adapter by PEFT at the end of
training.
"""

from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_recipes.core import weights
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.locate import local
from lora_recipes.core.provenance import Called, Probe, Provenance, Question
from lora_recipes.core.yamlfile import shown
from lora_recipes.data.gate import Gate
from lora_recipes.data.labels import LabelGate
from lora_recipes.data.row import Row
from lora_recipes.data.stops import Stops
from lora_recipes.model import heads
from lora_recipes.model.initialise import Start
from lora_recipes.recipe.base import Base, Resolved
from lora_recipes.recipe.recipe import Recipe

MOST, LONGEST = 4, 256  # probes, and tokens of each


def provenance(
    model: PeftModel, start: Start, gate: Gate, resolved: Resolved, rows: list[Row], whole: bool
) -> Provenance:
    """What a merge and a server need to know of the run that trained `model`, and what they must agree
    with. `start`: how its adapter began. `gate`: the data it was trained on. `whole`: does this process hold
    all of the model? Only then can it write an answer.
    """
    recipe, tokenizer, stops = resolved.recipe, gate.tokenizer, gate.stops
    return Provenance(
        **_trained_on(resolved),
        chat_template_kwargs=recipe.data.chat_template_kwargs,
        probes=probes(model, start, tokenizer, recipe, rows),
        stops=dict(zip(stops.trained, stops.named(stops.trained), strict=True)),
        stop_text=stops.text,
        question=question(model, tokenizer, recipe, rows, stops) if whole else None,
    )


def classified(model: PeftModel, gate: LabelGate, resolved: Resolved) -> Provenance:
    """The same of a classifier: what a merge and a server must call the shortest of the held-out texts, as
    far as they were not cut.
    """
    limit = resolved.recipe.train.max_length
    rows = [
        (text, example)
        for text, example in zip(gate.texts, gate.evaluation or gate.train, strict=True)
        if limit is None or len(example.input_ids) < limit
    ]
    rows = sorted(rows[:50], key=lambda row: len(row[1].input_ids))[: 2 * MOST]
    was_training = model.training
    model.eval()
    found = [heads.logprobs(model, example.input_ids) for _, example in rows]
    with heads.untouched(model):
        base = [heads.logprobs(model, example.input_ids) for _, example in rows]
    model.train(was_training)
    return Provenance(
        **_trained_on(resolved),
        chat_template_kwargs={},
        probes=[],
        called=[
            Called(text, example.input_ids, alone, adapter)
            for (text, example), alone, adapter in zip(rows, base, found, strict=True)
        ],
    )


def _trained_on(resolved: Resolved) -> dict[str, Any]:
    """Which recipe trained, and on which base."""
    recipe, base = resolved.recipe, resolved.base
    return {
        "recipe": recipe.name,
        "name_or_path": base.weights,
        "revision": recipe.model.revision,
        "fingerprint": fingerprint(base),
        "dtype": recipe.model.dtype,
        "quantize": recipe.model.quantize,
    }


def fingerprint(base: Base, like: str | None = None) -> str | None:
    """Which weights the base has; None for a hub model that is not in the cache. `like`: what it is to be
    compared with (weights.fingerprint). RecipeError when they are broken.
    """
    folder = local(base.weights, base.revision)
    try:
        return weights.fingerprint(folder, like) if folder else None
    except OSError:
        return None
    except ValueError as error:
        found = f"the base's weights cannot be read: {error}"
        raise RecipeError(Problem(shown(Path(base.weights)), found, "copy or fetch them again")) from None


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


def question(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: list[Row], stops: Stops
) -> Question | None:
    """The shortest conversation of the first 50 rows, answered by `model`: does the answer end by itself?
    None where there is none, or where nothing ends a reply.
    """
    chats = sorted((row for row in rows[:50] if row.conversational), key=lambda r: len(r.key))
    said = next((found for row in chats if (found := served(row, tokenizer, recipe))), None)
    if said is None or not (stops.trained or stops.text):
        return None
    prompt, options, ids, whole = said
    assert not isinstance(prompt, str), "the rows are conversations"
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    room = min(4 * (len(whole) - len(ids)) + LONGEST // 2, positions - len(ids) - 1)
    if room < 2:
        return None
    was_training = model.training
    _, ended = greedy(model.eval(), tokenizer, ids, room // 2, list(stops.all), stops.text)
    model.train(was_training)
    return Question(prompt, options, room // 2, ended, room)


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, ids: list[int], most: int, stops: list[int], text: str | None = None
) -> tuple[str, int | None]:
    """The greedy continuation of `ids`, at most `most` tokens, as text; and how many tokens it took until it
    ended at one of `stops`, or at `text`: None where it ran on.
    """
    # A config of its own: the base's may sample, or punish repetition.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=[text] if text else None,
    )
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        tokenizer=tokenizer if text else None,
    )
    written = output[0, len(ids) :].tolist()
    said = str(tokenizer.decode(written, skip_special_tokens=True))
    ended = bool(set(written[-1:]) & set(stops)) or bool(text and said.rstrip().endswith(text))
    return said.removesuffix(text or "").strip(), len(written) if ended else None


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
