"""The model card: README.md of an adapter, with the metadata that the Hub reads."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lora_recipes.recipe import Recipe

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def sources(recipe: Recipe) -> list[str]:
    """The paths or hub ids of the training data."""
    given = recipe.data["train"]
    return [given] if isinstance(given, str) else [s if isinstance(s, str) else s["path"] for s in given]


def write(folder: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """Write README.md into `folder`. A base or data set that is only a folder here is named in the text, not in the metadata."""
    base, model = recipe.model.get("name_or_path") or "", record["plan"]["model"]
    on_hub = [s for s in sources(recipe) if HUB_ID.fullmatch(s) and not s.endswith(".jsonl")]
    eval_loss = record["metrics"].get("eval_loss")
    results = []
    if eval_loss is not None:
        name = f"{recipe.name} eval"
        results = [EvalResult("text-generation", "held-out", name, metric_type="loss", metric_value=round(eval_loss, 4))]
    metadata = ModelCardData(
        base_model=base if HUB_ID.fullmatch(base) and recipe.model.get("weights") != "random" else None,
        library_name="peft" if recipe.method == "lora" else "transformers",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "trl", "lora-recipes"] if recipe.method == "lora" else ["sft", "trl", "lora-recipes"],
        datasets=on_hub or None,
        metrics=["loss"] if results else None,
        model_name=recipe.name,
        eval_results=results or None,
    )
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    serving = record["plan"].get("adapter", {}).get("max_lora_rank")
    text = f"""---
{metadata.to_yaml()}
---
# {recipe.name}

{"LoRA adapter" if recipe.method == "lora" else "Model"} trained on {base or recipe.model.get("from_recipe") or "random weights"} with lora-recipes.

- trainable parameters: {model["trainable"]:,} of {model["total"]:,} ({model["share_percent"]:.4f} %)
- data: {", ".join(sources(recipe))} ({record["plan"]["data"]["train"]["rows"]:,} rows)
- steps: {record["steps"]}, train loss {record["metrics"]["train_loss"]:.4f}{f", eval loss {eval_loss:.4f}" if eval_loss is not None else ""}
{f"- vLLM: --enable-lora --max-lora-rank {serving}" if serving else ""}
- versions: {versions}

The recipe, as resolved:

```yaml
{recipe.to_yaml().strip()}
```
"""
    ModelCard(text).save(folder / "README.md")
