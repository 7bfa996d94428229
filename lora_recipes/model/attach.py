"""Trained adapters on their base, as they were trained: same weights, same dtype or 4-bit; and no tensor left
behind.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_recipes.core import adapter_folder, base_fit, locate, provenance
from lora_recipes.core import head as core_head
from lora_recipes.core import stops as files
from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.core.head import Head
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.yamlfile import shown
from lora_recipes.data.labels import padded
from lora_recipes.model import build, checkpoint, heads
from lora_recipes.recipe.base import Folder


def base(folder: Path, known: Provenance | None) -> PreTrainedModel:
    """The model in `folder` for asking, in the dtype (and NF4) that provenance tells, else its own; on the
    GPU where there is one. RecipeError where it is not whole.
    """
    dtype = getattr(torch, known.dtype) if known else "auto"
    options: dict[str, Any] = (
        {"quantization_config": build.nf4(known.dtype)} if known and known.quantize else {}
    )
    loaded = checkpoint.load(Folder(folder), dtype=dtype, **options)
    if torch.cuda.is_available() and not options:  # bitsandbytes has placed 4-bit weights itself
        loaded = loaded.to("cuda")
    return build.trainable_4bit(loaded).eval()


def plain(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder` in `dtype`, not quantised."""
    loaded: PreTrainedModel = checkpoint.load(Folder(folder), dtype=dtype)
    return loaded.eval()


def attach(model: PreTrainedModel, adapters: dict[str, Adapter]) -> PeftModel:
    """`model` with all `adapters` under these names, the first one active. RecipeError when one does not go
    on it whole.

    PEFT only warns about tensors without a place, and leaves modules without a tensor at their random start.
    """
    attached = _put(model, adapters)
    for name, adapter in adapters.items():
        got = get_peft_model_state_dict(attached, adapter_name=name, save_embedding_layers=False)
        wanted = {
            n: t for n, t in load_file(adapter.file).items() if ".base_layer." not in n or ".lora_" in n
        }  # an adapted embedding is saved whole too
        saved = {got[n].data_ptr() for n in got if n in wanted}  # tensors of tied modules are saved once
        got = {n: t for n, t in got.items() if n in wanted or t.data_ptr() not in saved}
        # PEFT keeps 16-bit adapters as float32: the same numbers.
        lost = [
            n
            for n in {**got, **wanted}
            if n not in got or n not in wanted or not torch.equal(got[n].cpu().float(), wanted[n].float())
        ]
        raise_if(_lost(adapter, lost, got))
    return attached.eval()


def on_shapes(model: PreTrainedModel, adapter: Adapter) -> tuple[PeftModel, dict[str, str]]:
    """`model`, on the meta device, with the layers of `adapter`, which are there too; and which tensor of its
    file each of their parameters is. RecipeError when it does not go on it whole.
    """
    attached = _put(model, {"default": adapter}, low_cpu_mem_usage=True)
    places = {n: _saved(n, adapter) for n, _ in attached.named_parameters() if ".default" in n}
    wanted = [n for n in adapter.tensors if ".base_layer." not in n or ".lora_" in n]
    raise_if(_lost(adapter, sorted({*places.values()} ^ {*wanted}), places.values()))
    return attached, places


def _saved(parameter: str, adapter: Adapter) -> str:
    """What PEFT calls `parameter` of a layer in its file."""
    name = parameter.replace(".modules_to_save.default.", ".").replace(".default", "", 1)
    short = name.removesuffix(".weight")  # a magnitude of DoRA
    return short if short in adapter.tensors else name


def _put(model: PreTrainedModel, adapters: dict[str, Adapter], **options: Any) -> PeftModel:
    (first, adapter), *others = adapters.items()
    try:
        attached = PeftModel.from_pretrained(model, adapter.path, adapter_name=first, **options)
        for name, adapter in others:
            attached.load_adapter(adapter.path, adapter_name=name, **options)
    except (KeyError, ValueError, RuntimeError) as error:
        kind, said = type(error).__name__, str(error).splitlines()[0][:200]
        found = f"does not go on its base whole: PEFT cannot put it on {type(model).__name__}: {kind}: {said}"
        do = "give the adapter as training saved it, and the class that it was trained on"
        raise RecipeError(Problem(shown(adapter.path), found, do)) from error
    return attached


def _lost(adapter: Adapter, lost: list[str], placed: Collection[str]) -> list[Problem]:
    """Tensors of `adapter` or of its layers that have no counterpart, those with a place aside."""
    copied = set(lost) - set(placed)
    do = "give the adapter as training saved it, not the copy for serving"
    do = do if copied else "another version of PEFT?"
    found = f"does not go on its base whole: {listed(lost, 3)}"
    return [Problem(shown(adapter.path), found, do)] if lost else []


def classifier(folder: Path, base: Path | None = None) -> tuple[Any, PreTrainedTokenizerBase, Head]:
    """The classifier in `folder`, an adapter on its base (`base` in place of the one it names) or a merged
    model, in eval mode; its tokenizer, and what its outputs are. RecipeError where it is not whole, or not as
    training saved it.
    """
    known, head = provenance.read(folder), core_head.needed(folder)
    if (folder / "adapter_config.json").is_file():
        adapter = adapter_folder.read(folder)
        source = locate.base_of({folder.name: adapter}, base)
        raise_if(base_fit.fit(adapter, source, known))
        model: Any = on_base(adapter, source, known, head)
    else:
        source, model = folder, merged(folder, head)
        if torch.cuda.is_available():
            model = model.to("cuda")
    return model.eval(), padded(tokenizer(folder, source)), head


def on_base(adapter: Adapter, source: Path, known: Provenance | None, head: Head) -> PeftModel:
    """The classifier of `adapter` on the base in `source`, as it was trained."""
    return attach(heads.of(base(source, known), head.labels, head.pooling), {"default": adapter})


def merged(folder: Path, head: Head, **options: Any) -> PreTrainedModel:
    """The merged classifier in `folder`, pooled as `head` says: transformers' own class pools the last token.
    `options`: of from_pretrained.
    """
    with checkpoint.quietly():
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False, **({"dtype": "auto"} | options)
        )
    if lost := sorted(report["missing_keys"] | report["unexpected_keys"]):
        found = f"{len(lost)} tensors are missing or have no place: {listed(lost, 3)}"
        raise RecipeError(Problem(shown(folder), found, "merge it again"))
    score = loaded.score.weight
    model: Any = heads.of(loaded, head.labels, head.pooling)
    if model.score.weight.shape != score.shape:
        found = f"its head has {score.shape[0]} outputs, and labels.json {len(head.labels)} classes"
        raise RecipeError(Problem(shown(folder), found, "merge it again"))
    model.score.weight.data.copy_(score.data)
    whole: PreTrainedModel = model.eval()
    return whole


def stops(result: Path, tokenizer: Any, model: Any) -> list[int]:
    """Where a reply of `model` ends, by token id: as training wrote it into `result`; for one from elsewhere
    the end of its `tokenizer`, and where its base stops.
    """
    own = [
        i for i in (tokenizer.eos_token_id, *files.ids(model.generation_config.eos_token_id)) if i is not None
    ]
    return files.of(result) or list(dict.fromkeys(own))


def tokenizer(result: Path, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that training saved in `result`; that of the base in `folder` where it saved none."""
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        result if (result / "tokenizer_config.json").is_file() else folder,
        trust_remote_code=False,
    )
    return found
