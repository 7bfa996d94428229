"""The gate: every row is read before training, and each fault is named with its file and line."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from lora_recipes.core.errors import RecipeError
from lora_recipes.data import overlap, read
from lora_recipes.data import row as rows
from lora_recipes.recipe import load as recipes

USER = {"role": "user", "content": "Hello there"}
REPLY = {"role": "assistant", "content": "Hi, how are you?"}
SYSTEM = {"role": "system", "content": "Speak kindly."}
LOOK = {"name": "look", "arguments": {}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": LOOK}],
}
ANSWER = {"role": "tool", "content": "two degrees"}
GOOD = {"messages": [USER, REPLY]}


@pytest.fixture
def make(tmp_path):
    """A recipe whose data.train is `sources`; each is a list of rows, the bytes of a file, or a source as a
    recipe has it.
    """

    def write(*sources, **train):
        entries = []
        for number, source in enumerate(sources):
            path = tmp_path / f"{'abc'[number]}.jsonl"
            entry, content = source if isinstance(source, tuple) else ({}, source)
            if isinstance(content, list):
                content = "".join(json.dumps(row) + "\n" for row in content).encode()
            if isinstance(content, bytes):
                path.write_bytes(content)
                entries.append({"path": str(path)} | entry)
            else:
                entries.append(content)
        sections = {
            "model": {"contract": "tiny_qwen35", "weights": "random", "dtype": "float32"},
            "data": {"train": entries},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
            "train": {"learning_rate": 1.0e-3} | train,
        }
        (tmp_path / "made.yaml").write_text(yaml.safe_dump(sections))
        return recipes.load(str(tmp_path / "made.yaml"))

    return write


def faults(chosen):
    """(file:line without folders, found, advice) of every problem that reading data.train finds."""
    with pytest.raises(RecipeError) as caught:
        read.read(chosen, "train")
    return [(p.where.rsplit("/")[-1], p.found, p.do) for p in caught.value.problems]


def numbered(count):
    """That many different good rows."""
    return [{"messages": [USER, {"role": "assistant", "content": f"Reply {i}"}]} for i in range(count)]


def said(split):
    """The replies of a split, to see which rows it holds."""
    return [row.value["messages"][-1]["content"] for row in split.rows]


def test_good_rows_of_each_form_are_read_in_order_with_their_lines(make):
    for raw in (
        GOOD,
        {"messages": [SYSTEM, USER, REPLY, USER, REPLY]},
        {"messages": [USER, REPLY, USER]},
        {"prompt": [SYSTEM, USER], "completion": [REPLY]},
        {"prompt": [USER], "completion": [REPLY, USER, REPLY]},
        {"prompt": "The dog", "completion": " sleeps"},
        {"prompt": "", "completion": "The dog sleeps"},
        {"text": "The dog sleeps."},
    ):
        split = read.read(make([raw, raw]), "train")
        assert [row.where.rsplit("/")[-1] for row in split.rows] == ["a.jsonl:1", "a.jsonl:2"]
        assert [row.value for row in split.rows] == [raw, raw]
        assert split.notes == []


def test_a_recipe_without_eval_has_an_empty_split(make):
    assert read.read(make([GOOD]), "eval").rows == []


BROKEN_LINES = [
    (b'{"messages": [', "broken JSON: Expecting value at column 15"),
    (b"not JSON at all", "broken JSON: Expecting value at column 1"),
    (b'{"a": 1} {"b": 2}', "broken JSON: Extra data at column 10"),
    (b"[1, 2]", "a list, not an object"),
    (b'"text"', "a str, not an object"),
    (b"null", "a NoneType, not an object"),
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at column 14)"),
    (b'{"text": "\\ud83d"}', "half of a surrogate pair (\\ud800..\\udfff)"),
    (b"[" * 100_000, "JSON that Python cannot read: maximum recursion depth exceeded"),
    (b'{"text": ' + b"1" * 5000 + b"}", "JSON that Python cannot read: Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "found"), BROKEN_LINES)
def test_a_broken_line_is_named_by_file_and_number(line, found, make):
    good = json.dumps(GOOD).encode()
    ((where, what, _),) = faults(make(b"\n".join([good, b"", line, good])))
    assert where == "a.jsonl:3"
    assert what.startswith(found)


def test_a_blank_line_a_byte_order_mark_and_crlf_are_fine_and_lines_are_counted_as_an_editor_does(make):
    line = json.dumps(GOOD).encode()
    split = read.read(make(b"\xef\xbb\xbf\r\n" + line + b"\r\n  \r\n\r\n" + line), "train")
    assert [row.where.rsplit(":")[-1] for row in split.rows] == ["2", "5"]
    assert [row.value for row in split.rows] == [GOOD, GOOD]


def test_other_line_separators_within_a_text_begin_no_new_line(make):
    raw = {"text": "one\u2028two\x0bthree\x85four"}
    assert [
        row.value for row in read.read(make(json.dumps(raw, ensure_ascii=False).encode()), "train").rows
    ] == [raw]


ROWS = [
    ({"messages": []}, "messages is empty"),
    ({"messages": "hello"}, "messages is not a list"),
    ({"messages": None}, "no messages, prompt/completion or text, but 'messages' (null)"),
    ({"messages": [{"content": "hello"}, REPLY]}, "messages[0] has no role"),
    ({"messages": ["hello", REPLY]}, "messages[0] has no role"),
    ({"messages": [USER, {"role": "gpt", "content": "hello"}]}, "messages[1] has the unknown role 'gpt'"),
    (
        {"messages": [USER, {"role": ["assistant"], "content": "hello"}]},
        "messages[1] has the unknown role ['assistant']",
    ),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1] content is missing"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1] content is null"),
    ({"messages": [USER, {"role": "assistant", "content": 7}]}, "messages[1] content is of type int"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, REPLY]},
        "messages[0] content is of type list",
    ),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1] content is empty"),
    ({"messages": [USER]}, "messages has no assistant turn"),
    ({"messages": [SYSTEM, USER]}, "messages has no assistant turn"),
    ({"messages": [USER, SYSTEM, REPLY]}, "messages[1] is a system turn, but not the first"),
    ({"messages": [SYSTEM, SYSTEM, USER, REPLY]}, "messages[1] is a system turn, but not the first"),
    ({"messages": [USER, USER, REPLY]}, "messages[1] is the second of two user turns in a row"),
    ({"messages": [USER, REPLY, REPLY]}, "messages[2] is the second of two assistant turns in a row"),
    ({"messages": [REPLY, USER, REPLY]}, "messages[0] is an assistant turn that begins the conversation"),
    ({"messages": [USER, REPLY], "text": "hello"}, "both messages and text"),
    ({"messages": [USER, REPLY], "completion": "hello"}, "both messages and prompt/completion"),
    ({"text": ""}, "text is empty or not a string"),
    ({"text": ["hello"]}, "text is empty or not a string"),
    ({"prompt": "hello"}, "completion is missing or null"),
    ({"prompt": "hello", "completion": None}, "completion is missing or null"),
    ({"completion": "hello"}, "prompt is missing or null"),
    ({"prompt": "hello", "completion": " "}, "completion is empty"),
    (
        {"prompt": [USER], "completion": "hello"},
        "prompt and completion must both be strings, or both be lists of messages",
    ),
    ({"prompt": [], "completion": [REPLY]}, "prompt is empty"),
    ({"prompt": [USER], "completion": []}, "completion is empty"),
    ({"prompt": [USER, REPLY], "completion": [REPLY]}, "the prompt ends with an assistant turn"),
    (
        {"prompt": [USER], "completion": [REPLY, REPLY]},
        "completion[1] is the second of two assistant turns in a row",
    ),
    ({"prompt": [USER], "completion": [USER, REPLY]}, "the completion begins with a user turn"),
    ({"prompt": [USER], "completion": [USER]}, "the completion begins with a user turn"),
    ({"prompt": [USER], "completion": [SYSTEM, REPLY]}, "completion[0] is a system turn, but not the first"),
    (
        {"prompt": [USER, CALL], "completion": [ANSWER, REPLY]},
        ["the prompt ends with an assistant turn", "the completion begins with a tool turn"],
    ),
    ({"messages": [USER, ANSWER, REPLY]}, "messages[1] is a tool turn that follows no assistant turn"),
    ({"messages": [USER, CALL | {"tool_calls": []}]}, "messages[1] content is null"),
    (
        {"messages": [USER, CALL | {"tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}]},
        "messages[1] tool_calls are not as",
    ),
    ({"messages": [USER, CALL | {"tool_calls": "look"}]}, "messages[1] tool_calls are not as"),
    (GOOD | {"tools": "look"}, "tools is not a list of objects"),
    (GOOD | {"tools": ["look"]}, "tools is not a list of objects"),
    (GOOD | {"chat_template_kwargs": "no"}, "chat_template_kwargs is not an object"),
    ({"question": "hello", "id": 3}, "no messages, prompt/completion or text, but 'question', 'id'"),
    ({}, "no messages, prompt/completion or text, but nothing"),
]


@pytest.mark.parametrize(("raw", "found"), ROWS)
def test_a_faulty_row_is_named_once_by_its_line_with_what_is_wrong(raw, found, make):
    expected = [found] if isinstance(found, str) else found
    named = faults(make([GOOD, raw, GOOD]))
    assert [where for where, _, _ in named] == ["a.jsonl:2"] * len(expected)
    assert all(what.startswith(words) for (_, what, _), words in zip(named, expected, strict=True))


def test_every_fault_of_a_row_is_named(make):
    raw = {
        "messages": [
            SYSTEM,
            {"role": "user"},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": 3},
        ],
        "tools": 1,
    }
    assert [what for _, what, _ in faults(make([raw]))] == [
        "messages[1] content is missing",
        "messages[2] is the second of two user turns in a row",
        "messages[2] content is empty",
        "messages[3] content is of type int",
        "tools is not a list of objects",
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, CALL, ANSWER, REPLY],
        [USER, CALL, ANSWER, ANSWER, REPLY],
        [USER, {k: v for k, v in CALL.items() if k != "content"}, ANSWER, REPLY],
        [USER, CALL | {"content": ""}, ANSWER | {"content": ""}, REPLY],
        [USER, CALL | {"tool_calls": [LOOK]}],
        [USER, REPLY | {"tool_calls": None}],
    ],
)
def test_tool_calls_need_no_content_and_a_tool_may_return_nothing(messages):
    assert rows.faults({"messages": messages}) == []


def test_tools_may_be_json_text_as_trl_takes_them_and_nulls_are_absent(make):
    tools = [{"type": "function", "function": {"name": "look"}}]
    split = read.read(
        make([GOOD | {"tools": json.dumps(tools), "text": None}, GOOD | {"tools": None}]), "train"
    )
    assert [row.value for row in split.rows] == [GOOD | {"tools": tools}, GOOD]
    assert split.notes == []


@pytest.mark.parametrize(
    ("raw", "advice"),
    [
        ({"messages": [{"from": "human", "value": "Hi"}]}, ["sharegpt", "{conversations: messages}"]),
        ({"conversations": [USER, REPLY]}, ["{messages: conversations}"]),
        ({"conversation": [USER, REPLY]}, ["{messages: conversation}"]),
        ({"instruction": "Sum up", "context": "x", "response": "y"}, ["{input: ..., output: ...}"]),
        ({"question": "Sum up", "answer": "y"}, ["{prompt: question, completion: answer}"]),
        ({"messages": [USER, {"role": "bot", "content": "Hi"}]}, ["one of system, user, assistant, tool"]),
    ],
)
def test_rows_in_the_form_of_another_tool_are_told_how_to_convert(raw, advice, make):
    assert all(any(words in do for _, _, do in faults(make([raw]))) for words in advice)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (GOOD, {"text": "hello"}),
        ({"text": "hello"}, GOOD),
        (GOOD, {"prompt": [USER], "completion": [REPLY]}),
        ({"prompt": [USER], "completion": [REPLY]}, {"prompt": "Hi", "completion": "hello"}),
    ],
)
def test_rows_of_another_schema_than_the_first_are_named(first, other, make):
    named = faults(make([first, first, other], [other, first]))
    assert [where for where, _, _ in named] == ["a.jsonl:3", "b.jsonl:1"]
    assert all("mixed schemas" in what and "a.jsonl:1 is" in what for _, what, _ in named)
    assert all(what.split(", but")[0] not in what.split(", but")[1] for _, what, _ in named)


def test_the_schema_is_set_by_the_first_sound_row_and_a_weight_does_not_repeat_its_faults(make):
    named = faults(make(({"weight": 2}, [{"messages": []}, GOOD, {"text": "hello"}])))
    assert [(where, what.split(",")[0]) for where, what, _ in named] == [
        ("a.jsonl:1", "messages is empty"),
        ("a.jsonl:3", "text"),
    ]


def test_the_first_twenty_faults_are_listed_and_the_rest_counted(make):
    bad = {"messages": [USER]}
    named = faults(make([GOOD] + [bad] * 30))
    assert [where for where, _, _ in named] == [*(f"a.jsonl:{n}" for n in range(2, 22)), "data.train"]
    assert named[-1][1] == "and 10 more faults"
    assert len(faults(make([bad] * 20))) == 20
    assert faults(make([bad] * 21))[-1][1] == "and 1 more fault"


def test_faults_of_all_sources_are_named_at_once_and_a_file_given_twice_only_once(make, tmp_path):
    bad = tmp_path / "twice.jsonl"
    bad.write_text('{"messages": []}\n')
    named = faults(make([{"text": 1}], str(tmp_path / "gone.jsonl"), str(bad)))
    assert [where.split(" ")[0] for where, _, _ in named] == ["a.jsonl:1", "made.yaml:4", "twice.jsonl:1"]
    assert len(faults(make(str(bad), str(bad)))) == 1


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("{}/gone.jsonl", "cannot be read (No such file or directory)"),
        ("{}/gone", "cannot be read (No such file or directory)"),
        ("data/none/gone.csv", "cannot be read (No such file or directory)"),
        ("gone.parquet", "cannot be read (No such file or directory)"),
        ("{}/*.jsonl", "matches no file"),
        ("none/*.jsonl", "matches no file"),
    ],
)
def test_a_path_that_is_no_file_is_named_where_the_recipe_gives_it(path, found, make, tmp_path):
    ((where, what, do),) = faults(make(path.format(tmp_path)))
    assert where.startswith("made.yaml:")
    assert "data.train[0]" in where
    assert found in what
    assert "JSONL" in do


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_named_also_beside_a_full_one(content, make):
    ((where, what, _),) = faults(make([GOOD], content))
    assert "made.yaml" in where
    assert "data.train[1]" in where
    assert what.endswith("b.jsonl has no rows")
    assert [found for _, found, _ in faults(make([{"messages": []}], content))][1].endswith(
        "b.jsonl has no rows"
    )


def test_a_utf_16_file_is_answered_once(make):
    named = faults(make("\n".join([json.dumps(GOOD)] * 3).encode("utf-16")))
    assert [(where, what) for where, what, _ in named] == [("a.jsonl:1", "UTF-16, not UTF-8")]


def test_hub_options_on_a_file_are_refused_not_ignored(make):
    assert "split would be ignored" in faults(make(({"split": "test"}, [GOOD])))[0][1]


def test_the_text_field_of_the_recipe_is_the_text(make):
    split = read.read(
        make([{"body": "The dog sleeps.", "text": "unused"}], dataset_text_field="body"), "train"
    )
    assert [row.value for row in split.rows] == [{"text": "The dog sleeps."}]
    assert split.rows[0].format == "text"
    assert split.notes == ["train: fields not used for training: text"]
    ((_, what, _),) = faults(make([{"text": "The dog sleeps."}], dataset_text_field="body"))
    assert what == "no messages, prompt/completion or body, but 'text'"


def test_fields_that_are_not_trained_on_are_noted(make):
    split = read.read(make([GOOD | {"topic": "dogs", "id": 1}, GOOD | {"mood": None}]), "train")
    assert split.notes == ["train: fields not used for training: id, topic"]
    assert [row.value for row in split.rows] == [GOOD, GOOD]


@pytest.mark.parametrize(
    ("weight", "count"), [(1, 10), (0.5, 5), (2, 20), (1.5, 15), (0.04, None), (0.06, 1), (0.25, 2)]
)
def test_a_weight_gives_its_share_of_the_rows_every_time_the_same(weight, count, make):
    chosen = make(({"weight": weight}, numbered(10)))
    if count is None:
        ((_, what, _),) = faults(chosen)
        assert what == "weight 0.04 of 10 rows is no row"
        return
    first, again = read.read(chosen, "train"), read.read(chosen, "train")
    assert len(first.rows) == count
    assert first.sha256 == again.sha256
    replies = said(first)
    whole, part = replies[: int(weight) * 10], replies[int(weight) * 10 :]
    assert whole == [f"Reply {i}" for i in range(10)] * int(weight)
    assert part == sorted(set(part))


def test_the_same_share_is_drawn_whatever_the_seed_and_sources_follow_one_another(make):
    half = {"weight": 0.5}
    drawn = {tuple(said(read.read(make((half, numbered(10)), seed=seed), "train"))) for seed in range(5)}
    assert len(drawn) == 1
    split = read.read(make((half, numbered(10)), numbered(2)), "train")
    assert said(split)[-2:] == ["Reply 0", "Reply 1"]
    assert len(split.rows) == 7


def repeated(split):
    digests = np.array([overlap.digest(overlap.plain(row)) for row in split.rows])
    found = overlap.repeated(digests, lambda i: split.rows[i].where)
    return [row.where.rsplit(":")[-1] for row, twice in zip(split.rows, found, strict=True) if twice]


def test_duplicates_are_later_rows_with_the_same_content_but_not_the_copies_of_a_weight(make):
    split = read.read(make([*numbered(2), numbered(1)[0] | {"id": 7}]), "train")
    assert repeated(split) == ["3"]
    assert repeated(read.read(make(({"weight": 3}, numbered(2))), "train")) == []


def test_rows_in_both_splits_are_found_by_content(make):
    train, other = read.read(make(numbered(3)), "train"), read.read(make(numbered(4)[2:]), "train")
    assert [row.where.rsplit(":")[-1] for row in read.in_both(train.rows, other.rows)] == ["1"]


def test_the_hash_follows_content_and_order_alone(make):
    one, two = numbered(2)
    hashes = [
        read.read(make(rows), "train").sha256
        for rows in ([one, two], [one | {"id": 1}, two], [two, one], [one])
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_each_assistant_turn_becomes_a_row_with_its_history_as_the_prompt(make):
    options = {"tools": [{"name": "look"}], "chat_template_kwargs": {"enable_thinking": False}}
    split = read.by_assistant_turn(
        read.read(make([{"messages": [USER, REPLY, USER, REPLY, USER]} | options | {"id": 1}]), "train")
    )
    assert [row.value for row in split.rows] == [
        {"prompt": [USER], "completion": [REPLY]} | options,
        {"prompt": [USER, REPLY, USER], "completion": [REPLY]} | options,
    ]
    assert [row.where.rsplit("/")[-1] for row in split.rows] == ["a.jsonl:1#2", "a.jsonl:1#4"]
    assert split.notes == ["train: fields not used for training: id"]


def test_a_completion_of_several_assistant_turns_is_split_and_one_of_a_single_turn_is_kept(make):
    pair = {"prompt": [USER, REPLY, USER], "completion": [CALL, ANSWER, REPLY]}
    single = {"prompt": [USER], "completion": [REPLY]}
    turns = read.by_assistant_turn(read.read(make([pair, single]), "train")).rows
    assert [(row.value["prompt"], row.value["completion"]) for row in turns] == [
        ([USER, REPLY, USER], [CALL]),
        ([USER, REPLY, USER, CALL, ANSWER], [REPLY]),
        ([USER], [REPLY]),
    ]
    strings = read.read(make([{"prompt": "Hi", "completion": " there"}]), "train")
    assert read.by_assistant_turn(strings).rows == strings.rows


@pytest.mark.parametrize("name", ["nobody-here/no-such-data-set", "no-such-data-set"])
def test_a_hub_data_set_that_is_not_there_is_one_error_within_seconds(name, make):
    began = time.monotonic()
    ((where, what, do),) = faults(make([GOOD], {"path": name, "split": "train", "revision": "main"}))
    assert time.monotonic() - began < 20  # the hub's client alone retries for 23 s without a network
    assert "made.yaml" in where
    assert "data.train[1]" in where
    assert what.startswith(f"the data set {name} cannot be loaded: ")
    assert "\n" not in what
    assert ".jsonl" in do


def test_the_gate_imports_no_torch():
    code = (
        "import sys; import lora_recipes.data.read; sys.exit('torch' in sys.modules or 'datasets' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
