"""The pictures of a report: arms with their intervals, loss curves, loss against each number that varies.
Imports no torch.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from lora_recipes.core.interval import Mean

LABEL = {
    "eval_loss": "eval loss (nats a token)",
    "train_loss": "train loss, last logged (nats a token)",
    "class_loss": "train loss, last logged (nats a text)",
    "macro_f1": "macro F1",
}
CURVE = {
    "eval_loss": LABEL["eval_loss"],
    "train_loss": "train loss (nats a token)",
    "class_loss": "train loss (nats a text)",
    "macro_f1": LABEL["macro_f1"],
}
LOGGED = {"eval_loss": "eval_loss", "train_loss": "loss", "class_loss": "loss", "macro_f1": "eval_macro_f1"}


def draw(folder: Path, arms: list[Any], kind: str) -> dict[str, str]:
    """Draw into `folder`; file name -> what it shows. `arms`: report.Arm, each with at least one run; `kind`:
    a key of LABEL.
    """
    matplotlib.use("Agg")
    for old in folder.glob("*.png"):
        old.unlink()
    found = {"arms.png": f"{LABEL[kind]} of each arm, mean and 95 % interval over seeds"}
    _means(folder / "arms.png", arms, kind)
    reference = arms[0]
    if differences := {
        a.name: d for a in arms[1:] if (d := a.against(reference, kind)) and d.half is not None
    }:
        found["differences.png"] = (
            f"{LABEL[kind]} of each arm minus that of {reference.name}, seed by seed, mean and 95 % interval"
        )
        _differences(folder / "differences.png", differences, reference.name, LABEL[kind])
    found["curves.png"] = f"{CURVE[kind]} over the steps, mean over seeds"
    _curves(folder / "curves.png", arms, LOGGED[kind], CURVE[kind])
    for key, lines in _varied(arms).items():
        name = f"{key.rpartition('.')[2]}.png"
        found[name] = f"{LABEL[kind]} against {key}"
        _against(folder / name, key, lines, kind)
    return found


def _figure(height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    if any(axis.get_legend_handles_labels()[0] for axis in figure.axes):
        figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _means(path: Path, arms: list[Any], kind: str) -> None:
    figure, axis = _figure(1.2 + 0.3 * len(arms))
    means = [arm.mean(kind) for arm in arms]
    for y, mean in enumerate(means):
        axis.errorbar(mean.value, y, xerr=mean.half, fmt="o", color="C0", capsize=3)
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.set(xlabel=f"{LABEL[kind]}, mean and 95 % interval")
    _save(figure, path)


def _differences(path: Path, differences: dict[str, Mean], reference: str, label: str) -> None:
    """Grey where the interval has 0 in it: no difference is shown."""
    figure, axis = _figure(1.2 + 0.3 * len(differences))
    for y, found in enumerate(differences.values()):
        colour = "C0" if found.shown else "0.6"
        axis.errorbar(found.value, y, xerr=found.half, fmt="o", color=colour, capsize=3)
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(differences)), list(differences))
    axis.set_ylim(len(differences) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.set(xlabel=f"{label} minus that of {reference}, seed by seed; grey: no difference shown")
    _save(figure, path)


def _curves(path: Path, arms: list[Any], key: str, label: str) -> None:
    figure, axis = _figure(max(4.0, 0.24 * len(arms)))
    colours = matplotlib.colormaps["viridis" if len(arms) > 10 else "tab10"]
    for number, arm in enumerate(arms):
        steps: dict[int, list[float]] = defaultdict(list)
        for logs in arm.logs.values():
            for log in logs:
                if key in log:
                    steps[log["step"]].append(log[key])
        points = sorted(
            (step, sum(values) / len(values))
            for step, values in steps.items()
            if len(values) == len(arm.logs)
        )
        colour = colours(number / max(len(arms) - 1, 1)) if len(arms) > 10 else colours(number)
        axis.plot(
            *zip(*points, strict=True), marker="." if len(points) < 20 else None, color=colour, label=arm.name
        )
    axis.set(xlabel="step", ylabel=label)
    axis.grid(color="0.9")
    _save(figure, path)


def _varied(arms: list[Any]) -> dict[str, dict[str, list[tuple[float, Any]]]]:
    """For each key whose number varies: what else varies -> (number, arm). One picture for keys that vary
    together (r and alpha = 2 r).
    """
    found: dict[str, dict[str, list[tuple[float, Any]]]] = {}
    keys = list(dict.fromkeys(text.partition("=")[0].strip() for arm in arms for text in arm.overrides))

    def decides(one: str, other: str) -> bool:
        """Has `other` a single value wherever `one` has the same?"""
        pairs = {(str(_value(arm, one)), str(_value(arm, other))) for arm in arms}
        return len(pairs) == len({first for first, _ in pairs})

    for key in keys:
        if any(decides(key, done) and decides(done, key) for done in found):
            continue
        lines: dict[str, list[tuple[float, Any]]] = defaultdict(list)
        for arm in arms:
            value = _value(arm, key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                others = {k: _value(arm, k) for k in keys if k != key and not decides(key, k)}
                said = [f"{k.rpartition('.')[2]} {v}" for k, v in others.items() if v is not None]
                lines[", ".join(said) or "the recipe"].append((value, arm))
        if any(len({value for value, _ in points}) > 1 for points in lines.values()):
            found[key] = dict(lines)
    return found


def _value(arm: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return arm.sections.get(section, {}).get(name)


def _against(path: Path, key: str, lines: dict[str, list[tuple[float, Any]]], kind: str) -> None:
    figure, axis = _figure()
    values = sorted({value for points in lines.values() for value, _ in points})
    for text, points in lines.items():
        points.sort(key=lambda point: point[0])
        means = [arm.mean(kind) for _, arm in points]
        options = {"marker": "o", "capsize": 3, "label": text if len(lines) > 1 else None}
        axis.errorbar(
            [v for v, _ in points], [m.value for m in means], yerr=[m.half or 0 for m in means], **options
        )
    if values[0] > 0 and values[-1] / values[0] >= 4:
        axis.set_xscale("log", base=2 if all(math.log2(v).is_integer() for v in values) else 10)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    axis.set(xlabel=key, ylabel=LABEL[kind])
    axis.grid(color="0.9")
    _save(figure, path)
