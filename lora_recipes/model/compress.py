"""A whole model in fewer bits, as vLLM reads it: each weight of a linear layer rounded to the nearest step.

Run as a file, by the Python of the serving environment, whose compressed-tensors is the one that vLLM reads
with; it imports nothing of this package. Standard input: JSON of `source` and `target` (folders), `kind` (a
class of transformers), `scheme` (a preset of compressed-tensors), `group_size` (numbers that share a scale;
null: the scheme's own) and `ignore` (linear layers that stay as they are). Rounded in float32, for in 16 bits
a quotient is itself off by half a step; scales, and what has none, are stored in 16.
"""

import json
import sys
from typing import Any

import torch
import transformers
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized


def main(source: str, target: str, kind: str, scheme: str, group_size: int | None, ignore: list[str]) -> None:
    """Write the model in `source` to `target`, quantised by `scheme`."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    half = torch.float16 if config.get_text_config().dtype == torch.float16 else torch.bfloat16
    own = getattr(transformers, kind)
    model = own.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    wanted = preset_name_to_scheme(scheme, ["Linear"])
    wanted.weights.group_size = group_size or wanted.weights.group_size
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": wanted}, ignore=ignore))
    for module in model.modules():
        if is_module_quantized(module):
            scale(module, half)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.to(half)
    model.save_pretrained(target)
    compressor.update_config(target)


@torch.no_grad()
def scale(module: Any, stored: torch.dtype) -> None:
    """Set the scales [rows, groups] of a linear layer, as they will be `stored`: the largest number of each
    group is the last step.
    """
    args = module.quantization_scheme.weights
    groups = module.weight.float().unflatten(1, (-1, args.group_size or module.weight.shape[1]))
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    module.weight_scale.copy_(scales.to(stored))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.copy_(zeros)


if __name__ == "__main__":
    main(**json.load(sys.stdin))
