"""Synthesis against servers that answer well, badly and not at all: what is kept, paid and said."""

import gzip
import json
import re
import shutil
import threading
import time
import zlib

import pytest

from lora_recipes.__main__ import main
from lora_recipes.curate import prompts, teacher
from lora_recipes.curate.methods import numbered
from lora_recipes.curate.near import Near
from lora_recipes.data.row import faults
from tests.curate.peer import Asked, serving
from tests.process import Forked

KEY = "-".join(["sk", "planted", "0123456789abcdef"])  # joined here: nothing token-like in the repository
WORDS = ["cat", "dog", "tree", "house", "stone", "river", "cloud", "lamp", "road", "chair"]


def told(asked: Asked) -> None:
    """An answer that depends on the request alone, unlike the others."""
    seed = zlib.crc32(json.dumps(asked.body, sort_keys=True).encode())
    asked.say(f"This is said of it: {' '.join(str(seed * n % 9973) for n in range(3, 23))} and no more.")


@pytest.fixture
def synthesise(tmp_path, capsys):
    """Runs the verb on ten prompts, or `rows`; has `out`, what it wrote, and `said`, what it printed."""

    class Run:
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        said = ""

        def __init__(self):
            self.write([{"prompt": f"What do you know about a {word}?"} for word in WORDS])

        def write(self, rows):
            self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def words(self, url, *options, method="teacher"):
            fast = ["--backoff", "0.01", "--timeout", "20"]
            return [
                "data",
                "synthesise",
                str(self.source),
                str(self.out),
                "--method",
                method,
                "--url",
                url,
                *fast,
                *options,
            ]

        def __call__(self, url, *options, method="teacher"):
            code = main(self.words(url, *map(str, options), method=method))
            read = capsys.readouterr()
            self.said = read.out + read.err
            return code

        @property
        def rows(self):
            return [json.loads(line) for line in self.out.read_text().splitlines()]

        @property
        def dropped(self):
            side = self.out.with_name("out.dropped.jsonl")
            return [json.loads(line)["reason"] for line in side.read_text().splitlines()]

        @property
        def report(self):
            return json.loads(self.out.with_name("out.report.json").read_text())["synthesis"]

    return Run()


def test_a_teacher_answers_each_prompt_and_the_row_says_where_it_is_from(synthesise):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    reply = {"role": "assistant", "content": "Good day"}
    last = {"role": "user", "content": "What is {instruction}?"}
    synthesise.write(
        [{"messages": [*turns, reply, last, reply]}, {"instruction": "Add up", "input": "1 and 2"}]
    )
    with serving(told) as peer:
        assert synthesise(peer.url, "--samples", 2, "--seed", 5) == 0, synthesise.said
    assert [body["messages"] for body in peer.bodies[::2]] == [[*turns, reply, last]] or len(peer.bodies) == 4
    assert {b["seed"] for b in peer.bodies} == {5, 6}
    assert all((b["top_p"], b["model"], b["max_tokens"]) == (0.9, "big", 1024) for b in peer.bodies)
    rows = synthesise.rows
    assert [len(row["messages"]) for row in rows] == [5, 5, 2, 2] and not any(map(faults, rows))
    assert rows[0]["messages"][:4] == [*turns, reply, last]
    assert rows[2]["messages"][0]["content"] == "Add up\n1 and 2"
    origin = rows[0]["provenance"]
    assert origin["seeds"][0].endswith("in.jsonl:1") and (origin["method"], origin["teacher"]) == (
        "teacher",
        "big",
    )
    assert origin["prompts"] == {"teacher.txt": prompts.load(["teacher"], None)["teacher"].sha256}
    journal = synthesise.out.with_name("out.journal.jsonl").read_text()
    assert all(key in journal for row in rows for key in row["provenance"]["requests"])
    assert (
        re.search(r"kept +4 of 4 \(100%\)", synthesise.said)
        and "tokens      28 read, 160 written" in synthesise.said
    )


def test_the_result_depends_on_the_answers_alone_not_on_when_they_come(synthesise):
    def late(asked: Asked) -> None:
        time.sleep(0.03 * (asked.number % 3 == 0))
        told(asked)

    results = []
    for concurrency in 1, 8:
        with serving(late) as peer:
            options = ["--rounds", 2, "--domain", "law", "--concurrency", concurrency, "--overwrite"]
            assert synthesise(peer.url, *options, method="evol_instruct") == 0, synthesise.said
        results.append((synthesise.out.read_bytes(), len(peer.asked)))
        synthesise.out.with_name("out.journal.jsonl").unlink()
    assert results[0] == results[1] and len(synthesise.rows) == 20


def test_self_instruct_makes_new_tasks_from_examples_and_takes_no_bad_ones(synthesise):
    def new(asked: Asked) -> None:
        if "numbered in the same way" not in asked.text:
            return told(asked)
        if asked.number == 0:
            bad = ["What do you know about a cat?", "Too short", "Describe the picture in all its parts"]
            return asked.say("Here they are:\n" + "\n".join(f"{n}. {task}" for n, task in enumerate(bad, 1)))
        lines = [
            f"{n}) Write down {asked.number} {n} {n * 7} {asked.number * 5}\n   in good order"
            for n in (1, 2, 3)
        ]
        return asked.say("\n".join(lines), "length")

    with serving(new) as peer:
        code = synthesise(peer.url, "--count", 7, "--concurrency", 1, method="self_instruct")
    assert code == 0 and len(synthesise.rows) == 7, synthesise.said
    assert synthesise.rows[0]["messages"][0]["content"].endswith("\n   in good order"), "over all its lines"
    assert [r.partition(": ")[2] for r in synthesise.dropped[:3]] == [
        "nearly the same as another",
        "not 4 to 150 words",
        f"the instruction matches rules.txt:{len((prompts.FOLDER / 'rules.txt').read_text().splitlines())}",
    ]
    assert "new instruction: cut off" in synthesise.dropped, "the last of a list that was cut"
    later = [a.text for a in peer.asked if "numbered in the same way" in a.text][-1]
    assert later.count("Write down") == 2 and later.count("What do you know") == 6, "as in the paper: 6 and 2"
    assert len(synthesise.rows[0]["provenance"]["requests"]) == 2
    assert {"self_instruct.txt", "teacher.txt"} == set(synthesise.rows[0]["provenance"]["prompts"])


def test_self_instruct_ends_where_nothing_new_comes(synthesise):
    with serving(lambda asked: asked.say("I have no idea what you want of me.")) as peer:
        assert synthesise(peer.url, "--count", 8, method="self_instruct") == 0
    assert "5 rounds brought no new instruction" in synthesise.said and "no row is left" in synthesise.said
    assert set(synthesise.dropped) == {"new instruction: no numbered list came back"}


def test_evol_instruct_changes_instructions_by_every_operation(synthesise):
    def new(asked: Asked) -> None:
        if "nstruction alone" in asked.text:
            words = " ".join(str(asked.number * n % 997) for n in range(5, 15))
            return asked.say("What do you know about a cat?" if asked.number == 3 else f'"Explain {words}"')
        return told(asked)

    with serving(new) as peer:
        options = ["--rounds", 2, "--domain", "tax law", "--concurrency", 1]
        assert synthesise(peer.url, *options, method="evol_instruct") == 0, synthesise.said
    rows, origins = synthesise.rows, [row["provenance"] for row in synthesise.rows]
    assert len(rows) == 19 and synthesise.dropped == ["new instruction: nearly the same as another"]
    assert {o["operation"] for o in origins} == {"constraints", "deepen", "combine", "domain"}
    for origin in origins:
        assert {f"evol_{origin['operation']}.txt", "teacher.txt"} == set(origin["prompts"])
    sent = [a.text for a in peer.asked]
    assert any("in this domain: tax law." in text for text in sent)
    assert any(text.count("What do you know about") == 2 for text in sent), "combine has two"
    assert not any("{" in text for text in sent), "every place is filled"
    first = {o["requests"][0] for o in origins if o["round"] == 1}
    second = [o for o in origins if o["round"] == 2]
    assert sum(set(o["from"][:1]) <= first and bool(o["from"]) for o in second) == 9, (
        "one began from its seed"
    )


BAD = {
    "too many requests": lambda asked: asked.send(429, '{"error": {"message": "slower"}}', Retry_After="1"),
    "an error of the server": lambda asked: asked.send(500, "Internal Server Error", "text/plain"),
    "half a JSON": Asked.half,
    "HTML": lambda asked: asked.send(200, "<html><h1>Please log in</h1></html>", "text/html"),
    "another JSON": lambda asked: asked.send(200, '{"detail": "busy"}'),
    "broken off": Asked.broken_off,
    "nothing": lambda asked: time.sleep(3),
    "a byte now and then": lambda asked: asked.dripping(20),
}


def test_what_fails_once_is_asked_again(synthesise):
    """Every kind of it at once; on a busy machine a good answer may be late, and is asked for again, too."""
    again, lock = dict(zip(WORDS, BAD, strict=False)), threading.Lock()
    times: dict[str, list[float]] = {}

    def sometimes(asked: Asked) -> None:
        word = asked.text.split()[-1].rstrip("?")
        times.setdefault(word, []).append(time.monotonic())
        with lock:
            kind = again.pop(word, None)
        (BAD[kind] if kind else told)(asked)

    with serving(sometimes) as peer:
        assert synthesise(peer.url, "--timeout", 1.5, "--concurrency", 10) == 0, synthesise.said
    assert not again and len(synthesise.rows) == 10 and synthesise.report["again"] >= len(BAD)
    slower = times[WORDS[list(BAD).index("too many requests")]]
    assert slower[1] - slower[0] > 1, "as long as it asks for"
    dripping = times[WORDS[list(BAD).index("a byte now and then")]]
    assert dripping[1] - dripping[0] < 15, "no read of it waits long, the attempt as a whole does"
    assert synthesise.report["counted_by_upper_bound"] >= len(BAD) - 2, "what may be paid for is counted"


WORDS_OF = {
    "too many requests": "429: slower",
    "an error of the server": "500: Internal Server Error",
    "half a JSON": r"no JSON \(application/json\): {\"model\"",
    "HTML": r"no JSON \(text/html\): <html><h1>Please log in",
    "another JSON": r'no completion: {"detail": "busy"}',
    "broken off": "the connection failed",
    "nothing": "nothing within 0.2 s",
}


@pytest.mark.parametrize("kind", WORDS_OF)
def test_a_server_that_only_fails_ends_the_run_and_nothing_is_lost(synthesise, kind):
    with serving(told) as peer:
        assert synthesise(peer.url, "--budget-requests", 2) == 0
    before = synthesise.out.read_bytes()
    options = [
        "--timeout",
        0.2 if kind == "nothing" else 20,
        "--concurrency",
        1,
        "--retries",
        0,
        "--overwrite",
    ]
    with serving(BAD[kind]) as peer:
        assert synthesise(peer.url, *options, "--model", "big") == 2 and len(peer.asked) == 5
    assert "Traceback" not in synthesise.said and synthesise.out.read_bytes() == before
    found = r"no answer to 5 requests in a row; the last: .*" + WORDS_OF[kind]
    assert re.search(found, synthesise.said), synthesise.said
    assert "2 answers are kept; the same command goes on from them" in synthesise.said
    with serving(told) as peer:
        assert (
            synthesise(peer.url, "--overwrite") == 0 and len(peer.asked) == 8 and len(synthesise.rows) == 10
        )


REFUSALS = {
    "key": (
        401,
        '{"error": {"message": "Incorrect API key provided: sk-pl***cdef"}}',
        {},
        "does not let us in (401)",
    ),
    "model": (
        404,
        '{"error": {"message": "The model `x` does not exist."}}',
        {},
        "404: The model `x` does not exist.",
    ),
    "money": (
        429,
        '{"error": {"code": "insufficient_quota", "message": "You exceeded"}}',
        {},
        "nothing is left to be spent",
    ),
    "tomorrow": (429, "later", {"Retry_After": "86400"}, "asks to be left alone for 86,400 s"),
    "date": (503, "later", {"Retry_After": "Wed, 21 Oct 2099 07:28:00 GMT"}, "asks to be left alone for"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_no_attempt_would_better_ends_the_run_at_once(synthesise, kind):
    status, body, headers, words = REFUSALS[kind]
    with serving(lambda asked: asked.send(status, body, **headers)) as peer:
        assert synthesise(peer.url, "--concurrency", 1) == 2 and len(peer.asked) == 1
    assert words in synthesise.said and "Traceback" not in synthesise.said and "sk-pl" not in synthesise.said


def test_a_prompt_that_the_server_refuses_is_dropped_alone(synthesise):
    def picky(asked: Asked) -> None:
        good = any(word in asked.text for word in ("cat", "chair"))
        told(asked) if good else asked.send(400, '{"error": {"message": "too long"}}')

    with serving(picky) as peer:
        assert synthesise(peer.url, "--concurrency", 1) == 0 and len(peer.asked) == 10, synthesise.said
    side = (synthesise.out.parent / "out.dropped.jsonl").read_text()
    assert synthesise.dropped == ["no answer"] * 8 and side.count("400: too long") == 8
    with serving(lambda asked: asked.send(400, "no such parameter")) as peer:
        assert synthesise(peer.url, "--seed", 7, "--concurrency", 1, "--overwrite") == 2
    assert "has no answer to 5 requests in a row; the last: 400: no such parameter" in synthesise.said


def test_no_server_and_a_server_of_two_models_are_said(synthesise):
    assert synthesise("http://127.0.0.1:9", "--retries", 0) == 2
    assert "which models it has: the connection failed" in synthesise.said
    with serving(told, models=("big", "small")) as peer:
        assert synthesise(peer.url) == 2 and "serves big, small" in synthesise.said
        assert synthesise(peer.url, "--model", "small") == 0 and peer.bodies[0]["model"] == "small"


def test_the_key_is_sent_and_stands_nowhere_else(synthesise, tmp_path, monkeypatch):
    """The server repeats it wherever it can, and the words are shown with the trace, too."""
    monkeypatch.setenv("PLANTED_KEY", KEY)

    def leaking(asked: Asked) -> None:
        header = asked.headers["Authorization"]
        if "cat" in asked.text:
            asked.say(
                f"Your header was {header}, which is the best of all keys that I have ever seen so far."
            )
        elif "dog" in asked.text:
            asked.send(400, json.dumps({"error": {"message": f"{header}: no"}}))
        elif "tree" in asked.text and asked.number < 4:
            asked.send(500, f"<html>{header}</html>", "text/html", X_Echo=header)
        elif "house" in asked.text:
            asked.say("It is a house and it is a house.", finish=header, model=header)
        else:
            told(asked)

    with serving(leaking) as peer:
        assert synthesise(peer.url, "--key", "PLANTED_KEY", "--concurrency", 1) == 0, synthesise.said
    assert {a.headers["Authorization"] for a in peer.asked} == {f"Bearer {KEY}"}
    assert synthesise.dropped[:2] == ["the answer repeats the API key", "no answer"]
    said = synthesise.said
    ends = {
        "all of it": lambda asked: asked.send(400, asked.headers["Authorization"]),
        "sends on": lambda asked: asked.send(307, "", Location=f"http://127.0.0.1:9/?k={KEY}"),
        "half": lambda asked: asked.send(200, asked.headers["Authorization"]),
        "no": lambda asked: asked.send(401, asked.headers["Authorization"]),
    }
    for name, end in ends.items():
        synthesise.out = tmp_path / f"{name}.jsonl"
        with serving(end) as peer, pytest.raises(ValueError) as caught:
            synthesise(peer.url, "--key", "PLANTED_KEY", "--retries", 0, "--traceback")
        said += str(caught.value) + repr(caught.value.__cause__)
        assert caught.value.__suppress_context__, "the trace shows no error of the client"
    everything = [said.encode()] + [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()]
    assert len(everything) > 8 and not [text for text in everything if KEY.encode() in text]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--key", KEY], "takes the name of an environment variable"),
        (["--api-key", KEY], "a secret is not an option"),
        ([f"--token={KEY}"], "a secret is not an option"),
        (["--url", f"http://me:{KEY}@127.0.0.1/v1"], "where a key would be seen"),
        (["--url", f"http://127.0.0.1/v1?key={KEY}"], "where a key would be seen"),
        (["--key", "BROKEN_KEY"], "holds white space"),
        (["--key", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
    ],
)
def test_a_key_elsewhere_is_refused_and_not_repeated(synthesise, monkeypatch, options, words):
    monkeypatch.setenv("BROKEN_KEY", KEY + "\n")
    assert synthesise("http://127.0.0.1:9", *options) == 2
    assert words in synthesise.said and KEY not in synthesise.said
    assert [f.name for f in synthesise.out.parent.iterdir()] == ["in.jsonl"]


def test_the_key_goes_to_no_other_server(synthesise, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", KEY)
    with serving(told) as other:
        there = lambda asked: asked.send(307, "", Location=f"{other.url}/v1/chat/completions")  # noqa: E731
        with serving(there) as peer:
            monkeypatch.setenv("HTTP_PROXY", other.url)
            assert synthesise(peer.url, "--key", "PLANTED_KEY") == 2
    assert not other.asked and f"it sends us on to {other.url}" in synthesise.said


def test_a_killed_run_goes_on_and_pays_for_nothing_twice(synthesise, tmp_path):
    reached = threading.Event()

    def stuck(asked: Asked) -> None:
        if asked.number < 7:
            return told(asked)
        reached.set()
        return time.sleep(2)

    options = ["--concurrency", "2", "--rounds", "2"]
    with serving(stuck) as peer:
        run = Forked(tuple(synthesise.words(peer.url, *options, method="evol_instruct")), tmp_path)
        assert reached.wait(60)
        time.sleep(0.1)
        run.kill()
        run.wait()
        journal = synthesise.out.with_name("out.journal.jsonl")
        kept = journal.read_bytes().count(b"\n")
        assert kept >= 6 and not synthesise.out.exists()
    with journal.open("ab") as file:
        file.write(b'{"key": "half a li')  # killed while it wrote
    with serving(told) as peer:
        assert synthesise(peer.url, *options, method="evol_instruct") == 0, synthesise.said
    assert "1 broken line" in synthesise.said
    assert f"{kept} answers stood in the journal" in synthesise.said
    whole, asked = synthesise.out.read_bytes(), len(peer.asked)
    journal.unlink()
    with serving(told) as peer:
        assert synthesise(peer.url, *options, "--overwrite", method="evol_instruct") == 0
    assert synthesise.out.read_bytes() == whole and len(peer.asked) == asked + kept


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (["--budget-requests", 4], {"requests": 4}),
        (["--budget-tokens", 400, "--max-tokens", 100], {"tokens": 400}),
        (["--budget-cost", 0.001, "--prices", 1, 2, "--max-tokens", 100], {"cost": 0.001}),
    ],
)
def test_a_budget_is_kept_to_and_a_larger_one_goes_on(synthesise, options, most):
    with serving(told) as peer:
        assert synthesise(peer.url, *options) == 0, synthesise.said
        asked, report = len(peer.asked), synthesise.report
        assert asked + report["not_asked"] == 10
        assert 2 <= asked == len(synthesise.rows) < 10 and "the budget is used up; " in synthesise.said
        used = report | {"tokens": report["tokens_read"] + report["tokens_written"]}
        assert all(used[name] <= limit for name, limit in most.items())
        assert synthesise(peer.url, "--overwrite", *options) == 0 and len(peer.asked) == asked, (
            "it was used up"
        )
        larger = [options[0], options[1] * 100, *options[2:]]
        assert synthesise(peer.url, "--overwrite", *larger) == 0
        assert len(peer.asked) == 10 == len(synthesise.rows), "and what was paid for is not asked again"


def test_tokens_that_the_server_does_not_count_are_counted_by_their_bound(synthesise):
    with serving(lambda asked: asked.say(f"It is this and no other: {asked.text}", usage=None)) as peer:
        options = ["--budget-tokens", 700, "--max-tokens", 100, "--concurrency", 1]
        assert synthesise(peer.url, *options) == 0 and 2 <= len(peer.asked) <= 4
    assert "by their upper bound" in synthesise.said and synthesise.report["tokens_written"] == 100 * len(
        peer.asked
    )


def test_so_many_at_once_and_so_many_a_minute(synthesise):
    now, most, lock = [0], [0], threading.Lock()

    def counting(asked: Asked) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.1)
        with lock:
            now[0] -= 1
        told(asked)

    with serving(counting) as peer:
        assert synthesise(peer.url, "--concurrency", 3) == 0 and most == [3]
    began = time.monotonic()
    with serving(told) as peer:
        synthesise(peer.url, "--requests-per-minute", 1200, "--overwrite", "--seed", 1)
    assert len(peer.asked) == 10 and time.monotonic() - began > 9 * 60 / 1200


POOR = {
    "cut off at max_tokens": lambda asked: asked.say("a b c d", "length"),
    "the answer is empty": lambda asked: asked.say(" \n"),
    "ended otherwise": lambda asked: asked.say("I will not", "content_filter"),
    "shorter than 20 tokens": lambda asked: asked.say("A cat.", usage=(5, 3)),
    "goes round in circles": lambda asked: asked.say("and it is what " * 40),
    "holds its thoughts": lambda asked: asked.say("<think>a cat?</think> It is a cat."),
    "the answer matches rules.txt:5": lambda asked: asked.say(
        "Well, as an AI language model I know no cats."
    ),
    "holds control characters": lambda asked: asked.say("It is\x00 a cat"),
    "holds half a character": lambda asked: asked.say("It is \ud83d a cat"),
    "nearly the same row was written before": lambda asked: asked.say(
        "It is of wood and of stone, has a long name that nobody knows, and stands in every garden of ours."
    ),
}


@pytest.mark.parametrize("reason", POOR)
def test_a_poor_answer_is_dropped_with_the_reason(synthesise, reason):
    synthesise.write([{"prompt": "What is a cat?"}, {"prompt": "What is a cow?"}])
    with serving(POOR[reason]) as peer:
        assert synthesise(peer.url) == 0
    first = reason.startswith("nearly")
    assert len(synthesise.rows) == first and set(synthesise.dropped) == {reason}
    assert len(peer.asked) == 2


def test_prompts_are_files_that_are_edited(synthesise, tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "teacher.txt").write_text('Be kind: {instruction} {"a": {unknown}}')
    (own / "rules.txt").write_text("# none\ninstruction: ^$\n")
    with serving(told) as peer:
        assert synthesise(peer.url, "--prompts", own, "--concurrency", 1) == 0, synthesise.said
    assert peer.asked[0].text == 'Be kind: What do you know about a cat? {"a": {unknown}}'
    assert "Be kind" not in synthesise.out.read_text(), (
        "the row has the instruction, not the prompt around it"
    )
    (own / "teacher.txt").write_text("Be kind: {instructoin}")
    (own / "techer.txt").write_text("")
    (own / "rules.txt").write_text("answers: x\nanswer: (\n")
    assert synthesise(peer.url, "--prompts", own, "--overwrite") == 2
    assert "teacher.txt: has no place {instruction}" in synthesise.said and "{instructoin}" in synthesise.said
    assert (
        "techer.txt: would not be read" in synthesise.said and "did you mean teacher.txt" in synthesise.said
    )
    for file in own.glob("te*.txt"):
        file.unlink()
    assert synthesise(peer.url, "--prompts", own, "--overwrite") == 2
    assert (
        "rules.txt:1: is no rule" in synthesise.said and "rules.txt:2: is no regular exp" in synthesise.said
    )
    (own / "rules.txt").write_bytes("answer: \u00e4".encode("latin-1"))
    assert synthesise(peer.url, "--prompts", own, "--overwrite") == 2 and "not UTF-8" in synthesise.said
    assert len(peer.asked) == 10


def test_other_parameters_are_sent_and_taken_out(synthesise):
    request = [
        "top_p=null",
        "max_tokens=null",
        "max_completion_tokens=64",
        'chat_template_kwargs={"think": false}',
    ]
    with serving(told) as peer:
        assert synthesise(peer.url, *(word for part in request for word in ("--request", part))) == 0
    body = peer.bodies[0]
    assert not {"top_p", "max_tokens"} & set(body) and body["max_completion_tokens"] == 64
    assert body["chat_template_kwargs"] == {"think": False}
    assert (
        synthesise(peer.url, "--request", "stream=true", "--overwrite") == 2
        and "--request stream" in synthesise.said
    )


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("self_instruct", [], "--count"),
        ("self_instruct", ["--count", 3, "--samples", 2], "--samples"),
        ("teacher", ["--domain", "law", "--rounds", 2], "--rounds"),
        ("evol_instruct", ["--operation", "domain"], "needs a domain"),
        ("teacher", ["--budget-cost", 3], "no prices"),
        ("teacher", ["--budget-tokens", 3, "--request", "max_tokens=null"], "without a limit of tokens"),
        ("teacher", ["--url", "127.0.0.1:8000"], "is no address"),
    ],
)
def test_options_that_do_not_go_together(synthesise, method, options, words):
    assert synthesise("http://127.0.0.1:9", *options, method=method) == 2
    assert words in synthesise.said and not synthesise.out.with_name("out.journal.jsonl").exists()


def test_a_dry_run_shows_the_first_request_and_asks_nothing(synthesise):
    assert synthesise("http://127.0.0.1:9", "--dry-run", "--prices", 1, 2) == 0
    assert "user> What do you know about a cat?" in synthesise.said and '"top_p": 0.9' in synthesise.said
    assert re.search(r"at most +10 requests, [\d,]+ tokens read, 10,240 written, cost 0\.02", synthesise.said)
    for method, options in (("evol_instruct", []), ("self_instruct", ["--count", 3])):
        assert synthesise("http://127.0.0.1:9", "--dry-run", *options, method=method) == 0
        assert "What do you know about" in synthesise.said


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x7fELF\x02\x01\x01\x00\x9c\xff", "in.jsonl:1"),
        ('{"prompt": "hall\u00e5"}\n'.encode("utf-16"), "UTF-16"),
        (b'{"prompt": "hall\xe5"}\n', "not UTF-8"),
        (b'{"text": "no prompt"}\n', "no prompt to be answered"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "no user turn"),
        (b"", "no rows"),
    ],
)
def test_bad_input_is_named_before_anything_is_asked(synthesise, raw, words):
    synthesise.source.write_bytes(raw)
    with serving(told) as peer:
        assert synthesise(peer.url) == 2 and not peer.asked
    assert words in synthesise.said and "Traceback" not in synthesise.said


def test_faulty_rows_are_dropped_where_that_is_asked_for(synthesise):
    synthesise.write([{"prompt": "What is a cat?"}, {"text": "x"}, {"prompt": "What is a cat?"}])
    with serving(told) as peer:
        assert synthesise(peer.url, "--skip-faulty") == 0 and len(peer.asked) == 1
    assert synthesise.dropped == ["is no prompt", "the same prompt stands before"]


def test_a_full_disk_is_said_and_the_run_goes_on_from_its_journal(synthesise, small_disk):
    disk = small_disk("64k")
    synthesise.out = disk / "out.jsonl"
    long = lambda asked: asked.say(f"{asked.text} {' '.join(map(str, range(asked.number, 3000)))}")  # noqa: E731
    with serving(long) as peer:
        assert synthesise(peer.url, "--concurrency", 1) == 2
        assert "the disk is full" in synthesise.said and not synthesise.out.exists()
        before = len(peer.asked)
        shutil.copy(synthesise.out.with_name("out.journal.jsonl"), synthesise.source.parent)
        synthesise.out = synthesise.source.with_name("out.jsonl")
        assert synthesise(peer.url, "--near", 2) == 0 and len(synthesise.rows) == 10
        assert len(peer.asked) <= before + 10 - 2, "the answers that fitted were kept"


def test_a_file_that_is_no_journal_is_not_written_on(synthesise):
    notes = synthesise.out.with_name("out.journal.jsonl")
    notes.write_text("my own\nnotes\n")
    with serving(told) as peer:
        assert synthesise(peer.url) == 2 and "is no journal of answers" in synthesise.said
    assert notes.read_text() == "my own\nnotes\n"


def test_packed_and_parquet_outputs(synthesise, tmp_path):
    with serving(told) as peer:
        for ending in ".jsonl.gz", ".parquet":
            synthesise.out = tmp_path / f"out{ending}"
            assert synthesise(peer.url, "--overwrite") == 0, synthesise.said
        assert len(peer.asked) == 10, "one journal for both"
    assert len(gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()) == 10


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("https://api.example.com/openai/v1/chat/completions", "https://api.example.com/openai/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses(url, base):
    assert teacher.address(url) == base


def test_numbered_lists():
    assert numbered("1. One\n2. Two\n and more\n\n**3.** Three") == ["One", "Two\n and more", "Three"]
    assert numbered("none at all") == []


def test_nearly_the_same():
    near = Near(0.7)
    text = "it stands in the garden of my aunt where nobody has ever seen it before this year"
    assert near.new(text) and not near.new(f"{text.upper()}!") and not near.new(f"Yes, {text}")
    assert near.new(" ".join(reversed(text.split())))
