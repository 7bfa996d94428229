"""What GPU kernels hold in memory: stand-ins that allocate as the kernels' own sources do, and compute
nothing.

Read from flash-linear-attention (fla/ops/gated_delta_rule/chunk.py), causal-conv1d
(causal_conv1d_interface.py) and PyTorch (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp);
not measured on a GPU.
"""

from typing import Any

import torch

CHUNK = 64  # tokens; FLA's chunk size


class GatedDeltaRule(torch.autograd.Function):
    """FLA's chunk_gated_delta_rule: queries and keys (B, T, H, K), values (B, T, HV, V), decay and beta (B,
    T, HV).
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, g: Any, beta: Any, normalise: bool) -> Any:
        """Keeps the normalised queries and keys, the values, the summed decay and the (B, T, HV, 64) matrix
        of each chunk.
        """
        query, key, value, beta = (t.contiguous() for t in (query, key, value, beta))
        norms = [None, None]
        if normalise:
            query, key = torch.empty_like(query), torch.empty_like(key)
            norms = [query.new_empty(t.shape[:-1], dtype=torch.float32) for t in (query, key)]
        g = torch.empty_like(g, dtype=torch.float32)
        raw = g.new_empty((*g.shape, CHUNK))
        matrix = raw.to(key.dtype)
        del raw
        w, u = _repeated(key, value), torch.empty_like(value)
        states, new = _states(key, value), torch.empty_like(value)
        del w, u
        output = torch.empty_like(value)
        del states, new
        ctx.save_for_backward(query, key, value, g, beta, matrix, *norms)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """Computes the chunk states again, then the gradients with a head of queries and keys for each head
        of values.
        """
        query, key, value, g, beta, _matrix, *norms = ctx.saved_tensors
        w, u = _repeated(key, value), torch.empty_like(value)
        states, new = _states(key, value), torch.empty_like(value)
        del u
        local = torch.empty_like(value)
        d_states, d_new = _states(key, value), torch.empty_like(value)
        del local
        d_query, d_key, d_w, d_g = (*(_repeated(key, value) for _ in range(3)), torch.empty_like(g))
        del states, new, d_states, w
        d_key2, d_value = _repeated(key, value), torch.empty_like(value)
        d_beta = torch.empty_like(beta)
        del d_new, d_w, d_key2
        d_query, d_key = _grouped(d_query, query), _grouped(d_key, key)
        if norms[0] is not None:
            d_query, d_key = torch.empty_like(d_query), torch.empty_like(d_key)
        return d_query, d_key, d_value, d_g, d_beta, None


def _repeated(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return key.new_empty((*value.shape[:-1], key.shape[-1]))


def _grouped(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return gradient if gradient.shape == like.shape else torch.empty_like(like)


def _states(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The recurrent state at the start of each chunk: (B, chunks, HV, K, V)."""
    batch, tokens, heads, width = value.shape
    return key.new_empty((batch, -(-tokens // CHUNK), heads, key.shape[-1], width))


def chunk_gated_delta_rule(
    query: Any, key: Any, value: Any, g: Any, beta: Any, use_qk_l2norm_in_kernel: bool = False, **_: Any
) -> Any:
    """As transformers calls FLA's; without a final state."""
    return GatedDeltaRule.apply(query, key, value, g, beta, use_qk_l2norm_in_kernel), None


class CausalConv(torch.autograd.Function):
    """causal-conv1d's causal_conv1d_fn on (B, channels, T): keeps its input; the activation is inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        """One output of the input's size."""
        ctx.save_for_backward(hidden, weight)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """The input's gradient, and the weight's in float32."""
        hidden, weight = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32).to(weight.dtype)


def causal_conv1d_fn(
    hidden_states: Any, weight: Any, bias: Any = None, activation: Any = None, **_: Any
) -> Any:
    """As transformers calls causal-conv1d's."""
    return CausalConv.apply(hidden_states, weight)


# a name in transformers' modeling files -> the package whose kernel takes its place, and that kernel's stand-
# in
_FUNCTIONS = {
    "torch_chunk_gated_delta_rule": ("fla", chunk_gated_delta_rule),
    "causal_conv1d_fn": ("causal_conv1d", causal_conv1d_fn),
}


def used(modeling: Any) -> list[str]:
    """The packages that would make `modeling` (a module of transformers) faster."""
    return [package for name, (package, _) in _FUNCTIONS.items() if hasattr(modeling, name)]


def stand_ins(modeling: Any, fast: frozenset[str]) -> dict[str, Any]:
    """What to call instead: the stand-in where the package is among `fast`, else transformers' own code in
    torch.
    """
    found = {}
    for name, (package, stand_in) in _FUNCTIONS.items():
        if function := getattr(modeling, name, None):
            found[name] = stand_in if package in fast else getattr(function, "__wrapped__", function)
    return found


def softmax_backward(result: torch.Tensor, *_: Any, **__: Any) -> int:
    """Eager attention on CUDA: gradient times output, of the output's size."""
    return result.untyped_storage().nbytes()


def flash_backward(result: Any, gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """FlashAttention 2's backward pass on (B, heads, T, D): queries' gradient in float32, and a head of keys
    and values a query head.
    """
    batch, heads, tokens, width = query.shape
    summed = batch * heads * (-(-tokens // 128) * 128) * (width + 1) * 4
    expanded = 2 * batch * heads * key.shape[2] * width * key.element_size() if key.shape[1] != heads else 0
    return summed + expanded


EXTRA = {
    torch.ops.aten._softmax_backward_data.default: softmax_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_backward,
}
