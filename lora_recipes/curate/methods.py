"""What `synthesise` asks of a teacher, and what it takes: answers to prompts that are there (`teacher`), new
instructions in the manner of some (`self_instruct`, arXiv:2212.10560), harder and other ones made of them
(`evol_instruct`, arXiv:2304.12244). The order of what is made depends on nothing but the answers.
"""

import asyncio
import json
import random
import re
from argparse import Namespace
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count as numbers
from typing import Any, TypeVar

from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.curate import work
from lora_recipes.curate.inputs import Inputs, Item
from lora_recipes.curate.near import Near
from lora_recipes.curate.prompts import Prompt, Rule
from lora_recipes.curate.teacher import Answer, Refused, Request, Teacher
from lora_recipes.curate.work import Outcome
from lora_recipes.data.forms import Form
from lora_recipes.data.read import raise_first
from lora_recipes.data.row import CONTROL, Fault, used

METHODS = ("teacher", "self_instruct", "evol_instruct")
OPERATIONS = ("constraints", "deepen", "combine", "domain")
WORDS = (4, 150)  # of a new instruction: Self-Instruct drops 3 and fewer, and more than 150
EXAMPLES = (6, 2)  # of people and of the teacher in a prompt of Self-Instruct, as the paper has them
BATCH = 16  # requests of a round of Self-Instruct at most: what they make goes into the prompts of the next
NEW = 4  # instructions that each of them asks for
CHANGED = 64  # instructions that Evol-Instruct changes before it has them answered
STALLED = 5  # rounds without one new instruction
REPEATS = (30, 0.5)  # word 3-grams from which on, and the share of distinct ones below which, it goes round
T = TypeVar("T")
Made = tuple[Item, Outcome]


@dataclass(frozen=True)
class Seed:
    """A prompt that is there: its turns up to the one to be answered, which is `instruction`."""

    where: str
    turns: list[dict[str, str]]

    @property
    def instruction(self) -> str:
        """The last turn."""
        return self.turns[-1]["content"]


@dataclass(frozen=True)
class Idea:
    """An instruction that a method brings, to be answered: with the turns before it, and where it is from."""

    where: str
    turns: list[dict[str, str]]
    provenance: dict[str, Any]
    sample: int = 0


@dataclass(frozen=True)
class Change:
    """An operation of Evol-Instruct on the instruction `i`: where in the run (`at`), its prompt filled, the
    seeds of the second instruction that it takes (`others`).
    """

    i: int
    at: str
    operation: str
    filled: str
    others: list[str]


@dataclass
class Synthesis:
    """One run: what its options say, and what has come of it so far."""

    given: Namespace
    seeds: "Seeds"
    prompts: dict[str, Prompt]
    rules: list[Rule]
    model: str = ""
    teacher: Teacher = field(init=False)
    written: Near = field(init=False)  # rows
    known: Near = field(init=False)  # instructions
    kept: int = 0
    answered: int = 0
    ended: str = ""  # why it ended before all was asked
    tried: int = 0  # new instructions that came back
    taken: int = 0
    unasked: int = 0  # instructions that were not answered, and changes that were not asked for, as it ended

    def __post_init__(self) -> None:
        """Nothing is known yet."""
        self.written, self.known = Near(self.given.near), Near(self.given.near)

    def made(self, teacher: Teacher) -> AsyncIterator[Made]:
        """Every row, and everything that became none, in an order that does not depend on the server's."""
        self.teacher = teacher
        methods = {
            "teacher": self._teacher,
            "self_instruct": self._self_instruct,
            "evol_instruct": self._evol_instruct,
        }
        return methods[self.given.method]()

    def first(self) -> Request:
        """The first request, as it will be sent."""
        if self.given.method == "teacher":
            return next(self.requests())
        seeds = [seed for _, seed, _ in self.seeds if seed]
        if self.given.method == "self_instruct":
            return self._for_new(("round 1, request 1", self._examples(seeds, [], "1/0")))
        now = [Idea(s.where, s.turns[-1:], {"seeds": [s.where]}) for s in seeds]
        return self._for_changed(self._change(now, 1, 0))

    def requests(self) -> Iterator[Request]:
        """Of `teacher`: all of them."""
        return (self._for_answer(idea) for idea in self._as_they_are() if isinstance(idea, Idea))

    def said(self) -> dict[str, Any]:
        """For the report."""
        return {
            "model": self.model,
            "instructions_written": self.tried,
            "instructions_taken": self.taken,
            "answered": self.answered,
            "kept": self.kept,
            "ended": self.ended,
            "not_asked": self.unasked,
        }

    # ---- the methods

    def _teacher(self) -> AsyncIterator[Made]:
        return self._answers(self._as_they_are())

    def _as_they_are(self) -> Iterator[Idea | Made]:
        """Every seed, as often as samples are wanted; the same prompt once."""
        asked: dict[str, str] = {}
        for item, seed, fault in self.seeds:
            if seed is None:
                yield item, work.dropped("is no prompt", fault)
                continue
            text = json.dumps(seed.turns)
            if (first := asked.setdefault(text, seed.where)) != seed.where:
                yield item, work.dropped("the same prompt stands before", first)
                continue
            for sample in range(self.given.samples):
                yield Idea(seed.where, seed.turns, {"seeds": [seed.where]}, sample)

    async def _self_instruct(self) -> AsyncIterator[Made]:
        """Rounds of requests, each with examples of the seeds and of what earlier rounds made; what is new is
        answered.
        """
        seeds: list[Seed] = []
        for made in self._known_from(seeds):
            yield made
        own: list[Idea] = []
        waiting: deque[Idea] = deque()
        stalled = 0
        for round_ in numbers(1):
            examples = [self._examples(seeds, own, f"{round_}/{i}") for i in range(self._batch)]
            before = len(own)
            asks = [(f"round {round_}, request {i + 1}", e) for i, e in enumerate(examples)]
            async for (where, chosen), request, answer in self._asked(asks, self._for_new):
                for text, reason in self._new(answer):
                    idea = self._idea(where, text, "self_instruct", request, [w for w, _ in chosen])
                    if reason := reason or self._unfit(text):
                        yield self._not_taken(idea, reason)
                    else:
                        own.append(idea)
                        waiting.append(idea)
            stalled = 0 if len(own) > before else stalled + 1
            if stalled == STALLED:
                self.ended = f"{STALLED} rounds brought no new instruction"
            while waiting and not self._enough:
                async for made in self._answers(self._next(waiting)):
                    yield made
            if self._enough:
                self.unasked += len(waiting)
                return

    async def _evol_instruct(self) -> AsyncIterator[Made]:
        """`rounds` times over all instructions: each is changed by one operation; a new one is answered and
        takes the place of the old.
        """
        seeds: list[Seed] = []
        for made in self._known_from(seeds):
            yield made
        now = [Idea(s.where, s.turns[-1:], {"seeds": [s.where]}) for s in seeds]
        for round_ in range(1, self.given.rounds + 1):
            begin = 0
            while begin < len(now) and not self._enough:
                end = min(begin + min(CHANGED, self._left), len(now))
                async for made in self._evolved(now, round_, range(begin, end)):
                    yield made
                begin = end
            if self._enough:
                self.unasked += len(now) - begin
                return

    async def _evolved(self, now: list[Idea], round_: int, part: range) -> AsyncIterator[Made]:
        """Change the instructions of `now` at `part`, in place, and answer the new ones."""
        evolved: list[Idea] = []
        changes = [self._change(now, round_, i) for i in part]
        async for change, request, answer in self._asked(changes, self._for_changed):
            old = now[change.i]
            seeds = list(dict.fromkeys([*old.provenance["seeds"], *change.others]))
            text = _bare(answer.text) if isinstance(answer, Answer) else _text(old)
            idea = self._idea(old.where, text, f"evol_{change.operation}", request, seeds)
            more = {
                "round": round_,
                "operation": change.operation,
                "from": old.provenance.get("requests", []),
            }
            idea.provenance.update(more)
            if reason := self._failed(answer) or self._unfit(text):
                yield self._not_taken(idea, reason)
            else:
                now[change.i] = idea
                evolved.append(idea)
        async for made in self._answers(evolved):
            yield made

    def _known_from(self, seeds: list[Seed]) -> Iterator[Made]:
        """Fill `seeds` with the prompts of the inputs, known from now on; rows that are none are dropped."""
        for item, seed, fault in self.seeds:
            if seed is None:
                yield item, work.dropped("is no prompt", fault)
            else:
                seeds.append(seed)
                self.known.add(seed.instruction)

    # ---- their prompts

    def _examples(self, seeds: list[Seed], own: list[Idea], at: str) -> list[tuple[str, str]]:
        """(where, instruction) of each example of a prompt, people's and the teacher's mixed."""
        dice = self._dice(at)
        made = dice.sample(own, min(EXAMPLES[1], len(own)))
        people = dice.sample(seeds, min(sum(EXAMPLES) - len(made), len(seeds)))
        found = [(s.where, s.instruction) for s in people] + [(m.where, _text(m)) for m in made]
        dice.shuffle(found)
        return found

    def _for_new(self, ask: tuple[str, list[tuple[str, str]]]) -> Request:
        where, chosen = ask
        lines = "\n".join(f"{n}. {text}" for n, (_, text) in enumerate(chosen, 1))
        filled = self.prompts["self_instruct"].fill(examples=lines, count=str(NEW))
        return self._request([_user(filled)], where)

    def _change(self, now: list[Idea], round_: int, i: int) -> Change:
        """What becomes of an instruction in a round."""
        at, others = f"{round_}/{i}", list[str]()
        dice = self._dice(at)
        name = dice.choice([o for o in self.given.operation if o != "combine" or len(now) > 1])
        values = {"instruction": _text(now[i])}
        if name == "combine":
            second = now[(i + dice.randrange(1, len(now))) % len(now)]
            values["other"], others = _text(second), second.provenance["seeds"]
        if name == "domain":
            values["domain"] = dice.choice(self.given.domain)
        return Change(i, at, name, self.prompts[f"evol_{name}"].fill(**values), others)

    def _for_changed(self, change: Change) -> Request:
        return self._request([_user(change.filled)], change.at)

    def _for_answer(self, idea: Idea) -> Request:
        filled = self.prompts["teacher"].fill(instruction=_text(idea))
        return self._request([*idea.turns[:-1], _user(filled)], idea.sample)

    def _dice(self, at: str) -> random.Random:
        return random.Random(f"{self.given.seed}/{at}")

    def _request(self, messages: list[dict[str, Any]], at: str | int) -> Request:
        """`at`: the number of a sample, or where in the run it is asked, of which its seed is made."""
        given = self.given
        seed = given.seed + at if isinstance(at, int) else self._dice(f"request {at}").randrange(2**31)
        parameters = {
            "model": self.model,
            "max_tokens": given.max_tokens,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "seed": seed,
        }
        parameters |= given.request
        return Request(messages, {k: v for k, v in parameters.items() if v is not None})

    def _idea(self, where: str, text: str, prompt: str, request: Request, seeds: list[str]) -> Idea:
        used_ = self.prompts[prompt]
        provenance = {"seeds": seeds, "prompts": {used_.name: used_.sha256}, "requests": [request.key]}
        return Idea(where, [_user(text)], provenance)

    # ---- asking

    @property
    def _enough(self) -> bool:
        return bool(self.ended) or self._left <= 0

    @property
    def _left(self) -> int:
        """Rows that may still be written."""
        return (self.given.count or 2**62) - self.kept

    @property
    def _batch(self) -> int:
        """Requests of a round of Self-Instruct: no more than would bring what is wanted yet."""
        return min(BATCH, -(-self._left // NEW))

    def _next(self, waiting: deque[Idea]) -> Iterator[Idea]:
        """As many of `waiting` as rows are wanted yet."""
        for _ in range(min(self._left, len(waiting))):
            yield waiting.popleft()

    async def _asked(
        self, asks: Iterable[T], request: Callable[[T], Request]
    ) -> AsyncIterator[tuple[T, Request, Answer | Refused]]:
        """The answer to each, in their order. Those that the budget left out are passed over, and end it."""

        async def one(ask: T) -> tuple[T, Request, Answer | Refused]:
            made = request(ask)
            return ask, made, await self.teacher.ask(made)

        async for ask, made, answer in ordered(asks, one, lambda: 4 * self.given.concurrency):
            if isinstance(answer, Refused) and not answer.asked:
                self.ended, self.unasked = answer.reason, self.unasked + 1
            else:
                yield ask, made, answer

    async def _answers(self, ideas: Iterable[Idea | Made]) -> AsyncIterator[Made]:
        """The row that each idea becomes with its answer, or why it becomes none."""

        async def one(idea: Idea | Made) -> tuple[Idea, Request, Answer | Refused] | Made:
            if not isinstance(idea, Idea):
                return idea
            request = self._for_answer(idea)
            return idea, request, await self.teacher.ask(request)

        def wanted() -> Iterator[Idea | Made]:
            for idea in ideas:
                if self._enough:
                    self.unasked += isinstance(idea, Idea)
                else:
                    yield idea

        async for found in ordered(wanted(), one, lambda: min(4 * self.given.concurrency, self._left)):
            if len(found) == 2:
                yield found
                continue
            idea, request, answer = found
            if isinstance(answer, Refused) and not answer.asked:
                self.ended, self.unasked = answer.reason, self.unasked + 1
                continue
            yield self._row(idea, request, answer)

    def _row(self, idea: Idea, request: Request, answer: Answer | Refused) -> Made:
        said = answer.text.strip() if isinstance(answer, Answer) else ""
        messages = [*idea.turns, {"role": "assistant", "content": _encodable(said)}]
        row = {"messages": messages, "provenance": self._provenance(idea, request, answer)}
        reason = self._failed(answer)
        if isinstance(answer, Answer):
            self.answered += 1
            reason = reason or self._poor(answer, said) or self._matched("answer", said)
            if not reason and not self.written.new(
                "\n".join(t["content"] for t in messages if t["role"] != "system")
            ):
                reason = "nearly the same row was written before"
        if reason:
            kind, _, found = reason.partition(": ")
            return Item(idea.where, row), work.dropped(kind, found or None)
        self.kept += 1
        return Item(idea.where, row), work.kept(row)

    def _provenance(self, idea: Idea, request: Request, answer: Answer | Refused) -> dict[str, Any]:
        prompt = self.prompts["teacher"]
        ours = dict(idea.provenance)
        ours["prompts"] = ours.get("prompts", {}) | {prompt.name: prompt.sha256}
        ours["requests"] = [*ours.get("requests", []), request.key]
        teacher = (isinstance(answer, Answer) and answer.model) or self.model
        return {
            "method": self.given.method,
            "teacher": teacher,
            **ours,
            "seed": request.parameters.get("seed"),
        }

    # ---- what is taken

    def _not_taken(self, idea: Idea, reason: str) -> Made:
        kind, _, found = reason.partition(": ")
        row = {
            "instruction": _encodable(_text(idea)),
            "provenance": {"method": self.given.method} | idea.provenance,
        }
        return Item(idea.where, row), work.dropped(f"new instruction: {kind}", found or None)

    def _new(self, answer: Answer | Refused) -> list[tuple[str, str]]:
        """(instruction, why it cannot be one) of a numbered list."""
        if isinstance(answer, Refused):
            return [("", answer.reason)]
        found = numbered(answer.text)
        if not found:
            return [(answer.text, self._failed(answer, cut=False) or "no numbered list came back")]
        cut = answer.finish == "length"
        return [(text, "cut off" if cut and n == len(found) else "") for n, text in enumerate(found, 1)]

    def _unfit(self, text: str) -> str:
        """Why `text` is not taken as a new instruction; empty where it is, and then it is known."""
        self.tried += 1
        words = len(text.split())
        if not WORDS[0] <= words <= WORDS[1]:
            return f"not {WORDS[0]} to {WORDS[1]} words: {words}"
        if not text[0].isalnum() and text[0].isascii():
            return "begins with a sign"
        if reason := _garbled(text) or self._matched("instruction", text):
            return reason
        if not self.known.new(text):
            return "nearly the same as another"
        self.taken += 1
        return ""

    def _failed(self, answer: Answer | Refused, cut: bool = True) -> str:
        """Why there is no whole answer."""
        if isinstance(answer, Refused):
            return answer.reason
        if answer.finish == "key":
            return "the answer repeats the API key"
        if answer.finish == "length" and cut:
            return f"cut off at max_tokens: {answer.written or self.given.max_tokens} tokens"
        if answer.finish not in ("stop", "length", ""):
            return f"ended otherwise: finish_reason {answer.finish}"
        return "" if answer.text.strip() else "the answer is empty"

    def _poor(self, answer: Answer, said: str) -> str:
        """What any answer must be: of some length, readable, and not the same over and over."""
        least = self.given.min_tokens
        if answer.written is not None and answer.written < least:
            return f"shorter than {least} tokens: {answer.written}"
        if "<think>" in said or "</think>" in said:
            return "holds its thoughts: start the server with a reasoning parser, or --request turns them off"
        return _garbled(said)

    def _matched(self, of: str, text: str) -> str:
        return next((rule.reason for rule in self.rules if rule.of == of and rule.pattern.search(text)), "")


class Seeds:
    """The prompts of the inputs. Iterating reads them anew: (row, prompt or None, why it is none)."""

    def __init__(self, rows: Inputs):
        self.rows = rows
        self.form = Form(None, rows.columns, rows.columns.get("text", "text"))

    def __iter__(self) -> Iterator[tuple[Item, Seed | None, str]]:
        """From the first on."""
        for item in self.rows:
            turns, fault = ([], (item.fault, "")) if item.fault else self._turns(item.raw)
            yield item, Seed(item.where, turns) if turns else None, fault[0]

    def check(self) -> int:
        """How many prompts there are. RecipeError for rows that are none, but with --skip-faulty."""
        found, faults = 0, []
        for item, seed, _ in self:
            found += seed is not None
            if seed is None and not self.rows.skip_faulty and not item.fault:
                faults.append(Problem(item.where, *self._turns(item.raw)[1]))
        raise_first(faults, "mend them, or drop them by --skip-faulty")
        if not found:
            raise RecipeError(Problem(listed(self.rows.paths), "holds no prompt"))
        return found

    def _turns(self, raw: dict[str, Any]) -> tuple[list[dict[str, str]], Fault]:
        """The turns up to the last one of a user; or why there are none."""
        named, found = self.form.read(raw)
        if found:
            return [], found[0]
        value = used(named, self.form.text_field)
        turns = value.get("messages", value.get("prompt"))
        if turns is None and isinstance(named.get("instruction"), str):
            turns = "\n".join(filter(None, [named["instruction"], named.get("input")]))
        if isinstance(turns, str):
            turns = [_user(turns)]
        if not isinstance(turns, list):
            do = "a row has messages, a prompt, or an instruction; or name its column: --column prompt=NAME"
            return [], (f"no prompt to be answered, but {listed(map(repr, raw))}", do)
        while turns and isinstance(turns[-1], dict) and turns[-1].get("role") != "user":
            turns = turns[:-1]
        for turn in turns:
            plain = (
                isinstance(turn, dict) and isinstance(turn.get("content"), str) and not turn.get("tool_calls")
            )
            if not plain or turn.get("role") not in ("system", "user", "assistant"):
                return [], ("a turn that is not plain text of system, user or assistant", "leave it out")
        if not turns or not turns[-1]["content"].strip():
            return [], ("no user turn with a text", "leave it out")
        if any(turn["content"] != _encodable(turn["content"]) for turn in turns):
            return [], ("half a character, which no UTF-8 can hold", "remove it")
        system = (
            [_system(named["system"])] if isinstance(named.get("system"), str) and named["system"] else []
        )
        return system + [{"role": t["role"], "content": t["content"]} for t in turns], ("", "")


async def ordered(
    items: Iterable[T], work_: Callable[[T], Awaitable[Any]], width: Callable[[], int]
) -> AsyncIterator[Any]:
    """What `work_` makes of each item, in their order, `width()` of them at once; the rest is cancelled when
    one fails.
    """
    pending: deque[asyncio.Task[Any]] = deque()
    try:
        for item in items:
            pending.append(asyncio.ensure_future(work_(item)))
            while pending and len(pending) >= width():
                yield await pending.popleft()
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def numbered(text: str) -> list[str]:
    """The entries of a numbered list, each over as many lines as it has."""
    parts = re.split(r"(?m)^[ \t]*(?:\*\*)?\d+[.):](?:\*\*)?[ \t]+", text)
    return [part.strip() for part in parts[1:] if part.strip()]


def _bare(text: str) -> str:
    """Without white space, or quotes that stand around all of it."""
    text = text.strip()
    return (
        text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1] else text
    )


def _garbled(text: str) -> str:
    """Why a text is none that a person would write."""
    if text != _encodable(text):
        return "holds half a character"
    if CONTROL.search(text):
        return "holds control characters"
    words = text.split()
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    least, share = REPEATS
    if len(grams) >= least and len(set(grams)) < share * len(grams):
        return "goes round in circles"
    return ""


def _encodable(text: str) -> str:
    r"""`text` with what UTF-8 cannot hold (half of a pair of UTF-16) written as \ud83d."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text(idea: Idea) -> str:
    return idea.turns[-1]["content"]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}
