"""Put on PYTHONPATH when vLLM runs from its CPU build: lets torchvision be imported.

The registry's torchvision is built for CUDA; without its compiled half the import fails ("operator
torchvision::nms does not exist"), and vLLM's Qwen3.5 classes import it. Only the schemas are needed: no text
model calls these operators. They are made when torchvision is looked for, not before: a server starts Pythons
that never do, and torch would take each of them a second.
"""

import sys


class _Schemas:
    """Asked for every module before it is searched for; has the schemas from torchvision on."""

    library = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leaves it to others to find the module."""
        if name == "torchvision" and not self.library:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Schemas())
