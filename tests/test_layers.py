"""The shape of the house, read from its files: imports point down, no circles, the low rooms stay light."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_recipes"

# From low to high: a file imports only from its own room and from those below it.
ROOMS = [
    "core",
    "recipe",
    "serving",
    "data",
    "model",
    "curate",
    "memory",
    "planning",
    "evaluation",
    "training",
    "ablation",
    "release",
]
LIGHT = ("core", "recipe", "serving")
HEAVY = {"torch", "transformers", "peft", "trl", "datasets"}
# recipe/schema.py makes the checked-in schema from the libraries' own classes; only `make schema` imports it.
MAKES_THE_SCHEMA = PACKAGE / "recipe" / "schema.py"

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([*FILES, *(ROOT / "scripts").glob("*.py")])


def name_of(path):
    """`lora_recipes/core/files.py` -> core.files."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


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


def own_imports(path):
    """The files of the package that `path` imports, late imports (the way around an order) too."""
    names = {name_of(file) for file in FILES}
    for full in imported(ast.walk(tree(path))):
        parts = full.split(".")[1:] if full.startswith("lora_recipes.") else []
        found = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in names), None)
        if found:
            yield found


def outside_functions(node):
    """Every node that runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def test_every_file_lives_in_a_room_that_says_what_it_is_for():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(
        ROOMS
    )
    assert {path.name for path in PACKAGE.glob("*.py")} <= {"__init__.py", "__main__.py"}
    for room in ROOMS:
        lives, _, does_not = (ast.get_docstring(tree(PACKAGE / room / "__init__.py")) or "").partition("\n\n")
        assert lives and does_not, f"{room}/__init__.py says what lives there, and what does not"


def test_the_tests_mirror_the_rooms():
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and list(p.glob("test_*.py"))}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    room = name_of(path).split(".")[0]
    below = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ROOMS if room == "__main__" else []
    above = {name for name in own_imports(path) if name.split(".")[0] not in below}
    assert not above, f"{name_of(path)} imports {sorted(above)}, which stand above it"


def test_no_two_files_import_each_other():
    """Nor any ring of them: what is left after taking away, again and again, all that import nothing left."""
    left = {name_of(path): set(own_imports(path)) - {name_of(path)} for path in FILES}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {left}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p).split(".")[0] in LIGHT and p != MAKES_THE_SCHEMA], ids=name_of
)
def test_the_low_rooms_import_no_heavy_library(path):
    heavy = {full for full in imported(outside_functions(tree(path))) if full.split(".")[0] in HEAVY}
    assert not heavy


def test_there_is_one_trainer():
    """TRL's, as a class of ours, which is defined and made in one file. By text, so that a second one cannot
    hide behind another name for the module.
    """
    for text in ("(SFTTrainer)", "= OneTrainer("):
        found = [name_of(p) for p in FILES for _ in range(p.read_text(encoding="utf-8").count(text))]
        assert found == ["model.build"], text
    assert not [p for p in FILES if "SFTTrainer(" in p.read_text(encoding="utf-8")]


def test_there_is_one_trainer_of_heads():
    """Transformers' own: TRL's takes no model without an lm_head."""
    calls = re.compile(r"(?<!SFT)\bTrainer\(")
    found = [name_of(p) for p in FILES for _ in calls.findall(p.read_text(encoding="utf-8"))]
    assert found == ["model.heads"]


def test_nothing_makes_the_model_a_peft_model_before_the_trainer_does():
    """Those measure on models without bytes, or ask a small twin, and are no way to training; transformers'
    Trainer, which trains heads, takes no peft_config.
    """
    calls = {
        name_of(path)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "get_peft_model"
    }
    assert calls <= {"planning.adapter_facts", "memory.fake", "model.twin", "model.heads"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_sources_are_ascii(path):
    assert path.read_text(encoding="utf-8").isascii()
