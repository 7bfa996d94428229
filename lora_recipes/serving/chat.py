"""Ask a base and an adapter on a running server the same, side by side: `make chat MODEL=x`. Imports no
torch.
"""

from pathlib import Path
from typing import Any

from lora_recipes.core import cli, provenance
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.serving.endpoint import Answer, Endpoint

LONGEST = 128  # tokens of an answer


def chat(url: str, model: str, questions: list[str]) -> str:
    """The answers of the base and of `model` to `questions`, or, without any, to the prompts that training
    left as probes.
    """
    endpoint = Endpoint(url)
    models = endpoint.models()
    base = next(iter(models))
    if model not in models:
        raise RecipeError(
            Problem(url, f"serves no {model}", f"{cli.command(MODEL='one')} of {', '.join(models)}")
        )
    known = provenance.read(Path(models[model]))
    chats = bool(known and known.probes and isinstance(known.probes[0].prompt, list))
    asked: list[tuple[Any, dict[str, Any]]] = [
        ([{"role": "user", "content": q}], _kwargs(known)) if chats else (q, {}) for q in questions
    ]
    if not questions:
        asked = [(_opening(p.prompt), p.options) for p in known.probes] if known else []
    if not asked:
        raise RecipeError(Problem(model, "brings no questions of its own", 'Q="your question"'))
    width = max(len(base), len(model))
    stop = {"stop": [known.stop_text]} if known and known.stop_text else {}
    lines = []
    for prompt, options in asked:
        lines += ["> " + (prompt if isinstance(prompt, str) else prompt[-1]["content"])]
        for name in dict.fromkeys([base, model]):
            answer = _said(endpoint.write(name, prompt, options | stop, LONGEST))
            lines.append(f"{name:>{width}}  " + answer.replace("\n", "\n" + " " * (width + 2)))
        lines.append("")
    return "\n".join(lines[:-1])


def _said(answer: Answer) -> str:
    return answer.text.strip() + ("" if answer.ended else f" [no end within {LONGEST} tokens]")


def _kwargs(known: provenance.Provenance | None) -> dict[str, Any]:
    return {"chat_template_kwargs": known.chat_template_kwargs} if known else {}


def _opening(prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Messages as they are; of a text the first two thirds of its words, for the model to go on with."""
    if not isinstance(prompt, str):
        return prompt
    words = prompt.split(" ")
    return " ".join(words[: max(1, 2 * len(words) // 3)])
