"""Write a contract from a checkpoint's config.json: `lora-recipes contract FOLDER_OR_HUB_ID`."""

import json
import re
import textwrap
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_recipes.core import files as places
from lora_recipes.core import hub, locate
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.yamlfile import shown
from lora_recipes.model import checkpoint
from lora_recipes.recipe import contract as contracts
from lora_recipes.recipe.base import Folder, unread
from lora_recipes.recipe.contract import Contract

# What every contract states where its class has such a key, equal to the class's default or not: a default
# may change from one transformers to the next. By transformers' own names; a class has them under its
# attribute_map.
_ALWAYS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "sliding_window",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
)
# What no plan reads: ids of tokens, dropout, positions by rotation, how weights begin, eps of norms, switches
# of generation.
_UNREAD = re.compile(
    r".*(token_ids?|token_index|dropout|pdrop|_eps|epsilon)|rope_(parameters|theta|scaling)|initializer_\w+"
    r"|original_max_position_embeddings"
    r"|use_cache|pretraining_tp|output_router_logits"
)
_FILES = ["config.json", "chat_template.jinja", "tokenizer_config.json"]


@dataclass(frozen=True)
class Made:
    """A contract that is to be written: its YAML, and beside it the chat template where TRL carries none that
    equals it."""

    file: Path
    text: str
    template: str | None
    contract: Contract
    warning: str = ""


def make(source: str, name: str | None = None) -> Made:
    """The contract of the checkpoint `source`, a folder or a hub id. `name`: of the contract in
    configs/models/, or a .yaml file (default: made of the source's last part). RecipeError where there is
    none to be made.
    """
    folder = _folder(source)
    config = Folder(folder).real_config()
    raise_if(checkpoint.unfit(Folder(folder), config))
    text = config.get_text_config()
    model = _without_weights(text, folder)
    stated = _stated(text, model)
    file = _file(name or Path(source).resolve().name if folder == Path(source) else name or source)
    template, carried, warning = _template(folder, file)
    published = (config.architectures or [""])[0]
    architecture = published if hasattr(transformers, published or "-") else type(model).__name__
    shapes = _shapes(model)
    of = source if folder != Path(source) else folder.resolve().name
    head = [
        f"# {of}: lora-recipes contract wrote this from its config.json, with transformers"
        f" {transformers.__version__}.",
        *([f"name_or_path: {source}"] if folder != Path(source) else []),
        f"architecture: {architecture}",
        *([f"chat_template: {template}"] if template else []),
        f"parameters: {sum(p.numel() for p in model.parameters())}",
        "config:",
    ]
    conv = any(isinstance(module, Conv1D) for module in model.modules())
    lines = [*head, *(f"  {_line(key, value)}" for key, value in stated.items())]
    lines += [f"shapes:  # [{'in, out], as Conv1D stores them' if conv else 'out, in]'}"]
    lines += [f"  {module}: [{out}, {into}]" for module, (out, into) in shapes.items()]
    body = "\n".join(lines) + "\n"
    return Made(file, body, carried, contracts.parse(body, file), warning)


def write(made: Made, force: bool = False) -> None:
    """Write the contract, and its chat template beside it. RecipeError where one is there, unless `force`."""
    jinja = made.file.with_suffix(".jinja")
    there = [file for file in (made.file, *([jinja] if made.template else [])) if file.exists()]
    if there and not force:
        do = "another --name NAME, or --force to replace it; --print shows what would be written"
        raise RecipeError([Problem(shown(file), "is already there", do) for file in there])
    if made.template:
        places.write(jinja, made.template)
    places.write(made.file, made.text)


def report(made: Made) -> str:
    """What was written, and how a recipe names it."""
    contract = made.contract
    named = contract.name if made.file.parent == contracts.CONTRACTS else made.file.name
    said = contract.chat_template or "none"
    lines = [
        f"{shown(made.file)}: {contract.architecture}, {contract.parameters:,} parameters,"
        f" {len(contract.shapes or {})} kinds of projection, chat template {said}",
        *([f"    {made.warning}"] if made.warning else []),
        f"    -> in a recipe: model.contract: {named}",
    ]
    return "\n".join(lines)


def _folder(source: str) -> Path:
    """Where the checkpoint's config.json is: the folder itself, or the cache's."""
    path = Path(source)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            base = json.loads((path / "adapter_config.json").read_text("utf-8")).get(
                "base_model_name_or_path"
            )
            raise RecipeError(Problem(source, "is an adapter, not a base model", f"name its base: {base}"))
        do = "name the folder of a whole checkpoint (config.json stands in it), or its hub id (owner/name)"
        raise RecipeError(Problem(source, "has no config.json", do))
    if not hub.is_id(source) or "/" not in source:
        raise RecipeError(Problem(source, "is no folder here", "a folder with config.json, or owner/name"))
    if silent := hub.silent():
        cached = locate.local(source)
        if cached is None or not (cached / "config.json").is_file():
            do = "name a folder that holds its config.json; or the same command again, with a network"
            raise RecipeError(Problem(source, f"is not on this machine, and {silent}", do))
        return cached
    try:
        fetched = Path(snapshot_download(source, allow_patterns=_FILES))
    except Exception as error:  # every kind of network and hub error; its first line says which
        found = f"the hub does not give it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        raise RecipeError(Problem(source, found, "check the name, the network and the login")) from None
    if not (fetched / "config.json").is_file():
        do = "name a repository of a whole checkpoint"
        raise RecipeError(Problem(source, "has no config.json on the hub", do))
    return fetched


def _without_weights(text: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        do = "name a checkpoint that continues text (its class ends in ForCausalLM)"
        raise RecipeError(Problem(shown(folder), *unread(error, "the text model", do))) from None
    return model


def _stated(text: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Any]:
    """The keys of the text model's config that a contract states: those of `_ALWAYS`, and of the others each
    that differs from the class's default, is read by a plan, and does not follow from the rest.

    AutoConfig makes the very shapes of `model` of them, or there is no contract.
    """
    given, default = text.to_dict(), type(text)().to_dict()
    names = [type(text).attribute_map.get(name, name) for name in _ALWAYS]
    always = {name: given[name] for name in names if given.get(name) is not None}
    common = PreTrainedConfig().to_dict()
    differ = {
        key: value
        for key, value in given.items()
        if key not in always and key not in common and value != default.get(key)
    }
    # A key that the class does not name may be one that it asks for all the same, or of no use to it.
    kept = {key: value for key, value in differ.items() if key in default and not _UNREAD.fullmatch(key)}
    # A padding token beyond a small vocabulary is no embedding: then its id is stated too.
    padded = kept | {key: value for key, value in differ.items() if key == "pad_token_id"}
    for some in (kept, padded, differ):
        stated = {
            "model_type": text.model_type,
            **always,
            **_independent(always, some, given, text.model_type),
        }
        if _shape_list(stated) == _shape_list_of(model):
            return stated
    found = "its config holds more than a contract can state: from the stated keys another model is made"
    raise RecipeError(Problem(text.model_type, found, "plan with the folder itself: no contract is needed"))


def _independent(
    always: dict[str, Any], some: dict[str, Any], given: dict[str, Any], kind: str
) -> dict[str, Any]:
    """`some` without the keys that the class makes of the others: layer_types of an interval, say."""
    left = dict(some)
    for key in some:
        without = {k: v for k, v in left.items() if k != key}
        try:
            made = AutoConfig.for_model(kind, **always, **without).to_dict()
        except Exception:  # each class refuses in its own way what it cannot go without
            continue
        if all(made.get(k) == given[k] for k in some):
            left = without
    return left


def _shape_list(stated: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    try:
        with torch.device("meta"):
            return _shape_list_of(
                AutoModelForCausalLM.from_config(AutoConfig.for_model(**stated), trust_remote_code=False)
            )
    except Exception:  # each class refuses in its own way what it cannot go without
        return []


def _shape_list_of(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shape of each kind of projection of the layers, by the end of its name; where one name has two
    shapes, it is left out."""
    of = dict(_shape_list_of(model))
    found: dict[str, tuple[int, ...]] = {}
    for full, module in model.named_modules():
        numbers = [i for i, part in enumerate(full.split(".")) if part.isdigit()]
        if isinstance(module, nn.Linear | Conv1D) and numbers:
            found.setdefault(".".join(full.split(".")[numbers[-1] + 1 :]), tuple(module.weight.shape))
    return {
        name: shape
        for name, shape in found.items()
        if {s for n, s in of.items() if n.endswith(f".{name}.weight")} == {shape}
    }


def _file(name: str) -> Path:
    """Where the contract goes: configs/models/ of a checkout; beside an installed package nothing is written,
    so there the working folder."""
    if name.endswith((".yaml", ".yml")):
        return Path(name).absolute()
    stem = re.sub(r"[^a-z0-9]+", "_", name.split("/")[-1].lower().replace(".", "")).strip("_")
    return (Path.cwd() if places.INSTALLED else contracts.CONTRACTS) / f"{stem}.yaml"


def _template(folder: Path, file: Path) -> tuple[str | None, str | None, str]:
    """What the contract says of the chat template; the template itself where it is to be written beside; and
    what is to be said of it."""
    text = _chat_template(folder)
    if text is None:
        told = (
            "its tokenizer files name no chat template: conversations need model.chat_template in the recipe"
        )
        return None, None, told
    carried = Path(str(files("trl").joinpath("chat_templates")))
    for path in sorted(carried.glob("*.jinja")):
        if not path.stem.endswith("_training") and path.read_text("utf-8").rstrip("\n") == text.rstrip("\n"):
            return path.stem, None, ""
    return file.with_suffix(".jinja").name, text, ""


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(found, list):  # several, by name
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _line(key: str, value: Any) -> str:
    """`key: value` as YAML, in the flow style: JSON is YAML but for words, which need no quotes here."""
    flow = json.dumps(value)
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z]\w*", value)
        and value not in ("true", "false", "null")
    ):
        flow = value
    if isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(r"[a-z]\w+", v) for v in value):
        flow = f"[{', '.join(value)}]"
    if len(key) + len(flow) > 100:
        flow = textwrap.fill(flow, 106, initial_indent="", subsequent_indent="    ", break_long_words=False)
    return f"{key}: {flow}"
