"""What a sandbox must refuse, tried from inside: given to it as a sample before any other (sandbox.py).

Imports the standard library alone.
"""

import os
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def escapes(secret: str, home: str, names: list[str], pid: int, tcp: int, udp: int, memory: int) -> list[str]:
    """What could be done all the same. `secret`: a file outside; `names`: some that `home` holds; `pid`: of a
    process outside, which listens on the ports `tcp` and `udp`; `memory`: the most bytes that may be held.
    """
    own = os.getpriority(os.PRIO_PROCESS, 0)  # the other's too: set where it may be, it changes nothing
    tries: dict[str, Callable[[], Any]] = {
        "reads files": lambda: Path(secret).read_bytes(),
        "writes files": lambda: Path(secret).write_text("written"),
        "cuts files": lambda: os.truncate(secret, 0),
        "changes modes": lambda: Path(secret).chmod(0o777),
        "changes times": lambda: os.utime(secret),
        "lists the home folder": lambda: one_of(set(os.listdir(home)) & set(names)),  # noqa: PTH208
        "reads the environment": lambda: one_of(set(os.environ) - {"LC_CTYPE"}),
        "reads other processes": lambda: Path(f"/proc/{pid}/environ").read_bytes(),
        "lists other processes": lambda: one_of(set(os.listdir("/proc")) & {str(pid)}),  # noqa: PTH208
        "sends signals": lambda: os.kill(pid, 0),
        "sets limits of other processes": lambda: resource.prlimit(pid, resource.RLIMIT_CORE),
        "slows other processes": lambda: os.setpriority(os.PRIO_PROCESS, pid, own),
        "connects by TCP": lambda: socket.create_connection(("127.0.0.1", tcp), 5),
        "sends by UDP": lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b".", ("127.0.0.1", udp)),
        "starts processes": lambda: os.fork() or os._exit(0),
        "runs programs": lambda: os.execv("/bin/true", ["true"]),
        "takes more memory": lambda: bytearray(memory),
        "fills the disk": lambda: [Path(f"x{n}").write_bytes(bytes(2**20)) for n in range(64)],
        "makes many files": lambda: [Path(f"y{n}").write_bytes(b"") for n in range(1000)],
    }
    found = []
    for name, attempt in tries.items():
        with suppress(Exception):
            attempt()
            found.append(name)
    return found


def one_of(names: set[str]) -> str:
    """Any of them. KeyError where there is none."""
    return names.pop()


def works() -> str:
    """What a sample may do, and a sandbox must not take from it."""
    import hashlib
    import random

    thread = threading.Thread(target=random.random)
    thread.start()
    thread.join()
    return hashlib.sha256(b"").hexdigest()[:8]
