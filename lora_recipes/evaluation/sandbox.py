"""Runs generated code so that it sees and changes nothing of this machine, and judges it from outside: by a
test in another process, which alone can say that it passed (jail.py).

How is tried out, strongest first: bubblewrap, namespaces of the kernel, Landlock. What holds is asked by code
that attempts to get out (escapes.py). Linux on x86_64 and aarch64; without a sandbox nothing is run unless
told.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError

Level = Literal["bubblewrap", "namespaces", "landlock", "none"]
LEVELS: tuple[Level, ...] = ("bubblewrap", "namespaces", "landlock")
JAIL, ESCAPES = Path(__file__).with_name("jail.py"), Path(__file__).with_name("escapes.py")
PYTHON = getattr(sys, "_base_executable", sys.executable)  # a venv's own would need the venv
START = 60.0  # seconds in which a sandbox must be up; 0.1 on an idle machine
VERDICT = 2**16  # bytes of a verdict that are read
SYSTEM = (
    "/usr/lib",
    "/lib",
    "/usr/lib64",
    "/lib64",
    "/usr/share/zoneinfo",
)  # libraries, none of a user's files


@dataclass(frozen=True)
class Limits:
    """Of each of the two processes: seconds of processor time (a busy machine takes none of it), seconds by
    the clock (asleep too), and bytes of memory.
    """

    seconds: int = 5
    clock: float = 60
    memory: int = 2**30


@dataclass(frozen=True)
class Verdict:
    """What came of a sample: `verdict`, and what was `said` in its or the test's own words.

    passed; failed: an assertion; error: an exception of the sample or of the test; not_loaded: of the sample
    before it was called; ended: its process ended, or spoke past the test; time; memory.
    """

    verdict: Literal["passed", "failed", "error", "not_loaded", "ended", "time", "memory"]
    said: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Did it pass?"""
        return self.verdict == "passed"


class Unusable(Exception):
    """This level cannot be had here, and why."""


@dataclass(frozen=True)
class Sandbox:
    """A way to run code: each sample in two processes of its own, which end with it."""

    level: Level
    limits: Limits = Limits()

    def judge(self, code: str, entry_point: str, test: str, prompt: str = "") -> Verdict:
        """Does `code`, whose function or class `entry_point` is called, pass `test`?

        The test's `check(candidate)` is called, or it asserts at its top level. `prompt`: Python text that
        the test's names come from (helpers, imports); it is run beside the test. Unusable where a process
        does not come up.
        """
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            to_sample, to_checker = (stack.enter_context(_pipe()) for _ in range(2))
            sample = stack.enter_context(self._part("sample", to_sample.read, to_checker.write))
            checker = stack.enter_context(self._part("checker", to_checker.read, to_sample.write))
            for process in (sample, checker):
                _locked(process)
            # The checker has its task before the sample, which writes into the same pipe, has its code.
            to_checker.send({"prompt": prompt, "test": test, "entry_point": entry_point})
            to_sample.send({"code": code, "entry_point": entry_point})
            to_checker.close()
            to_sample.close()
            line = _line(checker, self.limits.clock)
            seconds = round(time.monotonic() - begun, 3)
            return self._verdict(line, sample, checker, seconds)

    def _verdict(
        self,
        line: bytes | None,
        sample: subprocess.Popen[bytes],
        checker: subprocess.Popen[bytes],
        seconds: float,
    ) -> Verdict:
        if line is None:
            return Verdict("time", f"no end within {self.limits.clock:g} s", seconds)
        said: dict[str, Any] = (
            json.loads(line) if line else {"verdict": "ended", "said": "the process of the test has ended"}
        )
        if said["verdict"] == "ended" and seconds >= self.limits.seconds:
            ended = sample if line else checker
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended.wait(1)
            if ended.returncode in (128 + signal.SIGKILL, -signal.SIGKILL):
                used = f"{self.limits.seconds} s of processor time are used up"
                return Verdict("time", f"{used}, by the {'sample' if line else 'test'}", seconds)
        if said["said"].startswith("MemoryError"):
            return Verdict("memory", f"more than {self.limits.memory >> 20} MiB", seconds)
        return Verdict(said["verdict"], said["said"], seconds)

    @contextlib.contextmanager
    def _part(self, part: str, read: int, write: int) -> Iterator[subprocess.Popen[bytes]]:
        """A process of the sandbox; it and all that it started are ended with the context."""
        given = {
            "part": part,
            "level": self.level,
            "readable": self._readable,
            "seconds": self.limits.seconds,
            "memory": self.limits.memory,
        }
        process = subprocess.Popen(
            [*self._outer, PYTHON, "-I", "-S", "-B", str(JAIL), json.dumps(given)],
            stdin=read,
            stdout=write,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()  # the rest of the sandbox dies with it: PR_SET_PDEATHSIG, --die-with-parent
            process.wait()
            assert process.stderr
            process.stderr.close()

    @cached_property
    def _readable(self) -> list[str]:
        """The folders that code needs to import the standard library."""
        own = str(Path(sysconfig.get_path("stdlib")).parent)
        there = [*SYSTEM, *([] if own.startswith(SYSTEM) else [own])]
        return [path for path in there if Path(path).is_dir()]

    @cached_property
    def _outer(self) -> list[str]:
        """The command that Python is started by."""
        if self.level != "bubblewrap":
            return []
        if not (bwrap := shutil.which("bwrap")):
            raise Unusable("there is no bwrap")
        words = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
        words += ["--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--dir", "/tmp"]
        words += ["--cap-add", "CAP_SYS_ADMIN"]  # for jail.py to mount /tmp; it is dropped then
        for path in self._readable:
            link = Path(path).is_symlink()
            words += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]  # noqa: PTH115
        for file in dict.fromkeys([PYTHON, os.path.realpath(PYTHON), str(JAIL)]):
            words += ["--ro-bind", file, file]
        for device in ("/dev/null", "/dev/urandom"):
            words += ["--dev-bind", device, device]
        return [*words, "--remount-ro", "/", "--chdir", "/"]


@dataclass
class _Pipe:
    """A pipe; None: that end is closed here."""

    read: int
    write: int

    def send(self, frame: dict[str, Any]) -> None:
        """Write a frame. Where nobody reads it, the verdict tells."""
        line = json.dumps(frame).encode()
        left = memoryview(struct.pack("=I", len(line)) + line)
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[os.write(self.write, left) :]

    def close(self) -> None:
        """Leave it to the processes that have it."""
        for end in (self.read, self.write):
            with contextlib.suppress(OSError):
                os.close(end)
        self.read = self.write = -1


@contextlib.contextmanager
def _pipe() -> Iterator[_Pipe]:
    pipe = _Pipe(*os.pipe())
    try:
        yield pipe
    finally:
        pipe.close()


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line that it writes to standard error; empty at its end, None when time is up."""
    assert process.stderr
    until, number, line = time.monotonic() + seconds, process.stderr.fileno(), b""
    while not line.endswith(b"\n") and len(line) < VERDICT:
        left = until - time.monotonic()
        if left <= 0 or not select.select([number], [], [], left)[0]:
            return None
        if not (more := os.read(number, 1 if not line else VERDICT)):
            return b""
        line += more
    return line


def _locked(process: subprocess.Popen[bytes]) -> None:
    """Wait until it is locked in. Unusable where that is refused."""
    line = _line(process, START)
    try:
        said = json.loads(line or b"")
    except ValueError:
        if line is None:
            raise Unusable(f"not up within {START:g} s") from None
        assert process.stderr
        process.kill()
        words = (line + process.stderr.read(VERDICT)).decode(errors="replace").split("\n")
        raise Unusable(next((w for w in reversed(words) if w.strip()), "it ended at once")) from None
    if "refused" in said:
        raise Unusable(said["refused"])


def find(limits: Limits | None = None, unsafe: bool = False, levels: tuple[Level, ...] = LEVELS) -> Sandbox:
    """The strongest sandbox of `levels` that holds here. Without one a RecipeError; `unsafe`: one that locks
    nothing in, with limits of time and memory alone.
    """
    limits = limits or Limits()
    reasons = []
    for level in levels:
        sandbox = Sandbox(level, limits)
        if not (why := leaks(sandbox)):
            return sandbox
        reasons.append(f"{level}: {why}")
    if unsafe:
        return Sandbox("none", limits)
    do = f"in a container or a machine of its own, say so: {cli.command(CONFIRM_RUN_UNSAFE_CODE=True)}"
    raise RecipeError(Problem("sandbox", f"none holds on this machine ({'; '.join(reasons)})", do))


def leaks(sandbox: Sandbox) -> str:
    """Why the sandbox does not hold; empty where it does. Asked by code that attempts to get out."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    home = Path.home()
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        secret = Path(folder) / "secret"
        secret.write_text("untouched", encoding="utf-8")
        secret.chmod(0o666)
        asked = {
            "secret": str(secret),
            "home": str(home),
            "names": [p.name for p in home.iterdir() if p not in Path(PYTHON).parents]
            if home.is_dir()
            else [],
            "pid": os.getpid(),
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "memory": sandbox.limits.memory,
        }
        test = (
            f"found = escapes(**{asked!r})\nassert not found, ', '.join(found)\nassert works() == 'e3b0c442'"
        )
        try:
            found = sandbox.judge(ESCAPES.read_text(encoding="utf-8"), "escapes", test)
        except (Unusable, OSError) as error:
            return str(error)
        for name, outside in {"TCP": tcp, "UDP": udp}.items():
            if select.select([outside], [], [], 0)[0]:
                return f"what it sent by {name} arrived"
        if (secret.read_text(encoding="utf-8"), secret.stat().st_mode & 0o777) != ("untouched", 0o666):
            return "it changed a file outside"
    return "" if found.passed else f"{found.verdict}: {found.said}"
