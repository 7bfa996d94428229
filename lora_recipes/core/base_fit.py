"""Is this the adapter that was trained, and this folder its base? Hashes, names, shapes and weights. Imports
no torch.
"""

from collections.abc import Collection
from pathlib import Path

from lora_recipes.core import cli, provenance, weights
from lora_recipes.core.adapter_folder import Adapter, parameters
from lora_recipes.core.errors import Problem, listed
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.yamlfile import shown

_EMBEDDING = "embed_tokens.weight"


def renamed(module: str, base: Collection[str]) -> str | None:
    """`module` as the base's own checkpoint names it: vLLM builds that class. None when the base has no such
    module.
    """
    name = own_name(f"{module}.weight", base)
    return name.removesuffix(".weight") if name else None


def own_name(tensor: str, base: Collection[str]) -> str | None:
    """The name among those of `base` of what the text model calls `tensor`; None when it is not there.

    transformers trains the text model of a two-part checkpoint as `model.layers...`; there it is
    `model.language_model.layers...`, or something else before the same ending: then it is what stands before
    the embedding too, which a vision tower has under another name.
    """
    inner = tensor.removeprefix("model.").removeprefix("language_model.")
    names = (
        tensor,
        f"model.language_model.{inner}",
        f"model.{inner}",
        f"language_model.model.{inner}",
        f"language_model.{inner}",
    )
    if found := next((name for name in names if name in base), None):
        return found
    ending = ".".join(tensor.split(".")[1:])
    prefixes = [n.removesuffix(_EMBEDDING) for n in base if n.endswith(_EMBEDDING)] if ending else []
    return next((p + ending for p in prefixes if p + ending in base), None)


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
    for module, pair in adapter.modules.items():
        name = renamed(module, base)
        if name is None:
            # Parameters that transformers joins of several tensors are judged as they load (model/attach.py).
            missing += [] if parameters(adapter.config, module) else [module]
            continue
        if len(base[f"{name}.weight"]) != 2:
            return [
                Problem(
                    at,
                    f"{module} of {shown(folder)} is no matrix",
                    "vLLM serves adapters of linear layers and embeddings",
                )
            ]
        rows, columns = base[f"{name}.weight"]
        got = {kind: adapter.tensors[tensor].shape for kind, tensor in pair.items()}
        embedding = "lora_embedding" in pair.get("A", "")
        wants = {"A": rows if embedding else columns, "B": columns if embedding else rows}
        for kind, shape in got.items():
            if (shape[-1] if kind == "A" else shape[0]) != wants[kind]:
                found = (
                    f"{module} lora_{kind} has the shape {list(shape)}; that module of {shown(folder)} is"
                    f" [{rows}, {columns}]"
                )
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
