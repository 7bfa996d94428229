"""Would a server give what was trained? An adapter's tensors against its config and its base; and the copy
made for serving.

vLLM 0.32 looks at little of this (vllm/lora/lora_model.py, utils.py): it answers 200 and serves the base, or
noise. Imports no torch.
"""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_recipes.core import provenance, safetensors, weights
from lora_recipes.core.adapter_folder import Adapter, ends, matched, parameters
from lora_recipes.core.base_fit import fit, renamed
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.yamlfile import shown
from lora_recipes.serving.rules import config_faults, z_without_qkv

MARK = "serving.json"  # stands in every folder that `export` made, and only those are replaced


def check(adapter: Adapter, base: Path | None, known: Provenance | None = None) -> list[Problem]:
    """Everything that would make vLLM refuse the adapter, or serve something else than was trained. `base`:
    its folder, if at hand.
    """
    at = f"{shown(adapter.path)}/adapter_config.json"
    problems = [Problem(f"{at} {key}", found, do) for key, found, do in config_faults(adapter.config)]
    if adapter.config["peft_type"] != "LORA":
        return problems
    problems += _names(adapter) + _ranks(adapter) + sound(adapter, served=True)
    return problems + (fit(adapter, base, known) if base else [])


def sound(adapter: Adapter, served: bool = False) -> list[Problem]:
    """What no training leaves in a LoRA adapter: no tensor of a module, half a pair, a doubled prefix,
    numbers that are none, every B zero; in one that is to be `served` also a single one.
    """
    at, modules = shown(adapter.file), adapter.modules
    if not modules:
        return [Problem(at, "holds no LoRA tensor", "it is not a trained adapter")]
    problems = []
    if doubled := [m for m in modules if m.startswith("base_model.")]:
        problems.append(
            Problem(
                at,
                f"the prefix base_model.model. stands twice, e.g. {doubled[0]}",
                "the adapter was put on a PEFT model; train it again",
            )
        )
    if halves := [m for m, pair in modules.items() if set(pair) != {"A", "B"}]:
        problems.append(Problem(at, f"A or B is missing in {listed(halves, 3)}", "the file is not complete"))
    return problems + _values(adapter, served)


def _names(adapter: Adapter) -> list[Problem]:
    at, modules = shown(adapter.file), adapter.modules
    known = {tensor for pair in modules.values() for tensor in pair.values()}
    strange = [n for n in adapter.tensors if n not in known]
    problems = []
    if strange:
        do = "vLLM ignores or refuses such names; a doubled prefix comes from get_peft_model on a PEFT model"
        problems.append(
            Problem(at, f"{len(strange)} tensors are no LoRA of a module: {listed(strange, 3)}", do)
        )
    leaves = {m.rsplit(".", 1)[-1] for m in modules}
    targets, excluded = adapter.config["target_modules"], adapter.config.get("exclude_modules")
    for target in targets if isinstance(targets, list) and modules else []:
        if not any(ends(m, target) for m in modules) and not _excluded(target, excluded):
            do = f"did you mean {nearest(target, leaves)}? Nothing was trained there"
            where = f"{shown(adapter.path)}/adapter_config.json target_modules"
            problems.append(Problem(where, f"target_modules names {target!r}, but no tensor is for it", do))
    return problems + ([Problem(at, *alone)] if (alone := z_without_qkv(modules)) else [])


def _excluded(target: str, by: list[str] | str | None) -> bool:
    """Does exclude_modules take all of `target` away? PEFT writes all-linear as names, excluded ones too."""
    return bool(re.fullmatch(by, target)) if isinstance(by, str) else any(ends(target, e) for e in by or [])


def _ranks(adapter: Adapter) -> list[Problem]:
    """The ranks that the config states against the tensors: vLLM scales by what the config says, and does not
    look at the shapes.
    """
    pattern = adapter.config.get("rank_pattern") or {}
    for module, pair in adapter.modules.items():
        if parameters(adapter.config, module):
            continue  # r for each expert
        said = matched(pattern, module) or adapter.config["r"]
        for kind, name in pair.items():
            shape = adapter.tensors[name].shape
            real = shape[0] if kind == "A" else shape[-1]
            if real != said:
                found = f"says rank {said} for {module}, its lora_{kind} has {real}"
                where, do = (
                    f"{shown(adapter.path)}/adapter_config.json r",
                    "vLLM would scale it wrongly in silence: restore the file",
                )
                return [Problem(where, found, do)]
    return []


def _values(adapter: Adapter, served: bool) -> list[Problem]:
    bad, zero = [], []
    for pair in adapter.modules.values():
        for kind, name in pair.items():
            try:
                numbers = safetensors.values(adapter.file, adapter.tensors[name])
            except ValueError as error:
                return [
                    Problem(shown(adapter.file), str(error), "an adapter holds float32, float16 or bfloat16")
                ]
            largest = float(abs(numbers).max(initial=0.0))
            if not math.isfinite(largest):
                bad.append(name)
            elif kind == "B" and largest == 0:
                zero.append(name)
    problems = []
    if bad:
        do = "vLLM loads it, answers token 0, and may spoil the other adapters on the server"
        problems.append(
            Problem(shown(adapter.file), f"{len(bad)} tensors hold NaN or infinity: {listed(bad, 3)}", do)
        )
    every = len(zero) == len(adapter.modules) and not adapter.config.get("use_dora")  # it has a magnitude too
    if zero and (every or served):
        found = (
            "every lora_B is zero: the adapter does nothing"
            if every
            else f"lora_B is all zero in {listed(zero, 3)}"
        )
        problems.append(Problem(shown(adapter.file), found, "it was not trained there; train it again"))
    return problems


def _renamed_config(adapter: Adapter, names: dict[str, str]) -> dict[str, Any]:
    """adapter_config.json for modules of other names (`names`: old to new). Each pattern is asked about the
    old name, which it was written for, and its answer stands beside the new one, in full: a key left as it
    is would match nothing, in silence.
    """
    config = adapter.config
    ranks, alphas = (_by_pattern(config.get(f"{key}_pattern") or {}, names) for key in ("rank", "alpha"))
    return config | {
        "target_modules": sorted(names.values()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _by_pattern(pattern: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {
        re.escape(new): value for old, new in names.items() if (value := matched(pattern, old)) is not None
    }


def export(adapter: Adapter, base: Path, target: Path) -> int:
    """Write `target`: the adapter under the names of the class that vLLM loads for `base`. Returns how many
    modules were renamed.

    The tensors are copied byte for byte, and the names in adapter_config.json follow them. An adapter that
    stands in `target` is replaced; anything else is not touched.
    """
    if (target.exists() or target.is_symlink()) and not (target / MARK).is_file():
        raise RecipeError(
            Problem(
                shown(target), f"is there, and was not made for serving (no {MARK} in it)", "move it away"
            )
        )
    raise_if(fit(adapter, base))
    shapes = weights.shapes(base)
    modules = {module: renamed(module, shapes) or module for module in adapter.modules}
    changed = sum(new != old for old, new in modules.items())
    names = {
        tensor: tensor.replace(f"base_model.model.{old}.", f"base_model.model.{new}.", 1)
        for old, new in modules.items()
        for tensor in adapter.modules[old].values()
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / MARK).write_text(
        json.dumps({"adapter": str(adapter.path), "base": str(base), "renamed": changed}) + "\n"
    )
    if changed:
        config = json.dumps(_renamed_config(adapter, modules), indent=2) + "\n"
        (temporary / provenance.CONFIG).write_text(config, encoding="utf-8")
    else:
        shutil.copyfile(adapter.path / provenance.CONFIG, temporary / provenance.CONFIG)
    if known := provenance.read(adapter.path):
        replace(known, files={}, adapter_config={}).save(temporary)  # those of the adapter, not of this copy
    safetensors.copy_renamed(adapter.file, temporary / "adapter_model.safetensors", names)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return changed
