"""Which module gets an adapter: every entry of a LoraConfig resolved on a model without weights, before anything is loaded.

PEFT skips an entry that matches nothing when another entry matches; here each must match. Matching itself is PEFT's own
(peft/tuners/tuners_utils.py, peft/utils/other.py).
"""

import copy
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_recipes.messages import Problem, nearest
from lora_recipes.recipe import Recipe

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Coverage:
    """One kind of layer: how many there are, and which of its linear modules are `adapted` and which `left`."""

    kind: str
    layers: int
    adapted: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(n.rsplit(".", 1)[-1] for n in self.adapted) or "nothing"
        mixer = [n.rsplit(".", 1)[-1] for n in self.left if not n.startswith("mlp.")]
        has_mixer = any(not n.startswith("mlp.") for n in self.adapted)
        text = f"{self.kind} {self.layers} layers: {names}"
        if mixer and not has_mixer:
            text = f"{self.kind} {self.layers} layers: {'mlp only' if self.adapted else 'nothing'} - no token mixer adapted"
            return f"{text} ({', '.join(mixer)} exist)"
        return text + (f" (not: {', '.join(mixer)})" if mixer else "")


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` by name, without the root."""
    return {name: module for name, module in model.named_modules() if name}


def _leaf_names(model: nn.Module, kinds: tuple[type, ...] = ADAPTABLE) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, m in modules(model).items() if isinstance(m, kinds)})


def matched(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the modules that PEFT would adapt, `all-linear` included."""
    if config.target_modules == "all-linear":
        head = next((n for n, m in modules(model).items() if m is model.get_output_embeddings()), None)  # type: ignore[operator]
        plain = _alone(config, target_modules=r".*")
        names = [n for n, m in modules(model).items() if isinstance(m, nn.Linear | Conv1D) and n != head]
        return [n for n in names if check_target_module_exists(plain, n)]
    return [n for n in modules(model) if check_target_module_exists(config, n)]


def _alone(config: LoraConfig, **changes: Any) -> LoraConfig:
    other = copy.copy(config)
    for key, value in changes.items():
        setattr(other, key, value)
    return other


def problems(model: nn.Module, config: LoraConfig, recipe: Recipe) -> list[Problem]:
    """Every entry of `config` that matches nothing on `model`, and every target that would be refused or go wrong later."""
    found: list[Problem] = []
    found += _target_entries(model, config, recipe)
    adapted = matched(model, config) if not found else []
    found += _excludes(model, config, recipe)
    found += _layers(model, config, recipe)
    if adapted:
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, key) or {}:
                if not any(get_pattern_key([pattern], name) == pattern for name in adapted):
                    do = f"did you mean {nearest(pattern, {n.rsplit('.', 1)[-1] for n in adapted})}? It must match an adapted module"
                    found.append(Problem(recipe.at("lora", key, pattern), f"{pattern!r} matches no adapted module", do))
        found += _refused(model, adapted, recipe)
    everything = {n.rsplit(".", 1)[-1] for n in modules(model)}
    for i, entry in enumerate(config.modules_to_save or []):
        if not any(n == entry or n.endswith(f".{entry}") for n in modules(model)):
            found.append(
                Problem(
                    recipe.at("lora", "modules_to_save", i), f"{entry!r} matches no module", f"did you mean {nearest(entry, everything)}?"
                )
            )
    parameters = [n for n, _ in model.named_parameters()]
    for i, entry in enumerate(config.target_parameters or []):
        if not any(n == entry or n.endswith(f".{entry}") for n in parameters):
            do = f"did you mean {nearest(entry, {n.split('.', 3)[-1] for n in parameters})}?"
            found.append(Problem(recipe.at("lora", "target_parameters", i), f"{entry!r} matches no parameter", do))
    found += _token_indices(model, config, recipe)
    return found


def _target_entries(model: nn.Module, config: LoraConfig, recipe: Recipe) -> list[Problem]:
    entries, names = recipe.lora.get("target_modules"), _leaf_names(model)
    free = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    if isinstance(entries, str):
        if entries == "all-linear":
            return []
        where = recipe.at("lora", "target_modules")
        try:
            hit = any(re.fullmatch(entries, n) for n in modules(model))
        except re.error as error:
            return [Problem(where, f"{entries!r} is not a regular expression: {error}", "or write a list of names")]
        if hit:
            return []
        close = nearest(entries, [*names, "all-linear"])
        do = f"a string is a regular expression for the whole module name; for modules by name write a list: [{close}]"
        return [
            Problem(
                where,
                f"the pattern {entries!r} matches no module",
                f"did you mean all-linear? Otherwise {do}" if close == "all-linear" else do,
            )
        ]
    found = []
    if not entries and not config.target_parameters:
        found.append(Problem(recipe.at("lora", "target_modules"), "names no module", f"e.g. {', '.join(names[:7])}, or all-linear"))
    for i, entry in enumerate(entries or []):
        one = _alone(config, target_modules={entry}, **free)
        if not any(check_target_module_exists(one, n) for n in modules(model)):
            do = "write it as a plain string, not in a list" if entry == "all-linear" else f"did you mean {nearest(entry, names)}?"
            found.append(Problem(recipe.at("lora", "target_modules", i), f"{entry!r} matches no module of this model", do))
        elif (entries or []).index(entry) != i:
            found.append(Problem(recipe.at("lora", "target_modules", i), f"{entry!r} is listed twice", "keep one"))
    return found


def _excludes(model: nn.Module, config: LoraConfig, recipe: Recipe) -> list[Problem]:
    entries = recipe.lora.get("exclude_modules") or []
    wanted = matched(model, _alone(config, exclude_modules=None))
    found = []
    for i, entry in enumerate([entries] if isinstance(entries, str) else entries):
        names = [n for n in wanted if (re.fullmatch(entry, n) if isinstance(entries, str) else n == entry or n.endswith(f".{entry}"))]
        if not names:
            where = recipe.at("lora", "exclude_modules") if isinstance(entries, str) else recipe.at("lora", "exclude_modules", i)
            do = f"did you mean {nearest(entry, {n.rsplit('.', 1)[-1] for n in wanted})}?"
            found.append(Problem(where, f"{entry!r} excludes none of the targeted modules", do))
    if not found and entries and wanted and not matched(model, config):
        found.append(Problem(recipe.at("lora", "exclude_modules"), "excludes every targeted module", "nothing would be trained"))
    return found


def _layers(model: nn.Module, config: LoraConfig, recipe: Recipe) -> list[Problem]:
    wanted = config.layers_to_transform
    if wanted is None:
        return []
    have = {int(m.group(1)) for n in modules(model) if (m := _LAYER.search(n))}
    adapted = {int(m.group(1)) for n in matched(model, config) if (m := _LAYER.search(n))}
    found = []
    for i, layer in enumerate([wanted] if isinstance(wanted, int) else wanted):
        where = recipe.at("lora", "layers_to_transform", *([] if isinstance(wanted, int) else [i]))
        if layer not in have:
            found.append(Problem(where, f"there is no layer {layer}", f"the layers are 0 to {max(have, default=0)}"))
        elif layer not in adapted:
            found.append(
                Problem(where, f"layer {layer} has none of the target modules", "its kind of layer has others; see the plan's coverage")
            )
    return found


def _refused(model: nn.Module, adapted: list[str], recipe: Recipe) -> list[Problem]:
    """Targets that TRL or PEFT refuse after the model is loaded, or get wrong without a word."""
    found = []
    where = recipe.at("lora", "target_modules")
    named, tied = modules(model), bool(getattr(model.config, "tie_word_embeddings", False))  # type: ignore[union-attr]
    by_leaf = Counter(n.rsplit(".", 1)[-1] for n in adapted)
    for name in adapted:
        leaf, module = name.rsplit(".", 1)[-1], named[name]
        if by_leaf.pop(leaf, 0) == 0:
            continue  # said once for each name
        if module is model.get_output_embeddings():  # type: ignore[operator]
            do = "TRL computes the loss from lm_head.weight directly: an adapter there would never be trained. Remove it"
            found.append(Problem(where, f"{leaf!r} cannot carry an adapter", do))
        elif isinstance(module, nn.Embedding) and tied:
            do = "merging would also change lm_head, which is the same tensor. Remove it, or train single tokens by trainable_token_indices"
            found.append(Problem(where, f"LoRA on {leaf!r} of a model with tied embeddings", do))
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            do = f"a convolution of {module.groups} groups needs r divisible by it; adapt the projections around it instead"
            found.append(Problem(where, f"{leaf!r} is a convolution", do))
        elif not isinstance(module, ADAPTABLE):
            children = sorted({n.rsplit(".", 1)[-1] for n, m in module.named_modules() if n and isinstance(m, nn.Linear)})
            do = f"name its projections: {', '.join(children)}" if children else "adapt the linear projections instead"
            found.append(Problem(where, f"{leaf!r} is a {type(module).__name__}, which cannot carry a LoRA", do))
    return found


def _token_indices(model: nn.Module, config: LoraConfig, recipe: Recipe) -> list[Problem]:
    entries = config.trainable_token_indices or []
    vocab = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    lists = {"embed_tokens": entries} if isinstance(entries, list) else entries
    return [
        Problem(recipe.at("lora", "trainable_token_indices"), f"{i} is no token of a vocabulary of {vocab}", f"0 to {vocab - 1}")
        for indices in lists.values()
        for i in indices
        if not 0 <= i < vocab
    ]


def coverage(model: nn.Module, adapted: list[str]) -> list[Coverage]:
    """For each kind of layer (transformers' `layer_types`) which of its linear modules are adapted, and which are not.

    A module that is adapted in only some layers of its kind stands with the count: `q_proj (3 of 8)`.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    have: dict[str, Counter] = defaultdict(Counter)
    done: dict[str, Counter] = defaultdict(Counter)
    chosen = set(adapted)
    for name, module in modules(model).items():
        if (match := _LAYER.search(name)) and isinstance(module, ADAPTABLE):
            kind = types[int(match.group(1))]
            have[kind][match.group(2)] += 1
            done[kind][match.group(2)] += name in chosen
    result = []
    for kind, names in have.items():
        part = {n: "" if done[kind][n] == names[n] else f" ({done[kind][n]} of {names[n]})" for n in names}
        hit = tuple(n + part[n] for n in names if done[kind][n])
        result.append(Coverage(kind, types.count(kind), hit, tuple(n for n in names if not done[kind][n])))
    return result
