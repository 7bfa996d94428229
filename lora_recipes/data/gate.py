"""The data as it will be trained: read, checked, made into tokens, counted and held against limits, before
any weight is loaded.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.record import DataFacts, EvalFacts, TrainFacts
from lora_recipes.data import overlap, prepare, render, report, stops
from lora_recipes.data import tokenizer as tokenizing
from lora_recipes.data.render import Characters, Counts
from lora_recipes.data.rows import Rows
from lora_recipes.data.stops import Stops
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import Recipe

UNFAITHFUL = (
    "set data.rows: assistant_turn; where the template thinks by default, also data.chat_template_kwargs:"
    " {enable_thinking: false}"
)

LONG = 32768  # tokens of a row; attention and activations of one that is not cut grow beyond what is expected

# name: (share above which training stops, share above which it warns, what it is, what to do). data.limits
# replaces the first.
LIMITS = {
    "truncated": (
        0.1,
        0.0,
        "of the rows are cut at train.max_length",
        "raise train.max_length, or shorten the rows",
    ),
    "duplicates": (
        0.1,
        0.0,
        "of the rows repeat an earlier row (but for case, spaces and Unicode forms)",
        "remove them",
    ),
    "train_in_eval": (
        0.1,
        0.0,
        "of the eval rows stand in train too",
        "split anew; the eval loss would flatter",
    ),
    "near_in_eval": (
        0.5,
        0.0,
        "of the eval rows nearly stand in train (half of the word 3-grams of both are shared)",
        "split by what the rows are about; the eval loss would flatter",
    ),
    "unsupervised": (
        0.99,
        0.95,
        "of the tokens are not trained",
        "shorten the prompts, or train more of each row",
    ),
    "unfaithful": (1.0, 0.0, "of the trained turns stand after tokens that no server renders", UNFAITHFUL),
    "no_end_of_turn": (
        1.0,
        0.0,
        "of the trained turns do not learn to stop",
        "their end is cut off or outside the labels: raise train.max_length; with assistant_only_loss the"
        " template must hold it inside {% generation %}",
    ),
}


@dataclass
class Gate:
    """Both splits as they go to the trainer (`train`, `evaluation`), their `counts`, the tokenizer, what ends
    a reply (`stops`), the new tokens that no row of train has, how the rows were come by, and what to say.
    """

    tokenizer: Any
    train: Rows
    evaluation: Rows
    counts: Counts
    facts: DataFacts
    stops: Stops = field(default_factory=Stops)
    unseen: list[int] = field(default_factory=list)
    said: str = ""
    warnings: list[str] = field(default_factory=list)


def pass_through(resolved: Resolved, network: bool, sample: int | None = None) -> Gate:
    """Take the recipe's data through the gate. RecipeError lists faulty rows, or the limits that are
    exceeded.

    `network`: may the tokenizer be fetched? Without one at hand the chat template alone is compared, and
    tokens are not counted. `sample`: look at that many rows of each source alone.
    """
    recipe = resolved.recipe
    tokenizer = tokenizer_of(resolved, network)
    known = _template_arguments(tokenizer)
    given = {key: recipe.at("data", "chat_template_kwargs", key) for key in recipe.data.chat_template_kwargs}
    raise_if(prepare.unused(given, known) if known is not None else [])
    made = prepare.prepared(resolved, tokenizer, known, sample)
    stops.adopt(tokenizer, made.stops)
    train, held = made.train, made.evaluation
    twice = np.flatnonzero(overlap.repeated(train.plain, train.where))
    both = np.flatnonzero(np.isin(held.plain, train.plain))
    near = np.setdiff1d(np.flatnonzero(np.isin(held.order, made.near)), both)
    facts = DataFacts(
        train=TrainFacts(
            **vars(train.counts),
            format=train.told.head[0].format,
            duplicates=len(twice),
            sha256=train.sha256,
        ),
        eval=EvalFacts(**vars(held.counts), train_in_eval=len(both), sha256=held.sha256),
    )
    gate = Gate(tokenizer, train, held, train.counts, facts, made.stops, made.unseen, made.said)
    if gate.counts.dropped == gate.counts.rows:
        do = "raise train.max_length: after truncation no row has a trained token left"
        raise RecipeError(
            Problem(recipe.at("train", "max_length"), f"all {gate.counts.rows:,} rows would be dropped", do)
        )
    shares = {
        name: gate.counts.share(name)
        for name in ("truncated", "unsupervised", "unfaithful", "no_end_of_turn")
    }
    shares |= {
        "duplicates": len(twice) / gate.counts.rows,
        "train_in_eval": len(both) / max(len(held), 1),
        "near_in_eval": len(near) / max(len(held), 1),
    }
    gate.warnings += stops.warnings(made.stops, resolved)
    first = {
        "duplicates": train.where(twice[0]) if len(twice) else "",
        "train_in_eval": held.where(both[0]) if len(both) else "",
        "near_in_eval": held.where(near[0]) if len(near) else "",
    }
    gate.warnings += limits(recipe, shares, first)
    gate.warnings += _whole_rows(gate, recipe)
    for name, counts in (("train", gate.counts), ("eval", held.counts)):
        if counts.dropped:
            gate.warnings.append(
                f"{counts.dropped} rows of {name} are dropped: truncated, nothing in them is trained (raise"
                " train.max_length)"
            )
    if held.counts.truncated:
        gate.warnings.append(
            f"{100 * held.counts.share('truncated'):.1f} % of the eval rows are cut at train.max_length:"
            " their loss is of the rest"
        )
    return gate


def _whole_rows(gate: Gate, recipe: Recipe) -> list[str]:
    """Without train.max_length nothing is cut, and the longest row alone says what a batch costs."""
    longest = gate.counts.longest or 0
    if recipe.train.max_length is not None or longest <= LONG:
        return []
    where = gate.train.where(int(gate.train.lengths.argmax()))
    return [
        f"train.max_length is null and {where} has {longest:,} tokens: its batch decides memory and time;"
        " set train.max_length, or cut the row"
    ]


def _template_arguments(tokenizer: Any) -> set[str] | None:
    """What the chat template looks at besides the messages: a typo in an argument is accepted by everybody
    and does nothing. None where that cannot be said.
    """
    known = _undeclared(str(tokenizer.chat_template)) if tokenizer.chat_template else None
    return (
        None if known is None else known - {"messages", "tools", "add_generation_prompt", "raise_exception"}
    )


@functools.lru_cache(maxsize=16)  # a sixth of a pass over a few rows
def _undeclared(template: str) -> set[str] | None:
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:  # tags that only transformers knows ({% generation %})
        return None
    return find_undeclared_variables(parsed)


def tokenizer_of(resolved: Resolved, network: bool) -> Any:
    """The tokenizer; or, when it is neither cached nor to be fetched, characters under the contract's chat
    template.
    """
    model, has_contract = resolved.recipe.model, resolved.base.contract is not None
    local = resolved.recipe.file(model.tokenizer or resolved.base.weights).is_dir()
    to_come = not (model.name_or_path or model.tokenizer)  # beside a base that is made before training
    try:
        return tokenizing.load(resolved, local_files_only=has_contract and not network)
    except RecipeError:
        if (network and not to_come) or local or not has_contract:
            raise
        return tokenizing.stand_in(resolved)


def limits(recipe: Recipe, shares: dict[str, float], firsts: dict[str, str]) -> list[str]:
    """Warnings for the `shares` above what LIMITS warns of, each with the place of its first row. RecipeError
    for those above their limit.
    """
    problems, warnings = [], []
    for name, share in shares.items():
        limit, warn, found, do = LIMITS[name]
        limit = recipe.data.limits.get(name, limit)
        first = f", first {firsts[name]}" if firsts.get(name) else ""
        text = f"{100 * share:.1f} % {found}{first}"
        if share > limit:
            where = recipe.at("data", "limits", name) if name in recipe.data.limits else recipe.at("data")
            problems.append(Problem(where, text, f"{do}; or raise data.limits.{name} (now {limit:g})"))
        elif share > warn:
            warnings.append(f"{text}: {do}")
    raise_if(problems)
    return warnings


def lines(gate: Gate, recipe: Recipe) -> list[tuple[str, str]]:
    """What a person reads of it: (label, text) pairs."""
    counts, form = gate.counts, gate.facts.train.format
    said = [("data", f"train {counts.rows:,} rows ({form}), eval {len(gate.evaluation):,} rows")]
    said.append(("rows", gate.said))
    if counts.tokens is None:
        name = recipe.model.tokenizer or recipe.model.name_or_path or recipe.model.contract
        said.append(
            (
                "tokens",
                (
                    f"not counted: the tokenizer of {name} is not in the cache and a plan fetches nothing"
                    " (training counts them)"
                ),
            )
        )
    else:
        share = 100 * (counts.supervised or 0) / max(counts.tokens, 1)
        said.append(
            (
                "tokens",
                (
                    f"{counts.tokens:,} in train, {counts.supervised:,} supervised ({share:.1f} %); longest"
                    f" row {counts.longest:,}"
                ),
            )
        )
    said += [
        (label, text)
        for label, text in (
            ("sources", report.sources(gate.train)),
            ("lengths", report.lengths(gate.train, recipe)),
        )
        if text
    ]
    if counts.turns:
        share = 100 * counts.faithful / counts.turns
        text = (
            f"{counts.faithful:,} of {counts.turns:,} trained turns stand after the prompt a server renders"
            f" ({share:.1f} %)"
        )
        said.append(("turns", text))
    said.append(("reply ends", stops.line(gate.stops, recipe.whole)))
    if kwargs := recipe.data.chat_template_kwargs:
        said.append(("serve with", f"chat_template_kwargs {kwargs}, as trained"))
    return said + [("note", note) for split in (gate.train, gate.evaluation) for note in split.told.notes]


def example(gate: Gate, recipe: Recipe) -> str:
    """The shortest of the first 50 rows, with what is trained between >> and <<."""
    first = min(gate.train[:50], key=lambda e: len(e.input_ids))
    stand_in = ""
    if isinstance(gate.tokenizer, Characters):
        stand_in = f"; from the chat template alone: {gate.tokenizer.named or 'none'}"
    return (
        f"{first.where} (trained between >> and"
        f" <<{stand_in})\n{render.shown(first, gate.tokenizer, recipe).strip()}"
    )
