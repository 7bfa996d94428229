"""What the class has decides: its attention, its experts, and what of it NF4 packs."""

import importlib.util

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, DeepseekV3Config, GptOssConfig, Qwen3MoeConfig
from trl import SFTConfig

from lora_recipes.core.errors import RecipeError
from lora_recipes.memory import fake, memory, rehearsal
from lora_recipes.memory.rehearsal import Batch, Setup
from lora_recipes.model import build, experts, parts
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from tests.cases import families
from tests.typed import there

A3B = Qwen3MoeConfig.from_dict(
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("attention")


def planned(folder, family: str, *overrides: str) -> plan.Plan:
    file, target = folder / f"{family}.yaml", "query_key_value" if family == "bloom" else "q_proj"
    file.write_text(
        f"model: {{name_or_path: {families.make(family, folder)}, dtype: float32}}\n"
        f"data: {{train: {families.rows(folder)}}}\n"
        f"lora: {{r: 4, lora_alpha: 4, target_modules: [{target}]}}\n"
        "train: {max_steps: 2, learning_rate: 1.0e-3}\n"
    )
    return plan.make(resolve(recipes.load(str(file), list(overrides)), folder))


def test_the_attention_is_the_one_that_transformers_chooses_for_the_class(folder):
    said = dict(planned(folder, "gpt_oss").lines)["attention"]
    assert said == "eager: GptOssForCausalLM has no sdpa in transformers; it holds whole score matrices"
    made = planned(folder, "llama")
    assert dict(made.lines)["attention"] == "sdpa: transformers' choice for LlamaForCausalLM"
    assert there(made.facts.model.attention) == "sdpa" and made.facts.model.active is None
    asked = planned(folder, "llama", "model.attn_implementation=eager")
    assert dict(asked.lines)["attention"].startswith("eager: as model.attn_implementation says; it holds")


@pytest.mark.parametrize(
    "family, asked, found",
    [
        ("gpt_oss", "sdpa", "GptOssForCausalLM does not support an attention implementation through torch"),
        ("bloom", "flash_attention_2", "BloomForCausalLM does not support Flash Attention 2"),
        ("llama", "sdap", 'Specified `attn_implementation="sdap"` is not supported'),
    ],
)
def test_an_attention_that_the_class_has_not_is_refused_by_the_plan(family, asked, found, folder):
    with pytest.raises(RecipeError) as refused:
        planned(folder, family, f"model.attn_implementation={asked}")
    (problem,) = refused.value.problems
    assert "model.attn_implementation" in problem.where and found in problem.found
    assert problem.do.startswith("remove it: transformers then chooses")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="the package is here")
def test_an_attention_whose_package_is_missing_here_is_planned_and_training_here_refused(folder):
    made = planned(folder, "llama", "model.attn_implementation=flash_attention_2")
    assert any("FlashAttention2" in warning for warning in made.warnings)
    assert any("FlashAttention2" in problem.found for problem in made.here)


def test_flash_attention_holds_no_scores_on_a_class_without_sdpa(tmp_path):
    """GPT-OSS at 512 tokens: scores of 4 heads and 2 rows in float32 are 8 MiB, which eager holds."""
    config = families.FAMILIES["gpt_oss"][1]
    peaks = {}
    for attention in (None, "flash_attention_2"):
        arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False)
        made = Setup(
            GptOssConfig(**config),
            torch.float32,
            arguments,
            Batch(2, 512, 1022),
            LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            torch.float32,
            attention=attention,
            cuda=False,
        )
        peaks[attention] = memory.rehearsed(made)
    assert peaks[None].parts["activations"] > peaks["flash_attention_2"].parts["activations"] + 8 * 2**20


@pytest.mark.parametrize(
    "config, total, active, chosen",
    [
        (A3B, 30_532_122_624, 3_353_032_704, "8 of 128"),
        (DeepseekV3Config(), 671_026_404_352, 37_552_282_624, "8 of 256"),
    ],
    ids=["Qwen3-30B-A3B", "DeepSeek-V3"],
)
def test_the_parameters_that_a_token_passes_are_those_that_the_publishers_name(config, total, active, chosen):
    """3.3 of 30.5 and 37 of 671 billion. By hand: total - layers x (experts - 8) x an expert, which is
    48 x 120 x 3 x 2048 x 768 and 58 x 248 x 3 x 7168 x 2048.
    """
    model = parts.build(config, torch.bfloat16)
    assert model.num_parameters() == total
    found, said = experts.said(model)
    assert found == active and chosen in said


@pytest.mark.skipif(families.OLDER, reason="transformers has not these families yet")
@pytest.mark.parametrize("family", ["exaone", "internlm3"])
def test_a_config_whose_class_is_another_familys_is_planned(family, tmp_path):
    """Transformers has no modeling file beside these configs."""
    sizes = {key: families.FAMILIES["llama"][1][key] for key in ("vocab_size", "hidden_size")}
    config = AutoConfig.for_model(family, **sizes, num_hidden_layers=1, num_attention_heads=2)
    assert fake.modeling_of(config).__name__ == type(parts.build(config, torch.float32)).__module__


def test_the_plan_says_what_nf4_leaves_in_16_bits(tmp_path):
    """By hand: 48 x 128 x 3 x 2048 x 768 parameters of experts in bfloat16 are 54.00 GiB, embedding and head
    1.16.
    """
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    lora = LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = Setup(A3B, torch.bfloat16, arguments, Batch(1, 64, 63), lora, torch.float32, build.nf4("bfloat16"))
    said = rehearsal.unpacked(rehearsal.whole(made))
    assert "192 linear modules" in said and "54.00 experts, which are parameters and no nn.Linear" in said
    assert "1.16 embeddings and head" in said and " of 55.6" in said
