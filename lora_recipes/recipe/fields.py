"""Every field of trl.SFTConfig and of peft.LoraConfig: what comes of it when a recipe says it.

`table()` has a row for each. A field is owned (it is set elsewhere), refused, checked by rules of rules.py,
or honoured: handed to the library as it is, within the types and limits of the schema. docs/fields.md is
written from it, tests/recipe/test_fields.py holds it against the installed classes. No torch.
"""

from dataclasses import dataclass
from typing import Literal

from lora_recipes.recipe.other_tools import OWNED, Without
from lora_recipes.recipe.rules import RULES

Fate = Literal["honoured", "checked", "owned", "refused"]
NEVER = ("this launcher", "any recipe")  # what a key does not go with that is refused at any value

# What a recipe may say, and what it means here beside what the class says of it.
TAKEN: dict[str, str] = {
    "train.per_device_train_batch_size": "",
    "train.num_train_epochs": "max_steps goes before it",
    "train.max_steps": "0 is refused once the steps are counted; below 0 the epochs decide",
    "train.learning_rate": "must be said",
    "train.lr_scheduler_type": "the plan draws it; a metric that it needs is asked for by TrainingArguments",
    "train.lr_scheduler_kwargs": "the plan makes the schedule with them",
    "train.warmup_steps": "below 1 it is a share of all steps; the plan counts them",
    "train.optim": "",
    "train.optim_args": "",
    "train.weight_decay": "",
    "train.adam_beta1": "",
    "train.adam_beta2": "",
    "train.adam_epsilon": "",
    "train.optim_target_modules": "",
    "train.gradient_accumulation_steps": "",
    "train.average_tokens_across_devices": "",
    "train.max_grad_norm": "0 does not clip",
    "train.label_smoothing_factor": "",
    "train.bf16": "where neither is said, it follows model.dtype",
    "train.fp16": "where neither is said, it follows model.dtype",
    "train.tf32": "TrainingArguments refuses it without such a GPU",
    "train.gradient_checkpointing": "",
    "train.gradient_checkpointing_kwargs": "",
    "train.torch_compile": "",
    "train.torch_compile_backend": "turns torch_compile on",
    "train.torch_compile_mode": "turns torch_compile on",
    "train.use_liger_kernel": "",
    "train.liger_kernel_config": "",
    "train.neftune_noise_alpha": "",
    "train.torch_empty_cache_steps": "",
    "train.logging_strategy": "",
    "train.logging_steps": "below 1 it is a share of all steps",
    "train.logging_first_step": "",
    "train.log_on_each_node": "",
    "train.include_num_input_tokens_seen": "",
    "train.log_level": "",
    "train.log_level_replica": "",
    "train.report_to": "none where nothing is said; TensorBoard's files go into the run folder",
    "train.run_name": "",
    "train.project": "",
    "train.trackio_space_id": "",
    "train.trackio_bucket_id": "",
    "train.trackio_static_space_id": "",
    "train.eval_strategy": "",
    "train.eval_steps": "below 1 it is a share of all steps; the last step always evaluates too",
    "train.eval_delay": "",
    "train.per_device_eval_batch_size": "",
    "train.eval_on_start": "",
    "train.save_only_model": "RESUME refuses such a run",
    "train.save_strategy": "",
    "train.save_steps": "below 1 it is a share of all steps; the last step always saves too",
    "train.save_on_each_node": "",
    "train.save_total_limit": "",
    "train.load_best_model_at_end": "true where there is an early_stopping: section",
    "train.metric_for_best_model": "",
    "train.greater_is_better": "where nothing is said, the metric's name tells",
    "train.ignore_data_skip": "a resumed run then sees other rows than one that was not stopped",
    "train.restore_callback_states_from_checkpoint": "true where there is an early_stopping: section",
    "train.full_determinism": "",
    "train.seed": "",
    "train.data_seed": "",
    "train.use_cpu": "true where there is no CUDA device, also on a Mac",
    "train.dataloader_drop_last": "steps are counted with it; none left is refused",
    "train.dataloader_num_workers": "",
    "train.dataloader_pin_memory": "",
    "train.dataloader_persistent_workers": "",
    "train.dataloader_prefetch_factor": "TrainingArguments refuses it without dataloader_num_workers",
    "train.dataloader_multiprocessing_context": "",
    "train.dataloader_in_order": "",
    "train.train_sampling_strategy": "where no key says how rows become batches, data.batching does",
    "train.ddp_find_unused_parameters": "false where nothing is said and lora: trains",
    "train.ddp_bucket_cap_mb": "",
    "train.ddp_broadcast_buffers": "",
    "train.ddp_static_graph": "",
    "train.debug": "TrainingArguments refuses other words",
    "train.skip_memory_metrics": "",
    "train.router_aux_loss_coef": "",
    "train.dataset_text_field": "the column of plain text rows",
    "train.dataset_num_proc": "processes for TRL's own truncation; rows are made into tokens before",
    "train.eos_token": "refused where the tokenizer does not have it",
    "train.max_length": "",
    "train.truncation_mode": "",
    "train.shuffle_dataset": "",
    "train.packing": "",
    "train.packing_strategy": "",
    "train.padding_free": "an evaluation stays padded; see data.batching",
    "train.pad_to_multiple_of": "",
    "train.eval_packing": "false where nothing is said",
    "train.completion_only_loss": "the labels are made with it before TRL sees the rows",
    "train.assistant_only_loss": "the labels are made with it before TRL sees the rows",
    "train.loss_type": "",
    "train.activation_offloading": "",
    "train.pad_token": "refused where the tokenizer does not have it",
    "lora.task_type": "",
    "lora.r": "must be said",
    "lora.target_modules": "must be said; each entry must name a module of the model",
    "lora.exclude_modules": "each entry must name a module of the model",
    "lora.lora_alpha": "must be said; a run is not resumed with another one",
    "lora.lora_dropout": "",
    "lora.fan_in_fan_out": "",
    "lora.bias": "",
    "lora.use_rslora": "",
    "lora.modules_to_save": "each entry must name a module of the model",
    "lora.init_lora_weights": "",
    "lora.layers_to_transform": "each must be a layer of the model; PEFT wants target_modules as a list",
    "lora.layers_pattern": "PEFT wants layers_to_transform with it",
    "lora.rank_pattern": "each entry must name an adapted module",
    "lora.alpha_pattern": "each entry must name an adapted module",
    "lora.trainable_token_indices": "",
    "lora.eva_config": "",
    "lora.corda_config": "",
    "lora.loftq_config": "",
    "lora.use_dora": "the plan says that vLLM does not serve it",
    "lora.lora_bias": "the plan says that vLLM does not serve it",
    "lora.target_parameters": "each entry must name a parameter of the model",
}


@dataclass(frozen=True)
class Row:
    """What comes of a field: its `fate`, and why or how."""

    fate: Fate
    said: str


def table() -> dict[str, Row]:
    """Every field as section.key, with what comes of it. A field of two fates is a mistake in this file."""
    rows: dict[str, Row] = {}
    for name, answer in OWNED.items():
        if not name.startswith("peft."):
            rows[name] = Row("refused" if isinstance(answer, Without) else "owned", str(answer))
    never = {r.key: Row("refused", f"{r.found}: {r.do}") for r in RULES if r.against in NEVER}
    for name, row in {**never, **{name: _taken(name, note) for name, note in TAKEN.items()}}.items():
        if name in rows or (name in never and name in TAKEN):
            raise AssertionError(f"{name} has two fates")
        rows[name] = row
    return dict(sorted(rows.items(), key=lambda row: (row[0].startswith("lora."), row[0])))


def _taken(name: str, note: str) -> Row:
    checks = list(dict.fromkeys(rule.against for rule in RULES if rule.key == name))
    said = "; ".join(filter(None, [note, f"does not go with {'; '.join(checks)}" if checks else ""]))
    return Row("checked" if checks else "honoured", said)
