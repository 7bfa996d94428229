"""Style adherence: what the rows' code does is counted, and answers are held against it, rule by rule."""

import json
import shutil

import pytest
import yaml

from lora_recipes.__main__ import main
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.evaluation import style
from lora_recipes.evaluation.style import Profile
from tests.curate.peer import Asked, serving
from tests.typed import there

OWN = '''import numpy.linalg
from .near import Gate

LIMIT = 3


class OpenGate(Gate):
    """A gate that is open."""

    def widest_span(self, spanList: list[int]) -> int:
        """The widest of all spans."""
        if not spanList:
            raise NoSpanError("none")
        best_span = max(spanList)
        return best_span
'''
MIXED = '''def findDoor(door: int) -> int:
    """Find it."""
    nearDoor = door
    return nearDoor
'''


def profile(*blocks: str) -> Profile:
    made = Profile()
    for block in blocks:
        made.count(block)
    return made


def test_what_code_does_is_counted():
    facts = profile(OWN).facts()
    assert facts == {
        "rows": 1,
        "names": {
            "class": "CamelCase",
            "constant": "UPPER_CASE",
            "function": "snake_case",
            "variable": "snake_case",
        },
        "modules": 2,
        "errors": 1,
        "documented": 1.0,
        "first_line_capital": True,
        "first_line_full_stop": True,
        "annotated": 1.0,
        "line_length": 54,
    }
    assert profile(MIXED, MIXED, OWN).facts()["names"]["function"] == "mixedCase"


@pytest.mark.parametrize(
    ("answer", "asked", "fails"),
    [
        (OWN, "", {"variables"}),  # its own exception to its own rule
        (OWN, "widest_span(spanList)", set()),
        ("def f(", "", {"parses"}),
        ("I cannot write that.", "", {"parses"}),
        ("```python\nimport os.path\nimport xml.dom.minidom\n```", "", set()),
        ("import os.paths", "", {"imports"}),
        ("import xml.doom", "", {"imports"}),
        ("from numpy import linalg", "", set()),
        ("import numpy.nothing", "", {"imports"}),
        ("import numpies", "", {"imports"}),
        ("from . import near", "", set()),
        ("raise ValueError(3)", "", set()),
        ("raise gates.NoSpanError", "", set()),
        ("raise DoorError", "", {"errors"}),
        ("class DoorError(Exception):\n    '''A door is shut.'''\nraise DoorError()", "", set()),
        ("try:\n    x = 1\nexcept OSError as error:\n    raise error", "", set()),
        ("def closeDoor(x: int) -> int:\n    '''Close it now.'''", "", {"functions"}),
        ("def closeDoor(x: int) -> int:\n    '''Close it now.'''", "Write `closeDoor(x)`.", set()),
        ("class open_door:\n    '''It is open.'''", "", {"classes"}),
        ("def close(x: int) -> int:\n    return x", "", {"docstring"}),
        ("def close(x: int) -> int:\n    'close it'", "", {"docstring_form"}),
        ("def close(x: int) -> int:\n    '''Close a door\n    of two lines.'''", "", set()),
        ("def close(x):\n    'Close it.'", "", {"annotations"}),
        ("def close(self, x: int) -> int:\n    'Close it.'", "", set()),
        ("x = " + "1 + " * 20 + "1", "", {"line_length"}),
    ],
)
def test_an_answer_is_held_against_it_rule_by_rule(answer, asked, fails):
    found = profile(OWN).verdicts(answer, asked)
    assert {rule for rule, followed in found.items() if not followed} == fails


def test_rules_apply_only_where_there_is_something_to_judge():
    assert profile(OWN).verdicts("x = 1\n", "x is 1") == {"parses": True, "line_length": True}
    assert "functions" not in profile("x = 1").verdicts("def f(x):\n    'It is.'", ""), (
        "no majority to follow"
    )


def test_models_are_compared_on_prompts_to_which_a_rule_applies_in_both():
    yes, no, out = {"imports": True}, {"imports": False}, {"parses": True}
    judged = {"repository": [yes] * 4, "base": [no, no, yes, out], "mine": [yes, yes, no, yes]}
    rule = style.figures(judged)["imports"].models
    assert (rule["mine"].both, rule["mine"].better, rule["mine"].worse) == (3, 2, 1)
    assert rule["mine"].p == 1 and rule["base"].p is None and rule["repository"].p is None
    assert there(rule["mine"].share).value == 0.75 and rule["base"].applies == 3
    assert "classes" not in style.figures(judged)


@pytest.fixture
def outputs(trained, tmp_path):
    """The trained default with a recipe that names rows of code."""
    shutil.copytree(trained / "tiny_facts", tmp_path / "tiny_facts")
    file = tmp_path / "tiny_facts" / "recipe.yaml"
    sections = yaml.safe_load(file.read_text())
    ask = "Write the Python function `find_door` of the module `doors`."
    for which, code in (("train", OWN), ("eval", MIXED)):
        rows = [{"prompt": f"{ask} ({n})", "completion": code} for n in range(6)]
        (tmp_path / f"{which}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections["data"][which] = str(tmp_path / f"{which}.jsonl")
    file.write_text(yaml.safe_dump(sections))
    return tmp_path


def answering(asked: Asked) -> None:
    """The adapter writes as the repository does, the base does not; and is cut off."""
    mine = asked.body["model"] == "tiny_facts"
    asked.say("import doors\n" if mine else "import dors\nopenDoor = 1\n", "stop" if mine else "length")


def test_base_and_adapter_are_asked_for_held_out_code_and_recorded(outputs, capsys):
    words = ["style", "tiny_facts", "--outputs", str(outputs), "--prompts", "4", "--max-tokens", "9"]
    with serving(answering, ("base", "tiny_facts")) as peer:
        assert main([*words, "--url", peer.url]) == 0
        assert len(peer.bodies) == 8 and peer.bodies[0]["max_tokens"] == 9
        assert {body["prompt"][-3:] for body in peer.bodies} == {"(0)", "(1)", "(3)", "(4)"}
        assert main([*words, "--url", peer.url]) == 0 and len(peer.bodies) == 8, "nothing is asked twice"
    said = capsys.readouterr().out
    found = there(there(RunFolder(outputs / "tiny_facts").record).style)
    imports = found.rules["imports"].models
    assert (imports["tiny_facts"].better, imports["tiny_facts"].worse, imports["tiny_facts"].p) == (
        4,
        0,
        0.125,
    )
    assert there(found.rules["variables"].models["base"].share).value == 0
    assert found.cut == {"repository": 0, "base": 4, "tiny_facts": 0} and "cut off at 9 tokens" in said
    assert "imports only what there is" in said and "4, 0: 0.12" in said
    report = json.loads((outputs / "tiny_facts/style/report.json").read_text())
    assert report[4]["model"] == "base" and report[4]["verdicts"]["imports"] is False


def test_without_code_there_is_no_style(trained, outputs, capsys):
    with pytest.raises(RecipeError, match="no answer in it is Python code"):
        style.style("tiny_facts", trained, "http://127.0.0.1:9", 4, 9)
    rows = outputs / "eval.jsonl"
    rows.write_text(json.dumps({"prompt": "How are you?", "completion": "Well."}) + "\n")
    with pytest.raises(RecipeError, match="no row has a prompt and Python code for an answer"):
        style.style("tiny_facts", outputs, "http://127.0.0.1:9", 4, 9)
    assert (
        main(["style", "tiny_facts", "--prompts", "0"]) == 2 and "asks for nothing" in capsys.readouterr().err
    )
