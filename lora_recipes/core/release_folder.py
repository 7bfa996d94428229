"""A release as it lies on the disk, outputs/_releases/<tag>/: what is published, manifest.json, and the
hashes of its rows; and which one is deployed. Imports no torch.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from lora_recipes.core import record
from lora_recipes.core.errors import Exit, Problem, RecipeError, raise_if
from lora_recipes.core.files import sha256, write
from lora_recipes.core.record import Deployed, Manifest
from lora_recipes.core.yamlfile import shown

FOLDER, MANIFEST, ROWS, DEPLOYED = "_releases", "manifest.json", "rows.blake2b", "deployed.json"
DIGEST = 16  # bytes of a row's hash in ROWS (data/read.py, content)


def place(outputs: Path, tag: str) -> Path:
    """The folder of the release `tag`."""
    return outputs / FOLDER / tag


def read(folder: Path) -> Manifest | None:
    """The manifest of the release in `folder`; None where it holds none. RecipeError where a file is not as
    it was released.
    """
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            Problem(shown(file), f"cannot be read: {error}", "copy the release again")
        ) from None
    found, do, problems = record.manifest(text, shown(file)), "copy the release again; or release anew", []
    for name, hashed in found.files.items():
        if not (folder / name).is_file():
            problems.append(Problem(shown(folder / name), "was released and is missing", do))
        elif sha256(folder / name) != hashed:
            problems.append(Problem(shown(folder / name), "was changed since the release", do))
    if problems:
        raise RecipeError(problems, Exit.CHANGED)
    return found


def rows(folder: Path, manifest: Manifest) -> set[bytes]:
    """The hash of each row that the release was trained on. RecipeError where the list is not that of the
    `manifest`: it is not published with the rest.
    """
    file = folder / ROWS
    if not file.is_file() or sha256(file) != manifest.data.rows_sha256:
        do = "take the folder where the release was made: which rows are new cannot be said without it"
        raise RecipeError(Problem(shown(file), "is not the list of rows of this release", do))
    content = file.read_bytes()
    return {content[i : i + DIGEST] for i in range(0, len(content), DIGEST)}


def write_rows(folder: Path, digests: Iterable[bytes]) -> str:
    """Write the list; returns its SHA-256."""
    (folder / ROWS).write_bytes(b"".join(sorted(set(digests))))
    return sha256(folder / ROWS)


def deploy(run: Path, manifest: Manifest, folder: Path, by: str, at: str) -> None:
    """Point outputs/<recipe>/deployed.json at the release in `folder`, in one move."""
    there = Deployed(
        tag=manifest.tag, folder=str(folder.absolute()), adapter_sha256=manifest.adapter_sha256, by=by, at=at
    )
    write(run / DEPLOYED, json.dumps(record.plain(there), indent=2, ensure_ascii=False) + "\n")


def deployed(run: Path) -> tuple[Path, Manifest] | None:
    """The folder of the release that is deployed of the recipe whose run folder is `run`, and its manifest;
    None where none is. RecipeError where it is not there as it was.
    """
    file = run / DEPLOYED
    if not file.is_file():
        return None
    do = "put back what it names, or release anew"
    try:
        there = Deployed(**json.loads(file.read_text(encoding="utf-8")))
        folder = Path(there.folder)
        found = read(folder)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(Problem(shown(file), f"cannot be read: {error}", do)) from None
    wrong = None
    if found is None:
        wrong = f"names {folder}, where no release is"
    elif found.adapter_sha256 != there.adapter_sha256:
        wrong = f"names another adapter than that in {folder}"
    raise_if([Problem(shown(file), wrong, do)] if wrong else [])
    assert found
    return folder, found
