"""The planned peak is the peak: against real training on this machine, and against published runs on a
GPU.
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, Qwen2Config, TrainingArguments

from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import gate
from lora_recipes.memory import choices, fits, memory, rehearsal
from lora_recipes.memory.fits import FITS, GIB, LIKELY, MIB, NOT, UNKNOWN, Memory
from lora_recipes.memory.rehearsal import Batch, Setup
from lora_recipes.memory.storages import Storages
from lora_recipes.model import build
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from tests.typed import there

PUBLISHED = fits.published_runs()


@pytest.fixture(scope="module")
def outputs(trained, tmp_path_factory) -> Path:
    """The embedded base, trained and untrained, and the tiny Qwen3.5."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "tiny_base").symlink_to(trained / "tiny_base")
    for name in ("tiny_base", "tiny_qwen35_style"):
        build.random_base(resolve(recipes.load(name), folder))
    return folder


def longest(rows, count):
    """The `count` longest rows of a split."""
    return rows.part(np.argsort(-rows.lengths, kind="stable")[:count])


def trainer_of(recipe, outputs, rows):
    arguments, base = (
        build.sft_config(recipe, RunFolder(outputs / "tracked")),
        build.model(resolve(recipe, outputs)),
    )
    steps = recipe.train.given.get("max_steps")
    return build.trainer(
        resolve(recipe, outputs), arguments, base, rows.tokenizer, rows.train, rows.evaluation, [], steps
    )


def tracked(recipe, outputs, rows) -> int:
    """The largest sum of living storages, in bytes, while the real SFTTrainer trains."""
    (trainer, start), counted = trainer_of(recipe, outputs, rows), Storages()
    counted.add([*trainer.model.parameters(), *trainer.model.buffers()], "model")
    counted.add((start.state or {}).values(), "model")
    for module in trainer.model.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            counted.add([state.absmax, state.code, *nested], "model")
    counted.stretch = ("all", 0)
    with counted:
        trainer.train()
    return counted.peaks["all", 0].total


DENSE = ["tiny_facts", "train.gradient_checkpointing=false"]
HYBRID = ["tiny_qwen35_style", "train.gradient_checkpointing=false"]
CHECKPOINTED = "train.gradient_checkpointing=true"
FULL = ["tiny_base", "train.gradient_checkpointing=false", "train.per_device_train_batch_size=4"]


@pytest.mark.parametrize(
    "words",
    [
        DENSE,
        [*DENSE, CHECKPOINTED],
        [*DENSE, "model.quantize=nf4"],
        [*DENSE, "model.quantize=nf4", CHECKPOINTED],
        [*DENSE, "train.packing=true"],
        [*DENSE, "model.dtype=bfloat16"],
        [*DENSE, "train.optim=adafactor"],
        FULL,
        [*FULL, CHECKPOINTED],
        HYBRID,
        [*HYBRID, CHECKPOINTED],
        [*HYBRID, "model.quantize=nf4", CHECKPOINTED],
    ],
    ids=lambda words: "_".join([words[0], *(w.split(".", 1)[1] for w in words[2:])]),
)
def test_the_planned_peak_is_that_of_a_real_run_within_one_percent(words, outputs):
    name, *overrides = words
    overrides = list(
        {text.split("=")[0]: text for text in overrides}.values()
    )  # the last one of a key counts
    recipe = recipes.load(
        name, [*overrides, "train.max_steps=2", "train.eval_strategy='no'", "train.save_strategy='no'"]
    )
    if recipe.model.dtype == "bfloat16":
        recipe = replace(
            recipe, sections=recipe.sections | {"model": recipe.model.given | {"from_recipe": "tiny_base"}}
        )
    rows = gate.pass_through(resolve(recipe, outputs), False)
    size = 8 if recipe.train.packing else recipe.train.per_device_train_batch_size
    rows.train = longest(rows.train, size)  # so that the largest batch is one of the two
    planned = memory.rehearsed(memory.of_recipe(resolve(recipe, outputs), rows, cuda=False))
    assert planned.peak_bytes == pytest.approx(tracked(recipe, outputs, rows), rel=0.01)
    assert planned.trainable == sum(
        p.numel() for p in trainer_of(recipe, outputs, rows)[0].model.parameters() if p.requires_grad
    )


@pytest.mark.real
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_the_planned_peak_of_a_real_model_is_that_of_a_real_run(smollm2, kind):
    """A vocabulary of 49,152 and 30 layers: the loss and the activations count, not the adapter."""
    words = ["train.save_strategy='no'", "train.gradient_accumulation_steps=1", "train.max_steps=2"]
    resolved = smollm2.resolved(kind, *words)
    rows = gate.pass_through(resolved, False)
    rows.train = longest(rows.train, 1)
    planned = memory.rehearsed(memory.of_recipe(resolved, rows, cuda=False))
    assert planned.peak_bytes == pytest.approx(tracked(resolved.recipe, resolved.outputs, rows), rel=0.03)


QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = {"r": 4, "lora_alpha": 4, "target_modules": QKVO}
SECTIONS: dict[str, dict[str, Any]] = {
    "freeze_last": {"freeze": {"last_blocks": 1}},
    "freeze_last_and_embeddings": {"freeze": {"last_blocks": 1, "embeddings": True}},
    "dora": {"lora": LORA | {"use_dora": True}},
    "pissa": {"lora": LORA | {"init_lora_weights": "pissa"}},
    "new_tokens": {"lora": LORA, "model": {"new_tokens": [" parrot", " nowhere"]}},
    "IA3": {
        "peft": {
            "peft_type": "IA3",
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        }
    },
    "PROMPT_TUNING": {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}},
    "PREFIX_TUNING": {"peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8}},
    "ADALORA": {
        "peft": {"peft_type": "ADALORA", "init_r": 6, "target_r": 4, "lora_alpha": 6, "target_modules": QKVO}
    },
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_planned_peak_of_another_method_is_that_of_a_real_run(name, outputs):
    recipe = recipes.load(
        "tiny_facts", ["train.gradient_checkpointing=false", "train.max_steps=6", "train.save_strategy='no'"]
    )
    kept = {key: section for key, section in recipe.sections.items() if key not in ("lora", "probes")}
    changed = {key: kept.get(key, {}) | section for key, section in SECTIONS[name].items()}
    recipe = replace(recipe, sections=kept | changed)
    rows = gate.pass_through(resolve(recipe, outputs), False)
    rows.train = longest(rows.train, recipe.train.per_device_train_batch_size)
    planned = memory.rehearsed(memory.of_recipe(resolve(recipe, outputs), rows, cuda=False))
    assert planned.peak_bytes == pytest.approx(tracked(recipe, outputs, rows), rel=0.02)


def published(row: dict[str, str]) -> Memory:
    """The plan of a published run: not SFTTrainer's loss, and 16-bit weights made float32 by
    prepare_model_for_kbit_training.
    """
    number = {key: int(row[key]) for key in row if row[key].isdigit()}
    kind = Qwen2Config if "Qwen" in row["model"] else LlamaConfig
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    sizes = {key: number[key] for key in (*names, *(["head_dim"] if kind is LlamaConfig else []))}
    tied = row["tie_word_embeddings"] == "True"
    config = kind.from_dict(sizes | {"max_position_embeddings": 4096, "tie_word_embeddings": tied})
    quantize = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    arguments = TrainingArguments(
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        use_cpu=True,
        bf16=False,
    )
    lora = LoraConfig(r=number["r"], target_modules=row["target_modules"].split(), task_type="CAUSAL_LM")
    batch = Batch(number["batch"], number["seq"], number["batch"] * (number["seq"] - 1))
    setup = Setup(
        config,
        torch.float16,
        arguments,
        batch,
        peft_config=lora,
        adapter=torch.float32,
        quantize=quantize,
        prepared=True,
        trl=False,
    )
    return memory.rehearsed(setup)


def test_published_runs_on_a_t4_are_within_three_percent_and_one_and_a_half_on_average():
    errors = {}
    for i, row in enumerate(PUBLISHED):
        planned = published(row)
        assert planned.trainable == int(row["trainable"]), "exact"
        errors[f"{i} {row['model']} {row['batch']}x{row['seq']}"] = (
            planned.peak_bytes / (float(row["peak_allocated_mib"]) * MIB) - 1
        )
    assert len(errors) == 15 and {name: e for name, e in errors.items() if abs(e) > 0.03} == {}
    assert sum(map(abs, errors.values())) / len(errors) < 0.015, errors


def test_the_reserves_are_those_of_the_shipped_runs():
    """By hand: of the 15 ratios the eighth is SmolLM2-360M's (1 x 4096), the last TinyLlama's (4 x 1024)."""
    assert len(PUBLISHED) == 15 and all(float(row["peak_reserved_mib"]) for row in PUBLISHED)
    assert pytest.approx(4518 / 4017.841796875) == fits.RESERVED_MEDIAN
    assert pytest.approx(4886 / 3895.6083984375) == fits.RESERVED_WORST


def test_no_published_run_shows_more_than_the_worst_reserve_and_half_show_more_than_the_median():
    """process_mib is nvidia-smi's column, from which neither factor is computed."""
    sizes = [
        (
            Memory({"base": int(float(row["peak_allocated_mib"]) * MIB)}, "", 0, 0),
            float(row["process_mib"]) * MIB,
        )
        for row in PUBLISHED
    ]
    assert all(process <= made.process_bytes(fits.RESERVED_WORST) + MIB for made, process in sizes)
    assert sum(process > made.process_bytes() + MIB for made, process in sizes) == len(PUBLISHED) // 2


def test_trl_still_uses_the_loss_that_is_planned(outputs):
    """SFTTrainer patches the base's forward for a fused head with these outputs; when TRL changes that, the
    plan must follow.
    """
    recipe = recipes.load("tiny_facts")
    trainer, _ = trainer_of(recipe, outputs, gate.pass_through(resolve(recipe, outputs), False))
    base = trainer.model.get_base_model()
    ids = torch.arange(8).view(1, -1)
    made = base(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
    assert all(getattr(made, name) is not None for name in rehearsal.HEAD_OUTPUTS)
    assert getattr(made, "logits", None) is None, "no logits are built"
    assert trainer.args.loss_type == "nll"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """`rehearsed("qwen35_4b_style")` is that recipe's plan and its memory, rehearsed once."""

    @functools.cache
    def make(name: str) -> tuple[plan.Plan, Memory]:
        resolved = resolve(recipes.load(name), tmp_path_factory.mktemp("rehearsed"))
        made = plan.make(resolved)
        return made, plan.add_memory(made, resolved)

    return make


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes.RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_is_planned_by_running_its_step(name, rehearsed):
    made, found = rehearsed(name)
    assert found.unknown == "" and found.peak_bytes > 0
    assert (found.parameters, found.trainable) == (
        made.facts.model.total,
        made.facts.model.trainable,
    )
    assert all(word in made.text() for word in ("memory ", "assumed ", "cards "))
    assert not any("memory was planned" in warning for warning in made.warnings)
    assert there(made.facts.memory).method == "one training step on fake tensors"


def test_a_model_without_sdpa_is_planned_with_the_attention_that_it_trains_with(case, tmp_path):
    """Gemma 2: transformers takes eager where the recipe asks for nothing, and refuses sdpa."""
    resolved = resolve(recipes.load(str(case("gemma_end_of_turn"))), tmp_path)
    rows = gate.pass_through(resolved, network=False)
    planned = memory.plan(resolved, rows, cuda=False)
    assert "attention: eager, whole score matrices" in planned.assumptions
    assert planned.peak_bytes == pytest.approx(tracked(resolved.recipe, tmp_path, rows), rel=0.01)


def test_a_longer_or_larger_batch_takes_more_and_checkpointing_less(tmp_path):
    def peak(*overrides: str) -> int:
        recipe = recipes.load("llama2_7b_lora", list(overrides))
        return memory.plan(resolve(recipe, tmp_path)).peak_bytes

    one = peak("train.per_device_train_batch_size=1", "train.max_length=512")
    assert one < peak("train.per_device_train_batch_size=2", "train.max_length=512")
    assert one < peak(
        "train.per_device_train_batch_size=1", "train.max_length=512", "train.gradient_checkpointing=false"
    )
    assert (
        one
        > peak("train.per_device_train_batch_size=1", "train.max_length=512", "model.quantize=nf4") + 6 * GIB
    )


def test_what_fits_is_said_fastest_first_with_the_same_examples_a_step(tmp_path):
    recipe = recipes.load(
        "llama2_7b_lora", ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    )
    found = choices.fit(resolve(recipe, tmp_path), 16)
    assert found and all(
        o.batch * o.accumulation == 4 and o.memory.verdict(16) in (FITS, LIKELY) for o in found
    )
    assert [o.cost for o in found] == sorted(o.cost for o in found)
    sizes = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    wanted = {text.split("=")[0]: text for text in [*sizes, *found[0].overrides]}
    again = memory.plan(resolve(recipes.load("llama2_7b_lora", list(wanted.values())), tmp_path))
    assert again.peak_bytes == found[0].memory.peak_bytes, "what is printed is what would be planned"


def test_a_card_on_which_nothing_fits_is_told():
    assert fits.table([], 2) == [
        "nothing fits 2 GB: a shorter train.max_length, a smaller base or a larger card"
    ]


def test_full_lora_and_qlora_are_compared_on_the_same_recipe(tmp_path):
    found = choices.compare(resolve(recipes.load("llama2_7b_lora"), tmp_path))
    assert list(found) == ["full", "LoRA", "QLoRA"]
    assert found["full"].peak_bytes > 3 * found["LoRA"].peak_bytes > 6 * found["QLoRA"].peak_bytes / 2
    assert "full" in fits.comparison(found)[1]


def test_a_step_that_cannot_be_run_gives_no_peak_and_no_verdict_but_what_is_held_at_least(
    tmp_path, rehearsed
):
    recipe = recipes.load("qwen35_4b_style")
    found = memory.plan(resolve(recipe, tmp_path), seconds=0.01)
    assert found.unknown == "no answer within 0.01 s" and found.facts().method == "not known"
    lines = dict(found.lines())
    assert (
        lines["memory"].startswith("not known, and neither is what fits: no answer") and "cards" not in lines
    )
    assert "at least" in lines["memory"] and (found.verdict(80), found.verdict(1)) == (UNKNOWN, NOT)
    ran = rehearsed("qwen35_4b_style")[1]
    assert ran.unknown == "" and found.peak_bytes < ran.peak_bytes
    assert found.parts["base"] == pytest.approx(ran.parts["base"], rel=0.01)
    assert found.trainable == ran.trainable


@pytest.mark.parametrize(("peak", "verdict"), [(10.0, FITS), (18.5, FITS), (20.0, LIKELY), (23.0, NOT)])
def test_a_card_is_judged_in_three_steps(peak, verdict):
    assert Memory({"base": int(peak * 10**9)}, "", 0, 0).verdict(24) == verdict
