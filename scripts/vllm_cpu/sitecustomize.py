"""Put on PYTHONPATH when vLLM runs from its CPU build: lets torchvision be imported.

The registry's torchvision is built for CUDA; without its compiled half the import fails ("operator
torchvision::nms does not exist"), and vLLM's Qwen3.5 classes import it. Only the schemas are needed: no text
model calls these operators.
"""

import contextlib

with contextlib.suppress(ImportError):
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
