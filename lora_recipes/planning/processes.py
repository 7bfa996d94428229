"""What each of several processes holds, by arithmetic. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_recipes.memory.fits import gib
from lora_recipes.recipe.layout import DDP, FSDP2, ZERO2, ZERO3, Layout

# reduce_bucket_size of configs/accelerate/zero2.json and zero3.json; a test holds them against it
BUCKET = 5 * 10**7
# stage3_param_persistence_threshold there: a tensor of fewer values, as A and B are, stays whole
PERSISTENT = 10**5


@dataclass(frozen=True)
class Sizes:
    """What the arithmetic needs: trained parameters, `largest` decoder layer and `ends` (embedding and head)
    in parameters, and bytes.

    `width`: bytes of a weight of the base; `trained`: of a trained parameter as it trains.
    """

    trainable: int
    largest: int
    ends: int
    width: int
    trained: int


def per_device(layout: Layout, parts: Mapping[str, int], sizes: Sizes) -> tuple[dict[str, int], list[str]]:
    """Memory of each device from that of one process (`parts`, bytes), and how it was computed, a line each.

    What a process computes (activations, workspace) stays: each has its own batch. What is divided by n, the
    number of processes: nothing under DDP; gradients and optimiser state under ZeRO-2; those and the weights
    under ZeRO-3 and FSDP2, which gather a layer when it is used. Sources: torch DistributedDataParallel
    (gradient_as_bucket_view false: buckets beside the gradients), DeepSpeed 0.19
    runtime/zero/stage_1_and_2.py and stage3.py, accelerate 1.15 fsdp_utils.fsdp2_prepare_model (a unit a
    layer, embedding and head whole).
    """
    n, found = layout.processes, dict(parts)
    gradients = sizes.trainable * sizes.trained
    if layout.kind == DDP:
        said = [f"base, adapter, optimiser: whole on each; buckets {gib(gradients)}: a copy of all gradients"]
        return found | {"buckets": gradients}, said
    if layout.kind not in (ZERO2, ZERO3, FSDP2):
        return found, []
    masters = (
        sizes.trainable * 4 if layout.kind != FSDP2 and sizes.width == 2 else 0
    )  # DeepSpeed's float32 copies of bf16 and fp16
    state = parts["optimiser"] * 4 // sizes.trained if masters else parts["optimiser"]  # follows the copies
    found["optimiser"] = (state + masters) // n
    found["gradients"] = parts["gradients"] // n
    copies = f" + {gib(masters)} of float32 masters" if masters else ""
    said = [f"optimiser: ({gib(state)}{copies}) / {n}; gradients / {n}"]
    if layout.kind != FSDP2:
        found["buckets"] = BUCKET * sizes.trained
        said.append(f"buckets {gib(found['buckets'])}: reduce_bucket_size {BUCKET:,} x {sizes.trained} bytes")
    if layout.kind == ZERO2:
        return found, ["base, adapter: whole on each", *said]
    gathered = (sizes.largest * (2 if layout.kind == FSDP2 else 1) + sizes.ends) * sizes.width
    found["base"], found["gathered"] = parts["base"] // n, gathered
    if layout.kind == FSDP2:
        found["adapter"] = parts["adapter"] // n
    adapter = (
        f"adapter / {n}"
        if layout.kind == FSDP2
        else f"adapter whole (tensors below {PERSISTENT:,} values are not divided)"
    )
    layers = "2 layers (one runs, the next is fetched)" if layout.kind == FSDP2 else "1 layer"
    line = (
        f"base {gib(parts['base'])} / {n}; {adapter}; gathered {gib(gathered)}: {layers}, embedding and head"
    )
    unseen = (
        ["FSDP2 itself was never run by this project, whose tests have no GPU"]
        if layout.kind == FSDP2
        else []
    )
    return found, [line, *said, *unseen]
