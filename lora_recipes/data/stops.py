"""What ends a reply: decided once, from the rows as the chat template renders them, the tokenizer, and the
base's generation_config; then trained, written beside the result, served and asked for.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from lora_recipes.core import stops as files
from lora_recipes.core.locate import local
from lora_recipes.core.record import StopFacts
from lora_recipes.data import render
from lora_recipes.data.render import IGNORED, Example
from lora_recipes.data.row import Row
from lora_recipes.data.stand_in import Characters
from lora_recipes.recipe.base import Resolved

CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
LOOKED = 200  # rows: what ends a reply does not change from row to row, but a call may end in another token


@dataclass(frozen=True)
class Stops:
    """`trained`: ids that end the rows' replies, most frequent first. `all`: where a reply will stop: those,
    the tokenizer's own end, and where the base stops already. `text`: what the template writes after a reply
    where that is no token of its own, which no server stops at by itself. `names` of all ids. `was`: the
    tokenizer's own end where another one took its place. `unnamed`: those of `trained` at which the base does
    not stop by its own files.
    """

    trained: tuple[int, ...] = ()
    all: tuple[int, ...] = ()
    text: str | None = None
    names: tuple[str, ...] = ()
    was: str | None = None
    why: str = ""
    unnamed: tuple[int, ...] = ()

    def named(self, ids: tuple[int, ...]) -> list[str]:
        """The tokens of `ids`."""
        known = dict(zip(self.all, self.names, strict=True))
        return [known[i] for i in ids]

    def facts(self) -> StopFacts:
        """As run.json keeps it."""
        return StopFacts(
            trained=self.named(self.trained), stops=list(self.names), ids=list(self.all), text=self.text
        )


@dataclass(frozen=True)
class NextTurn:
    """The tokens with which the next turn begins after a `reply` and after a `call`, where a chat template
    ends no reply and the next role is the end of it (GLM-4: `<|user|>`, `<|observation|>`); else None.
    """

    reply: int | None = None
    call: int | None = None


def next_turn(tokenizer: Any, resolved: Resolved) -> NextTurn:
    """Does the next role's token end a reply? It does where the base's files list it as an end, or where it
    stands for the role alone: a token that also begins the assistant's turns (`<|im_start|>`) does not.
    """
    if isinstance(tokenizer, Characters) or not tokenizer.chat_template:
        return NextTurn()
    options = resolved.recipe.data.chat_template_kwargs
    ask: list[dict[str, Any]] = [{"role": "user", "content": "Where?"}]
    said = [*ask, {"role": "assistant", "content": "Here"}]

    def ids(messages: list[dict[str, Any]], **more: Any) -> list[int]:
        given = {"tokenize": True, "return_dict": True, **options, **more}
        return list(tokenizer.apply_chat_template(messages, **given)["input_ids"])

    def after(before: list[int], whole: list[int]) -> int | None:
        return whole[len(before)] if whole[: len(before)] == before and len(whole) > len(before) else None

    try:
        text = tokenizer.apply_chat_template(said, **{**options, "tokenize": False})
        user = after(ids(said), ids([*said, *ask]))
        assistant = after(ids(ask), ids(ask, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):  # a template with demands of its own
        return NextTurn()
    roles = _special(tokenizer) | set(own := of_base(resolved))
    ends = user in roles and (user in own or user != assistant)
    if user is None or not ends or text.rpartition("Here")[2].strip():
        return NextTurn()
    calls = [*ask, {"role": "assistant", "content": "", "tool_calls": CALL}]
    try:
        tool = after(ids(calls), ids([*calls, {"role": "tool", "content": "blue"}]))
    except (TemplateError, TypeError, ValueError):  # one that knows no tools
        tool = None
    return NextTurn(user, tool if tool in roles else user)


def closed(rows: list[Row], done: list[Example], following: NextTurn) -> list[Example]:
    """The examples `done` of `rows`, each trained reply with the token in its labels that ends it by
    `following`, as TRL's own training templates of such families have it."""
    if following.reply is None:
        return done
    return [_closed(row, example, following) for row, example in zip(rows, done, strict=True)]


def _closed(row: Row, example: Example, following: NextTurn) -> Example:
    if not row.conversational:
        return example
    ids, labels = list(example.input_ids), list(example.labels)
    for turn in example.turns:
        token = following.call if turn.call else following.reply
        assert token is not None
        trained = labels[turn.end - 1] != IGNORED
        at = render.closing(example, turn, {token})
        if at is None and turn is example.turns[-1] and row.messages[-1]["role"] == "assistant":
            ids.append(token)
            labels.append(token if trained else IGNORED)
        elif at is not None and trained:
            labels[at] = token
    return replace(example, input_ids=ids, labels=labels)


def decide(
    rows: list[Row],
    done: list[Example],
    tokenizer: Any,
    resolved: Resolved,
    following: NextTurn | None = None,
) -> Stops:
    """What ends the replies of `rows`, whose examples are `done`; `following`: by which they were `closed`.
    Changes nothing.
    """
    own = of_base(resolved)
    if isinstance(tokenizer, Characters):
        return Stops(text=_text(rows, tokenizer, resolved))
    eos = tokenizer.eos_token_id
    known = {i for i in (eos, *own) if i is not None}
    if not rows or not rows[0].conversational:
        trained = [] if eos is None else [eos]
        return _named(trained, own, tokenizer, Stops(why="as TRL ends a text"))
    asked = resolved.recipe.train.eos_token
    trained = _ends(rows, done, tokenizer, known)
    opens = following and {following.reply, following.call} & set(trained)
    why = "which opens the next turn in the chat template" if opens else "by the chat template"
    found = Stops(why=why, text=None if trained else _text(rows, tokenizer, resolved))
    # A template that writes eos_token somewhere itself would render other rows with another one.
    if trained and not asked and eos not in trained and "eos_token" not in tokenizer.chat_template:
        found = replace(found, was=tokenizer.eos_token or "none")
    found = _named(trained, [*([eos] if eos is not None else []), *own], tokenizer, found)
    return replace(found, unnamed=tuple(i for i in trained if i not in own) if own else ())


def adopt(tokenizer: Any, found: Stops) -> None:
    """Give `tokenizer` the end that was found, where it has another: a folder that it is saved in then says
    so.
    """
    if found.was:
        tokenizer.eos_token = found.names[0]


def _named(trained: list[int], others: list[int], tokenizer: Any, found: Stops) -> Stops:
    every = tuple(dict.fromkeys([*trained, *others]))
    names = tuple(str(name) for name in tokenizer.convert_ids_to_tokens(list(every)))
    return replace(found, trained=tuple(trained), all=every, names=names)


def _special(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def of_base(resolved: Resolved) -> list[int]:
    """Where the base stops by its own files; nothing where they are not on this machine."""
    base = resolved.base
    folder = local(base.weights, base.revision)
    return files.of(folder) if folder else []


def _ends(rows: list[Row], done: list[Example], tokenizer: Any, known: set[int]) -> list[int]:
    """The tokens that close the rows' last replies, most frequent first. Plain replies decide; what closes a
    tool call counts only where no plain reply's end does.

    A row's last reply, because behind it stands nothing but its end: behind others the next message begins.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = _special(tokenizer) | known
    found: Counter[int] = Counter()
    calls: list[list[int]] = []
    for row, example in list(zip(rows, done, strict=True))[:LOOKED]:
        if row.messages[-1]["role"] != "assistant" or not example.turns:
            continue
        turn = example.turns[-1]
        tail = example.input_ids[turn.end :]
        if turn.call:
            calls.append(tail)
            continue
        last = example.input_ids[turn.end - 1]  # rows that bring their own end
        end = next((i for i in tail if i in special or i in added), last if last in special else None)
        found.update([] if end is None else [end])
    plain = known | set(found)
    for tail in calls:
        marks = [i for i in tail if i in plain] or [i for i in tail if i in special][-1:]
        found.update(marks[:1])
    return [i for i, _ in found.most_common()]


def _text(rows: list[Row], tokenizer: Any, resolved: Resolved) -> str | None:
    """What the chat template writes after the last reply of the first row that ends with one, as text; None
    for nothing, or only blanks.
    """
    for row in rows[:LOOKED]:
        reply = row.messages[-1] if row.conversational else {}
        content = reply.get("content")
        if reply.get("role") == "assistant" and isinstance(content, str) and content.strip():
            kwargs = resolved.recipe.data.chat_template_kwargs | row.value.get("chat_template_kwargs", {})
            said = tokenizer.apply_chat_template(
                row.messages, tokenize=False, tools=row.value.get("tools"), **kwargs
            )
            tail = said.rpartition(content.strip())[2].rstrip()
            return tail if tail.strip() else None
    return None


def line(found: Stops, whole: bool) -> str:
    """What a person reads: which token ends a reply in the labels, and where it stops afterwards."""
    places = "model/ and vLLM" if whole else "adapter/, merged/ and vLLM"
    if not found.all:
        by = f"{found.text!r} by the chat template" if found.text else "the chat template writes no end"
        return f"{by}; which token that is shows with the tokenizer"
    after = f"; {places} stop at {', '.join(found.names)}"
    if not found.trained:
        return (f"labels end with the text {found.text!r}" if found.text else "labels hold no end") + after
    was = f", the tokenizer's own was {found.was}" if found.was else ""
    if found.unnamed:
        ids = [f"{name} (id {i})" for name, i in zip(found.named(found.unnamed), found.unnamed, strict=True)]
        after += (
            f"\nthe base's own generation_config.json does not stop at {', '.join(ids)}: a server that reads"
        )
        after += f" only that needs eos_token_id: {list(found.all)}"
    return f"labels {', '.join(found.named(found.trained))} ({found.why}{was}){after}"


def warnings(found: Stops, resolved: Resolved) -> list[str]:
    """What a person must act on; nothing where the tokenizer is not at hand."""
    asked = resolved.recipe.train.eos_token
    said = []
    if found.text and found.all:
        said.append(
            f"a reply ends with the text {found.text!r}, which is no token: no server stops there by itself,"
            f' each request must send "stop": [{found.text!r}]; better a template that writes a token, e.g.'
            " {{ eos_token }}"
        )
    elif not found.trained and found.all:
        said.append(
            "the chat template ends no reply: what is trained never stops; let it write {{ eos_token }} after"
            " a reply (model.chat_template)"
        )
    if asked and found.trained and asked not in found.named(found.trained):
        ends = ", ".join(found.named(found.trained))
        said.append(
            f"{resolved.recipe.at('train', 'eos_token')}: {asked} ends no reply of these rows, the chat"
            f" template writes {ends}: remove train.eos_token"
        )
    return said
