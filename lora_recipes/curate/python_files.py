"""The Python files of a repository, a folder or an installed package: each with its text, the commit and the
licence it stands under, or why it is left out. Imports no torch.
"""

import ast
import hashlib
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tokenize
import tomllib
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.yamlfile import shown

STDLIB = "stdlib"
LARGEST = 2 * 2**20  # bytes of a file: the standard library's largest that people write has 0.3 MB
HEAD = 10  # lines in which a generated file says so
# Folders that hold other projects, or nothing that anybody wrote.
OTHERS = {"site-packages", "dist-packages", "node_modules", "__pycache__", "__pypackages__"}
TEST = re.compile(r"(^|_)tests?$|^tests?_|^conftest$")  # of a folder's name, or a file's without .py
SAYS_SO = re.compile(r"@generated\b|\bauto-?\s?generated\b|\b(automatically|machine)[ -]generated\b", re.I)
BY = re.compile(r"^\s*#.*\b(generated (by|from)\b|do not edit\b|do not modify\b)", re.I)
BUILT = re.compile(r"_pb2(_grpc)?$")
# What only the text of one licence says, longest match of meaning first.
LICENCES = {
    "Apache-2.0": r"Apache License\s+Version 2\.0",
    "MPL-2.0": r"Mozilla Public License,? Version 2\.0",
    "AGPL-3.0": r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3",
    "LGPL-3.0": r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3",
    "LGPL-2.1": r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 2\.1",
    "GPL-3.0": r"GNU GENERAL PUBLIC LICENSE\s+Version 3",
    "GPL-2.0": r"GNU GENERAL PUBLIC LICENSE\s+Version 2",
    "PSF-2.0": r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
    "BSD-3-Clause": r"Redistribution and use in source and binary forms[\s\S]*Neither the name",
    "BSD-2-Clause": r"Redistribution and use in source and binary forms",
    "MIT": r"Permission is hereby granted, free of charge, to any person obtaining a copy",
    "ISC": r"Permission to use, copy, modify, and/or distribute this software",
}
SPDX = re.compile(r"SPDX-License-Identifier:\s*([^\s#*]+(?: (?:OR|AND|WITH) [^\s#*]+)*)")
UNKNOWN = "unknown"
# ```python ... ``` or ``` ... ```, and one that a cut row does not close.
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
LANGUAGES = ("python", "py", "python3")


@dataclass(frozen=True)
class Source:
    """Where files are from. `changed`: files that git would commit differently, as paths from `root`;
    `ignored`: what it would not commit at all.
    """

    name: str
    root: Path
    licence: str = UNKNOWN
    version: str = ""
    commit: str = ""
    changed: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    package: str = ""  # the name that modules in `root` begin with


@dataclass(frozen=True)
class PythonFile:
    """One file: its syntax tree and text, or the `reason` why it is left out and what was `found`.

    `path`: from the source's root, with slashes. `digest`: SHA-256 of its bytes, empty where unread.
    """

    source: Source
    path: str
    text: str = ""
    tree: ast.Module | None = None
    reason: str = ""
    found: str = ""
    digest: str = ""

    @property
    def module(self) -> str:
        """`a.b` of a/b.py and of a/b/__init__.py."""
        parts = self.path.removesuffix(".py").split("/")
        parts = parts[1:] if parts[0] in ("src", "lib") and len(parts) > 1 else parts
        parts = [self.source.package, *parts] if self.source.package else parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    @property
    def where(self) -> str:
        """The file, to be read by people."""
        return f"{self.source.name}/{self.path}"

    @property
    def licence(self) -> str:
        """As the file itself says, else of its source."""
        said = SPDX.search("\n".join(self.text.split("\n", 30)[:30]))
        return said[1] if said else self.source.licence

    @property
    def provenance(self) -> dict[str, str]:
        """Where it is from: without commit where git would commit another text."""
        source = self.source
        commit = "" if self.path in source.changed else source.commit
        said = {"source": source.name, "version": source.version, "commit": commit, "path": self.path}
        return {k: v for k, v in said.items() if v} | {"licence": self.licence}


def option(parser: ArgumentParser) -> None:
    """IN..., as `source` takes each."""
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="IN",
        help="a repository's folder, a .py file, or the name of an installed package"
        f" (default: {STDLIB}, Python's own library)",
    )


def source(word: str) -> Source:
    """What `word` names: a folder, a .py file, `stdlib`, or a package or module that is installed here.
    RecipeError where it names none of them.
    """
    path = Path(word)
    if path.is_dir() or (path.suffix == ".py" and path.is_file()):
        return _folder(path.resolve())
    if word == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return Source(STDLIB, root, "PSF-2.0", platform.python_version())
    spec = importlib.util.find_spec(word) if word.isidentifier() else None
    if spec is None or (spec.origin in (None, "built-in", "frozen") and not spec.submodule_search_locations):
        looks = "/" in word or path.suffix
        found = "no such folder" if looks else "no folder here, and no Python package that is installed here"
        do = f"a repository's folder, a .py file, the name of an installed package, or {STDLIB}"
        raise RecipeError(Problem(word, found, do))
    inside = list(spec.submodule_search_locations or [])
    root = Path(inside[0] if inside else str(spec.origin))
    if not inside and root.suffix != ".py":
        raise RecipeError(Problem(word, f"{root.name} is compiled, there is no source to read"))
    package = word if inside else ""
    if word in sys.stdlib_module_names:
        return Source(word, root, "PSF-2.0", platform.python_version(), package=package)
    for name in metadata.packages_distributions().get(word, []):
        about = metadata.metadata(name)
        return Source(name, root, _stated(about), about["Version"] or "", package=package)
    return Source(word, root, _licence(root), package=package)


def _stated(about: metadata.PackageMetadata) -> str:
    """The licence that a distribution's metadata names."""
    said = next(iter([*(about.get_all("License-Expression") or []), *(about.get_all("License") or [])]), "")
    if said and "\n" not in said and len(said) < 60:
        return said
    classes = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License :: ")]
    return classes[0] if classes else _recognised(said)


def _folder(path: Path) -> Source:
    """A folder or file, with what git says of it."""
    folder = path if path.is_dir() else path.parent
    plain = Source(path.name or str(path), path, _licence(folder))
    top = _git(folder, "rev-parse", "--show-toplevel").strip()
    commit = _git(folder, "rev-parse", "HEAD").strip()
    if not (top and commit) or _git(folder, "ls-files", "--error-unmatch", ".", empty="none") == "none":
        return plain
    # NUL-terminated `XY path`, of a renamed file followed by its old path; paths are from the top.
    said = _git(
        folder,
        "status",
        "--porcelain",
        "-z",
        "--untracked-files=all",
        "--ignored=matching",
        "--no-renames",
        ".",
    )
    marked = [(entry[:2], Path(top).resolve() / entry[3:]) for entry in said.split("\0") if entry[3:]]
    inside = [
        (mark, file.relative_to(folder).as_posix()) for mark, file in marked if file.is_relative_to(folder)
    ]
    return Source(
        plain.name,
        path,
        plain.licence if plain.licence != UNKNOWN else _licence(Path(top)),
        commit=commit,
        changed=frozenset(file for mark, file in inside if mark != "!!"),
        ignored=frozenset(file for mark, file in inside if mark == "!!"),
    )


def _git(folder: Path, *words: str, empty: str = "") -> str:
    """What git says; `empty` where there is no git, no repository, or it refuses. Runs no program that the
    repository names.
    """
    if not (git := shutil.which("git")):
        return empty
    safe = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.quotePath=false"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "GIT_OPTIONAL_LOCKS": "0"
    }
    done = subprocess.run([git, *safe, *words], cwd=folder, env=environment, capture_output=True, check=False)
    return os.fsdecode(done.stdout) if done.returncode == 0 else empty


def _licence(folder: Path) -> str:
    """The licence that pyproject.toml or a licence file of `folder` names."""
    try:
        with (folder / "pyproject.toml").open("rb") as file:
            said = tomllib.load(file).get("project", {}).get("license")
        said = said.get("text", "") if isinstance(said, dict) else said
        if isinstance(said, str) and said.strip() and "\n" not in said.strip():
            return said.strip()
    except (OSError, ValueError, AttributeError):
        pass
    for name in sorted(folder.glob("[LlCc][IiOo][CcPp][EeYy]*")):
        if name.is_file() and re.match(r"(licen[cs]e|copying)", name.name, re.I):
            found = _recognised(name.read_bytes()[:100_000].decode("utf-8", "replace"))
            if found != UNKNOWN:
                return found
    return UNKNOWN


def _recognised(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text)
    return next((name for name, says in LICENCES.items() if re.search(says, text, re.I)), UNKNOWN)


@dataclass
class Walk:
    """The .py files of `sources`, in order of name. `tests`: those that hold tests, too. `parse`: with their
    syntax trees. Iterating reads them anew, one at a time.
    """

    sources: list[Source]
    tests: bool = False
    parse: bool = True

    def __iter__(self) -> Iterator[PythonFile]:
        """Each file, and each file or folder that is left out."""
        for source in self.sources:
            if source.root.is_file():
                yield self._file(source, source.root, source.root.name)
            else:
                yield from self._inside(source, source.root, "")

    def sha256(self) -> dict[str, str]:
        """A hash of the names and bytes of all files of each source; RecipeError for one without any."""
        hashes: dict[str, str] = {}
        for source in self.sources:
            digest, any_file = hashlib.sha256(), False
            for file in Walk([source], self.tests, parse=False):
                any_file = any_file or bool(file.digest)
                digest.update(f"{file.path}\0{file.digest}\0{file.reason}\n".encode("utf-8", "replace"))
            if not any_file:
                raise RecipeError(Problem(shown(source.root), "has no Python file", "name another folder"))
            hashes[shown(source.root)] = digest.hexdigest()
        return hashes

    def _inside(self, source: Source, folder: Path, path: str) -> Iterator[PythonFile]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield PythonFile(source, path, reason="cannot be read", found=str(error.strerror))
            return
        for entry in entries:
            name = os.fsencode(entry.name).decode("utf-8", "replace")  # it may be any bytes
            inner = f"{path}/{name}".lstrip("/")
            is_python = name.endswith(".py")
            if entry.is_symlink():
                # A link to a file that is here too would be read twice; one to a folder may be a loop.
                if is_python or _is_dir(entry):
                    found = f"-> {Path(entry.path).readlink()}"
                    yield PythonFile(source, inner, reason="a symbolic link, not followed", found=found)
            elif entry.is_dir():
                if reason := self._left_out(source, entry, inner):
                    yield PythonFile(source, f"{inner}/", reason=reason)
                elif name not in OTHERS and not name.startswith("."):
                    yield from self._inside(source, Path(entry.path), inner)
            elif is_python:
                yield self._file(source, Path(entry.path), inner)

    def _left_out(self, source: Source, entry: os.DirEntry[str], inner: str) -> str:
        if (Path(entry.path) / "pyvenv.cfg").is_file():
            return "a virtual environment"
        if inner in source.ignored:
            return "ignored by git"
        return "tests" if not self.tests and TEST.search(entry.name) else ""

    def _file(self, source: Source, file: Path, path: str) -> PythonFile:
        if path in source.ignored:
            return PythonFile(source, path, reason="ignored by git")
        if not self.tests and TEST.search(file.stem):
            return PythonFile(source, path, reason="tests")
        raw, reason, found = _bytes(file)
        digest = "" if reason else hashlib.sha256(raw).hexdigest()
        text, reason, found = ("", reason, found) if reason else decoded(raw)
        if not reason and (found := generated(file.stem, text)):
            reason = "generated"
        tree, error = parsed(text) if self.parse and not reason else (None, "")
        if error:
            reason, found = "a syntax error", error
        return PythonFile(source, path, "" if reason else text, tree, reason, found, digest)


def _bytes(file: Path) -> tuple[bytes, str, str]:
    """What a file holds; or a reason and what was found."""
    if not file.is_file():
        return b"", "no file: a pipe, a socket or a device", ""
    try:
        if (size := file.stat().st_size) > LARGEST:
            return b"", f"larger than {LARGEST // 2**20} MiB", f"{size:,} bytes"
        return file.read_bytes(), "", ""
    except OSError as error:
        return b"", "cannot be read", str(error.strerror)


def parsed(text: str) -> tuple[ast.Module | None, str]:
    """The syntax tree of Python code; or None and why there is none."""
    try:
        with warnings.catch_warnings():  # of "\\d" in a text, and the like
            warnings.simplefilter("ignore")
            return ast.parse(text), ""
    except SyntaxError as error:
        return None, f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError, MemoryError) as error:
        return None, str(error) or "nested too deep"


def in_text(text: str) -> Iterator[tuple[int, str]]:
    """The Python code in a reply, each stretch with the character where it begins: what stands in fences;
    without any the whole reply, where it is code.
    """
    fences = list(FENCE.finditer(text))
    for fence in fences:
        language, inside = fence[1].lower(), fence[2]
        if language in LANGUAGES or (not language and _is_code(inside)):
            yield fence.start(2), inside
    if not fences and _is_code(text):
        yield 0, text


def _is_code(text: str) -> bool:
    """Does it parse, further left where it is the body of something, into more than values? `Yes` and
    `"a", 1` may be words as well.
    """
    tree, _ = parsed(textwrap.dedent(text))
    return tree is not None and any(not isinstance(node, ast.Expr) for node in tree.body)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return True


def decoded(raw: bytes) -> tuple[str, str, str]:
    """The text of a Python file, in the encoding that it names (PEP 263), its line ends as LF; or a reason
    and what was found.
    """
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "", "another encoding", "UTF-16"
    if b"\0" in raw:
        return "", "a binary file", f"a zero byte at {raw.index(0):,}"
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return "", "another encoding", f"line {line}: byte {raw[error.start]:#x} is no {error.encoding}"
    except (SyntaxError, LookupError) as error:
        return "", "another encoding", str(error)
    return text.replace("\r\n", "\n").replace("\r", "\n"), "", ""


def generated(stem: str, text: str) -> str:
    """What says that a file was written by a program; empty where nothing does."""
    if BUILT.search(stem):
        return f"named {stem}.py"
    for line in text.split("\n", HEAD)[:HEAD]:
        if SAYS_SO.search(line) or BY.search(line):
            return line.strip()
    return ""
