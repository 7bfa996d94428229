"""What the tests share: recipes written to a temporary folder, and one trained base for the whole session."""

import os
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: on models this small a second thread
# only waits for the first, and on a busy machine it waits long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import yaml

from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a recipe made of a shipped one with `section.key` changes; returns its path. A value of ...
    removes the key.
    """

    def write(base: str, name: str | None = None, **changes) -> Path:
        sections = yaml.safe_load(recipes.load(base).to_yaml())
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if not field:
                sections[section] = value
            elif value is ...:
                sections[section].pop(field, None)
            else:
                sections.setdefault(section, {})[field] = value
        path = tmp_path / f"{name or base}.yaml"
        path.write_text(
            yaml.safe_dump({k: v for k, v in sections.items() if v is not ...}, allow_unicode=True)
        )
        return path

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An outputs folder in which the embedded default has been trained: tiny_base, and tiny_facts on it."""
    from lora_recipes.training.train import train

    outputs = tmp_path_factory.mktemp("outputs")
    train(resolve(recipes.load("tiny_facts"), outputs))
    return outputs


SLOW = [
    "test_serve",
    "test_ablate",
    "test_methods",
    "test_launch",
    "test_memory",
    "test_train",
    "test_combine",
]


def pytest_collection_modifyitems(items):
    """The slow files first: of two processes none should be left with all of them at the end."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))
