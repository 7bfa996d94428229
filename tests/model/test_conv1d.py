"""GPT-2 as the hub has it: matrices stored [in, out], names without the class's prefix, PyTorch's file."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_recipes.core import adapter_folder, base_fit, weights
from lora_recipes.core.errors import RecipeError
from lora_recipes.model import merge as merging
from lora_recipes.model import stored
from tests.cases import families

SQUARE = "transformer.h.0.attn.c_proj"  # [32, 32]: its shape does not tell which way it stands


@pytest.fixture(scope="module", params=["model.safetensors", "pytorch_model.bin"])
def hub(request, tmp_path_factory) -> tuple[Path, Path]:
    """The base in that file, and a random adapter on all its kinds of modules."""
    folder = tmp_path_factory.mktemp("hub")
    base = families.make("gpt2", folder)
    whole = load_file(base / "model.safetensors")
    whole.pop("lm_head.weight", None)  # tied
    bare = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    (base / "model.safetensors").unlink()
    if request.param.endswith(".bin"):
        torch.save(bare, base / request.param)
    else:
        save_file(bare, base / request.param, metadata={"format": "pt"})
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        target_modules=["c_attn", "c_proj", "c_fc"],
        task_type="CAUSAL_LM",
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        str(folder / "adapter")
    )
    return base, folder / "adapter"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_merges_and_every_tensor_is_held_against_its_files(hub, tmp_path, dtype):
    base, adapter = hub
    record = merging.merge(adapter, tmp_path / "merged", base, dtype, unproven=True)
    assert record["modules"] == record["tensors_computed"] == 8
    assert record["greedy_equal"] >= (80 if dtype == "float32" else 60)
    held = adapter_folder.read(adapter)
    job = merging.Job(held, None, base, dtype)
    attached = merging._attach(merging._load(base, "float32", job), job)
    changes = stored.changes(attached, held)
    names = [
        n.replace(".base_layer", "") for n in attached.get_base_model().state_dict() if ".lora_" not in n
    ]
    right = load_file(tmp_path / "merged" / "model.safetensors")
    own = f"{SQUARE.removeprefix('transformer.')}.weight"
    assert set(right) == set(weights.tensors(base)), "the names of its files are kept"
    was = AutoModelForCausalLM.from_pretrained(base).state_dict()[f"{SQUARE}.weight"]
    pairs = load_file(held.file)
    a, b = (pairs[f"base_model.model.{SQUARE}.lora_{kind}.weight"] for kind in "AB")
    delta = 2 * (b @ a).T
    for wrong in (delta.T, -delta, 0.5 * delta, 0 * delta):
        made = tmp_path / "broken"
        made.mkdir(exist_ok=True)
        broken = {own: (was + wrong).to(right[own].dtype).contiguous()}
        save_file(right | broken, made / "model.safetensors")
        with pytest.raises(RecipeError, match=rf"{own} is off by"):
            stored.check(held, base, made, changes, names, {})


def test_another_width_is_another_base(hub, tmp_path):
    base, adapter = hub
    was = {name: each.tensor() for name, each in weights.tensors(base).items()}
    save_file({n: t.repeat(*[2] * t.dim()) for n, t in was.items()}, tmp_path / "model.safetensors")
    assert base_fit.fit(adapter_folder.read(adapter), base) == []
    (problem,) = base_fit.fit(adapter_folder.read(adapter), tmp_path)
    assert problem.do == "the adapter belongs to another base model"


def test_a_name_is_found_behind_another_prefix_only_where_it_is_there_once():
    nemotron = ["backbone.layers.0.mixer.q_proj.weight", "backbone.layers.10.mixer.q_proj.weight"]
    assert base_fit.own_name("model.layers.0.mixer.q_proj.weight", nemotron) == nemotron[0]
    assert base_fit.own_name("model.layers.1.mixer.q_proj.weight", nemotron) is None
    towers = ["vision.layers.0.q.weight", "text.layers.0.q.weight"]
    assert base_fit.own_name("model.layers.0.q.weight", towers) is None
    assert base_fit.own_name("lm_head.weight", ["model.other_lm_head.weight"]) is None
    assert base_fit.renamed("transformer.h.0.attn.c_attn", ["h.0.attn.c_attn.weight"]) is None
