"""One process at a time writes to a run folder: a lock of the system's (flock), which ends with its holder,
however that ends. Imports no torch.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import now
from lora_recipes.core.yamlfile import shown

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of a network's file system, say
_open: set[int] = set()  # file descriptors that this process holds


def file(folder: Path) -> Path:
    """The lock of `folder` stands beside it, so that neither clearing nor removing the folder frees it."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def held(folder: Path, doing: str, wait: bool = False) -> Iterator[None]:
    """Nobody else writes to `folder` meanwhile. RecipeError names who does; with `wait` it waits for them.

    The lock ends with its process, also on kill -9: a file that is left behind holds nobody up. Where a file
    system keeps no locks, or cannot be written to, it says so and goes on without.
    """
    with _taken(file(folder), folder, doing, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
        yield


@contextlib.contextmanager
def served(results: Iterable[Path]) -> Iterator[None]:
    """Servers read `results` (adapters, merged models), any number of them: `unserved` tells who would
    replace one meanwhile.
    """
    with contextlib.ExitStack() as stack:
        for result in sorted({p.resolve() for p in results}):
            stack.enter_context(_taken(_served(result), result, "serves it", fcntl.LOCK_SH))
        yield


def unserved(folder: Path) -> None:
    """RecipeError when a server reads a result that is to be replaced: `folder` itself, or what lies in the
    run `folder`.

    vLLM reads an adapter anew when it has put it aside for others, so its answers would change in silence
    (vllm/lora/worker_manager.py, add_adapter).
    """
    folder = folder.resolve()
    within = folder.parent.glob(f".{folder.name}.*.served.lock")
    for path in filter(Path.is_file, [_served(folder), *within]):
        with _taken(path, folder, "replaces it", fcntl.LOCK_EX | fcntl.LOCK_NB):
            pass


def _served(result: Path) -> Path:
    if run := next(iter(_runs(result)), None):
        return run.with_name(f".{run.name}.{result.name}.served.lock")
    return file(result).with_suffix(".served.lock")


@contextlib.contextmanager
def _taken(path: Path, folder: Path, doing: str, how: int) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        print(f"NOTE        {shown(folder)} is not locked: {error.strerror}", file=sys.stderr)
        yield
        return
    _open.add(mine)
    try:
        _lock(mine, path, folder, how)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "doing": doing}
            if how & fcntl.LOCK_EX:
                os.ftruncate(mine, 0)
            os.write(mine, json.dumps(holder).encode() + b"\n")
        yield
        if how & fcntl.LOCK_EX:  # lines of those that shared it stay until somebody has it alone
            with contextlib.suppress(OSError):
                os.ftruncate(mine, 0)
    finally:
        _open.discard(mine)
        os.close(mine)


def _lock(mine: int, path: Path, folder: Path, how: int) -> None:
    try:
        fcntl.flock(mine, how)
    except BlockingIOError:
        raise RecipeError(Problem(shown(folder), *_by(path))) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        said = "this file system keeps no locks, so nobody is told when two runs write here"
        print(f"WARNING     {shown(folder)} is not locked: {said}", file=sys.stderr)


@contextlib.contextmanager
def runs(results: Iterable[Path], doing: str, *more: Path) -> Iterator[None]:
    """Nobody else writes to the runs that left `results` (adapters, models, checkpoints), nor to the folders
    `more`. A result that lies in no run folder is not locked.
    """
    within = [run for result in results for run in _runs(result)]
    with contextlib.ExitStack() as stack:
        for folder in sorted({p.resolve() for p in (*within, *more)}):
            stack.enter_context(held(folder, doing))
        yield


def place(output: Path) -> Path:
    """What to lock while `output` is made: the run that it lies in, else itself."""
    return next(iter(_runs(output)), output)


def _runs(result: Path) -> list[Path]:
    return [p for p in result.absolute().parents[:2] if (p / "run.json").is_file()]


def free(folder: Path) -> bool:
    """Does nobody write to `folder` now?"""
    try:
        with held(folder, "looks"):
            return True
    except RecipeError:
        return False


def _by(path: Path) -> tuple[str, str]:
    """Who holds the lock, and what to do."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
            holders = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            holder = next(h for h in reversed(holders) if _lives(h))
            doing = f"which {holder['doing']} since {holder['since']}"
            here = holder["host"] == socket.gethostname()
            stop = f"stop it (kill {holder['pid']})" if here else f"stop it on {holder['host']}"
            return (
                f"is in use by process {holder['pid']} on {holder['host']}, {doing}",
                f"wait for it, or {stop}; another {cli.command(OUTPUTS='dir')} is free",
            )
        time.sleep(0.05)  # it has not written its name yet
    return "is in use by another process", f"wait for it; another {cli.command(OUTPUTS='dir')} is free"


def _lives(holder: dict[str, Any]) -> bool:
    """Of those that share a lock one may have ended; on another host that cannot be seen."""
    return bool(holder["host"] != socket.gethostname() or psutil.pid_exists(holder["pid"]))


def _forget() -> None:
    """In a forked child: the lock is its parent's, and must not outlive it."""
    for mine in _open:
        with contextlib.suppress(OSError):
            os.close(mine)
    _open.clear()


os.register_at_fork(after_in_child=_forget)
