"""`lora-recipes data secrets`: what was planted is gone, what only looks like it stays, nothing is told."""

import json
import random
import time

import pytest

from lora_recipes.__main__ import main
from lora_recipes.core.files import ROOT
from lora_recipes.curate.secrets import clean
from lora_recipes.curate.shapes import KINDS, SHAPES
from tests.cases.planted import MAKERS, harmless, planted


def test_what_is_planted_is_found_whole_and_named():
    found = {kind: [0, 0] for kind in KINDS}
    for kind, text, part in planted(40):
        kinds: list[str] = []
        left = clean(text, SHAPES, kinds)
        found[kind][0] += part not in left and kinds == [kind] and f"[{kind.upper()}]" in left
        found[kind][1] += 1
    assert set(MAKERS) == set(KINDS) and all(hit == total for hit, total in found.values()), found


def test_what_only_looks_like_one_stays():
    changed = [(what, text) for what, text in harmless(40) if clean(text, SHAPES, []) != text]
    assert changed == []


LONG = [
    "1",
    "a@",
    "a.",
    "+1 ",
    "212-",
    "f:",
    "a://",
    "ab+",
    "eyJaaaaaaaaa.",
    "DE12 AAAA ",
    "tel ",
    "0 ",
    "sk-",
]
LONG += ["xoxb-1-", "aws_secret ", "-----BEGIN " + "PRIVATE KEY-----"]


def test_a_long_text_takes_no_longer_than_it_is_long():
    """No shape goes back over the whole text from each place where it might begin: seconds at this size."""
    began = time.process_time()
    for part in LONG:
        clean(part * (20_000 // len(part)), SHAPES, [])
    assert time.process_time() - began < 3  # 0.2 s


def test_shipped_rows_hold_none(tmp_path):
    out = tmp_path / "o.jsonl"
    rows = ROOT / "data/companion/eval.jsonl"
    assert main(["data", "secrets", str(rows), str(out)]) == 0
    assert json.loads((tmp_path / "o.report.json").read_text())["noted"] == {}
    assert [json.loads(line) for line in out.open()] == [json.loads(line) for line in rows.open()]


@pytest.fixture
def rows(tmp_path):
    """A file with one secret a row, somewhere in it; what must stand nowhere."""
    parts, lines = [], []
    for i, (_, text, part) in enumerate(planted(2, seed=3)):
        parts.append(part)
        places = [{"text": text}, {"prompt": "a", "completion": "b", "meta": {"by": [text]}}]
        places.append(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]}
        )
        lines.append(json.dumps(places[i % 3]))
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": "nothing here"}), *lines]))
    return parts


@pytest.mark.parametrize("drop", [False, True])
def test_nothing_that_was_found_is_told_or_left(rows, tmp_path, capsys, drop):
    words = ["data", "secrets", str(tmp_path / "a.jsonl"), str(tmp_path / "o.jsonl"), *["--drop"] * drop]
    assert main(words) == 0
    printed = capsys.readouterr()
    left = [f.read_text() for f in tmp_path.glob("o.*")] + [printed.out, printed.err]
    assert len(left) == 5 and not [part for part in rows if any(part in text for text in left)]
    report = json.loads((tmp_path / "o.report.json").read_text())
    counted = report["dropped"] if drop else report["noted"]
    assert sum(c["count"] for c in counted.values()) == len(rows) == report["read"] - 1
    assert all(set(e) == {"where"} for c in counted.values() for e in c["examples"])
    assert report["written"] == (1 if drop else report["read"])


def test_kinds_are_chosen(tmp_path):
    mail, phone = (MAKERS[kind](random.Random(0)) for kind in ("email", "phone"))
    text = f"mail {mail} or call {phone}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    for words, said in (
        (["--only", "email"], f"mail [EMAIL] or call {phone}"),
        (["--allow", "email"], f"mail {mail} or call [PHONE]"),
        (["--allow", "email", "--allow", "phone"], text),
    ):
        out = str(tmp_path / "o.jsonl")
        assert main(["data", "secrets", str(tmp_path / "a.jsonl"), out, "--overwrite", *words]) == 0
        assert json.loads((tmp_path / "o.jsonl").read_text())["text"] == said
