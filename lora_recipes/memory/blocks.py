"""A deep model from a few of its blocks: which blocks are alike, which few are run, and what their peaks say
of the whole.

The kind of a block is asked of the model that transformers built, never of its config: DeepSeek-V3's three
dense blocks, Jamba's pattern, a sliding window, an adapter on some blocks only all show on the modules.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_recipes.memory.storages import Peak, Stretch

LAYERED = ("forward", "backward", "evaluation")  # the stretches of a step that each block has
Parts = dict[str, int]  # bytes


def stack(model: PreTrainedModel) -> nn.ModuleList | None:
    """The blocks of a text model: its list of as many modules as its config has layers; of several the one
    with the most parameters. None where it has none.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)


def kinds(model: PreTrainedModel, blocks: nn.ModuleList, opened: bool = False) -> list[int]:
    """A number for each block: those with the same one have the same modules, shapes, settings and trained
    parameters, and agree in whether a gradient passes below them. The first is like none: often its input
    needs no gradient. `opened`: was enable_input_require_grads called?
    """
    settings = _settings(blocks, _lists(model, len(blocks)))
    below = opened or any(p.requires_grad for p in model.get_input_embeddings().parameters())
    seen: dict[Hashable, int] = {}
    found = []
    for index, block in enumerate(blocks):
        shapes = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()]
        shapes += [(name, tuple(b.shape), b.dtype, False) for name, b in block.named_buffers()]
        kind = (index == 0, below, tuple(shapes), settings[index])
        found.append(seen.setdefault(kind, len(seen)))
        below = below or any(p.requires_grad for p in block.parameters())
    return found


def _settings(blocks: nn.ModuleList, lists: list[list[Any]]) -> list[Hashable]:
    """Of each block the classes of its modules and their plain attributes (a window, a flag), and its entry
    in each of `lists`; without those that only number the blocks.
    """
    rows: list[dict[Any, Any]] = []
    for index, block in enumerate(blocks):
        row: dict[Any, Any] = {("list", i): repr(values[index]) for i, values in enumerate(lists)}
        for path, module in block.named_modules():
            row[path] = type(module).__name__
            for name, value in vars(module).items():
                if isinstance(value, str | int | float | None):
                    row[path, name] = value
        rows.append(row)
    told: dict[Any, list[tuple[int, Any]]] = {}
    for index, row in enumerate(rows):
        for key, value in row.items():
            told.setdefault(key, []).append((index, value))
    numbering = {key for key, values in told.items() if _numbering(values)}
    return [tuple((k, v) for k, v in row.items() if k not in numbering) for row in rows]


def _numbering(told: list[tuple[int, Any]]) -> bool:
    """Do these values (block, value) only number the blocks: a number that grows with them, or another value
    in each of three or more?
    """
    values = [value for _, value in told]
    if all(type(value) is int for value in values) and len({value - i for i, value in told}) == 1:
        return True
    return len(values) > 2 and len(set(values)) == len(values)


def _lists(model: nn.Module, depth: int) -> list[list[Any]]:
    """What the model's configs and its modules above the blocks say of each block: their lists with an entry
    a block, such as layer_types.
    """
    return [getattr(owner, name) for owner, name in _listed(model, depth)]


def _listed(model: nn.Module, depth: int) -> list[tuple[Any, str]]:
    """(object, attribute) of those lists. An adapter's settings are no such list."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            owners |= {id(module): module, id(module.config): module.config}
            text = module.config.get_text_config()
            owners[id(text)] = text
    return [
        (owner, name)
        for owner in owners.values()
        for name, value in vars(owner).items()
        if isinstance(value, list | tuple) and len(value) == depth and not _numbers(value)
    ]


def _numbers(values: Sequence[Any]) -> bool:
    """Are they 0, 1, 2, ...?"""
    return list(values) == list(range(len(values)))


@contextmanager
def only(model: nn.Module, blocks: nn.ModuleList, chosen: Sequence[int]) -> Iterator[None]:
    """`model` with the `chosen` ones of its blocks alone, in that order, for a while; so are its lists with
    an entry a block.
    """
    depth, whole = len(blocks), dict(blocks._modules)
    with ExitStack() as undo:
        for owner, name in _listed(model, depth):
            value = getattr(owner, name)
            undo.callback(vars(owner).__setitem__, name, value)
            vars(owner)[name] = type(value)(value[i] for i in chosen)
        undo.callback(setattr, blocks, "_modules", whole)
        blocks._modules = {str(place): whole[str(i)] for place, i in enumerate(chosen)}
        yield


@dataclass(frozen=True)
class Few:
    """Which blocks are run. `runs[0]` has one block of each kind; each further run, by kind, one more of it,
    put before it.
    """

    kinds: list[int]
    first: list[int]
    more: dict[int, list[int]]

    @property
    def runs(self) -> list[list[int]]:
        """The blocks of each run."""
        return [self.first, *self.more.values()]


def few(kinds: list[int]) -> Few | None:
    """The few blocks that tell the whole; None where they are no fewer: then all are run."""
    depth, last = len(kinds), kinds[-1]
    members: dict[int, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    first = sorted(depth - 1 if kind == last else of[0] for kind, of in members.items())
    more = {}
    for kind, of in members.items():
        if len(of) > 1:
            place = next(i for i, index in enumerate(first) if kinds[index] == kind)
            more[kind] = [*first[:place], of[0] if kind == last else of[1], *first[place:]]
    ran = len(first) + sum(map(len, more.values()))
    return Few(kinds, first, more) if ran < depth else None


def counted(few: Few, first: int, more: dict[int, int]) -> int:
    """A number of the whole model from that of the first run and of those with one more of a kind."""
    counts = Counter(few.kinds)
    return first + sum((counts[kind] - 1) * (more[kind] - first) for kind in few.more)


def extended(
    few: Few, first: dict[Stretch, Peak], more: dict[int, dict[Stretch, Peak]]
) -> dict[Stretch, Parts]:
    """The peaks of the whole model, stretch by stretch and part by part.

    What lives in a stretch is what the block itself needs, and for each block before and after it an amount
    that depends on that block's kind alone: one more block of each kind shows it. LookupError where a stretch
    that is needed was not seen.
    """
    kinds, counts = few.kinds, Counter(few.kinds)
    layered = [name for name in LAYERED if any(n == name for n, _ in first)]
    found: dict[Stretch, Parts] = {}
    for stretch, peak in first.items():
        if stretch[0] not in layered or stretch[1] < 0:  # -1: the embedding's backward pass
            steps = [(counts[k] - 1, _minus(more[k][stretch].parts, peak.parts)) for k in few.more]
            found[stretch] = _plus(peak.parts, steps)
    for name in layered:
        seen = {i: peak for (n, i), peak in first.items() if n == name and i >= 0}
        shifts = {kind: _shifts(few, kind, name, seen, more[kind]) for kind in few.more}
        for index, kind in enumerate(kinds):
            chosen, peaks = _like(few, index, first, more)
            place = next(p for p, i in enumerate(chosen) if kinds[i] == kind)
            if (name, place) not in peaks:
                continue  # no gradient comes here
            steps = []
            for other, (before, after) in shifts.items():
                more_before = kinds[:index].count(other) - _count(few, chosen[:place], other)
                more_after = kinds[index + 1 :].count(other) - _count(few, chosen[place + 1 :], other)
                for number, shift in ((more_before, before), (more_after, after)):
                    if number and shift is None:
                        raise LookupError(f"no {name} stretch tells what a block of kind {other} adds")
                    steps += [(number, shift)] if number and shift is not None else []
            found[name, index] = _plus(peaks[name, place].parts, steps)
    return found


def _like(
    few: Few, index: int, first: dict[Stretch, Peak], more: dict[int, dict[Stretch, Peak]]
) -> tuple[list[int], dict[Stretch, Peak]]:
    """The run whose first block of its kind stands for block `index`. The last block, after which comes the
    final norm, stands for itself alone.
    """
    kind, depth = few.kinds[index], len(few.kinds)
    if kind == few.kinds[-1] and index < depth - 1:
        return few.more[kind], more[kind]
    return few.first, first


def _count(few: Few, chosen: Iterable[int], kind: int) -> int:
    return sum(few.kinds[i] == kind for i in chosen)


def _shifts(
    few: Few, kind: int, name: str, seen: dict[int, Peak], more: dict[Stretch, Peak]
) -> tuple[Parts | None, Parts | None]:
    """What one more block of `kind` adds to the stretches `name` of the blocks after it, and of those before
    it.
    """
    place = next(p for p, i in enumerate(few.first) if few.kinds[i] == kind)
    after = [p for p in sorted(seen) if p >= place and (name, p + 1) in more]
    before = [p for p in sorted(seen, reverse=True) if p < place and (name, p) in more]
    return (
        _minus(more[name, after[0] + 1].parts, seen[after[0]].parts) if after else None,
        _minus(more[name, before[0]].parts, seen[before[0]].parts) if before else None,
    )


def _minus(one: Parts, other: Parts) -> Parts:
    return {part: one.get(part, 0) - other.get(part, 0) for part in {*one, *other}}


def _plus(parts: Parts, steps: Iterable[tuple[int, Parts]]) -> Parts:
    made = dict(parts)
    for number, step in steps:
        for part, size in step.items():
            made[part] = made.get(part, 0) + number * size
    return made
