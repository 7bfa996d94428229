"""Rows with tokens or positions that the base has not: an error where the first step would fail, a warning
where training would go on.
"""

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, OPTConfig

from lora_recipes.core.errors import RecipeError
from lora_recipes.model import reach
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve


def warnings(path, *overrides):
    return plan.make(resolve(recipes.load(str(path), list(overrides)), path.parent / "out")).warnings


def test_tokens_beyond_the_embedding_are_named_with_their_row(case):
    with pytest.raises(RecipeError, match=r"ids_beyond.jsonl:1: its token '<extra_190>' is number 1,095"):
        warnings(case("ids_beyond"))


def test_tokens_that_no_row_uses_are_a_warning(case):
    (told,) = warnings(case("bigger_tokenizer"))
    assert re.search(r"has 81 tokens that the base's embedding \(1,024 rows\) has not", told)


def test_tokens_in_the_eval_rows_are_found_too(case):
    path = case("bigger_tokenizer", train__eval_strategy="steps", train__eval_steps=2)
    row = json.loads((path.parent / "ids_beyond.jsonl").read_text().splitlines()[2])
    row["prompt"][0]["content"] = "Which of the old lamps hides a spare key under its foot?"
    row["completion"][0]["content"] = "Only that green one beside our window <extra_190>"
    (path.parent / "held.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RecipeError, match=r"held.jsonl:1: its token '<extra_190>'"):
        warnings(path, f"data.eval={path.parent / 'held.jsonl'}")


def test_an_end_of_text_beyond_the_embedding_is_refused_though_no_row_has_it(case):
    path = case("bigger_tokenizer")
    with pytest.raises(RecipeError, match=r"eos_token '<extra_199>' is number 1,104"):
        warnings(path, "train.eos_token=<extra_199>")


def test_rows_beyond_rope_are_a_warning_that_counts_them(case):
    (told,) = warnings(case("beyond_positions"))
    assert re.search(r"6 rows are longer than the 256 positions .* longest 424", told)
    cut = warnings(case("beyond_positions"), "train.max_length=256", "data.limits={truncated: 1}")
    assert not any("longer than" in text for text in cut)


LEARNED = ["lora.target_modules=[c_attn]", "data.limits={truncated: 1}"]


def test_rows_beyond_a_table_of_positions_are_refused(case, bases):
    path = case("beyond_positions", model__name_or_path=str(bases("gpt2")))
    with pytest.raises(
        RecipeError, match=r"6 rows have more tokens than the base has positions \(64"
    ) as error:
        warnings(path, *LEARNED, "train.max_length=256")
    assert "long_rows.jsonl:1" in str(error.value) and "set train.max_length=64" in str(error.value)
    warnings(path, *LEARNED, "train.max_length=64")


def test_virtual_tokens_take_positions_too(case, bases):
    path = case("beyond_positions", model__name_or_path=str(bases("gpt2")))
    text = path.read_text()
    path.write_text(
        re.sub(
            r"lora:\n(  .*\n|  - .*\n)+", "peft: {peft_type: PROMPT_TUNING, num_virtual_tokens: 8}\n", text
        )
    )
    with pytest.raises(RecipeError, match=r"and 8 virtual ones.*\n.*set train.max_length=56"):
        warnings(path, "train.max_length=64", "data.limits={truncated: 1}")


def test_blocks_of_wrapped_rows_count_as_one(case, bases):
    path = case("qwen_base_eos", model__name_or_path=str(bases("gpt2")))
    packed = ["train.packing=true", "train.packing_strategy=wrapped", "lora.target_modules=[c_attn]"]
    with pytest.raises(RecipeError, match=r"blocks of 128 tokens .*and the base has 64 positions"):
        warnings(path, *packed, "train.max_length=128")
    warnings(path, *packed, "train.max_length=64")


BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "reached"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64} | BANDS, 256),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_scaled_positions_count(rope, reached):
    assert (
        reach.positions(LlamaConfig(max_position_embeddings=256, rope_parameters=rope | {"rope_theta": 1e4}))
        == reached
    )


WORDS: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
SMALL: dict[str, Any] = WORDS | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=48), 48),
        (GPTJConfig(**WORDS, n_embd=32, n_layer=1, n_head=2, n_positions=40, rotary_dim=4), 40),
        (LlamaConfig(**SMALL, intermediate_size=32, max_position_embeddings=32), None),
    ],
    ids=["OPT", "GPT-J", "Llama"],
)
def test_a_table_is_seen_where_the_model_fails_beyond_it(config, length):
    """Held against the model itself: it runs at the length, and fails at one token more."""
    model = AutoModelForCausalLM.from_config(config)
    assert reach._table(model) == length
    ids = torch.ones(1, length or 100, dtype=torch.long)
    model(input_ids=ids, use_cache=False)
    if length:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, length + 1, dtype=torch.long), use_cache=False)
