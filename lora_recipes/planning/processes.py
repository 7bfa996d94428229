"""How a run is spread over processes: what each of them holds by arithmetic, and what does not go together.
Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_recipes.core.errors import Problem
from lora_recipes.memory.fits import gib
from lora_recipes.recipe.recipe import Recipe

ONE, DDP, FSDP2, ZERO2, ZERO3 = "one process", "DDP", "FSDP2", "ZeRO-2", "ZeRO-3"
BUCKET = (
    5 * 10**7
)  # reduce_bucket_size of configs/accelerate/zero2.json and zero3.json; a test holds them against it
PERSISTENT = (
    10**5
)  # stage3_param_persistence_threshold there: a tensor of fewer values, as A and B are, stays whole


@dataclass(frozen=True)
class Layout:
    """`processes`, one a device, and their `kind`: ONE, DDP, FSDP2, ZERO2 or ZERO3, else as accelerate calls
    it.
    """

    kind: str = ONE
    processes: int = 1

    @property
    def sharded(self) -> bool:
        """Are the weights themselves divided?"""
        return self.kind in (FSDP2, ZERO3)

    def __str__(self) -> str:
        """In words."""
        return (
            self.kind
            if self.processes == 1 and self.kind == ONE
            else f"{self.kind}, {self.processes} processes"
        )


SINGLE = Layout()


def of(processes: int, kind: str = DDP) -> Layout:
    """`processes` under `kind`; one process that divides nothing is ONE."""
    return Layout(ONE if processes == 1 and kind == DDP else kind, processes)


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


def problems(layout: Layout, recipe: Recipe) -> list[Problem]:
    """What of the recipe does not work under this layout, or was not shown to; found before anything is
    loaded.
    """
    found = []
    for field in ("fsdp", "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config"):
        if recipe.train.get(field):
            do = "remove it: make train ACCELERATE=name, a file of configs/accelerate/"
            found.append(Problem(recipe.at("train", field), "where to train is no part of a recipe", do))
    kinds = (ONE, DDP, FSDP2, ZERO2, ZERO3)
    if layout.kind not in kinds:
        found.append(
            Problem(
                "ACCELERATE", f"{layout.kind} was not shown to work here", f"one of {', '.join(kinds[1:])}"
            )
        )
    if layout.kind != ONE:
        text = f"was not shown to work in several processes ({layout.kind})"
        places = [
            ("warm_start", None, "warm_start" in recipe.sections),
            ("model", "new_tokens", bool(recipe.model.get("new_tokens"))),
        ]
        places.append(("lora", "init_lora_weights", recipe.lora.get("init_lora_weights") == "loftq"))
        found += [
            Problem(recipe.at(s, k) if k else recipe.at(s), f"{k or s} {text}", "train in one process")
            for s, k, on in places
            if on
        ]
    return found + (_divided(layout, recipe) if layout.kind in (FSDP2, ZERO2, ZERO3) else [])


def _divided(layout: Layout, recipe: Recipe) -> list[Problem]:
    """FSDP2 and DeepSpeed: they hold parameters where PEFT and this project do not look for them."""
    name, do, found = layout.kind, "ACCELERATE=ddp", []
    if "quantize" in recipe.model and layout.sharded:
        text = {
            FSDP2: (
                "FSDP2 leaves 4-bit weights of integer storage whole on each device (accelerate 1.15,"
                " fsdp2_prepare_model)"
            ),
            ZERO3: (
                "ZeRO-3 would cut the packed 4-bit weights apart from their scales (bitsandbytes stores them"
                " as uint8)"
            ),
        }[name]
        found.append(
            Problem(
                recipe.at("model", "quantize"), text, f"{do} (4-bit weights are small), or remove quantize"
            )
        )
    if "quantize" in recipe.model and name == ZERO2:
        found.append(
            Problem(recipe.at("model", "quantize"), f"NF4 under {name} was not shown to work here", do)
        )
    if recipe.method not in ("lora", "full") or (recipe.method == "full" and layout.sharded):
        found.append(
            Problem(recipe.at(recipe.method), f"{recipe.method}: under {name} was not shown to work here", do)
        )
    not_shown = [("lora", "use_dora"), ("lora", "modules_to_save"), ("lora", "trainable_token_indices")]
    found += [
        Problem(recipe.at(section, key), f"{key} under {name} was not shown to work here", do)
        for section, key in not_shown
        if recipe.sections.get(section, {}).get(key)
    ]
    if recipe.lora.get("init_lora_weights", True) is not True:
        text = (
            f"an initialisation by {recipe.lora['init_lora_weights']} under {name} was not shown to work here"
        )
        found.append(Problem(recipe.at("lora", "init_lora_weights"), text, do))
    dtype = recipe.model["dtype"]
    if (
        name != FSDP2
        and recipe.method == "lora"
        and dtype != "float32"
        and recipe.model.get("adapter_dtype", "float32") != dtype
    ):
        text = (
            f"DeepSpeed trains the adapter in the base's {dtype} (its optimiser keeps float32 copies), not in"
            " float32"
        )
        found.append(
            Problem(recipe.at("model", "adapter_dtype"), text, f"set model.adapter_dtype={dtype}, or {do}")
        )
    if "learning_rates" in recipe.sections:
        found.append(
            Problem(
                recipe.at("learning_rates"), f"learning_rates: under {name} was not shown to work here", do
            )
        )
    return found
