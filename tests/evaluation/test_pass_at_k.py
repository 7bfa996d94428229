"""pass@k: the estimator, the tasks, and a server that answers well, badly and not to the end."""

import gzip
import itertools
import json
import statistics

import pytest
from scipy.stats import binomtest

from lora_recipes.__main__ import main
from lora_recipes.core import interval
from lora_recipes.core.errors import Exit, RecipeError
from lora_recipes.core.record import Run
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.curate import human_eval
from lora_recipes.evaluation import pass_at_k, sandbox, tasks
from lora_recipes.evaluation.tasks import Task
from tests.curate.peer import Asked, serving
from tests.typed import there

DOUBLE = Task(
    "double",
    "import math\n\ndef double(x):\n    '''Twice x.'''\n",
    "double",
    "def check(f):\n    assert f(3) == 6",
)
ENDLESS = Task("endless", "def stay(x):\n", "stay", "while True: pass")


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (5, 2), (6, 5), (4, 4)])
def test_the_estimate_is_the_mean_over_all_choices_of_k_samples(n, c):
    for k in range(1, n + 1):
        drawn = itertools.combinations([True] * c + [False] * (n - c), k)
        assert pass_at_k.estimate(n, c, k) == pytest.approx(statistics.fmean(map(any, drawn)))


@pytest.mark.parametrize("count, total", [(20, 0), (20, 1), (20, 20), (164, 5), (3, 2)])
def test_the_interval_of_a_share_is_scipys_exact_one(count, total):
    wanted = binomtest(total, count).proportion_ci(method="exact")
    assert interval.share(total, count) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def row(task, **more):
    return {k: v for k, v in vars(task).items() if v is not None} | more


@pytest.mark.parametrize(
    "line, told",
    [
        ("{", "x.jsonl:2: no JSON"),
        ("[1]", "x.jsonl:2: no object"),
        (
            json.dumps({"task_id": "a", "prompt": "p"}),
            r"x.jsonl:2 entry_point: is missing.*\n.*\n.*2 test: is",
        ),
        (json.dumps(row(DOUBLE)), "x.jsonl:2: 'double' again"),
        (json.dumps(row(DOUBLE, task_id="b", entry_point="a b")), "2 entry_point: 'a b' is no name"),
        (json.dumps(row(DOUBLE, task_id="b", test="assert (")), "2 test: is no Python"),
        (
            json.dumps(row(DOUBLE, task_id="b", test="def test_it():\n    assert 0")),
            "2 test: asserts nothing",
        ),
        (
            json.dumps(row(DOUBLE, task_id="b", canonical_solution=3)),
            "canonical_solution: is missing, or no text",
        ),
    ],
)
def test_a_task_that_is_none_is_named(tmp_path, line, told):
    file = write(tmp_path / "x.jsonl", [row(DOUBLE)])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(RecipeError, match=told):
        tasks.read("x.jsonl", file, "here")


def test_files_that_hold_no_tasks(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])
    for name, told in ("empty.jsonl", "holds no task"), ("cut.jsonl.gz", "cannot be read"), ("no", "no file"):
        with pytest.raises(RecipeError, match=told):
            tasks.read(name, tmp_path / name, "here")


def test_the_code_of_a_sample_is_put_together_from_prompt_and_answer():
    assert DOUBLE.helpers == DOUBLE.prompt and ENDLESS.helpers == ""
    assert Task("", "import re\n\ndef f(x):\n    return (", "f", "").helpers == "import re\n\n"
    assert DOUBLE.program("\n    return x\n\ndef more(): ...", False) == DOUBLE.prompt + "    return x\n"
    whole = "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nThat is it.\n```\nno\n```"
    assert DOUBLE.program(whole, True) == DOUBLE.prompt + "\ndef double(x):\n    return 2 * x\n"
    assert DOUBLE.program("```\n    return 2 * x", True) == DOUBLE.prompt + "    return 2 * x"
    assert DOUBLE.program("    return 2 * x", True) == DOUBLE.prompt + "    return 2 * x"


def test_humanevals_own_solutions_pass_and_nothing_else_does():
    """Those whose tests need names of the prompt, and a few; all 164: docs/evaluation.md."""
    try:
        read = tasks.read(human_eval.NAME, None, "test")  # type: ignore[arg-type]
    except RecipeError:
        pytest.skip("the package index has no human-eval here")
    assert read.whole == len(read.tasks) == 164
    some = [read.tasks[n] for n in (0, 2, 32, 38, 50, 53, 162)]
    box = sandbox.find()
    programs = [(t, t.prompt + str(t.canonical_solution), "", False) for t in some]
    programs += [(t, t.prompt + "    return None\n", "", False) for t in some]
    verdicts = [s.verdict for s in pass_at_k.judged(box, "x", programs)]
    assert verdicts[:7] == ["passed"] * 7 and "passed" not in verdicts[7:]


@pytest.fixture
def passk(tmp_path, trained, capsys):
    """Runs the verb on tasks of its own; has `said`, and `report`."""

    class Run:
        outputs, said = tmp_path / "outputs", ""
        file = tmp_path / "tasks.jsonl"

        def __call__(self, url, rows, *words):
            write(self.file, rows)
            asked = ["passk", "tiny_facts", f"evaluate.tasks={self.file}", "evaluate.timeout=1"]
            code = main([*asked, "--url", url, "--outputs", str(self.outputs), *words])
            read = capsys.readouterr()
            self.said = read.out + read.err
            return code

        @property
        def report(self):
            return json.loads((self.outputs / "tiny_facts/pass_at_k/tasks.report.json").read_text())

    return Run()


MODELS = ("base", "tiny_facts")


def doubling(asked: Asked) -> None:
    """The base adds; the adapter doubles, at every second seed of a task that is sampled."""
    right = asked.body["model"] == "tiny_facts" and asked.body["seed"] % 2 == 0
    asked.say("\n    return x * 2" if right else "\n    return x + 2")


def test_base_and_adapter_are_asked_the_same_judged_and_recorded(passk, trained):
    passk.outputs = trained
    rows = [row(DOUBLE, task_id=f"t{i}") for i in range(7)]
    with serving(doubling, MODELS) as peer:
        assert passk(peer.url, rows) == 0, passk.said
        assert len(peer.bodies) == 14
        assert peer.bodies[0] == {
            "model": "base",
            "prompt": DOUBLE.begun,
            "max_tokens": 512,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "stop": ["\nclass", "\ndef", "\nif", "\nprint"],
        }
        assert passk(peer.url, rows) == 0 and len(peer.bodies) == 14, "nothing is asked twice"
    words = " ".join(passk.said.split())
    assert "tiny_facts 100.0% 59.0% to 100.0% 7 passed" in words
    assert "base 0.0% 0.0% to 41.0% 0 passed, 7 failed" in words
    assert "7 tasks better, 0 worse, p 0.016" in passk.said and "no difference" not in passk.said
    known = RunFolder(trained / "tiny_facts").record
    assert isinstance(known, Run)
    found = there(known.pass_at_k)[str(passk.file)]
    assert found.sandbox in sandbox.LEVELS and found.task_ids == [f"t{i}" for i in range(7)]
    assert found.models["tiny_facts"].pass_at_k["1"].value == 1 and found.models["base"].better is None
    assert passk.report["models"]["base"]["verdicts"] == {"failed": 7}
    assert passk.report["samples"][0]["code"] == DOUBLE.prompt + "    return x + 2"


def test_samples_and_what_did_not_pass_for_its_time_or_the_server(passk):
    def answer(asked: Asked) -> None:
        if asked.text.startswith("refuse"):
            return asked.send(400, json.dumps({"error": {"message": "too long"}}))
        return doubling(asked)

    rows = [row(DOUBLE), row(ENDLESS), row(DOUBLE, task_id="far", prompt="refuse = 1\n" + DOUBLE.prompt)]
    words = ["evaluate.n=4", "evaluate.k=[1, 2, 4]", "evaluate.temperature=0.8", "--model", "tiny_facts"]
    with serving(answer, MODELS) as peer:
        assert passk(peer.url, rows, *words) == 0, passk.said
        assert sorted(b["seed"] for b in peer.bodies if b["prompt"] == DOUBLE.begun) == [0, 1, 2, 3]
    figures = passk.report["models"]["tiny_facts"]
    assert figures["verdicts"] == {"passed": 2, "failed": 2, "time": 4, "no_answer": 4}
    values = [figures["pass_at_k"][k]["value"] for k in ("1", "2", "4")]
    assert values == pytest.approx([1 / 2 / 3, 5 / 6 / 3, 1 / 3])
    assert "4 ended by time (1 s of processor time" in passk.said and "not passed: endless" in passk.said
    assert "4 without an answer of the server (no answer: 400: too long), not passed: far" in passk.said
    assert "no run.json" in passk.said


def test_a_server_that_stops_in_the_middle_has_an_exit_code_and_is_gone_on_with(passk):
    rows = [row(DOUBLE, task_id=f"t{i}", prompt=f"# {i}\n{DOUBLE.prompt}") for i in range(12)]

    def stopping(asked: Asked) -> None:
        if asked.number < 4:
            doubling(asked)
        else:
            asked.send(503, "{}", Retry_After="0")

    with serving(stopping, MODELS) as peer:
        assert passk(peer.url, rows) == Exit.NO_ENDPOINT
    assert "4 answers are kept; the same command goes on from them" in passk.said
    with serving(doubling, MODELS) as peer:
        assert passk(peer.url, rows) == 0, passk.said
        assert len(peer.bodies) == 24 - 4
    assert passk(peer.url, rows) == Exit.NO_ENDPOINT and "no server answers" in passk.said
    with serving(doubling, ("base", "other")) as peer:
        assert passk(peer.url, rows) == 2 and "serves no tiny_facts, but base, other" in passk.said


def test_what_a_chat_is_asked(passk):
    def answer(asked: Asked) -> None:
        asked.say("```python\ndef double(x):\n    return x + x\n```", finish="length")

    with serving(answer, MODELS) as peer:
        assert passk(peer.url, [row(DOUBLE)], "evaluate.form=chat") == 0, passk.said
        content = peer.bodies[0]["messages"][0]["content"]
        assert DOUBLE.begun in content and "stop" not in peer.bodies[0]
    assert "1 passed; 1 cut off" in passk.said and "no difference shown" in passk.said


@pytest.mark.parametrize(
    "words, told",
    [
        (["evaluate.k=[2]"], "of 1 samples there are no 2 to choose"),
        (["evaluate.n=2"], "2 greedy samples of a task are one and the same"),
        (["lora.r=2"], "would change nothing"),
        (["--canonical"], "no task has a canonical_solution"),
    ],
)
def test_what_cannot_be_asked(passk, words, told):
    assert passk("http://127.0.0.1:9", [row(DOUBLE)], *words) == 2 and told in passk.said


def test_canonical_solutions_are_judged_without_a_server(passk):
    rows = [row(DOUBLE, canonical_solution="    return x + x"), row(ENDLESS, canonical_solution="    return")]
    assert passk("http://127.0.0.1:9", rows[:1], "--canonical") == 0 and "1 of 1 canonical" in passk.said
    assert passk("http://127.0.0.1:9", rows, "--canonical") == 1 and "endless: time: " in passk.said


def test_a_classifier_is_not_asked_for_code(capsys):
    assert main(["passk", "tiny_classify"]) == 2 and "a classifier writes no code" in capsys.readouterr().err
