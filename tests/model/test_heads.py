"""The head of task: classify: padding does not reach it, and it is what transformers' own classes have."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_recipes.model import checkpoint, heads, scores
from lora_recipes.recipe import contract as contracts
from lora_recipes.recipe.base import Folder
from tests.cases import families

NAMES = ["a", "b", "c"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64}
KINDS = {
    "qwen3": SMALL
    | {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 64,
        "n_positions": 64,
    },  # a table of positions
    "mamba": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "state_size": 4,
    },  # no mask of its own
    "qwen3_5": {},  # text part of two, linear attention
}


def base(kind):
    given = contracts.load("tiny_qwen35").config if kind == "qwen3_5" else {"model_type": kind, **KINDS[kind]}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
@torch.no_grad()
def test_padding_on_either_side_does_not_change_the_logits(kind, pooling):
    torch.manual_seed(1)
    model: Any = heads.of(base(kind), NAMES, pooling)
    torch.nn.init.normal_(model.score.weight)
    ids = torch.randint(1, 60, (2, 7))
    padding, none = (
        torch.full((2, 4), 5),
        torch.zeros(2, 4, dtype=torch.long),
    )  # a token that is also a real one
    ones = torch.ones_like(ids)
    alone = model(input_ids=ids).logits
    right = model(input_ids=torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, none], 1)).logits
    left = model(input_ids=torch.cat([padding, ids], 1), attention_mask=torch.cat([none, ones], 1)).logits
    assert torch.equal(left, right)
    torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(input_ids=torch.cat([ids, padding], 1)).logits, alone, atol=1e-3)


CLASSLESS = {"cohere2", "gemma4", "llama4", "mamba2", "qwen2_5_vl", "qwen3_5_moe"}  # none in transformers


@pytest.mark.parametrize(
    "name", [*sorted(CLASSLESS), "falcon", "gpt_oss", "gptj", "jamba", "llava", "opt", "stablelm"]
)
def test_a_family_keeps_the_names_that_its_own_class_has(name, tmp_path):
    """OPT's decoder stands in a model of its own, Llama 4's text model under another name than its prefix;
    that experts can be chosen, transformers reads in a file; a text part of several has no name.
    """
    made: Any = heads.of(checkpoint.load(Folder(families.make(name, tmp_path))), NAMES, "mean")
    assert made.name_or_path == str(tmp_path / name)
    made(input_ids=torch.tensor([[1, 2, 3]]))
    if heads.loaded_as(made.config) is None:
        assert name in CLASSLESS
        return
    made.save_pretrained(tmp_path / "saved")
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert type(theirs).__name__ == heads.loaded_as(made.config) == type(made).__name__
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(theirs.score.weight, made.score.weight)


@torch.no_grad()
def test_the_last_token_is_that_of_transformers_and_the_mean_is_the_mean(tmp_path):
    model: Any = heads.of(base("qwen3"), NAMES, "last")
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(theirs).__name__ == type(model).__name__
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids = torch.randint(1, 60, (3, 9))
    ids[0, 6:] = 0
    mask = (ids != 0).long()
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    )
    mean: Any = heads.of(base("qwen3"), NAMES, "mean")
    hidden = mean.get_decoder()(input_ids=ids[1:]).last_hidden_state
    torch.testing.assert_close(mean(input_ids=ids[1:]).logits, mean.score(hidden.mean(1)))


def test_the_loss_weighs_classes_and_counts_each_row_of_an_accumulated_batch_once():
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0]), [1.0, 2.0, 0.5]
    loss = heads.loss(weights, 0.0)
    each = cross_entropy(logits, labels, reduction="none")
    wanted = (each * torch.tensor([1.0, 2.0, 0.5, 2.0, 1.0])).sum() / 5
    torch.testing.assert_close(loss({"logits": logits}, labels), wanted)
    parts = [loss({"logits": logits[a]}, labels[a], num_items_in_batch=5) for a in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), wanted)
    smooth = heads.loss([1.0] * 3, 0.1)({"logits": logits}, labels)
    torch.testing.assert_close(smooth, cross_entropy(logits, labels, label_smoothing=0.1))


def test_scores_are_scikit_learns_and_the_calibration_error_is_its_definition():
    sure = [[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]]
    labels = [0, 1, 1, 2]
    found = scores.of(sure, labels, NAMES, "b", "hash")
    assert (found.accuracy, found.majority, found.rows) == (0.75, 0.5, 4)
    assert found.confusion == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found.classes[1].recall == 0.5 and found.classes[0].precision == 0.5
    confidence = torch.tensor(sure).softmax(-1).max().item()
    assert found.calibration_error == pytest.approx(confidence - 0.75, abs=1e-6)
    assert found.loss == pytest.approx(cross_entropy(torch.tensor(sure), torch.tensor(labels)).item())
