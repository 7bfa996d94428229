"""One row of data: the form it is trained in, and what can be wrong with it. Imports no torch."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
FIELDS = (
    "messages",
    "prompt",
    "completion",
    "tools",
    "chat_template_kwargs",
)  # what TRL reads of a row, besides its text
Fault = tuple[str, str]  # what was found, what to do about it
MESSAGE = "a message is an object with role and content"
SHAREGPT = "ShareGPT's turns: data.format: sharegpt, with data.columns: {conversations: messages}"
OTHER_FORMS = {  # a field of another tool's form, which alone makes none -> how to name the others
    "conversation": (
        "name it: data.columns: {messages: conversation}; where its turns have from and value:"
        " {conversations: conversation}"
    ),
    "instruction": "Alpaca's form is instruction, input, output: data.columns: {input: ..., output: ...}",
}
RENAME = "name it in data.columns, e.g. {messages: chat} or {prompt: question, completion: answer}"
PREFERENCE = (
    "preference data, for trl's DPOTrainer; supervised training takes the good answer alone: rename chosen to"
    " completion and remove rejected"
)
OTHER_MEDIA = "images, audio and video are not offered here, text alone is trained: drop these rows"
# Fields of a row that belong to what is trained, and that no library here would read -> what to do.
TRAINED = {
    "system": "in texts it stands before the rest: put it there; a turn it is in messages alone",
    **{
        k: f"name it: data.columns: {{system: {k}}}; or remove it"
        for k in ("system_prompt", "system_message")
    },
    **dict.fromkeys(("history", "input"), "put it into the prompt, or remove the field"),
    "functions": "name it: data.columns: {tools: functions}",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), OTHER_MEDIA),
}
# What a served model says besides content and tool_calls, by the names of the OpenAI API, vLLM and others.
SAID = ("reasoning_content", "reasoning", "thinking", "function_call", "refusal")
# A message that says whether it is trained: 0 or false, 1 or true (OpenAI's weight, axolotl's train, ...).
SWITCHES = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_weight")
UNCLEAR = ("mask", "loss_mask", "train_detail")
ROW_SWITCHES = ("weight", "train", "training", "sample_weight", "loss_weight")
# No text that a person wrote: C0 and C1 but for tabs, line and page breaks; half-decoded files and logs.
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")


class Twice(ValueError):
    """A key that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise Twice(next(key for key, times in Counter(k for k, _ in pairs).items() if times > 1))
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)  # it refuses what JSON readers take in silence


@dataclass(frozen=True)
class Row:
    """One example: `value` holds `messages`, or `prompt` and `completion`, or `text` (and `tools`,
    `chat_template_kwargs`).
    """

    where: str  # file:line
    value: dict[str, Any]

    @property
    def format(self) -> str:
        """`messages`, `prompt/completion` or `text`."""
        return (
            "prompt/completion"
            if "prompt" in self.value
            else "messages"
            if "messages" in self.value
            else "text"
        )

    @property
    def conversational(self) -> bool:
        """Is it made of messages, for a chat template, rather than of plain text?"""
        return isinstance(self.value.get("prompt", self.value.get("messages")), list)

    @property
    def kind(self) -> str:
        """`format`, and whether prompt and completion are texts or messages."""
        return self.format + (
            f" as {'messages' if self.conversational else 'text'}" if "prompt" in self.value else ""
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """The messages of the prompt; none when the row is one list of messages."""
        return self.value.get("prompt", [])

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages of a conversational row."""
        return self.history + self.value["completion"] if self.history else self.value["messages"]

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the chat template besides the messages."""
        return {k: self.value[k] for k in ("tools", "chat_template_kwargs") if k in self.value}

    @property
    def said(self) -> list[str]:
        """What is said in it, in order, without system turns; a tool call as JSON."""
        if not self.conversational:
            return [str(self.value.get(k, "")) for k in ("prompt", "completion", "text") if k in self.value]
        turns = [m for m in self.messages if m["role"] != "system"]
        return [
            text
            for m in turns
            for text in (m.get("content") or "", json.dumps(m["tool_calls"]) if m.get("tool_calls") else "")
            if text
        ]

    @property
    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text in it, keys of objects too, each with where it stands: `messages[1].content`."""
        return _texts(self.value, "")

    @cached_property
    def key(self) -> str:
        """The row's content as text: two rows with the same key are exact duplicates."""
        return json.dumps(self.value, sort_keys=True, ensure_ascii=False)


def used(raw: dict[str, Any], text_field: str = "text") -> dict[str, Any]:
    """The fields of a row that are trained on: no nulls, the text under `text`, messages, tools and
    chat_template_kwargs decoded where they stand as JSON text, as TRL does with tools.
    """
    value = {k: raw[k] for k in FIELDS if raw.get(k) is not None}
    if raw.get(text_field) is not None:
        value["text"] = raw[text_field]
    if _repeats(value):
        del value["prompt"]
    for key in ("messages", "tools", "chat_template_kwargs"):
        if isinstance(text := value.get(key), str):
            with contextlib.suppress(
                ValueError, RecursionError
            ):  # else it stays a text, and a fault names it
                value[key] = DECODER.decode(text)
            if not text.strip() and key != "messages":
                del value[key]  # an empty column of CSV
    return value


def _as_json(text: str) -> str:
    """Why a text that should hold JSON does not; empty where it does."""
    try:
        DECODER.decode(text)
    except Twice as error:
        return f", and the key {str(error)!r} stands twice in an object of its text"
    except (ValueError, RecursionError) as error:
        return f", and its text is no JSON ({error})"
    return ""


def _repeats(value: dict[str, Any]) -> bool:
    """Is `prompt` the first user message once more, beside messages that say all (UltraChat's form)?"""
    messages, prompt = value.get("messages"), value.get("prompt")
    if not (isinstance(messages, list) and isinstance(prompt, str)) or "completion" in value:
        return False
    first = next((m.get("content") for m in messages if _role(m) == "user"), None)
    return isinstance(first, str) and first.strip() == prompt.strip()


def off(message: dict[str, Any]) -> str:
    """The key by which a message says that it is not to be trained, e.g. `weight: 0`; empty where none
    does.
    """
    return next((f"{k}: {json.dumps(message[k])}" for k in SWITCHES if message.get(k) in (0, False)), "")


def control(row: Row) -> list[Fault]:
    """The first control character of a row: it is trained like a letter, and is none."""
    for where, text in row.texts:
        if found := CONTROL.search(text):
            what = (
                f"{where} holds the control character U+{ord(found[0]):04X} (character {found.start() + 1})"
            )
            return [(what, "remove it; or, where it is meant, data.permit: [control_characters]")]
    return []


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            inside = f"{where}.{key}".lstrip(".")
            yield f"the name of {inside}"[:80], key
            yield from _texts(inner, inside)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{i}]")


def faults(raw: dict[str, Any], text_field: str = "text") -> list[Fault]:
    """What is wrong with one row, each as (found, what to do); empty when it can be trained on."""
    value = used(raw, text_field)
    has_pair = "prompt" in value or "completion" in value
    kinds = [k for k in ("messages", "text") if k in value] + ["prompt/completion"] * has_pair
    chosen = [k for k in ("chosen", "rejected") if raw.get(k) is not None]
    if chosen and not {"messages", "text", "completion"} & set(value):
        return [(f"{' and '.join(chosen)}, but no completion", PREFERENCE)]
    if not kinds:
        do = next((advice for name, advice in OTHER_FORMS.items() if name in raw), RENAME)
        return [(f"no messages, prompt/completion or {text_field}, but {_listed(raw)}", do)]
    if len(kinds) > 1:
        return [
            (
                f"both {' and '.join(kinds)}",
                "keep one, or set data.format; the trainer would choose in silence",
            )
        ]
    if has_pair:
        missing = [k for k in ("prompt", "completion") if k not in value]
        found = (
            [(f"{missing[0]} is missing or null", "")]
            if missing
            else _pair_faults(value["prompt"], value["completion"])
        )
    elif "messages" in value:
        found = _message_faults(value["messages"], "messages") + _no_reply(value["messages"])
    else:
        found = [] if _is_text(value["text"]) else [(f"{text_field} is empty or not a string", "")]
    return found + _option_faults(value) + list(_ignored(raw, value, text_field))


def _ignored(raw: dict[str, Any], value: dict[str, Any], text_field: str) -> Iterator[Fault]:
    """Fields beside a sound form that say what is trained, or how, and would have no effect."""
    fields = {k: v for k, v in raw.items() if v not in (None, "", [], {}) and k != text_field}
    for name, do in TRAINED.items():
        is_other = "text" in value and name in ("input", "history")  # Alpaca's text holds them already
        is_turn = name == "system" and isinstance(value.get("prompt", value.get("messages")), list)
        if name in fields and not (is_other or is_turn):
            yield f"{name} would not be trained on", do
    if isinstance(label := fields.get("label"), bool) and "completion" in value:
        do = "preference data, for trl's KTOTrainer; keep the rows with label: true, without the field"
        yield (
            f"label: {json.dumps(label)} would have no effect: bad answers would be trained like good ones",
            do,
        )
    for name in ROW_SWITCHES:
        if isinstance(fields.get(name), int | float) and fields[name] not in (1, True):
            do = "leave rows out, or split them into sources: data.train takes a weight for each"
            yield f"{name}: {json.dumps(fields[name])} of a row would have no effect", do


def _listed(raw: dict[str, Any]) -> str:
    return ", ".join(f"{k!r}" + " (null)" * (v is None) for k, v in raw.items()) or "nothing"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _role(message: Any) -> str | None:
    role = message.get("role") if isinstance(message, dict) else None
    return role if role in ROLES else None


def _pair_faults(prompt: Any, completion: Any) -> list[Fault]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return [] if completion.strip() else [("completion is empty", "")]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return [("prompt and completion must both be strings, or both be lists of messages", "")]
    found = _message_faults(prompt, "prompt") + _message_faults(completion, "completion", begins=False)
    if prompt and _role(prompt[-1]) == "assistant":
        found.append(
            (
                "the prompt ends with an assistant turn",
                "a server would begin another turn; end the prompt before the reply",
            )
        )
    if completion and _role(completion[0]) not in ("assistant", "system", None):
        do = "it begins with the assistant's reply; what is said before belongs to the prompt"
        found.append((f"the completion begins with a {completion[0]['role']} turn", do))
    return found


def _no_reply(messages: Any) -> list[Fault]:
    roles = [_role(m) for m in messages] if isinstance(messages, list) else []
    if (
        not roles or None in roles or "assistant" in roles
    ):  # an unknown role may be meant as the assistant's, and is named already
        return []
    return [("messages has no assistant turn", "there is nothing to learn in it")]


def _message_faults(messages: Any, name: str, begins: bool = True) -> list[Fault]:
    """The faults of a list of messages; `begins`: its first one begins the conversation."""
    if not isinstance(messages, list) or not messages:
        return [
            (
                f"{name} is {'empty' if messages == [] else 'not a list'}"
                + (_as_json(messages) if isinstance(messages, str) else ""),
                'write [{"role": ..., "content": ...}, ...]',
            )
        ]
    found: list[Fault] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            is_sharegpt = isinstance(message, dict) and "from" in message
            found.append((f"{name}[{i}] has no role", SHAREGPT if is_sharegpt else MESSAGE))
            continue
        if message["role"] not in ROLES:
            found.append(
                (f"{name}[{i}] has the unknown role {message['role']!r}", f"one of {', '.join(ROLES)}")
            )
        before = _role(messages[i - 1]) if i else None
        turns = (
            *_order_faults(_role(message), before, begins and i == 0),
            *_content_faults(message),
            *_switch_faults(message),
        )
        found += [(f"{name}[{i}] {what}", do) for what, do in turns]
    return found


def _order_faults(role: str | None, before: str | None, first: bool) -> Iterator[Fault]:
    """Turns in an order that chat templates refuse, or (worse) render in silence; `before` is None where it
    is not known.
    """
    if role == "system" and not first:
        yield "is a system turn, but not the first", "templates drop or refuse it"
    if role == "user" and before == "user":
        yield "is the second of two user turns in a row", "join them, or add the reply that is missing"
    if role == "assistant" and before == "assistant":
        yield "is the second of two assistant turns in a row", "join them"
    if role == "assistant" and first:
        yield "is an assistant turn that begins the conversation", "begin with a user (or system) turn"
    if role == "tool" and (first or before in ("system", "user")):
        yield (
            "is a tool turn that follows no assistant turn",
            "it answers the tool_calls of an assistant turn",
        )


def _switch_faults(message: dict[str, Any]) -> Iterator[Fault]:
    """A message that says how much it counts in another way than yes or no."""
    for key in SWITCHES:
        value = message.get(key)
        if value is not None and value not in (0, 1):  # True is 1
            yield f"{key} is {json.dumps(value)}", "a message is trained (1, true) or not (0, false)"
    for key in UNCLEAR:
        if message.get(key) is not None:
            yield f"has {key}", "say with train: true or false whether the message is trained"


def _content_faults(message: dict[str, Any]) -> Iterator[Fault]:
    content, calls = message.get("content"), message.get("tool_calls") or []
    if isinstance(content, str):
        if not content.strip() and not calls and message["role"] != "tool":  # a tool may return nothing
            yield "content is empty", "drop the turn or the row"
    elif isinstance(content, list) and (media := _media(content)):
        yield f"content has a part of type {', '.join(media)}", OTHER_MEDIA
    elif content is not None:
        yield (
            f"content is of type {type(content).__name__}",
            "content is a string; join the text of its parts",
        )
    elif not calls:  # a turn that only calls a tool says nothing
        yield f"content is {'null' if 'content' in message else 'missing'}", "content is a string"
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not (
            isinstance(function, dict)
            and isinstance(function.get("name"), str)
            and isinstance(function.get("arguments"), dict)
        ):
            # Arguments as JSON text: templates write them quoted or fail, a server decodes them before it
            # renders.
            yield (
                "tool_calls are not as templates read them",
                '[{"type": "function", "function": {"name": ..., "arguments": {...}}}]',
            )


def _media(content: list[Any]) -> list[str]:
    """The types of its parts that are no text: image, image_url, audio, ..."""
    kinds = [str(part.get("type")) for part in content if isinstance(part, dict) and "type" in part]
    return [kind for kind in dict.fromkeys(kinds) if kind != "text"]


def _option_faults(value: dict[str, Any]) -> list[Fault]:
    found, tools = [], value.get("tools", [])
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        found.append(("tools is not a list of objects", "a list of JSON schemas, or the same as JSON text"))
    if not isinstance(value.get("chat_template_kwargs", {}), dict):
        found.append(("chat_template_kwargs is not an object", 'e.g. {"enable_thinking": false}'))
    return found
