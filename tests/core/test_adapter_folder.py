"""What an adapter needs of a server: its rank, and the value of --max-lora-rank that vLLM takes for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from lora_recipes.core import adapter_folder
from lora_recipes.serving import rules


def test_the_rank_is_r_without_a_pattern() -> None:
    assert adapter_folder.rank({"r": 8}) == 8
    assert adapter_folder.rank({"r": 8, "rank_pattern": None}) == 8
    assert adapter_folder.rank({"r": 8, "rank_pattern": {}}) == 8


def test_a_larger_rank_in_the_pattern_counts_and_a_smaller_one_does_not() -> None:
    # vLLM checks rank_pattern too: "LoRA rank 32 is greater than max_lora_rank 16".
    assert adapter_folder.rank({"r": 8, "rank_pattern": {"q_proj": 32, "v_proj": 4}}) == 32
    assert adapter_folder.rank({"r": 8, "rank_pattern": {"v_proj": 4}}) == 8


def test_the_rank_is_that_of_the_largest_tensor_of_a_saved_adapter(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    config = LoraConfig(r=4, target_modules=["a", "b"], rank_pattern={"b": 12})
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = get_peft_model_state_dict(
        get_peft_model(nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}), config)
    )
    assert adapter_folder.rank(saved) == max(t.shape[0] for n, t in tensors.items() if "lora_A" in n) == 12


@pytest.mark.parametrize(
    ("needed", "served"),
    [
        (1, 1),
        (2, 8),
        (8, 8),
        (9, 16),
        (16, 16),
        (17, 32),
        (64, 64),
        (257, 320),
        (321, 512),
        (512, 512),
        (513, None),
    ],
)
def test_the_server_gets_the_smallest_allowed_rank_that_is_enough(needed: int, served: int | None) -> None:
    assert rules.max_lora_rank(needed) == served


def test_no_rank_up_to_512_is_left_unserved_or_served_with_less() -> None:
    for needed in range(1, 513):
        served = rules.max_lora_rank(needed)
        assert served is not None
        assert served >= needed
        assert not [allowed for allowed in rules.MAX_LORA_RANKS if needed <= allowed < served]


def test_an_adapter_is_read_without_torch() -> None:
    code = (
        "import sys; from lora_recipes.core import adapter_folder; "
        " assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
