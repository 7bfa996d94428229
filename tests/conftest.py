"""What the tests share: recipes written to a temporary folder, and one trained base for the whole session."""

import atexit
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: on models this small a second thread
# only waits for the first, and on a busy machine it waits long.
os.environ["OMP_NUM_THREADS"] = "1"
# Checked rows are kept while the tests run, for all their processes, and not where a person's are.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lora_recipes_rows.")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import yaml

from lora_recipes.core import files
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve

CASES = Path(__file__).parent / "cases"


@functools.cache
def shipped(name: str) -> str:
    """That recipe, as YAML."""
    return recipes.load(name).to_yaml()


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a recipe made of a shipped one with `section.key` changes; returns its path. A value of ...
    removes the key.
    """

    def write(base: str, name: str | None = None, **changes) -> Path:
        sections = yaml.load(shipped(base), yaml.CSafeLoader)
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if not field:
                sections[section] = value
            elif value is ...:
                sections[section].pop(field, None)
            else:
                sections.setdefault(section, {})[field] = value
        path = tmp_path / f"{name or base}.yaml"
        kept = {k: v for k, v in sections.items() if v is not ...}
        path.write_text(yaml.dump(kept, Dumper=yaml.CSafeDumper, allow_unicode=True))
        return path

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An outputs folder in which the embedded default has been trained: tiny_base, and tiny_facts on it."""
    from lora_recipes.training.train import train

    outputs = tmp_path_factory.mktemp("outputs")
    train(resolve(recipes.load("tiny_facts"), outputs))
    return outputs


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for what is made once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2(shared):
    """A real language model, from its package, and short runs on it: tests/cases/real.py."""
    from tests.cases import real

    return real.make(shared / "real")


@pytest.fixture(scope="session")
def vllm_forks(shared):
    """A folder as .venv-serve is, whose Python is forked from one that has imported vLLM already, and ends
    with the test run: tests/cases/vllm_forks.py.
    """
    from lora_recipes.core import lock
    from lora_recipes.serving import command

    folder, at = shared / "vllm", str(shared / "vllm" / "socket")
    with lock.held(folder, "imports vLLM for the tests", wait=True):
        if not Path(at).exists():
            (folder / "bin").mkdir(parents=True)
            (folder / "lib").symlink_to(command.ENVIRONMENT / "lib")
            (python := folder / "bin" / "python").write_text(
                f'#!/bin/sh\nexec {sys.executable} -IS {CASES / "vllm_python.py"} {at} "$@"\n'
            )
            python.chmod(0o755)
            environment = os.environ | {"PYTHONPATH": str(files.ROOT / "scripts" / "vllm_cpu")}
            environment |= {"HF_HUB_OFFLINE": "1"}
            run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            begun = [str(command.python()), str(CASES / "vllm_forks.py"), at, str(run)]
            with (folder / "log").open("wb") as log:
                done = subprocess.run(begun, stdin=-3, stdout=log, stderr=log, env=environment, check=False)
            assert not done.returncode, (folder / "log").read_text()
    return folder


@pytest.fixture
def quick_vllm(vllm_forks, monkeypatch):
    """What the test starts in the serving environment, itself or in a fork, has vLLM imported already."""
    from lora_recipes.serving import command

    monkeypatch.setattr(command, "ENVIRONMENT", vllm_forks)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """`bases("llama3")` is the folder of that tiny checkpoint of tests/cases/bases.py, made once."""
    from tests.cases.bases import make

    return functools.partial(make, folder=tmp_path_factory.mktemp("bases"))


@pytest.fixture
def case(tmp_path, bases):
    """`case("qwen_base_eos", train__max_steps=2)` writes that recipe of tests/cases, with the rows beside it
    and its base made, and returns its path. A value of ... removes the key.
    """

    def write(name: str, **changes) -> Path:
        sections = yaml.load((CASES / f"{name}.yaml").read_text(), yaml.CSafeLoader)
        for key in "name_or_path", "tokenizer":
            value = sections["model"].get(key)
            if value and value.startswith("bases/"):
                sections["model"][key] = str(bases(Path(value).name))
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if value is ...:
                sections[section].pop(field, None)
            else:
                sections.setdefault(section, {})[field] = value
        for rows in CASES.glob("*.jsonl"):
            shutil.copy(rows, tmp_path)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.dump(sections, Dumper=yaml.CSafeDumper, allow_unicode=True))
        return path

    return write


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk("300k")` is a folder on a disk of its own, of that size; it goes with the test."""
    made: list[Path] = []

    def make(options: str) -> Path:
        disk = tmp_path / f"disk{len(made)}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={options}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a small disk needs the right to mount a tmpfs")
        made.append(disk)
        return disk

    yield make
    for disk in made:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # files on it may still be mapped


SLOW = [
    "test_serve",
    "test_ablate",
    "test_methods",
    "test_launch",
    "test_memory",
    "test_train",
    "test_combine",
]
LONG = ["test_serve", "test_memory", "test_merge", "test_train", "test_real", "test_families", "test_launch"]
LONG += ["test_classify", "test_table", "test_ablate", "test_recipe", "test_usage", "test_export"]


def pytest_collection_modifyitems(items):
    """The longest files first, then the other slow ones: of two processes, which take whole files, none
    should be left with one of them at the end.
    """
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    order = list(dict.fromkeys([*LONG, *SLOW]))
    items.sort(key=lambda item: order.index(item.path.stem) if item.path.stem in order else len(order))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The libraries that the tests import make half a million objects that stay: no garbage is looked for
    among them, now or later.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
