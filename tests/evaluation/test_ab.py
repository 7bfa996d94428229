"""Two models compared: blind, by rules, a page and a judge; against a peer that answers as a test says."""

import json
import re
import time
from functools import partial

import pytest

from lora_recipes.__main__ import main
from lora_recipes.core import record
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.record import Combined, CombinedRecord, Git, Hardware
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.evaluation import ab
from lora_recipes.recipe import load as recipes
from tests.curate.peer import serving
from tests.typed import there

COUNT = 12
BOTH = ("base", "x")


@pytest.fixture
def run(tmp_path):
    """A run that has ended, with rows held out: questions by number, and one row that is no chat."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": f"Answer {i}."},
            ]
        }
        for i in range(COUNT)
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = RunFolder(tmp_path / "x")
    found.path.mkdir()
    text = recipes.load("smollm2_style", [f"data.eval={tmp_path / 'eval.jsonl'}"]).to_yaml()
    (found.path / "recipe.yaml").write_text(text)
    combined = Combined(
        adapters={}, weights=[], combination_type="cat", density=None, svd_rank=None, seed=0, rank=1,
        ranks=[], max_lora_rank=8, bytes=0, from_sum=0, reloaded_logits=0,
    )  # fmt: skip
    git, machine = Git(commit=None, dirty=False), Hardware(machine="", system="", cpus=None)
    known = CombinedRecord(
        status="finished", recipe="x", versions={}, command="", git=git, hardware=machine, combined=combined
    )
    found.write_record(known)
    return found


def number(asked):
    return int(re.findall(r"Question (\d+)\?", json.dumps(asked.body))[-1])


def both(asked):
    """The base is wrong at every question; x is right, but at each third, where both say the same."""
    i = number(asked)
    right = asked.body["model"] == "x" and i % 3
    asked.say(f"Answer {i}." if right else f"No idea {i}.", finish="stop" if right else "length")


def compared(run, url, *words):
    code = main(["ab", "x", "--outputs", str(run.path.parent), "--url", url, *words])
    return code, there(run.record).judged


def test_a_rule_counts_ties_and_says_what_the_interval_shows(run, capsys):
    with serving(both, BOTH) as peer:
        code, found = compared(run, peer.url, "--rule", "exact")
        assert code == 0 and (found.a, found.b, found.ties, found.equal) == (0, 8, 4, 4)
        assert {body["temperature"] for body in peer.bodies} == {0} and len(peer.bodies) == 2 * COUNT
        said = capsys.readouterr().out
        assert "of B 100.0% of 8 decided pairs, 95 % interval 67.6% to 100.0%" in said
        assert "B is better: the interval leaves out 50 %" in said
        _, found = compared(run, peer.url, "--rule", "words=2", "--models", "x", "base")
        assert (found.models, found.a, found.b) == (["x", "base"], 8, 0)
        assert "A is better" in capsys.readouterr().out
        few = run.path.parent / "few.jsonl"
        few.write_text("".join((run.path.parent / "eval.jsonl").read_text().splitlines(True)[:3]))
        _, found = compared(run, peer.url, "--rule", "ended", f"data.eval={few}")
        assert (found.prompts, found.b) == (3, 2)
        assert "no difference shown: the interval includes 50 %" in capsys.readouterr().out
        assert len(peer.bodies) == 2 * COUNT, "what was answered is not asked again"


@pytest.mark.parametrize(
    ("text", "holds", "fails"),
    [
        ("exact", " It is blue.\n", "It is blue"),
        ("contains", "Well: It is blue. So.", "It is green."),
        ("contains=blue", "so blue", "so green"),
        (r"regex=^\w+ is", "It is", "is it"),
        ("words=3", "one two three", "one two three four"),
    ],
)
def test_each_rule_holds_where_it_should(text, holds, fails):
    prompt = ab.Prompt("x:1", [], "It is blue.", {})
    bad, good = (ab.Answer(said, "stop", "m", 1, 1) for said in (fails, holds))
    verdict = ab.rule(text)
    assert verdict(ab.Pair(prompt, bad, good, swapped=True)) == 1
    assert verdict(ab.Pair(prompt, good, bad, swapped=False)) == -1
    assert verdict(ab.Pair(prompt, bad, bad, swapped=False)) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exakt", "did you mean exact"),
        ("regex", "needs a value"),
        ("regex=(", "no regular expression"),
        ("words=few", "no number of words"),
        ("exact=1", "takes no value"),
    ],
)
def test_what_is_no_rule_is_said(text, told):
    with pytest.raises(RecipeError, match=told):
        ab.rule(text)


def judge(asked, choose):
    """A judge: `choose(first, second)` says 1, 2 or tie."""
    first, second = re.findall(r"\[Answer \d\]\n(.*?)\n\[End", asked.text, re.DOTALL)
    asked.say(f"Because. [[3]]\n[[{choose(first, second)}]]")


def test_a_judge_is_asked_in_both_orders_and_a_contradiction_is_a_tie(run, capsys):
    with serving(both, BOTH) as peer:
        for choose, expected, disagreed in (
            (lambda first, second: "2" if "Answer" in second else "1", (0, 8, 4), 0),
            (lambda first, second: "1", (0, 0, 12), 8),  # whatever stands first
            (lambda first, second: "tie", (0, 0, 12), 0),
        ):
            with serving(partial(judge, choose=choose), models=("j",)) as other:
                for journal in run.path.glob("ab/judge*"):
                    journal.unlink()
                code, found = compared(run, peer.url, "--judge", other.url)
            assert code == 0 and (found.a, found.b, found.ties) == expected
            assert found.disagreed == disagreed and found.judge.startswith("j at http")
            assert len(other.bodies) == 16, "equal answers are a tie without being asked"
            names = [
                name for body in other.bodies for name in ("base", "x") if f'"{name}"' in json.dumps(body)
            ]
            assert names == [], "nothing tells it whose answer is whose"
        assert "no pair was decided" in capsys.readouterr().out
        with serving(lambda asked: asked.say("I cannot say."), models=("j",)) as other:
            _, found = compared(run, peer.url, "--judge", other.url, "--judge-model", "k")
        assert (found.ties, found.not_judged) == (4, 8)


def test_an_endpoint_that_stops_in_the_middle_is_gone_on_with(run, capsys):
    def stops(asked):
        if asked.number < COUNT + 6:
            both(asked)
        else:
            time.sleep(0.2)  # all are asked at once: those before it come to be kept first
            asked.send(500, "out of memory")

    with serving(stops, BOTH) as peer:
        code, found = compared(run, peer.url, "--rule", "exact")
    assert code == 40 and found is None
    said = capsys.readouterr().err
    assert "has no answer to 5 requests in a row; the last: 500" in said and "Traceback" not in said
    kept = int(there(re.search(r"(\d+) answers are kept; the same command goes on", said))[1])
    assert kept == 6, "of x, beside all of the base"
    with serving(both, BOTH) as peer:
        code, found = compared(run, peer.url, "--rule", "exact")
        assert code == 0 and (found.b, found.not_judged) == (8, 0)
        assert len(peer.bodies) == COUNT - kept


def test_an_answer_that_never_comes_is_left_out_and_counted(run, capsys):
    def but_one(asked):
        asked.send(400, "too long") if number(asked) == 7 else both(asked)

    with serving(but_one, BOTH) as peer:
        code, found = compared(run, peer.url, "--rule", "exact")
    assert code == 0 and (found.b, found.not_judged) == (7, 1)
    assert "1 prompts were not answered by both, and are left out" in capsys.readouterr().err


def test_the_page_is_blind_and_its_marks_are_taken_back(run, capsys):
    with serving(both, BOTH) as peer:
        assert compared(run, peer.url)[0] == 0
        page = run.path / "ab" / "page.html"
        data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
        assert len(data["rows"]) == 8, "equal answers need nobody"
        shown = [{label: text for _, label, text in row["texts"]} for row in data["rows"]]
        right = [texts["right"].startswith("Answer") for texts in shown]
        assert 0 < sum(right) < 8, "left and right are drawn"
        assert not re.search(r'"(base|x)"', json.dumps(data["rows"]))
        marks = [
            {"sha256": row["sha256"], "where": row["where"], "mark": "right" if good else "left"}
            for row, good in zip(data["rows"], right, strict=True)
        ]
        marks[0]["mark"], marks[1]["mark"] = "tie", "none"
        file = run.path.parent / "x.ab.marks.json"
        file.write_text(json.dumps({"format": ab.FORMAT, "rows": marks}))
        code, found = compared(run, peer.url, "--marks", str(file))
        assert code == 0 and (found.a, found.b, found.ties, found.not_judged) == (0, 6, 5, 1)
        assert found.judge == "a person"
        before = page.read_bytes()
        assert compared(run, peer.url)[0] == 0 and page.read_bytes() == before
        assert compared(run, peer.url, "--seed", "3")[0] == 2
        assert "is already there, with other answers" in capsys.readouterr().err
        assert compared(run, peer.url, "--seed", "3", "--force")[0] == 0 and page.read_bytes() != before
    assert compared(run, peer.url, "--marks", str(file))[0] == 2, "no server is needed for it"
    assert "marks are of pairs that are not on the last page" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--models", "x", "x"], "are the same"),
        (["--judge-model", "j"], "there is no judge"),
        (["--max-tokens", "0"], "is no length"),
        (["--marks", "gone.json"], "cannot be read"),
        (["--judge", "http://127.0.0.1:9", "--judge-key", "sk-1"], "takes the name of an environment"),
        (["--judge", "nowhere"], "is no address"),
        (["lora.r=3"], "would change nothing"),
        (["data.eval=data/facts/rephrased.jsonl"], "no row of it is a chat with a reply"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_asked(words, told, run, capsys):
    code, found = compared(run, "http://127.0.0.1:9", *words)
    assert code == 2 and found is None and told in capsys.readouterr().err
    assert not (run.path / "ab").exists()


def test_the_record_reads_back(run):
    with serving(both, BOTH) as peer:
        compared(run, peer.url, "--rule", "exact")
    text = (run.path / "run.json").read_text()
    assert record.dumps(record.loads(text, "run.json")) == text
