"""Merge an adapter into its base, and prove it: `make merge RECIPE=x`. Reads the adapter folder, not what the
recipe meant.

An adapter that was trained on an NF4 base learned to correct that base, rounding and all: it is merged into
the *dequantised* weights, never into the 4-bit ones, and not into those that were never quantised (facts and
figures: docs/serving.md).
"""

import json
import os
import resource
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import base_fit, cli, locate, provenance, safetensors
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.core.files import now, replace_folder, write
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.yamlfile import shown
from lora_recipes.model import build, embeddings
from lora_recipes.recipe.rules import PROMPTS
from lora_recipes.serving import export

# Mean KL and largest logit difference that a merge may show, by dtype. Measured on trained tiny adapters:
# float32 3e-8 / 6e-6, bfloat16 2e-5 / 6e-2 (weights are rounded once more); ten times that is a fault.
# float16 rounds finer; not measured.
TOLERANCE = {"float32": (1e-6, 1e-3), "bfloat16": (2e-4, 6e-1), "float16": (2e-4, 6e-1)}
PROBES = ("The", "Once upon a time", "Question: what is two and two? Answer:", "Guten Morgen, wie")
PROCESSORS = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)  # vLLM wants them of two-part models
GREEDY = 16  # tokens generated from each probe
Answers = list[
    tuple[torch.Tensor, list[int]]
]  # of each probe: logits [tokens, vocabulary], and the greedy continuation


@dataclass(frozen=True)
class Difference:
    """How far the merged model is from base + adapter: mean KL (nats a token), logit differences, and greedy
    tokens that agree.
    """

    kl_mean: float
    logit_max: float
    logit_mean: float
    greedy_equal: int
    greedy_total: int


def merge(
    folder: Path, output: Path, base: Path | None = None, dtype: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Merge the adapter in `folder` into its base and write a whole model to `output`; returns what
    merge.json says.

    `base` replaces the one that adapter_config.json names. RecipeError when the adapter does not fit, memory
    does not suffice, or the merged model answers otherwise than base + adapter; then nothing is left behind.
    """
    began = time.monotonic()
    if output.exists() or output.is_symlink():
        if not (output / "merge.json").is_file():
            raise RecipeError(
                Problem(
                    shown(output), "is there, and is no merged model (no merge.json in it)", "move it away"
                )
            )
        if not force:
            raise RecipeError(
                Problem(shown(output), "is already there", f"{cli.command(FORCE=True)} replaces it")
            )
    adapter = adapters.read(folder, anything=True)
    if (kind := adapter.config["peft_type"]) in PROMPTS:
        do = "its virtual tokens stand before each text: use it by PEFT"
        raise RecipeError(Problem(shown(folder), f"{kind} has no weights to merge", do))
    name = adapter.config.get("base_model_name_or_path") or "(none named)"
    source = base.absolute() if base else locate.local(name, adapter.config.get("revision"))
    if source is None or not (source / "config.json").is_file():
        do = f"give its folder: {cli.command(BASE='path')} (a hub model: hf download it first)"
        raise RecipeError(Problem(shown(folder), f"its base {source or name} is not a folder here", do))
    known = provenance.read(folder)
    raise_if(base_fit.fit(adapter, source, known))
    kind = dtype or _dtype(source)
    _enough_memory(source, kind, 2.5 if known and known.quantize else 1.25)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        record = _merge(adapter, known, source, temporary, kind)
        record |= {"seconds": round(time.monotonic() - began, 2), "at": now()}
        write(temporary / "merge.json", json.dumps(record, indent=2) + "\n")
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _dtype(source: Path) -> str:
    config = AutoConfig.from_pretrained(source)
    return str(config.dtype or config.get_text_config().dtype or torch.float32).removeprefix("torch.")


def _enough_memory(source: Path, dtype: str, times: float = 1.25) -> None:
    """The base once in `dtype`, and a quarter more for the adapter, the probes and the copy that is being
    written.

    For one that was trained in 4 bits: twice, as the dequantised weights stand beside it.
    """
    numbers = sum(_count(shape) for shape in safetensors.shapes(source).values())
    needed = int(times * numbers * getattr(torch, dtype).itemsize)
    free = psutil.virtual_memory().available
    if needed > free:
        found = f"merging in {dtype} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        do = (
            "merge on a larger machine"
            if dtype != "float32"
            else f"{cli.command(DTYPE='bfloat16')} needs half, or use a larger machine"
        )
        raise RecipeError(Problem(shown(source), found, do))


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _merge(
    adapter: adapters.Adapter, known: Provenance | None, source: Path, target: Path, dtype: str
) -> dict[str, Any]:
    """Load the class that the checkpoint names (a two-part one keeps its vision tower), attach, ask, merge,
    ask again, save.
    """
    architecture = AutoConfig.from_pretrained(source).architectures[0]
    target.mkdir(parents=True)
    export.export(adapter, source, target / "adapter")
    model = getattr(transformers, architecture).from_pretrained(source, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(
        adapter.path if (adapter.path / "tokenizer_config.json").is_file() else source
    )
    tokens = adapter.config.get("trainable_token_indices") or []
    embeddings.grow(
        model, tokens if isinstance(tokens, list) else [i for each in tokens.values() for i in each]
    )
    try:
        attached = PeftModel.from_pretrained(model, target / "adapter").eval()
    except (KeyError, ValueError, RuntimeError) as error:
        found = f"PEFT cannot put it on {architecture}: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise RecipeError(
            Problem(shown(adapter.path), found, "merge it with the class that it was trained on")
        ) from error
    layers = _attached(attached, adapters.read(target / "adapter", anything=True))
    chance = torch.randint(0, len(tokenizer), (1, 16), generator=torch.Generator().manual_seed(0))
    probes = [chance, *(tokenizer(text, return_tensors="pt")["input_ids"] for text in PROBES)]
    before = [_ask(attached, ids) for ids in probes]
    facts = {
        "adapter": shown(adapter.path),
        "base": str(source),
        "architecture": architecture,
        "dtype": dtype,
        "modules": layers,
    }
    if known and known.quantize:
        usual, (before, dequantised) = before, _as_trained(known, adapter.path, source, probes)
        facts |= {"quantize": known.quantize, "unquantised_base": asdict(_difference(before, usual))}
        _put(dequantised, attached, source)
    merged = attached.merge_and_unload(safe_merge=True)
    difference = _difference(before, [_ask(merged, ids) for ids in probes])
    _within(difference, dtype, adapter.path)
    shutil.rmtree(target / "adapter")
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for folder, name in [(adapter.path, provenance.FILE), *((source, name) for name in PROCESSORS)]:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return facts | asdict(difference) | {"max_rss_bytes": peak}


def _attached(attached: PeftModel, adapter: adapters.Adapter) -> int:
    """How many modules carry the adapter. RecipeError when it is not all there: PEFT leaves what it does not
    find as it began.
    """
    lora = adapter.config["peft_type"] == "LORA"
    layers = sum(isinstance(m, LoraLayer if lora else BaseTunerLayer) for m in attached.modules())
    holds = len(adapter.modules) if lora else layers
    if layers == 0 or layers != holds:
        found = f"PEFT attached {layers} modules, the adapter holds {holds}"
        raise RecipeError(Problem(shown(adapter.path), found, "the adapter does not fit this base"))
    saved = {
        name for name in adapter.tensors if ".base_layer." not in name
    }  # PEFT saves an adapted embedding whole beside its A and B
    if lost := saved - set(get_peft_model_state_dict(attached, save_embedding_layers=False)):
        found = f"PEFT did not attach {listed(sorted(lost), 3)}"
        raise RecipeError(Problem(shown(adapter.path), found, "the adapter does not fit this base"))
    return layers


def _as_trained(
    known: Provenance, folder: Path, source: Path, probes: list[torch.Tensor]
) -> tuple[Answers, dict[str, torch.Tensor]]:
    """The answers of the 4-bit base with its adapter, as it was trained; and the base's 4-bit weights,
    dequantised, by module name.
    """
    import bitsandbytes as bnb

    options = {"dtype": getattr(torch, known.dtype), "quantization_config": build.nf4(known.dtype)}
    base = build.trainable_4bit(AutoModelForCausalLM.from_pretrained(source, **options))
    linears: dict[str, Any] = {
        name: module for name, module in base.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }
    attached = PeftModel.from_pretrained(base, folder).eval()
    answers = [_ask(attached, ids) for ids in probes]
    dequantise = bnb.functional.dequantize_4bit
    return answers, {
        name: dequantise(m.weight.data, m.weight.quant_state).cpu() for name, m in linears.items()
    }


def _put(dequantised: dict[str, torch.Tensor], attached: PeftModel, source: Path) -> None:
    """Replace the weights of these modules of the base that carries the adapter."""
    names = safetensors.shapes(source)
    for name, tensor in dequantised.items():
        own = base_fit.renamed(name, names)
        assert own is not None, name
        module: Any = attached.get_base_model().get_submodule(own)
        getattr(module, "base_layer", module).weight.data.copy_(tensor)


@torch.no_grad()
def _ask(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Logits of every position of the probe (float32, [tokens, vocabulary]), and the greedy continuation."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    written = ids
    for _ in range(GREEDY):
        written = torch.cat(
            [written, model(input_ids=written, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
        )
    return logits, written[0, ids.shape[1] :].tolist()


def _difference(before: Answers, after: Answers) -> Difference:
    one, two = torch.cat([b for b, _ in before]), torch.cat([a for a, _ in after])
    kl = (
        torch.nn.functional.kl_div(
            two.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="none"
        )
        .sum(-1)
        .mean()
    )
    apart = (one - two).abs()
    equal = sum(
        x == y for (_, b), (_, a) in zip(before, after, strict=True) for x, y in zip(b, a, strict=True)
    )
    return Difference(
        max(kl.item(), 0.0), apart.max().item(), apart.mean().item(), equal, len(before) * GREEDY
    )


def _within(difference: Difference, dtype: str, path: Path) -> None:
    kl, logit = TOLERANCE[dtype]
    exact = dtype != "float32" or difference.greedy_equal == difference.greedy_total
    if not (difference.kl_mean <= kl and difference.logit_max <= logit and exact):
        found = f"the merged model is not base + adapter: {difference} (allowed: KL {kl:g}, logit {logit:g})"
        raise RecipeError(
            Problem(
                shown(path), found, "nothing was written; merge in float32, or serve the adapter unmerged"
            )
        )


def report(record: dict[str, Any], output: Path) -> str:
    """merge.json for a person."""
    same = f"{record['greedy_equal']} of {record['greedy_total']} greedy tokens equal"
    against = f"base in {record['quantize']} + adapter" if "quantize" in record else "base + adapter"
    unquantised = []
    if usual := record.get("unquantised_base"):
        unquantised = [f"(on the base that was never quantised, the usual way: KL {usual['kl_mean']:.1e})"]
    return "\n".join(
        [
            (
                f"{record['modules']} modules merged into {record['architecture']} in {record['dtype']},"
                f" {record['seconds']:.1f} s, peak memory {record['max_rss_bytes'] / 2**30:.2f} GiB"
            ),
            (
                f"against {against}: KL {record['kl_mean']:.1e} nats a token, logits differ by at most"
                f" {record['logit_max']:.1e} (mean {record['logit_mean']:.1e}), {same}"
            ),
            *unquantised,
            f"{shown(output)}/  with merge.json",
        ]
    )
