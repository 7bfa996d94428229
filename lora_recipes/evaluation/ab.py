"""Which of two models on a server answers the same prompts better, blind: `make ab RECIPE=x`.

The prompts are held-out rows of the run, their last replies left out. Judged by a person on a page, where
left and right are drawn, by a rule, or by a model behind an endpoint, which is asked in both orders: where it
contradicts itself it is a tie. All answers stand in journals: an endpoint that stopped is gone on with, and
nothing is asked twice.
"""

import asyncio
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, files, lock
from lora_recipes.core.errors import Problem, RecipeError, nearest, raise_if
from lora_recipes.core.record import Judged, plain
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import prompts, review, teacher
from lora_recipes.curate.methods import ordered
from lora_recipes.curate.teacher import Answer, Budget, Journal, Key, Refused, Request, Teacher
from lora_recipes.data import read
from lora_recipes.evaluation import evaluate, generate
from lora_recipes.recipe import load as recipes

FORMAT = "lora-recipes ab 1"
KEY = "key.json"  # of the page: which answer is whose
MARKS = ("left", "right", "tie", "none")
VERDICTS = [["1", "left is better", "left"], ["2", "right is better", "right"], ["0", "tie", "tie"]]
VERDICT = re.compile(r"\[\[(1|2|tie)\]\]", re.IGNORECASE)
JUDGE_TOKENS = 512  # of a judge's answer


@dataclass(frozen=True)
class Asked:
    """What to compare, and how. `models`: A and B, by default base and adapter. Of `rule`, `judge` (an
    endpoint) and `marks` (a file of the page) at most one is given; without any, the page is made.
    """

    models: Sequence[str] = ()
    url: str = "http://127.0.0.1:8000"
    max_tokens: int = 256
    seed: int = 0
    rule: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_key: str | None = None
    marks: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Prompt:
    """A held-out row without its last reply, the `reference`; `options` go with a request for it."""

    where: str
    messages: list[dict[str, Any]]
    reference: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The answers of A and B to a prompt; `swapped`: is B shown first?"""

    prompt: Prompt
    a: Answer
    b: Answer
    swapped: bool

    @property
    def shown(self) -> tuple[str, str]:
        """The two texts, in the order in which they are shown."""
        return (self.b.text, self.a.text) if self.swapped else (self.a.text, self.b.text)

    @property
    def equal(self) -> bool:
        """Are they the same, but for white space at the ends? A tie that nobody is asked for."""
        return self.a.text.strip() == self.b.text.strip()

    @property
    def row(self) -> dict[str, Any]:
        """As the page has it: nothing in it says which answer is whose."""
        first, second = self.shown
        texts = [[None, f"{m['role']}", _text(m)] for m in self.prompt.messages]
        texts += [[None, "left", first], [None, "right", second]]
        return {"where": self.prompt.where, "sha256": review.digest({"texts": texts}), "texts": texts}


# 1: B is better; -1: A is; 0: a tie; None: not judged
Verdict = int | None


def _text(message: dict[str, Any]) -> str:
    said = message.get("content") or ""
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)


# ---- rules


def _exact(answer: Answer, prompt: Prompt, value: str) -> bool:
    return answer.text.strip() == prompt.reference.strip()


def _contains(answer: Answer, prompt: Prompt, value: str) -> bool:
    return (value or prompt.reference.strip()) in answer.text


def _regex(answer: Answer, prompt: Prompt, value: str) -> bool:
    return re.search(value, answer.text, re.DOTALL) is not None


def _words(answer: Answer, prompt: Prompt, value: str) -> bool:
    return len(answer.text.split()) <= int(value)


def _ended(answer: Answer, prompt: Prompt, value: str) -> bool:
    return answer.finish == "stop"


# name -> does it want a value (None: it may have one), what an answer must do, and the question itself
Holds = Callable[[Answer, Prompt, str], bool]
RULES: dict[str, tuple[bool | None, str, Holds]] = {
    "exact": (False, "is the reply of the row", _exact),
    "contains": (None, "holds VALUE, or the reply of the row", _contains),
    "regex": (True, "has a place that VALUE matches", _regex),
    "words": (True, "has at most VALUE words", _words),
    "ended": (False, "ended before --max-tokens", _ended),
}


def rule(text: str) -> Callable[[Pair], Verdict]:
    """The rule `name` or `name=value`: of two answers the one for which it holds is better. RecipeError for
    what is none.
    """
    name, sign, value = text.partition("=")
    if name not in RULES:
        known = ", ".join(f"{n} ({told})" for n, (_, told, _) in RULES.items())
        do = f"did you mean {nearest(name, RULES)}? There are {known}"
        raise RecipeError(Problem(cli.command(RULE=text), "no such rule", do))
    wants, told, holds = RULES[name]
    problem = None
    if wants and not value:
        problem = "needs a value"
    elif wants is False and sign:
        problem = "takes no value"
    elif name == "words" and not value.isdecimal():
        problem = f"{value!r} is no number of words"
    elif name == "regex":
        try:
            re.compile(value)
        except re.error as error:
            problem = f"is no regular expression of Python: {error}"
    if problem:
        do = f"{name}{'=VALUE' if wants else ''}: the answer {told}"
        raise RecipeError(Problem(cli.command(RULE=text), problem, do))

    def verdict(pair: Pair) -> Verdict:
        return holds(pair.b, pair.prompt, value) - holds(pair.a, pair.prompt, value)

    return verdict


# ---- the comparison


def compare(name: str, outputs: Path, overrides: list[str], asked: Asked) -> str:
    """Ask both models, have the answers judged, record it; returns what to print. RecipeError says what is
    missing, or where an endpoint stopped: what was answered is kept.
    """
    raise_if(_unfit(asked))
    by_rule = rule(asked.rule) if asked.rule else None
    key = Key.of(asked.judge_key)
    if asked.judge:
        teacher.address(asked.judge)
    run = RunFolder(outputs / recipes.run_of(name, outputs))
    folder = run.path / "ab"
    if asked.marks:
        marks = review.read_marks(asked.marks, FORMAT, MARKS)
        with lock.held(run.path, "compares"):
            return _recorded(run, _taken_back(folder / KEY, marks, asked.marks))
    split, found = _prompts(run, overrides)
    with files.writing(folder, "while comparing"), lock.held(run.path, "compares"):
        models = generate.served(asked.url, asked.models, run.path.name)
        pairs = _answers(found, asked, models, folder)
        none = len(found) - len(pairs)
        for count, what in (
            (len(split.rows) - len(found), "rows are no chat with a reply"),
            (none, "prompts were not answered by both"),
        ):
            if count:
                print(f"NOTE        {count:,} {what}, and are left out", file=sys.stderr)
        if not pairs:
            raise RecipeError(Problem(asked.url, "no prompt was answered by both", "look at the server"))
        made = Judged(
            at=files.now(),
            models=[model.name for model in models],
            judge="a person",
            sha256=split.sha256,
            prompts=len(found),
            a=0,
            b=0,
            ties=0,
            equal=sum(pair.equal for pair in pairs),
            not_judged=none,
        )
        if by_rule:
            made = _counted(made, [by_rule(pair) for pair in pairs], judge=f"the rule {asked.rule}")
        elif asked.judge:
            judge, verdicts, disagreed = asyncio.run(_by_judge(pairs, asked, folder, key))
            made = _counted(made, verdicts, judge=judge, disagreed=disagreed)
        else:
            return _page(pairs, folder, made, asked, run.path.name)
        return _recorded(run, made)


def _counted(made: Judged, verdicts: list[Verdict], **more: Any) -> Judged:
    counts = {"a": verdicts.count(-1), "b": verdicts.count(1), "ties": verdicts.count(0)}
    more |= counts | {"not_judged": made.not_judged + verdicts.count(None)}
    return replace(made, **more)


def _recorded(run: RunFolder, made: Judged) -> str:
    run.write_record(replace(run.outcome(), judged=made))
    return "\n".join(report(made))


def _unfit(asked: Asked) -> list[Problem]:
    """What is wrong with the options, whatever the run."""
    problems = []
    if asked.models and len(set(asked.models)) < 2:
        problems.append(Problem(cli.command(MODELS=[*asked.models]), "are the same", "name two models"))
    if asked.max_tokens < 1:
        problems.append(Problem(cli.command(MAX_TOKENS=str(asked.max_tokens)), "is no length", "1 or more"))
    if (asked.judge_model or asked.judge_key) and not asked.judge:
        said = "--judge-model" if asked.judge_model else "--judge-key"
        problems.append(Problem(said, "there is no judge", f"{cli.command(JUDGE='URL')} names one"))
    return problems


def _prompts(run: RunFolder, overrides: list[str]) -> tuple[read.Split, list[Prompt]]:
    """The held-out rows, and those of them that are prompts with a reply."""
    recipe = evaluate.recipe(run, run.path.name, overrides)
    if not recipe.data.eval:
        do = f"name rows: {cli.command(SET='data.eval=FILE')}"
        raise RecipeError(Problem(recipe.at("data"), "there are no prompts: no data.eval", do))
    split = read.read(recipe, "eval")
    found = [prompt for row in split.rows if (prompt := _prompt(row, recipe.data.chat_template_kwargs))]
    if not found:
        do = "models are asked by chat: name rows of messages, each with a reply"
        raise RecipeError(Problem(recipe.at("data", "eval"), "no row of it is a chat with a reply", do))
    return split, found


def _prompt(row: Any, options: dict[str, Any]) -> Prompt | None:
    """The row up to its last reply; None where there is none to leave out."""
    if not row.conversational:
        return None
    last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=0)
    reply = row.messages[last].get("content")
    if not (last and isinstance(reply, str) and reply):
        return None
    given = options | row.value.get("chat_template_kwargs", {})
    more = row.options | ({"chat_template_kwargs": given} if given else {})
    return Prompt(row.where, row.messages[:last], reply, more)


def _answers(found: list[Prompt], asked: Asked, models: list[generate.Served], folder: Path) -> list[Pair]:
    """The pairs that both models answered."""
    how = {"max_tokens": asked.max_tokens, "temperature": 0, "seed": asked.seed}
    both = []
    for model in models:
        requests = [Request(p.messages, {"model": model.name, **how, **p.options}) for p in found]
        both.append(generate.answers(asked.url, model, requests, folder))
    pairs = []
    for prompt, a, b in zip(found, *both, strict=True):
        if isinstance(a, Answer) and isinstance(b, Answer):
            drawn = random.Random(f"{asked.seed} {review.digest({'messages': prompt.messages})}")
            pairs.append(Pair(prompt, a, b, drawn.random() < 0.5))
    return pairs


async def _by_judge(
    pairs: list[Pair], asked: Asked, folder: Path, key: Key
) -> tuple[str, list[Verdict], int]:
    """Who the judge was, its verdicts, and how often its two orders contradicted each other."""
    assert asked.judge
    template = prompts.load(["judge"], None)["judge"]
    with closing(Journal(folder / "judge.journal.jsonl")) as journal:
        async with Teacher(asked.judge, key, journal, Budget(), retries=2) as client:
            model = asked.judge_model or await client.model()
            how = {"model": model, "max_tokens": JUDGE_TOKENS, "temperature": 0, "seed": asked.seed}
            open_ = [pair for pair in pairs if not pair.equal]
            requests = []
            for pair in open_:
                question = "\n\n".join(f"{m['role']}: {_text(m)}" for m in pair.prompt.messages)
                for first, second in ((pair.a.text, pair.b.text), (pair.b.text, pair.a.text)):
                    text = template.fill(question=question, first=first, second=second)
                    requests.append(Request([{"role": "user", "content": text}], how))
            width = 4 * client.concurrency
            said = [_verdict(answer) async for answer in ordered(requests, client.ask, lambda: width)]
    found: dict[int, Verdict] = {}
    disagreed = 0
    for pair, one, other in zip(open_, said[::2], said[1::2], strict=True):
        both = None if one is None or other is None else (one, -other)
        disagreed += both is not None and both[0] != both[1]
        found[id(pair)] = None if both is None else both[0] if both[0] == both[1] else 0
    return f"{model} at {asked.judge}", [found.get(id(pair), 0) for pair in pairs], disagreed


def _verdict(answer: Answer | Refused) -> Verdict:
    """1: the second is better; -1: the first; None: it does not say."""
    said = VERDICT.findall(answer.text) if isinstance(answer, Answer) else []
    return {"1": -1, "2": 1, "tie": 0}[said[-1].lower()] if said else None


# ---- the page


def _page(pairs: list[Pair], folder: Path, made: Judged, asked: Asked, name: str) -> str:
    """Write the page, and beside it what says which side is whose."""
    rows = {row["sha256"]: (row, pair.swapped) for pair in pairs if not pair.equal for row in [pair.row]}
    if not rows:
        return "all answers are the same: there is nothing to judge"
    shown_rows = [row for row, _ in rows.values()]
    text = review.page(FORMAT, f"{name}.ab", f"{len(rows):,} pairs of answers", shown_rows, VERDICTS)
    out = folder / "page.html"
    if out.exists() and not asked.force and out.read_text(encoding="utf-8") != text:
        do = f"{cli.command(FORCE=True)} replaces it; its marks are of the answers that it shows"
        raise RecipeError(Problem(shown(out), "is already there, with other answers", do))
    swapped = {sha256: swapped for sha256, (_, swapped) in rows.items()}
    files.write(folder / KEY, json.dumps({"judged": plain(made), "swapped": swapped}) + "\n")
    files.write(out, text)
    again = cli.command("ab", RECIPE=name, MARKS=f"{name}.ab.marks.json")
    return (
        f"wrote       {shown(out)}: {len(rows):,} pairs, left and right at random; {made.equal:,} are equal:"
        f" ties\n"
        f"then        open it in a browser, S saves the marks; {again}"
    )


def _taken_back(file: Path, marks: dict[str, dict[str, Any]], of: Path) -> Judged:
    """What a person marked, with what the page's key says of the sides."""
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        do = f"without {cli.command(MARKS='')} the page is made first"
        raise RecipeError(Problem(shown(file), "is not there: no page was made of this run", do)) from None
    if strange := set(marks) - set(key["swapped"]):
        found = f"{len(strange)} of {len(marks)} marks are of pairs that are not on the last page"
        raise RecipeError(Problem(shown(of), found, "judge that one"))
    verdicts: list[Verdict] = [0] * key["judged"]["equal"]
    for sha256, swapped in key["swapped"].items():
        mark = marks.get(sha256, {}).get("mark", "none")
        right = -1 if swapped else 1  # B stands right unless swapped
        verdicts.append({"left": -right, "right": right, "tie": 0, "none": None}[mark])
    return _counted(Judged(**key["judged"] | {"at": files.now()}), verdicts)


def report(made: Judged) -> list[str]:
    """The comparison for a person."""
    decided = made.a + made.b
    lines = [
        f"A {made.models[0]}, B {made.models[1]}: {made.prompts:,} prompts",
        f"judged by   {made.judge}",
        f"verdicts    A is better {made.a:,}, B is better {made.b:,}, ties {made.ties:,}"
        f" ({made.equal:,} of them equal answers), not judged {made.not_judged:,}",
    ]
    if made.disagreed is not None:
        lines.append(f"orders      {made.disagreed:,} pairs were judged otherwise in the other order: ties")
    if not decided:
        return [*lines, "win rate    no pair was decided: nothing is shown"]
    low, high = review.wilson(made.b, decided)
    lines.append(
        f"win rate    of B {made.b / decided:.1%} of {decided:,} decided pairs, 95 % interval {low:.1%} to"
        f" {high:.1%}"
    )
    if low <= 0.5 <= high:
        return [*lines, "no difference shown: the interval includes 50 %"]
    return [*lines, f"{'B' if low > 0.5 else 'A'} is better: the interval leaves out 50 %"]
