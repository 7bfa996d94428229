"""The chain of one repository: its stages are the verbs, what is done is not done again, and what cannot be
made into a model is said by a code of its own.
"""

import json
import random
import shutil

import pytest

from lora_recipes.__main__ import main
from lora_recipes.core.errors import Exit, RecipeError
from lora_recipes.recipe import load as recipes
from lora_recipes.release.repo_model import DATA, repo_model

WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "jetty"]


def function(name: str, number: int, examples: bool = False) -> str:
    """A function that is like no other, with examples for a test or without."""
    drawn = random.Random(f"{name} {number}")
    lines = [f"    {drawn.choice(WORDS)} = '{' '.join(drawn.choices(WORDS, k=6))}'" for _ in range(5)]
    shown = f"\n\n    >>> {name}_{number}(1)\n    {number + 1}\n    " if examples else ""
    doc = f'    """Open {" ".join(drawn.choices(WORDS, k=4))}.{shown}"""'
    return "\n".join([f"def {name}_{number}(door):", doc, *lines, f"    return door + {number}", "", ""])


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "doors"
    folder.mkdir()
    for name in ("hinge", "latch", "sill", "jamb", "knob"):
        functions = [function(name, number, name == "hinge") for number in range(3)]
        (folder / f"{name}.py").write_text("\n".join(functions))
    return folder


class Stopped:
    """The program's main, that ends with 7 where training begins; `called`: verbs and what they make."""

    def __init__(self):
        self.called = []

    def __call__(self, words):
        self.called.append(words[0] if words[0] != "data" else words[-2].split("/")[-1])
        return 7 if words[0] == "train" else main(words)


def test_each_stage_is_done_once_and_again_where_what_it_reads_has_changed(
    repository, case, tmp_path, capsys
):
    recipe = case("qwen_base_eos_set", train__max_length=800)

    def chain(first=None, only=None, rows=12):
        called = Stopped()
        code = repo_model(called, str(repository), str(recipe), tmp_path, rows, first, only, None)
        return code, called.called

    made = ["identifiers", "rows", "clean", "unique", "short", "general", "train", "held_out", "eval"]
    files = [f"{name}.jsonl" for name in made]
    assert chain() == (7, [files[0], "tasks", *files[1:], "train"])
    said = capsys.readouterr().out
    assert "FROM=train" in said or "--from train" in said
    folder = tmp_path / "_repo" / "doors"
    rows = {name: (folder / name).read_text().splitlines() for name in (*files, "rows.held_out.jsonl")}
    held = {json.loads(line)["path"] for line in rows["rows.held_out.jsonl"]}
    assert held == {"hinge.py"}, "its functions are the tasks"
    assert len(rows["train.jsonl"]) == 12 and sum("door" not in line for line in rows["train.jsonl"]) == 3
    assert (folder / "extract.txt").read_text() in said and set(
        json.loads((folder / "state.json").read_text())
    ) == {*DATA}
    assert chain() == (7, ["train"]), "all else is done"
    assert chain("mix") == (7, ["train.jsonl", "held_out.jsonl", "eval.jsonl", "train"])
    assert chain(only="secrets") == (0, ["clean.jsonl"])
    assert chain(rows=8) == (7, ["train.jsonl", "train"]), "other words"
    (folder / "eval.jsonl").unlink()
    assert chain(rows=8) == (7, ["eval.jsonl", "train"]), "what was made is gone"
    with (repository / "sill.py").open("a") as file:
        file.write(function("sill", 9))
    assert len(chain(rows=8)[1]) >= 6, "another source"
    with pytest.raises(RecipeError, match=r"is no stage\n    -> did you mean merge"):
        chain("merg")
    shutil.copytree(repository, tmp_path / "other" / "doors")
    repository = tmp_path / "other" / "doors"
    with pytest.raises(RecipeError, match=r"is of .*, not of .*other/doors"):
        chain()


def documented(name, lines=5):
    body = "\n".join(f"    x = {n}" for n in range(lines))
    return f'def {name}(x):\n    """Go there and back."""\n{body}\n'


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        (None, Exit.NO_SOURCE, "no such folder"),
        ({"README.md": "no Python"}, Exit.NO_PYTHON, "has no Python file"),
        ({"a.py": "def f(x):\n    return x\n", "b.py": "X = 1\n"}, Exit.NO_DOCSTRINGS, "has a docstring"),
        ({"a.py": documented("f") + documented("g")}, Exit.ONE_MODULE, "a module is held out whole"),
        ({"a.py": documented("f"), "b.py": "X = 1\n"}, Exit.ONE_MODULE, "1 module with rows"),
    ],
)
def test_a_repository_that_gives_no_model_is_refused_by_a_code_of_its_own(
    case, tmp_path, capsys, files, code, said
):
    folder = tmp_path / "source"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    words = [
        "repo-model",
        str(folder),
        "--recipe",
        str(case("qwen_base_eos_set")),
        "--outputs",
        str(tmp_path),
    ]
    assert main(words) == code
    assert said in capsys.readouterr().err
    if files and len(files) == 1 and "a.py" in files:
        assert main([words[0], str(folder / "a.py"), *words[2:]]) == Exit.ONE_MODULE
        assert "is one file" in capsys.readouterr().err


def test_the_small_recipe_is_the_twin_of_the_published_one():
    small, large = recipes.load("smollm2_repo"), recipes.load("qwen25_coder_7b_repo")
    assert small.sections["lora"] == large.sections["lora"]
    assert small.sections["data"] | {"kept": None} == large.sections["data"] | {"kept": None}
    same = ("learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "seed")
    assert all(getattr(small.train, key) == getattr(large.train, key) for key in same)
    assert (large.train.max_length, large.train.gradient_accumulation_steps) == (2048, 4)
