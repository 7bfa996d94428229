"""What the program says when something is wrong: one error family, and the rows of advice it draws on."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` (file:line section.key), what was `found`, and what to `do` about it."""

    where: str
    found: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.found}" + (f"\n    -> {self.do}" if self.do else "")


class RecipeError(ValueError):
    """A mistake of the user's, or of the machine they are on. Carries every problem that was found, not only the first."""

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


def raise_if(problems: list[Problem]) -> None:
    """Raise one RecipeError that holds all `problems`, if there are any."""
    if problems:
        raise RecipeError(problems)


def nearest(word: str, names: Iterable[str]) -> str:
    """The name most like `word`; for very short words, one of about the same length. Empty if there are no names."""
    names = sorted(set(names))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return close[0] if close else min(names, key=lambda n: (abs(len(n) - len(word)), n), default="")


def listed(items: Iterable[str], most: int = 20) -> str:
    """`items` joined by commas, cut after `most` with a count of the rest."""
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# A key of another tool (or of an older release) -> the key here. Axolotl, LLaMA-Factory, torchtune, Unsloth, TRL < 0.20.
OTHER_NAMES = {
    "adapter_path": "model.from_recipe (an adapter is never the base; name the recipe that trained the base)",
    "alpha": "lora.lora_alpha",
    "base_model": "model.name_or_path",
    "batch_size": "train.per_device_train_batch_size",
    "betas": "train.adam_beta1 and train.adam_beta2",
    "cutoff_len": "train.max_length",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "datasets": "data.train",
    "dropout": "lora.lora_dropout",
    "early_stopping_patience": "early_stopping.early_stopping_patience",
    "epochs": "train.num_train_epochs",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "eval_dataset": "data.eval",
    "eval_file": "data.eval",
    "evaluation_strategy": "train.eval_strategy",
    "finetuning_type": "a section: lora: or full:",
    "flash_attention": "model.attn_implementation: flash_attention_2",
    "grad_accum": "train.gradient_accumulation_steps",
    "learning_rate_scheduler": "train.lr_scheduler_type",
    "lora_droupout": "lora.lora_dropout",
    "lora_layers": "lora.layers_to_transform",
    "lora_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lora_target_modules": "lora.target_modules",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "max_grad": "train.max_grad_norm",
    "max_len": "train.max_length",
    "max_seq_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "model_id": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "modules": "lora.target_modules",
    "neat_packing": "train.packing",
    "num_epochs": "train.num_train_epochs",
    "optimizer": "train.optim",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "peft_use_dora": "lora.use_dora",
    "rank": "lora.r",
    "sample_packing": "train.packing",
    "save_safetensors": "nothing: safetensors is the only format now",
    "sequence_len": "train.max_length",
    "target": "lora.target_modules",
    "template": "model.chat_template",
    "torch_dtype": "model.dtype",
    "train_batch_size": "train.per_device_train_batch_size",
    "train_file": "data.train",
    "train_on_inputs": "train.completion_only_loss or train.assistant_only_loss",
    "val_set_size": "data.eval (a file of its own)",
    "warmup_ratio": "train.warmup_steps (a value below 1 is a share of all steps)",
}

# A real field that the launcher sets itself -> where its value comes from instead.
OWNED = {
    "train.output_dir": "the run folder is outputs/<recipe name>; give --outputs DIR to move them all",
    "train.resume_from_checkpoint": "use RESUME=1 (or --resume): the newest whole checkpoint is found and checked",
    "train.overwrite_output_dir": "use FORCE=1 (or --force)",
    "train.model_init_kwargs": "use the model: section (dtype, attn_implementation, revision)",
    "train.chat_template_path": "use model.chat_template, so that the plan renders with it too",
    "train.dataset_kwargs": "rows are prepared and checked before the trainer sees them; there is nothing to pass on",
    "train.local_rank": "accelerate launch sets it",
    "lora.peft_type": "the section's name says it: lora:",
    "lora.inference_mode": "an adapter that is trained is never in inference mode",
    "lora.base_model_name_or_path": "PEFT writes it from model.name_or_path",
}
