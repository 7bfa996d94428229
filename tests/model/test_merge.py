"""Merged models answer as base + adapter does, or are not left behind."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.core import locate
from lora_recipes.core.errors import RecipeError
from lora_recipes.model import build
from lora_recipes.model import merge as merging
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """The tiny two-part Qwen3.5 checkpoint."""
    outputs = tmp_path_factory.mktemp("hybrid")
    build.random_base(resolve(recipes.load("tiny_qwen35_style"), outputs))
    return outputs / "_bases" / "tiny_qwen35-float32"


def adapter(base: Path, folder: Path, **options) -> Path:
    """An adapter with random A and B on the text class, as the trainer would save it."""
    torch.manual_seed(0)
    plain = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, dataclasses.replace(plain, **options)).save_pretrained(str(folder))
    return folder


def test_the_default_merges_and_answers_as_before(trained, tmp_path):
    folder = trained / "tiny_facts" / "adapter"
    record = merge(folder, tmp_path / "merged")
    assert record["modules"] == 8 and record["greedy_equal"] == record["greedy_total"] == 80
    assert record["kl_mean"] < 1e-6 and record["max_rss_bytes"] > 0
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == record
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model")
    attached = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("The cat sleeps on the", return_tensors="pt")["input_ids"]
    assert torch.allclose(merged(ids).logits, attached(ids).logits, atol=1e-4)
    assert str(tokenizer.decode(merged(ids).logits[0, -1].argmax())).strip() == "sofa"


def test_tied_embeddings_stay_tied_and_lm_head_is_not_saved_twice(trained, tmp_path):
    merge(trained / "tiny_facts" / "adapter", tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_a_two_part_checkpoint_keeps_its_class_names_and_vision_tower(hybrid, tmp_path):
    folder = adapter(
        hybrid,
        tmp_path / "adapter",
        target_modules=["q_proj", "in_proj_qkv", "in_proj_z", "out_proj", "down_proj"],
    )
    record = merge(folder, tmp_path / "merged")
    assert record["architecture"] == "Qwen3_5ForConditionalGeneration" and record["modules"] == 14
    with (
        safe_open(hybrid / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
        changed = {n for n in list(old.keys()) if not torch.equal(old.get_tensor(n), new.get_tensor(n))}
    assert len(changed) == 14 and all(n.startswith("model.language_model.layers.") for n in changed)
    assert (tmp_path / "merged" / "chat_template.jinja").is_file() and (
        tmp_path / "merged" / "generation_config.json"
    ).is_file()
    text = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hybrid), folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(40).view(1, -1)
    assert torch.allclose(text(ids).logits, merged(ids).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_asked_for_is_the_one_saved(trained, tmp_path, dtype):
    merge(trained / "tiny_facts" / "adapter", tmp_path / "merged", dtype=dtype)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == getattr(torch, dtype)


def test_dora_which_no_server_takes_as_an_adapter_merges(hybrid, tmp_path):
    folder = adapter(hybrid, tmp_path / "adapter", target_modules=["down_proj"], use_dora=True)
    assert merge(folder, tmp_path / "merged")["modules"] == 4


def test_a_merge_that_answers_otherwise_fails_and_leaves_nothing(trained, tmp_path):
    """LoRA on tied embeddings: merging changes lm_head too, which PEFT says only as a warning when the
    adapter is made.
    """
    folder = adapter(
        trained / "tiny_base" / "model", tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"]
    )
    with pytest.raises(RecipeError, match="not base \\+ adapter"):
        merge(folder, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_an_existing_model_is_replaced_only_when_asked(trained, tmp_path):
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    for force in (False, True):
        with pytest.raises(RecipeError, match="is no merged model"):
            merge(trained / "tiny_facts" / "adapter", output, force=force)
    assert (output / "mine.txt").read_text() == "keep"
    shutil.rmtree(output)
    merge(trained / "tiny_facts" / "adapter", output)
    with pytest.raises(RecipeError, match="already there"):
        merge(trained / "tiny_facts" / "adapter", output)
    merge(trained / "tiny_facts" / "adapter", output, force=True)
    assert (output / "merge.json").is_file()


def test_a_base_that_is_not_at_hand_or_another_one_is_refused(trained, hybrid, tmp_path):
    folder = Path(shutil.copytree(trained / "tiny_facts" / "adapter", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen3-4B"})
    )
    with pytest.raises(RecipeError, match=r"its base Qwen/Qwen3-4B is not a folder here"):
        merge(folder, tmp_path / "merged")
    with pytest.raises(RecipeError, match="was trained on other weights"):
        merge(folder, tmp_path / "merged", base=hybrid)
    (folder / "provenance.json").unlink()
    with pytest.raises(RecipeError, match="modules are not in"):
        merge(folder, tmp_path / "merged", base=hybrid)


def test_a_base_larger_than_memory_is_refused_before_loading(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**7, 10**6], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RecipeError, match=r"needs about .* GiB, .* GiB are free"):
        merging._enough_memory(tmp_path, "bfloat16")


def test_a_recipe_that_was_not_trained_is_answered(tmp_path):
    with pytest.raises(RecipeError, match="make train RECIPE=tiny_facts"):
        locate.run_folder("tiny_facts", tmp_path)
