"""Rows of other tools and files as recipes train them, and what of them could not be carried over."""

from argparse import ArgumentParser, Namespace
from typing import Any

from lora_recipes.curate import inputs, work
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.work import Outcome, dropped, kept
from lora_recipes.data.forms import FIELDS_OF, Form, with_system
from lora_recipes.data.row import DECODER, used
from lora_recipes.data.row import faults as row_faults

TOLD = """Write ShareGPT, Alpaca, OpenAI's rows, Parquet, CSV or JSON arrays as rows that recipes train.

A row becomes messages, prompt and completion, or text (docs/data.md). What has no place in them is counted
in the report, field by field; a row that could not be trained is dropped with the reason."""


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    work.options(parser)
    parser.add_argument(
        "--format", choices=FIELDS_OF, help="the form of all rows (default: by the fields that each has)"
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="FIELD", help="carry this field over as it is"
    )


def run(given: Namespace) -> str:
    """Convert each row."""
    read = inputs.of(given)
    form = Form(given.format, read.columns, read.columns.get("text", "text"))
    with work.begun(given, read) as job:
        job.run(read, lambda item: _converted(item, form, given.keep))
        return job.finish()


def _converted(item: Item, form: Form, keep: list[str]) -> Outcome:
    notes: list[str] = []
    named, found = form.read(_openai(item.raw, notes))
    found = found or row_faults(named, form.text_field)
    value = used(named, form.text_field)
    if not found:
        value, found = with_system(value, named.get("system"))
    if found:
        return dropped("could not be trained", "; ".join(what for what, _ in found))
    placed = {*value, form.text_field, "system", *keep}
    notes += [f"field {k} is not carried over" for k, v in named.items() if v is not None and k not in placed]
    return kept(value | {k: item.raw[k] for k in keep if k in item.raw}, notes=notes)


def _openai(raw: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """OpenAI's form of messages as chat templates read it: arguments of calls as objects, content as text,
    the older function_call and functions as tool_calls and tools, the developer as the system.
    """
    row = dict(raw)
    for name in ("messages", "prompt", "completion"):
        if isinstance(row.get(name), list):
            row[name] = [_message(m, notes) if isinstance(m, dict) else m for m in row[name]]
    if isinstance(row.get("functions"), list) and not row.get("tools"):
        row["tools"] = [{"type": "function", "function": function} for function in row.pop("functions")]
        notes.append("functions are tools")
    return row


def _message(message: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    turn = dict(message)
    if turn.get("role") in ("developer", "function"):
        turn["role"] = "system" if turn["role"] == "developer" else "tool"
        notes.append(f"turns of the {message['role']} are turns of the {turn['role']}")
    if isinstance(turn.get("function_call"), dict) and not turn.get("tool_calls"):
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
        notes.append("function_call is a tool call")
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        turn["content"] = "".join(str(part.get("text", "")) for part in content)
        notes.append("texts of a content are joined")
    if isinstance(turn.get("tool_calls"), list):
        turn["tool_calls"] = [_call(call, notes) for call in turn["tool_calls"]]
    return turn


def _call(call: Any, notes: list[str]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = DECODER.decode(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call  # the row's fault names it
    notes.append("arguments of a call are objects")
    return call | {"function": function | {"arguments": arguments}}
