"""What `lora.init_lora_weights` means for the adapter that is saved. Imports no torch."""

from typing import Any

from lora_recipes.recipe.sections import Lora

MUTATE = ("pissa", "olora", "corda")  # take the first A and B out of the base


def kind(lora: Lora | None) -> str:
    """`pissa`, `eva`, ...: lora.init_lora_weights where it is a word, without its number of iterations; else
    empty.
    """
    init = lora.init_lora_weights if lora else True
    return init.lower().split("_niter_")[0] if isinstance(init, str) else ""


def as_saved(lora: Lora) -> dict[str, Any]:
    """The `lora:` section as adapter_config.json will say it: of twice the rank where A and B were taken out
    of the base.
    """
    if kind(lora) not in MUTATE:
        return lora.given | ({"init_lora_weights": True} if kind(lora) == "loftq" else {})
    alpha = lora.lora_alpha * (2**0.5 if lora.use_rslora else 2)
    return lora.given | {"r": 2 * lora.r, "lora_alpha": alpha, "init_lora_weights": True}
