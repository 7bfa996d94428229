"""The arms of an ablation before the first is trained: each with its plan and its memory; how many runs go at
once.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lora_recipes.ablation.reuse import Kept, group
from lora_recipes.ablation.spec import Ablation, Run
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.memory import kept, memory
from lora_recipes.memory.fits import GIB, RESERVED_WORST, Memory, gib
from lora_recipes.planning import plan
from lora_recipes.planning.plan import Plan
from lora_recipes.recipe.base import Resolved, resolve


def resolved(runs: Sequence[Run], outputs: Path) -> dict[str, Resolved]:
    """Each arm's recipe with what it names; the runs of an arm differ in their seed alone."""
    first = {run.arm: run.recipe for run in reversed(runs)}
    return {arm: resolve(first[arm], outputs) for arm in dict.fromkeys(run.arm for run in runs)}


def planned(arms: Mapping[str, Resolved], network: bool, cuda: bool) -> dict[str, tuple[Plan, Memory]]:
    """The plan of each of `arms`, and its predicted peak on a GPU (`cuda`) or this CPU. RecipeError: what is
    wrong with any.
    """
    plans: dict[str, Plan] = {}
    problems: list[Problem] = []
    read: dict[str, Kept] = {}
    for arm, resolved in arms.items():
        try:
            rows = read.setdefault(group(resolved.recipe), Kept()).rows
            plans[arm] = plan.make(resolved, network=network, rows=rows)
        except RecipeError as error:
            problems += [Problem(f"arm {arm}: {p.where}", p.found, p.do) for p in error.problems]
    raise_if(problems)
    setups = {arm: memory.of_recipe(arms[arm], made.gate, cuda) for arm, made in plans.items()}
    keys = {arm: kept.key(setup) for arm, setup in setups.items()}
    distinct = {key: setups[arm] for arm, key in keys.items()}  # arms of the same shapes share a rehearsal
    with memory.Rehearsals(list(distinct.values()), memory.SECONDS) as rehearsals:
        peaks = {key: rehearsals[number] for number, key in enumerate(distinct)}
    for arm, made in plans.items():
        plan.add_memory(made, arms[arm], cuda, peaks[keys[arm]])
    return {arm: (made, peaks[keys[arm]]) for arm, made in plans.items()}


def table(ablation: Ablation, plans: dict[str, tuple[Plan, Memory]], cuda: bool) -> Iterator[str]:
    """What would be trained, an arm a line, and what it costs."""
    width = max(map(len, [*plans, "arm"]))
    peak = f"peak {'GPU' if cuda else 'CPU'}"
    yield (
        f"{'arm':<{width}}  {'trainable':>12}  {'adapter':>12}  {'max rank':>8}  {'steps':>7}  {peak:>12} "
        " overrides"
    )
    total = 0
    for arm in (arm for arm in ablation.arms if arm.name in plans):
        made, found = plans[arm.name]
        facts, adapter = made.facts, made.facts.adapter
        steps = facts.steps.total if facts.steps else None
        total += steps or 0
        size = ">=" * bool(found.unknown) + f"{gib(found.peak_bytes)} GiB"
        cells = (
            f"{facts.model.trainable:>12,}  {adapter.bytes if adapter else 0:>10,} B "
            f" {(adapter and adapter.max_lora_rank) or '-':>8}"
        )
        yield (
            f"{arm.name:<{width}}  {cells}  {steps or '?':>7}  {size:>12} "
            f" {' '.join(arm.overrides) or 'the recipe as it is'}"
        )
    if unknown := {found.unknown for _, found in plans.values() if found.unknown}:
        yield f">= the peak is not known, at least this is held: {listed(sorted(unknown), 3)}"
    said: dict[str, list[str]] = {}
    for name, (made, _) in plans.items():
        for warning in made.warnings:
            said.setdefault(warning, []).append(name)
    for warning, arms in said.items():
        yield f"WARNING     {'all arms' if len(arms) == len(plans) else listed(arms, 4)}: {warning}"
    seeds = f"{len(ablation.seeds)} seed{'s' * (len(ablation.seeds) > 1)}"
    runs = len(plans) * len(ablation.seeds)
    yield f"\ncost        {len(plans)} arms x {seeds} = {runs} runs, {total * len(ablation.seeds):,} steps"


def gpus() -> list[tuple[str, int]]:
    """CUDA_VISIBLE_DEVICES of each GPU, and its free bytes; empty without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = visible if visible != [""] else [str(number) for number in range(count)]
    return [(names[number], torch.cuda.mem_get_info(number)[0]) for number in range(count)]


def devices(
    jobs: int | None, memories: Sequence[Memory], cards: Sequence[tuple[str, int]], free: int, own: int
) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each process (None on a CPU), as many as the planned memory allows, in turn
    over the GPUs; at least one.

    `jobs`: how many were asked for (default: one for each GPU, or one). `cards`: gpus(). `free`: bytes of
    this machine's memory; `own`: those of a process that has the libraries and no model. Counted with the
    largest arm, the worst reserve that was seen on a GPU, and the base that a process keeps beside the one it
    trains.
    """
    peak, base = max(m.peak_bytes for m in memories), max(m.parts["base"] for m in memories)
    on_gpu, on_host = (
        max(m.process_bytes(RESERVED_WORST) for m in memories),
        own + base + (0 if cards else peak),
    )
    wanted = jobs or max(len(cards), 1)
    rooms = [max(room // on_gpu, 0) for _, room in cards]
    found: list[str | None] = [
        name
        for turn in range(max(rooms, default=0))
        for (name, _), n in zip(cards, rooms, strict=True)
        if turn < n
    ]
    allowed = min(len(found), free // on_host) if cards else free // on_host
    if wanted > allowed:
        where = (
            f"{gib(on_gpu)} GiB of {', '.join(gib(room) for _, room in cards)} GiB free on the GPUs, and "
            if cards
            else ""
        )
        says = f"a run takes up to {where}{gib(on_host)} of {free / GIB:.1f} GiB free here"
        print(f"WARNING     memory allows {max(allowed, 0)} at once, not {wanted}: {says}", flush=True)
        wanted = max(allowed, 1)
    return (found or [cards[0][0] if cards else None] * wanted)[:wanted]
