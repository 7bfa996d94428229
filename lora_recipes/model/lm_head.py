"""TRL's loss takes the logits of the positions that have a label: on a CPU too, where its own takes all.

trl/trainer/utils.py (add_fused_lm_head) leaves out the others where Triton's kernels run, and nowhere else:
their number, another in each batch, would have a compiled graph made anew. A CPU that compiles nothing only
multiplies less: in a chat most positions are a prompt's. The loss is the same sum over the same positions.
"""

import contextlib
from collections.abc import Iterator

import torch
from trl.trainer import utils

_of_trl = utils._use_triton


@contextlib.contextmanager
def of_labels(compiled: bool = False) -> Iterator[None]:
    """TRL's loss inside: of the labelled positions. `compiled`: under torch_compile, which stays as it is."""
    utils._use_triton = _of_trl if compiled else _labelled
    try:
        yield
    finally:
        utils._use_triton = _of_trl


def _labelled(device: torch.device) -> bool:
    return device.type == "cpu" or _of_trl(device)
