"""Print the lowest version of every range in pyproject.toml, as pip takes it: `make test-lowest`.

torch is left out: which build a machine needs, its owner knows.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("bitsandbytes", "curate", "gguf", "test")


def lowest(project: dict) -> list[str]:
    """Lower bounds of `[project]` and of the extras for the tests; RuntimeError where one is missing."""
    found = []
    optional = project["optional-dependencies"]
    for text in [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]:
        wanted = Requirement(text)
        bounds = [s.version for s in wanted.specifier if s.operator == ">="]
        if len(bounds) != 1:
            raise RuntimeError(f"{text}: no lower bound")
        if wanted.name != "torch":
            found.append(f"{wanted.name}=={bounds[0]}")
    return found


if __name__ == "__main__":
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    print("\n".join(lowest(tomllib.loads(file.read_text(encoding="utf-8"))["project"])))
