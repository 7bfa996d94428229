"""Identifiers in pieces: counted where they stand, by the tokenizer itself."""

import json

import pytest
from transformers import AutoTokenizer

from lora_recipes.__main__ import main
from lora_recipes.curate.tokens import identifiers

CODE = '''
def frobnicate_widget(count):
    """frobnicate_widget in a text is no identifier"""
    total = count  # nor frobnicate_widget in a comment
    return total

frobnicate_widget(frobnicate_widget(3)).frobnicate_widget
x = frobnicate_widget
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Code, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text(CODE)
    (tmp_path / "code" / "broken.py").write_text("def (:\n")
    return tmp_path


def test_the_report_is_what_the_tokenizer_does(folder, bases, capsys):
    base = str(bases("llama3"))
    assert main(["data", "tokens", "code", "x.jsonl", "--base", base, "--top", "2"]) == 0
    said = capsys.readouterr().out
    rows = {row["identifier"]: row for row in map(json.loads, (folder / "x.jsonl").read_text().splitlines())}
    assert set(rows) == {"frobnicate_widget", "count", "total", "x"}
    assert (rows["frobnicate_widget"]["count"], rows["total"]["count"], rows["x"]["count"]) == (5, 2, 1)
    assert rows["frobnicate_widget"]["cut"].replace("|", "") == "frobnicate_widget"

    facts = json.loads((folder / "x.report.json").read_text())["identifiers"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    length = len(tokenizer(CODE, add_special_tokens=False)["input_ids"])
    assert facts["tokens"] == length
    offsets = tokenizer(CODE, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for name, row in rows.items():
        places = [at for found, at in identifiers(CODE) if found == name]
        pieces = sum(a < at + len(name) and b > at for at in places for a, b in offsets)
        assert row["more"] == pieces - len(places) and row["pieces"] == round(pieces / len(places), 2)
    assert facts["new_tokens"] == ["frobnicate_widget", " frobnicate_widget"]
    tokenizer.add_tokens(facts["new_tokens"])
    assert facts["tokens_with_them"] == len(tokenizer(CODE, add_special_tokens=False)["input_ids"]) < length
    many = sum(row["pieces"] >= 3 for row in rows.values())
    assert facts["share_in_3_or_more"] == many / 4 and "above 20%: new tokens are worth a trial" in said
    # hidden_size 64, embed_tokens and lm_head apart; 1,024 rows, of which the tokenizer leaves some to spare
    assert (facts["tied"], facts["parameters_trained"], facts["parameters_added"]) == (False, 2 * 64 * 2, 0)
    assert 'new_tokens: ["frobnicate_widget", " frobnicate_widget"]' in said
    (left_out,) = map(json.loads, (folder / "x.dropped.jsonl").read_text().splitlines())
    assert (left_out["where"], left_out["reason"]) == ("code/broken.py", "a syntax error")


def test_identifiers_are_found_where_they_stand():
    text = "a = '\u00fc'; b_c(a)\nclass D: pass\n"
    assert [(name, text[at : at + len(name)]) for name, at in identifiers(text)] == [
        (name, name) for name in ("a", "b_c", "a", "D")
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["code", "x.jsonl", "--base", "./nowhere"], "no recipe of that name, and no folder"),
        (["code", "x.jsonl", "--base", "code"], "cannot be loaded"),
        (["empty.py", "x.jsonl", "--base", "llama3"], "no identifier in its Python files"),
        (
            ["code", "x.jsonl", "--base", "tiny_facts", "--outputs", "none"],
            "the base tiny_base is not trained yet",
        ),
    ],
)
def test_what_cannot_be_done_is_said(words, told, folder, bases, capsys):
    (folder / "empty.py").write_text("")
    words = [str(bases("llama3")) if word == "llama3" else word for word in words]
    assert main(["data", "tokens", *words]) == 2
    assert told in capsys.readouterr().err and not (folder / "x.jsonl").exists()
