"""Rows -> tokens and labels, as they are trained; and whether each trained turn stands after the very prompt a server will render.

What comes out (`input_ids`, `labels`) is handed to SFTTrainer as it is, so that what the gate checked is what is trained. The rules are
those of TRL's own preparation (trl/trainer/sft_trainer.py, `_prepare_dataset`); a test holds them equal.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from lora_recipes.data import Row, Split
from lora_recipes.messages import Problem, RecipeError, nearest, raise_if
from lora_recipes.recipe import Recipe, rooted

IGNORED = -100  # torch.nn.CrossEntropyLoss: no loss at this position


@dataclass
class Example:
    """One row as it is trained: `input_ids` and `labels` (-100: no loss) of equal length, before truncation to max_length.

    `turns` counts its trained replies, `faithful` those of them whose preceding tokens are what a server renders as the prompt.
    """

    where: str
    input_ids: list[int]
    labels: list[int]
    turns: int
    faithful: int


@dataclass
class Counts:
    """What the tokens of a split look like after truncation. `tokens` and `supervised` are None when no tokenizer is at hand."""

    rows: int
    tokens: int | None = None
    supervised: int | None = None
    longest: int | None = None
    truncated: int = 0
    dropped: int = 0
    turns: int = 0
    faithful: int = 0
    open_turns: int = 0

    def share(self, name: str) -> float:
        """`truncated` as a share of rows, `unfaithful` and `no_end_of_turn` as shares of trained turns; 0 where there are none."""
        count, of = {
            "truncated": (self.truncated, self.rows),
            "unfaithful": (self.turns - self.faithful, self.turns),
            "no_end_of_turn": (self.open_turns, self.turns),
        }[name]
        return count / of if of else 0.0


class Characters:
    """Stands in for a tokenizer that is not at hand: a token a character. Enough to compare renderings exactly, not to count tokens."""

    eos_token_id = None

    def __init__(self, chat_template: str | None):
        self.chat_template = chat_template

    def __call__(self, text: str) -> dict[str, list[int]]:
        """The characters of `text` as `input_ids`."""
        return {"input_ids": list(map(ord, text))}

    def apply_chat_template(self, messages: list[dict], *, tools: Any = None, chat_template: str | None = None, **kwargs: Any) -> dict:
        """As PreTrainedTokenizerBase.apply_chat_template(tokenize=True, return_dict=True), in characters."""
        masked = kwargs.pop("return_assistant_tokens_mask", False)
        options = {k: v for k, v in kwargs.items() if k not in ("tokenize", "return_dict")} | {"return_assistant_tokens_mask": masked}
        template = chat_template or self.chat_template
        (text,), spans = render_jinja_template(conversations=[messages], tools=tools, chat_template=template, **options)
        mask = [0] * len(text)
        for start, end in spans[0] if masked else []:
            mask[start:end] = [1] * (end - start)
        return self(text) | ({"assistant_masks": mask} if masked else {})


def chat_template(name: str, where: str) -> str:
    """The text of a chat template: one that TRL's wheel carries, by name (`qwen3_5_think`), or a .jinja file."""
    if name.endswith((".jinja", ".j2")):
        try:
            return rooted(name).read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(Problem(where, f"{name} cannot be read ({error.strerror})")) from None
    folder = Path(str(files("trl").joinpath("chat_templates")))
    names = [p.stem for p in folder.glob("*.jinja") if not p.stem.endswith("_training")]
    if name not in names:
        raise RecipeError(
            Problem(where, f"TRL carries no chat template {name!r}", f"did you mean {nearest(name, names)}? Or give a .jinja file")
        )
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def examples(split: Split, tokenizer: Any, recipe: Recipe) -> list[Example]:
    """Every row of `split` as tokens and labels, under the recipe's train.completion_only_loss and train.assistant_only_loss."""
    assistant_only = recipe.train.get("assistant_only_loss", False)
    if split.rows and split.rows[0].format != "text" and not isinstance(split.rows[0].value.get("prompt"), str):
        _need_template(tokenizer, recipe)
    training_template = None
    if assistant_only and not has_generation_markers(tokenizer.chat_template or ""):
        try:
            training_template = get_training_chat_template(tokenizer)
        except ValueError as error:
            do = "give one row per assistant turn instead: data.rows: assistant_turn, without assistant_only_loss"
            raise RecipeError(Problem(recipe.at("train", "assistant_only_loss"), str(error).split(". ")[0], do)) from None
    done, problems = [], []
    for row in split.rows:
        try:
            done.append(_example(row, tokenizer, recipe, training_template))
        except RecipeError as error:
            problems += error.problems
        except (TemplateError, TypeError) as error:
            problems.append(Problem(row.where, f"the chat template refuses this row: {error}", "see the template's own rules for turns"))
    raise_if(problems[:20])
    return done


def _need_template(tokenizer: Any, recipe: Recipe) -> None:
    if not tokenizer.chat_template:
        do = "set model.chat_template (a template of TRL by name, or a .jinja file), or train on text"
        raise RecipeError(Problem(recipe.at("data", "train"), "the rows are conversations, but the tokenizer has no chat template", do))


def _example(row: Row, tokenizer: Any, recipe: Recipe, training_template: str | None) -> Example:
    options = {"tokenize": True, "return_dict": True, **recipe.data.get("chat_template_kwargs", {})}
    tools = row.value.get("tools")
    serving = {"tools": tools, **options}
    trained = {**serving, "chat_template": training_template} if training_template else serving
    assistant_only = recipe.train.get("assistant_only_loss", False)
    completion_only = recipe.train.get("completion_only_loss")

    def rendered(messages: list[dict]) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **serving)["input_ids"])

    if row.format == "text":
        ids = list(tokenizer(_closed(row.value["text"], tokenizer))["input_ids"])
        return Example(row.where, ids, list(ids), 0, 0)
    if isinstance(row.value.get("prompt"), str):
        prompt = list(tokenizer(row.value["prompt"])["input_ids"])
        ids = list(tokenizer(row.value["prompt"] + _closed(row.value["completion"], tokenizer))["input_ids"])
        prompts, mask = [prompt], None
    else:
        history = row.value.get("prompt", [])
        messages = history + row.value["completion"] if history else row.value["messages"]
        output = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=assistant_only, **trained)
        ids, mask = list(output["input_ids"]), output.get("assistant_masks") if assistant_only else None
        prompt = list(tokenizer.apply_chat_template(history, add_generation_prompt=True, **trained)["input_ids"]) if history else []
        prompts = [rendered(messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant" and i >= len(history)]
    if mask is not None and 1 not in mask:
        raise RecipeError(Problem(row.where, "assistant_only_loss finds no assistant token in this row", "look at the chat template"))
    common = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    keep = [1] * len(ids)
    if prompt and completion_only is not False:
        keep[:common] = [0] * common
    if mask is not None:
        keep = [k & m for k, m in zip(keep, mask, strict=True)]
    labels = [token if k else IGNORED for token, k in zip(ids, keep, strict=True)]
    return Example(row.where, ids, labels, len(prompts), sum(ids[: len(p)] == p for p in prompts))


def _closed(text: str, tokenizer: Any) -> str:
    """Plain text ends with the end-of-sequence token, as TRL adds it."""
    eos = getattr(tokenizer, "eos_token", None) or ""
    return text if text.endswith(eos) else text + eos


def truncated(example: Example, recipe: Recipe, default: int = 1024) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` cut to train.max_length (TRL's default: 1024), as TRL cuts them; whole when rows are packed."""
    length = recipe.train.get("max_length", default)
    if length is None or recipe.train.get("packing", False):
        return example.input_ids, example.labels
    cut = slice(-length, None) if recipe.train.get("truncation_mode") == "keep_end" else slice(None, length)
    return example.input_ids[cut], example.labels[cut]


def counts(done: list[Example], tokenizer: Any, recipe: Recipe) -> Counts:
    """Tokens, truncation and turns of a split, as trained."""
    result = Counts(rows=len(done))
    counted = not isinstance(tokenizer, Characters)
    lengths, supervised = [], 0
    for example in done:
        ids, labels = truncated(example, recipe)
        lengths.append(len(ids))
        supervised += sum(label != IGNORED for label in labels)
        if counted:
            result.truncated += len(ids) < len(example.input_ids)
            result.dropped += all(label == IGNORED for label in labels)
            result.open_turns += max(0, example.turns - _closed_turns(ids, labels, tokenizer.eos_token_id))
        result.turns += example.turns
        result.faithful += example.faithful
    if counted:
        result.tokens, result.supervised, result.longest = sum(lengths), supervised, max(lengths, default=0)
    return result


def _closed_turns(ids: list[int], labels: list[int], eos: int | None) -> int:
    return sum(i == eos and label != IGNORED for i, label in zip(ids, labels, strict=True))


def shown(example: Example, tokenizer: Any, recipe: Recipe) -> str:
    """The row as text, what is trained set between >> and <<."""
    ids, labels = truncated(example, recipe)
    parts: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        if not parts or parts[-1][0] != (label != IGNORED):
            parts.append((label != IGNORED, []))
        parts[-1][1].append(token)
    decode = (lambda t: "".join(map(chr, t))) if isinstance(tokenizer, Characters) else tokenizer.decode
    return "".join(f">>{decode(tokens)}<<" if on else decode(tokens) for on, tokens in parts)
