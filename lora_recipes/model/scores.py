"""How good a classifier is, by scikit-learn: what an evaluation measures, and what run.json says."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lora_recipes.core.record import ClassScores, Scores

BINS = 10  # of confidence, of equal width (arXiv 1706.04599 takes 15, for thousands of rows)


def metrics(logits: Any, labels: Any) -> dict[str, float]:
    """What Trainer.evaluate measures beside the loss, of `logits` [rows, classes] and `labels` [rows]."""
    from sklearn.metrics import accuracy_score, f1_score

    called = np.asarray(logits).argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, called)),
        "macro_f1": float(f1_score(labels, called, average="macro", zero_division=0)),
        "calibration_error": calibration_error(shares(logits), labels),
    }


def shares(logits: Any) -> Any:
    """Probabilities [rows, classes] in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    powers = np.exp(shifted - shifted.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def calibration_error(probabilities: Any, labels: Any) -> float:
    """Expected calibration error: mean of |confidence - accuracy| over BINS of confidence, by rows."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == np.asarray(labels)
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    error = 0.0
    for place in np.unique(places):
        inside = places == place
        error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return float(error)


def of(logits: Any, labels: list[int], names: list[str], majority: str, sha256: str) -> Scores:
    """All that is measured; `majority`: the most frequent class of the rows that were trained."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    places, called = list(range(len(names))), np.asarray(logits).argmax(-1)
    precision, recall, f1, rows = precision_recall_fscore_support(
        labels, called, labels=places, zero_division=0
    )
    probabilities = shares(logits)
    loss = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean()
    return Scores(
        rows=len(labels),
        sha256=sha256,
        loss=float(loss),
        **metrics(logits, labels),
        majority=Counter(labels)[names.index(majority)] / len(labels),
        classes=[
            ClassScores(
                name=name,
                rows=int(rows[i]),
                precision=float(precision[i]),
                recall=float(recall[i]),
                f1=float(f1[i]),
            )
            for i, name in enumerate(names)
        ],
        confusion=confusion_matrix(labels, called, labels=places).tolist(),
    )


def text(scores: Scores) -> list[str]:
    """What a person reads of it."""
    wide = max(len("class"), *(len(c.name) for c in scores.classes))
    head = (
        f"accuracy {scores.accuracy:.4f} (always {scores.majority:.4f} by the most frequent class of train)"
    )
    lines = [
        f"{head}, macro F1 {scores.macro_f1:.4f}, calibration error {scores.calibration_error:.4f},"
        f" loss {scores.loss:.4f} nats, {scores.rows:,} rows",
        f"{'class':<{wide}}  precision  recall      F1  rows",
    ]
    return lines + [
        f"{c.name:<{wide}}  {c.precision:9.4f}  {c.recall:6.4f}  {c.f1:6.4f}  {c.rows:4}"
        for c in scores.classes
    ]


def draw(scores: Scores, file: Path) -> None:
    """The confusion matrix as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn.metrics import ConfusionMatrixDisplay

    names, side = [c.name for c in scores.classes], 3 + 0.6 * len(scores.classes)
    figure, axis = pyplot.subplots(figsize=(side, side), layout="constrained")
    shown = ConfusionMatrixDisplay(np.asarray(scores.confusion), display_labels=names)
    shown.plot(ax=axis, colorbar=False, xticks_rotation="vertical")
    axis.set(xlabel="called", ylabel="is", title=f"{scores.rows:,} held-out rows")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
