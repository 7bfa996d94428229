"""New tokens (`model.new_tokens`) in tokenizer and rows; their embeddings are in model/embeddings.py."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_recipes.core.errors import Problem, RecipeError, listed, raise_if
from lora_recipes.recipe.recipe import Recipe


def add(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Add the recipe's new tokens to `tokenizer`. RecipeError for one that it has already."""
    new, known = recipe.model.new_tokens, tokenizer.get_vocab()
    at = recipe.at("model", "new_tokens")
    raise_if(
        [
            Problem(at, f"{token!r} is in the vocabulary already", "remove it")
            for token in new
            if token in known
        ]
    )
    if new and tokenizer.add_tokens(new) != len(new):
        raise RecipeError(
            Problem(
                at,
                "the tokenizer takes them for tokens that it has",
                "look at its normaliser; write them as it would",
            )
        )


def ids(tokenizer: Any, recipe: Recipe, rows: int) -> list[int]:
    """The ids of the new tokens; after the `rows` of the embedding where the tokenizer is not at hand."""
    new = recipe.model.new_tokens
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return [known.get(token, rows + i) for i, token in enumerate(new)]


def unseen(missed: list[int], indices: list[int], recipe: Recipe) -> list[str]:
    """A warning about new tokens that stand in no training row (ids): their embeddings stay noise."""
    missing = [token for token, i in zip(recipe.model.new_tokens, indices, strict=True) if i in missed]
    return (
        [f"model.new_tokens: {listed(map(repr, missing))} in no training row: the embedding stays noise"]
        if missing
        else []
    )
