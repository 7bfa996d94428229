"""What every data verb does around its rows: side file, report, nothing overwritten, nothing half written,
and a killed run that goes on. Asked of `convert`, which does least itself.
"""

import datetime
import gzip
import json
import random
import signal
import time

import pyarrow
import pytest
from pyarrow import parquet

from lora_recipes.curate import work
from lora_recipes.curate.inputs import Inputs
from tests.process import Forked


def rows(file, count=5, text="some words"):
    lines = [json.dumps({"prompt": f"question {i}", "completion": f"{text} {i}"}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_rows_go_in_and_out_with_a_report_and_the_dropped_ones(run, tmp_path):
    rows(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "a", "id": 1}\n{"text": ""}\n')
    code, said = run("convert", "a.jsonl", "b.jsonl", "out/o.jsonl")
    assert code == 0 and "read        7 of 2 inputs" in said and "dropped     1 could not be trained" in said
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["o.dropped.jsonl", "o.jsonl", "o.report.json"]
    assert len(read(out / "o.jsonl")) == 6 and read(out / "o.jsonl")[5] == {"text": "a"}
    (lost,) = read(out / "o.dropped.jsonl")
    assert lost["where"] == "b.jsonl:2" and lost["row"] == {"text": ""} and "text is empty" in lost["found"]
    report = json.loads((out / "o.report.json").read_text())
    assert report["read"] == 7 and report["written"] == 6 and set(report["inputs"]) == {"a.jsonl", "b.jsonl"}
    assert report["dropped"]["could not be trained"]["count"] == 1
    assert report["noted"]["field id is not carried over"]["examples"][0]["where"] == "b.jsonl:1"
    assert len(report["inputs"]["a.jsonl"]) == 64 and report["outputs"]["o.jsonl"]["rows"] == 6


def test_nothing_is_overwritten_unless_it_is_said(run, tmp_path):
    rows(tmp_path / "a.jsonl")
    (tmp_path / "o.report.json").write_text("mine")
    code, said = run("convert", "a.jsonl", "o.jsonl")
    assert code == 2 and "o.report.json: is already there" in said and not (tmp_path / "o.jsonl").exists()
    assert (tmp_path / "o.report.json").read_text() == "mine" and not list(tmp_path.glob(".*"))
    assert run("convert", "a.jsonl", "o.jsonl", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "o.report.json").read_text())["written"] == 5
    code, said = run("convert", "a.jsonl", "a.jsonl", "--overwrite")
    assert code == 2 and "a.jsonl: is an input, too" in said and len(read(tmp_path / "a.jsonl")) == 5


BAD = {
    "binary": (random.Random(0).randbytes(20_000), "not UTF-8"),
    "another encoding": (
        '{"text": "Gr\u00fc\u00dfe"}\n'.encode("latin-1"),
        "not UTF-8 (byte 0xfc at column 13)",
    ),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "UTF-16, not UTF-8"),
    "broken": (b'{"text": "a"}\n{"text": "b"\n', "broken JSON"),
    "cut gzip": (gzip.compress(random.Random(0).randbytes(9_000))[:5_000], "a broken packed file"),
    "empty": (b"", "has no rows"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_stops_the_run_before_it_begins(run, tmp_path, kind):
    content, told = BAD[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    code, said = run("convert", "a.jsonl", "o.jsonl")
    assert code == 2 and told in said and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_faulty_rows_are_dropped_where_that_is_asked_for(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"\n7\n{"text": "c"}\n')
    code, said = run("convert", "a.jsonl", "o.jsonl", "--skip-faulty")
    assert code == 0 and "dropped     2 cannot be read" in said
    assert [row["text"] for row in read(tmp_path / "o.jsonl")] == ["a", "c"]
    first, second = read(tmp_path / "o.dropped.jsonl")
    assert first["where"] == "a.jsonl:2" and "broken JSON" in first["found"]
    assert second["where"] == "a.jsonl:3" and "a int, not an object" in second["found"]


def test_a_file_that_breaks_off_stops_the_run_even_so(run, tmp_path):
    """What follows the break would be lost, and counted by nobody."""
    packed = gzip.compress(b'{"text": "a"}\n' * 2_000 + random.Random(0).randbytes(90_000))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    code, said = run("convert", "a.jsonl.gz", "o.jsonl", "--skip-faulty")
    assert code == 2 and "a broken packed file" in said and not list(tmp_path.glob("*o.*"))


@pytest.mark.parametrize("ending", ["jsonl.gz", "parquet"])
def test_packed_and_parquet_hold_the_same_rows(run, tmp_path, ending):
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    calls = {"role": "assistant", "content": None, "tool_calls": call}
    called = [chat[0], calls, {"role": "tool", "content": "1"}, chat[1]]
    lines = [json.dumps({"messages": m}) for m in (chat, called, chat)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code, said = run("convert", "a.jsonl", f"o.{ending}")
    assert code == 0, said
    assert [item.raw for item in Inputs([f"o.{ending}"], {}, {})] == [json.loads(line) for line in lines]
    before = (tmp_path / f"o.{ending}").read_bytes()
    assert run("convert", "a.jsonl", f"o.{ending}", "--overwrite")[0] == 0
    assert (tmp_path / f"o.{ending}").read_bytes() == before


def test_what_parquet_cannot_hold_is_told_and_nothing_is_left_half(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": [{"role": "user", "content": "a"}],'
        ' "completion": [{"role": "assistant", "content": "b"}]}\n'
    )
    code, said = run("convert", "a.jsonl", "o.parquet")
    assert code == 2 and "OUT as Parquet: rows 0 to" in said and "write x.jsonl instead" in said
    assert not (tmp_path / "o.parquet").exists()
    code, said = run("convert", "a.jsonl", "o.csv")
    assert code == 2 and "OUT o.csv: is no file that is written here\n    -> x.jsonl, x.jsonl.gz" in said


@pytest.fixture
def killed(run, tmp_path, monkeypatch):
    """A run that was killed in its middle; the row that it had saved."""
    rows(tmp_path / "a.jsonl", 6_000)
    monkeypatch.setattr(work, "SAVED", 0)
    process = Forked(("data", "convert", "a.jsonl", "o.jsonl"), tmp_path)
    state = tmp_path / ".o.work" / "state.json"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (state.is_file() and json.loads(state.read_text())["read"] > 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(work, "SAVED", 1)
    assert not (tmp_path / "o.jsonl").exists()
    return json.loads(state.read_text())["read"]


def test_a_killed_run_goes_on_to_the_same_bytes(run, tmp_path, killed):
    with (tmp_path / ".o.work" / ".kept").open("a") as file:
        file.write('{"text": "half a r')  # written after the state was
    code, said = run("convert", "a.jsonl", "o.jsonl")
    assert code == 0 and f"goes on after row {killed:,}" in said
    assert run("convert", "a.jsonl", "whole.jsonl")[0] == 0
    for ending in ("jsonl", "dropped.jsonl"):
        assert (tmp_path / f"o.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    one, other = (json.loads((tmp_path / f"{n}.report.json").read_text()) for n in ("o", "whole"))
    assert (one.pop("continued"), other.pop("continued")) == (1, 0)
    for report in (one, other):
        del report["seconds"]
        report["outputs"] = list(report["outputs"].values())
    assert one == other and not list(tmp_path.glob(".*"))


def test_a_killed_run_of_other_rows_begins_anew(run, tmp_path, killed):
    rows(tmp_path / "a.jsonl", 30, "others")
    code, said = run("convert", "a.jsonl", "o.jsonl")
    assert code == 0 and "begins anew: what a killed run left is of other inputs" in said
    assert len(read(tmp_path / "o.jsonl")) == 30


def test_a_full_disk_is_one_clear_word_and_the_run_goes_on_when_there_is_room(run, tmp_path, small_disk):
    disk = small_disk("400k")
    rows(tmp_path / "a.jsonl", 2_000, "x" * 100)
    (disk / "ballast").write_bytes(bytes(250_000))
    code, said = run("convert", "a.jsonl", disk / "o.jsonl")
    assert code == 2 and "the disk is full (" in said and "the same command goes on" in said, said
    assert not list(disk.glob("o.*"))
    (disk / "ballast").unlink()
    code, said = run("convert", "a.jsonl", disk / "o.jsonl")
    assert code == 0, said
    assert len(read(disk / "o.jsonl")) == 2_000


def test_two_runs_do_not_write_one_file(run, tmp_path):
    rows(tmp_path / "a.jsonl")
    with work.Work("convert", tmp_path / "o.jsonl", {}, {}):
        code, said = run("convert", "a.jsonl", "o.jsonl")
        assert code == 2 and "is written by another process now" in said
    assert run("convert", "a.jsonl", "o.jsonl")[0] == 0


def test_a_verb_that_is_none_is_answered_with_the_nearest(run, capsys):
    with pytest.raises(SystemExit):
        run("convrt", "a", "b")
    assert "did you mean convert?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["convert", "dedupe", "mix", "secrets", "split"])
def test_every_verb_meets_bad_input_with_a_clear_word(run, tmp_path, small_disk, verb):
    share = "=1" if verb == "mix" else ""
    (tmp_path / "binary.jsonl").write_bytes(random.Random(0).randbytes(3_000))
    code, said = run(verb, f"binary.jsonl{share}", "o.jsonl")
    assert code == 2 and "not UTF-8" in said
    (tmp_path / "latin.jsonl").write_bytes('{"text": "Gr\u00fc\u00dfe"}\n'.encode("latin-1"))
    code, said = run(verb, f"latin.jsonl{share}", "o.jsonl")
    assert code == 2 and "latin.jsonl:1: not UTF-8 (byte 0xfc" in said and not list(tmp_path.glob("*o.*"))

    disk, many = small_disk("3m"), rows(tmp_path / "a.jsonl", 900, "y" * 60)
    (disk / "ballast").write_bytes(bytes(3 * 2**20 - 50_000))
    code, said = run(verb, f"{many}{share}", disk / "o.jsonl")
    assert code == 2 and "the disk is full (" in said and "the same command goes on" in said, said
    (disk / "ballast").unlink()
    code, said = run(verb, f"{many}{share}", disk / "o.jsonl")
    left = sum(len(read(f)) for f in disk.glob("o.*jsonl"))
    assert code == 0 and left == 900, said
    code, said = run(verb, f"{many}{share}", disk / "o.jsonl")
    assert code == 2 and "is already there" in said


def test_a_folder_of_a_verbs_files_is_its_rows_alone(run, tmp_path):
    """Neither the report nor the dropped rows are read as rows."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    assert run("convert", "a.jsonl", "out/o.jsonl")[0] == 0
    for path in ("out", "out/*.jsonl"):
        code, said = run("convert", path, "again.jsonl", "--overwrite")
        assert code == 0 and read(tmp_path / "again.jsonl") == [{"text": "a"}], said
    assert "dropped" not in said


def test_values_of_parquet_that_json_has_not_are_told(run, tmp_path):
    day = datetime.date(2024, 1, 2)
    table = pyarrow.table({"text": ["a", "b"], "on": [day, None], "image": [None, b"\x89PNG"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    code, said = run("secrets", "a.parquet", "o.jsonl")
    assert code == 0 and read(tmp_path / "o.jsonl") == [{"text": "a", "on": "2024-01-02", "image": None}]
    assert "noted       1 a date is written as text" in said
    assert "dropped     1 holds a value that JSON has not" in said
    (lost,) = read(tmp_path / "o.dropped.jsonl")
    assert lost["found"] == "bytes" and lost["row"]["text"] == "b"


def test_no_rows_are_a_parquet_file_too(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    code, said = run("convert", "a.jsonl", "o.parquet")
    assert code == 0 and "WARNING     no row is left" in said
    assert parquet.read_table(tmp_path / "o.parquet").num_rows == 0
