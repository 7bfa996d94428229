"""A repository's own tasks: what a function needs of its module, and only what its examples really test."""

import json

import pytest

from lora_recipes.__main__ import main
from lora_recipes.curate import cli as curate
from lora_recipes.evaluation import pass_at_k, sandbox, tasks

MODULE = '''"""Doors."""

from __future__ import annotations

import math
import unused_and_nowhere

HINGES = 2
WIDE = HINGES + 1
OTHER = 4


def half(door: int) -> int:
    """Half of it, rounded.

    >>> half(5)
    2
    """
    # by a hinge
    return math.floor(door / HINGES)


def span(*doors):
    """All of them, by what stands below.

    >>> span(1, 2)
    9
    >>> span()
    Traceback (most recent call last):
    ValueError: none
    """
    if not doors:
        raise DoorError("none") if doors else ValueError("none")
    return total(doors) * WIDE


def total(doors):
    """Of the doors."""
    return sum(doors)


class DoorError(Exception):
    """No door."""


def wrong():
    """Is it?

    >>> wrong()
    3
    """
    return 4


def anything():
    """Says nothing of itself.

    >>> 1 + 1
    2
    """
    return None


async def later():
    """Not now.

    >>> later()
    2
    """
    return 2


def long():
    """Much of it.

    >>> long() > 1
    True
    """
    return len(TEXT)


TEXT = "REPEATED"
'''


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "doors"
    folder.mkdir()
    (folder / "gate.py").write_text(
        MODULE.replace("import unused_and_nowhere\n", "").replace("REPEATED", "x" * 999)
    )
    body = "\n".join(f"    x = {i}" for i in range(6))
    for name in ("near", "far"):
        (folder / f"{name}.py").write_text(f'def {name}(x):\n    """Go there and back."""\n{body}\n')
    return folder


def test_a_task_has_what_its_function_needs_and_its_examples_judge_it(repository, tmp_path, capsys):
    out = tmp_path / "tasks.jsonl"
    assert main(["tasks", str(repository), str(out), "--longest", "700"]) == 0
    said = capsys.readouterr().out
    for reason in ("its own body does not pass", "its examples pass without its body", "an async function"):
        assert f"1 {reason}" in said
    assert "1 a prompt of more than 700 characters" in said
    read = tasks.read("tasks.jsonl", out, "here")
    assert [task.task_id for task in read.tasks] == ["gate.half", "gate.span"]
    half, span = read.tasks
    assert half.prompt.startswith(
        "from __future__ import annotations\nimport math\nHINGES = 2\n\n\ndef half("
    )
    assert half.canonical_solution == "    # by a hinge\n    return math.floor(door / HINGES)\n"
    for name in ("WIDE = HINGES + 1", "def total", "class DoorError"):
        assert name in span.prompt and name not in half.prompt
    assert (
        "OTHER" not in span.prompt and "\n\n\n\n" not in span.prompt and span.prompt.rstrip().endswith('"""')
    )
    box = sandbox.find()
    bodies = ["    return door // 2\n", "    return 2.0\n", "    return door\n"]
    programs = [(half, half.prompt + body, "", False) for body in bodies]
    found = [sample.verdict for sample in pass_at_k.judged(box, "x", programs)]
    assert found == ["passed", "failed", "failed"], "2.0 is not how 2 is written"
    rows = tmp_path / "rows.jsonl"
    assert curate.main(["extract", str(repository), str(rows), "--tasks", str(out), "--min-lines", "1"]) == 0
    held = [json.loads(line)["path"] for line in (tmp_path / "rows.held_out.jsonl").read_text().splitlines()]
    assert set(held) == {"gate.py"}, "modules with tasks are held out"
    capsys.readouterr()
    assert curate.main(["extract", str(repository), str(rows), "--tasks", str(repository / "gate.py")]) == 2
    assert "names no files" in capsys.readouterr().err


def test_a_source_that_is_none_and_one_without_examples(repository, tmp_path, capsys):
    out = tmp_path / "none.jsonl"
    assert main(["tasks", str(tmp_path / "nowhere"), str(out)]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["tasks", str(repository / "near.py"), str(out)]) == 0
    assert "no row is left" in capsys.readouterr().out and out.read_text() == ""
