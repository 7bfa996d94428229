"""What an ablation found, from its run folders alone: report.md, report.html and report.json. Imports no
torch; `make ablate ABLATION=x REPORT=1`.
"""

import html
import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_recipes.ablation import figures
from lora_recipes.ablation.spec import FILE
from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.files import write as write_text
from lora_recipes.core.interval import Mean, mcnemar, mean, paired
from lora_recipes.core.record import FinishedRun
from lora_recipes.core.run_folder import RunFolder, logged
from lora_recipes.core.yamlfile import shown
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.training.resume import differences

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222;
background:#fff}
table{border-collapse:collapse;display:block;overflow-x:auto}
th,td{padding:.25rem .5rem;font-size:14px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}img{max-width:100%}.best{font-weight:600}
figure{margin:2rem 0}li,p{max-width:48rem}"""


@dataclass(frozen=True)
class Arm:
    """One arm with those of its runs that count, by seed: finished, and of the recipe that the ablation has
    now.
    """

    name: str
    overrides: list[str]
    sections: dict[str, Any]
    runs: dict[int, FinishedRun]
    logs: dict[int, list[dict[str, Any]]]
    missing: list[str] = field(default_factory=list)  # why each other seed does not count

    def over(self, value: Callable[[FinishedRun], float | None]) -> Mean | None:
        """Mean over the runs of what `value` takes from run.json; None where none has it."""
        found = [v for v in map(value, self.runs.values()) if v is not None]
        return mean(found) if found else None

    def losses(self, kind: str) -> dict[int, float]:
        """Seed -> `eval_loss` at the end, or `train_loss`: the last logged training loss, which is the mean
        of the last logging_steps steps; nats a token. Of a classifier `macro_f1` or `accuracy` of the
        held-out rows, or `class_loss`, as train_loss, nats a text. Without the seeds that have none.
        """
        if kind == "eval_loss":
            return {s: run.metrics[kind] for s, run in self.runs.items() if kind in run.metrics}
        if kind in ("macro_f1", "accuracy"):
            return {s: getattr(run.scores, kind) for s, run in self.runs.items() if run.scores}
        logged = {seed: [log["loss"] for log in logs if "loss" in log] for seed, logs in self.logs.items()}
        return {seed: losses[-1] for seed, losses in logged.items() if losses}

    def mean(self, kind: str) -> Mean | None:
        """The mean of these over the seeds."""
        return mean(list(found.values())) if (found := self.losses(kind)) else None

    def against(self, other: "Arm", kind: str) -> Mean | None:
        """This arm's loss minus that of `other`, seed by seed; None where no seed has both."""
        return paired(self.losses(kind), other.losses(kind))

    def answered(self, other: "Arm") -> tuple[int, int, int] | None:
        """Probes that have their answer first with more seeds than in `other`, with fewer, and all; of the
        seeds that both have. A probe is a pair, however many seeds asked it: seeds of one probe are not
        independent.
        """
        seeds = [seed for seed in self.runs if seed in other.runs]
        sides = [[[p.first for p in arm.runs[seed].probes.after] for seed in seeds] for arm in (self, other)]
        mine, theirs = ([sum(probe) for probe in zip(*side, strict=True)] for side in sides)
        if not mine or len(mine) != len(theirs):
            return None
        signs = [a - b for a, b in zip(mine, theirs, strict=True)]
        return sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs), len(signs)


def write(folder: Path) -> str:
    """Write report.md, report.html, report.json and their pictures into an ablation's `folder`; returns what
    a person reads at the end.
    """
    try:
        resolved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        arms = [_arm(folder, resolved, name) for name in resolved["arms"]]
    except FileNotFoundError:
        raise RecipeError(
            Problem(shown(folder), "no ablation was run here", cli.command("ablate", ABLATION="name"))
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        do = f"{cli.command('ablate')} writes it anew and keeps the finished runs"
        raise RecipeError(
            Problem(
                shown(folder / FILE), f"is not as an ablation leaves it: {type(error).__name__}: {error}", do
            )
        ) from None
    counted = [arm for arm in arms if arm.runs]
    kind = _kind(counted)
    counted = [arm for arm in counted if arm.mean(kind)]  # runs may be too short to log a loss
    table, said, notes = rows(arms, kind), verdict(counted, kind), list(remarks(arms, kind))
    pictures = figures.draw(folder, counted, kind) if counted else {}
    head = f"{resolved['name']}: {resolved['question']}"
    facts = f"Recipe {resolved['recipe']}, seeds {', '.join(map(str, resolved['seeds']))}."
    write_text(folder / "report.md", _markdown(head, facts, said, table, notes, pictures))
    write_text(
        folder / "report.html",
        _page(head, facts, said, table, notes, {folder / name: text for name, text in pictures.items()}),
    )
    write_text(
        folder / "report.json", json.dumps(_numbers(resolved, arms, kind, said, notes), indent=1) + "\n"
    )
    files = f"{shown(folder / 'report.html')}, report.md, report.json"
    return "\n".join([*_aligned(table), "", *said, *notes, f"\n{files}"])


def _kind(arms: list[Arm]) -> str:
    """What the arms are compared by: of held-out rows, where all have some."""
    if any(run.plan.head for arm in arms for run in arm.runs.values()):
        return "macro_f1" if all(arm.mean("macro_f1") for arm in arms) else "class_loss"
    return "eval_loss" if arms and all(arm.mean("eval_loss") for arm in arms) else "train_loss"


def _numbers(
    resolved: dict[str, Any], arms: list[Arm], kind: str, said: list[str], notes: list[str]
) -> dict[str, Any]:
    """What report.json holds: the losses of each seed, and each arm's differences from the first arm."""

    def numbers(found: Mean | None) -> dict[str, Any] | None:
        return {"mean": found.value, "half": found.half, "seeds": found.count} if found else None

    def arm(one: Arm) -> dict[str, Any]:
        each, mean = ("scores", "score") if kind == "macro_f1" else ("losses", "loss")
        found: dict[str, Any] = {"overrides": one.overrides, each: one.losses(kind)}
        found |= {mean: numbers(one.mean(kind)), "missing": one.missing}
        if accuracy := one.mean("accuracy"):
            found["accuracy"] = numbers(accuracy)
        if one is arms[0]:
            return found
        difference, probes = one.against(arms[0], kind), one.answered(arms[0])
        found["difference"] = (
            (numbers(difference) or {}) | {"shown": difference.shown} if difference else None
        )
        if probes:
            better, worse, asked = probes
            p = mcnemar(better, worse)
            found["probes"] = {"better": better, "worse": worse, "asked": asked, "p": p}
        return found

    head = {key: resolved[key] for key in ("name", "question", "recipe", "seeds")}
    head |= {"kind": kind, "interval": 0.95, "reference": arms[0].name}
    return head | {"arms": {one.name: arm(one) for one in arms}, "said": said, "notes": notes}


def _arm(folder: Path, resolved: dict[str, Any], name: str) -> Arm:
    """An arm and its runs, each held against the recipe that the ablation has now."""
    arm = resolved["arms"][name]
    made = Arm(name, arm["overrides"], arm["sections"], {}, {})
    for seed in resolved["seeds"]:
        place = RunFolder(folder / name / f"s{seed}")
        sections = arm["sections"] | {"train": arm["sections"]["train"] | {"seed": seed}}
        try:
            run = place.run
            changed = differences(place, Recipe(name, folder / FILE, sections), {}) if run else []
        except RecipeError as error:
            first = error.problems[0]
            key = first.where.partition("run.json: ")[2]
            made.missing.append(f"s{seed} broken: {f'{key}: ' * bool(key)}{first.found}")
            continue
        if run is None:
            made.missing.append(f"s{seed} was not run")
        elif changed:
            made.missing.append(
                f"s{seed} is of an older recipe ({changed[0]}): `{cli.command('ablate')}` trains it anew"
            )
        elif not isinstance(run, FinishedRun):
            made.missing.append(f"s{seed} {run.status}: {(run.error or 'not at its end').splitlines()[0]}")
        else:
            made.runs[seed] = run
            made.logs[seed] = logged(place.metrics)
    return made


def rows(arms: list[Arm], kind: str) -> list[list[str]]:
    """The table: a head, and a line for each arm. A column that would be empty is left out. The first arm is
    the one that the others are held against.
    """
    first = arms[0]
    title = figures.LABEL[kind].partition(" (")[0]
    columns: dict[str, Callable[[Arm], str]] = {
        "arm": lambda arm: arm.name,
        "seeds": lambda arm: (
            f"{len(arm.runs)}" + (f" of {len(arm.runs) + len(arm.missing)}" if arm.missing else "")
        ),
        title: lambda arm: str(arm.mean(kind) or "-"),
        f"against {first.name}": lambda arm: "-" if arm is first else _difference(arm.against(first, kind)),
        "accuracy": lambda arm: str(arm.mean("accuracy") or "-"),
        "changed": lambda arm: _answers(arm, "change"),
        "kept": lambda arm: _answers(arm, "keep"),
        f"probes against {first.name}": lambda arm: "-" if arm is first else _probes(arm, first),
        "trainable": lambda arm: _first(arm, lambda r: f"{r.plan.model.trainable:,}"),
        "seconds": lambda arm: f"{found.value:.1f}" if (found := arm.over(lambda r: r.seconds)) else "-",
        "peak memory": _memory,
        "adapter": lambda arm: _first(arm, lambda r: f"{r.result_bytes / 1e6:,.2f} MB"),
        "servable rank": lambda arm: _first(arm, _served),
    }
    lines = [[cell(arm) for cell in columns.values()] for arm in arms]
    kept = [i for i in range(len(columns)) if any(line[i] not in ("-", "") for line in lines)]
    return [[line[i] for i in kept] for line in [list(columns), *lines]]


def _difference(found: Mean | None) -> str:
    if found is None:
        return "-"
    return found.signed() + ("" if found.shown or found.half is None else " (none shown)")


def _probes(arm: Arm, reference: Arm) -> str:
    """`2 better, 1 worse, p 1.00`: probes that more or fewer seeds answered, and McNemar's exact p."""
    if not (found := arm.answered(reference)):
        return "-"
    better, worse, _ = found
    return f"{better} better, {worse} worse, p {mcnemar(better, worse):.2g}"


def _first(arm: Arm, said: Callable[[FinishedRun], str]) -> str:
    return said(next(iter(arm.runs.values()))) if arm.runs else "-"


def _answers(arm: Arm, kind: str) -> str:
    """Probes of a kind whose answer comes first, mean over the seeds: `3.7 of 4`."""
    asked = [p for run in arm.runs.values() for p in run.probes.after if p.kind == kind]
    return f"{_right(arm, kind):.1f} of {len(asked) // len(arm.runs)}" if asked else "-"


def _right(arm: Arm, kind: str) -> float:
    return sum(p.first for run in arm.runs.values() for p in run.probes.after if p.kind == kind) / len(
        arm.runs
    )


def _memory(arm: Arm) -> str:
    """The GPU's peak; without one, what was planned: the process, which several runs share, says nothing of
    one of them.
    """
    if found := arm.over(lambda r: r.memory.max_allocated_bytes):
        return f"{found.value / 2**20:,.0f} MiB"
    found = arm.over(lambda r: r.memory.planned_peak_bytes)
    return f"{found.value / 2**20:,.1f} MiB planned" if found else "-"


def _served(run: FinishedRun) -> str:
    if run.plan.head:  # it is served merged
        return "-"
    rank = run.plan.adapter and run.plan.adapter.max_lora_rank
    return str(rank) if rank and not run.not_servable else "no"


def verdict(arms: list[Arm], kind: str) -> list[str]:
    """The lowest loss, or the highest macro F1, and the arms from which no difference is shown, seed by
    seed.
    """
    if not arms:
        return ["No run is finished and logged a loss: there is nothing to compare."]
    ranked = sorted(arms, key=lambda arm: _rank(arm, kind))
    best, named = ranked[0], "train_loss" if kind == "class_loss" else kind
    of = "text" if kind == "class_loss" else "token"
    lines = [f"Lowest {named.replace('_', ' ')}: {best.name}, {best.mean(kind)} nats a {of}."]
    if kind == "macro_f1":
        lines = [f"Highest macro F1: {best.name}, {best.mean(kind)}."]
    differences = {arm.name: arm.against(best, kind) for arm in ranked[1:]}
    alike = [arm for arm in ranked[1:] if not ((d := differences[arm.name]) and d.shown)]
    lines += _no_difference(best.name, {arm.name: differences[arm.name] for arm in alike})
    if alike:
        least = min([best, *alike], key=lambda arm: (_trainable(arm), _rank(arm, kind)))
        if _trainable(least) < _trainable(best):
            lines.append(
                f"The smallest of them is {least.name}, with {_trainable(least):,} trainable parameters to"
                f" {_trainable(best):,}."
            )
    elif len(arms) > 1:
        lines.append("Its difference from every other arm, seed by seed, has an interval without 0.")
    if kind in ("train_loss", "class_loss"):
        lines.append(
            "That is how well it fits its training rows, not how it does on others: the recipe has no"
            " data.eval."
        )
    if any(both := [_right(arm, "change") + _right(arm, "keep") for arm in arms]):
        most = [arm for arm, right in zip(arms, both, strict=True) if right == max(both)]
        answers = "; ".join(
            f"{arm.name}, {_answers(arm, 'change')} and {_answers(arm, 'keep')}" for arm in most[:4]
        )
        lines.append(
            f"Most probes right, changed and kept together: {answers}"
            + "; and others." * (len(most) > 4)
            + "." * (len(most) < 5)
        )
    return lines


def _no_difference(best: str, differences: dict[str, Mean | None]) -> Iterator[str]:
    """A line for each arm with an interval, and one for all that have no more than one seed in common."""
    few = []
    for name, found in differences.items():
        if found is None or found.half is None:
            few.append(name + (f" {found.value:+.4f}" if found else " (no seed of both)"))
        else:
            yield (
                f"No difference shown between {best} and {name}: {found.signed()} seed by seed, an interval"
                " with 0 in it."
            )
    if few:
        yield f"One seed shows no difference from {best}: {listed(few, 8)}."


def _rank(arm: Arm, kind: str) -> float:
    """What is smaller for a better arm."""
    found = arm.mean(kind)
    assert found, "arms without a run are left out"
    return -found.value if kind == "macro_f1" else found.value


def _trainable(arm: Arm) -> int:
    return next(iter(arm.runs.values())).plan.model.trainable


def remarks(arms: list[Arm], kind: str) -> Iterator[str]:
    """What a reader must know before believing the table: runs that do not count, and runs that were not made
    alike.
    """
    for arm in arms:
        for why in arm.missing:
            yield f"{arm.name}: {why}"
    runs = [run for arm in arms for run in arm.runs.values()]
    alike: dict[str, Callable[[FinishedRun], Any]] = {
        "versions": lambda r: ", ".join(f"{k} {v}" for k, v in r.versions.items()),
        "code (git commit)": lambda r: f"{r.git.commit}{' with changes' if r.git.dirty else ''}",
        "devices": lambda r: r.hardware.gpu or r.hardware.device,
        "base weights": lambda r: f"{r.base.name_or_path} {r.resume_facts.base_weights}",
    }
    if kind in ("eval_loss", "macro_f1"):
        alike["eval rows, whose losses do not compare"] = lambda r: r.plan.data.eval.sha256
    for name, value in alike.items():
        if len(found := list(dict.fromkeys(str(value(run)) for run in runs))) > 1:
            yield f"the runs are of different {name}: {listed(found, 3)}"
    if any(run.memory.max_allocated_bytes is None for run in runs):
        most = max(run.memory.max_rss_bytes for run in runs) / 2**20
        yield (
            "peak memory is the plan's, of tensors; a process with its libraries took at most"
            f" {most:,.0f} MiB"
        )


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _markdown(
    head: str, facts: str, said: list[str], table: list[list[str]], notes: list[str], pictures: dict[str, str]
) -> str:
    ruled = [table[0], ["---", *["---:"] * (len(table[0]) - 1)], *table[1:]]
    lines = [f"# {head}", "", facts, "", *said, "", *(f"| {' | '.join(line)} |" for line in ruled), ""]
    lines += [f"- {note}" for note in notes]
    return "\n".join([*lines, *(f"\n![{text}]({name})" for name, text in pictures.items()), ""])


def _typeset(text: str) -> str:
    return html.escape(text.replace("+-", chr(0xB1)).replace("<=", chr(0x2264)))


def _page(
    head: str,
    facts: str,
    said: list[str],
    table: list[list[str]],
    notes: list[str],
    pictures: dict[Path, str],
) -> str:
    """One HTML page that needs no other file: the pictures are in it."""
    best = said[0].partition(": ")[2].partition(",")[0]
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport"
        f" content='width=device-width'><style>{STYLE}</style>"
    ]
    lines += [f"<title>{html.escape(head)}</title><h1>{html.escape(head)}</h1><p>{html.escape(facts)}</p>"]
    lines += [f"<p>{_typeset(' '.join(said))}</p><table>"]
    for number, line in enumerate(table):
        cell = "td" if number else "th"
        cells = "".join(f"<{cell}>{_typeset(text)}</{cell}>" for text in line)
        lines.append(f"<tr{' class=best' if line[0] == best else ''}>{cells}</tr>")
    lines += ["</table><ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"]
    for path, text in pictures.items():
        image = b64encode(path.read_bytes()).decode()
        alt = html.escape(text)
        lines.append(
            f'<figure><img src="data:image/png;base64,{image}"'
            f' alt="{alt}"><figcaption>{alt}</figcaption></figure>'
        )
    return "\n".join([*lines, "</html>", ""])
