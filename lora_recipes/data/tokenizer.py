"""The tokenizer of a recipe: the base's own, one that a contract describes, or a stand-in when none is at
hand.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from lora_recipes.core import hub
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import ROOT
from lora_recipes.data import new_tokens
from lora_recipes.data.render import chat_template
from lora_recipes.data.stand_in import Characters
from lora_recipes.recipe.base import Resolved, unread
from lora_recipes.recipe.contract import Contract
from lora_recipes.recipe.recipe import Recipe


def load(resolved: Resolved, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that training and serving use, with model.chat_template and the tokens of train: applied.

    `local_files_only`: look in the folder and the cache, never on the hub.
    """
    recipe, contract, weights = resolved.recipe, resolved.tokenizer, resolved.base.weights
    name = recipe.model.tokenizer
    # Beside the weights: theirs, whatever changed.
    saved = not name and (Path(weights) / "tokenizer.json").is_file()
    if contract and contract.tokenizer and not saved:
        result: PreTrainedTokenizerBase = make(contract)
    else:
        if name and (folder := recipe.file(name)).is_dir():
            name = str(folder)
        result = _pretrained(recipe, name or weights, local_files_only)
    if not set(result.get_vocab()) - set(result.all_special_tokens):
        # As transformers makes it of a config alone: every row would be empty, and the loss 0.
        found = f"the tokenizer of {name or weights} has no vocabulary: its files are missing"
        do = "set model.tokenizer to a folder or hub id that has them (tokenizer.json)"
        raise RecipeError(Problem(recipe.at("model", "tokenizer" if name else "name_or_path"), found, do))
    if template := recipe.model.chat_template:
        result.chat_template = chat_template(
            template, recipe.at("model", "chat_template"), recipe.path.parent
        )
    for name in ("eos_token", "pad_token"):
        token = getattr(recipe.train, name)
        if token and token not in result.get_vocab():
            do = f"the tokenizer's own is {getattr(result, name)!r}"
            raise RecipeError(Problem(recipe.at("train", name), f"{token!r} is not in the vocabulary", do))
        if token:
            setattr(result, name, token)
    new_tokens.add(result, recipe)
    return result


def _pretrained(recipe: Recipe, path: str, local_files_only: bool) -> PreTrainedTokenizerBase:
    revision = "main" if recipe.model.tokenizer else recipe.model.revision or "main"
    silent = "" if local_files_only or Path(path).is_dir() else hub.silent()
    try:
        return AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            local_files_only=local_files_only or bool(silent),
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        where = recipe.at("model", "tokenizer") if recipe.model.tokenizer else recipe.at("model")
        do = "check the name, the network and the login"
        if silent:
            do = f"{silent}: name a folder (model.tokenizer), or fetch it with a network: hf download {path}"
        raise RecipeError(Problem(where, *unread(error, f"the tokenizer of {path}", do))) from None


def stand_in(resolved: Resolved) -> Characters:
    """The stand-in for a tokenizer that is not at hand: the contract's published chat template, over
    characters.
    """
    recipe, contract = resolved.recipe, resolved.base.contract
    own, name = recipe.model.chat_template, contract and contract.chat_template
    if not (own or name):
        return Characters(None)
    named = own or f"the contract's, {name}"
    return Characters(chat_template(own or name or "", recipe.at("model"), recipe.path.parent), named)


def make(contract: Contract) -> PreTrainedTokenizerFast:
    """The tokenizer that a contract describes: `words` (each a token) or `byte_level_bpe` (Qwen's kind,
    trained on the files).
    """
    spec = contract.tokenizer
    if not spec:
        raise RecipeError(Problem(contract.file, "brings no tokenizer", "set model.tokenizer"))
    texts = [text for file in spec["files"] for text in _texts(ROOT / file)]
    raw = _words(texts, spec) if spec["kind"] == "words" else _byte_level_bpe(texts, spec)
    raw.add_special_tokens(spec["special_tokens"])
    assert raw.get_vocab_size() <= contract.text_config["vocab_size"]
    names = {k: spec[k] for k in ("eos_token", "pad_token", "unk_token") if k in spec}
    template = chat_template(contract.chat_template, contract.file) if contract.chat_template else None
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **names)


def _words(texts: list[str], spec: dict[str, Any]) -> Tokenizer:
    raw = Tokenizer(models.WordLevel(unk_token=spec["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=spec["special_tokens"], show_progress=False)
    )
    return raw


def _byte_level_bpe(texts: list[str], spec: dict[str, Any]) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=spec["vocab_size"], initial_alphabet=alphabet, show_progress=False
    )
    # Two line breaks are one token in the published vocabularies; an empty think block is made of them.
    raw.train_from_iterator([*texts, *["\n\n"] * len(texts)], trainer)
    return raw


def _texts(path: Path) -> list[str]:
    """The texts of a JSONL file of `text` or `prompt`/`completion` rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    messages = [m["content"] for row in rows for m in row.get("prompt", []) + row.get("completion", [])]
    return [row["text"] for row in rows if "text" in row] + messages
