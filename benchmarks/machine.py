"""What stands beside every figure: the machine, its load, the versions."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def processor() -> str:
    """Its name, as /proc/cpuinfo has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]
