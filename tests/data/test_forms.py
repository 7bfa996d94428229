"""The forms in which rows come: each gives the rows of `messages`, in doubt the key to set is named; and what
is broken in a row or a file is a fault at its place, never a traceback.
"""

import gzip
import json
import random
import re
from typing import Any

import pytest
import yaml

from lora_recipes.core.errors import RecipeError
from lora_recipes.data import gate, read
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from tests.data.test_sources import load, parquet, table, zstd

ASKED = [("Where is the cat?", "On the sofa."), ("And\nthe dog?", 'It said "woof".'), ("When?", "At nine.")]
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Speak kindly."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }
    for asked, answer in ASKED
]
FROM = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT: list[dict[str, Any]] = [
    {"conversations": [{"from": FROM[m["role"]], "value": m["content"]} for m in row["messages"]]}
    for row in CHATS
]
ALPACA: list[dict[str, Any]] = [
    {
        "instruction": asked.split("\n")[0],
        "input": "\n".join(asked.split("\n")[1:]),
        "output": answer,
        "system": "Speak kindly.",
        "history": [["Hi", "Hello."]],
    }
    for asked, answer in ASKED
]
BESIDE: list[dict[str, Any]] = [{"messages": row["messages"][1:], "system": "Speak kindly."} for row in CHATS]


def renamed(given, **names):
    return [{names.get(k, k): v for k, v in row.items()} for row in given]


def rows_of(tmp_path, given, name="a.jsonl", **data):
    content = given if isinstance(given, bytes) else "".join(json.dumps(row) + "\n" for row in given).encode()
    (tmp_path / name).write_bytes(content)
    return read.read(
        load(tmp_path, [{"path": str(tmp_path / name)} | data.pop("entry", {})], **data), "train"
    )


def faults(tmp_path, given, **data):
    with pytest.raises(RecipeError) as caught:
        rows_of(tmp_path, given, **data)
    return [(p.where.rsplit("/")[-1], p.found, p.do) for p in caught.value.problems]


FORMS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (SHAREGPT, {}),
    (ALPACA, {}),
    (BESIDE, {}),
    (SHAREGPT, {"format": "sharegpt"}),
    (renamed(CHATS, messages="chat"), {"columns": {"messages": "chat"}}),
    (renamed(SHAREGPT, conversations="chat"), {"columns": {"conversations": "chat"}}),
    (renamed(SHAREGPT, conversations="messages"), {"columns": {"conversations": "messages"}}),
    (renamed(ALPACA, output="response", system="sys"), {"columns": {"output": "response", "system": "sys"}}),
    ([row | {"text": "all of it"} for row in ALPACA], {"format": "alpaca"}),
    ([row | {"prompt": "other"} for row in CHATS], {"format": "messages"}),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_a_chat_in_any_form_is_the_row_of_messages(number, tmp_path):
    given, keys = FORMS[number]
    plain = rows_of(tmp_path, CHATS).sha256
    for how in ({**keys}, {"entry": keys}):
        split = rows_of(tmp_path, given, **how)
        assert [row.value for row in split.rows] == CHATS
        assert split.sha256 == plain
    assert rows_of(tmp_path, table(given), "a.csv", **keys).sha256 == plain
    assert rows_of(tmp_path, parquet(given), "a.parquet", **keys).sha256 == plain


def test_the_tokens_of_each_form_are_those_of_messages(tmp_path):
    def tokens(given, **data):
        rows_of(tmp_path, given)
        chosen = load(tmp_path, [str(tmp_path / "a.jsonl")], **data)
        return [e.input_ids for e in gate.pass_through(resolve(chosen, tmp_path / "out"), False).train]

    wanted = tokens(CHATS)
    assert len(wanted) == 3
    assert tokens(SHAREGPT) == tokens(ALPACA) == tokens(BESIDE) == wanted


def test_pairs_and_texts_take_names_of_their_own_and_sources_differ(tmp_path):
    pairs = [{"question": a, "answer": b} for a, b in ASKED]
    split = rows_of(tmp_path, pairs, columns={"prompt": "question", "completion": "answer"})
    assert [row.value for row in split.rows] == [{"prompt": a, "completion": b} for a, b in ASKED]
    split = rows_of(tmp_path, [{"body": a, "text": b} for a, b in ASKED], columns={"text": "body"})
    assert [row.value for row in split.rows] == [{"text": a} for a, _ in ASKED]
    assert split.notes == ["train: fields not used for training: text"]
    (tmp_path / "b.jsonl").write_text(json.dumps(SHAREGPT[0]) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps(renamed(CHATS, messages="chat")[1]) + "\n")
    chosen = load(tmp_path, ["b.jsonl", {"path": "c.jsonl", "columns": {"messages": "chat"}}])
    assert [row.value for row in read.read(chosen, "train").rows] == CHATS[:2]


def test_the_plan_says_which_form_was_found_and_what_it_does(tmp_path):
    assert rows_of(tmp_path, SHAREGPT).notes == [
        "train: 3 rows read as sharegpt (data.format): from/value are messages"
    ]
    first, second = rows_of(tmp_path, ALPACA).notes
    assert "3 rows read as alpaca (data.format): instruction, a line break and input" in first
    assert second == "train: the system column of 3 rows is their system turn"


TURN = {"from": "human", "value": "Hi"}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (ALPACA[0] | {"text": "all"}, {}, "both instruction/output and text: alpaca or text", "set data.format"),
    (SHAREGPT[0] | CHATS[0], {}, "both messages and conversations: messages or sharegpt", "set data.format"),
    (CHATS[0] | {"text": "all"}, {}, "both messages and text", "set data.format"),
    (CHATS[0], {"format": "sharegpt"}, "no conversations (format: sharegpt), but 'messages'", "data.columns"),
    ({"conversations": [TURN | {"from": "bard"}]}, {}, "conversations[0] has the unknown from 'bard'", "gpt"),
    ({"conversations": [TURN | {"from": ["gpt"]}]}, {}, "conversations[0] has the unknown from", "gpt"),
    ({"conversations": [{"from": "gpt"}]}, {}, "conversations[0] has no from and value", "a turn is"),
    ({"conversations": "Hi"}, {}, "conversations is not a list", "from"),
    ({"conversations": []}, {}, "messages is empty", ""),
    (ALPACA[0] | {"history": ["Hi"]}, {}, "history is not a list of pairs", "question"),
    (ALPACA[0] | {"input": 7}, {}, "input is not a text", "one turn"),
    (ALPACA[0] | {"output": ""}, {}, "messages[3] content is empty", ""),
    (CHATS[0] | {"system": "Bark."}, {}, "system, beside a system turn that says something else", "keep one"),
    (BESIDE[0] | {"system": 7}, {}, "system is not a text", "system turn"),
    (CHATS[0] | {"functions": [1]}, {}, "functions would not be trained on", "data.columns: {tools"),
    (CHATS[0], {"columns": {"system": "sys"}}, "no row has the column 'sys' (columns.system)", "messages"),
    ({"text": "a", "sys": "b"}, {"columns": {"system": "sys"}}, "system would not be trained on", "texts"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_in_doubt_or_wrong_in_a_form_is_named_with_what_to_do(number, tmp_path):
    raw, keys, found, do = REFUSED[number]
    where, what, advice = faults(tmp_path, [raw], **keys)[0]
    assert what.startswith(found)
    assert do in advice
    assert where in ("a.jsonl:1", "made.yaml:5 data.train[0]")


def test_unknown_formats_and_columns_and_other_tools_words_are_answered(tmp_path):
    for data, said in (
        ({"format": "chatml"}, "sharegpt"),
        ({"columns": {"message": "chat"}}, "messages"),
        ({"formatting": "sharegpt"}, "data.format"),
        ({"type": "alpaca"}, "data.format"),
        ({"field_messages": "chat"}, "data.columns"),
    ):
        with pytest.raises(RecipeError, match=said):
            load(tmp_path, ["a.jsonl"], **data)
    with pytest.raises(RecipeError, match=r"data\.format"):
        load(tmp_path, [{"path": "a.jsonl", "type": "sharegpt"}])


def test_two_names_for_the_column_of_texts_are_refused(tmp_path):
    load(tmp_path, ["a.jsonl"], columns={"text": "body"})
    text = (tmp_path / "made.yaml").read_text()
    (tmp_path / "made.yaml").write_text(text + "  dataset_text_field: body\n")
    with pytest.raises(RecipeError, match=r"train.dataset_text_field: data.columns.text names the column"):
        recipes.load(str(tmp_path / "made.yaml"))


ANY: list[Any] = [
    None,
    7,
    -0.5,
    True,
    "",
    " ",
    "x",
    [],
    {},
    [[]],
    [{}],
    {"role": 1},
    "\ud83d",
    "\x00",
    "[{",
    10**400,
]
PLACE = re.compile(r"rows\.[a-z.]+(:\d+| row \d+)?$|made\.yaml:\d+ data\.train.*|data\.train$")


def mutated(value, choose):
    """`value` with one thing in it, at any depth, replaced, renamed, doubled or removed."""
    value = json.loads(json.dumps(value))
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return value
        key = choose.choice(keys)
        if isinstance(holder[key], dict | list) and holder[key] and choose.random() < 0.8:
            holder = holder[key]
            continue
        how = choose.randrange(4)
        if how == 0 or not isinstance(holder, dict):
            holder[key] = choose.choice(ANY)
        elif how == 1:
            holder[choose.choice(["role", "from", "text", "tools", "system", "zz"])] = holder.pop(key)
        elif how == 2:
            holder[choose.choice(["messages", "prompt", "history", "weight"])] = choose.choice(ANY)
        else:
            del holder[key]
        return value


def damaged(content, choose):
    """`content` cut off, with bytes changed, in another encoding or packed and cut."""
    how, at = choose.randrange(5), choose.randrange(max(len(content), 1))
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + bytes([choose.randrange(256)]) * choose.randrange(1, 9) + content[at + 1 :]
    if how == 2:
        return content.decode("utf-8", "replace").encode(
            choose.choice(["utf-16", "utf-16-be", "latin-1"]), "replace"
        )
    packed = choose.choice([gzip.compress, zstd])(content)
    return packed if how == 3 else packed[: choose.randrange(1, len(packed))]


def test_three_hundred_mutated_rows_and_files_give_rows_or_faults_at_a_place(tmp_path):
    choose = random.Random(5)
    kinds: dict[str, Any] = {
        "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "json": lambda rows: json.dumps(rows).encode(),
        "csv": table,
        "parquet": parquet,
    }
    chosen: Any = None
    refused = 0
    for number in range(300):
        given: list[Any] = choose.choice([CHATS, SHAREGPT, ALPACA, BESIDE])
        kind = choose.choice(list(kinds))
        if number % 2 and kind in ("jsonl", "json"):
            content = kinds[kind]([given[0], mutated(given[1], choose), given[2]])
        else:
            content = damaged(kinds[kind](given), choose)
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(content)
        if number == 0:
            chosen = load(tmp_path, [str(path)])
        text = yaml.safe_dump(chosen.sections | {"data": {"train": [str(path)]}})
        (tmp_path / "made.yaml").write_text(text)
        try:
            split = read.read(recipes.load(str(tmp_path / "made.yaml")), "train")
        except RecipeError as error:
            refused += 1
            for problem in error.problems:
                assert PLACE.search(problem.where), (number, problem)
                assert problem.found
        else:
            assert split.rows
            split.sha256.encode()
    assert 100 < refused < 300
