"""`lora-recipes data mix` and `split`: shares exact to the row, groups on one side alone."""

import json
import random
import signal
import time
from collections import Counter

import pytest

from lora_recipes.curate import shares, work
from lora_recipes.data.mix import apportion
from tests.process import Forked


def write(path, name, count, **more):
    path.write_text("".join(json.dumps({"text": f"{name} {i}"} | more) + "\n" for i in range(count)))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_shares_in_whole_rows_are_exact():
    rng = random.Random(0)
    for _ in range(300):
        words = [f"n{i}={rng.choice([1, 2, 7, 0.3, 0.05, 12])}" for i in range(rng.randrange(1, 6))]
        wanted, total = list(shares.read(words, "IN").values()), rng.randrange(0, 5_000)
        whole = apportion(total, wanted)
        assert sum(whole) == total
        assert all(abs(count - total * share) < 1 for count, share in zip(whole, wanted, strict=True))


def test_a_mix_has_its_shares_in_every_stretch_and_no_row_twice(run, tmp_path):
    for name, count in (("general", 700), ("own", 1_000), ("new", 90)):
        write(tmp_path / f"{name}.jsonl", name, count)
    words = ["mix", "general.jsonl=0.25", "own.jsonl=0.7", "new.jsonl=0.05"]
    code, said = run(*words, "o.jsonl")
    rows = [row["text"] for row in read(tmp_path / "o.jsonl")]
    assert code == 0 and "mixed       1,000 of 1,000  70.03%  own.jsonl" in said, said
    # 1,000 / 0.7 = 1,428.6
    assert len(rows) == len(set(rows)) == 1_428
    for end in range(50, len(rows), 50):
        counted = Counter(text.split()[0] for text in rows[:end])
        assert all(abs(counted[k] - s * end) < 2 for k, s in (("general", 0.25), ("own", 0.7), ("new", 0.05)))
    numbers = [int(text.split()[1]) for text in rows if text.startswith("general")]
    assert numbers == sorted(numbers) and numbers[-1] > 650, "drawn from the whole source, in its order"
    before = (tmp_path / "o.jsonl").read_bytes()
    assert run(*words, "o.jsonl", "--overwrite")[0] == 0 and (tmp_path / "o.jsonl").read_bytes() == before
    assert run(*words, "o.jsonl", "--overwrite", "--seed", 1)[0] == 0
    assert (tmp_path / "o.jsonl").read_bytes() != before
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert report["mix"]["new.jsonl"] == {"share": 0.05, "rows": 90, "taken": 71, "got": 0.04972}


def test_a_small_source_is_told_or_taken_again(run, tmp_path):
    write(tmp_path / "a.jsonl", "a", 10)
    write(tmp_path / "b.jsonl", "b", 100)
    words = ["mix", "a.jsonl=1", "b.jsonl=3", "o.jsonl"]
    code, said = run(*words, "--rows", 100)
    assert code == 2 and "a.jsonl: has 10 rows, but 25 are its share\n    -> fewer --rows" in said
    assert run(*words)[0] == 0 and len(read(tmp_path / "o.jsonl")) == 40
    assert run(*words, "--rows", 100, "--repeat", "--overwrite")[0] == 0
    counted = Counter(row["text"] for row in read(tmp_path / "o.jsonl"))
    assert sorted(counted[f"a {i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert sum(counted[f"b {i}"] for i in range(100)) == 75 == len([t for t in counted if t[0] == "b"])


@pytest.mark.parametrize(
    "words, told",
    [
        (["a.jsonl"], "IN a.jsonl: is no SOURCE=SHARE above 0"),
        (["a.jsonl=0"], "is no SOURCE=SHARE above 0"),
        (["a.jsonl=1", "a.jsonl=2"], "a.jsonl stands twice"),
        (["a.jsonl=1", "b.jsonl=1"], "b.jsonl cannot be read (No such file"),
        (["a.jsonl=1", "--rows", "0"], "--rows: 0 rows are none"),
    ],
)
def test_a_mix_that_cannot_be_says_why(run, tmp_path, words, told):
    write(tmp_path / "a.jsonl", "a", 5)
    code, said = (
        run("mix", *words[:2], "o.jsonl", *words[2:])
        if "--rows" not in words
        else run("mix", words[0], "o.jsonl", *words[1:])
    )
    assert code == 2 and told in said and not list(tmp_path.glob("*o.*"))


def test_a_split_keeps_groups_together_and_shares_to_the_row(run, tmp_path):
    rng = random.Random(0)
    rows = [{"text": f"row {i}", "meta": {"file": f"f{rng.randrange(60)}"}} for i in range(1_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["split", "a.jsonl", "o.jsonl", "--group", "meta.file"]
    code, said = run(*words, "--part", "train=8", "--part", "eval=1", "--part", "test=1")
    assert code == 0, said
    parts = {part: read(tmp_path / f"o.{part}.jsonl") for part in ("train", "eval", "test")}
    files = {part: {row["meta"]["file"] for row in its} for part, its in parts.items()}
    assert sum(map(len, parts.values())) == 1_000
    assert len(set().union(*files.values())) == sum(map(len, files.values())) == 60
    assert abs(len(parts["train"]) - 800) <= 20 and min(map(len, parts.values())) > 80
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert report["split"]["train"]["got"] == len(parts["train"]) / 1_000
    # The order of the rows does not decide where a group goes.
    rng.shuffle(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(*words, "--part", "train=8", "--part", "eval=1", "--part", "test=1", "--overwrite")[0] == 0
    assert {row["meta"]["file"] for row in read(tmp_path / "o.eval.jsonl")} == files["eval"]


def test_without_a_group_rows_that_say_the_same_stay_together(run, tmp_path):
    rows = [{"text": f"Row {i % 950}"} if i % 2 else {"text": f"row  {i % 950}"} for i in range(1_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _ = run("split", "a.jsonl", "o.jsonl")
    train, held = (
        {" ".join(row["text"].lower().split()) for row in read(tmp_path / f"o.{part}.jsonl")}
        for part in ("train", "eval")
    )
    assert code == 0 and not train & held
    assert len(read(tmp_path / "o.train.jsonl")) == 900 and len(read(tmp_path / "o.eval.jsonl")) == 100


def test_a_split_that_cannot_be_says_why(run, tmp_path):
    write(tmp_path / "a.jsonl", "a", 30, file="x")
    code, said = run("split", "a.jsonl", "o.jsonl", "--group", "path")
    assert code == 2 and "a.jsonl:1: no path, by which rows are grouped\n    -> there are text, file" in said
    assert "and 10 more faults" in said
    code, said = run("split", "a.jsonl", "o.jsonl", "--group", "file")
    assert code == 2 and "--part eval: gets no group\n    -> there are 1 groups" in said
    code, said = run("split", "a.jsonl", "o.jsonl", "--part", "../x=1")
    assert code == 2 and "--part ../x: is no name of a file" in said and not list(tmp_path.glob("*o.*"))


@pytest.mark.parametrize("verb", ["mix", "split"])
def test_a_killed_run_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, verb):
    write(tmp_path / "a.jsonl", "a", 1_500)
    write(tmp_path / "b.jsonl", "b", 1_500)
    words = [verb, *(["a.jsonl=1", "b.jsonl=2"] if verb == "mix" else ["a.jsonl", "b.jsonl"])]
    monkeypatch.setattr(work, "SAVED", 0)
    process = Forked(("data", *words, "o.jsonl"), tmp_path)
    state, end = tmp_path / ".o.work" / "state.json", time.monotonic() + 60
    while time.monotonic() < end and not (state.is_file() and json.loads(state.read_text())["read"] > 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(work, "SAVED", 1)
    code, said = run(*words, "o.jsonl")
    assert code == 0 and "goes on after row" in said
    assert run(*words, "whole.jsonl")[0] == 0
    for file in tmp_path.glob("whole.*jsonl"):
        assert file.read_bytes() == (tmp_path / file.name.replace("whole", "o")).read_bytes()
