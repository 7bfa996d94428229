"""New tokens (`model.new_tokens`): the tokenizer grows, and with it the embeddings, which begin at the mean of the old ones plus noise.

`lora:` trains only the new rows (PEFT's trainable_token_indices), of embed_tokens and of an lm_head of its own. An adapter that holds
them is served by no vLLM: it is merged.
"""

from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_recipes.messages import Problem, RecipeError, listed, raise_if
from lora_recipes.recipe import Recipe
from lora_recipes.render import Example

NOISE = 0.1  # of the old rows' standard deviation, so that no two new rows are the same


def problems(recipe: Recipe) -> list[Problem]:
    """New tokens that would not be trained, or are given twice."""
    new, where = recipe.model.get("new_tokens", []), recipe.at("model", "new_tokens")
    if not new:
        return []
    found = []
    if twice := {token for token in new if new.count(token) > 1}:
        found.append(Problem(where, f"{listed(map(repr, sorted(twice)))} is listed twice", "keep one"))
    if recipe.method == "peft":
        found.append(Problem(where, "peft: does not train new embeddings", "write lora:, full:, or freeze: with embeddings: true"))
    if recipe.method == "freeze" and not recipe.freeze.get("embeddings"):
        found.append(Problem(where, "the embeddings are frozen: new ones would stay noise", "set freeze.embeddings: true"))
    if "quantize" in recipe.model:
        found.append(Problem(where, "new tokens on a 4-bit base are not tried here", "remove model.quantize"))
    given = [key for key in ("trainable_token_indices", "modules_to_save") if recipe.lora.get(key)]
    found += [Problem(recipe.at("lora", key), "new_tokens chooses the rows that are trained", "remove one of the two") for key in given]
    return found


def add(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Add the recipe's new tokens to `tokenizer`. RecipeError for one that it has already."""
    new, known = recipe.model.get("new_tokens", []), tokenizer.get_vocab()
    at = recipe.at("model", "new_tokens")
    raise_if([Problem(at, f"{token!r} is in the vocabulary already", "remove it") for token in new if token in known])
    if new and tokenizer.add_tokens(new) != len(new):
        raise RecipeError(Problem(at, "the tokenizer takes them for tokens that it has", "look at its normaliser; write them as it would"))


def ids(tokenizer: Any, recipe: Recipe, rows: int) -> list[int]:
    """The ids of the new tokens; after the `rows` of the embedding where the tokenizer is not at hand."""
    new = recipe.model.get("new_tokens", [])
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return [known.get(token, rows + i) for i, token in enumerate(new)]


def grow(model: PreTrainedModel, indices: list[int], config: Any = None) -> None:
    """Add rows to the embeddings where `indices` lie beyond them (published ones often have rows to spare).

    `config`: the LoraConfig that is to train them, by trainable_token_indices. A tied lm_head follows by itself.
    """
    embedding: Any = model.get_input_embeddings()
    if indices and max(indices) >= embedding.num_embeddings:
        model.resize_token_embeddings(max(indices) + 1, mean_resizing=False)
    if indices and config is not None:
        parts = [model.get_input_embeddings()]
        if not model.config.get_text_config().tie_word_embeddings:
            parts.append(model.get_output_embeddings())
        names = {id(module): name for name, module in model.named_modules()}
        config.trainable_token_indices = {names[id(part)].rsplit(".", 1)[-1]: indices for part in parts}


@torch.no_grad()
def begin(model: PreTrainedModel, indices: list[int], seed: int) -> None:
    """Set the rows `indices` of the embeddings (and of an lm_head of its own) to the mean of the rows before them, plus noise."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Any = module.weight if module is not None else None
        if weight is None or (module is model.get_output_embeddings() and weight is model.get_input_embeddings().weight):
            continue
        old = weight[: min(indices)].float().cpu()
        noise = torch.randn(len(indices), old.shape[1], generator=torch.Generator().manual_seed(seed))
        weight[indices] = (old.mean(0) + NOISE * old.std(0) * noise).to(weight)


def readable_head(model: Any) -> None:
    """Give lm_head a `bias` where PEFT wraps it: TRL's loss reads `lm_head.weight` (which has the trained rows) and `lm_head.bias`."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", None)


def unseen(rows: list[Example], indices: list[int], recipe: Recipe) -> list[str]:
    """A warning about new tokens that stand in no training row: their embeddings stay noise."""
    have = {i for row in rows for i in row.input_ids}
    missing = [token for token, i in zip(recipe.model.get("new_tokens", []), indices, strict=True) if i not in have]
    return [f"model.new_tokens: {listed(map(repr, missing))} in no training row: the embedding stays noise"] if missing else []
