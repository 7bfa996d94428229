"""Is a checkpoint what its config.json says? Asked before anything is loaded, of the headers of its files;
and again of what transformers reports of loading it, here, where everything that is trained, merged or asked
is loaded.
"""

import contextlib
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from lora_recipes.core import base_fit, weights
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.core.weights import Stored
from lora_recipes.core.yamlfile import shown
from lora_recipes.model import parts
from lora_recipes.recipe.base import Base, Folder, unread

# Dtypes of safetensors in which weights stand as themselves; in others they are codes that need scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COUNTERS = ("I64", "BOOL")  # position_ids, masks: buffers that old checkpoints hold
# Where GPTQ, AWQ and ModelOpt wrote how a checkpoint is quantised before config.json said it.
QUANTISED_BY = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_WHOLE = (
    "name the checkpoint that it was made from, in 16 or 32 bits: model.quantize: nf4 trains that in 4 bits,"
    " and it can be merged and served"
)
_ANEW = "fetch it anew"
_WIDER = ("F64", "F32", "BF16")  # dtypes with numbers that float16 has not
_AT_ONCE = 2**20  # numbers of a tensor that are looked at together
# What rounds to infinity in float16, and what to zero (to even): IEEE 754.
_INFINITE, _ZERO = 65520, 2**-25


def check(base: Base, planned: PreTrainedModel) -> list[str]:
    """Raise RecipeError where the base's weights are not what its config.json says, or another model than
    `planned`; return what is worth a warning.

    Reads the config and the headers of the files; the values too where model.dtype is float16 and they are
    stored in a dtype with larger or smaller ones. What is not on this machine yet is seen when it is loaded.
    """
    folder = base.folder
    if base.recipe.model.weights == "random" or (folder is None and (base.contract or base.maker)):
        return []
    config = base.real_config()
    raise_if(unfit(base, config))
    raise_if(contract_differences(base, config))
    tensors = _tensors(base)
    if tensors is None and _given(base):
        return [f"{base.name} has no weights: the plan is of its config.json alone, and training needs them"]
    if tensors is None:
        half = base.recipe.model.dtype == "float16"
        return [f"{base.name} is not here: that float16 holds its numbers was not looked at"] if half else []
    raise_if(_codes(base, tensors))
    model, report = _without_bytes(base, config, tensors)
    raise_if(faults(base, config, model, report))
    raise_if(_other_model(base, model, planned) + _untied(base, model, tensors))
    return _dtypes(base, config, tensors) + _in_float16(base, tensors, set(report["unexpected_keys"]))


def load(source: Base | Folder, kind: Any = None, attn_at: str = "", **options: Any) -> Any:
    """The model of `source`, whole: `kind.from_pretrained` with `options`, and nothing of what it only warns
    about. RecipeError, at `attn_at` where it is attn_implementation.

    `kind`: a class of transformers; None for the one that trains (model/parts.py).
    """
    raise_if(unfit(source, config := source.real_config()))
    tensors = _tensors(source)
    if tensors is None and _given(source):
        first, second = weights.NAMES
        gone = f"{shown(Path(source.weights) / first)}: not there, nor {second}, nor an index of either"
        raise RecipeError(Problem(source.at, gone, "name a folder with a whole checkpoint"))
    raise_if(_codes(source, tensors or {}))
    if kind is None:
        text = trained(source, config, tensors)
        if text.mapped and tensors is None and isinstance(source, Base):
            text = trained(source, config, _names_on_hub(source))
        kind, options = text.kind, {"config": text.config, "key_mapping": text.names, **options}
    try:
        # Another shape would stop it in the middle; so it is reported with all else that is wrong.
        with quietly():
            model, report = kind.from_pretrained(
                source.weights,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        at = attn_at if attn_at and "attn" in str(error) else source.at
        do = "check the name, the network, the login and attn_implementation" if attn_at else _ANEW
        raise RecipeError(Problem(at, *unread(error, source.name, do))) from None
    # Its files again: a base of the hub may have come only now.
    raise_if(faults(source, config, model, report) + _codes(source, _tensors(source) or {}))
    raise_if(untied(source, model) + _beyond(source, model))
    return parts.frozen(model)


def on_shapes(source: Folder, kind: Any = None, **options: Any) -> PreTrainedModel:
    """The model of `source` on the meta device, whole: as `load` loads it, but for the bytes. RecipeError as
    there.
    """
    raise_if(unfit(source, config := source.real_config()))
    tensors = _tensors(source) or {}
    raise_if(_codes(source, tensors))
    found = parts.Trained(kind, config) if kind else trained(source, config, tensors)
    try:
        model, report = _on_meta(found, tensors, **options)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(Problem(source.at, *unread(error, source.name, _ANEW))) from None
    raise_if(faults(source, config, model, report) + _untied(source, model, tensors))
    return model


def trained(
    source: Base | Folder, config: PreTrainedConfig, stored: dict[str, Stored] | list[str] | None
) -> parts.Trained:
    """What trains of the checkpoint `source` with `config`, whose files hold `stored` (names, or tensors).
    RecipeError where nothing in it continues text.

    A text model is taken alone only where transformers loads it whole from these files, by its own names for
    it or by ours; it is tried on shapes.
    """
    try:
        found = parts.of(config, stored)
        if found and found.config is not config and isinstance(stored, dict):
            plain = replace(found, names=None)
            if not found.mapped and _loads(_Tried.of(plain, stored)):
                return plain
            if not _loads(_Tried.of(found, stored)):
                found = parts.whole(config) if found.mapped else plain
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        do = "install what it needs, or name a checkpoint of a text model alone"
        raise RecipeError(Problem(source.at, *unread(error, source.name, do))) from None
    if found is None:
        raise RecipeError(_no_text(source, config))
    return found if isinstance(stored, dict) or found.mapped else replace(found, names=None)


@dataclass(frozen=True)
class _Tried:
    """A text model and the tensors it is to be loaded from, which an answer is kept by."""

    kind: Any
    names: tuple[tuple[str, str], ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    found: parts.Trained = field(compare=False)
    stored: dict[str, Stored] = field(compare=False)

    @classmethod
    def of(cls, found: parts.Trained, stored: dict[str, Stored]) -> "_Tried":
        """Those of `found` and `stored`."""
        shapes = tuple((name, tensor.shape) for name, tensor in stored.items())
        return cls(found.kind, tuple((found.names or {}).items()), shapes, found, stored)


@functools.lru_cache(maxsize=8)
def _loads(tried: _Tried) -> bool:
    """Does transformers find each tensor of it?"""
    return not _on_meta(tried.found, tried.stored)[1]["missing_keys"]


def planned(base: Base) -> parts.Trained:
    """What trains of `base`, by its contract or its config.json, and by its files where they are here."""
    config = base.config()
    several = config.get_text_config() is not config
    here = several and base.folder is not None and base.recipe.model.weights != "random"
    return trained(base, config, _tensors(base) if here else None)


def unnamed(base: Base, modules: list[str]) -> list[Problem]:
    """Those of the `modules` that get an adapter which the base's files hold under no name that a merge, or
    vLLM, would find."""
    tensors = _tensors(base) or {}
    lost = [m for m in modules if base_fit.renamed(m, tensors) is None] if tensors else []
    found = f"{base.name} holds {len(lost)} of the {len(modules)} adapted modules under other names:"
    do = "neither merge nor vLLM would find them: fetch it as it was published"
    return [Problem(base.at, f"{found} {listed(lost, 3)}", do)] if lost else []


def _names_on_hub(source: Base) -> list[str] | None:
    """The names of its tensors, by the headers of its files on the hub; None where it has no safetensors."""
    try:
        found = get_safetensors_metadata(source.weights, revision=source.revision)
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError, ValueError):
        return None  # from_pretrained says what is wrong with it
    return list(found.weight_map)


def _no_text(base: Base | Folder, config: PreTrainedConfig) -> Problem:
    named = listed(config.architectures or [type(config).__name__])
    found = f"{base.name} is {named}: no causal language model that transformers loads as one"
    return Problem(base.at, found, "name a checkpoint that continues text (its class ends in ForCausalLM)")


def contract_differences(base: Base, real: PreTrainedConfig) -> list[Problem]:
    """Where the checkpoint's config (`real`) departs from the contract; empty when they agree or there is
    none."""
    if base.contract is None or base.recipe.model.weights == "random":
        return []
    where, do = base.recipe.at("model", "contract"), "correct the contract, or name_or_path"
    found = base.contract.differences(real.get_text_config().to_dict())
    return [Problem(where, f"the plan describes another model: {line}", do) for line in found]


def unfit(base: Base | Folder, config: PreTrainedConfig) -> list[Problem]:
    """Is it quantised already, or no causal language model? By its config.json (`config`) alone."""
    folder, where = base.folder, base.at
    for part in (config, parts.text(config) or config):
        for key in ("quantization_config", "compression_config"):
            if given := getattr(part, key, None):
                given = given if isinstance(given, dict) else given.to_dict()
                how = given.get("quant_method") or key
                return [
                    Problem(where, f"{base.name} is quantised already ({how}, by its config.json)", _WHOLE)
                ]
    if folder and (beside := [name for name in QUANTISED_BY if (folder / name).is_file()]):
        return [Problem(where, f"{base.name} is quantised already ({beside[0]} is in it)", _WHOLE)]
    masked = [name for name in config.architectures or [] if name.endswith("ForMaskedLM")]
    return [_no_text(base, config)] if masked or parts.of(config) is None else []


def faults(
    base: Base | Folder, config: PreTrainedConfig, model: PreTrainedModel, report: dict[str, Any]
) -> list[Problem]:
    """What transformers reports of loading `model` (`output_loading_info`): tensors that are missing, left
    over, or of another shape.

    `config`: of the checkpoint, which may have parts beside the text model.
    """
    name, found = type(model).__name__, []
    if missing := sorted(report["missing_keys"]):
        head: Any = model.get_output_embeddings()
        of_head = [n for n, p in model.named_parameters() if head is not None and p is head.weight]
        do = f"they would begin at random: {_ANEW}, or correct its config.json (num_hidden_layers?)"
        if missing == of_head:
            do = "is its head its embedding? Then write tie_word_embeddings: true into its config.json"
        said = f"{base.name} lacks {len(missing)} of the tensors of {name}: {listed(missing, 3)}"
        found.append(Problem(base.at, said, do))
    if extra := sorted(_left_over(config, model, report["unexpected_keys"])):
        said = f"{name} has no place for {len(extra)} of the tensors in {base.name}: {listed(extra, 3)}"
        do = "name a checkpoint of this class, or correct its config.json (num_hidden_layers?)"
        found.append(Problem(base.at, said, do))
    for key, stored, built in sorted(report["mismatched_keys"])[:3]:
        said = f"{key} is {list(stored)} in {base.name} and {list(built)} by its config.json"
        found.append(Problem(base.at, said, f"correct its config.json, or {_ANEW}"))
    for error in report["error_msgs"][:3]:
        found.append(Problem(base.at, *unread(RuntimeError(error), base.name, _ANEW)))
    return found


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own table of what it missed, which `faults` says, and without its progress
    bars."""
    logger, bars = logging.getLogger("transformers.modeling_utils"), hf_logging.is_progress_bar_enabled()
    logger.addFilter(_nothing)  # at a higher level of logging it would say other things
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(_nothing)
        if bars:
            hf_logging.enable_progress_bar()


def _nothing(record: logging.LogRecord) -> bool:
    return False


def untied(base: Base | Folder, model: PreTrainedModel) -> list[Problem]:
    """Weights of the loaded `model` that its config ties, and that transformers left apart since they
    differ."""
    apart = set(model.get_expanded_tied_weights_keys(all_submodels=True)) - set(model.all_tied_weights_keys)
    return [_apart(base, name) for name in sorted(apart)[:1]]


def _apart(base: Base | Folder, name: str) -> Problem:
    found = (
        f"config.json of {base.name} ties {name} to the embedding (tie_word_embeddings), but the file holds"
        " another one"
    )
    do = "write tie_word_embeddings: false into its config.json: vLLM would serve the tied one"
    return Problem(base.at, found, do)


def _left_over(config: PreTrainedConfig, model: PreTrainedModel, names: set[str]) -> list[str]:
    """Those of `names` that are no other part of a checkpoint with several (a vision tower), and no
    prediction of further tokens (MTP), which nothing here trains."""
    text, several = config.get_text_config(), config.get_text_config() is not config
    own = {".".join(name.split(".")[:2]) for name in model.state_dict()}
    layers = getattr(text, "num_hidden_layers", 0)
    further = range(layers, layers + (getattr(text, "num_nextn_predict_layers", 0) or 0))
    mtp = re.compile("|".join([r"(^|\.)mtp(\.|_|$)", *(rf"\blayers\.{i}\." for i in further)]))
    return [n for n in names if not mtp.search(n) and (not several or ".".join(n.split(".")[:2]) in own)]


def _given(base: Base | Folder) -> bool:
    """Is it a folder that somebody named, rather than one of the hub's cache, which may be filled later?"""
    return Path(base.weights).is_dir()


def _tensors(base: Base | Folder) -> dict[str, Stored] | None:
    """The tensors of its files; None where they are not fetched yet, and where a folder has none at all."""
    folder = base.folder
    if folder is None:
        return None
    try:
        files = weights.files(folder)
    except ValueError as error:
        raise RecipeError(Problem(base.at, f"{base.name}: {error}", _ANEW)) from None
    if gone := [path for path in files if not path.is_file()]:
        if not _given(base) or gone == [folder / weights.NAMES[0]]:
            return None
        found = f"{listed([shown(path) for path in gone], 3)}: not there"
        if other := [name for name in weights.NAMES if (folder / name).is_file()]:
            found += f" ({listed(other)} is read only where no index names other files)"
        raise RecipeError(Problem(base.at, found, "name a folder with a whole checkpoint"))
    tensors: dict[str, Stored] = {}
    problems = []
    for path in files:
        try:
            tensors |= weights.read(path)
        except ValueError as error:
            problems.append(Problem(base.at, f"{shown(path)} {error}", _ANEW))
    raise_if(problems)
    return tensors


def _codes(base: Base | Folder, tensors: dict[str, Stored]) -> list[Problem]:
    """Weights that stand in codes. Old checkpoints also hold masks as bytes, which end in `bias`."""
    kinds = (*DTYPES, *COUNTERS)
    odd = {
        name: stored.dtype
        for name, stored in sorted(tensors.items())
        if stored.dtype not in kinds and len(stored.shape) > 1 and not name.endswith("bias")
    }
    found = (
        f"{base.name} is quantised already: it stores {listed(odd, 3)} as {listed(sorted(set(odd.values())))}"
    )
    return [Problem(base.at, found, _WHOLE)] if odd else []


def _without_bytes(
    base: Base, config: PreTrainedConfig, tensors: dict[str, Stored]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and the report of transformers' own loading, renaming and joining of tensors included, from
    shapes alone."""
    found = trained(base, config, tensors)
    try:
        return _on_meta(found, tensors)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(Problem(base.at, *unread(error, base.name, _ANEW))) from None


def _on_meta(
    found: parts.Trained, tensors: dict[str, Stored], **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    text_class: Any = found.kind
    state = {
        name: torch.empty(stored.shape, dtype=DTYPES.get(stored.dtype, torch.int64), device="meta")
        for name, stored in tensors.items()
    }
    with quietly():
        model, report = text_class.from_pretrained(
            None,
            config=found.config,
            state_dict=state,
            key_mapping=found.names,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    return model, report


def _other_model(base: Base, model: PreTrainedModel, planned: PreTrainedModel) -> list[Problem]:
    """A checkpoint that loads as another class than its contract describes."""
    real, text = model.num_parameters(), planned.num_parameters()
    if type(model) is type(planned) or real == text:
        return []
    found = (
        f"{base.name} loads as {type(model).__name__} of {real:,} parameters, the contract is"
        f" {type(planned).__name__} of {text:,}"
    )
    do = "state the config of the checkpoint in the contract, all its parts; or leave the contract out"
    return [Problem(base.at, found, do)]


def _untied(base: Base | Folder, model: PreTrainedModel, tensors: dict[str, Stored]) -> list[Problem]:
    for name, source in model.all_tied_weights_keys.items():
        head, embedding = (_stored(model, key, tensors) for key in (name, source))
        if head and embedding and not weights.alike(head, embedding):
            return [_apart(base, name)]
    return []


def _stored(model: PreTrainedModel, name: str, tensors: dict[str, Stored]) -> Stored | None:
    """Where a parameter of `model` stands; old checkpoints leave out the prefix."""
    return tensors.get(name) or tensors.get(name.removeprefix(f"{model.base_model_prefix}."))


def _dtypes(base: Base, config: PreTrainedConfig, tensors: dict[str, Stored]) -> list[str]:
    """A warning where the config names another dtype than most bytes have."""
    sizes: Counter[str] = Counter()
    for each in tensors.values():
        sizes[each.dtype] += each.size
    stored = DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None
    said = config.dtype or config.get_text_config().dtype
    if not stored or not said or stored == said:
        return []
    return [
        f"{base.name} stores {_word(stored)} weights, its config.json says {_word(said)}: a merge is"
        " written, and vLLM serves, in the latter"
    ]


def _in_float16(base: Base, tensors: dict[str, Stored], unused: set[str]) -> list[str]:
    """What becomes of the numbers in float16, as a warning. RecipeError where one becomes infinite.

    Those `unused` and single numbers (masks' fillers) are no weights.
    """
    if base.recipe.model.dtype != "float16":
        return []
    wider = {n: t for n, t in tensors.items() if t.dtype in _WIDER and t.shape and n not in unused}
    files = {path: _extents(*weights.state(path)) for path in {t.path for t in wider.values()}}
    found = {name: files[stored.path][name] for name, stored in wider.items()}
    limit = f"{torch.finfo(torch.float16).max:,.0f}"
    if beyond := [name for name, extent in found.items() if extent[2]]:
        count, most = sum(found[n][2] for n in beyond), max(found[n][0] for n in beyond)
        said = (
            f"float16 ends at {limit}: {count:,} of the numbers of {base.name} are beyond it (the largest is"
            f" {most:.4g}), in {listed(beyond, 3)}"
        )
        where = base.recipe.at("model", "dtype")
        raise RecipeError(Problem(where, said, "model.dtype: bfloat16, or float32, holds them"))
    zeros, most = sum(e[1] for e in found.values()), max((e[0] for e in found.values()), default=0.0)
    if not zeros and not any(t.dtype == "BF16" for t in wider.values()):
        return []
    total = sum(t.size // DTYPES[t.dtype].itemsize for t in wider.values())
    kinds = listed(sorted({_word(DTYPES[t.dtype]) for t in wider.values()}))
    return [
        f"{base.name} stores {kinds} weights, model.dtype is float16, which ends at {limit}: the largest"
        f" of its {total:,} numbers is {most:.4g}, {zeros:,} become zero. What the layers compute was not"
        " looked at: bfloat16 and float32 hold more"
    ]


@functools.lru_cache(maxsize=256)
def _extents(path: Path, size: int, changed: int, inode: int) -> dict[str, tuple[float, int, int]]:
    """Of each tensor in a file: the largest |number|, how many become zero in float16, and how many are
    infinite there, or no number. The arguments are `weights.state`. 0.7 GB of bfloat16 a second of one
    core's time (measured).
    """
    found = {}
    for name, stored in weights.read(path).items():
        if stored.dtype not in _WIDER:
            continue
        exact = torch.float64 if stored.dtype == "F64" else torch.float32
        most, zeros, beyond = 0.0, 0, 0
        for part in stored.parts(max(1, _AT_ONCE // max(1, math.prod(stored.shape[1:])))):
            if part.numel():
                absolute = part.to(exact).abs()
                largest = absolute.max().item()  # NaN where one is
                zeros += int((absolute <= _ZERO).count_nonzero() - (absolute == 0).count_nonzero())
                if not largest < _INFINITE:
                    beyond += int(absolute.numel() - (absolute < _INFINITE).count_nonzero())
                most = largest if math.isnan(largest) else max(most, largest)
        found[name] = (most, zeros, beyond)
    return found


def _beyond(source: Base | Folder, model: PreTrainedModel) -> list[Problem]:
    """Weights of a model in float16 that it does not hold, for those that `check` could not look at."""
    bad = [n for n, p in model.named_parameters() if p.dtype is torch.float16 and not p.isfinite().all()]
    found = f"float16 does not hold {len(bad)} of the tensors of {source.name}: {listed(bad, 3)}"
    return [Problem(source.at, found, "bfloat16 or float32 do")] if bad else []


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
