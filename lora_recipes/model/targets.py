"""Which module gets an adapter: every entry of a PeftConfig resolved on a model without weights, before
anything is loaded.

PEFT skips an entry that matches nothing when another entry matches; here each must match. Matching itself is
PEFT's own (peft/tuners/tuners_utils.py, peft/utils/other.py).
"""

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_recipes.core.adapter_folder import ends
from lora_recipes.core.errors import Problem, listed, nearest
from lora_recipes.model import parts
from lora_recipes.model.experts import routed
from lora_recipes.recipe.recipe import Recipe

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)
_LAYER = re.compile(
    r".*?\.[^.]*\.(\d+)\.(.+)"
)  # PEFT takes the first number in a module's name for its layer
_FUSED = dict.fromkeys(("c_attn", "query_key_value", "Wqkv", "W_pack", "att_proj"), "qkv_proj")
_LORA_ONLY = ("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices")
_EVERYWHERE: dict[str, Any] = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
}


@dataclass(frozen=True)
class Coverage:
    """One kind of layer: how many there are, and which of its linear modules and routed experts are `adapted`
    and which `left`; `frozen`: the routed experts among the latter.
    """

    kind: str
    layers: int
    adapted: tuple[str, ...]
    left: tuple[str, ...]
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        """E.g. `full_attention 8 layers: q_proj, v_proj (not: k_proj, o_proj)`; a kind without an adapted
        token mixer is told apart, and so are routed experts, which names of modules do not reach.
        """
        head = f"{self.kind} {self.layers} layers: "
        names = ", ".join(map(_label, self.adapted))
        untouched = ", ".join(
            _label(name) for name in self.left if not name.startswith("mlp.") and name not in self.frozen
        )
        frozen = ", ".join(map(_label, self.frozen))
        tail = f"; routed experts frozen: {frozen}" if frozen else ""
        if untouched and all(name.startswith("mlp.") for name in self.adapted):
            whole = "nothing" if not names else names if "(" in names or "." in names else "mlp only"
            return f"{head}{whole} - no token mixer adapted ({untouched} exist){tail}"
        return head + names + (f" (not: {untouched})" if untouched else "") + tail


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` by name, without the root and without what stands beside its text model."""
    beside = set(parts.others(model)[0])
    return {name: module for name, module in model.named_modules() if name and name not in beside}


def of_text(config: Any, model: PreTrainedModel) -> Any:
    """`config` (a PeftConfig) that leaves alone what stands beside the text model of `model`: by PEFT's
    exclude_modules; for a method without that, by the full names of what it adapts. all-linear becomes names
    too: PEFT would write down those of the towers' modules.
    """
    towers = parts.others(model)[1]
    if not towers or getattr(config, "target_modules", None) is None:
        return config
    if not hasattr(config, "exclude_modules"):
        return _with(config, target_modules=set(matched(model, config)))
    if _all_linear(config.target_modules):
        every = matched(model, _with(config, **_EVERYWHERE))
        short = _with(config, target_modules={_leaf(name) for name in every})
        same = matched(model, _with(short, **_EVERYWHERE)) == every
        config = short if same else _with(config, target_modules=set(every))
    own = config.exclude_modules or []
    given = [own] if isinstance(own, str) else [rf"(?:.*\.)?{re.escape(entry)}" for entry in sorted(own)]
    beside = [rf"{re.escape(tower)}(?:\..*)?" for tower in towers]
    return _with(config, exclude_modules="|".join(f"(?:{pattern})" for pattern in [*given, *beside]))


def matched(model: PreTrainedModel, config: Any) -> list[str]:
    """The names of the modules that PEFT would adapt, `all-linear` included."""
    if config.target_modules is None:
        return []  # PEFT would choose by model type; `problems` asks for names
    names = modules(model)
    if _all_linear(config.target_modules):
        # Linear modules, and of a mixture of experts neither the routed experts nor what chooses among them.
        left = routers(model)
        names = {
            n: m
            for n, m in names.items()
            if isinstance(m, nn.Linear | Conv1D)
            and m is not model.get_output_embeddings()
            and not (n in left or _routed(f"{n}."))
        }
        config = _with(config, target_modules=r".*")
    return [n for n in names if check_target_module_exists(config, n)]


def experts(model: PreTrainedModel) -> dict[str, int]:
    """The parameters that hold all routed experts of a layer in one, and how many: lora.target_parameters
    reaches them, no name of a module does.
    """
    held = [parameter for layer in routed(model) for parameter in layer.parameters if parameter.dim() == 3]
    names = {id(parameter): name for name, parameter in model.named_parameters()} if held else {}
    return {names[id(parameter)]: parameter.shape[0] for parameter in held}


def routers(model: PreTrainedModel) -> set[str]:
    """The modules that choose among routed experts: beside them in their block, as transformers calls them
    there, `gate` or `router`."""
    blocks = {n.partition(".experts.")[0] if _routed(n) else n.rsplit(".", 2)[0] for n in experts(model)}
    return {
        name
        for name, module in (modules(model).items() if blocks else ())
        if {"gate", "router"} & set(name.split("."))
        and next(module.parameters(recurse=False), None) is not None
        and any(name.startswith(f"{block}.") for block in blocks)
    }


def resolved(model: PreTrainedModel, config: Any) -> Any:
    """`config` as PEFT must get it, so that it adapts the modules that `matched` names and no others.

    A module goes to PEFT by the parameter `NAME.weight` (target_parameters; A and B are the same and are
    saved under the same names) where its name would mean another: on most mixtures of experts PEFT makes
    `gate_proj` the routed experts' gate_up_proj (peft/utils/transformers_weight_conversion.py, for adapters
    that transformers 4 trained). So does a router that is no plain linear module.
    """
    if getattr(config, "target_modules", None) is None:
        return config
    handed = by_weight(model, config)
    if not handed and not (_all_linear(config.target_modules) and routers(model)):
        return config
    wanted, every = matched(model, config), list(modules(model))
    kept = _named([n for n in wanted if n not in handed], every)
    if not handed:
        return _with(config, target_modules=kept)
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):  # PEFT asks them about NAME.weight then
        given = getattr(config, key) or {}
        values = {n: given[k] for n in handed if (k := get_pattern_key(list(given), n)) in given}
        patterns[key] = given | {re.escape(f"{n}.weight"): value for n, value in values.items()}
    weights = _named([f"{n}.weight" for n in handed], [n for n, _ in model.named_parameters()])
    return _with(
        config,
        target_modules=kept,
        target_parameters=[*(config.target_parameters or []), *weights],
        exclude_modules=None,  # they are left out already
        layers_to_transform=None,
        layers_pattern=None,
        **patterns,
    )


def by_weight(model: PreTrainedModel, config: Any) -> list[str]:
    """The modules of `matched` that PEFT gets as the parameter `NAME.weight` (see `resolved`)."""
    if config.peft_type != "LORA":
        return []
    wanted, of, choosing = matched(model, config), modules(model), routers(model)
    taken = {leaf for leaf in set(map(_leaf, wanted)) if _taken(model, config, {leaf})}
    return [n for n in wanted if _leaf(n) in taken or (n in choosing and not _plain(of[n]))]


def _plain(module: nn.Module) -> bool:
    """Is it a linear module that computes as one, in 4 bits or not? Llama 4's router is one by its class, and
    returns two tensors."""
    forward: Any = type(module).forward
    return forward is nn.Linear.forward or type(module).__module__.startswith("bitsandbytes")


def _named(wanted: list[str], every: list[str]) -> list[str]:
    """`wanted` of the names `every` as a list that PEFT matches by their ends: without the layer's number
    where that means the same."""
    short = list(dict.fromkeys(m.group(2) if (m := _LAYER.match(n)) else n for n in wanted))
    same = {n for n in every if any(ends(n, entry) for entry in short)} == set(wanted)
    return short if same else wanted


def matched_parameters(model: PreTrainedModel, config: Any) -> list[str]:
    """The names of the parameters that `target_parameters` adapts."""
    entries = getattr(config, "target_parameters", None) or []
    return [n for n, _ in model.named_parameters() if any(ends(n, entry) for entry in entries)]


def problems(
    model: PreTrainedModel, config: Any, recipe: Recipe, trained: parts.Trained | None = None
) -> list[Problem]:
    """Every entry of `config` that matches nothing on `model`, and every target that would be refused or go
    wrong later. `trained`: what of a checkpoint of several parts `model` is.
    """
    config = _with(config, **{key: getattr(config, key, None) for key in (*_EVERYWHERE, *_LORA_ONLY)})
    beside = trained.beside if trained else ()
    found = list(_not_regular(config, recipe))
    if found := found or (list(_in_towers(model, config, recipe, trained)) if trained else []):
        return found
    found = list(_targets(model, config, recipe))
    if not found:
        # Only with right targets can the others be judged: they choose among the modules that the targets
        # match.
        found = (
            list(_handed(model, config, recipe))
            or [*_excludes(model, config, recipe, beside), *_layers(model, config, recipe)]
            or list(_emptied(model, config, recipe))
        )
        found += _patterns(model, config, recipe) if not found else []
    return [*found, *_refused(model, config, recipe), *_elsewhere(model, config, recipe)]


def coverage(model: PreTrainedModel, adapted: Collection[str]) -> list[Coverage]:
    """For each kind of layer (transformers' `layer_types`) which of its linear modules, and of its routed
    experts, are adapted (`adapted`: names of modules and parameters), and which are not. A router stands
    there only where it is adapted.

    A module that is adapted in only some layers of its kind stands with the count: `q_proj (3 of 8)`. Token
    mixers come first, and in each block the projections in before the one out.
    """
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    have: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    linear = [name for name, module in modules(model).items() if isinstance(module, ADAPTABLE)]
    whole, by_name = experts(model), {n.removesuffix(".weight") for n in adapted} | set(adapted)
    more = [n for n in adapted if n not in whole and n.removesuffix(".weight") not in linear]  # a router
    choosing = routers(model)
    for name in [*linear, *more, *whole]:
        if (match := _LAYER.match(name)) and (name in by_name or name not in choosing):
            have[types[int(match.group(1))]][match.group(2)].append(name in by_name)
    apart = {m.group(2) for n in whole if (m := _LAYER.match(n))}
    result = []
    for kind, done in have.items():
        names = sorted(done, key=lambda n: (n.startswith("mlp."), _leaf(n) == "out_proj"))
        hit = tuple(
            n if all(done[n]) else f"{n} ({sum(done[n])} of {len(done[n])})" for n in names if any(done[n])
        )
        left = tuple(n for n in names if not any(done[n]))
        frozen = tuple(n for n in left if n in apart or _routed(n))
        result.append(Coverage(kind, types.count(kind), hit, left, frozen))
    return result


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _label(name: str) -> str:
    """The last part of a name; with the experts that it belongs to, as `gate_proj` may mean several."""
    parts = name.split(".")
    of = next((i for i, part in enumerate(parts[:-1]) if "expert" in part), len(parts) - 1)
    return ".".join(parts[of:])


def _routed(name: str) -> bool:
    return "experts" in name.split(".")[:-1]


def _all_linear(entries: Any) -> bool:
    return isinstance(entries, str) and entries.lower() == "all-linear"


def _with(config: Any, **changes: Any) -> Any:
    other = copy.copy(config)
    vars(other).update(changes)
    return other


def _norms(config: Any) -> bool:
    """LN_TUNING trains the norms themselves; all others stand beside linear modules."""
    return bool(config.peft_type == "LN_TUNING")


def _entries(recipe: Recipe, key: str) -> Iterable[tuple[str, Any, Any]]:
    """For each entry of a key that takes a value or a list: where it stands, the entry, and the key's value
    if it stood alone.
    """
    value = recipe.settings.get(key)
    if isinstance(value, list):
        yield from ((recipe.at(recipe.method, key, i), entry, {entry}) for i, entry in enumerate(value))
    elif value is not None:
        yield recipe.at(recipe.method, key), value, value


def _nothing(
    where: str, entry: str, names: Iterable[str], what: str = "matches no module of this model"
) -> Problem:
    """`entry` matches nothing: the nearest of `names`, each cut to as many parts as the entry has."""
    parts = entry.count(".") + 1
    close = nearest(entry, {".".join(name.split(".")[-parts:]) for name in names})
    return Problem(where, f"{entry!r} {what}", f"did you mean {close}?")


def _not_regular(config: Any, recipe: Recipe) -> Iterable[Problem]:
    """PEFT's own message for a pattern that does not compile names neither the key nor the pattern."""
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(config, key)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                where = recipe.at(recipe.method, key, *([pattern] if isinstance(value, dict) else []))
                yield Problem(
                    where,
                    f"{pattern!r} is not a regular expression: {error}",
                    "escape or correct it, or write names",
                )


def _targets(model: PreTrainedModel, config: Any, recipe: Recipe) -> Iterable[Problem]:
    """Entries of target_modules that match no module at all."""
    entries, at = recipe.settings.get("target_modules"), recipe.at(recipe.method, "target_modules")
    names = [
        n
        for n, m in modules(model).items()
        if isinstance(m, ADAPTABLE) or (_norms(config) and _leaf(n).endswith("norm"))
    ]
    leaves = list(dict.fromkeys(_leaf(n) for n in names if _LAYER.match(n)))
    if entries is None or (entries == [] and not config.target_parameters):
        found = (
            "is null: PEFT would choose by model type, without a word"
            if entries is None
            else "names no module"
        )
        yield Problem(at, found, f"e.g. {listed(leaves, 7)}, or all-linear")
    for where, entry, alone in _entries(recipe, "target_modules"):
        if matched(model, _with(config, target_modules=alone, **_EVERYWHERE)):
            if (
                isinstance(entries, list)
                and recipe.at(recipe.method, "target_modules", entries.index(entry)) != where
            ):
                yield Problem(where, f"{entry!r} is listed twice", "keep one")
        elif isinstance(entries, str):
            do = (
                "a string is a regular expression for the whole module name; for modules by name write a list"
            )
            close = nearest(entry, [*leaves, "all-linear"])
            do = f"did you mean all-linear? Otherwise {do}" if close == "all-linear" else f"{do}: [{close}]"
            yield Problem(where, f"the pattern {entry!r} matches no module", do)
        elif _all_linear(entry):
            yield Problem(
                where,
                f"{entry!r} in a list is no module's name",
                "write target_modules: all-linear, without the list",
            )
        elif reached := _meant_experts(model, entry):
            do = f"the routed experts are parameters here: lora.target_parameters: [{listed(reached)}]"
            yield Problem(where, f"{entry!r} matches no module of this model", do)
        elif len(apart := _meant_apart(entry, leaves)) > 1:
            do = f"they are modules of their own here: [{listed(apart)}]"
            yield Problem(where, f"{entry!r} matches no module of this model", do)
        else:
            yield _nothing(where, entry, names)


def _meant_apart(entry: str, leaves: list[str]) -> list[str]:
    """The modules that are one in another family: gate_up_proj of Phi-3, c_attn of GPT-2 and qkv_proj."""
    words = set(_FUSED.get(_leaf(entry), _leaf(entry)).replace("qkv", "q_k_v").split("_"))
    found = [leaf for leaf in leaves if set(leaf.split("_")) < words]
    return found if words == {word for leaf in found for word in leaf.split("_")} else []


def _meant_experts(model: PreTrainedModel, entry: str) -> list[str]:
    """The parameters of routed experts that `entry` may mean: gate_proj stands in gate_up_proj, w1 is what
    Mixtral's were called."""
    words = set(_leaf(entry).split("_"))
    names = dict.fromkeys(m.group(2) for n in experts(model) if (m := _LAYER.match(n)))
    if "expert" in entry or re.fullmatch(r"w\d", _leaf(entry)):
        return list(names)
    return [name for name in names if words <= set(_leaf(name).split("_"))]


def _handed(model: PreTrainedModel, config: Any, recipe: Recipe) -> Iterable[Problem]:
    """Modules that PEFT would get by their weight, with settings that it has for modules only."""
    if not (names := by_weight(model, config)):
        return
    section: Any = recipe.lora
    settings = {
        ("lora", "lora_dropout"): bool(config.lora_dropout),
        ("lora", "use_dora"): bool(config.use_dora),
        ("lora", "lora_bias"): bool(config.lora_bias),
        ("lora", "init_lora_weights"): section.init_lora_weights not in (True, False, "gaussian"),
        ("model", "quantize"): recipe.model.quantize is not None,
        ("warm_start", "from_recipe"): recipe.warm_start is not None,
    }
    stay = dict.fromkeys(_leaf(n) for n in matched(model, config) if n not in names)
    for at in (at for at, given in settings.items() if given):
        labels = dict.fromkeys(map(_label, names))
        found = (
            f"does not go with {listed(labels, 4)}: on {model.config.model_type} PEFT takes such names for"
            " other modules, and adapts them by their weight, without this setting"
        )
        yield Problem(recipe.at(*at), found, f"remove it, or set lora.target_modules: [{listed(stay)}]")


def _taken(model: PreTrainedModel, config: Any, names: Any) -> bool:
    """Would PEFT make parameters of experts of `names`?"""
    other = copy.deepcopy(_with(config, target_modules=names))
    try:
        convert_peft_config_for_transformers(other, model=model, conversions=None)
    except ValueError:  # gate_proj without up_proj, which are one there
        return True
    return bool(set(other.target_parameters or ()) - set(config.target_parameters or ()))


def _in_towers(
    model: PreTrainedModel, config: Any, recipe: Recipe, trained: parts.Trained
) -> Iterable[Problem]:
    """Entries of target_modules that mean what stands beside the text model: that match nothing else, or a
    regular expression that names it. One that would reach a module of that name anywhere (`.*q_proj`) means
    the text model's, and those alone get an adapter.
    """
    for where, entry, alone in _entries(recipe, "target_modules"):
        asked = _with(config, target_modules=alone, **_EVERYWHERE)
        reached = [] if _all_linear(alone) else _reached(asked, trained.beside)
        towers = [t for t in trained.towers if any(_inside(name, t) for name in reached)]
        named = isinstance(alone, str) and any(
            _inside(name, tower) and not check_target_module_exists(asked, f"layers.0{name[len(tower) :]}")
            for tower in towers
            for name in reached
        )
        if reached and (named or not matched(model, asked)):
            names = [
                n for n in modules(model) if _LAYER.match(n) and isinstance(modules(model)[n], ADAPTABLE)
            ]
            found = f"{entry!r} reaches {listed(towers)}: text alone is trained here, and nothing beside it"
            yield Problem(where, found, f"name modules of the text model, e.g. {listed(names[:1])}")


def _reached(config: Any, names: Iterable[str]) -> list[str]:
    """Those of `names` that `config` matches, as they are or without the `model.` before them, which files do
    not have."""
    return [
        n for n in names if any(check_target_module_exists(config, k) for k in (n, n.removeprefix("model.")))
    ]


def _inside(name: str, tower: str) -> bool:
    return name == tower or name.startswith(f"{tower}.")


def _excludes(
    model: PreTrainedModel, config: Any, recipe: Recipe, beside: Collection[str]
) -> Iterable[Problem]:
    """Entries that exclude nothing; one for what stands `beside` the text model says what is so anyway."""
    everywhere = _with(config, **_EVERYWHERE)
    wanted = matched(model, everywhere)
    for where, entry, alone in _entries(recipe, "exclude_modules"):
        if _reached(_with(everywhere, target_modules=alone), beside):
            continue
        if matched(model, _with(everywhere, exclude_modules=alone)) == wanted:
            yield _nothing(where, entry, wanted, "excludes none of the targeted modules")


def _layers(model: PreTrainedModel, config: Any, recipe: Recipe) -> Iterable[Problem]:
    """Numbers in layers_to_transform, and a layers_pattern, that choose no layer."""
    if config.layers_to_transform == []:
        yield Problem(
            recipe.at(recipe.method, "layers_to_transform"),
            "an empty list means every layer to PEFT",
            "remove the key",
        )
    have = {int(m.group(1)) for n in modules(model) if (m := _LAYER.match(n))}
    meant = {int(m.group(1)) for n in matched(model, _with(config, **_EVERYWHERE)) if (m := _LAYER.match(n))}
    for where, layer, _ in _entries(recipe, "layers_to_transform"):
        if layer not in have:
            yield Problem(where, f"there is no layer {layer}", f"the layers are 0 to {max(have, default=0)}")
        elif layer not in meant:
            yield Problem(
                where,
                f"layer {layer} has none of the target modules",
                "its kind of layer has others; see the plan's coverage",
            )
    for where, entry, _ in _entries(recipe, "layers_pattern"):
        if not any(re.match(rf"(?:^|.*?\.){entry}\.\d+\.", n) for n in modules(model)):
            yield _nothing(
                where,
                entry,
                {n.split(".")[-2] for n in modules(model) if _leaf(n).isdigit()},
                "is no list of layers",
            )


def _emptied(model: PreTrainedModel, config: Any, recipe: Recipe) -> Iterable[Problem]:
    """Targets that match modules of the model, but none that exclude_modules, layers_to_transform and
    modules_to_save leave.
    """
    by = listed(key for key in _EVERYWHERE if getattr(config, key) is not None)
    for where, entry, alone in _entries(recipe, "target_modules"):
        if not matched(model, _with(config, target_modules=alone)):
            yield Problem(
                where, f"{entry!r} adapts nothing: {by} leaves none of its modules", "remove one of the two"
            )


def _patterns(model: PreTrainedModel, config: Any, recipe: Recipe) -> Iterable[Problem]:
    parameters = [
        n
        for n, _ in model.named_parameters()
        if any(ends(n, entry) for entry in config.target_parameters or [])
    ]
    names = [*matched(model, config), *parameters]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = list(getattr(config, key) or {})
        used = {get_pattern_key(patterns, name) for name in names}  # PEFT takes the first pattern that fits
        for pattern in (p for p in patterns if p not in used):
            hidden = any(get_pattern_key([pattern], name) == pattern for name in names)
            what = (
                "comes after a pattern that fits all its modules" if hidden else "matches no adapted module"
            )
            yield _nothing(recipe.at(recipe.method, key, pattern), pattern, names, what)


def _refused(model: PreTrainedModel, config: Any, recipe: Recipe) -> Iterable[Problem]:
    """Targets that TRL or PEFT refuse after the model is loaded, or get wrong without a word; each name
    once.
    """
    named, at = modules(model), recipe.at(recipe.method, "target_modules")
    handed = by_weight(model, config)
    for leaf, name in {_leaf(n): n for n in matched(model, config) if n not in handed}.items():
        module = named[name]
        if _by_kernel(model, config, leaf):
            do = f"exclude_modules: [{leaf}]" if isinstance(config.target_modules, str) else "remove it"
            found = f"PEFT refuses {leaf!r} of a {model.config.model_type}: its kernels take the weight alone"
            yield Problem(at, found, do)
        elif module is model.get_output_embeddings():
            do = (
                "TRL computes the loss from lm_head.weight directly: an adapter there would never be trained."
                " Remove it"
            )
            yield Problem(at, f"{leaf!r} cannot carry an adapter", do)
        elif isinstance(module, nn.Embedding) and model.config.get_text_config().tie_word_embeddings:
            do = (
                "merging would also change lm_head, which is the same tensor. Remove it, or train it whole:"
                f" modules_to_save: [{leaf}]"
            )
            yield Problem(at, f"LoRA on {leaf!r} of a model with tied embeddings", do)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            do = (
                f"a convolution of {module.groups} groups needs r divisible by it; adapt the projections"
                " around it instead"
            )
            yield Problem(at, f"{leaf!r} is a convolution", do)
        elif not isinstance(module, ADAPTABLE) and not _norms(config):
            children = dict.fromkeys(
                _leaf(n) for n, m in module.named_modules() if n and isinstance(m, ADAPTABLE)
            )
            do = (
                f"name its projections: {listed(children)}"
                if children
                else "adapt the linear projections instead"
            )
            yield Problem(at, f"{leaf!r} is a {type(module).__name__}, which cannot carry a LoRA", do)


def _by_kernel(model: PreTrainedModel, config: Any, leaf: str) -> bool:
    """Does PEFT refuse an adapter on modules called `leaf`, as a kernel of this class reads their weight?"""
    try:
        _check_lora_target_modules_mamba(config, model, leaf)
    except ValueError:
        return True
    return False


def _elsewhere(model: PreTrainedModel, config: Any, recipe: Recipe) -> Iterable[Problem]:
    """What is trained beside the targets: modules_to_save, target_parameters, trainable_token_indices."""
    named, parameters = modules(model), [n for n, _ in model.named_parameters()]
    for where, entry, _ in _entries(recipe, "modules_to_save"):
        meant = [n for n in named if ends(n, entry)]
        # PEFT compares the ends of names as texts here, without a dot: `norm` also means `input_layernorm`.
        more = dict.fromkeys(_leaf(n) for n in named if n.endswith(entry) and n not in meant)
        if not meant:
            yield _nothing(where, entry, named)
        elif more:
            yield Problem(
                where,
                f"{entry!r} would train {listed(more)} as well",
                f"write more of the name, e.g. {meant[-1]}",
            )
    for where, entry, _ in _entries(recipe, "target_parameters"):
        reached = [n for n in parameters if ends(n, entry)]
        packed = {n.removesuffix(".weight") for n in reached} & {
            n for n, m in named.items() if isinstance(m, nn.Linear)
        }
        if not reached:
            yield _nothing(where, entry, parameters, "matches no parameter")
        elif packed and recipe.model.quantize:
            found = f"{entry!r} is the weight of a linear module, which is packed in {recipe.model.quantize}"
            yield Problem(where, found, f"name the module in target_modules: {_leaf(min(packed))}")
    tokens, where = config.trainable_token_indices or [], recipe.at(recipe.method, "trainable_token_indices")
    vocab: Any = model.get_input_embeddings().num_embeddings
    for name, indices in {"": tokens}.items() if isinstance(tokens, list) else tokens.items():
        if name and not any(ends(n, name) for n in named):
            yield _nothing(where, name, named)
        for i in (i for i in indices if not 0 <= i < vocab):
            yield Problem(where, f"{i} is no token of a vocabulary of {vocab}", f"0 to {vocab - 1}")
