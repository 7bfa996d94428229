"""The shape of the package, read from its files: imports point one way, the torch-free rooms stay so, nothing grows too long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_recipes"

# From low to high; a module imports only those before it.
FACTS = ["messages", "yamlfile", "check", "recipe", "contract", "weights", "adapter", "steps", "run", "provenance", "servable"]
FACTS += ["fits", "layout", "resume", "rows", "data", "endpoint", "live", "vllm_command", "process", "serve", "chat"]
FACTS += ["grid", "ablation", "interval", "figures", "report", "workers", "cluster"]
LIBRARY = ["variants", "bases", "freeze", "targets", "characters", "render", "vocabulary", "tokenizing", "peft_training", "rates"]
LIBRARY += ["start", "build", "methods", "gate", "evaluate", "reference", "storages", "kernels", "fake", "rehearsal", "memory"]
LIBRARY += ["choices", "plan", "watch", "card", "usage", "launch", "finish", "train", "merge"]
LIBRARY += ["shared", "arms", "ablate", "attach", "evaluation", "combine"]
ORDER = FACTS + LIBRARY
ALLOWED = {name: set(ORDER[:i]) for i, name in enumerate(ORDER)}
ALLOWED |= {"__init__": set(), "cli": {"messages", "recipe"}, "schema": {"messages"}}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
SOURCES = sorted([*PACKAGE.glob("*.py"), *(ROOT / "scripts").glob("*.py")], key=str)
HEAVY = {"torch", "transformers", "peft", "trl", "datasets"}


def tree(path):
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes):
    """The dotted names that the import statements among `nodes` import: `from a import b` gives a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside_functions(node):
    """Every node that runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def test_every_module_has_its_place_in_the_order():
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    """Imports inside functions count: a late import is the usual way around an order."""
    own = {full.split(".")[1] for full in imported(ast.walk(tree(PACKAGE / f"{name}.py"))) if full.startswith("lora_recipes.")}
    assert own <= ALLOWED.get(name, set()), f"{name} imports {sorted(own - ALLOWED.get(name, set()))}, which stand above it"


@pytest.mark.parametrize("name", [*FACTS, "cli", "__init__"])
def test_the_low_rooms_import_no_heavy_library(name):
    heavy = {full for full in imported(outside_functions(tree(PACKAGE / f"{name}.py"))) if full.split(".")[0] in HEAVY}
    assert not heavy


def test_there_is_one_trainer():
    """By text, so that a second one cannot hide behind another name for the module."""
    found = [path.name for path in PACKAGE.glob("*.py") for _ in range(path.read_text(encoding="utf-8").count("SFTTrainer("))]
    assert found == ["build.py"]


def test_nothing_makes_the_model_a_peft_model_before_the_trainer_does():
    """methods.py and fake.py measure on models without bytes and are no way to training."""
    calls = {
        path.stem
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "get_peft_model"
    }
    assert calls <= {"methods", "fake"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_module_is_longer_than_260_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 260


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_function_is_longer_than_45_lines(path):
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 45} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_sources_are_ascii(path):
    assert path.read_text(encoding="utf-8").isascii()


def test_the_readme_tells_what_every_module_is_for():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in MODULES if not name.startswith("__") and f"{name}.py" not in readme] == []
