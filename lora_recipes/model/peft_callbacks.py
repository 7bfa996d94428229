"""What the adapters of a `peft:` section need that SFTTrainer does not do: AdaLoRA's schedule and penalty;
and did every tensor learn?
"""

from typing import Any

import torch
from transformers import TrainerCallback

from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.recipe.recipe import Recipe


def callbacks(recipe: Recipe) -> list[TrainerCallback]:
    """Those that the recipe's `peft:` section needs; none for other methods."""
    if recipe.peft is None:
        return []
    return [Learned(recipe), *([Budget()] if recipe.peft.peft_type == "ADALORA" else [])]


def copies(recipe: Recipe) -> int:
    """How many copies of what is trained the callbacks keep: Learned's first values, AdaLoRA's three tensors
    of importance.
    """
    if recipe.peft is None:
        return 0
    return 4 if recipe.peft.peft_type == "ADALORA" else 1


class Learned(TrainerCallback):
    """Fails a run in which a trained tensor is not finite, or is at the end what it was at the beginning."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep a copy of what will be trained (an adapter is small)."""
        self.step = state.global_step
        self.before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Compare. AdaLoRA sets singular values (lora_E) to zero, where they began: those say nothing, unless
        all of them are.
        """
        if state.global_step == self.step:  # a run that was resumed after its last step
            return
        now = {n: p for n, p in model.named_parameters() if n in self.before}
        wrong = [f"{n} is not finite" for n, p in now.items() if not p.isfinite().all()]
        wrong += [
            f"{n} is what it was"
            for n, p in now.items()
            if "lora_E" not in n and torch.equal(p, self.before[n])
        ]
        values = [p for n, p in now.items() if "lora_E" in n]
        if values and not any(p.any() for p in values):
            wrong.append("every lora_E is zero")
        if wrong:
            do = (
                "the adapter is not saved; look at the learning rate, the number of steps and whether these"
                " modules are used at all"
            )
            raise RecipeError(Problem(self.recipe.at("peft"), f"not learned: {listed(wrong)}", do))


class Budget(TrainerCallback):
    """AdaLoRA's two parts that no trainer drives: the penalty that keeps P and Q orthogonal, and the
    allocation of ranks.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Add the gradient of orth_reg_weight x mean ||P P^T - I||.

        AdaLoraModel.forward adds that penalty to `outputs.loss` (peft 0.21), which SFTTrainer 1.16 does not
        use: it sums `log_probs`. The gradient is added after the loss's own was clipped.
        """
        weight = model.peft_config[model.active_adapter].orth_reg_weight
        named = [
            (n, p)
            for n, p in model.named_parameters()
            if p.requires_grad and ("lora_A" in n or "lora_B" in n)
        ]
        factors, grams = [p for _, p in named], [p @ p.T if "lora_A" in n else p.T @ p for n, p in named]
        penalty = sum(torch.linalg.norm(g - torch.eye(len(g), device=g.device, dtype=g.dtype)) for g in grams)
        for factor, gradient in zip(
            factors, torch.autograd.grad(weight / len(factors) * penalty, factors), strict=True
        ):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Allocate; steps count from 1, so that the last one is `total_step`, where PEFT fixes the ranks
        (tfinal: 0).
        """
        model.base_model.update_and_allocate(state.global_step + 1)
