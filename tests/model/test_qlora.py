"""NF4: the base in 4 bits, trained through and merged."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from lora_recipes.core import provenance
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import gate
from lora_recipes.model import build
from lora_recipes.model import merge as merging
from lora_recipes.model.merge import merge
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.process import Forked
from tests.typed import there


@pytest.fixture
def loaded(trained):
    return build.model(resolve(recipes.load("tiny_facts", ["model.quantize=nf4"]), trained))


def test_the_base_is_nf4_with_double_quantisation(loaded):
    linear = loaded.model.layers[0].mlp.down_proj
    assert linear.weight.dtype == torch.uint8 and linear.weight.numel() == 64 * 128 // 2
    assert linear.weight.quant_state.quant_type == "nf4" and linear.weight.quant_state.nested
    assert loaded.lm_head.weight.is_floating_point(), "the head stays whole"


def test_a_question_asked_in_eval_mode_does_not_end_the_gradients(loaded):
    """Bitsandbytes repacks 4-bit weights at the first eval pass on CPUs with AVX512-BF16; that kernel has no
    backward.
    """
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


@pytest.mark.parametrize(
    ("asked", "dtype"), [([], torch.float32), (["model.adapter_dtype=bfloat16"], torch.bfloat16)]
)
def test_the_adapter_trains_in_float32_unless_asked_otherwise(trained, tmp_path, asked, dtype):
    recipe = recipes.load("tiny_facts", ["model.quantize=nf4", *asked])
    rows = gate.pass_through(resolve(recipe, trained), False)
    arguments, base = build.sft_config(recipe, RunFolder(tmp_path)), build.model(resolve(recipe, trained))
    made, _ = build.trainer(resolve(recipe, trained), arguments, base, rows.tokenizer, rows.train, None, [])
    assert {p.dtype for p in there(made.model).parameters() if p.requires_grad} == {dtype}


def test_full_fine_tuning_of_4_bit_weights_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.quantize: 4-bit weights are frozen, full: trains them"):
        plan.make(resolve(recipes.load("tiny_base", ["model.quantize=nf4"]), tmp_path))


@pytest.fixture(scope="module", params=["tiny_facts", "tiny_qwen35_style"])
def quantised(request, tmp_path_factory, trained):
    """The run folder of an adapter trained on an NF4 base; dense, and the two-part hybrid."""
    outputs = tmp_path_factory.mktemp("nf4")
    (outputs / "tiny_base").symlink_to(trained / "tiny_base")
    train(
        resolve(
            recipes.load(
                request.param,
                ["model.quantize=nf4", *(["train.max_steps=12"] if "style" in request.param else [])],
            ),
            outputs,
        ),
    )
    return outputs / request.param


def test_an_adapter_trained_in_4_bits_is_merged_onto_the_dequantised_base(quantised, tmp_path):
    """Onto the base that was never quantised, the usual way, is far off; both are measured and said."""
    record = merge(quantised / "adapter", tmp_path / "merged")
    assert record["quantize"] == "nf4" and record["greedy_equal"] == record["greedy_total"]
    assert record["kl_mean"] < 1e-6 < 1e-5 < record["unquantised_base"]["kl_mean"]
    assert "the usual way: KL" in merging.report(record, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config, "never into 4-bit weights"
    assert there(provenance.read(tmp_path / "merged")).quantize == "nf4"


def test_training_in_4_bits_leaves_its_answers_and_learns(quantised):
    record = json.loads((quantised / "run.json").read_text())
    losses = [json.loads(line).get("loss") for line in (quantised / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] and record["not_servable"] == []
    assert there(provenance.read(quantised / "adapter")).quantize == "nf4"


def test_a_4_bit_run_killed_and_resumed_is_bit_for_bit_the_uninterrupted_one(trained, tmp_path):
    words = [
        "model.quantize=nf4",
        "train.max_steps=200",
        "train.save_strategy=steps",
        "train.save_steps=20",
        "train.logging_steps=1",
    ]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        shutil.copytree(trained / "tiny_base", tmp_path / name / "tiny_base")
    process = Forked(("train", "tiny_facts", *words, "--outputs", str(tmp_path / "killed")), tmp_path)
    metrics = tmp_path / "killed" / "tiny_facts" / "metrics.jsonl"
    end = time.monotonic() + 600
    while time.monotonic() < end and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 70):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(resolve(recipes.load("tiny_facts", words), tmp_path / "killed"), resume=True)
    train(resolve(recipes.load("tiny_facts", words), tmp_path / "whole"))
    file = Path("tiny_facts") / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
