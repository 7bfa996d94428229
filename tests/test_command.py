"""`lora-recipes`: the verbs, what the package ships, and where a path in a recipe is looked for."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

import lora_recipes
from lora_recipes.__main__ import VERBS, _tree, main
from lora_recipes.core import cli, files, shipped
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import read, render
from lora_recipes.evaluation.evaluate import evaluation
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.resume import differences
from lora_recipes.training.train import train

ROWS = (files.ROOT / "data/facts/corrections.jsonl").read_text(encoding="utf-8")


def said(capsys, *words):
    """The exit code and what was said, of a verb called in this process."""
    code: str | int | None
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture
def own(tmp_path):
    """A recipe in a folder of its own, with its rows and its chat template beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    sections = recipes.load("tiny_facts").sections
    sections["data"] |= {"train": "rows.jsonl", "kept": [{"path": "../kept.jsonl"}]}
    sections["model"] |= {"chat_template": "own.jinja"}
    (folder / "own.yaml").write_text(yaml.safe_dump(sections, allow_unicode=True))
    (folder / "own.jinja").write_text("{{ messages }}")
    (folder / "rows.jsonl").write_text(ROWS)
    shutil.copy(files.ROOT / "data/facts/kept.jsonl", tmp_path)
    return folder / "own.yaml"


def test_every_verb_is_listed_and_tells_its_options(capsys):
    code, text = said(capsys, "--help")
    assert code == 0 and {*VERBS} <= set(re.findall(r"^ {4}([a-z-]+)", text, re.MULTILINE))
    for verb, (*_, told) in VERBS.items():
        code, text = said(capsys, verb, "--help")
        assert code == 0 and text.startswith(f"usage: lora-recipes {verb} "), verb
        assert told in " ".join(text.split()) and "--traceback" in text
    assert said(capsys, "--version") == (0, f"lora-recipes {lora_recipes.__version__}\n")


def test_the_scripts_are_calls_of_the_verbs():
    for script in files.ROOT.glob("scripts/*.py"):
        verb = "eval" if script.stem == "evaluate" else script.stem
        if script.stem not in ("lowest", "memory", "schema", "vllm_table"):
            assert verb in VERBS and f'main(["{verb}", *sys.argv[1:]])' in script.read_text()


CALLED = {
    "/r/.venv/bin/lora-recipes": False,
    "/r/lora_recipes/__main__.py": False,
    "scripts/train.py": True,
    "/r/.venv/lib/pytest/__main__.py": True,
}


@pytest.mark.parametrize("path", CALLED)
def test_a_message_spells_a_command_as_the_program_was_called(monkeypatch, path):
    monkeypatch.setattr(sys, "argv", [path])
    monkeypatch.delenv("MAKELEVEL", raising=False)
    given = [
        cli.command("train", RECIPE="x", FORCE=True),
        cli.command("ablate", ABLATION="my question", ONLY="r4/s1", DRY=True),
        cli.command(SET=["lora.r=4", "lora.rank_pattern={q_proj: 2}"]),
        cli.command(SVD_RANK=""),
    ]
    assert given == (
        [
            "make train RECIPE=x FORCE=1",
            "make ablate ABLATION='my question' ONLY=r4/s1 DRY=1",
            "SET='lora.r=4 lora.rank_pattern={q_proj: 2}'",
            "SVD_RANK",
        ]
        if CALLED[path]
        else [
            "lora-recipes train x --force",
            "lora-recipes ablate 'my question' --only r4/s1 --dry-run",
            "lora.r=4 'lora.rank_pattern={q_proj: 2}'",
            "--svd-rank",
        ]
    )


def test_what_make_starts_through_a_launcher_is_still_called_by_make(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/r/lora_recipes/__main__.py"])
    monkeypatch.setenv("MAKELEVEL", "1")
    assert cli.command("eval", RECIPE="x") == "make eval RECIPE=x"


def spelled():
    """Each call of cli.command in the package: where, the verb, the variables."""
    for file in sorted((files.ROOT / "lora_recipes").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "cli.command":
                verb = (
                    ast.literal_eval(node.args[0])
                    if node.args and isinstance(node.args[0], ast.Constant)
                    else ""
                )
                yield f"{file.name}:{node.lineno}", verb, [k.arg for k in node.keywords if k.arg]


def test_every_command_that_a_message_spells_exists_both_ways():
    makefile = (files.ROOT / "Makefile").read_text(encoding="utf-8")
    options = {name: set(parser._option_string_actions) for name, parser in _tree()[1].items()}
    calls = list(spelled())
    assert len(calls) > 40
    for where, verb, variables in calls:
        assert verb in (*options, "", "setup-serve") and (not verb or f"\n{verb}:" in makefile), where
        for name in variables:
            assert re.search(rf"\$\({name}\)|\b{name}\b", makefile), f"{where}: {name}"
            option = cli.option(name, "")
            known = options[verb] if verb in options else set().union(*options.values())
            assert option in known or not option.startswith("--"), f"{where}: {option}"


@pytest.mark.parametrize("installed, said", [(True, "'lora-recipes[gguf]'"), (False, "-e '.[gguf]'")])
def test_an_extra_is_installed_as_the_project_is(installed, said, monkeypatch):
    monkeypatch.setattr(cli, "INSTALLED", installed)
    assert cli.extra("gguf").endswith(said) and "pip install" in cli.extra("gguf")
    assert "--no-build-isolation" in cli.extra("deepspeed")
    for file in (files.ROOT / "lora_recipes").rglob("*.py"):  # nothing else says it
        assert file.name == "cli.py" or not re.search(r"lora-recipes\[|-e '\.\[", file.read_text("utf-8")), (
            file
        )


def test_no_message_spells_a_command_itself():
    """Docstrings, and the pages and the schema that are made from texts, may."""
    names = (
        "RECIPE SET FORCE RESUME BASE ACCELERATE PROCESSES OUTPUTS DTYPE ADAPTERS? ONLY OVER SEEDS JOBS"
        " ABLATION METHOD DENSITY SVD_RANK NAME MODEL PORT HOST CHECK ADD REMOVE DYNAMIC ON DRY FIT"
        " COMPARE DEVICES REPO PUBLIC"
    )
    written = re.compile(rf"\bmake ({'|'.join(VERBS)}|setup-serve)\b|\b({names.replace(' ', '|')})=")
    found = []
    for file in sorted((files.ROOT / "lora_recipes").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        said = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if id(node) not in said and written.search(text):
                found.append(f"{file.name}: {text}")
    assert [text for text in found if not text.startswith(("schema.py", "sections.py"))] == []


def test_wrong_names_are_answered_with_the_nearest(capsys, tmp_path):
    code, text = said(capsys, "trian", "tiny_facts")
    assert code == 2 and "there is no 'trian': did you mean train?" in text
    code, text = said(capsys, "cp", "tiny_fact", str(tmp_path / "x.yaml"))
    assert code == 2 and "did you mean tiny_facts?" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "tiny_facts", "--json", "lora.rank=4", "train.seeds=1"],
        ["plan", "--json", "lora.rank=4", "train.seeds=1"],
        ["train", "tiny_facts", "lora.rank=4", "--resume", "train.seeds=1"],
        ["train", "--outputs", "none", "tiny_facts", "lora.rank=4", "--force", "train.seeds=1"],
    ],
    ids=" ".join,
)
def test_overrides_may_stand_anywhere_among_the_options(capsys, words):
    code, text = said(capsys, *words)
    if words[1] == "--json":  # the first word is the recipe's name: it must be told so
        assert code == 2 and "the recipe's name comes first" in text
    else:
        assert code == 2 and "'lora.rank=4'" in text and "'train.seeds=1'" in text


def test_ls_lists_every_shipped_file_with_what_it_is_for(capsys):
    code, text = said(capsys, "ls")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line[:2] == "  "]
    stems = [file.stem for file in (files.ROOT / "configs").rglob("*.yaml")]
    assert code == 0 and sorted(name for name, _ in lines) == sorted(stems)
    assert dict(lines)["tiny_facts"] in (files.ROOT / "configs/recipes/tiny_facts.yaml").read_text()
    assert all(len(text) > 10 and "schema" not in text for _, text in lines)


def test_cp_begins_a_recipe_of_ones_own_and_overwrites_nothing(capsys, tmp_path):
    target = tmp_path / "my.yaml"
    assert said(capsys, "cp", "qwen35_4b_style", str(target))[0] == 0
    mine, theirs = recipes.load(str(target)), recipes.load("qwen35_4b_style")
    assert mine.sections == theirs.sections and mine.name == "my"
    assert read.read(mine, "train").sha256 == read.read(theirs, "train").sha256
    first = target.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={shipped.SCHEMA}" and shipped.SCHEMA.is_file()
    code, text = said(capsys, "cp", "tiny_facts", str(target))
    assert code == 2 and "is already there" in text and recipes.load(str(target)).sections == mine.sections
    assert said(capsys, "cp", "tiny_rank", str(tmp_path))[0] == 0 and (tmp_path / "tiny_rank.yaml").is_file()
    code, text = said(capsys, "cp", "tiny_facts", str(tmp_path / "my"))
    assert code == 2 and "my.yaml" in text
    code, text = said(capsys, "cp", "tiny_rslora", str(tmp_path))
    assert code == 2 and "say recipes/methods/tiny_rslora or ablations/tiny_rslora" in text
    assert said(capsys, "cp", "ablations/tiny_rslora", str(tmp_path))[0] == 0
    assert "recipe: tiny_facts" in (tmp_path / "tiny_rslora.yaml").read_text()


def test_a_path_is_tried_beside_the_recipe_then_here_then_in_the_repository(own, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "data" / "facts").mkdir(parents=True)
    monkeypatch.chdir(here)
    loaded = recipes.load(str(own), ["data.eval=data/facts/single_fact.jsonl"])
    assert loaded.file("rows.jsonl") == own.parent / "rows.jsonl"
    assert loaded.file("../kept.jsonl") == tmp_path / "kept.jsonl"
    assert loaded.file("data/facts/single_fact.jsonl").is_relative_to(files.ROOT)
    (here / "data/facts/single_fact.jsonl").write_text(ROWS)
    (here / "rows.jsonl").write_text("")
    assert loaded.file("data/facts/single_fact.jsonl").is_relative_to(here)
    assert loaded.file("rows.jsonl") == own.parent / "rows.jsonl"
    assert len(read.read(loaded, "train").rows) == len(ROWS.splitlines())
    assert render.chat_template("own.jinja", "", own.parent) == "{{ messages }}"


def test_a_file_that_is_nowhere_is_told_with_where_it_was_looked_for(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looked = f"looked in {own.parent}, {tmp_path}, {files.ROOT}"
    with pytest.raises(RecipeError) as error:
        read.read(recipes.load(str(own), ["data.train=gone.jsonl"]), "train")
    assert "gone.jsonl cannot be read (No such file" in str(error.value) and looked in str(error.value)
    with pytest.raises(RecipeError, match=r"gone.jinja cannot be read") as error:
        render.chat_template("gone.jinja", "", own.parent)
    assert looked in str(error.value)
    with pytest.raises(RecipeError, match=f"looked in {tmp_path}, {files.ROOT}"):
        recipes.load("gone.yaml")


def test_a_run_finds_its_data_and_its_base_again_from_any_folder(own, trained, tmp_path, monkeypatch):
    """outputs/ is a link, and the run is asked from another folder than it was trained from."""
    base = own.with_name("first.yaml")
    base.write_text(recipes.load("tiny_base").to_yaml())
    scratch, outputs = tmp_path / "deep" / "down" / "scratch", own.parent / "outputs"
    scratch.mkdir(parents=True)
    outputs.symlink_to(scratch)
    shutil.copytree(trained / "tiny_base", outputs / "first")
    text = own.read_text().replace("tiny_base", "first.yaml")
    own.write_text(text.replace("  chat_template: own.jinja\n", ""))
    monkeypatch.chdir(own.parent)
    train(resolve(recipes.load("own.yaml"), Path("outputs")))
    monkeypatch.chdir(files.ROOT)
    again = recipes.load(str(outputs / "own" / "recipe.yaml"))
    assert isinstance(again.data.train, str)
    assert again.file(again.data.train).samefile(own.parent / "rows.jsonl")
    found = evaluation(str(own), outputs)
    assert found.sets["kept"].rows > 0
    folder, loaded = RunFolder(outputs / "own"), recipes.load(str(own))
    assert differences(folder, loaded, {}) == []
    shutil.copy(own.parent / "rows.jsonl", own.parent / "other.jsonl")
    (line,) = differences(folder, recipes.load(str(own), ["data.train=other.jsonl"]), {})
    assert line.startswith("data.train: the run began with") and "rows.jsonl" in line


def test_every_room_is_in_the_wheel():
    listed = tomllib.loads((files.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {p.parent.name for p in (files.ROOT / "lora_recipes").glob("*/__init__.py")}
    assert {f"lora_recipes.{room}" for room in rooms} == {
        name for name in listed if name.count(".") == 1
    } and "lora_recipes" in listed


def test_an_installed_package_lists_copies_and_plans_from_an_empty_folder(tmp_path):
    source, environment, empty = tmp_path / "source", tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "conversations")
    for name in ("lora_recipes", "configs", "data", "scripts"):
        shutil.copytree(files.ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(files.ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "seen.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # what this environment has
    (wheel,) = tmp_path.glob("*.whl")
    python = str(environment / "bin" / "python")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)

    def run(*words):
        return subprocess.run(
            [str(environment / "bin" / "lora-recipes"), *words],
            cwd=empty,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("ls")
    assert done.returncode == 0 and "tiny_facts" in done.stdout and "tiny_qwen35" in done.stdout
    assert {"teacher.txt", "rules.txt"} <= {f.name for f in site.glob("lora_recipes/shipped/data/prompts/*")}
    assert run("cp", "tiny_facts", "my.yaml").returncode == 0
    schema = (empty / "my.yaml").read_text().splitlines()[0].partition("$schema=")[2]
    assert Path(schema).is_relative_to(site) and Path(schema).is_file()
    done = run("plan", "my.yaml", "--json", "lora.r=2")
    assert done.returncode == 0, done.stderr
    assert '"r": 2' in done.stdout and [p.name for p in empty.iterdir()] == ["my.yaml"]
    done = run("plan", "gone.yaml")
    assert done.returncode == 2 and f"looked in {empty}, {site}/lora_recipes/shipped" in done.stderr
    done = run("merge", "tiny_facts")
    assert done.returncode == 2 and "-> lora-recipes train tiny_facts\n" in done.stderr
    done = run("serve", "tiny_facts")
    assert done.returncode == 2 and "python3 -m venv .venv-serve && " in done.stderr
    assert "make " not in done.stderr


# ---- overrides among the options


RATE = "train.learning_rate=7e-3"
WHERE = {
    "after an option": (
        "train",
        ["X", "--resume", RATE],
        {"recipe": "X", "overrides": [RATE], "resume": True},
    ),
    "before one": ("plan", ["X", RATE, "--devices", "2"], {"overrides": [RATE], "devices": 2}),
    "between two": ("eval", ["X", "--adapter", "d", RATE, "--traceback"], {"overrides": [RATE]}),
    "after seeds": (
        "ablate",
        ["X", "--seeds", "1", "2", "lora.r=2,4"],
        {"over": ["lora.r=2,4"], "seeds": [1, 2]},
    ),
    "between seeds and jobs": (
        "ablate",
        ["X", "lora.r=2,4", "--seeds", "1", "lora.lora_alpha=3,4", "--jobs", "1"],
        {"over": ["lora.r=2,4", "lora.lora_alpha=3,4"], "seeds": [1], "jobs": 1},
    ),
    "after names of arms": ("ablate", ["X", "--only", "a", "b/s1", "lora.r=2"], {"only": ["a", "b/s1"]}),
}


@pytest.mark.parametrize("verb, words, expected", WHERE.values(), ids=WHERE)
def test_an_override_may_stand_after_any_option(verb, words, expected, monkeypatch):
    seen: dict[str, object] = {}
    options, _, told = VERBS[verb]
    monkeypatch.setitem(VERBS, verb, (options, lambda given: seen.update(vars(given)), told))
    assert main([verb, *words]) == 0
    assert {key: seen[key] for key in expected} == expected
