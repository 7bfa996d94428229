"""Which class of a checkpoint trains, where it has several parts: text beside vision or audio.

The rule: its text part, where transformers has a class for that alone (Gemma3ForCausalLM of a Gemma 3), every
tensor of which the published class holds under other names; else the published class
(Qwen2_5_VLForConditionalGeneration), and what stands beside the text model in it is loaded, frozen, and gets
no adapter. transformers' own choice comes first, where it takes the text part by itself (Qwen 3.5).
"""

import copy
import dataclasses
import functools
import importlib
import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class

_CAUSAL: Any = AutoModelForCausalLM._model_mapping
_SEVERAL: Any = AutoModelForMultimodalLM._model_mapping


@dataclass(frozen=True)
class Trained:
    """The class `kind`, built from `config`, trains. `beside`: the modules of the published class that are no
    part of its text model (`model.vision_tower`, ...), all of them that hold parameters; `towers` the
    outermost. `names`: what the text model's tensors are called in the files, where they are known
    (key_mapping of from_pretrained); `mapped`: transformers has to be told them.
    """

    kind: Any
    config: PreTrainedConfig
    beside: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    mapped: bool = False
    names: dict[str, str] | None = None

    @property
    def whole(self) -> bool:
        """Is it the published class of a checkpoint of several parts, these included?"""
        return self.config.get_text_config() is not self.config


def of(config: PreTrainedConfig, stored: Collection[str] | None = None) -> Trained | None:
    """What trains of a checkpoint with `config` whose files hold the tensors `stored` (None: they are not
    here); None where nothing in it continues text.
    """
    inner = text(config)
    if inner is None or getattr(inner, "is_encoder_decoder", False):
        return None
    if inner is config:
        return Trained(_get_model_class(config, _CAUSAL), config) if type(config) in _CAUSAL else None
    said = json.dumps(config.to_dict(), sort_keys=True, default=str)
    chosen, beside, towers, mapped = _chosen(_Key(said, config))
    if chosen is None:
        return None
    if chosen.config_class is type(config):
        return Trained(chosen, config, beside, towers)
    inner, names = copy.deepcopy(inner), None
    if stored is not None:
        names, head = _renaming(build(inner, torch.float32), stored)
        if mapped:
            inner.tie_word_embeddings = _tied(config, inner, head)
    return Trained(chosen, inner, beside, towers, mapped, names)


def whole(config: PreTrainedConfig) -> Trained | None:
    """The published class of a checkpoint of several parts; None where it has no text model of its own."""
    named = published(config)
    beside, towers = others(build(config, torch.float32)) if named else ((), ())
    return Trained(named, config, beside, towers) if towers or type(config) in _CAUSAL else None


@dataclass(frozen=True)
class _Key:
    """A config, which has no hash, by its content."""

    said: str
    config: PreTrainedConfig = dataclasses.field(compare=False)


def said(trained: Trained) -> str:
    """What trains and what does not, of a checkpoint of several parts."""
    named = ", ".join(tower.removeprefix("model.") for tower in trained.towers)
    name = trained.kind.__name__
    if trained.whole:
        return f"text alone, in the published class {name}; {named}: loaded, not trained"
    return f"text alone, as {name}; {named}: not loaded, not trained, and in a merged model as they came"


def text(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config of its text model, `config` itself where there is no other; None of an encoder with a
    decoder."""
    if getattr(config, "is_encoder_decoder", False):
        return None
    try:
        return config.get_text_config()
    except ValueError:  # several of them: an encoder and a decoder
        return None


@functools.lru_cache(maxsize=8)
def _chosen(key: _Key) -> tuple[Any, tuple[str, ...], tuple[str, ...], bool]:
    """The class that trains (None: none), what stands beside the text model, and whether names are mapped."""
    config, named = key.config, published(key.config)
    text = config.get_text_config()
    own: Any = _get_model_class(config, _CAUSAL) if type(config) in _CAUSAL else None
    taken = own if own is not None and own.config_class is type(text) else None
    if named is None and taken is None:
        return None, (), (), False
    if named is None or named.config_class is not type(config):
        return taken, (), (), False
    published_one = build(config, torch.float32)
    beside, towers = others(published_one)
    if taken is not None:
        return taken, beside, towers, False
    if type(text) in _CAUSAL:
        alone = build(text, torch.float32)
        shapes = {name: tensor.shape for name, tensor in published_one.state_dict().items()}
        places = places_of(alone, shapes)
        if all(shapes.get(places.get(n, "")) == t.shape for n, t in alone.state_dict().items()):
            return type(alone), beside, towers, True
    return (named, beside, towers, False) if whole(config) else (None, (), (), False)


def published(config: PreTrainedConfig) -> Any:
    """The class that a checkpoint of several parts names, or transformers' where it names none; None
    where that does not generate."""
    named = [getattr(transformers, name, None) for name in config.architectures or []]
    if not named and type(config) in _SEVERAL:
        named = [_get_model_class(config, _SEVERAL)]
    for found in named:
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.can_generate():
            return found
    return None


def kind(config: PreTrainedConfig) -> Any:
    """The class of a model with `config`: the published one for a config of several parts, else the causal
    language model."""
    if config.get_text_config() is not config:
        return published(config)
    if type(config) in _CAUSAL:
        return _get_model_class(config, _CAUSAL)
    # A text model that AutoModelForCausalLM knows by the config of the whole alone (Emu3, Mllama).
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    of_it = [c for c in vars(module).values() if getattr(c, "config_class", None) is type(config)]
    return next(c for c in of_it if c.can_generate())


def build(config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> Any:
    """The model of `config` on the meta device, the parts beside its text model frozen."""
    with torch.device("meta"):
        return frozen(kind(config)._from_config(copy.deepcopy(config), dtype=dtype, **options))


def frozen(model: Any) -> Any:
    """`model` with all that stands beside its text model frozen."""
    for name in others(model)[1]:
        model.get_submodule(name).requires_grad_(False)
    return model


def others(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules of `model` that are no part of its text model: all that hold parameters; the outermost."""
    if model.config.get_text_config() is model.config:
        return (), ()
    text = [m for m in (decoder(model), model.get_input_embeddings(), model.get_output_embeddings()) if m]
    own = {id(p) for module in text for p in module.parameters()}
    every = tuple(
        name
        for name, module in model.named_modules()
        if name and (held := [id(p) for p in module.parameters()]) and own.isdisjoint(held)
    )
    return every, tuple(n for n in every if n.rpartition(".")[0] not in every)


def decoder(model: Any) -> Any:
    """The text model inside `model`, without its head."""
    found = model.get_decoder() or model
    return getattr(found, "base_model", found)


def _renaming(alone: Any, stored: Collection[str]) -> tuple[dict[str, str], bool]:
    """From the names `stored` in the files to those of the text model `alone`, as regular expressions; and is
    a head of its own among them?
    """
    inside, prefix = f"{alone.base_model_prefix}.", _prefix(alone, stored)
    if prefix is None:
        return {}, False
    outside = _outside(alone, prefix, stored)
    found = {f"^{re.escape(place)}$": name for name, place in outside.items() if name != place}
    if prefix != inside:
        found[f"^{re.escape(prefix)}"] = inside
    return found, bool(outside)


def places_of(alone: Any, stored: Collection[str]) -> dict[str, str]:
    """Where each tensor of the text model `alone` stands among the names `stored`."""
    inside, prefix = f"{alone.base_model_prefix}.", _prefix(alone, stored)
    if prefix is None:
        return {}
    names = {n: prefix + n.removeprefix(inside) for n in alone.state_dict() if n.startswith(inside)}
    return names | _outside(alone, prefix, stored)


def _prefix(alone: Any, stored: Collection[str]) -> str | None:
    """What stands before the names of the text model `alone` among `stored`: of the prefixes that have its
    embedding, the one with most of its tensors.
    """
    inside = f"{alone.base_model_prefix}."
    inner = {n.removeprefix(inside) for n in alone.state_dict() if n.startswith(inside)}
    ids = {id(module): name for name, module in alone.named_modules()}
    embedding = f"{ids[id(alone.get_input_embeddings())]}.weight".removeprefix(inside)
    counts: Counter[str] = Counter()
    for name in stored:
        parts = name.split(".")
        counts.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in inner)
    found = [(n, prefix) for prefix, n in counts.items() if f"{prefix}{embedding}" in stored]
    return max(found)[1] if found else None


def _outside(alone: Any, prefix: str, stored: Collection[str]) -> dict[str, str]:
    """Where the tensors beside the text model's backbone (its head) stand."""
    inside, found = f"{alone.base_model_prefix}.", {}
    for name in (n for n in alone.state_dict() if not n.startswith(inside)):
        first = prefix.split(".")[0]
        places = [n for n in stored if n == name or n.endswith(f".{name}")]
        found[name] = max(places, key=lambda n: (n.startswith(f"{first}."), -len(n)), default="")
    return {name: place for name, place in found.items() if place}


def _tied(config: PreTrainedConfig, text: PreTrainedConfig, head: bool) -> bool:
    """Is the head of the text model its embedding? The published class looks at the whole's config, the text
    class at the text's, and neither must say what the files do not hold.
    """
    inner = bool(getattr(text, "tie_word_embeddings", False))
    outer = bool(getattr(config, "tie_word_embeddings", inner))
    return (inner and outer) if head else (inner or outer)
