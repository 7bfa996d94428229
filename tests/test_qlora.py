"""NF4: the base in 4 bits, trained through and merged."""

import pytest
import torch

from lora_recipes import build, plan
from lora_recipes import recipe as recipes
from lora_recipes.messages import RecipeError


@pytest.fixture
def loaded(trained):
    return build.model(recipes.load("tiny_facts", ["model.quantize=nf4"]), trained)


def test_the_base_is_nf4_with_double_quantisation(loaded):
    linear = loaded.model.layers[0].mlp.down_proj
    assert linear.weight.dtype == torch.uint8 and linear.weight.numel() == 64 * 128 // 2
    assert linear.weight.quant_state.quant_type == "nf4" and linear.weight.quant_state.nested
    assert loaded.lm_head.weight.is_floating_point(), "the head stays whole"


def test_a_question_asked_in_eval_mode_does_not_end_the_gradients(loaded):
    """Bitsandbytes repacks 4-bit weights at the first eval pass on CPUs with AVX512-BF16; that kernel has no backward."""
    ids = torch.arange(12).view(1, -1)

    def gradient() -> torch.Tensor:
        embedded = loaded.get_input_embeddings()(ids).detach().requires_grad_()
        loaded(inputs_embeds=embedded, labels=ids).loss.backward()
        return embedded.grad

    before = gradient()
    loaded.eval()
    with torch.no_grad():
        loaded(input_ids=ids)
    loaded.train()
    assert before.abs().sum() > 0 and torch.equal(gradient(), before)


def test_full_fine_tuning_of_4_bit_weights_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.quantize: 4-bit weights are frozen, full: trains them all"):
        plan.make(recipes.load("tiny_base", ["model.quantize=nf4"]), tmp_path)
