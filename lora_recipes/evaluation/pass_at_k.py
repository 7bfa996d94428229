"""Does one of k samples pass its test? `make passk RECIPE=x` asks base and adapter on a running server for
code, runs it in the sandbox, and says pass@k with its interval and what the adapter changed.

The figures stand in run.json, every sample with its verdict in outputs/<name>/pass_at_k/. Imports no torch.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, files, interval, lock, record
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.record import PassAtK, Passed, Share
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate.teacher import Refused, Request
from lora_recipes.curate.work import progress
from lora_recipes.evaluation import generate, sandbox, tasks
from lora_recipes.evaluation.sandbox import Limits, Sandbox, Unusable
from lora_recipes.evaluation.tasks import Task, Tasks
from lora_recipes.recipe.recipe import Recipe

CHAT = "Complete this Python code. Answer with all of it in one block of code.\n\n```python\n{prompt}\n```"
FOLDER, REPORT = "pass_at_k", "report.json"  # each of its tasks: human-eval.report.json
VERDICTS = ("passed", "failed", "error", "not_loaded", "ended", "time", "memory", "no_answer")
MANY = 10  # tasks that a note names


@dataclass(frozen=True)
class Sample:
    """One sample of a task: its code, the verdict (VERDICTS) with its words, and the seconds it took."""

    model: str
    task_id: str
    verdict: str
    said: str
    seconds: float
    cut: bool
    code: str


def estimate(n: int, c: int, k: int) -> float:
    """pass@k without bias, of `n` samples of which `c` passed: 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv
    2107.03374, 2.1).
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def passk(recipe: Recipe, outputs: Path, url: str, names: Sequence[str], unsafe: bool) -> str:
    """Ask the models `names` of the server at `url` (by default its base and the recipe's adapter), judge,
    and report. `unsafe`: run the code also where no sandbox holds.
    """
    asked, read, box = _begun(recipe, unsafe)
    models = generate.served(url, names, recipe.name)
    run = RunFolder(outputs / recipe.name)
    run.path.mkdir(parents=True, exist_ok=True)
    with lock.runs([], "asks for pass@k", run.path):
        samples: dict[str, list[Sample]] = {}
        for model in models:
            requests = [r for task in read.tasks for r in _requests(task, recipe, model.name)]
            answers = generate.answers(url, model, requests, run.path / FOLDER)
            each = [task for task in read.tasks for _ in range(asked.n)]
            samples[model.name] = judged(
                box,
                model.name,
                [
                    (task, "", answer.reason, False)
                    if isinstance(answer, Refused)
                    else (
                        task,
                        task.program(answer.text, asked.form == "chat"),
                        "",
                        answer.finish == "length",
                    )
                    for task, answer in zip(each, answers, strict=True)
                ],
            )
        found = PassAtK(
            at=files.now(),
            tasks=read.source,
            sha256=read.sha256,
            task_ids=[task.task_id for task in read.tasks],
            evaluate={f.name: getattr(asked, f.name) for f in fields(asked) if f.name != "given"},
            sandbox=box.level,
            models=_figures(samples, {m.name: m.root for m in models}, asked.n, asked.k),
        )
        notes = _notes(samples)
        report = run.path / FOLDER / f"{Path(read.source).stem}.{REPORT}"
        said = record.plain(found) | {"samples": [asdict(s) for each in samples.values() for s in each]}
        files.write(report, json.dumps(said, indent=1) + "\n")
        if (known := run.record) is None:
            notes.append(f"{shown(run.path)} has no run.json: the figures stand in the report alone")
        else:
            run.write_record(replace(known, pass_at_k=(known.pass_at_k or {}) | {found.tasks: found}))
    return text(found, read, box, [*notes, f"every sample with its verdict: {shown(report)}"])


def canonical(recipe: Recipe, unsafe: bool) -> tuple[str, bool]:
    """Judge the tasks' own solutions, to see that tests and sandbox are as they should be. The text, and
    whether all passed.
    """
    _, read, box = _begun(recipe, unsafe)
    have = [task for task in read.tasks if task.canonical_solution is not None]
    if not have:
        found = "no task has a canonical_solution"
        raise RecipeError(Problem(recipe.at("evaluate", "tasks"), found, "add them to the tasks"))
    samples = judged(
        box, "canonical", [(t, t.prompt + (t.canonical_solution or ""), "", False) for t in have]
    )
    failing = [s for s in samples if s.verdict != "passed"]
    seconds = sum(s.seconds for s in samples)
    lines = [f"{len(samples) - len(failing)} of {len(samples)} canonical solutions of {read.source} pass"]
    lines += [f"sandbox     {_locked(box)}; {seconds:.0f} s for the samples"]
    return "\n".join([*lines, *(f"{s.task_id}: {s.verdict}: {_plain(s.said)}" for s in failing)]), not failing


def judged(box: Sandbox, model: str, programs: list[tuple[Task, str, str, bool]]) -> list[Sample]:
    """The verdict of each program: its task, its code, why there is none, and whether it was cut off."""
    distinct = {(task.task_id, code): task for task, code, none, _ in programs if not none}
    workers = max(1, min(4, (os.cpu_count() or 2) // 2))
    found: dict[tuple[str, str], sandbox.Verdict] = {}
    executor = ThreadPoolExecutor(workers)
    try:
        verdicts = executor.map(
            lambda key: box.judge(
                key[1], distinct[key].entry_point, distinct[key].test, distinct[key].helpers
            ),
            distinct,
        )
        for key, verdict in zip(distinct, verdicts, strict=True):
            found[key] = verdict
            progress(f"judge {model}", len(found), len(distinct), len(found) == len(distinct), "samples")
    except Unusable as error:
        do = "the answers are kept; the same command goes on with them"
        raise RecipeError(Problem(f"sandbox ({box.level})", str(error), do)) from None
    finally:
        executor.shutdown(cancel_futures=True)
    samples = []
    for task, code, none, cut in programs:
        of = found.get((task.task_id, code))
        said = (of.verdict, of.said, of.seconds) if of and not none else ("no_answer", none, 0.0)
        samples.append(Sample(model, task.task_id, *said, cut, code))
    return samples


def _begun(recipe: Recipe, unsafe: bool) -> tuple[Any, Tasks, Sandbox]:
    asked = recipe.evaluate
    if recipe.classify:
        do = f"of a classifier: {cli.command('eval', RECIPE=recipe.name)}"
        raise RecipeError(Problem(recipe.at("task"), "a classifier writes no code", do))
    where = recipe.at("evaluate", "tasks")
    read = tasks.read(asked.tasks, recipe.file(asked.tasks), where, asked.limit)
    return asked, read, sandbox.find(Limits(seconds=asked.timeout), unsafe)


def _requests(task: Task, recipe: Recipe, model: str) -> list[Request]:
    """The n requests of a task, each with a seed of its own."""
    asked = recipe.evaluate
    same: dict[str, Any] = {
        "model": model,
        "max_tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
    }
    messages, prompt = [], None
    if asked.form == "chat":
        messages = [{"role": "user", "content": CHAT.format(prompt=task.begun)}]
        if recipe.data.chat_template_kwargs:
            same["chat_template_kwargs"] = recipe.data.chat_template_kwargs
    else:
        prompt = task.begun
        same["stop"] = list(tasks.STOPS[:4])  # servers take no more; the answer is cut at the others here
    return [Request(messages, same | {"seed": asked.seed + i}, prompt) for i in range(asked.n)]


def _figures(
    samples: dict[str, list[Sample]], roots: dict[str, str], n: int, ks: list[int]
) -> dict[str, Passed]:
    solved = {name: _solved(each) for name, each in samples.items()}
    first = next(iter(solved.values()))
    made = {}
    for name, each in samples.items():
        shares = {}
        for k in ks:
            total = math.fsum(estimate(n, c, k) for c in solved[name].values())
            low, high = interval.share(total, len(first))
            shares[str(k)] = Share(value=total / len(first), low=low, high=high)
        counted = Counter(s.verdict for s in each)
        better = sum(bool(solved[name][t]) > bool(first[t]) for t in first)
        worse = sum(bool(solved[name][t]) < bool(first[t]) for t in first)
        compared = {"better": better, "worse": worse, "p": interval.mcnemar(better, worse)}
        made[name] = Passed(
            root=roots[name],
            pass_at_k=shares,
            verdicts={v: counted[v] for v in VERDICTS if counted[v]},
            cut=sum(s.cut for s in each),
            **(compared if solved[name] is not first else {}),  # type: ignore[arg-type]
        )
    return made


def _solved(samples: list[Sample]) -> dict[str, int]:
    """Of each task how many of its samples passed."""
    found: dict[str, int] = {}
    for sample in samples:
        found[sample.task_id] = found.get(sample.task_id, 0) + (sample.verdict == "passed")
    return found


def _notes(samples: dict[str, list[Sample]]) -> list[str]:
    notes = []
    for name, each in samples.items():
        for verdict, told in (("time", "ended by time"), ("no_answer", "without an answer of the server")):
            of = [s for s in each if s.verdict == verdict]
            if of:
                ids = list(dict.fromkeys(s.task_id for s in of))
                more = f" and {len(ids) - MANY} more" if len(ids) > MANY else ""
                why = f" ({_plain(of[0].said)})"
                notes.append(f"{name}: {len(of)} {told}{why}, not passed: {', '.join(ids[:MANY])}{more}")
    return notes


def _plain(text: str) -> str:
    """What generated code says, for a terminal: in one line, without what a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in text)


def _locked(box: Sandbox) -> str:
    limits = f"{box.limits.seconds} s of processor time and {box.limits.memory >> 20:,} MiB a sample"
    return f"{'NONE: the code saw all that you see' if box.level == 'none' else box.level}; {limits}"


def text(found: PassAtK, read: Tasks, box: Sandbox, notes: list[str]) -> str:
    """The figures for a person."""
    asked = found.evaluate
    how = (
        f"temperature {asked['temperature']:g}, top_p {asked['top_p']:g}"
        if asked["temperature"]
        else "greedy"
    )
    count = f"{len(found.task_ids)} of {read.whole}"
    width = max(10, *map(len, found.models))
    verdicts = [v for v in VERDICTS if any(v in model.verdicts for model in found.models.values())]
    ks = list(next(iter(found.models.values())).pass_at_k)
    lines = [
        f"tasks       {found.tasks}, {count}; n {asked['n']}, {how}, {asked['form']}, at most"
        f" {asked['max_new_tokens']:,} tokens",
        f"sandbox     {_locked(box)}",
        "",
        f"{'':{width}}" + "".join(f"{f'pass@{k}':>9}{'95 % interval':>18}" for k in ks) + "  samples",
    ]
    for name, model in found.models.items():
        shares = "".join(
            f"{s.value:>9.1%}{f'{s.low:.1%} to {s.high:.1%}':>18}" for s in model.pass_at_k.values()
        )
        said = ", ".join(f"{model.verdicts.get(v, 0)} {v.replace('_', ' ')}" for v in verdicts)
        cut = f"; {model.cut} cut off" if model.cut else ""
        lines.append(f"{name:<{width}}{shares}  {said}{cut}")
    first = next(iter(found.models))
    for name, model in found.models.items():
        if model.p is not None:
            none = "" if model.p < 0.05 else ": no difference shown"
            lines += ["", f"{name} against {first}: {model.better} tasks better, {model.worse} worse, p"]
            lines[-1] += f" {model.p:.2g} (exact test of McNemar on the same tasks){none}"
    return "\n".join([*lines, *(f"NOTE        {note}" for note in notes)])
