"""Drop rows by length, by what they match, by language, by toxicity, by perplexity under a base."""

import importlib.util
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.curate import base as bases
from lora_recipes.curate import inputs, work
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.work import Outcome, dropped, kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLD = """Keep the rows that pass every test that is named: length, pattern, language, toxicity, perplexity.

What is tested is all that a row says, system turns and the template aside. The cheap tests come first; the
first that a row fails is its reason, with the figure. Fine-tuning data often keeps 20 to 2,000 tokens and
a perplexity up to 100."""
ROWS = 64  # that are looked at together, so that those of one length share a batch
LETTERS = 20  # of a text whose language can be told; of shorter ones nothing is dropped
Test = Callable[[Item], str | tuple[str, str] | None]  # a note, (reason, figure), or nothing


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    work.options(parser)
    tests = parser.add_argument_group("what a row must pass, one at least")
    tests.add_argument("--min-tokens", type=int, metavar="N", help="this many tokens or more (needs --base)")
    tests.add_argument("--max-tokens", type=int, metavar="N", help="this many tokens or fewer (needs --base)")
    tests.add_argument("--match", metavar="REGEX", help="a place that this regular expression matches")
    tests.add_argument("--no-match", metavar="REGEX", help="no such place")
    tests.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE",
        help="this language (ISO 639-1: en, de, ...) by py3langid; may be given more than once",
    )
    tests.add_argument(
        "--max-toxicity",
        type=float,
        metavar="P",
        help="at most this probability of English abuse (0 to 1), by the model in alt-profanity-check",
    )
    tests.add_argument(
        "--max-perplexity", type=float, metavar="P", help="at most this under the base (needs --base)"
    )
    more = parser.add_argument_group("the base that counts tokens and predicts them")
    bases.option(more)
    more.add_argument(
        "--max-length",
        type=int,
        default=1024,
        metavar="N",
        help="perplexity of the first N tokens of a row (default: 1024)",
    )
    more.add_argument(
        "--batch-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="tokens that the base reads at once, padding too (default: 2048)",
    )


def run(given: Namespace) -> str:
    """Test each row."""
    _checked(given)
    read = inputs.of(given, texts=True)
    tests: list[Test] = [_matching(given.match, given.no_match)] if given.match or given.no_match else []
    packages: list[str] = []
    base = bases.resolved(given.base, given.outputs) if given.base else None
    tokenizer = None
    if base:
        with cli.importing():
            tokenizer = bases.tokenizer(base)
        packages.append("transformers")
        given.base_files = bases.fingerprint(base)  # a killed run does not go on with another base
        if given.min_tokens is not None or given.max_tokens is not None:
            tests.append(_length(tokenizer, given.min_tokens or 0, given.max_tokens))
    if given.language:
        tests.append(_language(given.language))
        packages.append("py3langid")
    if given.max_toxicity is not None:
        tests.append(_toxicity(given.max_toxicity))
        packages.append("alt-profanity-check")
    model: PreTrainedModel | None = None

    def act(items: Sequence[Item]) -> Iterator[Outcome]:
        nonlocal model
        outcomes = [_outcome(item, tests) for item in items]
        if given.max_perplexity is not None:
            assert base and tokenizer
            left = [i for i, outcome in enumerate(outcomes) if not outcome.reason]
            model = model or bases.model(base)  # loaded when a row needs it: a finished run loads none
            texts = [_text(items[i]) for i in left]
            found = perplexities(model, tokenizer, texts, given.max_length, given.batch_tokens)
            for i, (value, cut) in zip(left, found, strict=True):
                outcomes[i] = _surprising(outcomes[i], value, cut, given)
        yield from outcomes

    with work.begun(given, read, packages=packages) as job:
        job.run_batches(read, act, ROWS)
        return job.finish()


def _checked(given: Namespace) -> None:
    """RecipeError for options that say nothing, or contradict each other."""
    named = ("min_tokens", "max_tokens", "match", "no_match", "max_toxicity", "max_perplexity")
    problems = []
    if not given.language and all(getattr(given, name) is None for name in named):
        spelled = listed(["--language", *(f"--{name.replace('_', '-')}" for name in named)])
        problems.append(
            Problem("filter", "no test is named: every row would be kept", f"name one of {spelled}")
        )
    for name in ("min_tokens", "max_tokens", "max_perplexity"):
        if getattr(given, name) is not None and not given.base:
            do = "--base NAME: whose tokenizer counts, and which model predicts"
            problems.append(Problem(f"--{name.replace('_', '-')}", "without --base", do))
    if None not in (given.min_tokens, given.max_tokens) and given.min_tokens > given.max_tokens:
        found = f"{given.min_tokens} is more than --max-tokens {given.max_tokens}"
        problems.append(Problem("--min-tokens", found, "no row could pass"))
    least = {"max_length": 2, "batch_tokens": 1, "max_perplexity": 1}
    problems += [
        Problem(f"--{name.replace('_', '-')}", f"{found:g} is too little", f"{limit} or more")
        for name, limit in least.items()
        if (found := getattr(given, name)) is not None and not found >= limit  # nan, too
    ]
    if given.max_toxicity is not None and not 0 <= given.max_toxicity <= 1:
        problems.append(Problem("--max-toxicity", f"{given.max_toxicity:g} is no probability", "0 to 1"))
    raise_if(problems)


def _outcome(item: Item, tests: list[Test]) -> Outcome:
    notes = []
    for test in tests:
        found = test(item)
        if isinstance(found, tuple):
            return dropped(*found)
        if found:
            notes.append(found)
    return kept(item.raw, notes=notes)


def _text(item: Item) -> str:
    return "\n".join(item.said)


def _pattern(option: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise RecipeError(Problem(option, f"no regular expression: {error}", "see Python's re")) from None


def _matching(match: str | None, no_match: str | None) -> Test:
    wanted, unwanted = _pattern("--match", match), _pattern("--no-match", no_match)

    def test(item: Item) -> tuple[str, str] | None:
        if wanted and not any(wanted.search(text) for text in item.said):
            return "no place matches --match", _text(item)[:80]
        for text in item.said if unwanted else ():
            assert unwanted
            if found := unwanted.search(text):
                return "a place matches --no-match", found[0][:80]
        return None

    return test


def _length(tokenizer: "PreTrainedTokenizerBase", least: int, most: int | None) -> Test:
    def test(item: Item) -> tuple[str, str] | None:
        # verbose: transformers warns of a row beyond the model's length, of which this is the test
        ids = tokenizer(_text(item), add_special_tokens=False, verbose=False)["input_ids"]
        count = len(ids)
        if count < least:
            return f"fewer than {least:,} tokens", f"{count:,}"
        if most is not None and count > most:
            return f"more than {most:,} tokens", f"{count:,}"
        return None

    return test


def _installed(module: str, extra: str, option: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RecipeError(Problem(option, f"the package {module} is not installed", cli.extra(extra)))


def _language(codes: list[str]) -> Test:
    _installed("py3langid", "curate", "--language")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = list(identifier.labels)
    do = f"those are {listed(sorted(known), len(known))}"
    unknown = [code for code in codes if code not in known]
    raise_if([Problem("--language", f"{code!r} is none that py3langid knows", do) for code in unknown])

    def test(item: Item) -> str | tuple[str, str] | None:
        text = _text(item)
        if sum(map(str.isalpha, text)) < LETTERS:
            return f"fewer than {LETTERS} letters: language not told"
        code, sure = identifier.classify(text)
        return (
            None if code in codes else (f"another language than {', '.join(codes)}", f"{code} ({sure:.0%})")
        )

    return test


def _toxicity(most: float) -> Test:
    _installed("profanity_check", "toxicity", "--max-toxicity")
    from profanity_check import predict_prob

    def test(item: Item) -> tuple[str, str] | None:
        found = max(predict_prob(list(item.said)), default=0.0)
        return (f"toxicity above {most:g}", f"{found:.2f}") if found > most else None

    return test


def _surprising(outcome: Outcome, value: float | None, cut: bool, given: Namespace) -> Outcome:
    if value is None:
        return kept(*outcome.rows, notes=[*outcome.notes, "one token: perplexity not told"])
    if not value <= given.max_perplexity:  # nan, too
        return dropped(f"perplexity above {given.max_perplexity:g}", f"{value:.1f}")
    said = f"perplexity of the first {given.max_length:,} tokens"
    return kept(*outcome.rows, notes=[*outcome.notes, *[said] * cut])


def perplexities(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    max_length: int,
    batch_tokens: int,
) -> list[tuple[float | None, bool]]:
    """Exp of the mean negative log-likelihood (nats a token, in float32) of each text's tokens after the
    first, and whether the text was cut at `max_length`; None for a text of one token.

    Texts of about one length share a batch of at most `batch_tokens` with its padding, which stands on the
    right, where a causal model does not see it.
    """
    encoded: list[list[int]] = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    cut = [len(ids) > max_length for ids in encoded]
    rows = [ids[:max_length] for ids in encoded]
    found: list[float | None] = [None] * len(rows)
    batch: list[int] = []
    order = sorted((i for i, ids in enumerate(rows) if len(ids) > 1), key=lambda i: (len(rows[i]), i))
    for i in order:
        if batch and (len(batch) + 1) * len(rows[i]) > batch_tokens:
            _judge(model, rows, batch, found)
            batch = []
        batch.append(i)
    if batch:
        _judge(model, rows, batch, found)
    return list(zip(found, cut, strict=True))


def _judge(model: Any, rows: list[list[int]], batch: list[int], found: list[float | None]) -> None:
    """Put the perplexity of the rows `batch` into `found`."""
    import torch
    from torch.nn.functional import cross_entropy

    width = max(len(rows[i]) for i in batch)
    ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch], device=model.device)
    lengths = torch.tensor([len(rows[i]) for i in batch], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    for row, i in enumerate(batch):  # a row at a time: float32 of all would be twice the logits
        length = len(rows[i])
        loss = cross_entropy(logits[row, : length - 1].float(), ids[row, 1:length])
        found[i] = float(loss.exp())
