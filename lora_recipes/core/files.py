"""Where things are (the repository, or what a package carries of it; the outputs), and files that are written
to a temporary name and moved into place.
"""

import hashlib
import shutil
from datetime import UTC, datetime
from pathlib import Path

# A wheel carries configs/ and data/ inside the package; in a checkout they stand beside it.
_SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
INSTALLED = _SHIPPED.is_dir()
ROOT = _SHIPPED if INSTALLED else Path(__file__).resolve().parents[2]
HOME = Path.cwd() if INSTALLED else ROOT  # where what is made goes: a package's own folder is not written to
OUTPUTS = HOME / "outputs"


def write(path: Path, text: str) -> None:
    """Write `text` to a temporary name beside `path`, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder into place; what stood there goes only now."""
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def places(beside: Path) -> list[Path]:
    """Where a relative path that stands in a file in the folder `beside` is looked for, in this order: there,
    in the working folder, in the repository.
    """
    return list(dict.fromkeys([beside.absolute(), Path.cwd(), ROOT]))


def find(path: str | Path, beside: Path) -> Path:
    """`path` as given when absolute, else in the first of `places` that has it; if none has, in the last."""
    tried = [place / path for place in places(beside)]
    return next((p.resolve() if ".." in p.parts else p for p in tried if p.exists()), tried[-1])


def looked(path: str | Path, beside: Path) -> str:
    """The places where `find` looked for a path that is nowhere, in words; empty for an absolute path."""
    if Path(path).is_absolute():
        return ""
    return f"looked in {', '.join(str(place) for place in places(beside))}"


def anywhere(path: str, beside: Path) -> str:
    """`path`, which stands in a file in `beside`, written so that it means the same in a file elsewhere.

    In the repository: from its root, so that another checkout finds it too; else absolute. Unchanged when
    found nowhere (a hub id).
    """
    file = find(path, beside)
    if Path(path).is_absolute() or not file.exists():
        return path
    file, root = file.resolve(), ROOT.resolve()
    return str(file.relative_to(root) if file.is_relative_to(root) else file)


def sha256(file: Path) -> str:
    """Hash of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
