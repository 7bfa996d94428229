"""Are the tensors of a merged model, as its files hold them, base + adapter, but for one rounding? Tensor by
tensor, in float64.

The delta is computed here from the adapter's own file; only the scaling of a module, and whether it keeps its
matrix transposed, are what PEFT made of adapter_config.json on the class that was trained.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open

from lora_recipes.core import base_fit, safetensors
from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.yamlfile import shown

ROWS = 2048  # of a matrix at once, so that a float64 copy of it stays small


@dataclass(frozen=True)
class Update:
    """s B A of one module: the names of A and B in the adapter's file, s, and whether the weight is stored as
    its transpose.
    """

    a: str
    b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Changes:
    """What a merge changes, by parameter name of the class that was trained: `updates` that can be computed
    here, and `others`, which only PEFT computes (DoRA, other methods, whole modules, rows), by prefix.
    """

    updates: dict[str, Update]
    others: tuple[str, ...]
    biases: bool

    def touches(self, name: str) -> bool:
        """May the merge change the parameter `name` in a way that is not computed here?"""
        inside = any(name.startswith(f"{prefix}.") for prefix in self.others)
        return inside or (self.biases and name.endswith(".bias"))


def changes(attached: PeftModel, adapter: Adapter) -> Changes:
    """What merging `attached`, which carries `adapter` on the class that was trained, will change."""
    updates, others = {}, []
    biases = adapter.config.get("bias", "none") != "none" or bool(adapter.config.get("lora_bias"))
    for name, module in attached.get_base_model().named_modules():
        pair = adapter.modules.get(name, {}) if adapter.config["peft_type"] == "LORA" else {}
        if isinstance(module, AuxiliaryTrainingWrapper):
            others.append(name)
        elif isinstance(module, LoraLayer) and not module.lora_variant and set(pair) == {"A", "B"}:
            transposed = bool(getattr(module, "fan_in_fan_out", False)) or "lora_embedding" in pair["A"]
            updates[f"{name}.weight"] = Update(pair["A"], pair["B"], module.scaling["default"], transposed)
        elif isinstance(module, BaseTunerLayer):
            others.append(name)
    return Changes(updates, tuple(others), biases)


class Files:
    """The tensors of a model folder, each read when it is asked for."""

    def __init__(self, folder: Path):
        self.where = {name: file for file in safetensors.files(folder) for name in safetensors.header(file)}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU."""
        with safe_open(self.where[name], "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found


def put(dequantised: dict[str, torch.Tensor], model: Any) -> None:
    """Replace the weights of these modules of `model`, which may carry an adapter."""
    for name, tensor in dequantised.items():
        module = model.get_submodule(name)
        getattr(module, "base_layer", module).weight.data.copy_(tensor)


def check(
    adapter: Adapter,
    source: Path,
    target: Path,
    changed: Changes,
    names: Iterable[str],
    dequantised: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Hold every tensor of the merged model in `target` against the base's files and the adapter's.

    `names`: of the parameters of the class that was trained. `dequantised`: weights that the base had in
    training, by module, where they are not those of its files. Returns how many tensors were computed, how
    many are the base's, and `lost_in_rounding`: the share of the update (Frobenius) that rounding took.
    RecipeError names the tensors that are something else.
    """
    base, made = Files(source), Files(target)
    trained = {own: name for name in names if (own := base_fit.own_name(name, base.where))}
    wrong, same, computed, lost, size = [], 0, 0, 0.0, 0.0
    with safe_open(adapter.file, "pt") as pairs:
        for name in made.where:
            if name not in base.where:
                continue  # a head that is tied no longer
            own = trained.get(name, name)
            stored, before = made.tensor(name), dequantised.get(own.removesuffix(".weight"))
            before = base.tensor(name) if before is None else before
            if update := changed.updates.get(own):
                computed += 1
                found = _updated(stored, before, pairs, update)
                lost, size = lost + found[1], size + found[2]
                if not found[0] <= 1:
                    wrong.append(f"{name} is off by {found[0]:.3g} times what rounding allows")
            elif not changed.touches(own) and stored.shape == before.shape:
                same += 1
                if not torch.equal(stored, before.to(stored.dtype)):
                    wrong.append(f"{name} is not the base's, and carries no adapter")
    if computed != len(changed.updates):
        wrong.append(f"{len(changed.updates) - computed} adapted modules are not in the files")
    if wrong:
        found_ = f"the merged model is not base + adapter: {listed(wrong, 3)}"
        raise RecipeError(Problem(shown(adapter.path), found_, "nothing was written; please report this"))
    kept = {"tensors_computed": computed, "tensors_of_the_base": same}
    return kept | {"lost_in_rounding": (lost / size) ** 0.5 if size else 0.0}


def _updated(
    stored: torch.Tensor, before: torch.Tensor, pairs: Any, update: Update
) -> tuple[float, float, float]:
    """How far `stored` is from `before` + s B A at most, as a multiple of what is allowed; and the squared
    Frobenius norms of that difference and of s B A.

    Allowed: half a step of the dtype in which it is stored, and what a sum of r products in float32 may lose.
    """
    a, b = pairs.get_tensor(update.a).double(), pairs.get_tensor(update.b).double()
    left, right = (a.T, b.T) if update.transposed else (b, a)
    step, single = torch.finfo(stored.dtype), torch.finfo(torch.float32).eps / 2
    off = lost = size = 0.0
    for i in range(0, len(left), ROWS):
        rows = left[i : i + ROWS]
        was, delta = before[i : i + ROWS].double(), update.scaling * (rows @ right)
        apart = (stored[i : i + ROWS].double() - was - delta).abs()
        sums = was.abs() + abs(update.scaling) * (rows.abs() @ right.abs())
        allowed = step.eps / 2 * (was + delta).abs() + (len(right) + 4) * single * sums + step.smallest_normal
        off = max(off, (apart / allowed).nan_to_num(nan=torch.inf).max().item())
        lost, size = lost + apart.square().sum().item(), size + delta.square().sum().item()
    return off, lost, size
