"""Is a trained classifier better than word counts? Recipes over seeds beside baselines of scikit-learn:
`python -m benchmarks.classify tiny_classify smollm2_classify`. Writes results/classify_RECIPE.json after
each seed.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

from lora_recipes.core.files import OUTPUTS, ROOT, write
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import labels
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train

SEEDS = (1, 2, 3, 4, 5)
BASELINES: dict[str, Any] = {
    "majority": DummyClassifier(),
    "TF-IDF of words, logistic regression": make_pipeline(
        TfidfVectorizer(), LogisticRegression(max_iter=2000)
    ),
    "TF-IDF of words and pairs, logistic regression": make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=2000)
    ),
    "TF-IDF of words, signs kept, logistic regression": make_pipeline(
        TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"\w+|[^\w\s]"), LogisticRegression(max_iter=2000)
    ),
}


def baselines(name: str) -> dict[str, dict[str, float]]:
    """Accuracy and macro F1 of each on the recipe's rows."""
    rows, held = labels.splits(recipes.load(name))
    texts, asked = ([row.value["text"] for row in split.rows] for split in (rows, held))
    found = {}
    for kind, model in BASELINES.items():
        called = model.fit(texts, rows.labels).predict(asked)
        f1 = f1_score(held.labels, called, average="macro", zero_division=0)
        found[kind] = {"accuracy": float(accuracy_score(held.labels, called)), "macro_f1": float(f1)}
    return found


def seeds(name: str) -> Iterator[dict[str, float]]:
    """The scores of each seed; what a seed trained before is taken."""
    for seed in SEEDS:
        outputs = OUTPUTS / "_classify" / f"s{seed}"
        outputs.mkdir(parents=True, exist_ok=True)
        if not (outputs / "_bases").exists():
            (outputs / "_bases").symlink_to(OUTPUTS / "_bases")
        folder = RunFolder(outputs / name)
        if not folder.finished:
            train(resolve(recipes.load(name, [f"train.seed={seed}"]), outputs), force=True)
        run = folder.run
        assert run and run.scores, "it was just trained"
        kept = ("accuracy", "macro_f1", "calibration_error", "loss")
        said = {"seed": seed, "steps": run.steps or 0, "seconds": run.seconds or 0}
        yield said | {k: getattr(run.scores, k) for k in kept}


def main() -> None:
    """Train, and write what came of it."""
    (OUTPUTS / "_bases").mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or ["tiny_classify"]:
        file = Path(ROOT) / "benchmarks" / "results" / f"classify_{name}.json"
        result: dict[str, Any] = {"recipe": name, "baselines": baselines(name), "seeds": []}
        trained = result["seeds"]
        for run in seeds(name):
            trained.append(run)
            write(file, json.dumps(result, indent=1) + "\n")
        for key in ("accuracy", "macro_f1", "calibration_error"):
            values = [run[key] for run in trained]
            mean, apart = statistics.mean(values), statistics.stdev(values)
            print(f"{name} {key} {mean:.4f} +- {apart:.4f} of {len(values)} seeds")
        print(json.dumps(result["baselines"], indent=1))


if __name__ == "__main__":
    main()
