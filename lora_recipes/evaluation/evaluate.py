"""Is the adapter better than its base, and what did it forget? `make eval RECIPE=x`: both are asked the same,
the answers go into run.json.

It asks what training left (outputs/<name>/adapter, or model), not what the recipe meant; the rows are made
into tokens and labels as for training.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import base_fit, cli, files, interval, locate, lock, provenance
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.files import now
from lora_recipes.core.record import Evaluation, Generation, Loss, SetLosses, Sides
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import new_tokens, read, render, stops
from lora_recipes.data.render import IGNORED
from lora_recipes.evaluation import classify, identifiers
from lora_recipes.evaluation.identifiers import Identifier
from lora_recipes.model import answers, attach, embeddings, probes, scores
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import Resolved, resolve
from lora_recipes.recipe.recipe import Recipe

SETS = {"eval": "held out", "kept": "kept"}  # data.<key> -> how it is called
PROMPTS, LONGEST = 3, 64  # generations side by side, and tokens of each


@dataclass
class Pair:
    """Two models to compare: `base`, and what training made of it. An adapter is one model, asked with the
    adapter and without.
    """

    tokenizer: Any
    trained: Any
    result: Path  # what training left: it says where a reply ends
    stop_text: str | None = None  # the same, where that is no token
    untrained: Any = None  # the base, when it is a model of its own
    facts: dict[str, Any] = field(default_factory=dict)  # fields of Evaluation that say which two
    against: str | None = None  # another adapter on that base, which is asked in place of it: its name

    def side(self, which: str) -> tuple[Any, AbstractContextManager[None]]:
        """The model to ask for `base` or `trained`, and the context to ask it in."""
        if which == "trained":
            return self.trained, contextlib.nullcontext()
        if self.against:
            return self.trained, self._other(self.against)
        return (
            (self.untrained, contextlib.nullcontext())
            if self.untrained is not None
            else (self.trained, self.trained.disable_adapter())
        )

    @contextlib.contextmanager
    def _other(self, name: str) -> Iterator[None]:
        """The adapter `name` in place of the trained one."""
        self.trained.set_adapter(name)
        try:
            yield
        finally:
            self.trained.set_adapter("default")


SIDES = ("base", "trained")


def evaluation(
    name: str,
    outputs: Path,
    overrides: Sequence[str] = (),
    adapter: Path | None = None,
    base: Path | None = None,
) -> Evaluation:
    """Ask base and trained model of the run outputs/<name>/; writes run.json's `evaluation` and returns it.

    `overrides`: data.eval=, data.kept= and probes.*= only. `adapter`: another one for the same base (a
    combination), asked on this run's data; its own run.json gets the answer. `base` replaces the base that
    the adapter names. RecipeError when anything is missing.
    """
    name = recipes.run_of(name, outputs)
    run = RunFolder(outputs / name)
    more = [run.path] if run.path.is_dir() else []
    with lock.runs([adapter] if adapter else [], "evaluates", *more):
        return _evaluation(run, name, overrides, adapter, base)


def answered(
    name: str, outputs: Path, overrides: Sequence[str], adapter: Path | None, base: Path | None
) -> str:
    """The same for a person. Of a classifier its scores on data.eval alone: an untrained head has no answer
    to compare them with.
    """
    name = recipes.run_of(name, outputs)
    run = RunFolder(outputs / name)
    more = [run.path] if run.path.is_dir() else []
    with lock.runs([adapter] if adapter else [], "evaluates", *more):
        if (run.path / "recipe.yaml").is_file() and (asked := recipe(run, name, overrides)).classify:
            return "\n".join(scores.text(classify.evaluation(run, asked, adapter, base)))
        return report(_evaluation(run, name, overrides, adapter, base))


def _evaluation(
    run: RunFolder, name: str, overrides: Sequence[str], adapter: Path | None, base: Path | None
) -> Evaluation:
    outputs = run.path.parent
    asked = recipe(run, name, overrides)
    sets = sets_of(asked)
    resolved = resolve(asked, outputs)
    pair = _pair(resolved, adapter or run.result(asked.method), base)
    raise_if(probes.problems(pair.tokenizer, asked))
    losses = {}
    for which, split in sets.items():
        losses[which] = _losses(pair, *made(split, pair.tokenizer, resolved), split.sha256)
    answered = {}
    for side in SIDES:
        model, context = pair.side(side)
        with context:
            answered[side] = probes.probes(model, pair.tokenizer, asked)
    found = Evaluation(
        at=now(),
        overrides=list(overrides),
        **pair.facts,
        sets=losses,
        probes=Sides(**answered),
        generations=_generations(pair, asked, sets.get("eval")),
        notes=_notes(run, losses),
    )
    target = RunFolder(adapter.parent) if adapter else run
    if (record := target.record) is None:
        note = f"{shown(target.path)} has no run.json: this is not recorded there"
        return dataclasses.replace(found, notes=[*found.notes, note])
    target.write_record(dataclasses.replace(record, evaluation=found))
    return found


def against(name: str, outputs: Path, other: Path) -> SetLosses:
    """The adapter of the run outputs/<name>/ and the one in the folder `other`, on the rows of data.eval:
    each is asked of both, `base` is `other`. RecipeError when anything is missing.
    """
    run = RunFolder(outputs / name)
    asked = recipe(run, name, ())
    resolved, split = resolve(asked, outputs), sets_of(asked)["eval"]
    pair = _pair(resolved, run.result(asked.method), None, other)
    return _losses(pair, *made(split, pair.tokenizer, resolved), split.sha256)


def loss_of(adapter: Path, rows: Path, name: str, outputs: Path) -> interval.Mean:
    """The loss of the adapter in the folder `adapter` on the file `rows` of prompts and completions, nats a
    token, as the run outputs/<name>/ trains and evaluates. RecipeError where it cannot be asked.
    """
    run = RunFolder(outputs.absolute() / name)
    asked = recipe(run, name, ())
    own = {k: v for k, v in asked.sections["data"].items() if k not in ("format", "columns", "kept")}
    data = own | {"eval": [{"path": str(rows), "format": "completion"}]}
    asked = dataclasses.replace(asked, sections=asked.sections | {"data": data})
    resolved, split = resolve(asked, outputs), sets_of(asked)["eval"]
    pair = _pair(resolved, adapter, None)
    examples, _ = made(split, pair.tokenizer, resolved)
    counts = _counts(examples)
    model, context = pair.side("trained")
    with context, torch.no_grad():
        return interval.per_unit([_asked(model, *example, [])[0] for example in examples], counts)


def recipe(run: RunFolder, name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe that the run was trained with, and what of it is asked otherwise."""
    run.outcome()
    file = run.path / "recipe.yaml"
    if not file.is_file():
        instead = cli.command("eval", RECIPE="that_run", ADAPTER="folder")
        do = f"a combination is asked on the data of a run: {instead}"
        raise RecipeError(Problem(shown(file), "is not there: there is no data to ask on", do))
    for text in overrides:
        if not text.startswith(("data.eval=", "data.kept=", "probes.")):
            do = "an evaluation takes data.eval=, data.kept= and probes.; the rest is what was trained"
            raise RecipeError(Problem(f"override {text!r}", "would change nothing", do))
    return dataclasses.replace(recipes.load(str(file), overrides), name=name)


def sets_of(asked: Recipe) -> dict[str, read.Split]:
    """The rows of data.eval and data.kept, as far as the recipe names them; kept ones must not have been
    trained on.
    """
    sets = {which: read.read(asked, which) for which in SETS if getattr(asked.data, which)}
    if not (sets or asked.probes.given):
        do = (
            f"name held-out rows, e.g. {cli.command(SET='data.eval=data/x/eval.jsonl')}, or rows that should"
            f" be kept: {cli.command(SET='data.kept=...')}"
        )
        raise RecipeError(
            Problem(
                asked.at("data"), "there is nothing to evaluate on: no data.eval, data.kept or probes", do
            )
        )
    trained = (row for _, row in read.Reader(asked, "train"))  # whose faults stopped the training
    if "kept" in sets and (seen := read.in_both(trained, sets["kept"].rows)):
        found = f"{len(seen)} of its rows were trained on, first {seen[0].where}"
        raise RecipeError(
            Problem(
                asked.at("data", "kept"), found, "what is forgotten shows on rows that the training never saw"
            )
        )
    if asked.data.rows == "assistant_turn":
        sets = {which: read.by_assistant_turn(split) for which, split in sets.items()}
    return sets


def _pair(resolved: Resolved, result: Path, base: Path | None, other: Path | None = None) -> Pair:
    """Load both models; the adapter's tensors, base and weights are checked first. `other`: the folder of an
    adapter that is asked in place of the base.
    """
    asked, weights = resolved.recipe, resolved.base.weights
    if not result.is_dir():
        raise RecipeError(
            Problem(
                shown(result),
                "is gone: run.json says that it was trained",
                cli.command("train", RECIPE=asked.name, FORCE=True),
            )
        )
    facts: dict[str, Any] = {"result": shown(result)}
    if locate.is_model(result):
        source = base or locate.local(weights, resolved.base.revision)
        if source is None or not (source / "config.json").is_file():
            found = f"its base {source or weights} is not on this machine"
            raise RecipeError(Problem(shown(result), found, f"give its folder: {cli.command(BASE='path')}"))
        tokenizer = attach.tokenizer(result, source)
        untrained = _grown(attach.base(source, None), tokenizer, asked)
        whole = attach.base(result, None)
        return Pair(tokenizer, whole, result, None, untrained, facts | {"base": str(source)})
    adapter, known = adapters.read(result, anything=True), provenance.read(result)
    source = locate.base_of({asked.name: adapter}, base)
    raise_if(base_fit.fit(adapter, source, known))
    facts |= {
        "base": str(source),
        "adapter_sha256": files.sha256(adapter.file),
        "quantize": known.quantize if known else None,
    }
    tokenizer = attach.tokenizer(result, source)
    untrained = _grown(attach.base(source, known), tokenizer, asked)
    text, beside = known.stop_text if known else None, {}
    if other:
        beside = {"other": adapters.read(other, anything=True)}
        raise_if(base_fit.fit(beside["other"], source, provenance.read(other)))
    attached = attach.attach(untrained, {"default": adapter, **beside})
    return Pair(tokenizer, attached, result, text, against=next(iter(beside), None), facts=facts)


def _grown(base: Any, tokenizer: Any, asked: Recipe) -> Any:
    """The base with its new tokens as training began with them; it has no others."""
    if new := new_tokens.ids(tokenizer, asked, 0):
        embeddings.grow(base, new)
        embeddings.begin(base, new, asked.train.seed)
    return base


Examples = list[tuple[list[int], list[int]]]  # tokens and labels of each row


def made(split: read.Split, tokenizer: Any, resolved: Resolved) -> tuple[Examples, list[list[Identifier]]]:
    """The rows as training would make them, and the identifiers in each."""
    asked = resolved.recipe
    done = render.examples(split.rows, tokenizer, asked)
    done = stops.closed(split.rows, done, stops.next_turn(tokenizer, resolved))
    names = [identifiers.found(e, tokenizer, render.kept_range(e, asked)) for e in done]
    return [render.truncated(example, asked) for example in done], names


def _counts(examples: Examples) -> list[int]:
    """Tokens of each row that are in the loss. RecipeError where none is."""
    counts = [sum(label != IGNORED for label in labels[1:]) for _, labels in examples]
    if not sum(counts):
        raise RecipeError(
            Problem("data", "no token of these rows is in the loss", "look at train.max_length and the rows")
        )
    return counts


def _losses(pair: Pair, examples: Examples, names: list[list[Identifier]], sha256: str) -> SetLosses:
    """Mean loss (nats a trained token) and perplexity of both sides, and which of the `names` in each row
    they predict; one row at a time, so that no padding has a say.
    """
    counts = _counts(examples)
    sums, hits = {}, {}
    for side in SIDES:
        model, context = pair.side(side)
        with context, torch.no_grad():
            asked = [_asked(model, *example, of) for example, of in zip(examples, names, strict=True)]
        sums[side], hits[side] = [nats for nats, _ in asked], [predicted for _, predicted in asked]
    means = {side: interval.per_unit(rows, counts) for side, rows in sums.items()}
    found = {
        side: Loss(loss=mean.value, perplexity=math.exp(min(mean.value, 700.0)), half=mean.half)
        for side, mean in means.items()
    }
    changes = [after - before for before, after in zip(*(sums[side] for side in SIDES), strict=True)]
    return SetLosses(
        rows=len(examples),
        sha256=sha256,
        tokens=sum(counts),
        **found,
        half=interval.per_unit(changes, counts).half,
        identifiers=identifiers.accuracy(names, *(hits[side] for side in SIDES)),
    )


def _asked(
    model: Any, ids: list[int], labels: list[int], names: list[Identifier]
) -> tuple[float, list[bool]]:
    """The summed loss of one row, in nats, and of each of `names` whether all its tokens are the likeliest.
    Each token is predicted from those before it; the first has none.
    """
    device = model.device
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[
        0, -len(ids) : -1
    ]  # after virtual tokens
    wanted = torch.tensor(labels[1:], device=device)
    nats = torch.nn.functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum")
    hit = (logits.argmax(-1) == wanted).tolist() if names else []
    return float(nats), [all(hit[name.start - 1 : name.end - 1]) for name in names]


def _generations(pair: Pair, asked: Recipe, split: read.Split | None) -> list[Generation]:
    """The greedy continuations of both sides: of eval rows as a server renders them; of the probes where the
    rows have no prompt.
    """
    rows = [row for row in (split.rows if split else []) if row.conversational or row.history][:PROMPTS]
    served = [answers.served(row, pair.tokenizer, asked) for row in rows if row.conversational]
    prompts = [said[2] for said in served if said]
    texts: list[Any] = [row.history for row in rows if not row.conversational]
    if not rows:
        asked_for = (asked.probes.change, asked.probes.keep)
        texts = [probe["prompt"] for kind in asked_for for probe in kind[:PROMPTS]]
    prompts += [list(pair.tokenizer(text)["input_ids"]) for text in texts]
    ends = attach.stops(pair.result, pair.tokenizer, pair.trained)
    written: list[dict[str, Any]] = [{"prompt": pair.tokenizer.decode(ids)} for ids in prompts]
    for side in SIDES:
        model, context = pair.side(side)
        with context:
            for ids, entry in zip(prompts, written, strict=True):
                entry[side], ended = answers.greedy(model, pair.tokenizer, ids, LONGEST, ends, pair.stop_text)
                entry[f"{side}_ended"] = ended is not None
    return [Generation(**entry) for entry in written]


def _notes(folder: RunFolder, losses: dict[str, SetLosses]) -> list[str]:
    run, held_out = folder.run, losses.get("eval")
    if held_out and (run is None or run.plan.data.eval.sha256 != held_out.sha256):
        return ["the eval rows are not those that the training run evaluated"]
    return []


def _said(entry: Generation, side: str) -> str:
    cut = f" [no end within {LONGEST} tokens]" if getattr(entry, f"{side}_ended") is False else ""
    return f"{getattr(entry, side)}{cut}"


def report(found: Evaluation) -> str:
    """The evaluation for a person: a table of losses, the probes, and the generations side by side."""
    lines = [f"base {found.base}, trained {found.result}"]
    if found.sets:
        head = ("rows", "tokens", "base", "trained", "change", "base", "trained")
        lines += ["", f"{'':<10} {'':>6} {'':>8}  {'loss, nats a token':^38}  {'perplexity':^19}".rstrip()]
        lines += ["{:<10} {:>6} {:>8}  {:>8} {:>8} {:>20}  {:>9} {:>9}".format("", *head)]
    for which, row in found.sets.items():
        base, trained = row.base, row.trained
        change = interval.Mean(trained.loss - base.loss, row.half, row.rows)
        numbers = f"{base.loss:>8.4f} {trained.loss:>8.4f} {change.signed(unit='row'):>20}"
        perplexities = f"{base.perplexity:>9.4g} {trained.perplexity:>9.4g}"
        none = "" if change.shown or row.half is None else "  no difference shown"
        lines.append(f"{SETS[which]:<10} {row.rows:>6,} {row.tokens:>8,}  {numbers}  {perplexities}{none}")
    if any(row.half is not None for row in found.sets.values()):
        lines.append("change with its 95 % interval over the rows, each asked of both")
    if table := identifiers.table({which: row.identifiers for which, row in found.sets.items()}, SETS):
        lines += ["", *table]
    if table := probes.table(found.probes.base, found.probes.trained):
        lines += ["", *table]
    for entry in found.generations:
        lines += ["", f"> {entry.prompt.strip()}", *(f"{side:>9}  {_said(entry, side)}" for side in SIDES)]
    return "\n".join([*lines, *(f"NOTE        {note}" for note in found.notes)])
