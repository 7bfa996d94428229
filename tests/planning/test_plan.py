"""The plan of every shipped recipe, and the seed's figures."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, SchedulerType

from lora_recipes.__main__ import main
from lora_recipes.core.errors import RecipeError
from lora_recipes.memory import memory
from lora_recipes.model import build
from lora_recipes.planning import plan
from lora_recipes.recipe import contract, layout
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.process import run
from tests.typed import there


def made(name: str, tmp_path, *overrides: str, devices: int = 1) -> plan.Plan:
    return plan.make(resolve(recipes.load(str(name), overrides), tmp_path), layout.of(devices))


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_loads_and_plans_and_a_chat_trains_what_a_server_renders(name, tmp_path):
    planned = made(name, tmp_path)
    text, train = planned.text(), planned.facts.data.train
    assert "parameters" in text and "steps" in text and "example" in text
    assert train.faithful == train.turns == (0 if train.format.startswith("text") else train.rows)


def test_the_seed_recipe_shows_its_known_figures(tmp_path):
    planned = made("qwen35_4b_style", tmp_path)
    model, steps, adapter = planned.facts.model, there(planned.facts.steps), there(planned.facts.adapter)
    assert (model.base, model.trainable, model.total) == (4_205_751_296, 10_616_832, 4_216_368_128)
    assert f"{model.share_percent:.4f}" == "0.2518"
    assert (steps.examples, steps.total) == (4, 750)
    assert adapter.bytes == 10_616_832 * 4 and adapter.max_lora_rank == 8
    text = planned.text()
    assert "2 x 2 x 1 device = 4 examples a step, ceil(1000 / 4) x 3 = 750 steps" in text
    assert "linear_attention 24 layers: mlp only - no token mixer adapted (in_proj_qkv, in_proj_z" in text
    assert "750 x 0.03 = 22.5, rounded up: 23 steps" in text


def test_the_all_layers_recipe_adapts_a_token_mixer_in_every_layer(tmp_path):
    coverage = {c.kind: c for c in there(made("qwen35_4b_style_all_layers", tmp_path).facts.coverage)}
    assert "linear_attn.in_proj_qkv" in coverage["linear_attention"].adapted
    assert coverage["linear_attention"].layers == 24 and coverage["full_attention"].layers == 8


def test_a_plan_needs_neither_network_nor_weights_and_prints_json(tmp_path):
    done = run("plan", "qwen3_8b_fact", "--json", "--outputs", str(tmp_path / "outputs"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["model"]["trainable"] == 36 * 8 * (4096 + 8 * 128) and facts["steps"]["total"] == 50
    assert "huggingface.co" not in done.stderr, "it tried the network"
    assert not list(tmp_path.iterdir()), "it wrote something"


def test_tokens_are_counted_only_with_the_real_tokenizer(tmp_path):
    assert made("qwen35_4b_style", tmp_path).facts.data.train.tokens is None
    assert there(made("tiny_qwen35_style", tmp_path).facts.data.train.tokens) > 10_000


def test_devices_change_the_arithmetic(tmp_path):
    steps = there(made("qwen35_4b_style", tmp_path, devices=2).facts.steps)
    assert steps.examples == 8 and steps.total == 375


def test_rank_pattern_counts_for_the_rank_that_serving_needs(tmp_path):
    adapter = there(made("qwen35_4b_style", tmp_path, "lora.rank_pattern={q_proj: 24}").facts.adapter)
    assert adapter.rank == 24 and adapter.max_lora_rank == 32


def test_packing_a_hybrid_model_is_refused_now_and_not_in_the_first_step(tmp_path):
    with pytest.raises(RecipeError, match="cannot keep packed rows apart"):
        made("tiny_qwen35_style", tmp_path, "train.packing=true")
    planned = made("tiny_qwen35_style", tmp_path, "train.packing=true", "train.packing_strategy=wrapped")
    assert there(planned.facts.steps).total < 40


def test_one_row_a_turn_makes_an_unfaithful_chat_faithful(write_recipe, tmp_path):
    chat = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n")
    data = {"train": str(file), "chat_template_kwargs": {"enable_thinking": False}}
    path = write_recipe("tiny_qwen35_style", data=data, train__eval_strategy="no", train__logging_steps=1)
    planned = made(path, tmp_path)
    assert any(
        "50.0 % of the trained turns stand after tokens that no server renders" in w for w in planned.warnings
    )
    planned = made(path, tmp_path, "data.rows=assistant_turn")
    assert planned.facts.data.train.rows == 2 and not planned.warnings


@pytest.fixture
def rows(write_recipe, tmp_path):
    """A recipe over the given lines of text."""

    def write(train: list[str], evaluation: list[str] | None = None, **changes):
        for name, texts in (("train", train), ("eval", evaluation or [])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        data = {"train": str(tmp_path / "train.jsonl")} | (
            {"eval": str(tmp_path / "eval.jsonl")} if evaluation else {}
        )
        return write_recipe("tiny_facts", "rows", data=data, **changes)

    return write


def test_duplicates_and_rows_in_both_splits_are_said_or_stop(rows, tmp_path):
    texts = [f"Satz {i}." for i in range(20)]
    planned = made(rows([*texts, texts[0]], ["Satz 1."] + [f"Neu {i}." for i in range(19)]), tmp_path)
    assert any(
        "4.8 % of the rows repeat an earlier row" in w and "train.jsonl:21" in w for w in planned.warnings
    )
    assert any("5.0 % of the eval rows stand in train too" in w for w in planned.warnings)
    with pytest.raises(RecipeError) as error:
        made(rows(texts[:2] * 2, texts[:1]), tmp_path)
    assert "50.0 % of the rows repeat an earlier row" in str(
        error.value
    ) and "100.0 % of the eval rows" in str(error.value)


def test_truncation_is_counted_and_stops_above_the_limit(rows, tmp_path):
    texts = [f"Satz {i}." for i in range(19)] + ["Das " * 50]
    planned = made(rows(texts), tmp_path)
    assert any("5.0 % of the rows are cut at train.max_length" in w for w in planned.warnings)
    with pytest.raises(RecipeError, match=r"raise train\.max_length"):
        made(rows(texts), tmp_path, "data.limits={truncated: 0.01}")


def test_bf16_follows_the_dtype_and_is_never_the_default_of_the_library(tmp_path):
    assert build.precision(recipes.load("tiny_facts"))[0] == {"bf16": False, "fp16": False}
    assert build.precision(recipes.load("qwen35_4b_style"))[0] == {"bf16": True, "fp16": False}


def test_what_the_trainer_would_refuse_is_refused_with_its_own_words(tmp_path):
    with pytest.raises(RecipeError, match=r"train.*TRL refuses it"):
        made("tiny_facts", tmp_path, "train.fp16=true", "train.bf16=true")


@pytest.mark.parametrize(
    "words, key",
    [
        (["train.dataloader_prefetch_factor=2"], "train.dataloader_prefetch_factor"),
        (["train.debug=foo"], "train.debug"),
        (["train.torch_empty_cache_steps=0", "train.seed=3"], "train.torch_empty_cache_steps"),
        (["train.lr_scheduler_type=reduce_lr_on_plateau", "train.seed=3"], "train.lr_scheduler_type"),
    ],
)
def test_the_key_that_the_trainer_refuses_is_named(words, key, tmp_path):
    with pytest.raises(RecipeError) as error:
        made("tiny_facts", tmp_path, *words)
    (problem,) = error.value.problems
    assert problem.where == f"override {words[0]!r} {key}" and "TRL refuses it: " in problem.found
    assert "change or remove it" in problem.do and "seed" not in problem.do


def test_of_two_keys_that_exclude_each_other_both_are_named(tmp_path):
    with pytest.raises(RecipeError) as error:
        made("tiny_facts", tmp_path, "train.fp16=true", "train.bf16=true")
    (problem,) = error.value.problems
    assert "fp16" in problem.where + problem.do and "bf16" in problem.where + problem.do


def test_a_schedule_that_cannot_be_computed_is_refused(tmp_path):
    words = ["train.lr_scheduler_type=inverse_sqrt", "train.lr_scheduler_kwargs={timescale: 0}"]
    with pytest.raises(RecipeError, match=r"train.lr_scheduler_kwargs: the schedule refuses them"):
        made("tiny_facts", tmp_path, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("words", [["train.fp16=true"], ["train.activation_offloading=true"]])
def test_what_fails_on_this_cpu_is_warned_of_and_training_refuses_it(words, tmp_path):
    planned = made("tiny_qwen35_style", tmp_path, *words)
    (problem,) = planned.here
    assert problem.where.endswith(words[0].partition("=")[0])
    assert any(w.startswith(problem.where) for w in planned.warnings)
    with pytest.raises(RecipeError, match=re.escape(problem.found)):
        train(resolve(recipes.load("tiny_qwen35_style", words), tmp_path))
    assert not (tmp_path / "tiny_qwen35_style" / "run.json").exists()


def test_a_plan_says_what_the_environment_would_change(tmp_path, monkeypatch, capsys):
    words = ["plan", "tiny_facts", "--outputs", str(tmp_path)]
    said = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}
    for variable, value in said.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["lora-recipes", *words])
    assert main() == 0
    text = capsys.readouterr().out
    for variable, value in said.items():
        assert f"training here would refuse: the environment: {variable}={value}" in text
        monkeypatch.delenv(variable)
    assert main() == 0
    assert "would refuse" not in capsys.readouterr().out


def test_a_template_argument_that_the_template_never_reads_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"does not use it\n.*did you mean enable_thinking"):
        made("tiny_qwen35_style", tmp_path, "data.chat_template_kwargs={enable_thinkin: false}")


def test_a_warm_up_that_the_schedule_ignores_is_said(tmp_path):
    planned = made("tiny_facts", tmp_path, "train.lr_scheduler_type=constant", "train.warmup_steps=5")
    assert any("constant ignores train.warmup_steps" in w for w in planned.warnings)


def test_no_steps_at_all_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="0 steps"):
        made("tiny_facts", tmp_path, "train.max_steps=0")


def test_an_adapter_that_cannot_be_served_is_said_before_training(tmp_path):
    planned = made("tiny_facts", tmp_path, "lora.use_dora=true")
    assert any("lora.use_dora: vLLM 0.32 serves no DoRA" in w for w in planned.warnings)


@pytest.mark.parametrize("kind", [k.value for k in SchedulerType])
def test_every_schedule_is_drawn_or_refused_in_words(kind, tmp_path):
    try:
        text = made("tiny_facts", tmp_path, f"train.lr_scheduler_type={kind}").text()
    except RecipeError as error:
        assert (
            "train.lr_scheduler_kwargs" in str(error)
            or "needs" in str(error)
            or "TRL refuses it" in str(error)
        )
    else:
        assert f"{kind}, peak 0.003" in text


def test_a_run_that_would_drop_every_row_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="all 80 rows would be dropped"):
        made("tiny_qwen35_style", tmp_path, "train.max_length=20", "data.limits={truncated: 1}")


def test_eval_rows_that_are_cut_are_said_too(rows, tmp_path):
    planned = made(rows([f"Satz {i}." for i in range(5)], ["Das " * 50]), tmp_path)
    assert any("100.0 % of the eval rows are cut" in w for w in planned.warnings)


def test_the_share_of_untrained_tokens_has_a_limit(tmp_path):
    with pytest.raises(RecipeError, match=r"% of the tokens are not trained"):
        made("tiny_qwen35_style", tmp_path, "data.limits={unsupervised: 0.5}")


def test_a_tokenizer_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=f"the tokenizer of {tmp_path} cannot be loaded"):
        made("tiny_facts", tmp_path, f"model.tokenizer={tmp_path}")


def test_a_probe_that_no_token_can_answer_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(RecipeError, match=r"probes.keep\[0\]: 'Zzzz' is no word"):
        made("tiny_facts", tmp_path, "probes.keep=[{prompt: The dog sleeps in the, answer: Zzzz}]")


def test_packing_needs_a_length(tmp_path):
    with pytest.raises(RecipeError, match="packing needs a length"):
        made("tiny_facts", tmp_path, "train.packing=true", "train.max_length=null")


def test_null_takes_one_of_our_keys_out_so_that_another_base_can_be_named(tmp_path):
    chosen = recipes.load(
        "tiny_facts", ["model.from_recipe=null", "model.contract=tiny_qwen3", "model.weights=random"]
    )
    assert "from_recipe" not in chosen.model.given
    assert plan.make(resolve(chosen, tmp_path)).facts.model.name_or_path == "random weights"


@pytest.mark.parametrize("name", contract.names())
def test_random_weights_can_be_made_from_every_contract(name):
    """On the meta device: the class that random_base would write, with the contract's parameters in its text
    model.
    """
    read = contract.load(name)
    config = AutoConfig.for_model(**read.config)
    with torch.device("meta"):
        model = build.published_class(read)._from_config(config, dtype=torch.bfloat16)
    text = [p for n, p in model.named_parameters() if "visual" not in n]
    assert sum(p.numel() for p in text) == read.parameters


def test_the_plan_holds_the_resolved_recipe(tmp_path):
    planned = made("tiny_facts", tmp_path, "lora.r=2")
    assert planned.facts.resolved["lora"]["r"] == 2
    assert planned.text().startswith("recipe      tiny_facts with lora.r=2\n")


@pytest.mark.parametrize(
    ("name", "least", "most"), [("tiny_dora", 0, 5), ("tiny_full", -5, 50), ("tiny_pissa", 0, 1)]
)
def test_the_memory_of_a_method_stands_beside_that_of_plain_lora(name, least, most, tmp_path):
    recipe = recipes.load(name)
    planned = plan.make(resolve(recipe, tmp_path))
    plan.beside_lora(planned, resolve(recipe, tmp_path), plan.add_memory(planned, resolve(recipe, tmp_path)))
    facts = there(planned.facts.memory)
    assert least <= 100 * (facts.peak_bytes / there(facts.lora_peak_bytes) - 1) <= most
    assert "with LoRA   peak" in planned.text()


def test_a_step_that_was_run_for_another_model_gives_no_peak_and_no_card(tmp_path):
    resolved = resolve(recipes.load("tiny_lora"), tmp_path)
    planned = plan.make(resolved)
    right = memory.plan(resolved, planned.gate)
    wrong = replace(right, parameters=right.parameters + 1)
    found = plan.add_memory(planned, resolved, found=wrong)
    assert "not known" in planned.text() and "cards" not in dict(planned.lines)
    assert f"it was run for {wrong.parameters:,} parameters" in found.unknown
    again = plan.make(resolved)
    plan.add_memory(again, resolved, found=right)
    assert "not known" not in again.text() and "cards" in dict(again.lines)


def test_plain_lora_is_not_compared_with_itself(tmp_path):
    recipe = recipes.load("tiny_lora")
    planned = plan.make(resolve(recipe, tmp_path))
    plan.beside_lora(planned, resolve(recipe, tmp_path), plan.add_memory(planned, resolve(recipe, tmp_path)))
    assert "with LoRA" not in planned.text() and there(planned.facts.memory).lora_peak_bytes is None
