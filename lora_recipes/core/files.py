"""Where the repository is, and files that are written to a temporary name and moved into place."""

import hashlib
import shutil
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def rooted(path: str | Path) -> Path:
    """`path` as given when absolute, else taken from the repository's root, wherever the command is run."""
    return ROOT / path


def sha256(file: Path) -> str:
    """Hash of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
