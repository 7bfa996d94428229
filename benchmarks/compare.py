"""Full, frozen or LoRA? The same four facts corrected in the same tiny base by each: `make compare` (minutes
on two cores).

How much is trained, how fast the loss falls, whether the facts are corrected, and what the model forgets of
everything else it knew. Writes docs/compare.md, docs/compare.png and benchmarks/results/compare.json.
"""

import contextlib
import io
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: a second thread only waits for the first on models this small

import matplotlib
import yaml

from lora_recipes.core import interval
from lora_recipes.core.files import ROOT, write
from lora_recipes.core.record import Answer
from lora_recipes.evaluation.evaluate import evaluation
from lora_recipes.recipe import check
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ARMS: dict[str, dict[str, Any]] = {
    "full": {"full": {}},
    "freeze: last block and embeddings": {"freeze": {"last_blocks": 1, "embeddings": True}},
    "LoRA r 4 on q,k,v,o": {"lora": {"r": 4, "lora_alpha": 4, "target_modules": QKVO}},
    "LoRA r 4 on v": {"lora": {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj"]}},
}
EPOCHS = 50
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SWEEP, SEEDS = 0, (1, 2, 3, 4, 5)  # the rates are chosen on a base and seed of their own
READING = "## What it says"  # from here on docs/compare.md is written by hand, and stays
ENOUGH = 0.8  # mean probability of the corrected answers that a rate must reach to be chosen
PAIR = (
    "The cat sleeps on the",
    "The dog sleeps in the",
)  # a corrected sentence, and the kept one most like it


def arms() -> dict[str, dict[str, Any]]:
    """Those whose section this version's recipes have."""
    return {
        label: section for label, section in ARMS.items() if set(section) <= set(check.schema()["properties"])
    }


def quietly(action: Any, *arguments: Any, **options: Any) -> Any:
    """Call `action` and keep what it prints to itself."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return action(*arguments, **options)


def sentences() -> list[dict[str, str]]:
    """A probe for each kept sentence: its last word."""
    rows = [
        json.loads(line)["text"]
        for line in (ROOT / "data" / "facts" / "kept.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    words = [text.removesuffix(".").rpartition(" ") for text in rows]
    return [{"prompt": prompt, "answer": answer} for prompt, _, answer in words]


def base(seed: int, outputs: Path) -> Path:
    """The tiny base, trained in the order that `seed` gives, in a folder of its own. All start from the same
    random weights.
    """
    train(resolve(recipes.load("tiny_base", [f"train.seed={seed}"]), outputs))
    return outputs / "tiny_base" / "model"


def run(section: dict[str, Any], rate: float, seed: int, outputs: Path) -> dict[str, Any]:
    """One arm: trained by the recipe tiny_facts but for its method, rate, seed and epochs; and what came of
    it.
    """
    shipped = yaml.safe_load(recipes.load("tiny_facts").to_yaml())
    model = {
        "name_or_path": str(outputs / "tiny_base" / "model"),
        "contract": "tiny_qwen3",
        "dtype": "float32",
    }
    changed = {"num_train_epochs": EPOCHS, "learning_rate": rate, "seed": seed, "logging_steps": 1}
    probes = {"change": shipped["probes"]["change"], "keep": sentences()}
    sections = {
        "model": model,
        "data": shipped["data"],
        **section,
        "train": shipped["train"] | changed,
        "probes": probes,
    }
    file = outputs / "arm.yaml"
    write(file, yaml.safe_dump(sections, allow_unicode=True))
    record = train(resolve(recipes.load(str(file)), outputs), force=True)
    kept = evaluation("arm", outputs).sets["kept"]
    answers = record.probes.after
    change, keep = ([a for a in answers if a.kind == kind] for kind in ("change", "keep"))
    near = {probe["prompt"] for probe in shipped["probes"]["keep"]}
    logs = [json.loads(line) for line in (outputs / "arm" / "metrics.jsonl").read_text().splitlines()]
    return {
        "rate": rate,
        "trainable": record.plan.model.trainable,
        "losses": [log["loss"] for log in logs if "loss" in log],
        "corrected": first(change),
        "corrected_probability": statistics.fmean(a.probability for a in change),
        "named": first([a for a in keep if a.prompt in near]),
        "kept": first(keep),
        "kept_probability": statistics.fmean(a.probability for a in keep),
        "forgotten": kept.trained.loss - kept.base.loss,
        "before": [a.probability for a in record.probes.before if a.prompt in PAIR],
        "after": [a.probability for a in answers if a.prompt in PAIR],
    }


def first(answers: list[Answer]) -> int:
    """How many have their answer as the likeliest next word."""
    return sum(a.first for a in answers)


def chosen(tried: list[dict[str, Any]]) -> float:
    """Of the rates that correct the facts well enough, the one that forgets least; if none does, the one that
    corrects best.
    """
    enough = [done for done in tried if done["corrected_probability"] >= ENOUGH and done["corrected"] == 4]
    best = (
        min(enough, key=lambda d: d["forgotten"])
        if enough
        else max(tried, key=lambda d: d["corrected_probability"])
    )
    return float(best["rate"])


def mean(runs: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean and half of the 95 % interval over the seeds."""
    found = interval.mean([done[key] for done in runs])
    assert found.half is not None, "there is more than one seed"
    return found.value, found.half


def measure() -> dict[str, Any]:
    """Every arm at every rate on one base, then at its own rate on five others."""
    began, sweep, runs, rates = time.monotonic(), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in (SWEEP, *SEEDS):
            quietly(base, seed, Path(folder) / str(seed))
        for label, section in arms().items():
            sweep[label] = [quietly(run, section, rate, SWEEP, Path(folder) / str(SWEEP)) for rate in RATES]
            rates[label] = chosen(sweep[label])
            runs[label] = [
                quietly(run, section, rates[label], seed, Path(folder) / str(seed)) for seed in SEEDS
            ]
            print(row(label, rates[label], runs[label]), flush=True)
            for done in sweep[label]:
                del done["losses"]
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    facts = {
        "device": f"CPU ({platform.machine()})",
        "versions": versions,
        "seconds": round(time.monotonic() - began),
    }
    return facts | {"rates": rates, "runs": runs, "sweep": sweep}


def row(label: str, rate: float, runs: list[dict[str, Any]]) -> str:
    """A row of the table."""
    said = {key: "{:.1f} +- {:.1f}".format(*mean(runs, key)) for key in ("corrected", "named", "kept")}
    shares = {
        key: "{:.0%} +- {:.0%}".format(*mean(runs, key))
        for key in ("corrected_probability", "kept_probability")
    }
    forgotten, spread = mean(runs, "forgotten")
    corrected, kept = (f"{said[k]} ({shares[f'{k}_probability']})" for k in ("corrected", "kept"))
    last = statistics.fmean(done["losses"][-1] for done in runs)
    cells = [label, f"{runs[0]['trainable']:,}", f"{rate:g}", f"{last:.3f}", corrected, said["named"], kept]
    return f"| {' | '.join(cells)} | {forgotten:+.3f} +- {spread:.3f} |"


def sweep_rows(result: dict[str, Any]) -> list[str]:
    """What each rate did on the sweep's base: corrected of 4 (mean probability), kept of 32, loss on them."""
    rates = [done["rate"] for done in next(iter(result["sweep"].values()))]
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", f"|---|{'---|' * len(rates)}"]
    for label, tried in result["sweep"].items():
        cells = []
        for done in tried:
            said = (
                f"{done['corrected']} ({done['corrected_probability']:.0%}), {done['kept']},"
                f" {done['forgotten']:+.3f}"
            )
            cells.append(f"**{said}**" if done["rate"] == result["rates"][label] else said)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def draw(result: dict[str, Any], file: Path) -> None:
    """Loss curves, the answers, and the price of a correction at every rate."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars, price) = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for number, (label, runs) in enumerate(result["runs"].items()):
        color, steps = f"C{number}", range(1, len(runs[0]["losses"]) + 1)
        points = [mean([{"loss": done["losses"][step - 1]} for done in runs], "loss") for step in steps]
        name = f"{label}: {runs[0]['trainable']:,} trained, rate {result['rates'][label]:g}"
        curves.plot(steps, [m for m, _ in points], color=color, label=name)
        curves.fill_between(
            steps, [m - h for m, h in points], [m + h for m, h in points], color=color, alpha=0.2
        )
        for place, key in enumerate(("corrected_probability", "kept_probability")):
            middle, half = mean(runs, key)
            bars.bar(place + 0.2 * number, middle, 0.18, color=color, yerr=half, capsize=3)
        tried = result["sweep"][label]
        price.plot(
            [d["corrected_probability"] for d in tried],
            [d["forgotten"] for d in tried],
            "o-",
            color=color,
            markersize=4,
        )
        own = next(done for done in tried if done["rate"] == result["rates"][label])
        price.plot(
            own["corrected_probability"], own["forgotten"], "o", color=color, markersize=11, fillstyle="none"
        )
    curves.set(
        xlabel="step",
        ylabel="loss on the corrections, nats a token",
        title="learning (mean, 95 %)",
        ylim=(0, None),
    )
    bars.set_xticks(
        [0.1 * (len(result["runs"]) - 1) + place for place in (0, 1)],
        ["4 corrected facts", "32 kept sentences"],
    )
    bars.set(ylabel="mean probability of the right word", ylim=(0, 1.05), title="after training (mean, 95 %)")
    price.set(
        xlabel="mean probability of the corrected facts", ylabel="more loss on the 32 kept, nats a token"
    )
    price.set(title="every rate, in order, one base (ring: chosen)")
    price.set_yscale("symlog", linthresh=0.1)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def pair_rows(result: dict[str, Any]) -> list[str]:
    """A corrected sentence and the kept one most like it, in the base and after each method."""
    sides = {"base": [done["before"] for done in next(iter(result["runs"].values()))]}
    sides |= {label: [done["after"] for done in runs] for label, runs in result["runs"].items()}
    lines = []
    for label, pairs in sides.items():
        cells = ["{:.0%} +- {:.0%}".format(*mean([{"p": pair[i]} for pair in pairs], "p")) for i in (0, 1)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def page(result: dict[str, Any]) -> str:
    """docs/compare.md up to what is said of the outcome, which stands there by hand."""
    missing = [label for label in ARMS if label not in result["runs"]]
    lines = [
        "# Full, frozen or LoRA?",
        "",
        (
            "`make compare` writes this page: four facts corrected in the tiny base (2 layers, d = 64, 94,656"
            " parameters) with the 8 sentences"
        ),
        (
            f"of data/facts/corrections.jsonl, {EPOCHS} epochs of one step each, by the recipe tiny_facts but"
            " for method, rate and epochs."
        ),
        (
            f"Mean of {len(SEEDS)} seeds +- half of the 95 % interval (Student's t). A seed is a base trained"
            " in an order of its own (all"
        ),
        (
            "from the same random weights), and an adapter's start; full and frozen training have nothing"
            " else that is random."
        ),
        "",
        (
            "| method | trained | rate | last loss | corrected first, of 4 (probability) | named kept, of 4 |"
            " all kept, of 32 (probability) | more loss on the 32, nats a token |"
        ),
        "|---|---|---|---|---|---|---|---|",
        *(row(label, result["rates"][label], runs) for label, runs in result["runs"].items()),
        "",
        (
            "The named kept facts are those of the recipe's probes (two of them close neighbours of a"
            " corrected one); the 32 are every"
        ),
        "sentence of the base that is not corrected, asked for its last word.",
        "",
        "![loss, answers, and the price of a correction](compare.png)",
        "",
        "A fact and its neighbour, the probability of the word that is right now:",
        "",
        ("| method | The cat sleeps on the sofa (corrected) | The dog sleeps in the basket (should stay) |"),
        "|---|---|---|",
        *pair_rows(result),
        "",
        "## The rates",
        "",
        (
            "Each method has its own: the one that forgets least among those with all four corrections first"
            " at a mean probability of at least"
        ),
        (
            f"{ENOUGH:.0%}, on a base and seed that are not among the five. Corrected of 4 (probability),"
            " kept of 32, more loss on these:"
        ),
        "",
        *sweep_rows(result),
        "",
        *(
            [f"Not measured: {', '.join(missing)}; recipes here have no such section yet.", ""]
            if missing
            else []
        ),
        (
            f"{result['device']}, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; all in"
            " benchmarks/results/compare.json."
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write, draw."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    result = measure()
    write(ROOT / "benchmarks" / "results" / "compare.json", json.dumps(result, indent=1) + "\n")
    file = ROOT / "docs" / "compare.md"
    _, _, reading = file.read_text(encoding="utf-8").partition(READING) if file.is_file() else ("", "", "")
    write(file, page(result) + (f"\n{READING}{reading}" if reading else ""))
    draw(result, ROOT / "docs" / "compare.png")
    print(f"docs/compare.md, docs/compare.png, benchmarks/results/compare.json in {result['seconds']} s")


if __name__ == "__main__":
    main()
