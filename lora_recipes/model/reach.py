"""Do the rows stay within what the base has, its vocabulary and its positions? Beyond its embedding, or a
table of positions, the first step fails; beyond what RoPE was trained for, training goes on without a word.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lora_recipes.core.errors import Problem, listed, raise_if
from lora_recipes.data.gate import Gate
from lora_recipes.data.rows import Rows
from lora_recipes.recipe.recipe import Recipe


def check(model: PreTrainedModel, new: list[int], gate: Gate, recipe: Recipe) -> list[str]:
    """Raise RecipeError where rows have tokens or positions that `model` has not; return what is worth a
    warning. Nothing where the tokens are not counted.

    `new`: the ids of model.new_tokens, for which the embedding will grow.
    """
    if gate.counts.tokens is None:
        return []
    splits = (gate.train, gate.evaluation)
    embedding: Any = model.get_input_embeddings()
    vocabulary = max(embedding.num_embeddings, *(i + 1 for i in new), 0)
    raise_if(_tokens(vocabulary, splits, gate, recipe) + _learned(model, splits, gate, recipe))
    return [*_unused(vocabulary, gate), *_rotary(model, splits, gate, recipe)]


def _longer(splits: Sequence[Rows], limit: int) -> tuple[int, str, int]:
    """How many rows have more than `limit` tokens as trained, where the first is, how long the longest."""
    found = [(rows, np.flatnonzero(rows.lengths > limit)) for rows in splits]
    first = next((rows.where(beyond[0]) for rows, beyond in found if len(beyond)), "")
    longest = max(int(rows.lengths.max(initial=0)) for rows in splits)
    return sum(len(beyond) for _, beyond in found), first, longest


def _tokens(vocabulary: int, splits: Sequence[Rows], gate: Gate, recipe: Recipe) -> list[Problem]:
    """Tokens beyond the embedding: in a row, or put there by training and generation themselves."""
    where = recipe.at("model", "tokenizer" if recipe.model.tokenizer else "name_or_path")
    do = "use the base's own tokenizer, or add the tokens by model.new_tokens, which trains rows for them"
    beyond = f"the base's embedding has {vocabulary:,} rows"
    having = [(rows, int(i)) for rows in splits for i in np.flatnonzero(rows.last >= vocabulary)]
    if having:
        rows, i = having[0]
        token = next(t for t in rows[i].input_ids if t >= vocabulary)
        name = gate.tokenizer.convert_ids_to_tokens(token)
        more = f" ({len(having):,} rows have such tokens)" if len(having) > 1 else ""
        found = f"its token {name!r} is number {token:,}: {beyond}{more}"
        return [Problem(rows.where(i), found, f"{where}: {do}")]
    special = {n: getattr(gate.tokenizer, n, None) for n in ("eos_token", "pad_token", "bos_token")}
    return [
        Problem(where, f"the tokenizer's {n} {token!r} is number {number:,}: {beyond}", do)
        for n, token in special.items()
        if token is not None and (number := getattr(gate.tokenizer, f"{n}_id") or 0) >= vocabulary
    ]


def _unused(vocabulary: int, gate: Gate) -> list[str]:
    known: dict[str, int] = gate.tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in known.items() if i >= vocabulary)
    if not beyond:
        return []
    named = listed((repr(token) for _, token in beyond), 3)
    return [
        f"the tokenizer has {len(beyond):,} tokens that the base's embedding ({vocabulary:,} rows) has not:"
        f" {named}; no row uses them, and a prompt that does will fail"
    ]


def _block(gate: Gate, recipe: Recipe) -> int | None:
    """How long the blocks are that packing by `wrapped` cuts, all rows laid end to end; None for rows that
    are kept apart."""
    if not (recipe.train.packing and recipe.train.packing_strategy == "wrapped"):
        return None
    return min(recipe.train.max_length or 0, int(gate.train.lengths.sum()))


def _learned(model: PreTrainedModel, splits: Sequence[Rows], gate: Gate, recipe: Recipe) -> list[Problem]:
    if (limit := _table(model)) is None:
        return []
    where, virtual = recipe.at("train", "max_length"), (recipe.peft and recipe.peft.num_virtual_tokens) or 0
    if block := _block(gate, recipe):
        found = (
            f"blocks of {block:,} tokens (packing_strategy: wrapped), and the base has {limit:,} positions"
        )
        return [Problem(where, found, f"set train.max_length={limit}")] if block > limit else []
    count, first, longest = _longer(splits, limit - virtual)
    if not count:
        return []
    extra = f" and {virtual} virtual ones" if virtual else ""
    found = (
        f"{count:,} rows have more tokens than the base has positions ({limit:,}, a table): first"
        f" {first}, longest {longest:,} tokens{extra}"
    )
    do = f"set train.max_length={limit - virtual} to cut them, or shorten the rows"
    return [Problem(where, found, do)]


def _rotary(model: PreTrainedModel, splits: Sequence[Rows], gate: Gate, recipe: Recipe) -> list[str]:
    limit = positions(model.config.get_text_config())
    if limit is None or _table(model) is not None:
        return []
    count, _, longest = _longer(splits, limit)
    what = "rows"
    if block := _block(gate, recipe):
        count, longest, what = int(block > limit), block, "blocks"
    if not count:
        return []
    return [
        f"{count:,} {what} are longer than the {limit:,} positions that the base"
        f" was made for (max_position_embeddings; longest {longest:,}): it goes on, and answers worse"
        f" beyond them; set train.max_length={limit}, or rope_scaling in the base's config.json"
    ]


def _table(model: PreTrainedModel) -> int | None:
    """How many positions the model's table of positions has; None for RoPE, ALiBi and none.

    Seen by its size: GPT-2's wpe, OPT's embed_positions (two more rows), GPT-J's buffer of sines.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [
        m.num_embeddings - getattr(m, "offset", 0)
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m is not tokens
    ]
    tables += [b.shape[0] for b in model.buffers() if b.dim() == 2 and torch.is_floating_point(b)]
    return limit if limit in tables else None


def positions(config: Any) -> int | None:
    """How many positions a model with RoPE was made for, scaling included; None where its config names none.

    linear and dynamic multiply max_position_embeddings, as vLLM counts it (config/model.py,
    _get_and_verify_max_len); yarn reaches `factor` times the original number; in llama3 and longrope
    max_position_embeddings is what they reach.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [v for v in given.values() if isinstance(v, dict)]
    if limit is None or not kinds:
        return None
    reached = [limit]
    for kind in kinds:
        factor, original = kind.get("factor") or 1, kind.get("original_max_position_embeddings")
        if kind.get("rope_type") in ("linear", "dynamic"):
            reached.append(int(limit * factor))
        elif kind.get("rope_type") == "yarn":
            reached.append(int((original or limit) * factor))
    return max(reached)
