"""What ends a reply is found from template, rows, tokenizer and base; it is trained, and where there is none,
that is said.
"""

import json

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_recipes.core import stops as files
from lora_recipes.core.errors import RecipeError
from lora_recipes.data import gate
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve

# A template whose replies end with END; each row of tests/cases/rows.jsonl is a question and its answer.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}END{% else %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def passed(case, tmp_path):
    """`passed("qwen_base_eos", end="</s>")` is the gate of that case, its template ending replies so."""

    def through(name: str = "qwen_base_eos", end: str | None = None, rows: list | None = None, **changes):
        if end is not None:
            (tmp_path / "own.jinja").write_text(TEMPLATE.replace("END", end))
            changes["model__chat_template"] = "own.jinja"
        path = case(name, **changes)
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        resolved = resolve(recipes.load(str(path)), tmp_path)
        return gate.pass_through(resolved, network=False), resolved

    return through


def last_labels(found) -> set[str]:
    """The last token in the loss of each row, but for line breaks."""
    tok = found.tokenizer
    labels = [[i for i in e.labels if i >= 0 and tok.decode([i]).strip()] for e in found.train]
    return {str(tok.convert_ids_to_tokens(row[-1])) for row in labels}


def said(found, resolved) -> str:
    return dict(gate.lines(found, resolved.recipe))["reply ends"]


def test_a_base_whose_eos_is_not_the_template_s_end_learns_the_template_s(passed):
    found, resolved = passed("qwen_base_eos")
    assert last_labels(found) == {"<|im_end|>"} and found.counts.open_turns == 0 and not found.warnings
    assert found.tokenizer.eos_token == "<|im_end|>" and found.tokenizer.pad_token == "<|endoftext|>"
    assert said(found, resolved) == (
        "labels <|im_end|> (by the chat template, the tokenizer's own was <|endoftext|>); adapter/, merged/"
        " and vLLM stop at <|im_end|>, <|endoftext|>"
    )
    assert found.stops.facts().ids == found.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_the_same_where_the_recipe_says_it(passed):
    found, resolved = passed("qwen_base_eos_set")
    assert found.stops.was is None and found.tokenizer.eos_token == "<|im_end|>"
    assert said(found, resolved).startswith("labels <|im_end|> (by the chat template); ")


@pytest.mark.parametrize("name", ["gemma_end_of_turn", "gemma_end_of_turn_eager"])
def test_gemma_ends_a_turn_with_its_own_token_and_keeps_the_base_s(name, passed):
    found, _ = passed(name)
    assert found.stops.facts().stops == ["<end_of_turn>", "<eos>"] and found.counts.open_turns == 0


@pytest.mark.parametrize(
    ("end", "trained", "every"),
    [
        ("<|im_end|><|endoftext|>", ["<|im_end|>"], ["<|im_end|>", "<|endoftext|>"]),
        ("{{ '\n' }}<|im_end|>{{ '\n' }}", ["<|im_end|>"], ["<|im_end|>", "<|endoftext|>"]),
        ("{{ eos_token }}", ["<|endoftext|>"], ["<|endoftext|>"]),
        ("<|im_end|>{{ eos_token }}", ["<|im_end|>"], ["<|im_end|>", "<|endoftext|>"]),
    ],
    ids=["two tokens", "after a line break", "the eos, which is the pad token", "both"],
)
def test_ends_of_other_forms(end, trained, every, passed):
    found, _ = passed(end=end)
    facts = found.stops.facts()
    assert (facts.trained, facts.stops, facts.text) == (trained, every, None)
    assert found.counts.open_turns == 0
    # A template that writes eos_token would render other rows with another one: it stays.
    assert found.tokenizer.eos_token == ("<|endoftext|>" if "eos_token" in end else "<|im_end|>")


def test_an_end_that_is_the_pad_token_stays_in_the_labels_of_a_padded_batch(passed):
    found, _ = passed(end="{{ eos_token }}")
    pad = found.tokenizer.pad_token_id
    batch = DataCollatorForLanguageModeling(pad_token_id=pad)(
        [{"input_ids": e.input_ids, "labels": e.labels} for e in found.train]
    )
    assert found.stops.trained == (pad,) and (batch["labels"] == pad).sum(1).tolist() == [1] * len(
        found.train
    )
    assert torch.equal(batch["labels"] == -100, (batch["labels"] == -100) | (batch["attention_mask"] == 0))


@pytest.mark.parametrize(("end", "text"), [("</s>", "</s>"), ("{{ '\n\n### ' }}", "\n\n###")])
def test_an_end_that_is_text_is_told_with_what_a_request_must_send(end, text, passed):
    found, resolved = passed(end=end)
    assert (
        found.stops.trained == ()
        and found.stops.text == text
        and found.tokenizer.eos_token == "<|endoftext|>"
    )
    assert said(found, resolved).startswith(f"labels end with the text {text!r}; ")
    assert any(f'"stop": [{text!r}]' in warning for warning in found.warnings)


@pytest.mark.parametrize("end", ["", "{{ '\n' }}"])
def test_a_template_without_an_end_is_told(end, passed):
    found, resolved = passed(end=end)
    assert found.stops.trained == () and found.stops.text is None
    assert said(found, resolved).startswith("labels hold no end; ")
    assert any("ends no reply: what is trained never stops" in warning for warning in found.warnings)
    assert found.counts.open_turns == found.counts.turns
    with pytest.raises(RecipeError, match="do not learn to stop"):
        passed(end=end, data__limits={"no_end_of_turn": 0.5})


def test_rows_that_bring_their_end_themselves_count_as_closed(passed):
    rows = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in [("Where?", "Here.<|im_end|>"), ("When?", "Now.<|im_end|>")]
    ]
    found, _ = passed(end="", rows=rows, data__permit=["control_tokens"])
    assert found.stops.facts().trained == ["<|im_end|>"] and found.counts.open_turns == 0


def test_two_stops_of_the_base_stay_beside_the_one_that_is_trained(passed, bases):
    found, _ = passed(model__name_or_path=str(bases("llama3")))
    assert found.stops.facts().stops == ["<|eot_id|>", "<|end_of_text|>"]


def test_a_tool_call_that_ends_otherwise_is_a_second_end(passed, bases, tmp_path):
    """Llama 3.1 ends a call of its built-in tools with eom_id: the message goes on after the answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bases("qwen_base"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|eom_id|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    call = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
    end = (
        "{% if m['tool_calls'] %}<|call|>{{ m['tool_calls'][0]['function'] | tojson }}<|call|><|eom_id|>"
        "{% else %}<|im_end|>{% endif %}"
    )
    ask = [{"role": "user", "content": "Is it cold?"}]
    rows = [{"prompt": ask, "completion": [{"role": "assistant", "content": "", "tool_calls": call}]}] + [
        {"prompt": ask, "completion": [{"role": "assistant", "content": reply}]} for reply in ("No.", "Yes.")
    ]
    found, _ = passed(end=end, rows=rows, model__tokenizer=str(tmp_path / "tokenizer"))
    assert found.stops.facts().trained == ["<|im_end|>", "<|eom_id|>"] and found.counts.open_turns == 0
    assert found.tokenizer.eos_token == "<|im_end|>"


def test_an_end_outside_the_labels_is_no_end_that_is_learned(passed):
    marked = "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>"
    found, _ = passed(
        end=marked,
        rows=[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c"}]}],
        train__assistant_only_loss=True,
    )
    assert found.counts.open_turns == 1 and any("outside the labels" in w for w in found.warnings)


def test_an_eos_token_that_ends_no_reply_is_told_with_the_one_that_does(passed):
    found, _ = passed("qwen_base_eos_set", train__eos_token="<|im_start|>")
    assert any(
        "<|im_start|> ends no reply of these rows, the chat template writes <|im_end|>" in w
        for w in found.warnings
    )
    assert found.stops.facts().stops[0] == "<|im_end|>"


def test_a_text_ends_as_trl_ends_it(passed):
    found, resolved = passed(rows=[{"text": "The cat sleeps."}, {"text": "The dog barks."}])
    assert found.stops.facts().trained == ["<|endoftext|>"] == list(last_labels(found))
    assert said(found, resolved).startswith("labels <|endoftext|> (as TRL ends a text)")


def test_a_template_alone_says_its_end_where_no_tokenizer_is_at_hand(tmp_path):
    resolved = resolve(recipes.load("qwen35_4b_style"), tmp_path)
    found = gate.pass_through(resolved, network=False)
    assert found.stops.all == () and said(found, resolved).startswith("'<|im_end|>' by the chat template")


def test_what_is_written_is_read_back_and_a_bad_published_file_is_no_obstacle(tmp_path):
    files.save(tmp_path, {"temperature": 0.6, "do_sample": False, "_from_model_config": True}, [5, 2])
    assert files.of(tmp_path) == [5, 2]
    assert files.settings(tmp_path) == {"temperature": 0.6, "do_sample": False, "eos_token_id": [5, 2]}
    (tmp_path / files.FILE).write_text("{")
    with pytest.raises(RecipeError, match="broken JSON"):
        files.of(tmp_path)
