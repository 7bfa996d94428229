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
        """Where and what, and on a line of its own what to do."""
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
    """The name most like `word`, case aside; where none is like it, one of about the same length. Empty if there are no names."""
    names = sorted(set(names))
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return lowered[close[0]] if close else min(names, key=lambda n: (abs(len(n) - len(word)), n), default="")


def listed(items: Iterable[str], most: int = 20) -> str:
    """`items` joined by commas, cut after `most` with a count of the rest."""
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# A key of another tool (or of an older release) -> the key here. Axolotl, LLaMA-Factory, torchtune, Unsloth, older TRL and transformers.
OTHER_NAMES = {
    "adafactor": "train.optim: adafactor",
    "adapter": "a section: lora: or full:",
    "adapter_name_or_path": "model.from_recipe (an adapter is never the base; name the recipe that trained the base)",
    "adapter_path": "model.from_recipe (an adapter is never the base; name the recipe that trained the base)",
    "additional_target": "lora.modules_to_save",
    "alpha": "lora.lora_alpha",
    "apply_lora_to_mlp": "lora.target_modules",
    "apply_lora_to_output": "lora.target_modules",
    "base_model": "model.name_or_path",
    "base_model_config": "model.name_or_path",
    "batch_size": "train.per_device_train_batch_size",
    "betas": "train.adam_beta1 and train.adam_beta2",
    "chat_template_jinja": "model.chat_template",
    "checkpoint_dir": "model.name_or_path",
    "clip_grad_norm": "train.max_grad_norm",
    "compile": "train.torch_compile",
    "compute_dtype": "model.dtype",
    "cutoff_len": "train.max_length",
    "dataset": "data.train",
    "dataset_config": "data.train (a source's name)",
    "dataset_dir": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "dataset_processes": "train.dataset_num_proc",
    "dataset_test_split": "data.eval (a source's split)",
    "dataset_train_split": "data.train (a source's split)",
    "datasets": "data.train",
    "disable_gradient_checkpointing": "train.gradient_checkpointing: false",
    "dropout": "lora.lora_dropout",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "enable_activation_offloading": "train.activation_offloading",
    "enable_liger_kernel": "train.use_liger_kernel",
    "enable_thinking": "data.chat_template_kwargs: {enable_thinking: false}",
    "epochs": "train.num_train_epochs",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "eval_dataset": "data.eval",
    "eval_file": "data.eval",
    "eval_sample_packing": "train.eval_packing",
    "evals_per_epoch": "train.eval_steps (below 1: a share of all steps)",
    "evaluation_strategy": "train.eval_strategy",
    "finetuning_type": "a section: lora:, freeze: or full:",
    "flash_attention": "model.attn_implementation: flash_attention_2",
    "flash_attn": "model.attn_implementation: flash_attention_2",
    "freeze_trainable_layers": "freeze.last_blocks",
    "full_finetuning": "a section: full:",
    "grad_accum": "train.gradient_accumulation_steps",
    "group_by_length": "train.train_sampling_strategy: group_by_length",
    "include_inputs_for_metrics": "train.include_for_metrics",
    "include_tokens_per_second": "train.include_num_input_tokens_seen",
    "learning_rate_scheduler": "train.lr_scheduler_type",
    "load_in_4bit": "nothing to set: the base is loaded in model.dtype, quantized bases are not trained here",
    "load_in_8bit": "nothing to set: the base is loaded in model.dtype, quantized bases are not trained here",
    "log_every_n_steps": "train.logging_steps",
    "logging_dir": "nothing to set: metrics.jsonl and loss.png are in the run folder",
    "lora_attn_modules": "lora.target_modules",
    "lora_fan_in_fan_out": "lora.fan_in_fan_out",
    "lora_layers": "lora.layers_to_transform",
    "lora_model_dir": "model.from_recipe (an adapter is never the base; name the recipe that trained the base)",
    "lora_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lora_target_modules": "lora.target_modules",
    "lora_task_type": "lora.task_type",
    "loss": "train.loss_type",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "max_grad": "train.max_grad_norm",
    "max_len": "train.max_length",
    "max_samples": "data.train (a source's weight below 1 takes a share)",
    "max_seq_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "max_steps_per_epoch": "train.max_steps",
    "metric_logger": "train.report_to",
    "micro_batch_size": "train.per_device_train_batch_size",
    "model_id": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "model_type": "nothing to set: the checkpoint's config names its class",
    "modules": "lora.target_modules",
    "neat_packing": "train.packing",
    "no_cuda": "train.use_cpu",
    "noisy_embedding_alpha": "train.neftune_noise_alpha",
    "num_epochs": "train.num_train_epochs",
    "num_warmup_steps": "train.warmup_steps",
    "optimizer": "train.optim",
    "optimizer_name": "train.optim",
    "overwrite_cache": "nothing to set: rows are read anew each time",
    "packed": "train.packing",
    "peft_init_lora_weights": "lora.init_lora_weights",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "per_gpu_eval_batch_size": "train.per_device_eval_batch_size",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "pissa_init": "lora.init_lora_weights: pissa",
    "pissa_iter": "lora.init_lora_weights: pissa_niter_16",
    "plot_loss": "nothing to set: loss.png is always drawn",
    "preprocessing_num_workers": "train.dataset_num_proc",
    "pure_bf16": "model.dtype: bfloat16",
    "push_to_hub_model_id": "train.hub_model_id",
    "quantization_bit": "nothing to set: the base is loaded in model.dtype, quantized bases are not trained here",
    "quantize_base": "nothing to set: the base is loaded in model.dtype, quantized bases are not trained here",
    "random_state": "train.seed",
    "rank": "lora.r",
    "response_template": "train.completion_only_loss or train.assistant_only_loss",
    "sample_packing": "train.packing",
    "save_safetensors": "nothing to set: safetensors is the only format now",
    "saves_per_epoch": "train.save_steps (below 1: a share of all steps)",
    "sequence_len": "train.max_length",
    "special_tokens": "train.eos_token and train.pad_token",
    "stage": "nothing to set: all training here is supervised",
    "target": "lora.target_modules",
    "template": "model.chat_template",
    "test_datasets": "data.eval",
    "tokenizer_config": "model.tokenizer",
    "tokenizer_name": "model.tokenizer",
    "tokenizer_name_or_path": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "train_batch_size": "train.per_device_train_batch_size",
    "train_file": "data.train",
    "train_on_inputs": "train.completion_only_loss or train.assistant_only_loss",
    "train_on_prompt": "train.completion_only_loss: false",
    "use_flash_attention_2": "model.attn_implementation: flash_attention_2",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "use_liger": "train.use_liger_kernel",
    "use_mps_device": "nothing to set: the device is found",
    "use_peft": "a section: lora: or full:",
    "use_reentrant": "train.gradient_checkpointing_kwargs: {use_reentrant: false}",
    "use_wandb": "train.report_to: wandb",
    "val_set_size": "data.eval (a file of its own)",
    "val_size": "data.eval (a file of its own)",
    "wandb_name": "train.run_name",
    "wandb_project": "train.report_to: wandb (the project's name comes from WANDB_PROJECT)",
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
    "train.hub_token": "set HF_TOKEN or run `hf auth login`: the recipe is copied into the run folder, and a secret with it",
    "lora.peft_type": "the section's name says it: lora: (peft: is for the other types)",
    "peft.task_type": "SFTTrainer trains causal language models",
    "peft.total_step": "the plan counts the steps and sets it",
    "peft.inference_mode": "an adapter that is trained is never in inference mode",
    "peft.base_model_name_or_path": "PEFT writes it from model.name_or_path",
    "lora.inference_mode": "an adapter that is trained is never in inference mode",
    "lora.base_model_name_or_path": "PEFT writes it from model.name_or_path",
}
