"""Names that people know from other tools, and fields that the launcher owns: what to write here instead.

Each answer is of one kind (a key, a command, an environment variable, nothing), so that the tests can hold it
against the schema, the scripts, the libraries or a finished run; `str(answer)` is what a person reads.
"""

from dataclasses import dataclass

from lora_recipes.core import cli


@dataclass(frozen=True)
class Write:
    """A key of the recipe: `section.key`, or `section:` for a whole section.

    `value`: what to give it, as YAML; `also`: more keys that take part of what the other tool's one says.
    """

    key: str
    value: str = ""
    note: str = ""
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The answer in words."""
        value = f": {self.value}" if self.value else ""
        note = f" ({self.note})" if self.note else ""
        return f"here it is {', '.join((self.key, *self.also))}{value}{note}"


@dataclass(frozen=True)
class Run:
    """Not a key but an option of a verb, as cli.command spells it: a variable of the Makefile, and its value
    (True: a switch).
    """

    verb: str
    variable: str = ""
    value: str | bool = True
    note: str = ""

    @property
    def option(self) -> str:
        """As scripts/`verb`.py takes it."""
        return cli.option(self.variable, self.value) if self.variable else ""

    def __str__(self) -> str:
        """The answer in words."""
        command = cli.command(self.verb, **({self.variable: self.value} if self.variable else {}))
        option = f" (scripts/{self.verb}.py {self.option})" if self.option and cli.by_make() else ""
        return f"use {command}{option}{self.note and f': {self.note}'}"


@dataclass(frozen=True)
class Environment:
    """A variable of the environment."""

    variable: str
    note: str

    def __str__(self) -> str:
        """The answer in words."""
        return f"set {self.variable} in the environment: {self.note}"


@dataclass(frozen=True)
class Nothing:
    """Nothing to set, and why."""

    reason: str

    def __str__(self) -> str:
        """The answer in words."""
        return f"nothing to set here: {self.reason}"


@dataclass(frozen=True)
class Without:
    """A field of the library that is not taken here, and why: at best it would do nothing."""

    reason: str

    def __str__(self) -> str:
        """The answer in words."""
        return f"remove it: {self.reason}"


Answer = Write | Run | Environment | Nothing | Without

_METHOD = Write(
    "lora:", also=("peft:", "freeze:", "full:"), note="one of these sections says what is trained"
)
_MERGED = Write(
    "model.name_or_path",
    note=f"an adapter is never the base: `{cli.command('merge')}` first, then name the merged folder",
)
_MODULES = Write("lora.target_modules")
_MODEL = Write("model.name_or_path")
_TOKENIZER = Write("model.tokenizer")
_ROWS = Write("data.train")
_EVAL = Write("data.eval")
_HELD_OUT = Write("data.eval", note="a file of its own")
_FORMAT = Write("data.format", note="messages, sharegpt, alpaca, completion or text")
_COLUMNS = Write("data.columns", note="our name: the column's, e.g. {messages: conversation}")
_NEW_TOKENS = Write("model.new_tokens", note="a list of texts; each becomes one token, and is trained")
_DTYPE = Write("model.dtype")
_NF4 = Write("model.quantize", "nf4")
_NO_8BIT = Write("model.quantize", "nf4", "4 bits; a base in 8 bits is not offered")
_ONLY_NF4 = Write("model.quantize", "nf4", "NF4 is the only kind; fp4 is not offered")
_DOUBLE = Write("model.quantize", "nf4", "double quantisation is part of it")
_COMPUTE = Write("model.dtype", note="a base in NF4 computes in it")
_FLASH = Write("model.attn_implementation", "flash_attention_2")
_BATCH = Write("train.per_device_train_batch_size")
_EVAL_BATCH = Write("train.per_device_eval_batch_size")
_EPOCHS = Write("train.num_train_epochs")
_LENGTH = Write("train.max_length")
_PACKING = Write("train.packing")
_OPTIM = Write("train.optim")
_SCHEDULE = Write("train.lr_scheduler_type")
_CLIP = Write("train.max_grad_norm")
_CHECKPOINTING = Write("train.gradient_checkpointing")
_LIGER = Write("train.use_liger_kernel")
_PROCESSES = Write("train.dataset_num_proc")
_SEQUENTIAL = Write("train.train_sampling_strategy", "sequential")
_MASKED = Write("train.completion_only_loss", also=("train.assistant_only_loss",))
_ASSISTANT = Write("train.assistant_only_loss", "true")
_TOKEN = Environment(
    "HF_TOKEN",
    "the recipe is copied into the run folder, and a secret would be with it; to read from the hub,"
    " `hf auth login` does too",
)
_RESUME = Run("train", "RESUME", note="the newest whole checkpoint is found and checked")
_NO_CACHE = Nothing("rows are read and made into tokens anew each time")
_SFT = Nothing("supervised fine-tuning is the only kind of training here")
_WRITTEN = "PEFT writes it from model.name_or_path"
_TRAINS = "an adapter that is trained is never in inference mode"
# What TRL would upload: a repository named "checkpoints", TRL's own card, a pickle, no provenance.json.
_UPLOAD = Run("push", "REPO", "owner/name", "after training; TRL's own leaves out what proves an adapter")
_PUBLIC = Run("push", "PUBLIC", note="the repository is private without it")
_UPLOADS_LESS = Without("nothing is uploaded while training, and one commit holds the adapter")
_LOSS_ONLY = Without("an evaluation keeps the loss and no logits, there is no metric that would read them")
_VERB = Without("the verb that is called says it: train, eval or plan")
_FULL_EVAL = Without("the evaluation after training would round the trained weights, and then they are saved")
_JOINED = Without("the processes join each other before the trainer reads it, with accelerate's own")
_UNTRIED = "a variant of LoRA that was not shown here to be saved, merged and served as it was trained"

# A key of another tool (or of an older release) -> what to write here. Axolotl, LLaMA-Factory, torchtune,
# Unsloth, older TRL and transformers, TRL's command line, the QLoRA script.
OTHER_NAMES: dict[str, Answer] = {
    "adafactor": Write("train.optim", "adafactor"),
    "adapter": _METHOD,
    "adapter_name_or_path": _MERGED,
    "adapter_path": _MERGED,
    "add_tokens": _NEW_TOKENS,
    "additional_target": Write("lora.modules_to_save"),
    "alpha": Write("lora.lora_alpha"),
    "apply_lora_to_mlp": _MODULES,
    "apply_lora_to_output": _MODULES,
    "auto_resume_from_checkpoints": _RESUME,
    "base_model": _MODEL,
    "base_model_config": _MODEL,
    "batch_size": _BATCH,
    "betas": Write("train.adam_beta1", also=("train.adam_beta2",)),
    "bnb_4bit_compute_dtype": _COMPUTE,
    "bnb_4bit_quant_storage": Nothing("4-bit weights are stored as uint8"),
    "bnb_4bit_quant_type": _ONLY_NF4,
    "bnb_4bit_use_double_quant": _DOUBLE,
    "chat_template_jinja": Write("model.chat_template", note="a .jinja file"),
    "checkpoint_dir": _MODEL,
    "clip_grad_norm": _CLIP,
    "column_map": _COLUMNS,
    "compile": Write("train.torch_compile"),
    "compute_dtype": _DTYPE,
    "conversation_column": _COLUMNS,
    "conversation_style": _FORMAT,
    "curriculum_sampling": _SEQUENTIAL,
    "cutoff_len": _LENGTH,
    "dataset": _ROWS,
    "dataset_config": Write("data.train", note="a source's name"),
    "dataset_dir": _ROWS,
    "dataset_name": _ROWS,
    "dataset_path": _ROWS,
    "dataset_prepared_path": _NO_CACHE,
    "dataset_processes": _PROCESSES,
    "dataset_streaming": Nothing("every row is read and checked before training"),
    "dataset_test_split": Write("data.eval", note="a source's split"),
    "dataset_train_split": Write("data.train", note="a source's split"),
    "datasets": _ROWS,
    "disable_gradient_checkpointing": Write("train.gradient_checkpointing", "false"),
    "disable_shuffling": _SEQUENTIAL,
    "double_quant": _DOUBLE,
    "double_quantization": _DOUBLE,
    "dropout": Write("lora.lora_dropout"),
    "eager_attention": Write("model.attn_implementation", "eager"),
    "enable_activation_checkpointing": _CHECKPOINTING,
    "enable_activation_offloading": Write("train.activation_offloading"),
    "enable_liger_kernel": _LIGER,
    "enable_thinking": Write("data.chat_template_kwargs", "{enable_thinking: false}"),
    "epochs": _EPOCHS,
    "eval_batch_size": _EVAL_BATCH,
    "eval_dataset": _EVAL,
    "eval_file": _EVAL,
    "eval_sample_packing": Write("train.eval_packing"),
    "evals_per_epoch": Write("train.eval_steps", note="below 1: a share of all steps"),
    "evaluation_strategy": Write("train.eval_strategy"),
    "export_dir": Run("merge", note="it writes outputs/<recipe name>/merged"),
    "field_input": _COLUMNS,
    "field_instruction": _COLUMNS,
    "field_messages": _COLUMNS,
    "field_output": _COLUMNS,
    "field_system": _COLUMNS,
    "field_tools": _COLUMNS,
    "finetuning_type": _METHOD,
    "flash_attention": _FLASH,
    "flash_attn": _FLASH,
    "flex_attention": Write("model.attn_implementation", "flex_attention"),
    "formatting": _FORMAT,
    "freeze_trainable_layers": Write("freeze.last_blocks"),
    "full_finetuning": Write("full:"),
    "grad_accum": Write("train.gradient_accumulation_steps"),
    "group_by_length": Write("train.train_sampling_strategy", "group_by_length"),
    "hf_use_auth_token": _TOKEN,
    "include_inputs_for_metrics": _LOSS_ONLY,
    "include_tokens_per_second": Write("train.include_num_input_tokens_seen"),
    "instruction_template": _ASSISTANT,
    "learning_rate_scheduler": _SCHEDULE,
    "load_in_4bit": _NF4,
    "load_in_8bit": _NO_8BIT,
    "log_every_n_steps": Write("train.logging_steps"),
    "log_peak_memory_stats": Nothing("run.json holds the memory that was used"),
    "logging_dir": Nothing(
        "metrics.jsonl and loss.png are in the run folder, and so are TensorBoard's files"
    ),
    "lora_attn_modules": _MODULES,
    "lora_fan_in_fan_out": Write("lora.fan_in_fan_out"),
    "lora_layers": Write("lora.layers_to_transform"),
    "lora_model_dir": _MERGED,
    "lora_modules": _MODULES,
    "lora_modules_to_save": Write("lora.modules_to_save"),
    "lora_r": Write("lora.r"),
    "lora_rank": Write("lora.r"),
    "lora_target": _MODULES,
    "lora_target_linear": Write("lora.target_modules", "all-linear"),
    "lora_target_modules": _MODULES,
    "lora_target_parameters": Write("lora.target_parameters"),
    "lora_task_type": Write("lora.task_type"),
    "loss": Write("train.loss_type"),
    "lr": Write("train.learning_rate"),
    "lr_scheduler": _SCHEDULE,
    "max_grad": _CLIP,
    "max_len": _LENGTH,
    "max_samples": Write("data.train", note="a source's weight below 1 takes a share"),
    "max_seq_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_steps_per_epoch": Write("train.max_steps", note="counted over the whole run"),
    "metric_logger": Write("train.report_to"),
    "micro_batch_size": _BATCH,
    "model_id": _MODEL,
    "model_name": _MODEL,
    "model_name_or_path": _MODEL,
    "model_revision": Write("model.revision"),
    "model_type": Nothing("the checkpoint's config names its class"),
    "modules": _MODULES,
    "neat_packing": _PACKING,
    "new_special_tokens": _NEW_TOKENS,
    "no_cuda": Write("train.use_cpu"),
    "noisy_embedding_alpha": Write("train.neftune_noise_alpha"),
    "num_epochs": _EPOCHS,
    "num_warmup_steps": Write("train.warmup_steps"),
    "optimizer": _OPTIM,
    "optimizer_name": _OPTIM,
    "overwrite_cache": _NO_CACHE,
    "overwrite_output_dir": Run("train", "FORCE", note="a finished run is replaced"),
    "packed": _PACKING,
    "peft_init_lora_weights": Write("lora.init_lora_weights"),
    "peft_layers_to_transform": Write("lora.layers_to_transform"),
    "peft_use_dora": Write("lora.use_dora"),
    "peft_use_rslora": Write("lora.use_rslora"),
    "per_gpu_eval_batch_size": _EVAL_BATCH,
    "per_gpu_train_batch_size": _BATCH,
    "pissa_init": Write("lora.init_lora_weights", "pissa"),
    "pissa_iter": Write("lora.init_lora_weights", "pissa_niter_16"),
    "plot_loss": Nothing("loss.png is always drawn"),
    "preprocessing_num_workers": _PROCESSES,
    "pure_bf16": Write("model.dtype", "bfloat16"),
    "push_to_hub_model_id": _UPLOAD,
    "push_to_hub_token": _TOKEN,
    "qlora": _NF4,
    "quant_method": _NF4,
    "quant_type": _ONLY_NF4,
    "quantization_bit": _NO_8BIT,
    "quantization_config": _NO_8BIT,
    "quantization_method": _NF4,
    "quantization_type": _ONLY_NF4,
    "quantize_base": _NF4,
    "random_state": Write("train.seed"),
    "rank": Write("lora.r"),
    "response_template": _MASKED,
    "revision_of_model": Write("model.revision"),
    "rl": _SFT,
    "roles_to_train": _ASSISTANT,
    "sample_packing": _PACKING,
    "save_safetensors": Nothing("safetensors is the only format now"),
    "saves_per_epoch": Write("train.save_steps", note="below 1: a share of all steps"),
    "sdp_attention": Write("model.attn_implementation", "sdpa"),
    "sequence_len": _LENGTH,
    "special_tokens": Write("train.eos_token", also=("train.pad_token",)),
    "stage": _SFT,
    "target": _MODULES,
    "template": Write("model.chat_template", note="default: the tokenizer's own"),
    "test_datasets": _EVAL,
    "tokenizer_config": _TOKENIZER,
    "tokenizer_name": _TOKENIZER,
    "tokenizer_name_or_path": _TOKENIZER,
    "tokens": _NEW_TOKENS,
    "torch_dtype": _DTYPE,
    "train_batch_size": _BATCH,
    "train_file": _ROWS,
    "train_on_input": Write("train.completion_only_loss", "false"),
    "train_on_inputs": _MASKED,
    "train_on_prompt": Write("train.completion_only_loss", "false"),
    "type": _FORMAT,
    "use_auth_token": _TOKEN,
    "use_bnb_nested_quant": _DOUBLE,
    "use_flash_attention_2": _FLASH,
    "use_gradient_checkpointing": _CHECKPOINTING,
    "use_liger": _LIGER,
    "use_mps_device": Nothing(
        "training uses a CUDA device, or the CPU where there is none, also on a Mac; Apple's GPU is not used"
    ),
    "use_peft": _METHOD,
    "use_reentrant": Write("train.gradient_checkpointing_kwargs", "{use_reentrant: false}"),
    "use_tensorboard": Write("train.report_to", "tensorboard"),
    "use_wandb": Write("train.report_to", "wandb"),
    "val_set_size": _HELD_OUT,
    "val_size": _HELD_OUT,
    "wandb_name": Write("train.run_name"),
    "wandb_project": Environment("WANDB_PROJECT", "the project's name; train.report_to: wandb turns it on"),
    "warmup_ratio": Write("train.warmup_steps", note="a value below 1 is a share of all steps"),
}

# A real field that the launcher sets itself -> where its value comes from instead.
OWNED: dict[str, Answer] = {
    "train.output_dir": Run(
        "train", "OUTPUTS", "DIR", "the run folder is <DIR>/<recipe name>, outputs/ by default"
    ),
    "train.resume_from_checkpoint": _RESUME,
    "train.model_init_kwargs": Write(
        "model.dtype", also=("model.attn_implementation", "model.revision", "model.quantize")
    ),
    "train.chat_template_path": Write("model.chat_template", note="so that the plan renders with it too"),
    "train.dataset_kwargs": Nothing("rows are prepared and checked before the trainer sees them"),
    "train.local_rank": Nothing("accelerate launch sets it"),
    "train.activation_checkpointing": Write(
        "train.gradient_checkpointing", note="TRL's own name for it, which the plan reads"
    ),
    "train.activation_checkpointing_kwargs": Write("train.gradient_checkpointing_kwargs"),
    "train.auto_find_batch_size": Without("another batch size would be other steps than were planned"),
    "train.batch_eval_metrics": _LOSS_ONLY,
    "train.bf16_full_eval": _FULL_EVAL,
    "train.ddp_backend": _JOINED,
    "train.ddp_timeout": _JOINED,
    "train.disable_tqdm": Without("a bar is drawn on a terminal only; each logging step has its line"),
    "train.do_eval": _VERB,
    "train.do_predict": _VERB,
    "train.do_train": _VERB,
    "train.enable_jit_checkpoint": Without(
        "its checkpoints have no checksums, and only whole ones are resumed from: set train.save_steps"
    ),
    "train.eval_accumulation_steps": _LOSS_ONLY,
    "train.eval_do_concat_batches": _LOSS_ONLY,
    "train.eval_use_gather_object": _LOSS_ONLY,
    "train.fp16_full_eval": _FULL_EVAL,
    "train.hub_always_push": _UPLOADS_LESS,
    "train.hub_model_id": _UPLOAD,
    "train.hub_private_repo": _PUBLIC,
    "train.hub_revision": _UPLOADS_LESS,
    "train.hub_strategy": _UPLOADS_LESS,
    "train.include_for_metrics": _LOSS_ONLY,
    "train.label_names": Without("the trainer is given the column `labels`, made from the rows"),
    "train.length_column_name": Without("the rows have no such column: their tokens are counted"),
    "train.logging_nan_inf_filter": Without("a loss that is no number is never hidden: training stops at it"),
    "train.prediction_loss_only": _LOSS_ONLY,
    "train.push_to_hub": _UPLOAD,
    "train.remove_unused_columns": Without("the rows reach the trainer as `input_ids` and `labels` alone"),
    "train.trust_remote_code": Without("no code out of a checkpoint is run: transformers' own classes are"),
    "train.use_cache": Without("training keeps no cache; with one, packed rows would see each other"),
    "lora.auto_mapping": Without("PEFT writes it, for classes that it does not know"),
    "lora.kasa_config": Without(_UNTRIED),
    "lora.lora_ga_config": Without("lora_ga needs gradients before training, which are not computed here"),
    "lora.megatron_core": Without("needs Megatron-LM"),
    "lora.monteclora_config": Without(_UNTRIED),
    "lora.peft_version": Without("PEFT writes its own"),
    "lora.qalora_group_size": Without("read with use_qalora alone, which has no effect here"),
    "lora.revision": Write("model.revision"),
    "lora.runtime_config": Without("no part of the base is offloaded here"),
    "lora.velora_config": Without(_UNTRIED),
    "train.hub_token": _TOKEN,
    "lora.peft_type": Write("lora:", also=("peft:",), note="lora: is of type LORA; peft: takes the others"),
    "peft.task_type": Nothing("SFTTrainer trains causal language models"),
    "peft.total_step": Nothing("the plan counts the steps and sets it"),
    "peft.inference_mode": Nothing(_TRAINS),
    "peft.base_model_name_or_path": Nothing(_WRITTEN),
    "lora.inference_mode": Nothing(_TRAINS),
    "lora.base_model_name_or_path": Nothing(_WRITTEN),
}
