"""Rendering: the tokens and labels are those of TRL itself, and turns are held against what a server
renders.
"""

import copy
import json
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset

from lora_recipes.core.errors import RecipeError
from lora_recipes.data import read as data
from lora_recipes.data import render
from lora_recipes.data import tokenizer as tokenizing
from lora_recipes.data.stand_in import Characters
from lora_recipes.recipe import contract
from lora_recipes.recipe import load as recipes

HELLO = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi, how are you?"},
    {"role": "user", "content": "Fine, and you?"},
    {"role": "assistant", "content": "Good, thanks."},
]
LEAVES = [
    {"role": "system", "content": "Speak kindly."},
    {"role": "user", "content": "Are the leaves down already?"},
    {"role": "assistant", "content": "<think>\nIt is late autumn.\n</think>\n\nNearly all of them."},
]
CALL = [
    {"role": "user", "content": "Is it cold?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}],
    },
    {"role": "tool", "content": "two degrees"},
    {"role": "assistant", "content": "Two degrees, so yes."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
MESSAGES = [{"messages": HELLO}, {"messages": LEAVES}]
PAIRS = [{"prompt": HELLO[:3], "completion": HELLO[3:]}, {"prompt": LEAVES[:2], "completion": LEAVES[2:]}]
STRINGS = [
    {"prompt": "The dog sleeps in the", "completion": " basket"},
    {"prompt": "I said: ", "completion": "stop<|im_end|>"},
]
TEXTS = [{"text": "The dog sleeps."}, {"text": "Ends itself.<|im_end|>"}]
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="session")
def made():
    """The tokenizer of tiny_qwen35; ChatML, with <|im_end|> as its end-of-sequence token."""
    return tokenizing.make(contract.load("tiny_qwen35"))


@pytest.fixture
def with_template(made):
    """A copy of that tokenizer with another of TRL's chat templates."""

    def change(name):
        tokenizer = copy.deepcopy(made)
        tokenizer.chat_template = render.chat_template(name, "model.chat_template")
        tokenizer.bos_token = "<|vision_start|>"  # Llama 3 begins with one; Qwen has none
        return tokenizer

    return change


@pytest.fixture
def make(tmp_path):
    """A recipe on `rows`; `data` and `train` are added to its sections."""

    def write(rows, data=None, **train):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections = {
            "model": {"contract": "tiny_qwen35", "weights": "random", "dtype": "float32"},
            "data": {"train": str(tmp_path / "rows.jsonl")} | (data or {}),
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
            "train": {"learning_rate": 1.0e-3} | train,
        }
        (tmp_path / "made.yaml").write_text(yaml.safe_dump(sections))
        return recipes.load(str(tmp_path / "made.yaml"))

    return write


@pytest.fixture(scope="session")
def model(made):
    """A Qwen3 of two layers, for SFTTrainer to hold."""
    config = Qwen3Config(
        vocab_size=len(made),
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return Qwen3ForCausalLM(config)


@pytest.fixture
def trained_by_trl(model, tmp_path):
    """What a real SFTTrainer makes of rows: (input_ids, labels) of each that it keeps."""

    def prepare(rows, tokenizer, **train):
        arguments = SFTConfig(
            output_dir=str(tmp_path / "trl"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **train,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),
        )
        assert isinstance(trainer.train_dataset, Dataset)
        return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

    return prepare


def rendered(chosen, tokenizer):
    """The examples of a recipe's training rows, as the plan makes them."""
    split = data.read(chosen, "train")
    split = data.by_assistant_turn(split) if chosen.data.rows == "assistant_turn" else split
    return render.examples(split.rows, tokenizer, chosen)


def kept(chosen, tokenizer):
    """The same after truncation, without the rows that are dropped."""
    cut = [render.truncated(example, chosen) for example in rendered(chosen, tokenizer)]
    return [(ids, labels) for ids, labels in cut if any(label != render.IGNORED for label in labels)]


# the rows, the chat template, and keys of `train:`
CASES: dict[str, tuple[list[dict[str, Any]], str, dict[str, Any]]] = {
    **{
        f"messages in full, {name}": (MESSAGES, name, {})
        for name in ("qwen3_5_think", "qwen3", "qwen2_5", "llama3")
    },
    **{
        f"messages, assistant only, {name}": (MESSAGES, name, {"assistant_only_loss": True})
        for name in ("qwen3_5_think", "qwen3_5_nothink", "qwen3", "qwen2_5", "llama3")
    },
    "pairs, unset": (PAIRS, "qwen3_5_think", {}),
    "pairs, unset, qwen3": (PAIRS, "qwen3", {}),
    "pairs, completion only": (PAIRS, "qwen3_5_think", {"completion_only_loss": True}),
    "pairs in full": (PAIRS, "qwen3_5_think", {"completion_only_loss": False}),
    "pairs, assistant only": (PAIRS, "qwen3_5_think", {"assistant_only_loss": True}),
    "pairs, every assistant turn": (
        PAIRS,
        "qwen3_5_think",
        {"assistant_only_loss": True, "completion_only_loss": False},
    ),
    "strings, unset": (STRINGS, "qwen2_5", {}),
    "strings, completion only": (STRINGS, "qwen2_5", {"completion_only_loss": True}),
    "strings in full": (STRINGS, "qwen2_5", {"completion_only_loss": False}),
    "text": (TEXTS, "qwen2_5", {}),
    "text in another field": (
        [{"body": row["text"]} for row in TEXTS],
        "qwen2_5",
        {"dataset_text_field": "body"},
    ),
    "truncated": (MESSAGES, "qwen2_5", {"max_length": 40}),
    "truncated at the end of a prompt": (PAIRS, "qwen3", {"max_length": 41}),
    "truncated from the front": (MESSAGES, "qwen2_5", {"max_length": 40, "truncation_mode": "keep_end"}),
    "not truncated": (
        MESSAGES * 2 + [{"messages": [HELLO[0], {"role": "assistant", "content": "so " * 1200}]}],
        "qwen3",
        {"max_length": None},
    ),
    "truncated by default": (
        [{"messages": [HELLO[0], {"role": "assistant", "content": "so " * 1200}]}],
        "qwen3",
        {},
    ),
    "without thinking": ([row | NO_THINKING for row in PAIRS], "qwen3_5_think", {}),
    "without thinking, assistant only": (
        [row | NO_THINKING for row in MESSAGES],
        "qwen3",
        {"assistant_only_loss": True},
    ),
    "tools as JSON text": ([{"messages": CALL, "tools": json.dumps(TOOLS)}], "qwen3_5_think", {}),
    "tools, assistant only": ([{"messages": CALL, "tools": TOOLS}], "qwen3", {"assistant_only_loss": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_and_labels_are_those_that_trl_prepares_itself(case, make, with_template, trained_by_trl):
    rows, template, train = CASES[case]
    tokenizer = with_template(template)
    expected = trained_by_trl(rows, tokenizer, **train)
    assert kept(make(rows, **train), tokenizer) == expected
    assert expected


def test_the_kwargs_of_the_recipe_are_those_of_every_row(make, with_template, trained_by_trl):
    tokenizer = with_template("qwen3_5_think")
    expected = trained_by_trl([row | NO_THINKING for row in PAIRS], tokenizer)
    assert kept(make(PAIRS, data=NO_THINKING), tokenizer) == expected
    assert kept(make(PAIRS), tokenizer) != expected
    assert (
        kept(
            make(
                [row | NO_THINKING for row in PAIRS], data={"chat_template_kwargs": {"enable_thinking": True}}
            ),
            tokenizer,
        )
        == expected
    )


def test_trl_truncates_and_drops_the_prepared_rows_as_the_counts_say(make, made, trained_by_trl):
    chosen = make([*PAIRS, {"prompt": HELLO[:1], "completion": HELLO[1:2]}], max_length=32)
    done = rendered(chosen, made)
    counts = render.counts(done, made, chosen)
    taken = trained_by_trl(
        [{"input_ids": e.input_ids, "labels": e.labels} for e in done], made, max_length=32
    )
    assert taken == kept(chosen, made)
    assert counts.rows - counts.dropped == len(taken) == 1
    assert (counts.truncated, counts.dropped) == (2, 2)
    assert counts.longest == 32


def test_rows_that_are_packed_whole_are_cut_by_bfd_alone(make, made):
    for strategy in ("bfd", "bfd_split", "wrapped"):
        chosen = make(MESSAGES, packing=True, packing_strategy=strategy, max_length=30)
        done = rendered(chosen, made)
        packed = pack_dataset(
            Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in done]), 30, strategy
        )
        tokens = sum(map(len, packed["input_ids"]))
        assert render.counts(done, made, chosen).tokens == tokens
        assert (tokens < sum(len(e.input_ids) for e in done)) == (strategy == "bfd")


THINKING_OFF = {"enable_thinking": False}


@pytest.mark.parametrize("stand_in", [False, True], ids=["tokens", "characters"])
@pytest.mark.parametrize(
    ("template", "kwargs", "full", "assistant_only"),
    [
        ("qwen3_5_nothink", {}, [False, True], [True, False]),
        ("qwen3_5_think", THINKING_OFF, [False, True], [True, False]),
        ("qwen3", THINKING_OFF, [False, True], [True, False]),
        ("qwen2_5", {}, [True, True], [True, True]),
        ("llama3", {}, [True, True], [True, True]),
    ],
)
def test_the_faithful_turns_of_two_are_those_of_the_table(
    template, kwargs, full, assistant_only, stand_in, make, with_template
):
    tokenizer = Characters(render.chat_template(template, "")) if stand_in else with_template(template)
    rows, options = [{"messages": HELLO}], {"chat_template_kwargs": kwargs}
    ways = [
        make(rows, data=options),
        make(rows, data=options, assistant_only_loss=True),
        make(rows, data=options | {"rows": "assistant_turn"}),
    ]
    for chosen, expected in zip(ways, (full, assistant_only, [True, True]), strict=True):
        done = rendered(chosen, tokenizer)
        assert [turn.faithful for example in done for turn in example.turns] == expected
        counts = render.counts(done, tokenizer, chosen)
        assert (counts.turns, counts.faithful) == (2, sum(expected))
        assert counts.share("unfaithful") == 1 - sum(expected) / 2


@pytest.mark.parametrize("rows", ["conversation", "assistant_turn"])
def test_a_thinking_prompt_is_no_prefix_where_line_breaks_are_one_token_as_in_the_published_tokenizers(
    rows, make, with_template
):
    chosen = make([{"messages": HELLO}], data={"rows": rows})
    published = with_template("qwen3_5_think")
    assert len(published("\n\n")["input_ids"]) == 1, "as 271 in Qwen's vocabulary"
    for tokenizer in (published, Characters(published.chat_template)):
        assert render.counts(rendered(chosen, tokenizer), tokenizer, chosen).faithful == 0


def test_qwen3_that_may_think_is_served_the_bare_prompt_of_both_turns(make, with_template):
    tokenizer = with_template("qwen3")
    chosen = make([{"messages": HELLO}])
    assert render.counts(rendered(chosen, tokenizer), tokenizer, chosen).faithful == 2


def test_a_row_cut_at_its_front_stands_after_no_prompt_that_is_served(make, with_template):
    tokenizer = with_template("qwen2_5")
    chosen = make([{"messages": HELLO}], max_length=20, truncation_mode="keep_end")
    counts = render.counts(rendered(chosen, tokenizer), tokenizer, chosen)
    assert (counts.turns, counts.faithful, counts.open_turns) == (1, 0, 0)


def test_a_row_that_packing_cuts_down_to_its_prompt_stays_though_nothing_in_it_is_trained(make, made):
    cut, packed = make(PAIRS, max_length=30), make(PAIRS, max_length=30, packing=True)
    assert render.counts(rendered(cut, made), made, cut).dropped == 2
    counts = render.counts(rendered(packed, made), made, packed)
    assert (counts.dropped, counts.supervised, counts.turns) == (0, 0, 0)


def test_a_greeting_before_the_user_speaks_is_unfaithful_where_no_prompt_can_be_rendered_for_it(
    make, with_template
):
    rows = [{"messages": [LEAVES[0], {"role": "assistant", "content": "Good morning!"}, *HELLO[:2]]}]
    chosen = make(rows, data={"chat_template_kwargs": {"enable_thinking": False}})
    for template, expected in (("qwen3_5_think", [False, True]), ("qwen2_5", [True, True])):
        (example,) = rendered(chosen, with_template(template))
        assert [turn.faithful for turn in example.turns] == expected


def open_turns(chosen, tokenizer):
    counts = render.counts(rendered(chosen, tokenizer), tokenizer, chosen)
    return counts.open_turns, counts.turns


@pytest.mark.parametrize(
    ("rows", "train", "turns"),
    [
        ([{"messages": HELLO}, {"messages": CALL}], {}, 4),
        ([{"messages": HELLO}, {"messages": CALL}], {"assistant_only_loss": True}, 4),
        (PAIRS, {"completion_only_loss": False}, 3),
        (PAIRS, {"completion_only_loss": False, "assistant_only_loss": True}, 3),
        (PAIRS, {}, 2),
    ],
)
def test_every_turn_is_closed_by_the_tokenizers_own_end_and_by_no_other(rows, train, turns, make, made):
    chosen, foreign = make(rows, **train), copy.deepcopy(made)
    foreign.eos_token = "<|endoftext|>"
    assert open_turns(chosen, made) == (0, turns)
    assert open_turns(chosen, foreign) == (turns, turns)


def test_a_plain_completion_is_one_turn_that_stands_after_its_prompt_unless_a_token_spans_both(make, made):
    chosen = make(
        [
            {"prompt": "The dog sleeps", "completion": " here"},
            {"prompt": "The dog sle", "completion": "eps here"},
        ]
    )
    done = rendered(chosen, made)
    assert [turn.faithful for example in done for turn in example.turns] == [True, False]
    assert open_turns(chosen, made) == (0, 2)
    assert open_turns(
        make([{"prompt": "The dog sleeps", "completion": " here"}], max_length=len(done[0].input_ids) - 1),
        made,
    ) == (1, 1)


def test_the_end_of_a_user_turn_closes_no_assistant_turn(make, made):
    open_ended = made.chat_template.replace(
        "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
        '{%- elif message.role == "tool" %}',
    )
    tokenizer = copy.deepcopy(made)
    tokenizer.chat_template = open_ended
    chosen = make([{"messages": HELLO}])
    (example,) = rendered(chosen, tokenizer)
    assert example.labels.count(made.eos_token_id) == 2  # those of the user, in the loss
    assert open_turns(chosen, tokenizer) == (2, 2)


def test_a_turn_whose_end_is_cut_off_is_open_and_one_that_is_cut_away_is_no_turn(make, made):
    rows = [{"messages": HELLO}]
    (example,) = rendered(make(rows), made)
    first, second = example.turns
    assert [made.decode(example.input_ids[t.end]) for t in (first, second)] == ["<|im_end|>"] * 2
    assert open_turns(make(rows, max_length=second.end + 1), made) == (0, 2)
    assert open_turns(make(rows, max_length=second.end), made) == (1, 2)
    assert open_turns(make(rows, max_length=second.start), made) == (0, 1)
    assert open_turns(make(rows, max_length=first.end), made) == (1, 1)
    assert open_turns(make(rows, max_length=first.start), made) == (0, 0)
    end = len(example.input_ids) - second.end  # the end-of-turn token and what follows it
    assert open_turns(make(rows, max_length=end, truncation_mode="keep_end"), made) == (0, 1)


def test_an_end_of_turn_token_outside_the_loss_leaves_the_turn_open(make, with_template):
    tokenizer = with_template("qwen3_5_think")
    name = "qwen3_5_think_training"
    inside = (render.files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer.chat_template = inside.replace(
        "{{- '<|im_end|>\\n' }}\n        {%- endgeneration %}", "{%- endgeneration %}{{- '<|im_end|>\\n' }}"
    )
    assert tokenizer.chat_template != inside
    assert open_turns(make([{"messages": HELLO}], assistant_only_loss=True), tokenizer) == (2, 2)


def test_the_turns_are_the_replies_and_nothing_else(make, made):
    (hello,) = rendered(make([{"messages": HELLO}]), made)
    assert [made.decode(hello.input_ids[t.start : t.end]) for t in hello.turns] == [
        "Hi, how are you?",
        "Good, thanks.",
    ]
    (call,) = rendered(make([{"messages": CALL, "tools": TOOLS}]), made)
    texts = [made.decode(call.input_ids[t.start : t.end]) for t in call.turns]
    assert texts[0].endswith("</tool_call>")
    assert texts[1] == "Two degrees, so yes."


@pytest.mark.parametrize(
    "reply",
    [
        "0",
        "10",
        "01",
        "0 and 1",
        "Gr\u00fc\u00dfe \u2026",
        "\n\nspaced  ",
        "<think>\n0\n</think>\n\n0",
        "a<|im_end|>b",
    ],
)
def test_a_reply_of_any_words_ends_where_its_turn_ends(reply, make, made):
    rows = [{"messages": [HELLO[0], {"role": "assistant", "content": reply}, HELLO[2], HELLO[3]]}]
    (example,) = rendered(make(rows, data={"permit": ["control_tokens"]}), made)
    ends = [i for i, token in enumerate(example.input_ids) if token == made.eos_token_id]
    assert [turn.end for turn in example.turns] == [ends[-3], ends[-1]]


def test_shown_marks_what_is_trained_and_only_that(make, made):
    (pair,) = rendered(
        chosen := make([{"prompt": HELLO[:1], "completion": HELLO[1:2]}], data=NO_THINKING), made
    )
    text = render.shown(pair, made, chosen)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n>>Hi, how are you?<|im_end|>\n<<")
    assert text.count(">>") == text.count("<<") == 1
    (both,) = rendered(chosen := make([{"messages": HELLO}], assistant_only_loss=True), made)
    assert (
        render.shown(both, made, chosen)
        .split(">>")[1]
        .startswith("<think>\n\n</think>\n\nHi, how are you?<|im_end|>\n<<<|im_start|>user")
    )
    (full,) = rendered(chosen := make([{"messages": HELLO}], max_length=5), made)
    assert render.shown(full, made, chosen) == f">>{made.decode(full.input_ids[:5])}<<"


def test_characters_show_the_whole_row_and_count_no_tokens(make):
    tokenizer = Characters(render.chat_template("qwen3_5_think", ""))
    (pair,) = rendered(
        chosen := make([{"prompt": HELLO[:1], "completion": HELLO[1:2]}], data=NO_THINKING, max_length=5),
        tokenizer,
    )
    assert render.shown(pair, tokenizer, chosen).endswith(
        "<think>\n\n</think>\n\n>>Hi, how are you?<|im_end|>\n<<"
    )
    counts = render.counts([pair], tokenizer, chosen)
    assert (counts.tokens, counts.supervised, counts.longest) == (None, None, None)
    assert (counts.truncated, counts.dropped, counts.turns, counts.faithful, counts.open_turns) == (
        0,
        0,
        1,
        1,
        0,
    )


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen3", "qwen2_5", "llama3", "gemma3", "phi3"])
@pytest.mark.parametrize("train", [{}, {"assistant_only_loss": True}], ids=["full", "assistant_only"])
def test_characters_render_the_text_and_mask_that_a_tokenizer_renders(template, train, make, with_template):
    tokenizer, stand_in = with_template(template), Characters(render.chat_template(template, ""))
    tokenizer.eos_token = "<|vision_end|>"  # Phi-3 writes one after its own end of turn
    rows = (
        [{"messages": HELLO}]
        if template == "gemma3"
        else [{"messages": HELLO}, {"messages": LEAVES}, {"messages": CALL}]
    )
    rows = rows[:2] if template in ("phi3", "llama3") else rows  # they leave tool calls out
    chosen = make(rows, **train)
    for ours, real in zip(rendered(chosen, stand_in), rendered(chosen, tokenizer), strict=True):
        expected = (
            render.shown(real, tokenizer, chosen)
            .replace("<|vision_start|>", "<bos_token>")
            .replace("<|vision_end|>", "<eos_token>")
        )
        assert render.shown(ours, stand_in, chosen) == expected


@pytest.mark.parametrize(
    ("rows", "train", "found"),
    [
        (TEXTS, {"assistant_only_loss": True}, "rows.jsonl:1 is no conversation"),
        (STRINGS, {"assistant_only_loss": True}, "rows.jsonl:1 is no conversation"),
        (
            MESSAGES,
            {"completion_only_loss": True},
            "rows.jsonl:1 has no completion: all of it would be trained",
        ),
        (TEXTS, {"completion_only_loss": True}, "rows.jsonl:1 has no completion: all of it would be trained"),
    ],
)
def test_a_loss_that_the_rows_cannot_have_is_refused_where_it_is_asked_for(rows, train, found, make, made):
    with pytest.raises(RecipeError, match=f"made.yaml:.*train.{next(iter(train))}: .*{found}"):
        rendered(make(rows, **train), made)


def test_conversations_without_a_chat_template_are_refused_and_text_is_not(make, made):
    tokenizer = copy.deepcopy(made)
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match=r"no chat template\n.*set model.chat_template"):
        rendered(make(MESSAGES), tokenizer)
    assert len(rendered(make(TEXTS), tokenizer)) == 2


def test_a_template_without_a_training_form_is_refused_for_assistant_only_loss(make, made):
    tokenizer = copy.deepcopy(made)
    tokenizer.chat_template += " "
    with pytest.raises(RecipeError, match=r"(?s)train.assistant_only_loss.*data.rows: assistant_turn"):
        rendered(make(MESSAGES, assistant_only_loss=True), tokenizer)


def test_rows_that_the_template_refuses_are_listed_by_line(make, with_template):
    no_user = {"messages": [LEAVES[0], HELLO[1]]}
    with pytest.raises(RecipeError) as caught:
        rendered(
            make([{"messages": HELLO}, no_user, {"messages": LEAVES}, no_user]),
            with_template("qwen3_5_think"),
        )
    assert [p.where.rsplit("/")[-1] for p in caught.value.problems] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert all("No user query found" in p.found for p in caught.value.problems)


def test_more_than_twenty_refused_rows_are_counted(make, with_template):
    with pytest.raises(RecipeError) as caught:
        rendered(make([{"messages": [LEAVES[0], HELLO[1]]}] * 23), with_template("qwen3_5_think"))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].found == "and 3 more faults"


def test_a_chat_template_is_found_by_name_or_file_and_else_the_nearest_is_named(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    assert render.chat_template(str(own), "here") == "{{ messages }}"
    with pytest.raises(
        RecipeError,
        match=r"here: TRL carries no chat template 'qwen3_5_thinks'\n.*did you mean qwen3_5_think\?",
    ):
        render.chat_template("qwen3_5_thinks", "here")
    with pytest.raises(RecipeError, match="No such file"):
        render.chat_template(str(tmp_path / "none.jinja"), "here")
    own.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not UTF-8"):
        render.chat_template(str(own), "here")


def test_an_empty_split_renders_to_nothing(make, made):
    chosen = make(MESSAGES)
    assert render.examples(data.read(chosen, "eval").rows, made, chosen) == []
    assert render.counts([], made, chosen).share("truncated") == 0
