"""Ask a model: next-token probes, before and after training."""

import torch
from transformers import PreTrainedTokenizerBase

from lora_recipes.core.errors import Problem
from lora_recipes.core.record import Answer
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.recipe.sections import Probe


def problems(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[Problem]:
    """Each probe whose answer is no word that can follow its prompt in this vocabulary."""
    asked = [(kind, i, probe) for kind, probes in _kinds(recipe).items() for i, probe in enumerate(probes)]
    return [
        Problem(
            recipe.at("probes", kind, i),
            f"{probe['answer']!r} is no word that can follow the prompt in this vocabulary",
            "choose another",
        )
        for kind, i, probe in asked
        if _tokens(tokenizer, probe)[1] in (None, tokenizer.unk_token_id)
    ]


def _kinds(recipe: Recipe) -> dict[str, list[Probe]]:
    return {"change": recipe.probes.change, "keep": recipe.probes.keep}


def _tokens(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> tuple[list[int], int | None]:
    """The prompt's tokens, and the first token of the answer; None when the two merge into other tokens."""
    ids = tokenizer(probe["prompt"])["input_ids"]
    full = tokenizer(f"{probe['prompt']} {probe['answer']}")["input_ids"]
    return ids, full[len(ids)] if full[: len(ids)] == ids and len(full) > len(ids) else None


def probes(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[Answer]:
    """The recipe's `probes:` asked of `model`; in eval mode, without dropout, changing nothing."""
    was_training = model.training
    model.eval()
    asked = [(kind, probe) for kind, probes in _kinds(recipe).items() for probe in probes]
    answers = [_ask(model, tokenizer, kind, probe) for kind, probe in asked]
    model.train(was_training)
    return answers


@torch.no_grad()
def _ask(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, kind: str, probe: Probe) -> Answer:
    ids, wanted = _tokens(tokenizer, probe)
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
    shares = logits.float().softmax(-1)
    best = shares.topk(3)
    top = [
        (str(tokenizer.decode([i])).strip(), round(p, 4))
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return Answer(kind, probe["prompt"], probe["answer"], round(shares[wanted].item(), 4), top)


def table(before: list[Answer], after: list[Answer]) -> list[str]:
    """Before and after, a probe a row, in two blocks: what should change, what should stay."""
    if not after:
        return []
    width = max(len(p.prompt) for p in after)
    said = {"change": "should change", "keep": "should stay"}
    first = {"change": "have their answer first", "keep": "kept theirs first"}
    lines = []
    for kind in ("change", "keep"):
        rows = [(b, a) for b, a in zip(before, after, strict=True) if a.kind == kind]
        if rows:
            lines.append(
                f"{said[kind]:<{width}}  {'answer':<10} {'before':>7} {'after':>7}   top 3 before -> after"
            )
        for b, a in rows:
            tops = " -> ".join(", ".join(f"{w} {100 * p:.0f}" for w, p in side.top) for side in (b, a))
            lines.append(
                f"{a.prompt:<{width}}  {a.answer:<10} {b.probability:>7.1%} {a.probability:>7.1%}   {tops}"
            )
        if rows:
            count = sum(a.first for _, a in rows)
            lines += [f"{count} of {len(rows)} that {said[kind]} {first[kind]}", ""]
    return lines[:-1]
