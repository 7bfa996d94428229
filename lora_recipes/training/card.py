"""The model card: README.md of an adapter, with the metadata that the Hub reads."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lora_recipes.core.errors import listed
from lora_recipes.core.record import FinishedRun, HeadFacts
from lora_recipes.data.sources import ENDINGS
from lora_recipes.model import scores
from lora_recipes.recipe.recipe import Recipe

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
# Of the words of huggingface.co/docs/hub/repositories-licenses those that are to be expected of a base.
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "gemma", "llama2", "llama3", "llama3.1", "llama3.2")


def write(folder: Path, recipe: Recipe, run: FinishedRun) -> None:
    """Write README.md into `folder`, from the recipe and its run.json (`run`)."""
    ModelCard(f"---\n{metadata(recipe, run).to_yaml()}\n---\n{text(recipe, run)}").save(folder / "README.md")


def sources(recipe: Recipe) -> list[str]:
    """The paths or hub ids of the training data."""
    given = recipe.data.train
    return [given] if isinstance(given, str) else [s if isinstance(s, str) else s["path"] for s in given]


def _on_the_hub(recipe: Recipe, name: str) -> bool:
    """Is `name` owner/name on the hub, and no path here?"""
    return HUB_ID.fullmatch(name) is not None and not recipe.file(name).exists()


def metadata(recipe: Recipe, run: FinishedRun) -> ModelCardData:
    """The Hub's fields. A base or a data set that is only a folder here, and a licence that is none of the
    Hub's words, are named in the text instead: the Hub refuses them.
    """
    base, eval_loss = recipe.model.name_or_path or "", run.metrics.get("eval_loss")
    results, licence = None, (run.plan.model.licence or "").lower()
    if eval_loss is not None:
        name = f"{recipe.name} eval"
        results = [
            EvalResult(
                "text-generation", "held-out", name, metric_type="loss", metric_value=round(eval_loss, 4)
            )
        ]
    if run.scores:
        accuracy, name = round(run.scores.accuracy, 4), f"{recipe.name} eval"
        results = [
            EvalResult("text-classification", "held-out", name, metric_type="accuracy", metric_value=accuracy)
        ]
    lora = [] if recipe.whole else [recipe.settings.get("peft_type", "lora").lower()]
    return ModelCardData(
        base_model=base if recipe.model.weights == "pretrained" and _on_the_hub(recipe, base) else None,
        license=licence if licence in LICENCES else None,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-classification" if recipe.classify else "text-generation",
        tags=[*lora, *(() if recipe.classify else ("sft", "trl")), "lora-recipes"],
        datasets=[s for s in sources(recipe) if _on_the_hub(recipe, s) and not s.endswith(ENDINGS)] or None,
        metrics=["accuracy" if run.scores else "loss"] if results else None,
        model_name=recipe.name,
        eval_results=results,
    )


def _head(head: HeadFacts) -> str:
    names = listed([c.name for c in head.classes], 12)
    return f"- classes, in the order of labels.json: {names}; pooling {head.pooling}: `lora-recipes predict`"


def text(recipe: Recipe, run: FinishedRun) -> str:
    """What was trained, on what, with which figures and versions; and the recipe itself."""
    plan, metrics = run.plan, run.metrics
    kind = "Model" if recipe.whole else f"{recipe.settings.get('peft_type', 'LoRA')} adapter"
    losses = [
        f"{label} loss {metrics[key]:.4f}"
        for label, key in (("train", "train_loss"), ("eval", "eval_loss"))
        if key in metrics
    ]
    lines = [
        f"# {recipe.name}",
        "",
        f"{kind} trained on {plan.model.name_or_path} with lora-recipes.",
        "",
        (
            f"- trainable parameters: {plan.model.trainable:,} of {plan.model.total:,}"
            f" ({plan.model.share_percent:.4f} %)"
        ),
        *([f"- licence of the base: {plan.model.licence}"] if plan.model.licence else []),
        f"- data: {', '.join(sources(recipe))} ({plan.data.train.rows:,} rows)",
        f"- {run.steps} steps, {', '.join(losses)}",
        *([f"- {line}" for line in scores.text(run.scores)[:1]] if run.scores else []),
        *([_head(plan.head)] if plan.head else []),
        f"- versions: {', '.join(f'{k} {v}' for k, v in run.versions.items())}",
    ]
    if plan.adapter and plan.adapter.max_lora_rank:
        lines.append(f"- vLLM: `--enable-lora --max-lora-rank {plan.adapter.max_lora_rank}`")
    if recipe.method == "lora":
        lines.append(
            "- provenance.json: which base it was trained on, and PEFT's answers to a few rows of the data,"
            " which it quotes"
        )
    return "\n".join(
        [*lines, "", "The recipe, as resolved:", "", "```yaml", recipe.to_yaml().strip(), "```", ""]
    )
