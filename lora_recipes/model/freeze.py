"""Layer freezing: which parameters of the base a `freeze:` section trains. The result is a whole model, as
that of `full:`.
"""

from typing import Any

from torch.nn import ModuleList
from transformers import PreTrainedModel

from lora_recipes.core.errors import Problem
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.recipe.sections import Freeze


def _blocks(model: PreTrainedModel) -> ModuleList:
    """The blocks of the text model, whatever they are called (GPT-2: `transformer.h`): its list of as many as
    its config has layers."""
    depth, decoder = model.config.get_text_config().num_hidden_layers, getattr(model, "get_decoder", None)
    text: Any = (decoder() if decoder else None) or model
    return next(m for m in text.modules() if isinstance(m, ModuleList) and len(m) == depth)


def parts(model: PreTrainedModel, section: Freeze) -> list[str]:
    """The modules that a `freeze:` section trains: the last blocks (`model.layers.1`), then the embeddings
    and lm_head.
    """
    named = {id(module): name for name, module in model.named_modules()}
    blocks = [named[id(block)] for block in _blocks(model)]
    found = blocks[len(blocks) - section.last_blocks :]
    if section.embeddings:
        found += [
            named[id(m)]
            for m in (model.get_input_embeddings(), model.get_output_embeddings())
            if m is not None
        ]
    return found


def problems(model: PreTrainedModel, section: Freeze, recipe: Recipe) -> list[Problem]:
    """More blocks than the model has, or nothing that is trained."""
    wanted, have = section.last_blocks, len(_blocks(model))
    if wanted > have:
        return [
            Problem(
                recipe.at("freeze", "last_blocks"),
                f"the model has {have} blocks, not {wanted}",
                f"1 to {have}, or write full:",
            )
        ]
    if not (wanted or section.embeddings):
        return [
            Problem(recipe.at("freeze"), "nothing would be trained", "last_blocks: 1, or embeddings: true")
        ]
    return []


def apply(model: PreTrainedModel, section: Freeze) -> int:
    """Set `requires_grad` on `model`: true in `parts`, false elsewhere. Returns how many parameters are
    trained.

    A tied lm_head is the embedding's own tensor and counts once: `parameters()` gives each tensor once.
    """
    model.requires_grad_(False)
    for name in parts(model, section):
        model.get_submodule(name).requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
