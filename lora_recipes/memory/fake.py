"""A model as it will be trained, made of fake tensors: shapes and dtypes, no bytes. What is counted on it is
what training would hold.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.lora import dora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    masking_utils,
)
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from trl.kernels import chunked_logprob

from lora_recipes.memory import kernels
from lora_recipes.model import lm_head, parts, targets


def base(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, quantize: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """The base model on the meta device, as `from_pretrained` would leave it: its linear modules 4-bit ones
    where `quantize` says so. `attention` None: what transformers chooses; others than sdpa and eager hold
    what sdpa holds without a mask, which stands for them also where the class has no sdpa.
    """
    options = {"attn_implementation": attention} if attention in ("sdpa", "eager") else {}
    model: Any = parts.build(config, dtype, **options)
    if attention not in (None, "sdpa", "eager"):
        parts.decoder(model).config._attn_implementation = "sdpa"
    if quantize:
        model = replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantize)
        model.is_loaded_in_4bit = True
    return model


def adapted(model: PreTrainedModel, config: PeftConfig | None, dtype: torch.dtype | None) -> Any:
    """`model` with its adapter, whose parameters train in `dtype`; None leaves them as PEFT makes them."""
    if config is None:
        return model
    config = targets.of_text(config, model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(dora, "dequantize_module_weight", _whole))
        packed = next((module.weight for module in model.modules() if in_4bit(module)), None)
        if packed is not None:
            # DoRA measures each weight at the start, on a copy; a 4-bit weight on the meta device is not
            # packed yet, and cannot be copied.
            stack.enter_context(replaced(type(packed), "__deepcopy__", lambda weight, memo: weight))
        peft_model: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
    for parameter in peft_model.parameters():
        if dtype and parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return peft_model


def _whole(module: Any) -> torch.Tensor:
    """PEFT's dequantize_module_weight, which knows a 4-bit weight by its class; a fake tensor has its own."""
    if (state := getattr(module.weight, "quant_state", None)) is None:
        return module.weight
    from bitsandbytes.functional import dequantize_4bit

    whole: torch.Tensor = dequantize_4bit(module.weight, state)
    return whole


def in_4bit(module: Any) -> bool:
    """Is it a linear module of bitsandbytes? Asked by name, as that package need not be installed."""
    return type(module).__name__ == "Linear4bit"


@contextlib.contextmanager
def materialised(model: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> Iterator[list[torch.Tensor]]:
    """A fake CPU tensor stands in place of every meta parameter and buffer, for a while; tied ones stay tied;
    4-bit ones are packed.

    `dtype`: of the weights before they were quantised. Gives the 4-bit weights' statistics, which are no
    parameters.
    """
    made: dict[int, torch.Tensor] = {}
    statistics: list[torch.Tensor] = []
    module: Any
    if any(in_4bit(module) for module in model.modules()):
        from bitsandbytes.functional import create_dynamic_map, name2qmap

        # It computes this when it first needs it, from real numbers.
        name2qmap.setdefault("dynamic", create_dynamic_map())
    before: list[tuple[Any, dict[str, Any]]] = [
        (tensors, dict(tensors)) for m in model.modules() for tensors in (m._parameters, m._buffers)
    ]
    try:
        for tensors, given in before:
            for name, tensor in given.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        made[id(tensor)] = _fake(tensor, dtype, statistics)
                tensors[name] = made[id(tensor)]
        for module in model.modules():
            if in_4bit(module):
                weight: Any = module.weight
                module.quant_state = weight.quant_state
                module.support_avx512bf16_for_cpu = False
        yield statistics
    finally:
        for tensors, given in before:
            tensors.clear()
            tensors.update(given)


def _fake(tensor: torch.Tensor, dtype: torch.dtype, statistics: list[torch.Tensor]) -> torch.Tensor:
    plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return plain
    given: Any = tensor
    if type(given).__name__ != "Params4bit":
        return nn.Parameter(plain, requires_grad=tensor.requires_grad)
    from bitsandbytes.functional import quantize_4bit

    kind = {
        "compress_statistics": given.compress_statistics,
        "quant_type": given.quant_type,
        "quant_storage": given.quant_storage,
    }
    packed, state = quantize_4bit(plain.to(dtype), blocksize=given.blocksize, **kind)
    weight: Any = nn.Parameter(packed, requires_grad=False)  # a Params4bit would quantise it again
    vars(weight).update(
        kind, quant_state=state, bnb_quantized=True, blocksize=given.blocksize, module=given.module
    )
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    statistics += [state.absmax, state.code, *nested]
    return weight


@contextlib.contextmanager
def untraced(config: PreTrainedConfig, fast: frozenset[str], cuda: bool, compiled: bool) -> Iterator[None]:
    """Libraries take a fake tensor for a traced graph, and Triton kernels take none at all: here they run as
    in training.

    `fast`: the packages (fla, causal_conv1d) whose kernels are planned for. `cuda`: plan TRL's head for a
    device with Triton, where it needs no memory beside its tile. `compiled`: the run is, by torch_compile.
    """
    swaps: list[tuple[Any, str, Any]] = [
        (masking_utils, "is_tracing", lambda *_: False),
        (dora, "dequantize_module_weight", _whole),
    ]
    modeling = modeling_of(config)
    swaps += [(modeling, name, function) for name, function in kernels.stand_ins(modeling, fast).items()]
    if cuda:
        swaps += [
            (chunked_logprob, name, lambda *_, **__: None)
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")
        ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in swaps:
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(lm_head.of_labels(compiled))
        yield


@contextlib.contextmanager
def autocast(arguments: TrainingArguments) -> Iterator[None]:
    """The autocast of a training step with `arguments`."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
        yield


def modeling_of(config: PreTrainedConfig) -> Any:
    """The module of transformers that holds the model class of `config`: the one beside the config, or, where
    the class is another family's (EXAONE, InternLM3), that one's.
    """
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    if importlib.util.find_spec(name) is None:
        kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
        name = kind.__module__
    return importlib.import_module(name)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
