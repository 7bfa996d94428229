"""The README and the pages of the docs against what they speak of. `make docs` checks links and anchors."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from lora_recipes.planning import plan
from lora_recipes.recipe import layout
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from tests.cases import families

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "lora_recipes"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
# Written where any name could stand.
ANY_NAME = {"x", "X", "name", "..."}

make = runpy.run_path(str(DOCS / "make.py"))


def code(text):
    """What stands in a text as code: its fenced blocks and its spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


def labels(text):
    """The labels of a printed plan: the first twelve columns of each line that is not indented."""
    return {line[:12].strip() for line in text.splitlines() if line[:1].strip()}


def test_a_newcomer_finishes_the_readme():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_readme_links_what_exists():
    found = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert found
    assert not [target for target in found if not (ROOT / target).exists()]


def test_the_readme_lists_every_page_and_the_navigation_holds_it():
    listed = set(re.findall(r"docs/(\w+\.md)", (ROOT / "README.md").read_text(encoding="utf-8")))
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {page.name for page in PAGES}
    assert listed == pages
    assert {target for entry in nav for target in entry.values()} == pages


def test_every_section_of_ours_has_its_table():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    sections = set(make["schema"]()["properties"]) - {"task", "lora", "train", "peft", "full"}
    assert sections <= set(re.findall(r"<!-- table: (\w+) -->", text))


@pytest.mark.parametrize("section", make["SECTIONS"])
def test_every_key_of_ours_says_what_it_is(section):
    inner = {"limits", "prompt", "answer"}
    keys = make["schema"]()["properties"][section]["properties"]
    assert not [name for name, value in keys.items() if not value.get("description") and name not in inner]


def test_the_page_on_plans_has_the_labels_of_four_unlike_ones(tmp_path):
    """A chat on a hybrid base; packed rows, LoRA+ and a tracker on two processes; a variant beside plain
    LoRA; a mixture of experts with a tower beside it, in NF4, on rows that are taken twice."""
    chat = plan.make(resolve(recipes.load("qwen35_4b_style"), tmp_path))
    packed = recipes.load(
        "tiny_loraplus", ["train.packing=true", "train.max_length=32", "train.report_to=tensorboard"]
    )
    several = plan.make(resolve(packed, tmp_path), layout.of(2))
    variant = recipes.load("tiny_dora")
    beside = plan.make(resolve(variant, tmp_path))
    plan.beside_lora(beside, resolve(variant, tmp_path), plan.add_memory(beside, resolve(variant, tmp_path)))
    file = tmp_path / "mixture.yaml"
    base = families.make("qwen3_5_moe", tmp_path)
    file.write_text(
        f"model: {{name_or_path: {base}, dtype: bfloat16, quantize: nf4}}\n"
        f"data: {{train: [{{path: {families.rows(tmp_path)}, weight: 2}}]}}\n"
        "lora: {r: 4, lora_alpha: 4, target_modules: [q_proj]}\ntrain: {learning_rate: 1.0e-3}\n"
    )
    mixture = plan.make(resolve(recipes.load(str(file)), tmp_path))
    plan.add_memory(mixture, resolve(recipes.load(str(file)), tmp_path))
    printed = set().union(*(labels(p.text()) for p in (chat, several, beside, mixture)))
    explained = re.findall(
        r"^\| `([\w -]+)` \|", (DOCS / "plan.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(explained) == len(set(explained))
    assert printed | {"WARNING"} == set(explained)


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.stem)
def test_every_command_on_a_page_exists(page):
    text = code(page.read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:^|&& )\$? ?make +([a-z][a-z-]*)", text, re.MULTILINE)) <= targets
    made = set(re.findall(r"\bNAME=(\w+)", text)) | ANY_NAME
    named = set(re.findall(r"\bRECIPE=([\w.]+)", text)) - made
    assert named <= set(recipes.names()), "no such recipe"
    asked = set(re.findall(r"\bABLATION=([\w.]+)", text)) - made
    assert asked <= {path.stem for path in (ROOT / "configs" / "ablations").glob("*.yaml")}, (
        "no such ablation"
    )


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.stem)
def test_every_file_of_ours_on_a_page_exists(page):
    """From the root, or from the package."""
    folders = "lora_recipes|tests|scripts|benchmarks|configs|data"
    pattern = rf"\b((?:{folders})/[\w/]+\.(?:py|sh|yaml|json|jsonl|md))\b"
    text = page.read_text(encoding="utf-8").replace("configs/recipes/X.yaml", "")
    missing = [n for n in re.findall(pattern, text) if not any((at / n).exists() for at in (ROOT, PACKAGE))]
    assert not missing
