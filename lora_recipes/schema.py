"""Make `recipe.schema.json` from the installed libraries' own classes: `make schema`. Imports peft and trl; the loader only reads the file."""

import dataclasses
import enum
import inspect
import types
import typing
from typing import Any

from peft import LoraConfig
from pydantic import TypeAdapter
from transformers import EarlyStoppingCallback
from trl import SFTConfig

from lora_recipes.messages import OWNED

# Values that the classes type as plain `str` and refuse only after the model is loaded (trl/trainer/sft_trainer.py, trl/data_utils.py).
WORDS: dict[str, list[str]] = {
    "loss_type": ["nll", "dft"],
    "packing_strategy": ["bfd", "bfd_split", "wrapped"],
    "truncation_mode": ["keep_start", "keep_end"],
}
# Limits that no library checks: PEFT takes r = -3, the trainer a batch of 0 until it divides by it.
LIMITS: dict[str, dict[str, float]] = {
    "r": {"minimum": 1},
    "lora_alpha": {"exclusiveMinimum": 0},
    "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "learning_rate": {"exclusiveMinimum": 0},
    "num_train_epochs": {"exclusiveMinimum": 0},
    "per_device_train_batch_size": {"minimum": 1},
    "per_device_eval_batch_size": {"minimum": 1},
    "gradient_accumulation_steps": {"minimum": 1},
    "max_length": {"minimum": 2},
    "warmup_steps": {"minimum": 0},
    "early_stopping_patience": {"minimum": 1},
}

_TEXT = {"type": "string", "minLength": 1}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}


def _object(properties: dict[str, Any], required: list[str] | None = None, description: str = "") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"required": required} if required else {}) | ({"description": description} if description else {})


_SOURCE = _object(
    {
        "path": _TEXT | {"description": "a JSONL file, or a data set on the hub"},
        "name": _TEXT | {"description": "the hub data set's configuration (as in datasets.load_dataset)"},
        "split": _TEXT,
        "revision": _TEXT,
        "weight": {"type": "number", "exclusiveMinimum": 0, "description": "share of the rows to take; 2 takes each twice"},
    },
    ["path"],
)
_SOURCES = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT, _SOURCE]}, "minItems": 1}]}
_PROBES = {"type": "array", "items": _object({"prompt": _TEXT, "answer": _TEXT}, ["prompt", "answer"])}

OURS: dict[str, dict[str, Any]] = {
    "model": _object(
        {
            "name_or_path": _TEXT | {"description": "the base model: a hub id or a folder"},
            "revision": _TEXT | {"description": "branch, tag or commit of the base on the hub"},
            "from_recipe": _TEXT | {"description": "the base is the model that this recipe trains; it is trained first if missing"},
            "contract": _TEXT | {"description": "configs/models/<name>.yaml: the architecture, so that no network is needed to plan"},
            "weights": {"enum": ["pretrained", "random"], "description": "random: built from the contract (default: pretrained)"},
            "dtype": {"enum": ["float32", "bfloat16", "float16"], "description": "dtype of the frozen base weights"},
            "attn_implementation": _TEXT,
            "tokenizer": _TEXT | {"description": "hub id, folder, or a contract that brings one (default: the base's own)"},
            "chat_template": _TEXT
            | {"description": "a template of TRL by name (qwen3_5_think) or a .jinja file (default: the tokenizer's)"},
        },
        ["dtype"],
    ),
    "data": _object(
        {
            "train": _SOURCES,
            "eval": _SOURCES,
            "rows": {
                "enum": ["conversation", "assistant_turn"],
                "description": "assistant_turn: one row for each assistant turn, its history as the prompt (default: conversation)",
            },
            "chat_template_kwargs": {"type": "object", "description": "given to the chat template here and, by you, to the server"},
            "limits": _object(
                {"truncated": _SHARE, "duplicates": _SHARE, "train_in_eval": _SHARE, "unfaithful": _SHARE, "no_end_of_turn": _SHARE},
                description="share above which training stops; any share above 0 warns",
            ),
        },
        ["train"],
    ),
    "full": _object({}, description="full fine-tuning: every parameter of the base is trained"),
    "probes": _object({"change": _PROBES, "keep": _PROBES}, description="next-token questions asked before and after training"),
}


def _one_of_enum(hint: Any) -> Any:
    """`SchedulerType | str` -> `SchedulerType`: any text would be legal otherwise, and a typo would wait for the model to load."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    args = typing.get_args(hint)
    if any(isinstance(a, type) and issubclass(a, enum.Enum) for a in args):
        args = tuple(a for a in args if a is not str)
    return typing.Union[args]  # noqa: UP007  (built from a tuple)


def _plain(schema: Any) -> Any:
    """Without the pydantic titles and the classes' long descriptions, which would be nine tenths of the file."""
    if isinstance(schema, dict):
        return {k: _plain(v) for k, v in schema.items() if not (k in ("title", "description") and isinstance(v, str))}
    return [_plain(v) for v in schema] if isinstance(schema, list) else schema


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        return {k: _inline(v, definitions) for k, v in schema.items() if k != "$defs"}
    return [_inline(v, definitions) for v in schema] if isinstance(schema, list) else schema


def _field(name: str, hint: Any) -> dict[str, Any]:
    schema = TypeAdapter(_one_of_enum(hint)).json_schema()
    schema = _plain(_inline(schema, schema.get("$defs", {})))
    if name in WORDS:
        schema = {"enum": WORDS[name]}
    return schema | LIMITS.get(name, {})


def _class_section(section: str, cls: type, required: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init and f"{section}.{f.name}" not in OWNED]
    source = f"any field of {cls.__module__.split('.')[0]}.{cls.__name__}"
    return _object({name: _field(name, hints[name]) for name in fields}, required, source)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file, from the installed peft, trl and transformers."""
    stopping = inspect.signature(EarlyStoppingCallback.__init__).parameters
    hints = typing.get_type_hints(EarlyStoppingCallback.__init__)
    sections = {
        "model": OURS["model"],
        "data": OURS["data"],
        "lora": _class_section("lora", LoraConfig, ["r", "lora_alpha", "target_modules"]),
        "full": OURS["full"],
        "train": _class_section("train", SFTConfig, ["learning_rate"]),
        "early_stopping": _object(
            {n: _field(n, hints[n]) for n in stopping if n != "self"}, description="fields of transformers.EarlyStoppingCallback"
        ),
        "probes": OURS["probes"],
    }
    schema = _object(sections, ["model", "data", "train"], "A recipe: one training run, decisions only.")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lora-recipes recipe"} | schema
