"""What the libraries of this machine say against settings that they would refuse only with the model loaded:
the optimizer, Liger; and an accelerator that is not CUDA's.
"""

import copy
import importlib.util

import torch
from transformers import Trainer
from trl import SFTConfig

from lora_recipes.recipe.recipe import Recipe
from lora_recipes.recipe.rules import OPTIMIZER_KEYS


def optimizer(arguments: SFTConfig) -> str:
    """Why train.optim cannot be made; empty where it can, as far as that is known without a model."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        # GaLore, Apollo and LOMO look at the model last, when all else is there.
        return "" if "to pass a" in str(error) and "model" in str(error) else str(error).splitlines()[0]
    return ""


def ignored(arguments: SFTConfig, recipe: Recipe) -> tuple[str, ...]:
    """The keys of train: that this optimizer does not read: it is the same without them."""
    found = []
    for name, usual in OPTIMIZER_KEYS.items():
        if recipe.train.given.get(name, usual) in (usual, None):
            continue
        without = copy.copy(arguments)
        setattr(without, name, usual)
        if _made(without) == _made(arguments):
            found.append(name)
    return tuple(found)


def _made(arguments: SFTConfig) -> object:
    """What is known of the optimizer: its class and options, or why it is none."""
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        return str(error)
    return cls, options


def foreign() -> str:
    """The kind of this machine's accelerator where it is not CUDA's (Apple's GPU: mps); empty where it is, or
    where there is none.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type != "cuda" else ""


def liger() -> str:
    """Why train.use_liger_kernel cannot be; empty where it can."""
    return (
        "" if importlib.util.find_spec("liger_kernel") else "the package liger-kernel is not installed here"
    )
