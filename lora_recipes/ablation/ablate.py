"""Run an ablation: every arm planned first, then trained, a few in one process; what is finished stays. `make
ablate ABLATION=x`.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState

from lora_recipes.ablation import arms, cluster, report, workers
from lora_recipes.ablation.reuse import Kept, group
from lora_recipes.ablation.spec import FILE, Ablation, Run
from lora_recipes.core import cli
from lora_recipes.core.checkpoints import newest_whole
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.files import write
from lora_recipes.core.run_folder import make_folder
from lora_recipes.core.yamlfile import shown
from lora_recipes.memory.fits import CARDS, NOT, Memory, gib
from lora_recipes.planning.plan import Plan
from lora_recipes.recipe.base import Resolved
from lora_recipes.training import train
from lora_recipes.training.resume import differences


def ablate(
    ablation: Ablation,
    outputs: Path,
    jobs: int | None = None,
    only: Sequence[str] = (),
    dry: bool = False,
    force: bool = False,
) -> int:
    """Plan every arm, train what is not finished, write the report; the number of runs that failed.

    `jobs`: processes at once (default: one for each GPU, or one), fewer where memory does not allow as many.
    `only`: names of arms, or arm/s1, and then no report. `dry`: the plan alone, for a GPU. `force`: finished
    runs too. RecipeError before the first run when any arm cannot be trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            Problem(
                "ablate",
                "it starts its own processes",
                f"run it without accelerate launch: {cli.command(JOBS='2')} for two at once",
            )
        )
    outputs, runs, cuda = outputs.absolute(), _chosen(ablation, only), dry or torch.cuda.is_available()
    make_folder(outputs)
    found = arms.resolved(runs, outputs)
    _head(ablation)
    plans = arms.planned(found, not dry, cuda)
    print("\n".join(arms.table(ablation, plans, cuda)), flush=True)
    if dry:
        return 0
    if _prepare(ablation, found, outputs):
        plans = arms.planned(found, True, cuda)  # with the tokenizer that is beside the base now
    todo = list(_todo(runs, plans, found, force))
    if todo:
        print(f"each says what it does in {shown(ablation.folder(outputs))}/ARM/sSEED.log\n", flush=True)
    own, free, memories = (
        psutil.Process().memory_info().rss,
        psutil.virtual_memory().available,
        [found for _, found in plans.values()],
    )
    devices = arms.devices(jobs, memories, arms.gpus(), free, own)
    failed, done = [], workers.each(todo, lambda run: group(run.recipe), Kept, outputs, devices)
    for number, outcome in enumerate(done, 1):
        print(f"[{number}/{len(todo)}] {outcome.name}: {outcome.said}", flush=True)
        failed += [outcome.name] if outcome.failed else []
    if not only:
        print("\n" + report.write(ablation.folder(outputs)), flush=True)
    if failed:
        print(f"\n{len(failed)} of {len(todo)} runs failed: {listed(failed)}", file=sys.stderr)
    return len(failed)


def spread(
    ablation: Ablation, outputs: Path, engine: str, command: Sequence[str], only: Sequence[str] = ()
) -> str:
    """Plan every arm for a GPU and write the files that train them on a cluster (cluster.generate); what to
    do with them.
    """
    outputs, runs = outputs.absolute(), _chosen(ablation, only)
    _head(ablation)
    plans = arms.planned(arms.resolved(runs, outputs), False, cuda=True)
    print("\n".join(arms.table(ablation, plans, cuda=True)), flush=True)
    most = max((found for _, found in plans.values()), key=lambda found: found.peak_bytes)
    card = next(
        (f"{card} GB {most.verdict(card)}" for card in CARDS if most.verdict(card) != NOT),
        f"no card up to {CARDS[-1]} GB",
    )
    least = "at least " * any(found.unknown for _, found in plans.values())
    peak = f"planned peak {least}{gib(most.peak_bytes)} GiB of a GPU: {card}"
    return cluster.generate(engine, ablation, runs, command, outputs, peak)


def _head(ablation: Ablation) -> None:
    """Said first: planning the arms of a real model takes a minute."""
    print(f"ablation    {ablation.name}: {ablation.question}\nrecipe      {ablation.recipe}\n", flush=True)


def _chosen(ablation: Ablation, only: Sequence[str]) -> list[Run]:
    """The runs that `only` names; all without it."""
    runs = ablation.runs()
    known = {name for run in runs for name in (run.arm, str(run))}
    unknown = [name for name in only if name not in known]
    raise_if(
        [
            Problem(cli.command(ONLY=name), "no such arm or run", f"did you mean {nearest(name, known)}?")
            for name in unknown
        ]
    )
    return [run for run in runs if not only or {run.arm, str(run)} & set(only)]


def _prepare(ablation: Ablation, found: Mapping[str, Resolved], outputs: Path) -> bool:
    """Write ablation.json, and make or check the bases once before any arm; was any made?

    One command at a time: the jobs of a cluster share one file system, and each would train the base.
    """
    PartialState(cpu=not torch.cuda.is_available())
    bases = {resolved.base.weights: resolved for resolved in found.values()}
    text = json.dumps(ablation.resolved(), indent=1, ensure_ascii=False) + "\n"
    with (outputs / ".bases.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = [path for path, one in bases.items() if one.recipe.model.name_or_path is None]
        missing = any(not Path(path).is_dir() for path in made)
        for one in bases.values():
            train.prepare_base(one)
        file = ablation.folder(outputs) / FILE
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write(file, text)
    return missing


def _todo(
    runs: Sequence[Run], plans: dict[str, tuple[Plan, Memory]], found: Mapping[str, Resolved], force: bool
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """What is still to be trained, and how: `resume` from a checkpoint, or `force` in place of what no longer
    holds.
    """
    finished = 0
    for run in runs:
        resolved = found[run.arm].by(run.recipe)
        folder = resolved.folder
        how, why = ("anew", cli.command(FORCE=True)) if force else state(resolved, plans[run.arm][0])
        finished += how == "finished"
        if why:
            print(f"{how:<12}{run}: {why}")
        if how != "finished":
            forced = how == "anew" and folder.path.exists()
            yield run, {"resume": how == "continues", "force": forced, "memory": plans[run.arm][1]}
    print(
        f"to do       {len(runs) - finished} of {len(runs)} runs; {finished} are finished and stay",
        flush=True,
    )


def state(resolved: Resolved, made: Plan) -> tuple[str, str]:
    """`finished`, `continues`, `anew` or `new`, and why: what is in the run's folder against what would be
    trained now.
    """
    folder = resolved.folder
    try:
        done = folder.run
        if done is None:
            return "new", ""
        facts = train.resume_facts(made, resolved, resolved.base.real_config(), done)
        changed = differences(folder, resolved.recipe, vars(facts))
        before, now = done.plan.data.eval.sha256, made.facts.data.eval.sha256
        changed += ["eval data: other rows than it was evaluated on"] if before != now else []
        if changed:
            return "anew", f"{changed[0]}" + (f", and {len(changed) - 1} more" if len(changed) > 1 else "")
        if folder.finished and resolved.result.is_dir():
            return "finished", ""
        checkpoint, _ = newest_whole(folder.checkpoints)
    except RecipeError as error:  # not as any run leaves it
        return "anew", f"cannot be read: {str(error).splitlines()[0]}"
    ended = done.error or "it was cut off"
    return (
        ("continues", f"from {checkpoint.name} ({ended})")
        if checkpoint
        else ("anew", f"no whole checkpoint ({ended})")
    )
