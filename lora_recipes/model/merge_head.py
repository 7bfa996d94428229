"""Merge a classifier: LoRA into its decoder, the head as it is, in one folder that transformers'
AutoModelForSequenceClassification and vLLM load. Every step is held against what training recorded.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.head import Head
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.yamlfile import shown
from lora_recipes.data.labels import padded
from lora_recipes.model import attach, heads, stored

# How far a probability may be from what PEFT recorded, and from that of the step before: float32 on another
# machine is within 1e-5 of it, half a class's worth of a wrong pooling or head is not.
APART = 1e-3
_AUTO: Any = AutoModelForSequenceClassification


def merge(
    adapter: Adapter, known: Provenance | None, source: Path, dtype: str, head: Head, target: Path
) -> dict[str, Any]:
    """Write the merged classifier of `adapter` on the base in `source` to `target`, in `dtype`; what
    merge.json says of it. RecipeError when it calls texts otherwise than training recorded.
    """
    attached = attach.on_base(adapter, source, known, head)
    tokenizer = padded(attach.tokenizer(adapter.path, source))
    rows = [called.input_ids for called in known.called] if known else []
    rows = rows or [tokenizer(text)["input_ids"] for text in ("The", "Once upon a time", "rm -rf /tmp/x")]
    wanted = _shares(attached, tokenizer, rows)
    apart: dict[str, float] = {}
    if known and known.called:
        recorded = torch.tensor([called.logits for called in known.called]).softmax(-1)
        apart["adapter"] = _held(wanted, recorded, adapter.path, "the saved adapter")
    if known and known.quantize:  # into the rounded weights that it was trained on, in 16 or 32 bits
        packed = stored.dequantised(attached)
        del attached
        plain: Any = heads.of(attach.plain(source, torch.float32), head.labels, head.pooling)
        attached = attach.attach(plain, {"default": adapter})
        stored.put(packed, attached.get_base_model())
        packed_gave, wanted = wanted, _shares(attached, tokenizer, rows)
        apart["dequantised"] = float((wanted - packed_gave).abs().max())
    model: Any = attached.float().merge_and_unload()
    kind = _AUTO._model_mapping.get(type(model.config), None)
    if kind is None:
        do = "use the adapter as it is: lora-recipes predict"
        found = f"transformers has no {type(model).__name__}, and no other program would load it"
        raise RecipeError(Problem(shown(adapter.path), found, do))
    merged = _shares(model, tokenizer, rows)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(getattr(torch, dtype)).save_pretrained(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [kind.__name__]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(target)
    head.save(target)
    again = _shares(attach.merged(target, head, dtype=torch.float32), tokenizer, rows)
    exact = dtype == "float32"
    before = merged if exact else _shares(model.float(), tokenizer, rows)
    apart["merged"] = _held(merged, wanted, target, "the merged model")
    apart["rounded"] = float((before - merged).abs().max())
    apart["read_back"] = _held(again, before, target, "what was written")
    if known:
        replace(known, files={}, adapter_config={}).save(target)
    return {"architecture": kind.__name__, "classes": head.labels, "pooling": head.pooling, "apart": apart}


def _shares(model: Any, tokenizer: Any, rows: list[list[int]]) -> torch.Tensor:
    """Probabilities [rows, classes]."""
    return heads.logits(model.eval(), tokenizer, rows, 1).softmax(-1)


def _held(found: torch.Tensor, wanted: torch.Tensor, folder: Path, what: str) -> float:
    """How far two are apart at most. RecipeError beyond APART."""
    apart = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not apart <= APART:
        said = f"{what} gives probabilities {apart:.2g} from what it was made of; {APART:g} are allowed"
        raise RecipeError(Problem(shown(folder), said, "another base, or another version of a library?"))
    return apart


def report(record: dict[str, Any], output: Path) -> str:
    """What came of it, for a person."""
    apart = ", ".join(f"{name} {value:.1e}" for name, value in record["apart"].items())
    lines = [
        f"merged      {record['architecture']}, {record['dtype']}, {len(record['classes'])} classes,"
        f" pooling {record['pooling']}",
        f"apart       largest differences of a probability, each from the step before: {apart}",
    ]
    if record["pooling"] == "mean":
        lines.append(
            "NOTE        AutoModelForSequenceClassification loads it and pools the last token, as its class"
            " does: other answers. lora-recipes predict and serve pool as it was trained"
        )
    lines += [f"NOTE        {note}" for note in record["not_proven"]]
    return "\n".join([*lines, f"{shown(output)}/"])
