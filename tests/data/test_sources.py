"""Files of every kind give the rows that JSONL gives, and what is broken in one is named where it stands."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from lora_recipes.core.errors import RecipeError
from lora_recipes.data import read, sources
from lora_recipes.recipe import load as recipes

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "the sky"}}}
CHATS = [
    {
        "messages": [
            {"role": "system", "content": 'Speak\nkindly, "please".'},
            {"role": "user", "content": f"Frage {i}: h\u00f6rst du?"},
            {"role": "assistant", "content": f"Yes, {i}."},
        ]
    }
    for i in range(3)
] + [
    {
        "messages": [
            {"role": "user", "content": "Is it clear?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "clear"},
            {"role": "assistant", "content": "It is."},
        ]
    }
]
PAIRS = [{"prompt": f'Say\n{i}, "twice"', "completion": f" {i}\t{i}, ok"} for i in range(4)]


def load(tmp_path, entries, which="train", **data):
    """A recipe whose data.train (or `which`) is `entries`; other keys of data by name."""
    train = {"train": str(tmp_path / "train.jsonl")} if which != "train" else {}
    sections = {
        "model": {"contract": "tiny_qwen35", "weights": "random", "dtype": "float32"},
        "data": train | {which: entries} | data,
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
        "train": {"learning_rate": 1.0e-3},
    }
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(sections))
    return recipes.load(str(tmp_path / "made.yaml"))


def rows(tmp_path, entries, **data):
    return read.read(load(tmp_path, entries, **data), "train")


def faults(tmp_path, entries, **data):
    """(place without folders, found, advice) of every fault."""
    with pytest.raises(RecipeError) as caught:
        rows(tmp_path, entries, **data)
    return [(p.where.rsplit("/")[-1], p.found, p.do) for p in caught.value.problems]


def jsonl(given):
    return "".join(json.dumps(row) + "\n" for row in given).encode()


def table(given, delimiter=","):
    """CSV or TSV; what is no text in a row stands as JSON."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(given[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in given)
    return out.getvalue().encode()


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def parquet(given):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def written(folder, kind, given) -> Path:
    """The rows as a file of this kind: `csv`, `json.gz`, ..."""
    make = {
        "jsonl": jsonl,
        "json": lambda g: json.dumps(g, indent=1).encode(),
        "csv": table,
        "tsv": lambda g: table(g, "\t"),
        "parquet": parquet,
    }
    name, _, packed = kind.partition(".")
    content = make[name](given)
    if packed:
        content = gzip.compress(content) if packed == "gz" else zstd(content)
    file = folder / f"rows.{kind}"
    file.write_bytes(content)
    return file


KINDS = [
    "json",
    "csv",
    "tsv",
    "parquet",
    *(f"{k}.{p}" for k in ("jsonl", "json", "csv") for p in ("gz", "zst")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [CHATS, PAIRS], ids=["chats", "pairs"])
def test_a_file_of_any_kind_gives_the_rows_and_the_hash_of_jsonl(kind, given, tmp_path):
    plain = rows(tmp_path, str(written(tmp_path, "jsonl", given)))
    split = rows(tmp_path, str(written(tmp_path, kind, given)))
    assert [row.value for row in split.rows] == given
    assert split.sha256 == plain.sha256
    assert split.notes == []


def test_a_row_is_named_by_the_line_where_it_begins_or_by_its_number_from_0(tmp_path):
    def places(kind):
        return [row.where.rsplit("/")[-1] for row in rows(tmp_path, str(written(tmp_path, kind, PAIRS))).rows]

    assert places("csv") == [f"rows.csv:{n}" for n in (2, 4, 6, 8)]  # the prompts have two lines each
    assert places("jsonl.gz") == [f"rows.jsonl.gz:{n}" for n in (1, 2, 3, 4)]
    assert places("parquet") == [f"rows.parquet row {n}" for n in range(4)]
    assert places("json") == [f"rows.json row {n}" for n in range(4)]


def test_a_byte_order_mark_and_blank_lines_are_fine_in_csv_and_arrays(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfprompt,completion\r\n\r\nHi,Hello\r\n")
    (row,) = rows(tmp_path, str(file)).rows
    assert (row.value, row.where[-4:]) == ({"prompt": "Hi", "completion": "Hello"}, "sv:3")
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(CHATS).encode())
    assert len(rows(tmp_path, str(file)).rows) == 4


def test_a_folder_and_a_glob_are_their_files_in_order_of_name_and_the_plan_says_which(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, given in (("b.jsonl", PAIRS[2:]), ("a.jsonl", PAIRS[:2])):
        (folder / name).write_bytes(jsonl(given))
    (folder / "README.md").write_text("not rows")
    for source in (str(folder), str(folder / "*.jsonl"), "rows/*.jsonl", "rows"):
        split = rows(tmp_path, source)
        assert [row.value for row in split.rows] == PAIRS
        assert split.notes == [f"train: 2 files of {source}: a.jsonl, b.jsonl"]
    listed = rows(tmp_path, [str(folder / "b.jsonl"), {"path": "rows/a.jsonl", "weight": 2}])
    assert [row.value for row in listed.rows] == PAIRS[2:] + PAIRS[:2] * 2


def test_a_glob_means_the_same_files_in_the_copy_of_a_recipe_elsewhere(tmp_path):
    (tmp_path / "x1.jsonl").write_bytes(jsonl(PAIRS))
    assert load(tmp_path, ["x*.jsonl"]).anywhere()["data"]["train"] == [str(tmp_path.resolve() / "x*.jsonl")]


def test_eval_and_kept_take_the_same_sources(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(jsonl(PAIRS))
    for which in ("eval", "kept"):
        chosen = load(tmp_path, [str(written(tmp_path, "csv.gz", PAIRS))], which)
        assert [row.value for row in read.read(chosen, which).rows] == PAIRS


GOOD = jsonl(PAIRS)
CSV = b"prompt,completion\n"
BROKEN = [
    (
        "a.jsonl.gz",
        gzip.compress(GOOD * 50)[:-20],
        "a.jsonl.gz",
        "a broken packed file: Compressed file ended",
    ),
    ("a.jsonl.gz", b"\x1f\x8b" + b"x" * 50, "a.jsonl.gz", "a broken packed file"),
    ("a.jsonl.gz", GOOD, "a.jsonl.gz", "no gz file, as its name says"),
    ("a.jsonl.zst", zstd(GOOD)[:-4], "a.jsonl.zst", "a broken packed file"),
    ("a.jsonl.zst", gzip.compress(GOOD), "a.jsonl.zst", "no zst file, as its name says"),
    ("a.parquet", parquet(PAIRS)[:-9], "a.parquet row 0", "a broken Parquet file"),
    ("a.parquet", GOOD, "a.parquet row 0", "a broken Parquet file"),
    ("a.jsonl", b"PK\x03\x04more", "a.jsonl", "a zip archive"),
    ("a.json", b'{\n "data": []\n}', "a.json:1", "a JSON object over several lines"),
    ("a.json", b"[\n{}\n,\n7, {]", "a.json row 0", "no messages, prompt/completion or text, but nothing"),
    ("a.json", b'[{"text": "a"}] x', "a.json:1", "something follows the JSON array"),
    ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', "a.json:3", "broken JSON: the array does not end here"),
    ("a.json", b'[\n{"text": "a"},\n{"text": ', "a.json:3", "broken JSON: Expecting value at column 10"),
    ("a.json", b'[{"text": "a", "text": "b"}, {"text": "c"}]', "a.json row 0", "the key 'text' stands twice"),
    ("a.json", b'[\n{"text": "caf\xe9"}]', "a.json:2", "not UTF-8 (byte 0xe9)"),
    ("a.json", b'[{"text": "\\ud83d"}]', "a.json row 0", "half of a surrogate pair"),
    ("a.json", b"[" * 100_000, "a.json:1", "JSON that Python cannot read"),
    (
        "a.json",
        b"[" + b" " * 40 + json.dumps([GOOD.decode()]).encode()[1:],
        "a.json row 0",
        "a str, not an object",
    ),
    ("a.csv", CSV + b"Hi,Hello,again\n", "a.csv:2", "3 columns, but the header has 2"),
    (
        "a.csv",
        b"messages\nHi\n",
        "a.csv:2",
        "messages is not a list, and its text is no JSON (Expecting value",
    ),
    (
        "a.csv",
        b'messages\n"[{""role"": ""user"", ""role"": ""system"", ""content"": ""Hi""}]"\n',
        "a.csv:2",
        "messages is not a list, and the key 'role' stands twice",
    ),
    ("a.csv", CSV + b"Hi\n", "a.csv:2", "1 columns, but the header has 2"),
    ("a.csv", b"text,text\na,b\n", "a.csv:1", "the column 'text' stands twice in the header"),
    ("a.csv", b"prompt;completion\na;b\n", "a.csv:1", "one column, 'prompt;completion': ';' separates here"),
    ("a.tsv", b"prompt,completion\na,b\n", "a.tsv:1", "one column, 'prompt,completion': ',' separates here"),
    ("a.csv", CSV + b'"Hi\nthere,Hello\n' * 3, "a.csv:2", "broken CSV: ',' expected after '\"'"),
    ("a.csv", CSV + b'Hi,"Hello\n', "a.csv:2", "broken CSV: unexpected end of data"),
    ("a.csv", CSV + b"a,b\nHi,caf\xe9\n", "a.csv:3", "not UTF-8 (byte 0xe9 in column completion)"),
    ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "a.csv:1", "UTF-16, not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "where", "found"), BROKEN)
def test_a_broken_file_is_named_where_it_breaks(name, content, where, found, tmp_path):
    (tmp_path / name).write_bytes(content)
    named = faults(tmp_path, str(tmp_path / name))
    assert named[0][0] == where
    assert named[0][1].startswith(found)


@pytest.mark.parametrize(
    ("names", "found", "do"),
    [
        ([], "is a folder without a data file", "JSONL, a JSON array"),
        (["inner/a.jsonl"], "is a folder without a data file", "it has the folders inner"),
        (["a.csv", "b.jsonl"], "has files of several kinds: .csv, .jsonl", "by a glob, e.g. *.csv"),
        (["a.jsonl", "a.jsonl.gz"], "has a.jsonl both packed and not", "remove one"),
        (["train.jsonl", "x-test.jsonl"], "holds train.jsonl beside x-test.jsonl", "name the files of each"),
        (["dataset_info.json", "state.json"], "is a folder of datasets.save_to_disk (Arrow)", "to_parquet"),
    ],
)
def test_a_folder_that_is_not_one_source_is_refused(names, found, do, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(GOOD)
    ((where, what, advice),) = faults(tmp_path, [str(folder)])
    assert (where, what) == ("made.yaml:2 data.train[0]", f"{folder} {found}") or what.endswith(found)
    assert do in advice


def test_an_empty_file_of_a_folder_is_named(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    (folder / "b.jsonl").write_bytes(b"\n")
    ((_, what, _),) = faults(tmp_path, str(folder))
    assert what.endswith("b.jsonl has no rows")


def test_a_row_and_an_array_beyond_their_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE", 1000)
    monkeypatch.setattr(sources, "ARRAY", 2000)
    (tmp_path / "a.csv").write_bytes(CSV + b'Hi,"' + b"x\n" * 600)
    assert faults(tmp_path, str(tmp_path / "a.csv"))[0][1].startswith("a row of more than")
    (tmp_path / "a.json").write_bytes(json.dumps(PAIRS * 20).encode())
    assert faults(tmp_path, str(tmp_path / "a.json"))[0][1].startswith("a JSON array of more than")


def test_values_that_json_has_not_are_faults_where_they_would_be_trained_and_notes_elsewhere(tmp_path):
    import datetime

    day = datetime.date(2024, 1, 1)
    (tmp_path / "a.parquet").write_bytes(parquet([row | {"day": day} for row in PAIRS]))
    assert rows(tmp_path, str(tmp_path / "a.parquet")).notes == ["train: fields not used for training: day"]
    given = [row | {"chat_template_kwargs": {"day": day}} for row in CHATS[:2]]
    (tmp_path / "a.parquet").write_bytes(parquet(given))
    assert faults(tmp_path, str(tmp_path / "a.parquet"))[0][1].startswith("a value that JSON has not")
