"""One training step without bytes: the model, the optimiser and the batch of a run as fake tensors, its
storages counted.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, PreTrainedConfig, Trainer, TrainingArguments
from trl.models.selective_activation_checkpointing import enable_selective_activation_checkpointing
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from lora_recipes.memory import blocks, fake, kernels, storages
from lora_recipes.memory.fits import gib
from lora_recipes.memory.storages import Peak, Storages, Stretch
from lora_recipes.model import embeddings, experts, freeze, heads, parts, targets
from lora_recipes.recipe.sections import Freeze

aten = torch.ops.aten
NF4_BITS = 4.127  # of a weight in NF4 with double quantisation
HEAD_OUTPUTS = (
    "log_probs",
    "entropy",
    "is_top1",
)  # what SFTTrainer asks of TRL's fused head; a test holds it against a real trainer


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run: `rows` rows of `width` tokens, of which `supervised` have a label.

    `padded`: are some rows shorter? `packed`: is it one flat row of several sequences (TRL's padding-free
    form)?
    """

    rows: int
    width: int
    supervised: int
    padded: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Setup:
    """All that decides how much memory a step takes.

    `dtype`: of the base; `adapter`: the dtype in which the adapter trains, None for PEFT's own choice.
    `fast`: the packages whose kernels are planned for (fla, causal_conv1d). `cuda`: plan for a GPU, else for
    the CPU as it runs here. `evaluation`: the largest batch of an evaluation pass. `trl`: TRL's loss; else
    transformers' own, whole logits held through the backward pass. `prepared`: after
    peft.prepare_model_for_kbit_training. `freeze`: that section of the recipe. `new_tokens`: their ids.
    `copies` of what is trained are kept beside it, besides the optimiser's. `head`: the classes and the
    pooling of task: classify, whose loss is then that of the head; None where text is written.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    arguments: TrainingArguments
    batch: Batch
    peft_config: PeftConfig | None = None
    adapter: torch.dtype | None = None
    quantize: BitsAndBytesConfig | None = None
    attention: str | None = None
    fast: frozenset[str] = frozenset()
    cuda: bool = True
    evaluation: Batch | None = None
    trl: bool = True
    prepared: bool = False
    freeze: Freeze | None = None
    new_tokens: tuple[int, ...] = ()
    copies: int = 0
    head: tuple[tuple[str, ...], str] | None = None


@dataclass
class Run:
    """What was seen: the peak of each stretch; how many parameters, all and trained; `paged`: optimiser bytes
    in paged memory.
    """

    peaks: dict[Stretch, Peak]
    parameters: int
    trainable: int
    paged: int = 0


@dataclass
class Whole:
    """The model that trains, on the meta device, and the `base` inside it; its `blocks`, None where it has no
    list of them, and the `kinds` of those.
    """

    model: Any
    base: Any
    blocks: nn.ModuleList | None
    kinds: list[int]
    mode: FakeTensorMode

    @property
    def parameters(self) -> tuple[int, int]:
        """How many, all and trained."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return sum(p.numel() for p in self.model.parameters()), trained


def whole(setup: Setup) -> Whole:
    """The model of `setup` with its adapter. Takes no memory for tensors."""
    config = copy.deepcopy(setup.config)
    config.get_text_config().use_cache = False
    model, base = _model(setup, config)
    decoder = parts.decoder(base)
    stack = blocks.stack(decoder)
    opened = any(getattr(m, "_require_grads_hooks", None) for m in base.modules())
    kinds = blocks.kinds(decoder, stack, opened) if stack is not None else []
    return Whole(model, base, stack, kinds, FakeTensorMode(allow_non_fake_inputs=True))


def run(setup: Setup, whole: Whole, chosen: list[int] | None = None) -> Run:
    """One step of `setup` on the `chosen` blocks (default: all), the optimiser's state in place as from the
    second step on.
    """
    model, base, mode = whole.model.train(), whole.base, whole.mode
    with contextlib.ExitStack() as stack:
        if chosen is not None and whole.blocks is not None:
            stack.enter_context(blocks.only(parts.decoder(base), whole.blocks, chosen))
        statistics = stack.enter_context(fake.materialised(model, setup.dtype, mode))
        trained = [p for p in model.parameters() if p.requires_grad]
        inputs, held_out = (
            batch and _inputs(batch, setup, mode) for batch in (setup.batch, setup.evaluation)
        )
        compiled = setup.arguments.torch_compile and not setup.cuda
        text = base.config.get_text_config()
        stack.enter_context(fake.untraced(text, setup.fast, setup.cuda, compiled))
        stack.enter_context(mode)
        optimizer, paged = _optimizer(model, trained, setup)
        counted = _storages(setup, setup.batch)
        ids = {id(p) for p in trained}
        owned = "base" if setup.peft_config is None else "adapter"
        counted.add((p for p in model.parameters() if id(p) not in ids), "base")
        counted.add((*model.buffers(), *statistics), "base")
        counted.add(trained, owned)
        copies = [torch.empty_like(p) for p in trained for _ in range(setup.copies)]
        counted.add(copies, owned)
        counted.add(_tensors(optimizer, paged), "optimiser")
        for hook in _hooks(counted, base, trained, whole.blocks):
            stack.callback(hook.remove)
        counted.stretch = "embedding" if whole.blocks else "forward", 0
        _train(model, optimizer, trained, setup, counted, inputs)
        if held_out:
            _evaluate(model, setup, counted, held_out)
        parameters = sum(p.numel() for p in model.parameters()) if not setup.quantize else _unpacked(model)
        return Run(counted.peaks, parameters, sum(p.numel() for p in trained), sum(p.nbytes for p in paged))


def unpacked(whole: Whole) -> str:
    """What NF4 leaves in the base's own dtype, and why: bitsandbytes replaces nn.Linear alone. "" for a base
    that is not quantised.
    """
    packed = {id(m.weight): m.weight for m in whole.base.modules() if fake.in_4bit(m)}
    if not packed:
        return ""
    routed = {id(p) for layer in experts.routed(whole.base) for p in layer.parameters}
    ends = [whole.base.get_input_embeddings(), whole.base.get_output_embeddings()]
    outer = {id(p) for module in ends if module is not None for p in module.parameters()}
    left = {"experts, which are parameters and no nn.Linear": 0, "embeddings and head": 0, "others": 0}
    for parameter in whole.base.parameters():
        if parameter.requires_grad or id(parameter) in packed:
            continue
        kind = 0 if id(parameter) in routed else 1 if id(parameter) in outer else 2
        left[list(left)[kind]] += parameter.nbytes
    size = int(sum(p.numel() for p in packed.values()) * NF4_BITS / 8)
    stay = sum(left.values())
    kinds = ", ".join(f"{gib(nbytes)} {kind}" for kind, nbytes in left.items() if nbytes)
    done = f"{gib(size)} GiB in NF4, {len(packed):,} linear modules"
    return f"{done}; {gib(stay)} of {gib(size + stay)} GiB stay as they are: {kinds}"


def _unpacked(model: nn.Module) -> int:
    shapes = (getattr(p, "quant_state", None) for p in model.parameters())
    return sum(
        state.shape.numel() if state else p.numel()
        for p, state in zip(model.parameters(), shapes, strict=True)
    )


def _model(setup: Setup, config: PreTrainedConfig) -> tuple[Any, Any]:
    """The model that trains, and the base inside it, as SFTTrainer and Trainer set them up."""
    base = fake.base(config, setup.dtype, setup.attention, setup.quantize)
    if setup.prepared:
        for parameter in base.parameters():
            if type(parameter) is nn.Parameter and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    embeddings.grow(base, list(setup.new_tokens))
    if setup.freeze is not None:
        freeze.apply(base, setup.freeze)
    if setup.head is not None:
        base = heads.of(base, list(setup.head[0]), setup.head[1])
    adapter = copy.deepcopy(setup.peft_config)
    new = list(setup.new_tokens)
    adapter = adapter and targets.resolved(base, embeddings.training(adapter, base, new))
    model = fake.adapted(base, adapter, setup.adapter)
    if setup.head is None:
        embeddings.readable_head(model)
    elif setup.adapter is not None:
        heads.trained(model, setup.adapter)
    _checkpointed(model, setup)
    if setup.trl and setup.head is None:
        add_fused_lm_head(base, outputs=HEAD_OUTPUTS)
    return model.train(), base


def _checkpointed(model: Any, setup: Setup) -> None:
    """Gradient checkpointing as the trainer turns it on."""
    if setup.arguments.gradient_checkpointing:
        given: Any = setup.arguments.gradient_checkpointing_kwargs
        options = dict(given or {})
        if options.pop("selective", False):
            enable_selective_activation_checkpointing(model)
        more = {k: options.pop(k) for k in ("every_n_layers",) if k in options}
        options.pop("offload", None)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None, **more)
        if setup.peft_config:
            model.enable_input_require_grads()


def _storages(setup: Setup, batch: Batch) -> Storages:
    """The counter, which answers what depends on values: is the batch plain, and how many positions are
    supervised?
    """
    plain = not (batch.padded or batch.packed)

    def value(func: Any, tensor: torch.Tensor) -> bool | int:
        return plain if tensor.dtype == torch.bool else 1

    def chosen(func: Any, tensor: torch.Tensor, indices: Any, *args: Any) -> torch.Tensor:
        if indices[0] is not None and indices[0].dtype == torch.bool:
            return tensor.new_empty((batch.supervised, *tensor.shape[indices[0].dim() :]))
        return func(tensor, indices, *args)

    def put(func: Any, tensor: torch.Tensor, indices: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if indices[0] is not None and indices[0].dtype == torch.bool:
            return tensor
        return func(tensor, indices, *args, **kwargs)

    def grouped(func: Any, one: torch.Tensor, other: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(S, K) by (E, K, N) is (S, N), a group of rows with each of E; (K, S) by (S, N) is (E, K, N). The
        kernel takes other dtypes than bfloat16 too, on CPU and CUDA; its shape function does not.
        """
        if one.dtype == torch.bfloat16:
            return func(one, other, *args, **kwargs)
        experts = (args[0] if args else kwargs["offs"]).shape[0]
        shape = (one.shape[0], other.shape[-1])
        return one.new_empty(shape if other.dim() == 3 else (experts, *shape))

    handlers: dict[Any, Any] = {
        aten._grouped_mm.default: grouped,
        aten._local_scalar_dense.default: value,
        aten.index.Tensor: chosen,
        aten._index_put_impl_.default: put,
    }
    return Storages(kernels.EXTRA if setup.cuda else {}, handlers | {aten.index_put_.default: put})


def _optimizer(model: Any, trained: list[nn.Parameter], setup: Setup) -> tuple[Any, list[torch.Tensor]]:
    """The optimiser of train.optim with its state, and the part of that state which bitsandbytes keeps in
    paged memory.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(setup.arguments, model)
    if setup.cuda and "foreach" in kind.__init__.__code__.co_varnames and not options.get("fused"):
        options = options | {"foreach": True}  # PyTorch's default for CUDA tensors
    with unset_fake_temporarily():  # bitsandbytes computes the tables of its 8-bit states here
        optimizer = kind(trained, **options)
    if any(base.__name__ == "Optimizer2State" for base in kind.__mro__):  # bitsandbytes' own
        return optimizer, _bitsandbytes(optimizer, model, setup)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with _storages(setup, setup.batch):
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, []


def _bitsandbytes(optimizer: Any, model: Any, setup: Setup) -> list[torch.Tensor]:
    """Its kernels cannot run on fake tensors and work in place; its own init_state makes the state.
    Embeddings stay at 32 bits.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    config, paged = optimizer.get_config, []
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            bits = {"optim_bits": 32} if id(parameter) in embeddings else {}
            optimizer.get_config = lambda *args, bits=bits: config(*args) | bits
            optimizer.init_state(group, parameter, group_index, index)
            if optimizer.is_paged and setup.cuda and parameter.numel() >= 1e5:  # bitsandbytes' own limit
                paged += [optimizer.state[parameter][k] for k in ("state1", "state2")]
    optimizer.step = lambda: None
    return paged


def _tensors(optimizer: Any, without: list[torch.Tensor]) -> list[torch.Tensor]:
    skipped = {id(t) for t in without}
    return [
        t
        for t in tree_leaves(list(optimizer.state.values()))
        if isinstance(t, torch.Tensor) and id(t) not in skipped
    ]


def _hooks(
    counted: Storages, base: Any, trained: list[nn.Parameter], stack: nn.ModuleList | None
) -> list[Any]:
    layers = list(stack) if stack is not None else []
    made = [*storages.mark(counted, layers), storages.head(counted, parts.decoder(base), len(layers))]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: counted.add([p.grad], "gradients"))
    return made


def _inputs(batch: Batch, setup: Setup, mode: FakeTensorMode) -> dict[str, Any]:
    """The batch as the collator makes it, TRL's or that of a head, as fake tensors."""
    lengths = [batch.width] * batch.rows
    if batch.padded:
        lengths[1:] = [max(batch.width - 1, 1)] * (batch.rows - 1)
    rows: list[dict[str, Any]] = [{"input_ids": [0] * n, "labels": [0] * n} for n in lengths]
    if batch.packed:
        for row, n in zip(rows, lengths, strict=True):
            row["seq_lengths"] = [n // 2, n - n // 2]
    made = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=batch.packed)(rows)
    if setup.head is not None:  # a class a row
        mask = made.get("attention_mask", torch.ones_like(made["input_ids"]))
        made = made | {"labels": made["labels"][:, 0].clone(), "attention_mask": mask}
    return {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def _train(
    model: Any, optimizer: Any, trained: list[nn.Parameter], setup: Setup, counted: Storages, inputs: Any
) -> None:
    """Forward, backward, clip, step: what Trainer.training_step and SFTTrainer.compute_loss do, of one
    micro-batch.
    """
    if setup.arguments.gradient_accumulation_steps > 1:  # the gradients of the micro-batches before
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        counted.add((p.grad for p in trained), "gradients")
    counted.add((v for v in inputs.values() if isinstance(v, torch.Tensor)), "activations")
    with counted:
        with fake.autocast(setup.arguments):
            loss, held = _forward(model, setup, inputs)
        counted.stretch = "backward head", 0
        loss.backward()
        del loss, held
        counted.stretch, counted.label = ("clip", 0), "optimiser"
        if setup.arguments.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, setup.arguments.max_grad_norm)
        counted.stretch = "optimizer", 0
        optimizer.step()
        optimizer.zero_grad()
    counted.label = "activations"


def _forward(model: Any, setup: Setup, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """The loss, and the outputs that the trainer holds beside it."""
    if setup.head is not None:
        labels = inputs["labels"]
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        weights, smoothing = [1.0] * len(setup.head[0]), setup.arguments.label_smoothing_factor
        return heads.loss(weights, smoothing)(outputs, labels), outputs
    if setup.trl:
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return _loss(outputs), None
    outputs = model(**inputs, use_cache=False)
    return outputs.loss, outputs


def _loss(outputs: Any) -> torch.Tensor:
    return (-outputs.log_probs).sum() / outputs.label_mask.sum().clamp(min=1)


def _evaluate(model: Any, setup: Setup, counted: Storages, inputs: dict[str, Any]) -> None:
    """One batch of an evaluation pass between two steps."""
    assert setup.evaluation
    handlers = counted.handlers
    counted.handlers = _storages(setup, setup.evaluation).handlers
    counted.stretch = "evaluation", 0
    counted.add((v for v in inputs.values() if isinstance(v, torch.Tensor)), "activations")
    with counted, torch.no_grad(), fake.autocast(setup.arguments):
        model.eval()
        _forward(model, setup, inputs)
    counted.handlers = handlers
