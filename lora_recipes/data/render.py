"""Rows -> tokens and labels, as they are trained; and whether each trained turn stands after the very prompt
a server will render.

What comes out (`input_ids`, `labels`) is handed to SFTTrainer as it is, so that what the gate checked is what
is trained. The rules are those of TRL's own preparation (trl/trainer/sft_trainer.py, `_prepare_dataset`); a
test holds them equal.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from lora_recipes.core.errors import Problem, RecipeError, nearest
from lora_recipes.core.files import ROOT, find, looked
from lora_recipes.data.read import raise_first
from lora_recipes.data.row import SAID, SWITCHES, Row, off
from lora_recipes.data.stand_in import Characters
from lora_recipes.recipe.recipe import Recipe

PIECES = 10_000  # texts whose tokens are remembered: prompts end alike
BLANKS = 2  # tokens between a reply and its end, e.g. a line break
# What turns are made of in the published templates; other added tokens (<think>, <tool_call>) people write.
MARK = re.compile(r"<[|\uff5c][^<>\s]*>|<[^<>\s]*[|\uff5c]>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|</?s>")

# Keys of a message that are checked elsewhere, or say nothing to a template.
READ = ("role", "content", "tool_calls", *SWITCHES)

IGNORED = -100  # torch.nn.CrossEntropyLoss: no loss at this position


@dataclass(frozen=True)
class Turn:
    """A reply in a row: `input_ids[start:end]` are its words, `input_ids[end]` should end it.

    `faithful`: the tokens before it are what a server renders as the prompt. `call`: it calls a tool, and
    the brackets of the call follow before its end.
    """

    start: int
    end: int
    faithful: bool
    call: bool = False


@dataclass
class Example:
    """One row as it is trained: `input_ids` and `labels` (-100: no loss) of equal length, before truncation,
    and its replies.
    """

    where: str
    input_ids: list[int]
    labels: list[int]
    turns: list[Turn] = field(default_factory=list)


@dataclass
class Counts:
    """What a split looks like after truncation. `tokens`, `supervised` and `longest` are None when no
    tokenizer is at hand.

    `turns` are the replies with a token in the loss; `faithful` those that a server would have prompted for
    in the same tokens; `open_turns` those without an end-of-turn token in the loss (not known, 0, without a
    tokenizer). `dropped`: rows without any loss.
    """

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
        """`truncated` as a share of rows, `unsupervised` of tokens, the others of trained turns; 0 where
        there are none.
        """
        count, of = {
            "truncated": (self.truncated, self.rows),
            "unsupervised": ((self.tokens or 0) - (self.supervised or 0), self.tokens or 0),
            "unfaithful": (self.turns - self.faithful, self.turns),
            "no_end_of_turn": (self.open_turns, self.turns),
        }[name]
        return count / of if of else 0.0


def chat_template(name: str, where: str, beside: Path = ROOT) -> str:
    """The text of a chat template: one that TRL's wheel carries, by name (`qwen3_5_think`), or a .jinja
    file, named by a file in the folder `beside`.
    """
    if name.endswith((".jinja", ".j2")):
        try:
            return find(name, beside).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            do = "" if find(name, beside).exists() else looked(name, beside)
            raise RecipeError(Problem(where, f"{name} cannot be read ({reason})", do)) from None
    folder = Path(str(files("trl").joinpath("chat_templates")))
    names = [p.stem for p in folder.glob("*.jinja") if not p.stem.endswith("_training")]
    if name not in names:
        do = f"did you mean {nearest(name, names)}? Or give a .jinja file"
        raise RecipeError(Problem(where, f"TRL carries no chat template {name!r}", do))
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


class Renderer:
    """Rows -> examples, one at a time, under the recipe's train.completion_only_loss and
    train.assistant_only_loss. What is wrong with rows is gathered: `faults`, and `system`, the rows that are
    refused for their system turn, by the template's words (where the first is, how many there are).

    `first`: the first row; all rows of a split are of its kind. RecipeError when the recipe asks something of
    that kind in vain.
    """

    def __init__(self, first: Row, tokenizer: Any, recipe: Recipe):
        _check_losses(first, tokenizer, recipe)
        self.tokenizer, self.recipe = tokenizer, recipe
        self.template = _training_template(tokenizer, recipe)
        self.marks = [] if "control_tokens" in recipe.data.permit else control_tokens(tokenizer)
        self.backend = _backend(tokenizer)
        self.added = frozenset(getattr(tokenizer, "added_tokens_decoder", {}))
        self.pieces: dict[str, list[int]] = {}
        self.faults: list[Problem] = []
        self.system: dict[str, tuple[str, int]] = {}

    def example(self, row: Row) -> Example | None:
        """`row` as it is trained; None where it is faulty."""
        forged = _forged(row, self.marks, self.tokenizer)
        made = None
        try:
            made = (
                _conversation(row, self) if row.conversational else _plain(row, self.tokenizer, self.recipe)
            )
        except RecipeError as error:
            self.faults += error.problems
        except (TemplateError, TypeError, ValueError) as error:
            if _without_system(row, self.tokenizer, self.recipe):
                where, count = self.system.get(str(error), (row.where, 0))
                self.system[str(error)] = where, count + 1
            else:
                found, do = f"the chat template refuses this row: {error}", "see its own rules for turns"
                self.faults.append(Problem(row.where, found, do))
        if forged:
            self.faults.append(Problem(row.where, *forged))
        return None if forged else made

    def piece(self, text: str) -> list[int]:
        """The tokens of the end of a prompt, which is the same in row after row."""
        if text not in self.pieces:
            if len(self.pieces) > PIECES:
                self.pieces.clear()
            self.pieces[text] = self.encoded(text)[0]
        return self.pieces[text]

    def encoded(self, text: str) -> tuple[list[int], Any]:
        """The tokens of a rendered text, and the tokenizers.Encoding that knows the place of each; None where
        there is none.
        """
        if self.backend is not None:
            found = self.backend.encode(text, add_special_tokens=False)
            return found.ids, found
        output = self.tokenizer(text, add_special_tokens=False)
        return list(output["input_ids"]), _places(output)


def _backend(tokenizer: Any) -> Any:
    """The Rust tokenizer behind `tokenizer`, where that adds nothing of its own: a quarter of the time of a
    call is transformers' way there. None where it is not known to add nothing.
    """
    kind = type(tokenizer)
    own = getattr(kind, "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus
    if own or kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # as a call without these arguments does
    backend.no_padding()
    return backend


def _places(output: Any) -> Any:
    return output.encodings[0] if getattr(output, "is_fast", False) else None


def examples(rows: list[Row], tokenizer: Any, recipe: Recipe) -> list[Example]:
    """Every row of `rows` as it is trained. RecipeError lists the faulty ones."""
    if not rows:
        return []
    renderer = Renderer(rows[0], tokenizer, recipe)
    done = [example for row in rows if (example := renderer.example(row))]
    raise_first(renderer.faults + refused(renderer.system), "data")
    return done


def refused(system: dict[str, tuple[str, int]]) -> list[Problem]:
    """What there is to say about rows whose system turn is refused (`Renderer.system`)."""
    do = "put its text at the beginning of the first user turn, in rows and in requests, or give a"
    do += " model.chat_template that takes one"
    found = []
    for error, (where, count) in system.items():
        more = f" (and so have {count - 1:,} more)" if count > 1 else ""
        said = f"the chat template takes no system turn, and this row has one{more}: {error}"
        found.append(Problem(where, said, do))
    return found


def _without_system(row: Row, tokenizer: Any, recipe: Recipe) -> bool:
    """Does the chat template take the turns of `row`, which it refuses, without their system turn?"""
    if not row.conversational or row.messages[0]["role"] != "system":
        return False
    kwargs = recipe.data.chat_template_kwargs | row.value.get("chat_template_kwargs", {})
    try:
        tokenizer.apply_chat_template(row.messages[1:], tokenize=False, **kwargs)
    except (TemplateError, TypeError, ValueError):
        return False
    return True


def control_tokens(tokenizer: Any) -> list[str]:
    """What `tokenizer` reads as control tokens wherever it stands: those that it names (bos, eos, pad) and
    those that turns are made of; of the chat template alone where no tokenizer is at hand.
    """
    if isinstance(tokenizer, Characters):
        return sorted(set(MARK.findall(tokenizer.chat_template or "")))
    named = set(tokenizer.special_tokens_map.values()) - {tokenizer.unk_token}
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [text for text in added if text in named or MARK.fullmatch(text)]


def _forged(row: Row, marks: list[str], tokenizer: Any) -> tuple[str, str] | None:
    """A control token in what is said: after it the row goes on in a role that nobody gave it.

    Rows of text may begin and end with the tokens with which the tokenizer and TRL would begin and end them;
    a prompt and its completion are made into tokens as one text.
    """
    begins, texts = {mark[:2] for mark in marks}, list(row.texts)
    if not row.conversational:
        bos, eos = (getattr(tokenizer, key, None) or "" for key in ("bos_token", "eos_token"))
        first, last = ("prompt", "completion") if "prompt" in row.value else ("text", "text")
        said = {k: row.value[k] for k in dict.fromkeys((first, last))}
        said[first] = said[first].removeprefix(bos)
        said[last] = said[last].removesuffix(eos)
        texts = [*said.items(), (" and ".join(said), "".join(said.values()))]
    for where, text in texts:
        if any(two in text for two in begins) and (mark := next((m for m in marks if m in text), None)):
            found = f"{where} holds {mark!r}, which the tokenizer reads as a control token"
            return found, "remove it from the text; or, where it is meant, data.permit: [control_tokens]"
    return None


def _left_out(row: Row, tokenizer: Any, options: dict[str, Any]) -> Iterator[Problem]:
    """What the chat template drops in silence: tools, calls, and turns of system and tool."""

    def rendered(messages: list[dict[str, Any]], **change: Any) -> str:
        text = tokenizer.apply_chat_template(messages, **{**options, **change, "tokenize": False})
        return " ".join(text.split())

    do = "set model.chat_template to one that has it, or take it out of the rows"
    text = rendered(row.messages)
    if options.get("tools") and text == rendered(row.messages, tools=None):
        yield Problem(row.where, "the chat template leaves out tools", do)
    for i, message in enumerate(row.messages):
        before, after = row.messages[:i], row.messages[i + 1 :]
        if message["role"] in ("system", "tool"):
            content = " ".join((message.get("content") or "").split())
            written = (content, *(json.dumps(content, ensure_ascii=a)[1:-1] for a in (True, False)))
            missing = not any(w in text for w in written)
        elif calls := message.get("tool_calls"):
            others = [{"type": "function", "function": {"name": "other", "arguments": {}}} for _ in calls]
            missing = text == rendered([*before, message | {"tool_calls": others}, *after])
        else:
            continue
        if missing:
            what = "tool_calls" if message.get("tool_calls") else f"the {message['role']} turn"
            yield Problem(row.where, f"the chat template leaves out {what} (message {i + 1} of the row)", do)


def _unsaid(row: Row, tokenizer: Any, options: dict[str, Any]) -> Iterator[Problem]:
    """What a trained reply says besides its content (`SAID`), and the chat template drops."""
    do = (
        "set model.chat_template to one that renders it, data.rows: assistant_turn where the template keeps"
        " it in the last turn alone, or take it out of the rows"
    )
    for i, message in enumerate(row.messages):
        if message["role"] != "assistant" or i < len(row.history) or off(message):
            continue
        for key in SAID:
            if message.get(key) and not _reads(key, i, row, tokenizer, options):
                found = f"the chat template leaves out {key} (message {i + 1} of the row)"
                yield Problem(row.where, found, do)


def _reads(key: str, i: int, row: Row, tokenizer: Any, options: dict[str, Any]) -> bool:
    """Does the chat template render message `i` of a row otherwise without its `key`?"""
    without = {k: v for k, v in row.messages[i].items() if k != key}
    changed = [*row.messages[:i], without, *row.messages[i + 1 :]]
    try:
        one, other = (
            tokenizer.apply_chat_template(messages, **{**options, "tokenize": False})
            for messages in (row.messages, changed)
        )
    except (TemplateError, TypeError, ValueError):
        return True  # it asks for it
    return " ".join(one.split()) != " ".join(other.split())


@dataclass
class Unread:
    """Keys of messages that are checked by nobody else: (key, role) -> the first row with it, the message's
    index there, and how many messages have it.
    """

    found: dict[tuple[str, str], tuple[Row, int, int]] = field(default_factory=dict)

    def look(self, row: Row) -> None:
        """Count the keys of the messages of `row`."""
        for i, message in enumerate(row.messages if row.conversational else []):
            for key in [k for k, v in message.items() if k not in READ and v is not None]:
                first, at, count = self.found.get((key, message["role"]), (row, i, 0))
                self.found[key, message["role"]] = first, at, count + 1

    def said(self, tokenizer: Any, recipe: Recipe) -> str:
        """The keys that the chat template does not read, as the first message with each shows; empty where
        there are none.
        """
        said = []
        for (key, role), (row, i, count) in self.found.items() if tokenizer.chat_template else ():
            kwargs = recipe.data.chat_template_kwargs | row.value.get("chat_template_kwargs", {})
            if not _reads(key, i, row, tokenizer, {"tools": row.value.get("tools"), **kwargs}):
                said.append(f"{key} of {count:,} {role} turn{'s' * (count > 1)}")
        return f"the chat template does not read {', '.join(said)}" if said else ""


def _check_losses(row: Row, tokenizer: Any, recipe: Recipe) -> None:
    """What a whole split (its rows are all of one kind) asks for in vain; TRL says nothing about the last of
    the three.
    """
    if row.conversational and not tokenizer.chat_template:
        do = "set model.chat_template (a template of TRL by name, or a .jinja file), or train on text"
        if isinstance(tokenizer, Characters):  # neither the cache nor the contract has one
            found = (
                "the rows are conversations, the base's tokenizer is not in the cache, and its contract names"
                " no chat template"
            )
            name = recipe.model.tokenizer or recipe.model.name_or_path
            do += f"; or fetch the base's own: hf download {name} --include 'tokenizer*' --include '*.jinja'"
            raise RecipeError(Problem(recipe.at("data", "train"), found, do))
        raise RecipeError(
            Problem(
                recipe.at("data", "train"),
                "the rows are conversations, but the tokenizer has no chat template",
                do,
            )
        )
    if recipe.train.assistant_only_loss and not row.conversational:
        do = "it needs messages; prompt/completion rows train the completion only by themselves"
        raise RecipeError(
            Problem(recipe.at("train", "assistant_only_loss"), f"{row.where} is no conversation", do)
        )
    if recipe.train.completion_only_loss and "prompt" not in row.value:
        do = (
            "set data.rows: assistant_turn"
            if row.conversational
            else "remove it, or write prompt and completion"
        )
        found = f"{row.where} has no completion: all of it would be trained"
        raise RecipeError(Problem(recipe.at("train", "completion_only_loss"), found, do))


def _training_template(tokenizer: Any, recipe: Recipe) -> str | None:
    """The template that TRL swaps in to know which tokens are the assistant's; None where it keeps the
    tokenizer's own.
    """
    if not recipe.train.assistant_only_loss or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        do = "give one row per assistant turn instead: data.rows: assistant_turn, without assistant_only_loss"
        raise RecipeError(
            Problem(recipe.at("train", "assistant_only_loss"), str(error).split(". ")[0], do)
        ) from None


def _plain(row: Row, tokenizer: Any, recipe: Recipe) -> Example:
    """Text, or prompt and completion as text. It ends with the end-of-sequence token, as TRL adds it."""
    prompt, eos = row.value.get("prompt", ""), getattr(tokenizer, "eos_token", None) or ""
    text: str = row.value["completion"] if "prompt" in row.value else row.value["text"]
    ids = list(tokenizer(prompt + text + ("" if text.endswith(eos) else eos))["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and ids[:2] == [bos, bos]:
        do = "remove it from the text"
        raise RecipeError(
            Problem(row.where, f"begins with {tokenizer.bos_token!r}, which the tokenizer adds itself", do)
        )
    if "prompt" not in row.value:
        return Example(row.where, ids, list(ids))
    prompt_ids = tokenizer(prompt)["input_ids"]
    start = common_prefix_length(prompt_ids, ids)  # shorter than the prompt where a token spans its end
    skip = 0 if recipe.train.completion_only_loss is False else start
    return Example(
        row.where, ids, [IGNORED] * skip + ids[skip:], [Turn(start, len(ids) - 1, start == len(prompt_ids))]
    )


def _conversation(row: Row, by: Renderer) -> Example:
    tokenizer, recipe = by.tokenizer, by.recipe
    kwargs = recipe.data.chat_template_kwargs | row.value.get("chat_template_kwargs", {})
    serving = {"tokenize": True, "return_dict": True, "tools": row.value.get("tools"), **kwargs}
    trained = {"chat_template": by.template, **serving}
    special = any(m["role"] in ("system", "tool") or m.get("tool_calls") for m in row.messages)
    missing = list(_left_out(row, tokenizer, serving)) if special or serving["tools"] else []
    if missing := missing + list(_unsaid(row, tokenizer, serving)):
        raise RecipeError(missing)
    text = tokenizer.apply_chat_template(row.messages, **{**trained, "tokenize": False})
    if recipe.train.assistant_only_loss:
        output = tokenizer.apply_chat_template(row.messages, return_assistant_tokens_mask=True, **trained)
        if 1 not in output["assistant_masks"]:
            found = "assistant_only_loss finds no assistant token in this row"
            raise RecipeError(Problem(row.where, found, "look at the chat template"))
        ids, places = list(output["input_ids"]), _places(output)
    else:
        output, (ids, places) = {}, by.encoded(text)
    whole = _Whole(row, ids, text, places, serving, trained)
    trains_prompt = recipe.train.completion_only_loss is False
    replies = [
        i
        for i, m in enumerate(row.messages)
        if m["role"] == "assistant" and (trains_prompt or i >= len(row.history))
    ]
    turns = [_turn(whole, i, by) for i in replies]
    skip = 0
    if row.history and not trains_prompt:
        skip = whole.prompts.get(len(row.history), 0) if not by.template else 0
        if not skip:
            prompt = tokenizer.apply_chat_template(row.history, add_generation_prompt=True, **trained)
            skip = common_prefix_length(prompt["input_ids"], ids)
    labels = [IGNORED] * skip + ids[skip:]
    if recipe.train.assistant_only_loss:
        mask = output["assistant_masks"]
        labels = [label if on else IGNORED for label, on in zip(labels, mask, strict=True)]
    return Example(row.where, ids, labels, turns)


@dataclass
class _Whole:
    """A conversation as rendered: its `text`, the tokens of it (`ids`) and their `places` in it, and what the
    chat template is given as a server gives it and as TRL does. `prompts`: of the replies behind a prompt as
    a server renders it, how many tokens that has.
    """

    row: Row
    ids: list[int]
    text: str
    places: Any
    serving: dict[str, Any]
    trained: dict[str, Any]
    prompts: dict[int, int] = field(default_factory=dict)


def _turn(whole: _Whole, i: int, by: Renderer) -> Turn:
    """Where reply `i` stands: behind the prompt that a server renders, if the text has both; else the row is
    rendered once more with another reply there, and what differs is the reply.
    """
    messages, ids, tokenizer = whole.row.messages, whole.ids, by.tokenizer
    try:
        prompt = tokenizer.apply_chat_template(
            messages[:i], add_generation_prompt=True, **{**whole.serving, "tokenize": False}
        )
    except TemplateError:  # e.g. a greeting before the user has said anything: no server renders a prompt
        prompt = None
    if prompt is not None and (found := _behind(prompt, whole, i, by)):
        return found
    other = tokenizer.apply_chat_template(
        [*messages[:i], _another(messages[i]), *messages[i + 1 :]], **whole.trained
    )["input_ids"]
    start = common_prefix_length(other, ids)
    end = len(ids) - common_prefix_length(other[start:][::-1], ids[start:][::-1])
    call = bool(messages[i].get("tool_calls"))
    if call:  # what differs ends within the call: its brackets follow before the turn ends
        end = next((k for k in range(end, len(ids)) if ids[k] == tokenizer.eos_token_id), end)
    if prompt is None:
        return Turn(start, end, False, call)
    begun = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if faithful := ids[: len(begun)] == begun:
        whole.prompts[i] = len(begun)
    return Turn(start, end, faithful, call)


def _behind(prompt: str, whole: _Whole, i: int, by: Renderer) -> Turn | None:
    """Reply `i` where its text follows the `prompt` word for word; None where it does not, or where the
    tokenizer does not tell which character is in which token.
    """
    content, text, ids = whole.row.messages[i].get("content"), whole.text, whole.ids
    said = content.strip() if isinstance(content, str) else ""
    fits = said and text.startswith(prompt) and text.startswith(said, len(prompt))
    if not fits or whole.row.messages[i].get("tool_calls") or whole.places is None:
        return None
    at = whole.places.char_to_token
    start, last = at(len(prompt)), at(len(prompt) + len(said) - 1)
    if start is None or last is None or not start:
        return None
    # Added tokens part a text before all else: what stands before the last of them in the prompt has the
    # tokens that it has here, and the rest is compared.
    mark = next((k for k in range(start - 1, -1, -1) if ids[k] in by.added), None)
    begin = 0 if mark is None else whole.places.token_to_chars(mark)[0]
    if faithful := ids[mark or 0 : start] == by.piece(prompt[begin:]):
        whole.prompts[i] = start
    return Turn(start, last + 1, faithful)


def _another(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply of the same form that differs from `reply` in its first and last character."""
    text = (reply.get("content") or "").strip()
    word = next(w for w in "012" if w not in (text[:1], text[-1:]))
    calls = [
        {"type": "function", "function": {**call.get("function", call), "arguments": {word: word}}}
        for call in reply.get("tool_calls") or []
    ]
    return {"role": "assistant", "content": word} | ({"tool_calls": calls} if calls else {})


def kept_range(example: Example, recipe: Recipe) -> range:
    """The positions that are left after truncation to train.max_length, as TRL truncates. Packing (but for
    bfd) splits instead.
    """
    train, whole = recipe.train, len(example.input_ids)
    length = train.max_length
    splits = train.packing and train.packing_strategy != "bfd"
    if length is None or length >= whole or splits:
        return range(whole)
    keep_end = not train.packing and train.truncation_mode == "keep_end"
    return range(whole - length, whole) if keep_end else range(length)


def truncated(example: Example, recipe: Recipe) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` as they are after truncation."""
    kept = kept_range(example, recipe)
    return example.input_ids[kept.start : kept.stop], example.labels[kept.start : kept.stop]


def closing(example: Example, turn: Turn, ends: Collection[int]) -> int | None:
    """The position of the token of `ends` that closes `turn`; None where none does. A few blanks may stand
    before it, and the rest of a call; or the reply brings it itself.
    """
    ids = example.input_ids
    after = range(turn.end, len(ids) if turn.call else min(turn.end + 1 + BLANKS, len(ids)))
    return next((i for i in [*after, turn.end - 1] if i >= turn.start and ids[i] in ends), None)


@dataclass(frozen=True)
class Measured:
    """What is left of an example after truncation: the positions `kept`, how many of them are `supervised`,
    and its trained turns as `Counts` has them. `dropped`: nothing of it is trained, so the trainer leaves it
    out.
    """

    kept: range
    supervised: int
    dropped: bool
    turns: int
    faithful: int
    open_turns: int


def measured(example: Example, tokenizer: Any, recipe: Recipe, ends: Collection[int]) -> Measured:
    """`example` as trained. `ends`: the tokens that end a reply."""
    counted = not isinstance(tokenizer, Characters)  # characters are not truncated: max_length counts tokens
    kept = kept_range(example, recipe) if counted else range(len(example.input_ids))
    labels = example.labels
    supervised = len(kept) - labels[kept.start : kept.stop].count(IGNORED)
    turns = faithful = open_turns = 0
    for turn in example.turns:
        part = labels[max(turn.start, kept.start) : min(turn.end + 1, kept.stop)]
        if part.count(IGNORED) < len(part):
            turns += 1
            faithful += turn.faithful and kept.start == 0
            end = closing(example, turn, ends)
            open_turns += counted and not (end is not None and end in kept and labels[end] != IGNORED)
    drops = recipe.train.max_length is not None and not recipe.train.packing
    return Measured(kept, supervised, drops and not supervised, turns, faithful, open_turns)


def counts(
    done: list[Example], tokenizer: Any, recipe: Recipe, ends: Collection[int] | None = None
) -> Counts:
    """Tokens, truncation and turns of a split, as trained. `ends`: the tokens that end a reply; without them
    the tokenizer's own.
    """
    own = {tokenizer.eos_token_id} if ends is None else ends
    found = [measured(example, tokenizer, recipe, own) for example in done]
    lengths = [len(m.kept) for m in found]
    result = Counts(
        rows=len(done),
        truncated=sum(n < len(e.input_ids) for n, e in zip(lengths, done, strict=True)),
        **{k: sum(getattr(m, k) for m in found) for k in ("dropped", "turns", "faithful", "open_turns")},
    )
    if not isinstance(tokenizer, Characters):
        result.tokens, result.longest = sum(lengths), max(lengths, default=0)
        result.supervised = sum(m.supervised for m in found)
    return result


def shown(example: Example, tokenizer: Any, recipe: Recipe) -> str:
    """The row as text, what is trained set between >> and <<. Characters are not truncated: max_length counts
    tokens.
    """
    ids, labels = (
        (example.input_ids, example.labels)
        if isinstance(tokenizer, Characters)
        else truncated(example, recipe)
    )
    parts: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        if not parts or parts[-1][0] != (label != IGNORED):
            parts.append((label != IGNORED, []))
        parts[-1][1].append(token)
    return "".join(
        f">>{tokenizer.decode(tokens)}<<" if on else tokenizer.decode(tokens) for on, tokens in parts
    )
