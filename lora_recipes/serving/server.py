"""A vLLM server as a child process: started, waited for, and ended with all its own children. Imports no
torch.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import psutil

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.yamlfile import shown
from lora_recipes.serving.command import Options, Server
from lora_recipes.serving.endpoint import Endpoint

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START = 900.0  # seconds that a server may take to come up
_ERROR = re.compile(r"(?:^|\s)((?:[\w.]+(?:Error|Exception)|error): .+)")
_ECHO = (
    "Engine core initialization failed",
    "See root cause above",
    "See stack trace (above)",
)  # what the parent says after the child has said why


@contextlib.contextmanager
def running(server: Server, options: Options, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start `server` and wait until it answers; at the end, however it comes, its whole process tree is
    ended.

    What vLLM prints goes to `log`. RecipeError when the port is taken, or with vLLM's own last error line
    when it dies at start.
    """
    _port_is_free(options)
    log.parent.mkdir(parents=True, exist_ok=True)
    previous = {sign: signal.signal(sign, _interrupt) for sign in ENDING}
    child = None
    try:
        with log.open("wb") as output:
            # From another folder and in a session of its own: Ctrl-C reaches this program, which then ends
            # all of it.
            child = subprocess.Popen(
                server.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
                env=os.environ | server.environment,
                start_new_session=True,
            )
        _wait(child, Endpoint(options.url), log)
        yield child
    finally:
        for sign in ENDING:  # a second signal must not leave half of it running
            signal.signal(sign, signal.SIG_IGN)
        if child:
            stop(child.pid)
            child.wait()
        for sign, handler in previous.items():
            signal.signal(sign, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _port_is_free(options: Options) -> None:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            do = f"{cli.command(PORT='another')}; or stop what listens there"
            raise RecipeError(
                Problem(f"{options.host}:{options.port}", f"cannot be listened on: {error}", do)
            ) from None


def _wait(child: subprocess.Popen[bytes], endpoint: Endpoint, log: Path) -> None:
    until = time.monotonic() + START
    while not endpoint.healthy():
        if child.poll() is not None:
            raise RecipeError(
                Problem(
                    "vLLM",
                    f"ended at start (exit {child.returncode}): {last_error(log)}",
                    f"all of it: {shown(log)}",
                )
            )
        if time.monotonic() > until:
            raise RecipeError(
                Problem("vLLM", f"does not answer after {START:.0f} s", f"what it said: {shown(log)}")
            )
        time.sleep(0.1)


def last_error(log: Path) -> str:
    """The last error that vLLM names in `log`, without the lines that only say that there was one; else its
    last line.

    pydantic says on the next line, indented, what was wrong.
    """
    lines = [
        line.rstrip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = []
    for line, following in zip_longest(lines, lines[1:], fillvalue=""):
        if (match := _ERROR.search(line)) and not any(echo in line for echo in _ECHO):
            errors.append(
                match.group(1) + (f": {following.strip()}" if "validation error for" in line else "")
            )
    return (errors or [line.strip() for line in lines] or ["it said nothing"])[-1]


def stop(pid: int) -> None:
    """End the process and everything it has started: asked first, killed after ten seconds. Those it left
    behind share its session.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(family, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
