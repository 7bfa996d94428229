"""`lora-recipes data synthesise`: rows that a teacher writes, behind any OpenAI-compatible endpoint."""

import asyncio
import json
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import inputs, prompts, teacher, work
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.methods import METHODS, OPERATIONS, Made, Seeds, Synthesis
from lora_recipes.curate.teacher import Budget, Journal, Key, Teacher
from lora_recipes.curate.work import Outcome

TOLD = f"""Let a teacher write rows: answers to prompts, new instructions in their manner, or harder ones.

IN holds the prompts (messages, prompt or instruction), the teacher is any server with the OpenAI API
({cli.command("serve")} starts one). Every answer is kept in x.journal.jsonl before it is used:
a run that was ended goes on from there, and nothing is asked twice."""
OURS = ("model", "messages", "stream", "n")  # parameters of a request that --request may not set


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    work.options(parser)
    parser.add_argument("--method", choices=METHODS, required=True, help="what is asked of the teacher")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the first prompt and what it may cost; ask nothing"
    )
    _endpoint(parser)
    group = parser.add_argument_group("what is made")
    group.add_argument(
        "--count", type=_whole, metavar="N", help="end with so many rows (self_instruct needs it)"
    )
    group.add_argument(
        "--samples", type=_whole, default=1, metavar="N", help="teacher: answers to each prompt (default: 1)"
    )
    group.add_argument(
        "--rounds",
        type=_whole,
        default=1,
        metavar="N",
        help="evol_instruct: how often each instruction is changed (default: 1)",
    )
    group.add_argument(
        "--operation",
        action="append",
        default=[],
        choices=OPERATIONS,
        help="evol_instruct: one of those that are drawn from; may be given more than once (default:"
        " all; domain where --domain names one)",
    )
    group.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="WORDS",
        help="evol_instruct: where an instruction may be taken to; may be given more than once",
    )
    group.add_argument(
        "--prompts", metavar="DIR", help="a folder with prompts of your own, by the names of data/prompts"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of what is drawn, and of the requests (default: 0)"
    )
    group = parser.add_argument_group("how it is sampled")
    group.add_argument("--top-p", type=float, default=0.9, metavar="P", help="(default: 0.9)")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: 1)")
    group.add_argument(
        "--max-tokens",
        type=_whole,
        default=1024,
        metavar="N",
        help="of an answer; a longer one is dropped (default: 1024)",
    )
    group.add_argument(
        "--request",
        action="append",
        default=[],
        metavar="PARAMETER=JSON",
        help="another parameter of each request, e.g. max_completion_tokens=512; null takes one out",
    )
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--min-tokens",
        type=int,
        default=20,
        metavar="N",
        help="of an answer, as the server counts (default: 20)",
    )
    group.add_argument(
        "--near",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="of word 3-grams in common, from which on a text is one that was there (default: 0.7;"
        " above 1: none)",
    )


def _endpoint(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the teacher")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="(default: http://127.0.0.1:8000)")
    group.add_argument("--model", metavar="NAME", help="(default: the one that the server has)")
    group.add_argument(
        "--key",
        metavar="VARIABLE",
        help="the environment variable that holds the API key, e.g. OPENAI_API_KEY (default: no key)",
    )
    for name in ("--api-key", "--token"):
        group.add_argument(
            name, dest="secret", nargs="?", const="", help=SUPPRESS
        )  # refused, without repeating it
    group.add_argument(
        "--concurrency", type=_whole, default=8, metavar="N", help="requests at once (default: 8)"
    )
    group.add_argument("--requests-per-minute", type=_above_zero, metavar="N", help="(default: no limit)")
    group.add_argument(
        "--timeout", type=_above_zero, default=300, metavar="S", help="seconds for an attempt (default: 300)"
    )
    group.add_argument(
        "--retries", type=int, default=5, metavar="N", help="attempts after the first (default: 5)"
    )
    group.add_argument(
        "--backoff",
        type=_above_zero,
        default=1,
        metavar="S",
        help="seconds before the second attempt, doubled for each that follows (default: 1;"
        " Retry-After may ask for more)",
    )
    group = parser.add_argument_group("what it may use, the answers in the journal included")
    group.add_argument("--budget-requests", type=_whole, metavar="N", help="attempts")
    group.add_argument("--budget-tokens", type=_whole, metavar="N", help="tokens, read and written")
    group.add_argument("--budget-cost", type=_above_zero, metavar="X", help="money, by --prices")
    group.add_argument(
        "--prices",
        nargs=2,
        type=float,
        default=[0.0, 0.0],
        metavar=("IN", "OUT"),
        help="of a million tokens read, and written",
    )


def _whole(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _above_zero(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def run(given: Namespace) -> str:
    """Ask, and write what is good."""
    key = _checked(given)
    own = Path(given.prompts) if given.prompts else None
    filled, (rules, rules_file) = prompts.load(_needed(given), own), prompts.rules(own)
    given.prompts = {p.name: p.sha256 for p in (*filled.values(), rules_file)}  # what decides, for the report
    read = inputs.of(given)
    seeds = Seeds(read)
    count = seeds.check()
    if count < 2 and given.operation == ["combine"]:
        raise RecipeError(Problem("--operation combine", "needs two instructions, and there is one"))
    journal_path = work.beside(given.out, ".journal.jsonl")
    prices = (given.prices[0], given.prices[1])
    budget = Budget(given.budget_requests, given.budget_tokens, given.budget_cost, prices)
    pace = (given.concurrency, given.requests_per_minute, given.timeout, given.retries, given.backoff)
    if given.dry_run:
        return _dry(Synthesis(given, seeds, filled, rules), budget)
    teacher.library()
    with work.begun(given, read, packages=["openai"]) as job, closing(Journal(journal_path)) as journal:
        for note in journal.notes:
            print(f"NOTE        {note}", file=sys.stderr)
        if journal.answers:
            print(f"NOTE        {shown(journal.path)} holds {journal.answers:,} answers", file=sys.stderr)
        job.again()
        asked = Teacher(given.url, key, journal, budget, *pace)
        synthesis = Synthesis(given, seeds, filled, rules)
        current: list[Outcome] = []

        def items() -> Iterator[Item]:
            for item, outcome in _made(synthesis, asked):
                current[:] = [outcome]
                yield item

        job.run(items(), lambda _: current[0])
        made = synthesis.said() | {"seeds": count} | asked.said()
        _, _, rest = job.finish(synthesis=made).partition("\n")
    return "\n".join([*(f"{label:12}{text}" for label, text in _told(made, given)), rest])


def _needed(given: Namespace) -> list[str]:
    """The prompts that the method fills."""
    own = {"self_instruct": ["self_instruct"], "evol_instruct": [f"evol_{o}" for o in given.operation]}
    return ["teacher", *own.get(given.method, [])]


def _made(synthesis: Synthesis, asked: Teacher) -> Iterator[Made]:
    """What the synthesis makes, one by one; while nobody waits for the next, nothing is asked."""
    source = _asking(synthesis, asked)

    async def following() -> Made | None:
        return await anext(source, None)

    with asyncio.Runner() as runner:
        try:
            while made := runner.run(following()):
                yield made
        finally:
            runner.run(source.aclose())


async def _asking(synthesis: Synthesis, asked: Teacher) -> AsyncGenerator[Made]:
    async with asked:
        synthesis.model = synthesis.given.model or await asked.model()
        async for made in synthesis.made(asked):
            yield made


def _checked(given: Namespace) -> Key:
    """The key. RecipeError for options that do not go together; completes `operation` and `request`."""
    if given.secret is not None:
        do = (
            "--key VARIABLE names the environment variable that holds it; make a new key if this one was real"
        )
        raise RecipeError(Problem("--api-key", "a secret is not an option: others see a command's words", do))
    del given.secret
    key, url = Key.of(given.key), teacher.address(given.url)
    problems, given.request = [], dict(_parameter(word) for word in given.request)
    problems += [Problem(f"--request {k}", "is set by the run itself") for k in given.request if k in OURS]
    if given.method == "self_instruct" and not given.count:
        problems.append(Problem("--count", "is missing: self_instruct goes on until it has so many rows"))
    if given.method != "teacher" and given.samples > 1:
        problems.append(Problem("--samples", "is for --method teacher", "--rounds, or --count"))
    if given.method != "evol_instruct":
        used = [("--operation", given.operation), ("--domain", given.domain), ("--rounds", given.rounds > 1)]
        problems += [Problem(name, "is for --method evol_instruct") for name, value in used if value]
    if "domain" in given.operation and not given.domain:
        problems.append(
            Problem("--operation domain", "needs a domain", "--domain chemistry --domain 'tax law'")
        )
    if given.budget_cost and not any(given.prices):
        problems.append(Problem("--budget-cost", "has no prices to count by", "--prices IN OUT"))
    limited = given.request.get("max_completion_tokens", given.request.get("max_tokens", given.max_tokens))
    if (given.budget_cost or given.budget_tokens) and not limited:
        found = "cannot be kept to by requests without a limit of tokens"
        problems.append(Problem("--budget-tokens, --budget-cost", found, "leave max_tokens in"))
    raise_if(problems)
    given.operation = given.operation or [o for o in OPERATIONS if o != "domain" or given.domain]
    if key.value and url.startswith("http://") and not teacher.is_local(url):
        print(f"WARNING     the key of {key.variable} goes to {url} unencrypted (http)", file=sys.stderr)
    return key


def _parameter(word: str) -> tuple[str, Any]:
    name, sign, value = word.partition("=")
    if not sign or not name:
        raise RecipeError(Problem("--request", f"{word[:40]!r} is no parameter", "e.g. max_tokens=512"))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _dry(synthesis: Synthesis, budget: Budget) -> str:
    """The first request as it would be sent, and what all of them may use at most, where that is known."""
    given, first = synthesis.given, synthesis.first()
    lines = [f"{m['role']}> {m['content']}" for m in first.messages]
    parameters = {k: v for k, v in first.parameters.items() if k != "model" or v}
    lines += ["", f"parameters  {json.dumps(parameters)}"]
    if given.method == "teacher":
        bounds = [request.most for request in synthesis.requests()]
        read, written = sum(r for r, _ in bounds), sum(w for _, w in bounds)
        cost = f", cost {budget.paid(read, written):,.4f}" if any(budget.prices) else ""
        lines.append(f"at most     {len(bounds):,} requests, {read:,} tokens read, {written:,} written{cost}")
    else:
        lines.append("at most     what the budget allows: how much is asked depends on what comes back")
    return "\n".join(lines)


def _told(made: dict[str, Any], given: Namespace) -> Iterator[tuple[str, str]]:
    """What came of it, for a person."""

    def share(part: int, of: int) -> str:
        return f"{part:,} of {of:,}" + (f" ({part / of:.0%})" if of else "")

    yield "seeds", f"{made['seeds']:,} prompts"
    if given.method != "teacher":
        yield "taken", f"{share(made['instructions_taken'], made['instructions_written'])} new instructions"
    yield "kept", f"{share(made['kept'], made['answered'])} answers"
    again = f", {made['again']:,} of them again" if made["again"] else ""
    journal = f"; {made['from_journal']:,} answers stood in the journal" if made["from_journal"] else ""
    yield "requests", f"{made['requests']:,} sent{again}{journal}"
    bound = made["counted_by_upper_bound"]
    counted = f"; {bound:,} attempts by their upper bound: the server did not count" if bound else ""
    before = f" ({made['tokens_of_the_journal']:,} of both were paid before)" if made["from_journal"] else ""
    yield "tokens", f"{made['tokens_read']:,} read, {made['tokens_written']:,} written{before}{counted}"
    if made["cost"] is not None:
        yield "cost", f"{made['cost']:,.4f} at {given.prices[0]:g} and {given.prices[1]:g} for a million"
    if made["ended"]:
        left = f"; {made['not_asked']:,} were not asked" if made["not_asked"] else ""
        yield "ended", made["ended"] + left
