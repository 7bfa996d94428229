"""What the runs of one process share, so that each is bit for bit what it would be alone: the rows as
tokenised, the base as loaded.
"""

import copy
import dataclasses
import gc
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_recipes.ablation.spec import Run
from lora_recipes.ablation.workers import Outcome
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import labels
from lora_recipes.data.gate import Gate
from lora_recipes.model import build
from lora_recipes.recipe.base import Resolved, resolve
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.training.resume import HARMLESS
from lora_recipes.training.train import Shared, train

# Keys of train: in which the runs of one process may differ: each run sets them anew. Any other may stay
# behind in the process (tf32 and full_determinism do), or belongs to the rows or to the base, which the runs
# share.
FREE = HARMLESS | {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "data_seed",
    "eval_steps",
    "eval_strategy",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "save_steps",
    "save_strategy",
    "seed",
    "warmup_steps",
    "weight_decay",
}


class Kept:
    """What the runs of one process share: the rows as tokenised, and the base as loaded. For runs of one
    `group`.
    """

    def __init__(self) -> None:
        self.gate: Gate | None = None
        self.base: PreTrainedModel | None = None

    def rows(self, resolved: Resolved, network: bool) -> Gate:
        """The rows, read and tokenised once; the tokenizer, which TRL writes to, is each run's own."""
        self.gate = self.gate or labels.gate(resolved, network)
        return dataclasses.replace(self.gate, tokenizer=copy.deepcopy(self.gate.tokenizer))

    def model(self, resolved: Resolved) -> PreTrainedModel:
        """A copy of the base, loaded once: PEFT changes the model it adapts, so the loaded one is never
        handed out.

        It is kept in host memory only. A base that loads straight onto the GPU (NF4) is loaded for each run:
        two of them there would be more than any plan has counted.
        """
        if self.base is None:
            loaded = build.model(resolved)
            if loaded.device.type != "cpu":
                return loaded
            self.base = loaded
        return copy.deepcopy(self.base)

    def __call__(self, run: Run, how: dict[str, Any], outputs: Path, lone: bool = False) -> Outcome:
        """Train one run in this process. What goes wrong is its outcome, not the end of the others.

        `how`: `resume` or `force`, and `memory` where it is planned already. `lone`: no other run shares the
        base.
        """
        name, memory = str(run), how.get("memory")
        shared = Shared(memory=memory) if lone else Shared(self.rows, self.model, memory)
        gc.collect()  # the trainer of the run before
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            resolved = resolve(run.recipe, outputs)
            done = train(resolved, how.get("resume", False), how.get("force", False), shared)
        except RecipeError as error:
            return Outcome(name, True, f"FAILED: {error}")
        except Exception as error:
            traceback.print_exc()
            log = f"{shown(outputs / run.recipe.name)}.log"
            return Outcome(name, True, f"FAILED: {type(error).__name__}: {error} ({log} has the traceback)")
        found = done.metrics
        losses = "".join(
            f", {word} loss {found[key]:.4f}"
            for word, key in (("train", "train_loss"), ("eval", "eval_loss"))
            if key in found
        )
        if done.scores:
            losses += f", macro F1 {done.scores.macro_f1:.4f}"
        return Outcome(name, False, f"{done.steps} steps in {done.seconds:.1f} s{losses}")


def group(recipe: Recipe) -> str:
    """Runs with the same text may share a process: all but lora: and the FREE keys of train: agree."""
    sections = {name: section for name, section in recipe.sections.items() if name not in ("lora", "probes")}
    sections["train"] = {key: value for key, value in recipe.train.given.items() if key not in FREE}
    return json.dumps(sections, sort_keys=True)
