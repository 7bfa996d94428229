"""`vllm_forks.py SOCKET PROCESS`, run by the serving environment: has imported what a server imports, and
does what is asked at SOCKET (by tests/cases/vllm_python.py) in a fork of itself, until that process ends. It
listens in the background: what was started ends as soon as it does.

The engine of a server is in turn its fork, and has no worker beside it: imports are 15 of the 18 processor
seconds that it takes to start one. Nor are functions of its sampler compiled at the first request, 11 s.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

os.environ.update(TORCH_COMPILE_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")

import vllm.entrypoints.openai.api_server
import vllm.v1.engine.core
import vllm.v1.engine.utils as engine
import vllm.v1.worker.cpu_worker  # noqa: F401

LEAN = {name: os.environ[name] for name in ("TORCH_COMPILE_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING")}
FORK = multiprocessing.get_context("fork")


def become(asked: dict[str, Any], files: list[int]) -> None:
    """The Python that was asked for: `-m MODULE WORDS...` or `FILE WORDS...`."""
    os.setsid()
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"] | LEAN)
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    engine.get_mp_context = lambda: FORK
    sys.argv = asked["words"]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def watch(caller: socket.socket, pid: int) -> None:
    """Tell the caller the number of the process and its exit code; it ends with the caller, if not before."""
    caller.sendall(f"{pid}\n".encode())
    either: list[Any] = [caller, os.pidfd_open(pid)]
    if caller in select.select(either, [], [])[0]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        caller.sendall(f"{code}\n".encode())


def answer(caller: socket.socket) -> None:
    """In a fork: a fork more for what is asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    if pid := os.fork():
        for file in files:
            os.close(file)
        watch(caller, pid)
        os._exit(0)
    caller.close()
    become(json.loads(text), files)


def main() -> bool:
    """Is it a fork that has done what was asked?"""
    gc.freeze()  # what was imported stays, and vLLM looks for garbage often: half a second each time
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        if os.fork():
            return False
        either: list[Any] = [listener, os.pidfd_open(int(sys.argv[2]))]
        while select.select(either, [], [])[0] == [listener]:
            caller, _ = listener.accept()
            if not os.fork():
                listener.close()
                answer(caller)
                return True
            caller.close()
    return False


if __name__ == "__main__" and not main():
    os._exit(0)
