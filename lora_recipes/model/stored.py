"""Are the tensors of a merged model, as its files hold them, base + adapter, but for one rounding? Tensor by
tensor, in float64.

What each weight becomes is computed here from the adapter's own files, by LoRA, DoRA (arXiv 2402.09353)
and IA3 (arXiv 2205.05638); only whether a module keeps its matrix transposed is what PEFT made of them on the
class that was trained. What other methods change is named, and left to the answers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lora_recipes.core import base_fit, weights
from lora_recipes.core.adapter_folder import Adapter, scaling
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.yamlfile import shown

NUMBERS = 2**17  # of a matrix at once: 1 MiB of float64, in some ten copies


@dataclass(frozen=True)
class Update:
    """W + s B A of one module: the names of A and B in the adapter's file, s, and whether the weight is
    stored as its transpose. By DoRA m (W + s B A) / |W + s B A|, norms over the inputs: `magnitude` is the
    name of m. `experts`: how many matrices the parameter holds, each with an A and a B of its own (PEFT's
    target_parameters); 0 for one without that dimension.
    """

    a: str
    b: str
    scaling: float
    transposed: bool
    magnitude: str | None = None
    experts: int = 0


@dataclass(frozen=True)
class Factor:
    """l W of one parameter, by IA3. `vector`: the name of l in the adapter's file, [out, 1] or (of inputs)
    [1, in].
    """

    vector: str
    transposed: bool


@dataclass(frozen=True)
class Whole:
    """A parameter that was trained itself (modules_to_save): its name in the adapter's file."""

    tensor: str


@dataclass(frozen=True)
class Changes:
    """What a merge changes, by parameter name of the class that was trained: `updates` that can be computed
    here, and `others`, which only PEFT computes (other methods, rows of embeddings), by prefix.
    """

    updates: dict[str, Update | Factor | Whole]
    others: tuple[str, ...]
    biases: bool

    def touches(self, name: str) -> bool:
        """May the merge change the parameter `name` in a way that is not computed here?"""
        inside = any(name.startswith(f"{prefix}.") for prefix in self.others)
        return inside or (self.biases and name.endswith(".bias"))


def changes(attached: PeftModel, adapter: Adapter) -> Changes:
    """What merging `attached`, which carries `adapter` on the class that was trained, will change."""
    updates: dict[str, Update | Factor | Whole] = {}
    others = []
    biases = adapter.config.get("bias", "none") != "none" or bool(adapter.config.get("lora_bias"))
    for name, module in attached.get_base_model().named_modules():
        pair = adapter.modules.get(name, {}) if adapter.config["peft_type"] == "LORA" else {}
        at, transposed = f"base_model.model.{name}.", bool(getattr(module, "fan_in_fan_out", False))
        if isinstance(module, ModulesToSaveWrapper):
            updates |= {f"{name}.{n.removeprefix(at)}": Whole(n) for n in adapter.tensors if n.startswith(at)}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            others.append(name)
        elif isinstance(module, ParamWrapper) and set(pair) == {"A", "B"}:
            own = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            shape, factor = module.get_param().shape, scaling(adapter.config, own)
            # PEFT's own question to the class: are its matrices [in, out]?
            inward = len(shape) == 3 and not module._did_swap_in_out_features
            count = shape[0] if len(shape) == 3 else 0
            updates[own] = Update(pair["A"], pair["B"], factor, inward, experts=count)
        elif isinstance(module, LoraLayer) and set(pair) == {"A", "B"} and _known(module):
            magnitude = f"{at}lora_magnitude_vector" if module.lora_variant else None
            transposed = transposed or "lora_embedding" in pair["A"]
            factor = scaling(adapter.config, name)
            updates[f"{name}.weight"] = Update(pair["A"], pair["B"], factor, transposed, magnitude)
        elif isinstance(module, IA3Layer) and f"{at}ia3_l" in adapter.tensors:
            updates[f"{name}.weight"] = Factor(f"{at}ia3_l", transposed)
            if not module.is_feedforward and getattr(module.get_base_layer(), "bias", None) is not None:
                updates[f"{name}.bias"] = Factor(f"{at}ia3_l", transposed)
        elif isinstance(module, BaseTunerLayer):
            others.append(name)
    return Changes(updates, tuple(others), biases)


def _known(module: LoraLayer) -> bool:
    """Is it LoRA or DoRA of a matrix?"""
    return all(isinstance(variant, DoraLinearVariant) for variant in module.lora_variant.values())


class Rounded(dict[str, torch.Tensor]):
    """As `dequantised`, of a base that is not in memory: each weight is rounded by bitsandbytes when it is
    asked for, and not kept. `places`: where each module's weight stands in its files; `dtype`: of training.
    """

    def __init__(self, places: dict[str, weights.Stored], dtype: str) -> None:
        super().__init__()
        self.places, self.dtype = places, getattr(torch, dtype)

    def get(self, module: str, default: Any = None) -> Any:
        """The weight of `module`; `default` where it was not quantised."""
        import bitsandbytes as bnb

        if module not in self.places:
            return default
        whole = self.places[module].tensor().to(self.dtype)
        packed: Any = bnb.nn.Params4bit(whole, requires_grad=False, quant_type="nf4")
        packed = packed.to("cpu")
        return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)


def dequantised(attached: PeftModel) -> dict[str, torch.Tensor]:
    """The base's 4-bit weights, dequantised, by module."""
    import bitsandbytes as bnb

    linears: dict[str, Any] = {
        name.removesuffix(".base_layer"): module
        for name, module in attached.get_base_model().named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and not isinstance(module, BaseTunerLayer)
    }
    dequantise = bnb.functional.dequantize_4bit
    return {name: dequantise(m.weight.data, m.weight.quant_state).cpu() for name, m in linears.items()}


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
    merged: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Hold every tensor of the merged model in `target` against the base's files and the adapter's.

    `names`: of the parameters of the class that was trained. `merged`: a model of that class, which knows how
    those that it joins of several tensors are stored. `dequantised`: weights that the base had in
    training, by module, where they are not those of its files. Returns how many tensors were computed, how
    many are the base's, which were not compared, and `lost_in_rounding`: the share of the update (Frobenius)
    that rounding took. RecipeError names the tensors that are something else.
    """
    base, made = weights.tensors(source), weights.tensors(target)
    trained = {own: name for name in names if (own := base_fit.own_name(name, made))}
    own_names = {*trained.values()} if merged is not None else changed.updates.keys()
    joined = [name for name in changed.updates if name not in own_names]
    wrong, left, same, computed, lost, size = [], [], 0, len(joined), 0.0, 0.0
    with safe_open(adapter.file, "pt") as pairs:
        apart = _joined(base, made, pairs, changed, joined, merged)
        for name in [each for each in made if each not in apart]:
            own, at = trained.get(name, name), base_fit.own_name(name, base)
            before = dequantised.get(own.removesuffix(".weight"))
            if update := changed.updates.get(own):
                computed += 1
                stored = made[name].tensor()
                if before is None:  # nothing, of the head of a classifier, which the base never had
                    before = base[at].tensor() if at else torch.zeros_like(stored)
                apart[name] = _updated(stored, before, pairs, update)
                weights.trim()
            elif changed.touches(own) or (at and made[name].shape != base[at].shape):
                left.append(name)
            else:
                same += 1
                if not _kept(made[name], base, at, before):
                    wrong.append(f"{name} is not the base's, and carries no adapter")
    for name, found in apart.items():
        lost, size = lost + found[1], size + found[2]
        if not found[0] <= 1:
            wrong.append(f"{name} is off by {found[0]:.3g} times what rounding allows")
    if computed != len(changed.updates):
        wrong.append(f"{len(changed.updates) - computed} adapted modules are not in the files")
    if wrong:
        found_ = f"the merged model is not base + adapter: {listed(wrong, 3)}"
        raise RecipeError(Problem(shown(adapter.path), found_, "nothing was written; please report this"))
    kept = {"tensors_computed": computed, "tensors_of_the_base": same, "tensors_not_compared": left}
    return kept | {"lost_in_rounding": (lost / size) ** 0.5 if size else 0.0}


def _kept(
    made: weights.Stored, base: dict[str, weights.Stored], at: str | None, before: torch.Tensor | None
) -> bool:
    """Is `made` what the base has as `at`, or what that was in training (`before`), but for its dtype?"""
    if at is None:  # a head that is tied no longer: what it was tied to
        return _held(made.tensor(), base)
    if before is None:
        return made.rounds(base[at])
    stored = made.tensor()
    return torch.equal(stored, before.to(stored.dtype))


def _held(tensor: torch.Tensor, base: dict[str, weights.Stored]) -> bool:
    """Is `tensor` one of the base's, under whatever name, but for its dtype?"""
    same = [stored for stored in base.values() if stored.shape == tuple(tensor.shape)]
    return any(torch.equal(tensor, stored.tensor().to(tensor.dtype)) for stored in same)


def _updated(
    stored: torch.Tensor, before: torch.Tensor, pairs: Any, update: Update | Factor | Whole
) -> tuple[float, float, float]:
    """How far `stored` is from what `update` makes of `before` at most, as a multiple of what is allowed; and
    the squared Frobenius norms of that difference and of the update.

    Allowed: half a step of the dtype in which it is stored, and what float32 may lose on the way.
    """
    if isinstance(update, Update) and update.experts:
        return _near(stored, before.double(), *_experts(pairs, update))
    if isinstance(update, Update):
        return _lora(stored, before, pairs, update)
    if isinstance(update, Whole):
        wanted, rounded = pairs.get_tensor(update.tensor).double(), 0.0
    else:
        factor = pairs.get_tensor(update.vector).double()
        factor = factor.flatten() if before.ndim == 1 else factor.T if update.transposed else factor
        wanted, rounded = before.double() * factor, torch.finfo(torch.float32).eps
    step, apart = torch.finfo(stored.dtype), (stored.double() - wanted).abs()
    allowed = (step.eps / 2 + rounded) * wanted.abs() + step.smallest_normal
    off = (apart / allowed).nan_to_num(nan=torch.inf).max().item()
    return off, apart.square().sum().item(), (wanted - before.double()).square().sum().item()


def _experts(pairs: Any, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """Each s B A of the experts, [experts, out, in], or [experts, in, out] where the class has it so; and
    what float32 may lose of it.

    A is [experts * r, in], an expert after the other; B is [out, r * experts], the experts innermost (PEFT's
    ParamWrapper).
    """
    a, b = pairs.get_tensor(update.a).double(), pairs.get_tensor(update.b).double()
    a = a.reshape(update.experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, update.experts).permute(2, 0, 1)
    sums = (len(a[0]) + 4) * torch.finfo(torch.float32).eps / 2 * abs(update.scaling) * (b.abs() @ a.abs())
    delta = update.scaling * (b @ a)
    return (delta.mT, sums.mT) if update.transposed else (delta, sums)


def _joined(
    base: dict[str, weights.Stored],
    made: dict[str, weights.Stored],
    pairs: Any,
    changed: Changes,
    names: list[str],
    model: Any,
) -> dict[str, tuple[float, float, float]]:
    """`_updated` of every stored tensor, by its name, that the parameters `names` of `model` are made of:
    they have other names there, or are several."""
    found = {}
    for name in names:
        update: Any = changed.updates[name]
        single = not getattr(update, "experts", 0)
        parts = [torch.zeros(1, 1)] if single else _experts(pairs, update)
        for inner, values in as_stored(model, name, *parts).items():
            tensor = base_fit.own_name(inner, base) or inner  # of a text model within a larger one
            if tensor not in made or tensor not in base:
                found[tensor] = torch.inf, 0.0, 0.0
                continue
            stored, before = made[tensor].tensor(), base[tensor].tensor()
            found[tensor] = (
                _updated(stored, before, pairs, update) if single else _near(stored, before.double(), *values)
            )
    return found


def as_stored(model: Any, name: str, *values: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    """`values` of the parameter `name` as the tensors of a checkpoint: transformers joins those of the
    experts while it loads, and takes them apart again, by rules of each class."""
    found = [revert_weight_conversion(model, {name: value.contiguous()}) for value in values]
    return {tensor: tuple(each[tensor] for each in found) for tensor in found[0]}


def _near(
    stored: torch.Tensor, before: torch.Tensor, delta: torch.Tensor, lossy: torch.Tensor
) -> tuple[float, float, float]:
    """`_updated` of before + delta, all float64, where `lossy` may be lost on the way beside the rounding."""
    step, wanted = torch.finfo(stored.dtype), before + delta
    apart, single = (stored.double() - wanted).abs(), torch.finfo(torch.float32).eps
    allowed = step.eps / 2 * wanted.abs() + lossy + single * before.abs() + step.smallest_normal
    off = (apart / allowed).nan_to_num(nan=torch.inf).max().item()
    return off, apart.square().sum().item(), delta.square().sum().item()


def _lora(
    stored: torch.Tensor, before: torch.Tensor, pairs: Any, update: Update
) -> tuple[float, float, float]:
    """`_updated` of LoRA and DoRA. In float32: a sum of r products, and with DoRA a norm over n inputs, whose
    error is that of its numbers and at most n / 2 roundings of its own.
    """
    a, b = pairs.get_tensor(update.a).double(), pairs.get_tensor(update.b).double()
    left, right = (a.T, b.T) if update.transposed else (b, a)
    step, single = torch.finfo(stored.dtype), torch.finfo(torch.float32).eps / 2
    off = lost = size = 0.0
    many = max(1, NUMBERS // right.shape[1])

    def rows(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next rows of W, of s B A, and of the absolute numbers that were summed for it."""
        part, was = left[i : i + many], before[i : i + many].double()
        sums = was.abs() + abs(update.scaling) * (part.abs() @ right.abs())
        return was, update.scaling * (part @ right), (len(right) + 4) * single * sums

    factor, relative = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    if update.magnitude:
        over = 0 if update.transposed else 1
        squares = [
            torch.stack([(was + delta).square().sum(over), lossy.square().sum(over)])
            for was, delta, lossy in map(rows, range(0, len(left), many))
        ]
        norms = (torch.stack(squares).sum(0) if over == 0 else torch.cat(squares, 1)).sqrt()
        factor = pairs.get_tensor(update.magnitude).double().flatten() / norms[0]
        relative = norms[1] / norms[0] + (before.shape[over] / 2 + 2) * single
        factor, relative = factor.unsqueeze(over), relative.unsqueeze(over)
    for i in range(0, len(left), many):
        was, delta, lossy = rows(i)
        f, r = (x if len(x) == 1 else x[i : i + many] for x in (factor, relative))
        wanted = f * (was + delta)
        apart = (stored[i : i + many].double() - wanted).abs()
        allowed = (step.eps / 2 + r) * wanted.abs() + f.abs() * lossy + step.smallest_normal
        off = max(off, (apart / allowed).nan_to_num(nan=torch.inf).max().item())
        lost, size = lost + apart.square().sum().item(), size + (wanted - was).square().sum().item()
    return off, lost, size
