"""Is a checkpoint what its config.json says? Asked before anything is loaded, of the headers of its files;
and again of what transformers reports of loading it.
"""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import logging as hf_logging

from lora_recipes.core import safetensors
from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.core.safetensors import Place
from lora_recipes.core.yamlfile import shown
from lora_recipes.recipe.base import Base, unread

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


def check(base: Base, planned: PreTrainedModel) -> list[str]:
    """Raise RecipeError where the base's weights are not what its config.json says, or another model than
    `planned`; return what is worth a warning.

    Reads the config and the headers of safetensors files. What is not on this machine yet, and other formats,
    are seen when they are loaded.
    """
    folder = base.folder
    if base.recipe.model.weights == "random" or (folder is None and (base.contract or base.maker)):
        return []
    config = base.real_config()
    raise_if(unfit(base, config))
    raise_if(contract_differences(base, config))
    tensors = _tensors(base)
    if tensors is None:
        return []
    raise_if(_codes(base, tensors))
    model, report = _without_bytes(base, config, tensors)
    raise_if(faults(base, config, model, report))
    raise_if(_other_model(base, model, planned) + _untied(base, model, tensors))
    return _dtypes(base, config, tensors)


def contract_differences(base: Base, real: PreTrainedConfig) -> list[Problem]:
    """Where the checkpoint's config (`real`) departs from the contract; empty when they agree or there is
    none."""
    if base.contract is None or base.recipe.model.weights == "random":
        return []
    where, do = base.recipe.at("model", "contract"), "correct the contract, or name_or_path"
    found = base.contract.differences(real.get_text_config().to_dict())
    return [Problem(where, f"the plan describes another model: {line}", do) for line in found]


def unfit(base: Base, config: PreTrainedConfig) -> list[Problem]:
    """Is it quantised already, or no causal language model? By its config.json (`config`) alone."""
    folder, where = base.folder, base.at
    for part in (config, config.get_text_config()):
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
    if masked or type(config) not in AutoModelForCausalLM._model_mapping:
        named = listed(config.architectures or [type(config).__name__])
        found = f"{base.name} is {named}: no causal language model that transformers loads as one"
        return [
            Problem(where, found, "name a checkpoint that continues text (its class ends in ForCausalLM)")
        ]
    return []


def in_codes(base: Base) -> list[Problem]:
    """Is it quantised already, by the dtypes of its files? For a base that was fetched after `check`."""
    return _codes(base, _tensors(base) or {})


def faults(
    base: Base, config: PreTrainedConfig, model: PreTrainedModel, report: dict[str, Any]
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


def untied(base: Base, model: PreTrainedModel) -> list[Problem]:
    """Weights of the loaded `model` that its config ties, and that transformers left apart since they
    differ."""
    apart = set(model.get_expanded_tied_weights_keys(all_submodels=True)) - set(model.all_tied_weights_keys)
    return [_apart(base, name) for name in sorted(apart)[:1]]


def _apart(base: Base, name: str) -> Problem:
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


def _tensors(base: Base) -> dict[str, Place] | None:
    """The tensors of its safetensors files; None where they are of another format, or not fetched yet."""
    given, folder = Path(base.weights).is_dir(), base.folder
    if folder is None:
        return None
    try:
        gone = [path for path in safetensors.files(folder) if not path.is_file()]
    except (ValueError, KeyError, AttributeError):
        index = folder / "model.safetensors.index.json"
        raise RecipeError(Problem(base.at, f"{shown(index)} names no files", _ANEW)) from None
    if gone and (not given or any(folder.glob("*.bin")) or any(folder.glob("*.gguf"))):
        return None
    if gone:
        found = f"{listed([shown(path) for path in gone], 3)}: not there, and no other weights"
        raise RecipeError(Problem(base.at, found, "name a folder with a whole checkpoint"))
    tensors: dict[str, Place] = {}
    problems = []
    for path in safetensors.files(folder):
        try:
            tensors |= {name: Place(path, tensor) for name, tensor in safetensors.header(path).items()}
        except ValueError as error:
            problems.append(Problem(base.at, f"{shown(path)} {error}", _ANEW))
    raise_if(problems)
    return tensors


def _codes(base: Base, tensors: dict[str, Place]) -> list[Problem]:
    """Weights that stand in codes. Old checkpoints also hold masks as bytes, which end in `bias`."""
    kinds = (*DTYPES, *COUNTERS)
    odd = {
        name: place.tensor.dtype
        for name, place in sorted(tensors.items())
        if place.tensor.dtype not in kinds and len(place.tensor.shape) > 1 and not name.endswith("bias")
    }
    found = (
        f"{base.name} is quantised already: it stores {listed(odd, 3)} as {listed(sorted(set(odd.values())))}"
    )
    return [Problem(base.at, found, _WHOLE)] if odd else []


def _without_bytes(
    base: Base, config: PreTrainedConfig, tensors: dict[str, Place]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and the report of transformers' own loading, renaming and joining of tensors included, from
    shapes alone."""
    state = {
        name: torch.empty(
            place.tensor.shape, dtype=DTYPES.get(place.tensor.dtype, torch.int64), device="meta"
        )
        for name, place in tensors.items()
    }
    kind: Any = _get_model_class(config, AutoModelForCausalLM._model_mapping)
    part = config.get_text_config() if kind.config_class is type(config.get_text_config()) else config
    try:
        with quietly():
            model, report = kind.from_pretrained(
                None,
                config=part,
                state_dict=state,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(Problem(base.at, *unread(error, base.name, _ANEW))) from None
    return model, report


def _other_model(base: Base, model: PreTrainedModel, planned: PreTrainedModel) -> list[Problem]:
    """A checkpoint of several parts whose class for text brings the others along."""
    whole, text = model.num_parameters(), planned.num_parameters()
    if type(model) is type(planned) or whole == text:
        return []
    found = (
        f"{base.name} loads as {type(model).__name__} of {whole:,} parameters, its text model"
        f" {type(planned).__name__} has {text:,}: the other parts are not planned here"
    )
    return [Problem(base.at, found, "name a checkpoint of the text model alone")]


def _untied(base: Base, model: PreTrainedModel, tensors: dict[str, Place]) -> list[Problem]:
    for name, source in model.all_tied_weights_keys.items():
        head, embedding = (_stored(model, key, tensors) for key in (name, source))
        if head and embedding and not safetensors.alike(head, embedding):
            return [_apart(base, name)]
    return []


def _stored(model: PreTrainedModel, name: str, tensors: dict[str, Place]) -> Place | None:
    """Where a parameter of `model` stands; old checkpoints leave out the prefix."""
    return tensors.get(name) or tensors.get(name.removeprefix(f"{model.base_model_prefix}."))


def _dtypes(base: Base, config: PreTrainedConfig, tensors: dict[str, Place]) -> list[str]:
    """Warnings: a config that names another dtype than most bytes have, and numbers that model.dtype may not
    hold."""
    sizes: Counter[str] = Counter()
    for place in tensors.values():
        sizes[place.tensor.dtype] += place.tensor.end - place.tensor.start
    stored = DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None
    said = config.dtype or config.get_text_config().dtype
    found = []
    if stored and said and stored != said:
        found.append(
            f"{base.name} stores {_word(stored)} weights, its config.json says {_word(said)}: a merge is"
            " written, and vLLM serves, in the latter"
        )
    if stored is torch.bfloat16 and base.recipe.model.dtype == "float16":
        found.append(
            f"{base.name} stores bfloat16 weights, model.dtype is float16: numbers above 65,504 would be"
            " infinite; bfloat16 or float32 hold them"
        )
    return found


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
