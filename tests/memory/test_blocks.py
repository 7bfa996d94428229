"""A few blocks tell the whole: against all of them, and against what real training holds."""

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import DeepseekV3Config
from trl import SFTConfig

from lora_recipes.data import gate
from lora_recipes.memory import blocks, memory, rehearsal
from lora_recipes.memory.fits import GIB, NOT
from lora_recipes.memory.rehearsal import Batch, Setup
from lora_recipes.model import build
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.sections import Freeze
from tests.cases import families
from tests.memory.test_memory import tracked

LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "o_b_proj", "q_b_proj"], task_type="CAUSAL_LM")


def config(family: str, layers: int, **fields: Any) -> Any:
    kind = getattr(transformers, families.FAMILIES[family][0]).config_class
    return kind(**{**families.FAMILIES[family][1], "num_hidden_layers": layers, **fields})


def setup(tmp_path, config: Any, dtype=torch.float32, lora: Any = LORA, **more: Any) -> Setup:
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False)
    batch = Batch(2, 32, 62)
    return Setup(config, dtype, arguments, batch, lora, torch.float32, cuda=False, evaluation=batch, **more)


# Which blocks are alike is said by a number, by lists and a step, by layer_types, by the adapter, by freeze.
SIXTH = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(13)]
FOUR = Freeze(given={"last_blocks": 4}, last_blocks=4)
SOME = copy.copy(LORA)
SOME.layers_to_transform = [4, 5, 9]
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "deepseek_v3": (config("deepseek_v3", 12, first_k_dense_replace=3), {}),
    "qwen3_moe": (config("qwen3_moe", 12, mlp_only_layers=[1, 4], decoder_sparse_step=2), {}),
    "gemma3": (config("gemma3_text", 13, layer_types=SIXTH), {}),
    "some": (config("llama", 24), {"lora": SOME}),
    "full": (config("llama", 8), {"lora": None}),
    "frozen": (
        config("llama", 16),
        {"lora": None, "freeze": Freeze(given={"last_blocks": 4}, last_blocks=4)},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_few_blocks_hold_what_all_hold(name, tmp_path):
    """Each stretch of each block, within 0.5 %; the peak exactly."""
    shape, more = SHAPES[name]
    made = setup(tmp_path, shape, **more)
    whole = rehearsal.whole(made)
    few = blocks.few(whole.kinds)
    assert few and sum(map(len, few.runs)) < len(whole.kinds)
    found, _ = memory._of_few(made, whole, few)
    ran = rehearsal.run(made, whole).peaks
    assert found.keys() == ran.keys()
    peaks = {stretch: sum(parts.values()) for stretch, parts in found.items()}
    assert max(peaks.values()) == max(peak.total for peak in ran.values())
    assert peaks == pytest.approx({stretch: peak.total for stretch, peak in ran.items()}, rel=0.005)


def test_blocks_taken_for_alike_that_are_not_are_found_out(tmp_path):
    made = setup(tmp_path, SHAPES["deepseek_v3"][0])
    few = blocks.few([0, *[1] * 11])
    assert few
    with pytest.raises(LookupError, match="blocks of one kind differ"):
        memory._of_few(made, rehearsal.whole(made), few)


def test_deepseek_v3_is_not_37_billion_and_fits_no_card(tmp_path):
    """By hand: 671,026,404,352 parameters in bfloat16 are 1,250 GiB (routers are in float32)."""
    found = memory.rehearsed(setup(tmp_path, DeepseekV3Config(), torch.bfloat16))
    assert found.parameters - found.trainable == 671_026_404_352
    assert found.parts["base"] == pytest.approx(671_026_404_352 * 2, rel=1e-3)
    assert found.peak_bytes > 1249.8 * GIB and found.verdict(80) == NOT


@pytest.mark.parametrize(
    "family, dtype",
    [("qwen3_moe", "float32"), ("gpt_oss", "float32"), ("mixtral", "bfloat16"), ("deepseek_v3", "float32")],
)
def test_a_mixture_of_experts_is_planned_as_it_trains(family, dtype, tmp_path):
    base = families.make(family, tmp_path)
    file = tmp_path / "x.yaml"
    file.write_text(
        f"model: {{name_or_path: {base}, dtype: {dtype}}}\n"
        f"data: {{train: {families.rows(tmp_path)}}}\n"
        "lora: {r: 4, lora_alpha: 4, target_modules: [o_proj]}\n"
        "train: {max_steps: 2, learning_rate: 1.0e-3, gradient_checkpointing: false}\n"
    )
    resolved = resolve(recipes.load(str(file)), tmp_path)
    rows = gate.pass_through(resolved, False)
    made = memory.of_recipe(resolved, rows, cuda=False)
    planned = memory.rehearsed(made)
    assert planned.peak_bytes == pytest.approx(tracked(resolved.recipe, tmp_path, rows), rel=0.01)
    real = sum(p.numel() for p in build.model(resolved).parameters())
    assert planned.parameters == real + planned.trainable
