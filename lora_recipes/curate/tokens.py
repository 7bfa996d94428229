"""How a base's tokenizer cuts the identifiers of Python code, and what new tokens would save."""

import bisect
import io
import json
import keyword
import tokenize
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.curate import base as bases
from lora_recipes.curate import python_files, work
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.python_files import STDLIB, Walk
from lora_recipes.curate.work import Outcome, Work

TOLD = """Count in how many pieces a base's tokenizer cuts the identifiers of Python code, the worst first.

The report says which share is cut in 3 or more pieces, whether that asks for new tokens (above 20 %), and
what the best ones would save and cost; the lines for a recipe are printed. Pieces are counted where the
identifiers stand, in the whole file."""
MANY = 3  # pieces
ADVISED = 0.20  # share of the identifiers in MANY pieces from which on new tokens are worth a thought


@dataclass
class Seen:
    """An identifier: in how many files and how often, after a space (True) or not, and in how many pieces."""

    files: int = 0
    count: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    pieces: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    many: int = 0
    cut: str = ""

    @property
    def mean(self) -> float:
        """Pieces of one occurrence."""
        return sum(self.pieces.values()) / sum(self.count.values())

    @property
    def more(self) -> int:
        """Pieces of all occurrences beyond one each."""
        return sum(self.pieces.values()) - sum(self.count.values())


def options(parser: ArgumentParser) -> None:
    """Its options."""
    python_files.option(parser)
    work.options(parser)
    bases.option(parser, required=True)
    parser.add_argument(
        "--top", type=int, default=20, metavar="N", help="how many new tokens to try (default: 20)"
    )
    parser.add_argument("--tests", action="store_true", help="read test files and folders, too")


def run(given: Namespace) -> str:
    """Count, try the new tokens, write."""
    if given.top < 0:
        raise RecipeError(Problem("--top", f"{given.top} is no number of tokens", "0 or more"))
    walk = Walk([python_files.source(word) for word in given.sources or [STDLIB]], given.tests)
    hashes, base = walk.sha256(), bases.resolved(given.base, given.outputs)
    with cli.importing():
        tokenizer = bases.tokenizer(base)
    if not tokenizer.is_fast:
        found = (
            f"the tokenizer of {base.base.name} is written in Python, and does not say where a piece stands"
        )
        raise RecipeError(Problem(base.base.at, found, "a base with a tokenizer.json"))
    left_out = [
        Item(f.where, {"reason": f.reason, "found": f.found, "of": {"path": f.path}})
        for f in walk
        if f.reason
    ]
    seen, before = count(walk, tokenizer)
    if not seen:
        raise RecipeError(Problem(", ".join(hashes), "no identifier in its Python files", "name another"))
    chosen = candidates(seen, set(tokenizer.get_vocab()))[: given.top]
    vocabulary = len(tokenizer)
    tokenizer.add_tokens(chosen)
    after = sum(len(encoded(tokenizer, file.text)) for file in walk if file.tree) if chosen else before
    config = base.base.config().get_text_config()
    facts = _facts(seen, before, after, chosen, config, vocabulary)
    settings = {"sources": given.sources, "base": given.base, "top": given.top, "tests": given.tests}
    worst = sorted(seen.items(), key=lambda one: (-one[1].more, one[0]))
    items = [*left_out, *(Item(name, _row(name, one)) for name, one in worst)]
    packages = ("transformers", "tokenizers")
    with Work("tokens", given.out, settings, hashes, packages=packages, overwrite=given.overwrite) as job:
        job.run(items, _outcome, len(items))
        return "\n".join([job.finish(identifiers=facts), *_said(facts)])


def _outcome(item: Item) -> Outcome:
    found = item.raw
    if "reason" in found:
        return Outcome(reason=found["reason"], example=found["found"], raw=found["of"])
    return Outcome([found])


def count(walk: Walk, tokenizer: Any) -> tuple[dict[str, Seen], int]:
    """Every identifier, and how many tokens all files have."""
    seen: dict[str, Seen] = {}
    total = 0
    for file in walk:
        if file.tree is None:
            continue
        offsets = encoded(tokenizer, file.text)
        total += len(offsets)
        starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
        here = set[str]()
        for name, begin in identifiers(file.text):
            end = begin + len(name)
            # Tokens that end after it begins and begin before it ends; one that holds more counts, too.
            first, past = bisect.bisect_right(ends, begin), bisect.bisect_left(starts, end)
            spaced = file.text[begin - 1 : begin] == " "
            one = seen.setdefault(name, Seen())
            one.count[spaced] += 1
            one.pieces[spaced] += past - first
            one.many += past - first >= MANY
            if not one.cut or not spaced:
                one.cut = "|".join(file.text[max(a, begin) : min(b, end)] for a, b in offsets[first:past])
            here.add(name)
        for name in here:
            seen[name].files += 1
    return seen, total


def encoded(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where each token of `text` stands, as characters; special tokens aside."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = found["offset_mapping"]
    return offsets


def identifiers(text: str) -> Iterator[tuple[str, int]]:
    """Every name in Python code that is no keyword, with the character where it stands."""
    begins = [0]
    for line in text.split("\n"):
        begins.append(begins[-1] + len(line) + 1)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                yield token.string, begins[token.start[0] - 1] + token.start[1]
    except (tokenize.TokenError, SyntaxError):  # it was parsed: what is left after a form feed, or nothing
        return


def candidates(seen: dict[str, Seen], vocabulary: set[str]) -> list[str]:
    """New tokens, the one that saves most first: identifiers that are cut in MANY pieces, with the space
    before them where they stand after one.
    """
    saves: dict[str, int] = {}
    for name, one in seen.items():
        for spaced, times in one.count.items():
            token = " " * spaced + name
            if times > 1 and one.pieces[spaced] >= MANY * times and token not in vocabulary:
                saves[token] = one.pieces[spaced] - times
    return sorted(saves, key=lambda token: (-saves[token], token))


def _row(name: str, one: Seen) -> dict[str, Any]:
    times = sum(one.count.values())
    about = {"identifier": name, "count": times, "files": one.files, "pieces": round(one.mean, 2)}
    return about | {"cut": one.cut, "more": one.more}


def _facts(
    seen: dict[str, Seen], before: int, after: int, chosen: list[str], config: Any, vocabulary: int
) -> dict[str, Any]:
    """What the report says of all of them together."""
    names, times = len(seen), sum(sum(one.count.values()) for one in seen.values())
    rows = config.vocab_size
    matrices = 1 if config.tie_word_embeddings else 2
    grown = max(0, vocabulary + len(chosen) - rows)  # published embeddings often have rows to spare
    return {
        "distinct": names,
        "occurrences": times,
        "share_in_3_or_more": round(sum(one.mean >= MANY for one in seen.values()) / names, 4),
        "share_of_occurrences_in_3_or_more": round(sum(one.many for one in seen.values()) / times, 4),
        "advised_above": ADVISED,
        "tokens": before,
        "new_tokens": chosen,
        "tokens_with_them": after,
        "saved": round(1 - after / before, 4),
        "parameters_trained": len(chosen) * config.hidden_size * matrices,
        "parameters_added": grown * config.hidden_size * matrices,
        "tied": matrices == 1,
    }


def _said(facts: dict[str, Any]) -> list[str]:
    """The report in words."""
    share, chosen = facts["share_in_3_or_more"], facts["new_tokens"]
    above = share > ADVISED
    advice = (
        f"above {ADVISED:.0%}: new tokens are worth a trial"
        if above
        else f"not above {ADVISED:.0%}: new tokens are not called for"
    )
    lines = [
        ("identifiers", f"{facts['distinct']:,}, {facts['occurrences']:,} times"),
        (
            "3+ pieces",
            f"{share:.1%} of them, {facts['share_of_occurrences_in_3_or_more']:.1%} of the times: {advice}",
        ),
    ]
    if chosen:
        head = "embed_tokens, which is lm_head" if facts["tied"] else "embed_tokens and lm_head"
        spare = facts["parameters_trained"] - facts["parameters_added"]
        lines += [
            (
                f"with {len(chosen)} new",
                f"{facts['tokens']:,} tokens -> {facts['tokens_with_them']:,}"
                f" ({-facts['saved']:+.1%}) in the same files",
            ),
            (
                "parameters",
                f"{facts['parameters_trained']:,} trained, {facts['parameters_added']:,} added ({head}"
                + (", which has rows to spare)" if spare else ")"),
            ),
            ("recipe", "model:"),
            ("", f"  new_tokens: {json.dumps(chosen, ensure_ascii=False)}"),
        ]
        if facts["tokens_with_them"] >= facts["tokens"]:
            lines.append(("WARNING", "these save nothing: they are found inside other words, too"))
    return [f"{label:12}{text}" for label, text in lines]
