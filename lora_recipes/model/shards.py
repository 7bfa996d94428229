"""A merge without the model: each file of the base is read and written tensor by tensor, and each weight is
given its own delta, in float32, by PEFT's own layer, alone in memory.

So merges what changes a weight by itself: LoRA, DoRA, IA3 and modules_to_save, wherever the files hold that
weight as the class has it. What does not is named (`of`), and merged in the model (model/merge.py). Names of
tensors and files stay; files of PyTorch's own become safetensors.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from lora_recipes.core import base_fit, safetensors, weights
from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.weights import Stored
from lora_recipes.model import attach, build, checkpoint, stored
from lora_recipes.recipe.base import Folder

# init_lora_weights that leave the base as it is: PEFT runs it again when it loads an adapter.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
NUMBERS = 2**22  # of a tensor that are cast at once


@dataclass(frozen=True)
class Shards:
    """A merge of `adapter` into the files of `source` in `dtype`. On the meta device: `attached`, the class
    that trains with the adapter's layers, whose `values` are these tensors of its file; and `whole`, the
    class that is written. `changes`: of the merge; `names`: all that the class that trains has; `places`: the
    tensor of the files, of `every` one there, that a parameter is; `rounded`: the weights that training had
    in 4 bits.
    """

    adapter: Adapter
    source: Path
    dtype: str
    attached: PeftModel
    whole: Any
    values: dict[str, str]
    changes: stored.Changes
    names: list[str]
    places: dict[str, str]
    every: dict[str, Stored]
    rounded: dict[str, torch.Tensor]

    def write(self, target: Path, dequantised: dict[str, torch.Tensor]) -> None:
        """Write the merged model. `dequantised`: in place of the base's weights, by module."""
        target.mkdir(parents=True)
        with checkpoint.quietly():
            self.whole.save_pretrained(target, state_dict={})  # config.json and generation_config.json
        kinds, owners = self._kinds(), {place: name for name, place in self.places.items()}

        def content(name: str) -> Iterator[Any]:
            own, kind, tensor = owners.get(name, ""), kinds.get(name), self.every[name]
            if own in self.changes.updates:
                yield _raw(self._merged(own, dequantised), kind, name)
                weights.trim()
            elif (exact := dequantised.get(own.removesuffix(".weight"))) is not None:
                yield _raw(exact, kind, name)
            elif kind in (None, checkpoint.DTYPES.get(tensor.dtype)):
                yield from tensor.raw(0, tensor.size)
            else:
                for part in tensor.parts(max(1, NUMBERS // max(1, math.prod(tensor.shape[1:])))):
                    yield _raw(part, kind, name)

        files, total = weights.files(self.source), 0
        index: dict[str, str] = {}
        for path in files:
            held = [name for name, tensor in self.every.items() if tensor.path == path]
            held.sort(key=lambda name: -_width(self.every[name], kinds.get(name)))
            sizes = {name: _size(self.every[name], kinds.get(name)) for name in held}
            file = f"{path.stem.replace('pytorch_model', 'model')}.safetensors"
            safetensors.write(target / file, sizes, content)
            index |= dict.fromkeys(held, file)
            total += sum(size for _, _, size in sizes.values())
        if len(files) > 1 or files[0].name not in weights.NAMES:
            said = {"metadata": {"total_size": total}, "weight_map": index}
            text = json.dumps(said, indent=2, sort_keys=True) + "\n"
            (target / f"{weights.NAMES[0]}.index.json").write_text(text, encoding="utf-8")

    def _kinds(self) -> dict[str, torch.dtype]:
        """The dtype of each tensor of the files as it is written, where it has fractions: that of the class,
        which keeps some in float32; and where it has none of that name (experts that it joins), `dtype`.
        """
        kinds = {n: getattr(torch, self.dtype) for n, t in self.every.items() if t.dtype in checkpoint.DTYPES}
        for name, parameter in self.whole.state_dict().items():
            if (own := base_fit.own_name(name, self.every)) in kinds and parameter.is_floating_point():
                kinds[str(own)] = parameter.dtype
        return kinds

    @torch.no_grad()
    def _merged(self, name: str, dequantised: dict[str, torch.Tensor]) -> torch.Tensor:
        """The parameter `name`, merged in float32."""
        owner, _, leaf = name.rpartition(".")
        update = self.changes.updates[name]
        with safe_open(self.adapter.file, "pt") as file:
            if isinstance(update, stored.Whole):
                whole: torch.Tensor = file.get_tensor(update.tensor)
                return whole
            module: Any = self.attached.get_base_model().get_submodule(owner)
            layer = module.get_base_layer()
            both = ["weight", *(["bias"] if f"{owner}.bias" in self.changes.updates else [])]
            for part in both:
                exact = dequantised.get(owner) if part == "weight" else None
                exact = self.every[self.places[f"{owner}.{part}"]].tensor() if exact is None else exact
                exact = exact.to(torch.float32, copy=True)  # it is added to in place
                setattr(layer, part, nn.Parameter(exact, requires_grad=False))
            inside = {
                n: self.values.get(f"base_model.model.{owner}.{n}") for n, _ in module.named_parameters()
            }
            values = {n: file.get_tensor(saved).float() for n, saved in inside.items() if saved}
            module.load_state_dict(values, strict=False, assign=True)
        module.merge()  # what is no number is found by stored.check
        merged: torch.Tensor = getattr(layer, leaf).data
        module.to("meta").merged_adapters.clear()
        return merged


def of(
    adapter: Adapter, source: Path, dtype: str, architecture: Any, known: Provenance | None
) -> tuple[Shards | None, str]:
    """How `adapter` is merged into the files of `source`, in `dtype`, for the class `architecture` that its
    config names; or None, and why that needs the model.
    """
    if reason := _needs_the_model(adapter):
        return None, reason
    folder = Folder(source)
    model = checkpoint.on_shapes(folder)
    modules = dict(model.named_modules())
    if any(module not in modules for module in adapter.modules):
        model = checkpoint.on_shapes(folder, architecture)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    quantised = _quantised(folder, known)
    attached, values = attach.on_shapes(model, adapter)
    changes = stored.changes(attached, adapter)
    if changes.others or changes.biases:
        return None, f"no formula here for {listed([*changes.others] or ['biases'], 3)}"
    if both := sorted(tied & changes.updates.keys()):
        return None, f"{both[0]} is tied, and carries the adapter"
    every = weights.tensors(source)
    beside = [n.replace(".bias", ".weight") for n in changes.updates]  # IA3 changes both at once
    wanted = {*changes.updates, *beside, *(f"{module}.weight" for module in quantised)} & shapes.keys()
    found = {name: _place(model, name, shapes[name], every) for name in wanted}
    if lost := sorted(name for name, place in found.items() if place is None):
        return None, f"the files hold {listed(lost, 3)} in another form than the class"
    places = {name: str(place) for name, place in found.items()}
    if len({*places.values()}) < len(places):
        return None, "the files hold two of the class's parameters as one tensor"
    whole = checkpoint.on_shapes(folder, architecture, dtype=getattr(torch, dtype))
    if (source / "generation_config.json").is_file():
        whole.generation_config = GenerationConfig.from_pretrained(source)
    packed = {module: every[places[f"{module}.weight"]] for module in quantised}
    rounded = stored.Rounded(packed, known.dtype) if known and packed else {}
    names = [*shapes]
    return Shards(adapter, source, dtype, attached, whole, values, changes, names, places, every, rounded), ""


def _needs_the_model(adapter: Adapter) -> str:
    """Why `adapter` changes more than weights by themselves, by its config alone; empty if it does not."""
    config, kind = adapter.config, adapter.config["peft_type"]
    if kind not in ("LORA", "IA3"):
        return f"{kind} is merged by PEFT on the whole model"
    if config.get("task_type") == "SEQ_CLS":
        return "the head of a classifier is no tensor of its base"
    if config.get("trainable_token_indices"):
        return "rows of the embeddings were trained by themselves"
    if config.get("target_parameters"):
        return "routed experts (target_parameters) are joined of several tensors"
    if config.get("init_lora_weights") not in STARTS:
        return f"init_lora_weights: {config['init_lora_weights']} takes its part out of the whole base"
    return ""


def _quantised(source: Folder, known: Provenance | None) -> list[str]:
    """The modules of the base that training had in 4 bits, as transformers chooses them."""
    if known is None or not known.quantize:
        return []
    import bitsandbytes as bnb

    model = checkpoint.on_shapes(source)
    packed: Any = replace_with_bnb_linear(model, get_keys_to_not_convert(model), build.nf4(known.dtype))
    return [name for name, module in packed.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


def _place(model: Any, name: str, shape: tuple[int, ...], every: dict[str, Stored]) -> str | None:
    """The tensor of the files that is the parameter `name` of `model`, number by number; None where there is
    none: transformers joins, splits, turns or permutes some while it loads.
    """
    moves = not all(isinstance(c, WeightRenaming) for c in getattr(model, "_weight_conversions", None) or [])
    marks = (
        torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
        if moves
        else torch.empty(shape, device="meta")
    )
    found = stored.as_stored(model, name, marks)
    own = base_fit.own_name(next(iter(found)), every)
    if len(found) > 1 or own is None or every[own].shape != shape:
        return None
    (values,) = next(iter(found.values()))
    return own if not moves or torch.equal(values, marks) else None


def _size(tensor: Stored, kind: torch.dtype | None) -> tuple[str, tuple[int, ...], int]:
    """Its dtype, shape and bytes, as `kind`."""
    if kind is None:
        return tensor.dtype, tensor.shape, tensor.size
    return weights.word(kind), tensor.shape, math.prod(tensor.shape) * kind.itemsize


def _width(tensor: Stored, kind: torch.dtype | None) -> int:
    """Bytes of one number: the widest stand first, so that each is aligned."""
    return kind.itemsize if kind else tensor.size // max(1, math.prod(tensor.shape))


def _raw(tensor: torch.Tensor, kind: torch.dtype | None, name: str) -> Any:
    """The bytes of `tensor` in the dtype `kind`. RecipeError where that does not hold a number of it."""
    cast = tensor.to(kind).contiguous()
    if kind is torch.float16 and not cast.isfinite().all():
        do = "merge in bfloat16 or float32, which do"
        raise RecipeError(Problem(name, "float16 does not hold its numbers", do))
    return cast.flatten().view(torch.uint8).numpy()
