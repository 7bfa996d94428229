"""`lora-recipes data convert`: the same chat from any tool and file is the same row."""

import json
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lora_recipes.__main__ import main

CHAT = [{"role": "user", "content": "Who?\nMe"}, {"role": "assistant", "content": "You."}]
SHAREGPT = {"conversations": [{"from": "human", "value": "Who?\nMe"}, {"from": "gpt", "value": "You."}]}
ALPACA = {"instruction": "Who?", "input": "Me", "output": "You."}
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Who?\n"}, {"type": "text", "text": "Me"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "You."}]},
]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "openai": {"messages": PARTS},
}


def converted(tmp_path, name, *words):
    code = main(["data", "convert", str(tmp_path / name), str(tmp_path / "o.jsonl"), "--overwrite", *words])
    assert code == 0
    lines = (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads((tmp_path / "o.report.json").read_text())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_the_same_chat_becomes_the_same_row(tmp_path, form, kind):
    row, file = FORMS[form], tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    elif kind == "csv":
        cells = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
        quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
        file.write_text(f"{','.join(row)}\n{','.join(quoted)}\n")
    else:
        file.write_text(json.dumps([row] if kind == "json" else row))
    rows, report = converted(tmp_path, file.name)
    assert rows == [{"messages": CHAT}] and not report["dropped"]
    assert (form == "openai") == ("texts of a content are joined" in report["noted"])


def test_calls_of_openai_are_what_templates_read(tmp_path):
    said = {"name": "add", "arguments": '{"a": 1}'}
    newer = [
        CHAT[0],
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": said}]},
    ]
    older = [CHAT[0], {"role": "assistant", "content": None, "function_call": said}]
    result = [{"role": "function", "name": "add", "content": "1"}, CHAT[1]]
    tool = {"name": "add", "parameters": {"type": "object"}}
    (tmp_path / "a.jsonl").write_text(
        json.dumps(
            {"messages": [{"role": "developer", "content": "Add."}, *newer], "parallel_tool_calls": True}
        )
        + "\n"
        + json.dumps({"messages": [*older, *result], "functions": [tool]})
    )
    (first, second), report = converted(tmp_path, "a.jsonl")
    function = {"name": "add", "arguments": {"a": 1}}
    assert first["messages"][0] == {"role": "system", "content": "Add."}
    assert first["messages"][2]["tool_calls"][0]["function"] == function
    assert second["messages"][1]["tool_calls"] == [{"type": "function", "function": function}]
    assert second["messages"][2]["role"] == "tool"
    assert second["tools"] == [{"type": "function", "function": tool}]
    assert report["noted"]["field parallel_tool_calls is not carried over"]["count"] == 1
    assert report["noted"]["arguments of a call are objects"]["count"] == 2


def test_what_has_no_place_is_said_and_kept_where_asked(tmp_path):
    lines = [SHAREGPT | {"id": 1, "source": "a"}, {"chosen": "a", "rejected": "b"}, {"messages": CHAT[:1]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, report = converted(tmp_path, "a.jsonl", "--keep", "source")
    assert rows == [{"messages": CHAT, "source": "a"}]
    assert list(report["noted"]) == ["field id is not carried over"]
    found = [e["text"] for e in report["dropped"]["could not be trained"]["examples"]]
    assert found == ["chosen and rejected, but no completion", "messages has no assistant turn"]


def test_columns_of_other_names_are_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("question,answer\nWho?,You.\n")
    rows, _ = converted(tmp_path, "a.csv", "--column", "prompt=question", "--column", "completion=answer")
    assert rows == [{"prompt": "Who?", "completion": "You."}]
    words = ["data", "convert", str(tmp_path / "a.csv"), str(tmp_path / "p.jsonl")]
    assert main([*words, "--column", "prompt=asked"]) == 2
    assert "no row has the column 'asked' (columns.prompt)" in capsys.readouterr().err
