"""On a CPU the loss takes the logits of labelled positions only, and is what TRL's own is."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import labels
from lora_recipes.model import build, lm_head
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from tests.model.test_batching import small


@pytest.fixture
def model() -> Any:
    """A decoder with TRL's head on it."""
    made = small("qwen3", {}, "sdpa")
    add_fused_lm_head(made, outputs=("log_probs", "entropy", "is_top1"))
    return made


def batch(labelled: list[int]) -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens; the positions that have a label."""
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, labelled] = ids[:, labelled]
    return {"input_ids": ids, "labels": labels}


def passed(model: Any, given: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor, int]:
    """The outputs, the gradient of the embeddings, and the FLOPs of both passes."""
    model.zero_grad()
    with FlopCounterMode(display=False) as counted:
        found = model(**given, fused_lm_head=True)
        found.loss.backward()
    return found, model.get_input_embeddings().weight.grad.clone(), counted.get_total_flops()


@pytest.mark.parametrize("labelled", [[], [4], [0, 5, 6, 7], list(range(12))])
def test_the_loss_and_its_gradient_are_those_of_all_positions(model, labelled):
    given = batch(labelled)
    whole, of_whole, _ = passed(model, given)
    with lm_head.of_labels():
        found, gradient, _ = passed(model, given)
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.is_top1.bool(), whole.is_top1.bool())
    assert torch.equal(found.label_mask, whole.label_mask)
    torch.testing.assert_close(gradient, of_whole, rtol=1e-4, atol=1e-6)


def test_a_position_without_a_label_costs_no_logits_and_only_inside(model):
    weight = model.get_output_embeddings().weight
    with lm_head.of_labels():
        few, many = (passed(model, batch(rows))[2] for rows in ([1, 2], [1, 2, 3, 4, 5]))
    # three positions more in each of two rows, multiplied forwards and again backwards (the counter does not
    # know addmm_, by which the gradients are added up)
    assert many - few == 2 * 3 * 2 * 2 * weight.numel()
    assert passed(model, batch([1, 2]))[2] == passed(model, batch([1, 2, 3, 4, 5]))[2]
    with lm_head.of_labels(compiled=True):
        assert passed(model, batch([1, 2]))[2] == passed(model, batch([1, 2, 3, 4, 5]))[2]


def test_the_trainer_counts_labelled_positions_where_trl_s_own_counts_all(trained, tmp_path):
    made = resolve(recipes.load("tiny_facts"), trained)
    rows, arguments = labels.gate(made, False), build.sft_config(made.recipe, RunFolder(tmp_path))
    base = build.model(made)
    trainer: Any = build.trainer(made, arguments, base, rows.tokenizer, rows.train, None, [])[0]
    given = next(iter(trainer.get_train_dataloader()))
    losses, flops = [], []
    for of in (type(trainer), SFTTrainer):
        with FlopCounterMode(display=False) as counted:
            losses.append(of.compute_loss(trainer, trainer.model, dict(given)).item())
        flops.append(counted.get_total_flops())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    unlabelled = int((given["labels"][:, 1:] == -100).sum())
    assert unlabelled > 0
    assert flops[1] - flops[0] == 2 * unlabelled * base.get_output_embeddings().weight.numel()
