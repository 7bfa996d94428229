"""What a trained classifier calls a text: `lora-recipes predict`, and the scores of `lora-recipes eval`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, head
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.head import Head
from lora_recipes.core.record import Scores
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import labels
from lora_recipes.data.row import DECODER
from lora_recipes.model import attach, heads, scores
from lora_recipes.recipe.recipe import Recipe

AT_ONCE = 256  # texts that are read before the first of them is answered, where they come from a file


def evaluation(run: RunFolder, asked: Recipe, adapter: Path | None, base: Path | None) -> Scores:
    """The scores of the run's classifier (or of `adapter`) on data.eval, or on the rows that training held
    out; they go into run.json. RecipeError where the recipe's classes are not those of the head.
    """
    result = adapter or run.result(asked.method)
    train, held = labels.splits(asked)
    names = labels.classes(asked, train)
    same_classes(names, head.needed(result), asked.at("classify", "labels"), result)
    labels.known(held, names)
    train, held = labels.validation(asked, train, held)
    if not held.rows:
        do = f"name rows: {cli.command(SET='data.eval=FILE')}"
        raise RecipeError(Problem(asked.at("data"), "there is nothing to evaluate on", do))
    model, tokenizer, its = attach.classifier(result, base)
    logits = heads.logits(model, tokenizer, [its.cut(_ids(tokenizer, r.value["text"])) for r in held.rows])
    majority = max(names, key=train.labels.count)
    places = [names.index(label) for label in held.labels]
    found = scores.of(logits.numpy(), places, names, majority, held.sha256)
    target = RunFolder(adapter.parent) if adapter else run
    if record := target.record:
        target.write_record(dataclasses.replace(record, scores=found))
        scores.draw(found, target.path / "confusion.png")
    return found


def same_classes(names: list[str], its: Head, at: str, folder: Path) -> None:
    """RecipeError where `names`, of a recipe or a file, are not the classes of the head in `folder`, in its
    order: each answer would have another name.
    """
    if names == its.labels:
        return
    if set(names) == set(its.labels):
        place = next(i for i, (a, b) in enumerate(zip(names, its.labels, strict=True)) if a != b)
        found = f"the classes stand in another order than in {shown(folder)}: number {place + 1} is"
        found += f" {names[place]!r} here, {its.labels[place]!r} there"
    else:
        found = f"{len(names)} classes ({', '.join(names[:6])}), the head in {shown(folder)} has"
        found += f" {len(its.labels)} ({', '.join(its.labels[:6])})"
    raise RecipeError(Problem(at, found, f"write them as {head.FILE} there has them, or train anew"))


def predict(
    folder: Path, lines: Iterator[str], json_lines: bool, base: Path | None = None, file: Path | None = None
) -> Iterator[str]:
    """A line of JSON for each text of `lines`: the text, its class, and the probability of each class.

    `json_lines`: are they JSON objects with a text, or the texts themselves? `file`: a label file that must
    agree with the head. Empty lines are passed over.
    """
    if file:
        same_classes(labels.label_file(file, "--labels"), head.needed(folder), "--labels", folder)
    model, tokenizer, its = attach.classifier(folder, base)
    waiting: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        waiting.append(_text(line, number) if json_lines else line.rstrip("\r\n"))
        if len(waiting) == (AT_ONCE if json_lines else 1):
            yield from _answered(model, tokenizer, its, waiting)
            waiting = []
    if waiting:
        yield from _answered(model, tokenizer, its, waiting)


def _text(line: str, number: int) -> str:
    try:
        found: Any = DECODER.decode(line)
    except ValueError as error:
        raise RecipeError(
            Problem(f"line {number}", f"is no JSON: {error}", "an object with a text")
        ) from None
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(Problem(f"line {number}", "has no text", 'write {"text": "..."}'))
    return text


def _answered(model: Any, tokenizer: Any, its: Head, texts: list[str]) -> Iterator[str]:
    rows = [its.cut(_ids(tokenizer, text)) for text in texts]
    for text, shares in zip(texts, scores.shares(heads.logits(model, tokenizer, rows).numpy()), strict=True):
        called = {name: round(float(share), 6) for name, share in zip(its.labels, shares, strict=True)}
        yield json.dumps(
            {"text": text, "label": its.labels[int(shares.argmax())], "probabilities": called},
            ensure_ascii=False,
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
