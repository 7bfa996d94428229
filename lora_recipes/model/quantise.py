"""A merged model in fewer bits, for vLLM: which run, which layers, and the files, by compressed-tensors.

They are written by the Python of the serving environment (model/compress.py): what reads them later is what
wrote them, and training's own environment needs nothing more.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from lora_recipes.core import cli, files, head, lock, weights
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest
from lora_recipes.core.locate import is_model
from lora_recipes.core.run_folder import EXPORTS, RunFolder, foreign
from lora_recipes.core.yamlfile import shown
from lora_recipes.model import parts
from lora_recipes.recipe.base import Folder
from lora_recipes.serving import command
from lora_recipes.serving import server as process

PROGRAM = Path(__file__).with_name("compress.py")
# numbers of a row that may share a scale, best for speed first; vLLM's CPU kernel wants multiples of 32
GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Format:
    """A way to store weights: `scheme`, as compressed-tensors calls it; `bits` of a weight; `grouped`: does a
    group of each row have a scale of its own, rather than the whole row?
    """

    scheme: str
    bits: int
    grouped: bool = False


FORMATS = {"w8a8": Format("W8A8", 8), "w4a16": Format("W4A16", 4, grouped=True)}


@dataclass(frozen=True)
class Job:
    """The whole model in `source`, of the run `run`, goes to `target` as the format `name`."""

    run: RunFolder
    source: Path
    name: str
    target: Path

    @property
    def format(self) -> Format:
        """What of it is stored how."""
        return FORMATS[self.name]


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model of class `kind`: `quantised` and left as they are (`ignore`), by name; how
    many numbers of a row share a scale (None: all of them).
    """

    kind: str
    quantised: list[str]
    ignore: list[str]
    group_size: int | None


def job(run: RunFolder, name: str, force: bool) -> Job:
    """What is asked for. RecipeError, before anything is loaded, where it cannot be made."""
    if name not in FORMATS:
        do = f"did you mean {nearest(name, FORMATS)}? There are {', '.join(FORMATS)}"
        raise RecipeError(Problem(cli.command(FORMAT=name), "no such format", do))
    run.outcome()
    source = next((p for p in (run.path / "merged", run.result("full")) if is_model(p)), None)
    for folder in (source, run.result("lora")):
        if folder and head.read(folder):
            do = "serve it as it was merged: vLLM's classify endpoint takes it"
            raise RecipeError(Problem(shown(folder), "is a classifier, and its head is not quantised", do))
    if source is None:
        do = f"first {cli.command('merge', RECIPE=run.path.name)}"
        raise RecipeError(Problem(shown(run.path), "has no merged model to quantise", do))
    if command.vllm() is None:
        found = (
            "vLLM is not installed: it brings what writes the format, and what loads it to measure the loss"
        )
        raise RecipeError(Problem(shown(command.ENVIRONMENT), found, command.setup()))
    target = run.path / EXPORTS / name
    if target.exists() or target.is_symlink():
        if not force:
            do = f"{cli.command(FORCE=True)} replaces it"
            raise RecipeError(Problem(shown(target), "is already there", do))
        if own := foreign(target, None):
            found = f"holds what no export wrote: {listed(own, 3)}"
            raise RecipeError(Problem(shown(target), found, "move it away: the folder is replaced whole"))
        lock.unserved(target)
    return Job(run, source, name, target)


def layers(wanted: Job) -> Layers:
    """The linear layers of the model's decoder, seen on a model without bytes. RecipeError where some of its
    weights stand in no linear layer (experts, convolutions), or in rows that no group divides.
    """
    config = Folder(wanted.source).real_config()
    model = parts.build(config, torch.bfloat16)
    decoder = parts.decoder(model)
    inside = {id(module) for module in decoder.modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantised = {n: m for n, m in linear.items() if id(m) in inside}
    others = [
        f"{name} ({type(module).__name__})"
        for name, module in decoder.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
    ]
    where = f"{shown(wanted.source)}/config.json"
    if others or not quantised:
        found = f"{type(model).__name__} holds weights in other than linear layers: {listed(others, 2)}"
        do = "serve the merged model as it is: these are not quantised"
        raise RecipeError(Problem(where, found if others else "no linear layer in its decoder", do))
    if not wanted.format.grouped:
        return Layers(type(model).__name__, list(quantised), sorted(set(linear) - set(quantised)), None)
    widths = {m.in_features for m in quantised.values()}
    size = next((g for g in GROUPS if not any(width % g for width in widths)), None)
    if size is None:
        found = f"its linear layers take {listed(map(str, sorted(widths)))} numbers: no group of"
        found += f" {', '.join(map(str, GROUPS))} divides all of them"
        raise RecipeError(Problem(where, found, f"{cli.command(FORMAT='w8a8')} has no groups"))
    return Layers(type(model).__name__, list(quantised), sorted(set(linear) - set(quantised)), size)


def room(source: Path, size: float, doing: str) -> None:
    """RecipeError where memory does not suffice for `size` bytes of each number of the model in `source`."""
    needed = int(size * sum(torch.Size(shape).numel() for shape in weights.shapes(source).values()))
    if needed > (free := psutil.virtual_memory().available):
        found = f"{doing} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise RecipeError(Problem(shown(source), found, "use a larger machine"))


def write(wanted: Job, chosen: Layers, target: Path) -> None:
    """Write the folder that vLLM loads: quantised weights, and all else as the merged model has it."""
    room(wanted.source, 5, "quantising it")  # float32, and what is being written
    asked: dict[str, Any] = {"source": str(wanted.source), "target": str(target), "kind": chosen.kind}
    asked |= {"scheme": wanted.format.scheme, "group_size": chosen.group_size, "ignore": chosen.ignore}
    done = subprocess.run(
        [str(command.python()), str(PROGRAM)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(files.ROOT / "scripts" / "vllm_cpu"), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        log = wanted.run.path / f"{EXPORTS}.log"
        files.write(log, done.stderr)
        found = f"compressed-tensors did not write {wanted.name}: {process.last_error(log)}"
        raise RecipeError(Problem(shown(wanted.source), found, f"all of it: {shown(log)}"))
    for file in wanted.source.iterdir():  # tokenizer, templates, where an answer ends
        own = {"config.json", "merge.json"} | {p.name for p in weights.files(wanted.source)}
        if file.is_file() and file.name not in own and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
