"""Is this the adapter that was trained, and this folder its base? Hashes, names, shapes and weights. Imports
no torch.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from lora_recipes.core import cli, provenance, weights
from lora_recipes.core.adapter_folder import Adapter, parameters
from lora_recipes.core.errors import Problem, listed
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.yamlfile import shown

_EMBEDDING = "embed_tokens.weight"


def renamed(module: str, base: Collection[str]) -> str | None:
    """`module` as the class that the base names calls it: vLLM builds that class. None when the base has no
    such module.
    """
    return next((name for name in _names(module, base) if f"{name}.weight" in base), None)


def _names(name: str, base: Collection[str]) -> Iterator[str]:
    """What the text model calls `name`, and what the two-part checkpoint with the tensors `base` may.

    transformers trains the text model of such a one as `model.layers...`; there it is
    `model.language_model.layers...`, or something else before the same ending: then it is what stands before
    the embedding too, which a vision tower has under another name.
    """
    inner = name.removeprefix("model.").removeprefix("language_model.")
    yield name
    for prefix in ("model.language_model.", "model.", "language_model.model.", "language_model."):
        yield prefix + inner
    if ending := ".".join(name.split(".")[1:]):
        yield from (n.removesuffix(_EMBEDDING) + ending for n in base if n.endswith(_EMBEDDING))


def own_name(tensor: str, base: Collection[str]) -> str | None:
    """The name among those of `base` of what the model calls `tensor`; None when it is not there.

    Checkpoints are also stored without the class's prefix (GPT-2: `h.0...` is `transformer.h.0...`), or with
    another (Nemotron-H: `backbone.layers.0...` is `model.layers.0...`): then what follows the prefix, with
    the layer's number, must be there once.
    """
    if name := next((name for name in _names(tensor, base) if name in base), None):
        return name
    parts = tensor.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    for rest in (".".join(parts[i:]) for i in range(first)):
        if found := [name for name in base if name == rest or name.endswith(f".{rest}")]:
            return found[0] if len(found) == 1 else None
    return None


def fit(adapter: Adapter, folder: Path, known: Provenance | None = None) -> list[Problem]:
    """Is the adapter as it was saved, and the model in `folder` its base? Its weights against those that
    training saw, then each module's name and shape.
    """
    if known and (changed := provenance.edited(adapter.path, known)):
        return changed
    try:
        base = weights.shapes(folder)
        was = known.fingerprint if known else None
        if was and was != weights.fingerprint(folder, was):
            do = (
                "it is the weights that count, not the name: give the right folder by"
                f" {cli.command(BASE='path')}, or train on this one"
            )
            return [
                Problem(
                    shown(adapter.path), f"was trained on other weights than those in {shown(folder)}", do
                )
            ]
    except (OSError, ValueError) as error:
        do = f"copy or fetch it again (read are {' or '.join(weights.NAMES)}, or what its index names)"
        return [Problem(shown(folder), f"its weights cannot be read: {error}", do)]
    at, missing = shown(adapter.file), []
    for module in adapter.modules:
        name = own_name(f"{module}.weight", base)
        if name is None:
            # Parameters that transformers joins of several tensors are judged as they load (model/attach.py).
            missing += [] if parameters(adapter.config, module) else [module]
            continue
        if len(base[name]) != 2:
            return [
                Problem(
                    at,
                    f"{module} of {shown(folder)} is no matrix",
                    "vLLM serves adapters of linear layers and embeddings",
                )
            ]
        if wrong := _shape(adapter, module, base[name]):
            found = f"{module} {wrong}; that module of {shown(folder)} is {list(base[name])}"
            return [Problem(at, found, "the adapter belongs to another base model")]
    if missing:
        do = "vLLM would skip them and serve the base alone: another base, or one with fewer layers"
        return [
            Problem(
                at,
                f"{len(missing)} of {len(adapter.modules)} modules are not in {shown(folder)}:"
                f" {listed(missing, 3)}",
                do,
            )
        ]
    return []


def _shape(adapter: Adapter, module: str, stored: tuple[int, ...]) -> str:
    """Which of A and B of `module` has no shape that goes with its weight, of shape `stored`; empty when both
    have.
    """
    got = {kind: adapter.tensors[name].shape for kind, name in adapter.modules[module].items()}
    ends = {kind: shape[-1] if kind == "A" else shape[0] for kind, shape in got.items()}
    turned = dict(zip("AB", stored, strict=True))  # [in, out]: an embedding, and GPT-2's Conv1D
    wants = (
        turned if all(ends[kind] == turned[kind] for kind in ends) else dict(zip("BA", stored, strict=True))
    )
    off = next((kind for kind in ends if ends[kind] != wants[kind]), None)
    return f"lora_{off} has the shape {list(got[off])}" if off else ""
