"""New tokens (`model.new_tokens`): the tokenizer grows, and with it the embeddings, which begin at the mean
of the old ones plus noise.

`lora:` trains only the new rows (PEFT's trainable_token_indices), of embed_tokens and of an lm_head of its
own. An adapter that holds them is served by no vLLM: it is merged.
"""

import dataclasses
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

NOISE = 0.1  # of the old rows' standard deviation, so that no two new rows are the same


def grow(model: PreTrainedModel, indices: list[int]) -> None:
    """Add rows to the embeddings of `model` where `indices` lie beyond them (published ones often have rows
    to spare). A tied lm_head follows by itself."""
    embedding: Any = model.get_input_embeddings()
    if indices and max(indices) >= embedding.num_embeddings:
        model.resize_token_embeddings(max(indices) + 1, mean_resizing=False)


def training(config: PeftConfig, model: PreTrainedModel, indices: list[int]) -> PeftConfig:
    """`config` (a LoraConfig) with the rows `indices` to train, by trainable_token_indices; as it is without
    any."""
    if not indices:
        return config
    assert isinstance(config, LoraConfig), "new tokens go with lora: alone (recipe/rules.py)"
    parts = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        parts.append(model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    rows = {names[id(part)].rsplit(".", 1)[-1]: indices for part in parts}
    return dataclasses.replace(config, trainable_token_indices=rows)


@torch.no_grad()
def begin(model: PreTrainedModel, indices: list[int], seed: int) -> None:
    """Set the rows `indices` of the embeddings (and of an lm_head of its own) to the mean of the rows before
    them, plus noise.
    """
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Any = module.weight if module is not None else None
        if weight is None or (
            module is model.get_output_embeddings() and weight is model.get_input_embeddings().weight
        ):
            continue
        old = weight[: min(indices)].float().cpu()
        noise = torch.randn(len(indices), old.shape[1], generator=torch.Generator().manual_seed(seed))
        weight[indices] = (old.mean(0) + NOISE * old.std(0) * noise).to(weight)


def readable_head(model: Any) -> None:
    """Give lm_head a `bias` where PEFT wraps it: TRL's loss reads `lm_head.weight` (which has the trained
    rows) and `lm_head.bias`.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", None)
