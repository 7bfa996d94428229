"""Each test of a row, and that what a batch says of it is what the model says of it alone."""

import json
import random
import signal
import time

import pytest
import torch

from lora_recipes.__main__ import main
from lora_recipes.curate import base as bases_of
from lora_recipes.curate import work
from lora_recipes.curate.filter import perplexities
from tests.process import Forked

ENGLISH = "The sun rises in the east and sets in the west, and every day it warms the earth."
GERMAN = "Die Sonne geht im Osten auf und im Westen unter, und jeden Tag erw\u00e4rmt sie die Erde."
RUBBISH = "earth it west rises warms, the day the sets and sun every the in in The and east."


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`lora-recipes data filter` on texts: the texts that are left, the dropped rows, what was said."""
    monkeypatch.chdir(tmp_path)

    def call(texts, *words):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        code = main(["data", "filter", "in.jsonl", "x.jsonl", "--overwrite", *map(str, words)])
        said = capsys.readouterr()
        if code:
            return code, said.err
        rows, left_out = (
            list(map(json.loads, (tmp_path / name).read_text().splitlines()))
            for name in ("x.jsonl", "x.dropped.jsonl")
        )
        return [row["text"] for row in rows], [(row["reason"], row.get("found")) for row in left_out]

    return call


def test_by_length_in_tokens_and_by_pattern(run, bases):
    texts = ["a", "a b c d", "a b c d e f g h", "a TODO b c"]
    words = ["--base", bases("llama3"), "--min-tokens", 2, "--max-tokens", 6, "--no-match", r"TO\w+"]
    kept, dropped = run(texts, *words)
    assert kept == ["a b c d"]
    assert dropped == [
        ("fewer than 2 tokens", "1"),
        ("more than 6 tokens", "8"),
        ("a place matches --no-match", "TODO"),
    ]
    assert run(texts, "--match", "^a b")[0] == texts[1:3]


def test_a_base_that_was_written_anew_is_another_one(bases, tmp_path):
    base = bases_of.resolved(str(bases("llama3")), tmp_path)
    before = bases_of.fingerprint(base)
    assert before == bases_of.fingerprint(base)
    (bases("llama3") / "config.json").touch()
    assert bases_of.fingerprint(base) != before


def test_by_language(run):
    pytest.importorskip("py3langid")
    kept, dropped = run([ENGLISH, GERMAN, "ok 17"], "--language", "en")
    assert kept == [ENGLISH, "ok 17"] and dropped[0][0] == "another language than en"
    assert dropped[0][1].startswith("de (")
    assert run([ENGLISH, GERMAN], "--language", "de", "--language", "en")[0] == [ENGLISH, GERMAN]


def test_by_toxicity_with_a_model_that_the_package_ships(run):
    pytest.importorskip("profanity_check")
    kept, dropped = run([ENGLISH, "You are a stupid idiot and I hate you."], "--max-toxicity", 0.9)
    assert kept == [ENGLISH] and dropped[0][0] == "toxicity above 0.9"


def test_a_batch_says_of_a_row_what_the_model_says_of_it_alone(bases, tmp_path):
    base = bases_of.resolved(str(bases("llama3")), tmp_path)
    tokenizer, model = bases_of.tokenizer(base), bases_of.model(base)
    texts = [ENGLISH, "a", GERMAN * 4, "sun and earth", ENGLISH * 2]
    found = perplexities(model, tokenizer, texts, max_length=64, batch_tokens=200)
    for text, (value, cut) in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert cut == (ids.shape[1] > 64)
        with torch.no_grad():
            alone = model(input_ids=ids[:, :64], labels=ids[:, :64]).loss.exp()
        assert value == pytest.approx(float(alone), rel=1e-4)
    tokenizer.add_bos_token = False
    assert perplexities(model, tokenizer, [""], 64, 64) in ([(None, False)], [(pytest.approx(0), False)])


@pytest.mark.real
def test_a_real_model_is_surprised_by_what_makes_no_sense(run, smollm2):
    words = ["--base", smollm2.base("float32"), "--max-perplexity", 100]
    kept, dropped = run([ENGLISH, RUBBISH, ENGLISH + " " + ENGLISH], *words)
    assert kept == [ENGLISH, ENGLISH + " " + ENGLISH]
    assert dropped[0][0] == "perplexity above 100" and float(dropped[0][1]) > 100


def test_a_killed_run_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    texts = [f"{number} words" for number in random.Random(0).choices(range(100), k=6_000)]
    run(texts, "--match", "7")
    whole = (tmp_path / "x.jsonl").read_bytes()
    monkeypatch.setattr(work, "SAVED", 0)
    words = ("data", "filter", "in.jsonl", "y.jsonl", "--match", "7")
    process, state = Forked(words, tmp_path), tmp_path / ".y.work" / "state.json"
    end = time.monotonic() + 60
    while time.monotonic() < end and not state.is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(work, "SAVED", 1)
    assert 0 < json.loads(state.read_text())["read"] < len(texts) and not (tmp_path / "y.jsonl").exists()
    assert main(list(words)) == 0
    assert (tmp_path / "y.jsonl").read_bytes() == whole
    assert json.loads((tmp_path / "y.report.json").read_text())["continued"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no test is named"),
        (["--min-tokens", "3"], "without --base"),
        (["--max-perplexity", "100"], "without --base"),
        (["--match", "("], "no regular expression"),
        (["--max-toxicity", "2"], "is no probability"),
        (["--language", "xx"], "is none that py3langid knows"),
        (["--base", "x/y", "--min-tokens", "3", "--max-tokens", "2"], "no row could pass"),
    ],
)
def test_what_cannot_be_done_is_said(words, told, run):
    if "--language" in words:
        pytest.importorskip("py3langid")
    code, said = run([ENGLISH], *words)
    assert code == 2 and told in said
