"""Write lora_recipes/serving/vllm.json anew, from the classes of the installed vLLM: `make vllm-table`.

Runs in the serving environment. What a class says of itself (has it LoRA, which layers it joins) is asked of
the class; which linear layers it builds stands in its code alone, where each call is looked up among the
names of its own module. A config may leave some of them out: the table has them all.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import json
import logging
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import transformers
import vllm
from torch import nn
from transformers.models.auto import modeling_auto as auto
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models import registry, supports_lora
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.utils import init_vllm_registered_model

TABLE = Path(__file__).resolve().parents[1] / "lora_recipes" / "serving" / "vllm.json"
LEAVES = (LinearBase, fused_moe.MoERunner, VocabParallelEmbedding)
MODELS = ("vllm.model_executor.models.", "vllm.models.")
EXPERTS = "experts"
ARCHITECTURES = registry.ModelRegistry.models
logging.disable(logging.WARNING)  # what classes of no interest say of this machine


@dataclass
class Part:
    """What the code of one class (or function beside it) builds itself.

    `layers` by the last part of their names, `packed` as it adds to packed_modules_mapping, `embeddings`;
    `names`: the classes and functions that it names; `inner`: architectures of a language model that the
    registry makes, None where its config decides; `makers`: methods that return a layer; `made`: (layer,
    method).
    """

    layers: set[str] = field(default_factory=set)
    packed: dict[str, list[str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    names: list[Any] = field(default_factory=list)
    inner: set[str | None] = field(default_factory=set)
    makers: set[str] = field(default_factory=set)
    made: list[tuple[str, str]] = field(default_factory=list)

    def read(self, one: Any) -> None:
        """Add what stands in the code of `one` alone."""
        tree, names = _file(one.__module__).get(one.__name__), vars(sys.modules[one.__module__])
        models = one.__module__.startswith(MODELS)
        for node in ast.walk(tree) if tree else ():  # beside the models a name may stand for a type alone
            called = node.func if isinstance(node, ast.Call) else None
            self.names += filter(_reachable, _values(node if models else called, names))
            if isinstance(node, ast.Call) and _value(node.func, names) is init_vllm_registered_model:
                said = next((k.value for k in node.keywords if k.arg == "architectures"), None)
                self.inner |= set(ast.literal_eval(said)) if said and _constant(said) else {None}
            if isinstance(node, ast.FunctionDef):
                self._assigned(node, names)

    def _assigned(self, function: ast.FunctionDef, names: dict[str, Any]) -> None:
        """`self.NAME = Layer(...)`, with a local name in between or a choice of two."""
        local: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value and _is_layer(node.value, names, local):
                self.makers.add(function.name)
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    local.setdefault(target.id, []).append(node.value)
                if isinstance(target, ast.Attribute) and _is_layer(node.value, names, local):
                    self.layers.add(target.attr)
                if isinstance(target, ast.Attribute) and isinstance(node.value, ast.Call):
                    self.made.append((target.attr, ast.unparse(node.value.func).removeprefix("self.")))
                if isinstance(target, ast.Subscript) and "packed_modules_mapping" in ast.unparse(target):
                    self.packed[ast.literal_eval(target.slice)] = ast.literal_eval(node.value)


@functools.cache
def part(one: Any) -> Part:
    """Of a class with those it inherits from, or of a function."""
    found = Part()
    if isinstance(one, FunctionType):
        found.read(one)
        return found
    found.embeddings |= set(getattr(one, "embedding_modules", None) or {})
    for base in one.__mro__:
        if base.__module__.startswith("vllm.") and not issubclass(base, LEAVES):
            found.read(base)
    found.layers |= {layer for layer, maker in found.made if maker in found.makers}
    return found


def _constant(node: ast.expr) -> bool:
    return not any(isinstance(inner, ast.Name | ast.Attribute) for inner in ast.walk(node))


@functools.cache
def _file(name: str) -> dict[str, ast.AST]:
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    return {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}


def _value(node: ast.AST | None, names: dict[str, Any]) -> Any:
    """What a name of the module, or an attribute of one, stands for."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(owner := _value(node.value, names)):
        return vars(owner).get(node.attr)
    return None


def _values(node: ast.AST | None, names: dict[str, Any]) -> Iterator[Any]:
    value = _value(node, names)
    yield from value.values() if isinstance(value, dict) and isinstance(node, ast.Name) else [value]


def _reachable(value: Any) -> bool:
    """A class of layers, or a function beside the models, whose code may build layers."""
    module = str(getattr(value, "__module__", ""))
    if inspect.isclass(value):
        return module.startswith("vllm.") and issubclass(value, nn.Module) and not issubclass(value, LEAVES)
    return (
        isinstance(value, FunctionType)
        and module.startswith(MODELS)
        and not module.endswith((".utils", ".interfaces"))
    )


def _is_layer(node: ast.expr, names: dict[str, Any], local: dict[str, list[ast.expr]]) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_layer(node.body, names, local) or _is_layer(node.orelse, names, local)
    if isinstance(node, ast.Name):
        return any(_is_layer(v, names, {}) for v in local.get(node.id, []))
    if not isinstance(node, ast.Call):
        return False
    kinds: list[ast.AST] = [node.func]
    if isinstance(node.func, ast.Name):
        for chosen in local.get(node.func.id, []):
            kinds += [chosen.body, chosen.orelse] if isinstance(chosen, ast.IfExp) else [chosen]
    found = [_value(kind, names) for kind in kinds]
    return any(
        value is fused_moe.FusedMoEFactory or (inspect.isclass(value) and issubclass(value, LEAVES[:2]))
        for value in found
    )


@functools.cache
def entry(architecture: str) -> dict[str, Any]:
    """What the table says of one architecture."""
    try:
        kind = ARCHITECTURES[architecture].load_model_cls()
    except Exception:  # a package that this machine has not
        return {"unread": True}
    if not supports_lora(kind):
        return {"lora": False}
    if issubclass(kind, Base):
        split = _split(getattr(transformers, architecture, None))
        return {"backend": "transformers", **({"ignored": split} if split else {})}
    built = [kind]
    for one in built:  # grows
        built += dict.fromkeys(name for name in part(one).names if name not in built)
    parts = [part(one) for one in built]
    packed = dict(kind.packed_modules_mapping or {})
    for child in [] if packed else built:
        own = getattr(child, "packed_modules_mapping", None)
        packed |= own if isinstance(own, dict) else {}
    layers: set[str] = set().union(*(p.layers | p.embeddings for p in parts))
    added = [names for p in parts for layer, names in p.packed.items() if layer in layers]
    modules = (layers - packed.keys()).union(*(packed[layer] for layer in layers & packed.keys()), *added)
    made: dict[str, Any] = {"modules": sorted(modules)}
    if EXPERTS in layers:
        made["experts"] = "3d" if kind.is_3d_moe_weight else "2d"
    for inner in set().union(*(p.inner for p in parts)):
        if inner is None:
            made["inner"] = True
        elif inner in ARCHITECTURES:
            found = entry(inner)
            made["modules"] = sorted({*made["modules"], *found.get("modules", [])})
            made |= {k: v for k, v in found.items() if k == "experts"}
    return made


def _split(kind: type[nn.Module] | None) -> list[str]:
    """Layers of transformers' own code whose output it splits in three, q, k and v. vLLM's backend makes each
    a QKVParallelLinear without a word in packed_modules_mapping, on which no LoRA layer fits
    (transformers/fusers/packed_qkv.py, lora/layers/column_parallel_linear.py); the log alone says so.
    """
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[kind.__module__]))) if kind else ():
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "split"
        ):
            continue
        if node.args and isinstance(node.args[0], ast.Tuple | ast.List) and len(node.args[0].elts) == 3:
            called = [n.func for n in ast.walk(node.func.value) if isinstance(n, ast.Call)]
            found |= {
                f.attr for f in called if isinstance(f, ast.Attribute) and ast.unparse(f.value) == "self"
            }
    return sorted(found)


def fallback() -> list[str]:
    """Classes of transformers that are not in vLLM's registry and that its backend would try
    (registry._try_resolve_transformers), but for those with layers that are no attention, which it refuses.
    """
    found = set()
    for names in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for name in set(names.values()) - ARCHITECTURES.keys():
            kind = getattr(transformers, name)
            tried = kind.is_backend_compatible() or kind._can_set_attn_implementation()
            if tried and not kind._is_stateful:
                found.add(name)
    return sorted(found)


def table() -> dict[str, Any]:
    groups = (
        registry._TEXT_GENERATION_MODELS,
        registry._MULTIMODAL_MODELS,
        registry._TRANSFORMERS_SUPPORTED_MODELS,
    )
    classes = {name: entry(name) for group in groups for name in sorted(group)}
    types = {kind: name for kind, name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in classes}
    made = {
        "vllm": vllm.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "types": types,
        "fallback": fallback(),
        "classes": classes,
    }
    return made | {"seal": seal(made)}


def seal(made: dict[str, Any]) -> str:
    """SHA-256 of a table, of what it is made by and of what it is made from: while it is the same, so is what
    `table` would say, which takes 25 s.
    """
    folder = Path(str(vllm.__file__)).parent
    found = hashlib.sha256(json.dumps([made, transformers.__version__], sort_keys=True).encode())
    for file in [Path(__file__), *sorted(folder.rglob("*.py"))]:
        found.update(file.relative_to(folder).as_posix().encode() if file.is_relative_to(folder) else b"")
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def looked_at_again() -> dict[str, Any]:
    """The table on file if its seal is right, with one entry of each kind made anew; else all of it."""
    kept = json.loads(TABLE.read_text())
    sealed = kept.pop("seal", "")
    if sealed != seal(kept):
        return table()
    one = {(*said, said.get("experts")): name for name, said in kept["classes"].items()}
    return kept | {"classes": kept["classes"] | {n: entry(n) for n in one.values()}, "seal": sealed}


def text(made: dict[str, Any]) -> str:
    """JSON, an architecture a line."""
    lines = [f'  "{name}": {json.dumps(said)}' for name, said in sorted(made["classes"].items())]
    head = "\n".join(
        textwrap.fill(f'"{key}": {json.dumps(said)},', 110, initial_indent=" ", subsequent_indent="  ")
        for key, said in made.items()
        if key != "classes"
    )
    return "{\n" + head + '\n "classes": {\n' + ",\n".join(lines) + "\n }\n}\n"


if __name__ == "__main__":
    TABLE.write_text(text(table()))
    print(f"wrote {TABLE.name}")
