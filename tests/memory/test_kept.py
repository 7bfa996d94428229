"""A rehearsed step is taken from where it is kept when all that decides it is the same, and only then."""

import copy
import dataclasses
import json
import shutil
from enum import Enum
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig
from trl import SFTConfig

from lora_recipes.data import cache
from lora_recipes.memory import kept, memory
from lora_recipes.memory.fits import Memory
from lora_recipes.memory.rehearsal import Batch, Setup
from lora_recipes.model import build
from lora_recipes.recipe.sections import Freeze

FIELDS = [field.name for field in dataclasses.fields(SFTConfig)]


def setup(folder: Any, **arguments: Any) -> Setup:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    taken = SFTConfig(
        str(folder), **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | arguments
    )
    return Setup(config, torch.float32, taken, Batch(2, 8, 14), lora, torch.float32, cuda=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Setup:
    return setup(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def found(made) -> Memory:
    return memory.rehearsed(made)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return cache.place()


def other(value: Any) -> Any:
    """Another value of about the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float) and not isinstance(value, Enum):
        return value + 1
    return {"another": "value"} if isinstance(value, dict) or dataclasses.is_dataclass(value) else "another"


def changed(made: Setup, part: str, name: str) -> Setup:
    """`made` with another value of one attribute of one of its parts."""
    its = copy.deepcopy(getattr(made, part))
    object.__setattr__(its, name, other(getattr(its, name)))
    return dataclasses.replace(made, **{part: its})


def refuses() -> Memory:
    raise AssertionError("rehearsed again")


OTHERS = {
    "dtype": torch.bfloat16,
    "peft_config": None,
    "adapter": None,
    "quantize": build.nf4("float32"),
    "attention": "eager",
    "fast": frozenset({"fla"}),
    "cuda": True,
    "evaluation": Batch(1, 8, 7),
    "trl": False,
    "prepared": True,
    "freeze": Freeze(given={"last_blocks": 1}, last_blocks=1),
    "new_tokens": (3,),
    "copies": 1,
    "head": (("a", "b"), "mean"),
}


def test_each_part_of_a_setup_decides(made):
    assert OTHERS.keys() | {"config", "arguments", "batch"} == {f.name for f in dataclasses.fields(Setup)}
    keys = {name: kept.key(dataclasses.replace(made, **{name: value})) for name, value in OTHERS.items()}
    for part, names in {
        "batch": [field.name for field in dataclasses.fields(Batch)],
        "config": vars(made.config),
        "peft_config": vars(made.peft_config),
        "arguments": FIELDS,
    }.items():
        keys |= {
            f"{part}.{name}": kept.key(changed(made, part, name)) for name in names if name not in kept.IDLE
        }
    same = [name for name, key in keys.items() if key == kept.key(made)]
    assert same == [] and len(set(keys.values())) == len(keys) > 200


def test_what_is_idle_changes_neither_the_name_nor_the_memory(made, found, tmp_path):
    """Not even where all of it is another."""
    again = setup(tmp_path / "elsewhere")
    idle = {name: getattr(made.arguments, name) for name in FIELDS if name in kept.IDLE}
    for name, value in idle.items():
        another = value / 2 if isinstance(value, float) and value < 1 else other(value)
        object.__setattr__(again.arguments, name, another)
    lora: Any = again.peft_config
    lora.lora_alpha, lora.use_rslora, lora.target_modules = 99, True, {"v_proj", "q_proj"}
    assert len(idle) > 20
    assert kept.key(again) == kept.key(made) and memory.rehearsed(again) == found


def test_a_changed_byte_of_this_code_another_library_and_another_variable_are_another_name(
    made, tmp_path, monkeypatch
):
    before, copied = kept.key(made), tmp_path / "lora_recipes"
    shutil.copytree(kept.PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with monkeypatch.context() as patch:
        patch.setattr(kept, "PACKAGE", copied)
        assert kept.key(made) == before, "wherever it lies"
        kept.code.cache_clear()
        file = copied / "memory" / "storages.py"
        file.write_bytes(file.read_bytes().replace(b"ROUNDING = 512", b"ROUNDING = 513"))
        assert kept.key(made) != before
    kept.code.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("TRANSFORMERS_ANOTHER", "way")
        assert kept.key(made) != before
    (tmp_path / "kernels-0.11.1.dist-info").mkdir()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        kept.installed.cache_clear()
        assert kept.key(made) != before
    kept.installed.cache_clear()
    assert kept.key(made) == before


def test_it_is_rehearsed_once_and_again_where_what_is_kept_is_damaged(made, found, place):
    asked: list[None] = []

    def rehearse() -> Memory:
        asked.append(None)
        return dataclasses.replace(found, rehearsed="in 1.0 s")

    assert kept.of(made, rehearse).rehearsed == "in 1.0 s"
    again = kept.of(made, refuses)
    assert again == found and "and kept (" in again.rehearsed and list(again.parts) == list(found.parts)
    (folder,) = cache.kept(steps=True)
    file = folder / kept.FOUND
    whole = file.read_text()
    digits = str(found.parts["base"])
    for spoiled in (whole.replace(digits, digits[::-1]), whole[:9], ""):
        assert spoiled != whole and (file.write_text(spoiled) or True)
        assert kept.of(made, rehearse) == found and json.loads(file.read_text())["parts"] == found.parts
    (folder / cache.FACTS).write_text("{")
    assert kept.of(made, rehearse) == found and len(asked) == 5
    assert cache.kept() == [] and cache.lines()[0].startswith("rehearsed steps kept: 1, ")
    assert "removed" in cache.clear() and not folder.exists()


def test_a_peak_that_is_unknown_is_not_kept_and_no_place_is_no_error(
    made, found, place, tmp_path, monkeypatch
):
    unknown = dataclasses.replace(found, unknown="no answer")
    assert kept.of(made, lambda: unknown) == unknown and cache.kept(steps=True) == []
    (tmp_path / "file").write_text("where the folder would be")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    assert kept.of(made, lambda: found) == found


def test_a_plan_takes_the_memory_that_one_before_it_found(made, found, place):
    with memory.Rehearsals([made], memory.SECONDS) as rehearsals:
        assert rehearsals[0] == found and rehearsals[0].rehearsed.startswith("at ")
    with memory.Rehearsals([made], 0.0) as rehearsals:
        assert rehearsals[0] == found and rehearsals.process is None, "no process was begun"
        assert ("rehearsed", rehearsals[0].rehearsed) in rehearsals[0].lines()
