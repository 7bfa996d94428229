"""The data as it will be trained: read, checked, made into tokens, counted and held against limits, before
any weight is loaded.
"""

from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from lora_recipes.core.errors import Problem, RecipeError, nearest, raise_if
from lora_recipes.core.record import DataFacts, EvalFacts, TrainFacts
from lora_recipes.data import read, render, stops
from lora_recipes.data import tokenizer as tokenizing
from lora_recipes.data.read import Split
from lora_recipes.data.render import Characters, Counts, Example
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
    a reply (`stops`), and what to say about them.
    """

    tokenizer: Any
    splits: dict[str, Split]
    train: list[Example]
    evaluation: list[Example]
    counts: Counts
    facts: DataFacts
    stops: Stops = field(default_factory=Stops)
    warnings: list[str] = field(default_factory=list)


def pass_through(resolved: Resolved, network: bool) -> Gate:
    """Take the recipe's data through the gate. RecipeError lists faulty rows, or the limits that are
    exceeded.

    `network`: may the tokenizer be fetched? Without one at hand the chat template alone is compared, and
    tokens are not counted.
    """
    recipe = resolved.recipe
    splits = _read(recipe)
    if recipe.data.rows == "assistant_turn":
        splits = {which: read.by_assistant_turn(split) for which, split in splits.items()}
        if not splits["train"].rows:
            do = "rows whose assistant turns all say weight: 0 or train: false teach nothing"
            raise RecipeError(Problem(recipe.at("data", "train"), "no turn is to be trained", do))
    tokenizer = _tokenizer(resolved, network)
    raise_if(_unknown_kwargs(recipe, tokenizer, splits))
    train, evaluation = (render.examples(splits[which], tokenizer, recipe) for which in ("train", "eval"))
    for which, split in splits.items():
        if note := render.unread(split, tokenizer, recipe):
            split.notes.append(f"{which}: {note}")
    following = stops.next_turn(tokenizer, resolved)
    train = stops.closed(splits["train"], train, following)
    evaluation = stops.closed(splits["eval"], evaluation, following)
    ends = stops.decide(splits["train"], train, tokenizer, resolved, following)
    stops.adopt(tokenizer, ends)
    counted = render.counts(train, tokenizer, recipe, ends.trained)
    twice, both = splits["train"].duplicates, read.in_both(splits["train"], splits["eval"])
    held_out = render.counts(evaluation, tokenizer, recipe, ends.trained)
    near = [row for row in read.near(splits["train"], splits["eval"]) if row not in both]
    facts = DataFacts(
        train=TrainFacts(
            **vars(counted),
            format=splits["train"].rows[0].format,
            duplicates=len(twice),
            sha256=splits["train"].sha256,
        ),
        eval=EvalFacts(**vars(held_out), train_in_eval=len(both), sha256=splits["eval"].sha256),
    )
    gate = Gate(tokenizer, splits, train, evaluation, counted, facts, ends)
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
        "train_in_eval": len(both) / max(len(evaluation), 1),
        "near_in_eval": len(near) / max(len(evaluation), 1),
    }
    gate.warnings += stops.warnings(ends, resolved)
    _limits(gate, recipe, shares, {"duplicates": twice, "train_in_eval": both, "near_in_eval": near})
    gate.warnings += _whole_rows(gate, recipe)
    for name, counts in (("train", gate.counts), ("eval", held_out)):
        if counts.dropped:
            gate.warnings.append(
                f"{counts.dropped} rows of {name} are dropped: truncated, nothing in them is trained (raise"
                " train.max_length)"
            )
    if held_out.truncated:
        gate.warnings.append(
            f"{100 * held_out.share('truncated'):.1f} % of the eval rows are cut at train.max_length: their"
            " loss is of the rest"
        )
    return gate


def _read(recipe: Recipe) -> dict[str, Split]:
    """Both splits; the faults of both in one error."""
    splits, problems = {}, []
    for which in ("train", "eval"):
        try:
            splits[which] = read.read(recipe, which)
        except RecipeError as error:
            problems += error.problems
    raise_if(problems)
    return splits


def _whole_rows(gate: Gate, recipe: Recipe) -> list[str]:
    """Without train.max_length nothing is cut, and the longest row alone says what a batch costs."""
    longest = gate.counts.longest or 0
    if recipe.train.max_length is not None or longest <= LONG:
        return []
    where = max(gate.train, key=lambda e: len(e.input_ids)).where
    return [
        f"train.max_length is null and {where} has {longest:,} tokens: its batch decides memory and time;"
        " set train.max_length, or cut the row"
    ]


def _unknown_kwargs(recipe: Recipe, tokenizer: Any, splits: dict[str, Split]) -> list[Problem]:
    """Template arguments, of the recipe and of rows, that the chat template never looks at: a typo there is
    accepted by everybody and does nothing.
    """
    given = {key: recipe.at("data", "chat_template_kwargs", key) for key in recipe.data.chat_template_kwargs}
    for row in (row for split in splits.values() for row in split.rows):
        for key in row.value.get("chat_template_kwargs", {}):
            given.setdefault(key, f"{row.where} chat_template_kwargs.{key}")
    if not given or not tokenizer.chat_template:
        return []
    try:
        known = find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(tokenizer.chat_template)
        )
    except TemplateSyntaxError:  # tags that only transformers knows ({% generation %})
        return []
    known -= {"messages", "tools", "add_generation_prompt", "raise_exception"}
    return [
        Problem(where, "the chat template does not use it", f"did you mean {nearest(key, known)}?")
        for key, where in given.items()
        if key not in known
    ]


def _tokenizer(resolved: Resolved, network: bool) -> Any:
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


def _limits(gate: Gate, recipe: Recipe, shares: dict[str, float], rows: dict[str, list[read.Row]]) -> None:
    problems = []
    for name, share in shares.items():
        limit, warn, found, do = LIMITS[name]
        limit = recipe.data.limits.get(name, limit)
        first = f", first {rows[name][0].where}" if rows.get(name) else ""
        text = f"{100 * share:.1f} % {found}{first}"
        if share > limit:
            where = recipe.at("data", "limits", name) if name in recipe.data.limits else recipe.at("data")
            problems.append(Problem(where, text, f"{do}; or raise data.limits.{name} (now {limit:g})"))
        elif share > warn:
            gate.warnings.append(f"{text}: {do}")
    raise_if(problems)


def lines(gate: Gate, recipe: Recipe) -> list[tuple[str, str]]:
    """What a person reads of it: (label, text) pairs."""
    counts, rows = gate.counts, gate.splits["train"].rows
    said = [("data", f"train {counts.rows:,} rows ({rows[0].format}), eval {len(gate.evaluation):,} rows")]
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
    return said + [("note", note) for split in gate.splits.values() for note in split.notes]


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
