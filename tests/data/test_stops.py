"""What ends a reply is found from template, rows, tokenizer and base; it is trained, and where there is none,
that is said.
"""

import json
import shutil
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_recipes.core import stops as files
from lora_recipes.core.errors import RecipeError
from lora_recipes.data import gate, render, stops
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve

CASES = Path(__file__).resolve().parents[1] / "cases"
TEMPLATES = sorted(Path(str(resources("trl").joinpath("chat_templates"))).glob("*.jinja"))
# A template whose replies end with END; each row of tests/cases/rows.jsonl is a question and its answer.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}END{% else %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def passed(case, tmp_path):
    """`passed("qwen_base_eos", end="</s>")` is the gate of that case, its template ending replies so."""

    def through(
        name: str = "qwen_base_eos",
        end: str | None = None,
        rows: list | None = None,
        template: str = TEMPLATE,
        **changes,
    ):
        if end is not None or template != TEMPLATE:
            (tmp_path / "own.jinja").write_text(template.replace("END", end or ""))
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
    assert said(found, resolved).partition("\n")[0] == (
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
    ("base", "trained", "every"),
    [
        ("phi", "<|end|>", ["<|end|>", "<|endoftext|>"]),
        ("mistral", "</s>", ["</s>"]),
        ("llama3", "<|eot_id|>", ["<|eot_id|>", "<|end_of_text|>"]),
    ],
)
def test_each_family_ends_a_reply_as_its_template_does(base, trained, every, passed, bases):
    found, resolved = passed(model__name_or_path=str(bases(base)))
    assert found.stops.named(found.stops.trained)[0] == trained and sorted(found.stops.names) == sorted(every)
    assert found.counts.open_turns == 0 and "does not stop at" not in said(found, resolved)


def test_an_end_that_the_base_s_own_files_do_not_name_is_told_with_its_id(passed, bases):
    found, resolved = passed()
    (end,) = found.stops.trained
    assert f"does not stop at <|im_end|> (id {end})" in said(found, resolved)
    assert f"needs eos_token_id: [{end}, {found.stops.all[1]}]" in said(found, resolved)


def test_a_template_without_a_system_role_is_told_once_with_the_way_out(passed, bases):
    row = {"messages": [{"role": "system", "content": "Speak kindly."}, ASK, NO]}
    with pytest.raises(RecipeError) as error:
        passed(rows=[{"messages": [ASK, NO]}, *[row] * 3], model__name_or_path=str(bases("mistral")))
    (problem,) = error.value.problems
    assert problem.where.endswith("rows.jsonl:2") and "(and so have 2 more)" in problem.found
    assert "takes no system turn" in problem.found and "first user turn" in problem.do


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


CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
ASK = {"role": "user", "content": "Is it cold?"}
NO = {"role": "assistant", "content": "No."}
LOOK = {"role": "assistant", "content": "", "tool_calls": CALL}


@pytest.mark.parametrize("listed", [True, False], ids=["listed by the base", "by the template alone"])
def test_where_the_next_role_s_token_ends_a_reply_it_is_trained_and_stopped_at(
    listed, passed, bases, tmp_path
):
    folder = bases("roles")
    if not listed:
        folder = shutil.copytree(folder, tmp_path / "base")
        (folder / files.FILE).unlink()
    found, resolved = passed(model__name_or_path=str(folder))
    tok, facts = found.tokenizer, found.stops.facts()
    assert not found.warnings and found.counts.open_turns == 0 and last_labels(found) == {"<|user|>"}
    others = ["<|endoftext|>", "<|observation|>"] if listed else ["<|endoftext|>"]
    assert (facts.trained, facts.stops, facts.text) == (["<|user|>"], ["<|user|>", *others], None)
    assert said(found, resolved).startswith("labels <|user|> (which opens the next turn in the chat template")
    for row, example in zip(found.train.told.head, found.train, strict=True):
        rendered = tok.apply_chat_template(row.messages, return_dict=True)["input_ids"]
        going_on = tok.apply_chat_template([*row.messages, ASK], return_dict=True)["input_ids"]
        assert example.input_ids[:-1] == rendered, "what the template renders"
        assert example.input_ids == going_on[: len(rendered) + 1], "and what it writes next"
        assert len(example.labels) == len(example.input_ids) and example.labels[-1] == example.input_ids[-1]


def test_a_call_ends_with_the_token_of_the_tool_and_turns_in_between_learn_their_end(passed, bases):
    tool = {"role": "tool", "content": "blue"}
    rows = [
        {"messages": [ASK, NO, ASK, NO]},
        {"messages": [ASK, LOOK]},
        {"messages": [ASK, LOOK, tool, NO]},
    ]
    found, _ = passed(rows=rows, model__name_or_path=str(bases("roles")))
    user, tools = found.tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    ends = [[i for i in e.input_ids if i in (user, tools)] for e in found.train]
    assert ends == [[user] * 3, [user, tools], [user, tools, user]]
    assert [e.labels[-1] for e in found.train] == [user, tools, user] and found.counts.open_turns == 0
    assert found.stops.facts().trained == ["<|user|>", "<|observation|>"]


def test_under_assistant_only_loss_the_end_is_trained_and_the_user_s_words_are_not(passed, bases):
    from tests.cases.bases import ROLES

    reply = "'<|' + m['role'] + '|>\n' + m['content'] | trim"
    marked = "{% if m['role'] == 'assistant' %}<|assistant|>{{ '\n' }}{% generation %}{{ m['content'] }}"
    template = ROLES.replace(
        "{{ " + reply + " }}", marked + "{% endgeneration %}{% else %}{{ " + reply + " }}{% endif %}"
    )
    assert template != ROLES
    found, _ = passed(
        rows=[{"messages": [ASK, NO, ASK, NO]}],
        template=template,
        model__name_or_path=str(bases("roles")),
        train__assistant_only_loss=True,
    )
    trained = [i for i in found.train[0].labels if i >= 0]
    assert found.tokenizer.decode(trained) == "No.<|user|>No.<|user|>" and found.counts.open_turns == 0


@pytest.mark.parametrize("name", [p.stem for p in TEMPLATES if not p.stem.endswith("_training")])
def test_of_the_templates_that_trl_carries_one_family_ends_so(name, bases, tmp_path):
    """With every marker of the template a token of its own; TRL's own training template is the judge."""
    from transformers import AutoTokenizer

    given = [f"model.name_or_path={bases('qwen_base')}"]
    resolved = resolve(recipes.load(str(CASES / "qwen_base_eos.yaml"), given), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bases("qwen_base"))
    tokenizer.chat_template = render.chat_template(name, "")
    marks = sorted(set(render.MARK.findall(tokenizer.chat_template)))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    found = stops.next_turn(tokenizer, resolved)
    if name != "glm4moe":
        assert found == stops.NextTurn()
        return
    training = TEMPLATES[0].with_name(f"{name}_training.jinja").read_text()
    for reply, token in ((NO, found.reply), (LOOK, found.call)):
        turns: Any = [ASK, reply]
        own: Any = tokenizer.apply_chat_template(turns, chat_template=training, return_dict=True)
        assert own["input_ids"][-1] == token


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
