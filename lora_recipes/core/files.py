"""Where things are (the repository, or what a package carries of it; the outputs), files that are written to
a temporary name and moved into place, and what it means when the disk refuses one.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.yamlfile import shown

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
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()  # of no use, and on a full disk it takes the last bytes
        raise


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder into place; what stood there goes only when it is."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.is_symlink():
        final.unlink()
    elif final.is_dir():
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if old.is_dir():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


# errno -> what it means, and what to do. The libraries write by C++ and Rust, and say the number in words.
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the quota of disk space is used up", "free some of what is yours there"),
    errno.EROFS: ("it cannot be written to: the file system is read-only", "name another folder"),
    errno.EFBIG: ("a file would be larger than is allowed here", "raise the limit (ulimit -f unlimited)"),
    errno.EACCES: ("permission denied", "change its owner or its permissions, or name another folder"),
    errno.EPERM: ("not permitted", "change its owner or its permissions, or name another folder"),
    errno.EIO: ("the disk reports an error (EIO)", "look at the disk (dmesg), and name another folder"),
}
_NAMED_ONLY = (errno.EACCES, errno.EPERM)  # without a file's name they may come from a socket or a process
# of torch.save, whose errors have no number: writing failed (reading says PytorchStreamReader)
_TORCH = re.compile(
    r"inline_container.*(unexpected pos|PytorchStreamWriter|write failed|open file failed)", re.S
)
_SCARCE = 16 * 2**20  # bytes: with less than that free, a write that failed without a reason lacked space


@contextlib.contextmanager
def writing(near: Path, doing: str = "", then: Callable[[], str] = str) -> Iterator[None]:
    """Inside, what the disk refuses becomes a RecipeError: which path (`near` where the error names none),
    why, when (`doing`, e.g. `while saving at step 3`), what to do, and what is left and goes on (`then`).
    """
    try:
        yield
    except Exception as error:
        if problem := refused(error, near, doing, then):
            raise RecipeError(problem) from error
        raise


def refused(
    error: BaseException, near: Path, doing: str = "", then: Callable[[], str] = str
) -> Problem | None:
    """What `error` means when it says that the disk takes no more, or that something may not be written;
    None for all other errors. `near`, `doing` and `then`: as `writing` has them.
    """
    if isinstance(error, RecipeError):
        return None
    code, path = _code(error)
    if code is None and _TORCH.search(str(error)):
        code = errno.ENOSPC if _free(near) < _SCARCE else _tried(near)
    if code not in _REFUSALS or (code in _NAMED_ONLY and path is None):
        return refused(error.__cause__, near, doing, then) if error.__cause__ else None
    where = path or near
    found, do = _REFUSALS[code]
    if code == errno.ENOSPC:
        # The file itself is not named: standard output, a cache, or the folder that was written to.
        where = path or next((p for p in _written(near) if _free(p) < _SCARCE), near)
        found += _left(where)
    return Problem(
        shown(where), " ".join(filter(None, [found, doing])), "; ".join(filter(None, [do, then()]))
    )


def _code(error: BaseException) -> tuple[int | None, Path | None]:
    """The errno of `error`, and the file that it names. Rust's errors (safetensors, tokenizers) say both in
    words, torch says the first.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno, Path(os.fsdecode(error.filename)) if isinstance(
            error.filename, str | bytes
        ) else None
    text = str(error)
    named = re.search(r'at path "([^"]+)"', text)
    if number := re.search(r"\(os error (\d+)\)", text):
        return int(number[1]), Path(named[1]).parent if named else None  # a temporary file's
    if _TORCH.search(text):
        return next((number for number in _REFUSALS if os.strerror(number) in text), None), None
    return None, None


def _written(near: Path) -> list[Path]:
    """Where this program and its libraries write."""
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return [near, Path(tempfile.gettempdir()), Path(cache).expanduser(), Path.cwd(), Path("/dev/stdout")]


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def free_bytes(path: Path) -> int | None:
    """Bytes that may still be written where `path` is, or will be; None where that cannot be told."""
    try:
        usage = shutil.disk_usage(existing(path))
    except OSError:
        return None
    return usage.free if usage.total else None  # a pipe has no size


def _free(path: Path) -> float:
    free = free_bytes(path)
    return float("inf") if free is None else free


def _left(path: Path) -> str:
    """How much space is left, in brackets; or that it is the number of files that is used up."""
    try:
        state = os.statvfs(existing(path))
    except OSError:
        return ""
    if state.f_files and not state.f_favail:
        return " (no more files: its inodes are used up)"
    return f" ({state.f_bavail * state.f_frsize / 2**20:.1f} MiB free)"


def _tried(folder: Path) -> int | None:
    """Why a file cannot be written in `folder`: the errno of an attempt; that of a limit if it succeeds."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            file.write(bytes(4096))
    except OSError as error:
        return error.errno
    return errno.EFBIG


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def places(beside: Path) -> list[Path]:
    """Where a relative path that stands in a file in the folder `beside` is looked for, in this order: there,
    in the working folder, in the repository.
    """
    return list(dict.fromkeys([beside.absolute(), Path.cwd(), ROOT]))


def find(path: str | Path, beside: Path) -> Path:
    """`path` as given when absolute, else in the first of `places` that has it, or files that it matches as
    a glob; if none has, in the last.
    """
    tried = [place / path for place in places(beside)]
    here = (p for p, place in zip(tried, places(beside), strict=True) if p.exists() or matches(path, place))
    return next((p.resolve() if ".." in p.parts else p for p in here), tried[-1])


def matches(path: str | Path, place: Path) -> list[Path]:
    """The files in `place` that `path` matches as a glob (`rows/*.jsonl`, `**`), in order of name; none
    where it has no wildcard.
    """
    path = Path(path)
    if not re.search(r"[*?[]", str(path)):
        return []
    if path.is_absolute():
        place, path = Path(path.anchor), path.relative_to(path.anchor)
    try:
        return sorted(file for file in place.glob(str(path)) if not file.is_dir())
    except ValueError:  # `**` beside other letters
        return []


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
    if Path(path).is_absolute() or not (file.exists() or matches(file, Path("/"))):
        return path
    file, root = file.resolve(), ROOT.resolve()
    return str(file.relative_to(root) if file.is_relative_to(root) else file)


def sha256(file: Path) -> str:
    """Hash of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def size(count: int) -> str:
    """A number of bytes as a person reads it, in powers of 1000: `12.3 MB`."""
    power = next(p for p in range(4, -1, -1) if count >= 1000**p or p == 0)
    amount, unit = count / 1000**power, ("bytes", "kB", "MB", "GB", "TB")[power]
    return f"{amount:,.{int(power > 0 and amount < 100)}f} {unit}"
