"""From a recipe to library objects: the only file that knows both a recipe and the classes of transformers, peft and trl."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from lora_recipes import contract as contracts
from lora_recipes import recipe as recipes
from lora_recipes.contract import Contract
from lora_recipes.messages import Problem, RecipeError
from lora_recipes.recipe import Recipe, rooted
from lora_recipes.render import Characters, Example, chat_template
from lora_recipes.run import RunFolder, replace_folder
from lora_recipes.yamlfile import shown


def contract_of(recipe: Recipe) -> Contract | None:
    """The recipe's contract; a base that another recipe trains has that recipe's."""
    if name := recipe.model.get("contract"):
        return contracts.load(name, recipe.at("model", "contract"))
    return contract_of(base_recipe(recipe)) if recipe.model.get("from_recipe") else None


def base_recipe(recipe: Recipe) -> Recipe:
    """The recipe named by model.from_recipe. It must be a `full:` one: what it leaves is a whole model."""
    where = recipe.at("model", "from_recipe")
    base = recipes.load(recipe.model["from_recipe"])
    if base.method != "full":
        raise RecipeError(Problem(where, f"{base.name} trains an adapter, not a model", "name a full: recipe, or merge the adapter first"))
    return base


def text_config(recipe: Recipe, outputs: Path) -> PreTrainedConfig:
    """The config of the text model: from the contract when there is one (no network), else from the folder or the hub."""
    if contract := contract_of(recipe):
        try:
            return AutoConfig.for_model(**contract.config).get_text_config()
        except (ValueError, TypeError) as error:
            raise RecipeError(Problem(recipe.at("model", "contract"), f"transformers cannot build {contract.name}: {error}")) from None
    return real_config(recipe, outputs).get_text_config()


def real_config(recipe: Recipe, outputs: Path) -> PreTrainedConfig:
    """The config of the weights themselves: the folder's, or the hub's."""
    path = base_path(recipe, outputs)
    try:
        return AutoConfig.from_pretrained(path, revision=recipe.model.get("revision", "main"))
    except (OSError, ValueError) as error:
        do = "check the name, the network and the login; with model.contract a plan needs neither"
        found = f"the config of {path} cannot be read: {str(error).splitlines()[0]}"
        raise RecipeError(Problem(recipe.at("model", "name_or_path"), found, do)) from None


def contract_differences(recipe: Recipe, outputs: Path) -> list[str]:
    """Where the real checkpoint's config departs from the contract; empty when they agree or when either is missing."""
    contract = contract_of(recipe)
    if contract is None or recipe.model.get("weights") == "random":
        return []
    return contract.differences(real_config(recipe, outputs).get_text_config().to_dict())


def meta_model(recipe: Recipe, outputs: Path) -> PreTrainedModel:
    """The text model without weights (meta device), as AutoModelForCausalLM will build it. Takes no memory."""
    config = text_config(recipe, outputs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model["dtype"]))
    contract, total = contract_of(recipe), model.num_parameters()
    if contract and total != contract.parameters:
        found = f"transformers {transformers.__version__} builds {total:,} parameters, the contract says {contract.parameters:,}"
        raise RecipeError(Problem(recipe.at("model", "contract"), found, f"correct configs/models/{contract.name}.yaml"))
    return model


def lora_config(recipe: Recipe) -> LoraConfig | None:
    """`peft.LoraConfig` of the recipe's `lora:` section, its keys handed over as they are; None for `full:`."""
    if recipe.method != "lora":
        return None
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.lora})
    except (TypeError, ValueError) as error:
        raise RecipeError(Problem(recipe.at("lora"), f"PEFT refuses it: {error}")) from None


def precision(recipe: Recipe) -> tuple[dict[str, bool], str]:
    """`bf16` and `fp16` for SFTConfig, and the reason. TRL's own default is bf16 everywhere, the CPU included."""
    asked = {k: recipe.train[k] for k in ("bf16", "fp16") if k in recipe.train}
    dtype = recipe.model["dtype"]
    where = "this CPU" if not torch.cuda.is_available() or recipe.train.get("use_cpu") else torch.cuda.get_device_name()
    wants_bf16 = dtype == "bfloat16" or asked.get("bf16")
    if wants_bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        do = "set model.dtype=float16 train.fp16=true, or model.dtype=float32"
        raise RecipeError(Problem(recipe.at("model", "dtype"), f"{where} has no bfloat16", do))
    if asked:
        return {"bf16": False, "fp16": False} | asked, "as the recipe says"
    return {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}, f"follows model.dtype: {dtype} on {where}"


def sft_config(recipe: Recipe, folder: RunFolder) -> SFTConfig:
    """`trl.SFTConfig` of the recipe's `train:` section, its keys handed over as they are, and what the launcher owns."""
    stopping = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    owned = {"output_dir": str(folder.checkpoints), **precision(recipe)[0]}
    fields: dict[str, Any] = {"report_to": "none", "use_cpu": not torch.cuda.is_available(), "logging_nan_inf_filter": False}
    fields |= (stopping if recipe.early_stopping else {}) | recipe.train | owned
    try:
        return SFTConfig(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(Problem(recipe.at("train"), f"TRL refuses it: {str(error).splitlines()[0]}")) from None


def base_path(recipe: Recipe, outputs: Path) -> str:
    """Where the base's weights are: a hub id or a folder. RecipeError when the folder holds an adapter."""
    model = recipe.model
    if name := model.get("from_recipe"):
        return str(RunFolder(outputs / name).result("full"))
    if model.get("weights") == "random":
        return str(outputs / "_bases" / f"{model['contract']}-{model['dtype']}")
    path = rooted(model["name_or_path"])
    if (path / "adapter_config.json").is_file():
        do = "TRL would reset that adapter in silence. Name the base it was trained on, or merge it first"
        raise RecipeError(Problem(recipe.at("model", "name_or_path"), f"{shown(path)} is an adapter, not a base model", do))
    return str(path) if path.is_dir() else model["name_or_path"]


def random_base(recipe: Recipe, outputs: Path) -> bool:
    """Write the contract's model with random weights (seed 0) and its tokenizer as a checkpoint folder, unless it is there already.

    The folder has the published checkpoint's class and tensor names, so that all later steps load it as they load a real one.
    """
    contract, folder = contract_of(recipe), Path(base_path(recipe, outputs))
    assert contract is not None
    mark = {"config": contract.config, "tokenizer": contract.tokenizer, "transformers": transformers.__version__}
    if (folder / "contract.json").is_file() and json.loads((folder / "contract.json").read_text()) == mark:
        return False
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = AutoConfig.for_model(**contract.config)
    set_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, contract.architecture)._from_config(config, dtype=getattr(torch, recipe.model["dtype"]))
    processing_class = tokenizer(recipe, outputs)
    for holder in (model.config.get_text_config(), model.generation_config):
        holder.eos_token_id, holder.pad_token_id = processing_class.eos_token_id, processing_class.pad_token_id
    model.save_pretrained(temporary)
    processing_class.save_pretrained(temporary)
    (temporary / "contract.json").write_text(json.dumps(mark))
    replace_folder(temporary, folder)
    return True


def tokenizer(recipe: Recipe, outputs: Path, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that training and serving use, with model.chat_template and train.eos_token applied.

    `local_files_only`: look in the folder and the cache, never on the hub.
    """
    contract, name = contract_of(recipe), recipe.model.get("tokenizer")
    result: PreTrainedTokenizerBase
    if name in contracts.names():
        result = made_tokenizer(contracts.load(name))
    elif not name and contract and contract.tokenizer:
        result = made_tokenizer(contract)
    else:
        path = name or base_path(recipe, outputs)
        try:
            revision = "main" if name else recipe.model.get("revision", "main")
            result = AutoTokenizer.from_pretrained(path, revision=revision, local_files_only=local_files_only)
        except (OSError, ValueError) as error:
            found = f"the tokenizer of {path} cannot be loaded: {str(error).splitlines()[0]}"
            raise RecipeError(Problem(recipe.at("model"), found, "check the name, the network and the login")) from None
    if template := recipe.model.get("chat_template"):
        result.chat_template = chat_template(template, recipe.at("model", "chat_template"))
    if eos := recipe.train.get("eos_token"):
        if eos not in result.get_vocab():
            raise RecipeError(
                Problem(recipe.at("train", "eos_token"), f"{eos!r} is not in the vocabulary", f"the tokenizer's is {result.eos_token!r}")
            )
        result.eos_token = eos
    return result


def characters(recipe: Recipe) -> Characters:
    """The stand-in for a tokenizer that is not at hand: the contract's published chat template, over characters."""
    contract = contract_of(recipe)
    name = recipe.model.get("chat_template") or (contract and contract.chat_template)
    return Characters(chat_template(name, recipe.at("model")) if name else None)


def made_tokenizer(contract: Contract) -> PreTrainedTokenizerFast:
    """The tokenizer that a contract describes: `words` (each word and mark a token) or `byte_level_bpe` (trained on the files)."""
    spec = contract.tokenizer
    if not spec:
        raise RecipeError(Problem(f"configs/models/{contract.name}.yaml", "brings no tokenizer", "set model.tokenizer"))
    texts = [line for file in spec["files"] for line in _texts(rooted(file))]
    special = spec["special_tokens"]
    if spec["kind"] == "words":
        raw = Tokenizer(models.WordLevel(unk_token=spec["unk_token"]))
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        raw.decoder = decoders.Metaspace()
        raw.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=spec["vocab_size"], initial_alphabet=alphabet, show_progress=False))
    raw.add_special_tokens(special)
    assert raw.get_vocab_size() <= contract.text_config["vocab_size"]
    names = {k: spec[k] for k in ("eos_token", "pad_token", "unk_token") if k in spec}
    template = chat_template(contract.chat_template, contract.name) if contract.chat_template else None
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **names)


def _texts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [
        text
        for row in rows
        for text in [row.get("text"), *(m["content"] for m in row.get("prompt", []) + row.get("completion", []))]
        if text
    ]


def model(recipe: Recipe, outputs: Path) -> PreTrainedModel:
    """The base model with its weights, frozen or not as the trainer will have it, in the recipe's dtype."""
    options = {k: recipe.model[k] for k in ("revision", "attn_implementation") if k in recipe.model}
    path = base_path(recipe, outputs)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, recipe.model["dtype"]), **options)
    except (OSError, ValueError, ImportError) as error:
        do = "check the name, the network, the login and attn_implementation"
        raise RecipeError(Problem(recipe.at("model"), f"{path} cannot be loaded: {str(error).splitlines()[0]}", do)) from None
    if getattr(loaded, "_hf_peft_config_loaded", False) or hasattr(loaded, "peft_config"):
        do = "TRL would reset that adapter in silence. Name the base it was trained on, or merge it first"
        raise RecipeError(Problem(recipe.at("model", "name_or_path"), f"{path} carries an adapter", do))
    return loaded


def dataset(examples: list[Example]) -> Dataset:
    """`input_ids` and `labels`: the form that SFTTrainer takes as already prepared."""
    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


def trainer(
    recipe: Recipe,
    arguments: SFTConfig,
    base: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    train: list[Example],
    evaluation: list[Example],
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """The one SFTTrainer. It receives the LoraConfig and makes the adapter itself; nothing has touched `base` before."""
    # The labels already leave out what train.assistant_only_loss leaves out; TRL accepts the flag only with raw conversations.
    arguments.assistant_only_loss = False
    stopping = [EarlyStoppingCallback(**recipe.early_stopping)] if recipe.early_stopping else []
    return SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=dataset(train),
        eval_dataset=dataset(evaluation) if evaluation else None,
        processing_class=processing_class,
        peft_config=lora_config(recipe),
        callbacks=[*callbacks, *stopping],
    )
