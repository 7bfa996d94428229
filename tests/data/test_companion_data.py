"""The companion conversations in data/companion: their form, their split, and that the files on disk are
current.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.typed import there

FOLDER = Path(__file__).resolve().parents[2] / "data" / "companion"


@pytest.fixture(scope="module")
def make():
    """data/companion/make.py as a module."""
    spec = there(importlib.util.spec_from_file_location("companion_make", FOLDER / "make.py"))
    module = importlib.util.module_from_spec(spec)
    there(spec.loader).exec_module(module)
    return module


@pytest.fixture(scope="module")
def files():
    """The rows of the two files, by name."""
    return {
        name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open(encoding="ascii")]
        for name in ("train", "eval")
    }


@pytest.fixture
def copy(tmp_path):
    """A copy of the conversations that a test may break."""
    shutil.copytree(FOLDER / "conversations", tmp_path / "conversations")
    return tmp_path


def edit(copy, topic, change):
    """Change the lines of one topic file; returns its path."""
    path = copy / "conversations" / f"{topic}.txt"
    path.write_text("\n".join(change(path.read_text().split("\n"))))
    return path


def test_check_passes_on_the_shipped_conversations():
    run = subprocess.run([sys.executable, FOLDER / "make.py", "--check"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_there_are_1000_training_rows_and_100_evaluation_rows_of_different_topics(make, files):
    assert (len(files["train"]), len(files["eval"])) == (1000, 100)
    train, held_out = ({row["topic"] for row in files[name]} for name in ("train", "eval"))
    assert len(train) == 50
    assert held_out == set(make.EVAL_TOPICS)
    assert not train & held_out
    assert len({row["id"] for rows in files.values() for row in rows}) == 1100


def test_every_row_alternates_from_the_user_to_one_last_reply(files):
    for row in files["train"] + files["eval"]:
        roles = [turn["role"] for turn in row["prompt"] + row["completion"]]
        assert len(row["completion"]) == 1
        assert roles == ["user", "assistant"] * (len(roles) // 2), row["id"]


def test_no_two_rows_are_near_duplicates(make, files):
    texts = ["\n".join(make.spoken(row)) for row in files["train"] + files["eval"]]
    assert max(make.similarities(texts).values()) < make.LIMIT == 0.3


def test_no_longer_sentence_is_in_more_than_two_rows(make, files):
    assert all(len(ids) <= 2 for _, ids in make.repeated(files["train"] + files["eval"], make.sentences))


@pytest.mark.parametrize(
    ("line", "broken", "problem"),
    [
        (2, "U: Two in a row.", "expected a line that begins with 'A: '"),
        (2, "A: It is 20\N{DEGREE SIGN} outside.", "not plain ASCII"),
        (2, "A: **Ring** the surgery.", "markdown or brackets in a reply"),
        (2, "A: Is it? Are you sure?", "more than one question mark in the last reply"),
        (1, "U: " + "word " * 300 + "end", "a conversation of 300 words or more"),
    ],
)
def test_a_broken_line_is_reported_with_its_file_and_line(make, copy, line, broken, problem):
    path = edit(copy, "dogs", lambda lines: [*lines[: line - 1], broken, *lines[line:]])
    problems, table = make.make(copy)
    assert f"{path}:{line}: {problem}" in problems
    assert table == []
    assert not (copy / "train.jsonl").exists()


def test_all_problems_are_reported_at_once(make, copy):
    first = edit(copy, "dogs", lambda lines: lines[:2])
    second = edit(copy, "cats", lambda lines: [*lines[:1], "A: (laughs)", *lines[2:]])
    (copy / "conversations" / "moving_house.txt").unlink()
    problems, _ = make.make(copy)
    assert f"{first}:1: 1 conversations, expected 20" in problems
    assert f"{second}:2: markdown or brackets in a reply" in problems
    assert f"{copy / 'conversations' / 'moving_house.txt'}:1: missing" in problems


def test_a_near_duplicate_is_reported_with_its_file_and_line(make, copy):
    taken = (copy / "conversations" / "cats.txt").read_text().split("\n---\n")[0]
    path = edit(copy, "dogs", lambda lines: ["\n---\n".join([taken, *"\n".join(lines).split("\n---\n")[1:]])])
    problems, _ = make.make(copy)
    assert problems == [f"{path}:1: near-duplicate of {copy / 'conversations' / 'cats.txt'}:1 (1.00)"]


def test_check_writes_nothing_and_fails_until_the_files_are_made(make, copy):
    assert len(make.make(copy, check=True)[0]) == 3, "train, eval and some of eval"
    assert not (copy / "train.jsonl").exists()
    assert make.make(copy)[0] == []
    assert make.make(copy, check=True)[0] == []
    assert (copy / "train.jsonl").read_bytes() == (FOLDER / "train.jsonl").read_bytes()
