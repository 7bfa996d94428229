"""`lora-recipes VERB ...` in a process of its own, forked from this one: it has torch and the libraries
already, which a new interpreter takes seconds to import. It is killed and waited for like any other.

A test of the interpreter itself (what is imported when, a launcher, a terminal) starts one with subprocess.
"""

import io
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.state import AcceleratorState

from lora_recipes.__main__ import main

FORK = multiprocessing.get_context("fork")


class Forked:
    """main(words), begun; its standard output and standard error go to files of these names in `folder`."""

    def __init__(self, words: tuple[str, ...], folder: Path, **environment: str):
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        if words[0] == "ablate":  # which takes the server of this process: the libraries are imported once
            forkserver.ensure_running()
        self.process = FORK.Process(target=_main, args=(words, self.stdout, self.stderr, environment))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = 1800) -> int:
        """Waits for the end; returns the exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"no end within {timeout:g} s; it said {self.stderr.read_text()}")
        return self.process.exitcode

    def completed(self, timeout: float = 1800) -> CompletedProcess:
        """Waits for the end; returns what subprocess.run would."""
        code = self.wait(timeout)
        return CompletedProcess([], code, self.stdout.read_text(), self.stderr.read_text())


def run(*words: str, timeout: float = 1800) -> CompletedProcess:
    """As subprocess.run with its output captured."""
    with TemporaryDirectory() as folder:
        return Forked(words, Path(folder)).completed(timeout)


def together(count: int, *words: str, timeout: float = 1800) -> list[CompletedProcess]:
    """The same in `count` processes of one group, with the variables that torchrun gives each of them. As
    there, the others are ended where one ends badly.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with TemporaryDirectory() as folder:
        begun = []
        for rank in range(count):
            (own := Path(folder) / str(rank)).mkdir()
            begun.append(Forked(words, own, RANK=str(rank), LOCAL_RANK=str(rank), **group))
        running, end = begun, time.monotonic() + timeout
        while running and time.monotonic() < end:
            wait([process.process.sentinel for process in running], timeout)
            running = [process for process in running if process.poll() is None]
            for process in running if any(process.poll() for process in begun) else ():
                process.process.terminate()
        return [process.completed(0) for process in begun]


def _main(words: tuple[str, ...], stdout: Path, stderr: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # what a run before, in the process that was forked, found of itself
    server: Any = forkserver._forkserver
    if server._forkserver_pid:  # it is no child of this process, which must not wait for its end
        server.ensure_running = lambda: None
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(n, "w", closefd=False), line_buffering=True) for n in (1, 2)
    )
    sys.exit(main(words))
