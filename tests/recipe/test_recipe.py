"""Recipes: every mistake is answered where it was written, with what to do, all at once, before anything slow
is imported.
"""

import copy
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from trl import SFTConfig

from lora_recipes.core import files, yamlfile
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.recipe import check, recipe
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.other_tools import OTHER_NAMES

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
model:
  name_or_path: some/model
  dtype: bfloat16
data:
  train: rows.jsonl
lora:
  r: 8
  lora_alpha: 16
  target_modules: [q_proj, v_proj]
train:
  learning_rate: 2e-4
"""
SUGGESTS = re.compile("did you mean|here it is|nothing to set here|use make|in the environment")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the text of a recipe as x.yaml in the working folder, with overrides."""
    monkeypatch.chdir(tmp_path)

    def load(text=GOOD, *overrides):
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        return recipes.load("x.yaml", overrides)

    return load


@pytest.fixture
def refused(load):
    """What the RecipeError for a text and overrides says."""

    def refused(text=GOOD, *overrides):
        with pytest.raises(RecipeError) as error:
            load(text, *overrides)
        return str(error.value)

    return refused


def changed(line, new):
    """GOOD with the line that begins with `line` replaced."""
    assert re.search(f"(?m)^ *{re.escape(line)}.*$", GOOD)
    return re.sub(f"(?m)^( *){re.escape(line)}.*$", lambda m: m[1] + new, GOOD)


# ---- what is right


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_loads(name):
    loaded = recipes.load(name)
    assert loaded.name == name
    assert loaded.method in recipe.METHODS
    assert loaded.path.is_relative_to(ROOT / "configs" / "recipes") and loaded.path.name == f"{name}.yaml"


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_as_resolved_loads_again_and_says_the_same(load, name):
    loaded = recipes.load(name, ["train.run_name='1e5'", "train.seed=7"])
    again = load(loaded.to_yaml())
    assert again.sections == loaded.sections
    assert again.to_yaml() == loaded.to_yaml()


def test_sections_are_typed_values_with_the_defaults_of_their_owners(load):
    loaded = load()
    assert loaded.lora.given == {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert loaded.lora.lora_dropout == LoraConfig().lora_dropout and loaded.peft is None
    assert loaded.train.learning_rate == 2e-4 and loaded.train.max_length == SFTConfig.max_length
    assert loaded.probes.given == {} and loaded.probes.keep == []
    assert copy.deepcopy(loaded) == loaded


@pytest.mark.parametrize("file", ["lora_recipes/serving/chat.py", "tests/test_layers.py"])
def test_a_misspelled_section_or_key_of_ours_fails_the_type_check(tmp_path, file):
    """In the package and in the tests, each with mypy's options for it, as `make lint` runs it."""
    wrong = ("trian", "train.max_lenght", "model.name_or_paht", "data.evl")
    lines = "".join(f"    print(recipe.{name})\n" for name in ("train.max_length", *wrong))
    code = (
        f"from lora_recipes.recipe.load import load\n\n\ndef say() -> None:\n    recipe = load('x')\n{lines}"
    )
    (tmp_path / "x.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent"]
    command += ["--shadow-file", file, str(tmp_path / "x.py"), file]  # x.py as what stands in `file`
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert done.returncode == 1 and len(said) == len(wrong) + 1, done.stdout
    for at, (name, line) in enumerate(zip(wrong, said, strict=False), 7):
        assert line.startswith(f"{file}:{at}: error: ")
        assert f'has no attribute "{name.split(".")[-1]}"' in line


def test_the_method_is_the_name_of_its_section(load):
    assert load().method == "lora"
    assert load(re.sub("(?s)lora:.*(?=train:)", "full:\n", GOOD)).method == "full"


@pytest.mark.parametrize("empty", ["full:", "full: {}", "full: null"])
def test_an_empty_full_section_is_one_however_it_is_written(load, empty):
    loaded = load(re.sub("(?s)lora:.*(?=train:)", empty + "\n", GOOD))
    assert loaded.sections["full"] == {}


def test_at_tells_the_line_of_a_key_or_of_what_stands_around_it(load):
    loaded = load(GOOD + "  lr_scheduler_kwargs:\n    min_lr: 1e-5\n", "lora.r=4", "probes.keep=[]")
    assert loaded.at("lora", "lora_alpha") == "x.yaml:8 lora.lora_alpha"
    assert loaded.at("lora", "target_modules", 1) == "x.yaml:9 lora.target_modules[1]"
    assert loaded.at("train", "lr_scheduler_kwargs", "min_lr") == "x.yaml:13 train.lr_scheduler_kwargs.min_lr"
    assert loaded.at("train", "seed") == "x.yaml:10 train.seed"
    assert loaded.at("early_stopping") == "x.yaml:1 early_stopping"
    assert loaded.at() == "x.yaml:1"
    assert loaded.at("lora", "r") == "override 'lora.r=4' lora.r"
    assert loaded.at("probes", "keep", 0, "prompt") == "override 'probes.keep=[]' probes.keep[0].prompt"
    assert loaded.at("probes") == "override 'probes.keep=[]' probes"


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "0.0002", "2.0e-4"])
def test_a_learning_rate_is_a_number_however_it_is_written(load, number):
    assert load(changed("learning_rate", f"learning_rate: {number}")).train.learning_rate == 2e-4
    assert load(GOOD, f"train.learning_rate={number}").train.learning_rate == 2e-4


def test_no_is_a_word_where_a_word_is_meant(load):
    assert load(GOOD + "  save_strategy: no\n").train.save_strategy == "no"
    assert load(GOOD, "train.save_strategy=no").train.save_strategy == "no"


def test_a_byte_order_mark_is_accepted(load):
    assert load("\ufeff" + GOOD).lora.r == 8


def test_paths_are_taken_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        files.find("data/x.jsonl", tmp_path) == ROOT / "data" / "x.jsonl" == files.ROOT / "data" / "x.jsonl"
    )
    assert files.find(tmp_path / "x", ROOT) == tmp_path / "x"
    assert recipes.load("tiny_facts").name == "tiny_facts"


@pytest.mark.parametrize(
    "init", ["true", "false", "gaussian", "pissa", "pissa_niter_16", "lora_ga", "orthogonal"]
)
def test_every_initialisation_that_peft_takes_is_taken(load, init):
    assert str(load(GOOD, f"lora.init_lora_weights={init}").lora.init_lora_weights).lower() == init


def test_loading_imports_nothing_slow():
    code = """
import sys
from lora_recipes.recipe import load as recipes
for name in recipes.names():
    recipes.load(name, ["train.seed=1"])
try:
    recipes.load("tiny_facts", ["lora.rank=1"])
except recipes.RecipeError:
    pass
print(sorted({"torch", "transformers", "peft", "trl", "datasets", "pydantic", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- which recipe


def test_a_recipe_that_does_not_exist_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(RecipeError) as error:
        recipes.load("tiny_fact")
    assert "RECIPE=tiny_fact: no recipe of that name" in str(error.value)
    assert "did you mean tiny_facts?" in str(error.value)
    assert all(path.stem in str(error.value) for path in recipes.RECIPES.glob("*.yaml"))
    assert "and those in configs/recipes/methods/" in str(error.value)


@pytest.mark.parametrize("name", ["configs/recipes/tiny_fact.yaml", "tiny_fact.yaml", "./tiny_fact"])
def test_a_path_that_does_not_exist_is_answered_with_the_nearest_name(name):
    with pytest.raises(RecipeError, match=r"(?s)no such file.*did you mean tiny_facts"):
        recipes.load(name)


def test_an_override_in_the_place_of_the_name_is_recognised():
    with pytest.raises(RecipeError, match=r"the recipe's name comes first, then lora\.r=4"):
        recipes.load("lora.r=4")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        recipes.load(str(tmp_path))


# ---- what is wrong in a file

FAULTS = [
    # an unknown key
    (changed("r:", "rr: 8"), "x.yaml:7 lora.rr: unknown key", "did you mean r?"),
    (
        changed("learning_rate:", "lerning_rate: 1"),
        "x.yaml:11 train.lerning_rate: unknown key",
        "did you mean learning_rate?",
    ),
    (changed("lora:", "lara:"), "x.yaml:6 lara: unknown section", "did you mean lora?"),
    (changed("lora:", "LoRA:"), "x.yaml:6 LoRA: unknown section", "did you mean lora?"),
    (
        GOOD + "probes:\n  keep:\n    - {promt: a, answer: b}\n",
        "x.yaml:14 probes.keep[0].promt: unknown key",
        "did you mean prompt?",
    ),
    (
        changed("train: rows", "train: [{path: a},\n    {pth: b}]"),
        "x.yaml:6 data.train[1].pth: unknown key",
        "did you mean path?",
    ),
    (
        changed("r:", "eva_config: {rhoo: 2}\n  r: 8"),
        "x.yaml:7 lora.eva_config.rhoo: unknown key",
        "did you mean rho?",
    ),
    (
        changed("r:", "loftq_config: {bits: 4}\n  r: 8"),
        "x.yaml:7 lora.loftq_config.bits: unknown key",
        "did you mean loftq_bits?",
    ),
    (
        changed("lora:", "full: {r: 8}\nlora:"),
        "x.yaml:6 full.r: stands in the wrong place",
        "write it as lora.r",
    ),
    (changed("lora:", "full: {rrr: 8}\nlora:"), "x.yaml:6 full.rrr: unknown key", "full: takes no keys"),
    # a wrong type: what is expected, what was found
    (
        changed("r:", "r: '8'"),
        "x.yaml:7 lora.r: the text '8' is not a whole number",
        "without quotation marks and underscores: 8",
    ),
    (changed("r:", "r: 8.0"), "x.yaml:7 lora.r: 8.0 is not a whole number", "write 8"),
    (changed("r:", "r: 8.5"), "x.yaml:7 lora.r: 8.5 is not a whole number", ""),
    (changed("r:", "r: true"), "x.yaml:7 lora.r: true is not a whole number", ""),
    (changed("r:", "r:"), "x.yaml:7 lora.r: null is not a whole number", "remove the line"),
    (changed("r:", "r: [8]"), "x.yaml:7 lora.r: the list [8] is not a whole number", ""),
    (changed("r:", "r: {q: 8}"), 'x.yaml:7 lora.r: the mapping {"q": 8} is not a whole number', ""),
    (
        GOOD + "  max_steps: 1_000\n",
        "x.yaml:12 train.max_steps: the text '1_000' is not a whole number",
        "underscores: 1000",
    ),
    (GOOD + "  max_steps: 1e3\n", "x.yaml:12 train.max_steps: 1000.0 is not a whole number", "write 1000"),
    (GOOD + "  weight_decay: heavy\n", "x.yaml:12 train.weight_decay: the text 'heavy' is not a number", ""),
    (GOOD + "  packing: no\n", "x.yaml:12 train.packing: the text 'no' is not true or false", "write false"),
    (GOOD + "  packing: Yes\n", "x.yaml:12 train.packing: the text 'Yes' is not true or false", "write true"),
    (GOOD + "  packing: 1\n", "x.yaml:12 train.packing: 1 is not true or false", ""),
    (
        changed("r:", "r: 8\n  init_lora_weights: yes"),
        "x.yaml:8 lora.init_lora_weights: the text 'yes' is not",
        "write true",
    ),
    (
        changed("r:", "r: 8\n  init_lora_weights: pissa_niter"),
        "or pissa_niter_<number>",
        "did you mean pissa?",
    ),
    (
        changed("dtype:", "dtype: bf16"),
        "x.yaml:3 model.dtype: the text 'bf16' is not one of float32",
        "did you mean bfloat16?",
    ),
    (
        GOOD + "  save_strategy: false\n",
        "x.yaml:12 train.save_strategy: false is not one of no, steps",
        "write 'no'",
    ),
    (
        GOOD + "  lr_scheduler_type: Cosine\n",
        "x.yaml:12 train.lr_scheduler_type: the text 'Cosine' is not",
        "did you mean cosine?",
    ),
    (
        GOOD + "  train_sampling_strategy: group_by_lenght\n",
        "is not one of random",
        "did you mean group_by_length?",
    ),
    (GOOD + "  loss_type: 3\n", "x.yaml:12 train.loss_type: 3 is not one of nll, dft", ""),
    (
        changed("dtype:", "dtype: float32\n  revision: 12"),
        "x.yaml:4 model.revision: 12 is not a text",
        "in quotation marks: '12'",
    ),
    (
        changed("train: rows", "train: ''"),
        "x.yaml:5 data.train: the text '' is too short",
        "at least 1 character",
    ),
    (
        changed("train: rows", "train: []"),
        "x.yaml:5 data.train: the list [] is too short",
        "at least 1 in the list",
    ),
    (changed("train: rows", "train: [a, 3]"), "x.yaml:5 data.train[1]: 3 is not a text or a mapping", ""),
    (
        changed("target_modules:", "target_modules:\n    - q_proj\n    - 3"),
        "x.yaml:11 lora.target_modules[1]: 3 is not a text",
        "",
    ),
    (
        changed("target_modules:", "target_modules: [q_proj,\n    v_proj, 3]"),
        "x.yaml:10 lora.target_modules[2]: 3 is not a text",
        "",
    ),
    (
        changed("r:", "modules_to_save: lm_head\n  r: 8"),
        "x.yaml:7 lora.modules_to_save: the text 'lm_head' is not a list",
        "[lm_head]",
    ),
    (
        changed("r:", "layer_replication: [[0, 4, 2]]\n  r: 8"),
        "lora.layer_replication[0]: the list [0, 4, 2] is too long",
        "at most 2",
    ),
    (
        "lora: 3\n" + changed("lora:", "full:").replace("  r: 8\n", ""),
        "x.yaml:1 lora: 3 is not a mapping",
        "",
    ),
    (
        "probes: keep:2\n" + GOOD,
        "x.yaml:1 probes: the text 'keep:2' is not a mapping",
        "a space after the colon: `keep: 2`",
    ),
    ("probes: []\n" + GOOD, "x.yaml:1 probes: the list [] is not a mapping", ""),
    # out of range
    (changed("r:", "r: -3"), "x.yaml:7 lora.r: -3 is out of range", "at least 1"),
    (changed("lora_alpha:", "lora_alpha: 0"), "x.yaml:8 lora.lora_alpha: 0 is out of range", "more than 0"),
    (
        changed("r:", "lora_dropout: 1\n  r: 8"),
        "x.yaml:7 lora.lora_dropout: 1 is out of range",
        "less than 1",
    ),
    (
        changed("train: rows", "train: a\n  limits: {duplicates: 2}"),
        "x.yaml:6 data.limits.duplicates: 2 is out of range",
        "at most 1",
    ),
    (
        changed("learning_rate:", "learning_rate: .nan"),
        "x.yaml:11 train.learning_rate: not a finite number",
        "write a plain number",
    ),
    (
        changed("learning_rate:", "learning_rate: 1e999"),
        "x.yaml:11 train.learning_rate: not a finite number",
        "write a plain number",
    ),
    (changed("r:", "r: .inf"), "x.yaml:7 lora.r: not a finite number", "write a plain number"),
    (
        GOOD + "  lr_scheduler_kwargs: {min_lr: -.inf}\n",
        "x.yaml:12 train.lr_scheduler_kwargs.min_lr: not a finite number",
        "",
    ),
    # something missing
    (changed("r:", "bias: none"), "x.yaml:6 lora: 'r' is missing", "add `r:`"),
    (
        changed("target_modules:", "bias: none"),
        "x.yaml:6 lora: 'target_modules' is missing",
        "say which modules",
    ),
    (changed("learning_rate:", "seed: 1"), "x.yaml:10 train: 'learning_rate' is missing", "say it"),
    (
        changed("train: rows", "train:\n    - a\n    - weight: 2"),
        "x.yaml:7 data.train[1]: 'path' is missing",
        "add `path:`",
    ),
    (
        GOOD + "probes:\n  keep:\n    - prompt: a\n",
        "x.yaml:14 probes.keep[0]: 'answer' is missing",
        "add `answer:`",
    ),
    (
        GOOD + "early_stopping:\n",
        "x.yaml:12 early_stopping: 'early_stopping_patience' is missing",
        "say after how many",
    ),
    ("\n# none\nmodel:\n  dtype: float32\n", "x.yaml:3: the section `data:` is missing", "configs/recipes/"),
    (GOOD.replace("  train: rows.jsonl\n", ""), "x.yaml:4 data: 'train' is missing", "add `train:`"),
    # another place, another tool, another way
    (
        changed("r:", "seed: 1\n  r: 8"),
        "x.yaml:7 lora.seed: stands in the wrong place",
        "write it as train.seed",
    ),
    ("seed: 3\n" + GOOD, "x.yaml:1 seed: stands in the wrong place", "write it as train.seed"),
    (GOOD + "  lora_rank: 8\n", "x.yaml:12 train.lora_rank: another tool's name", "here it is lora.r"),
    (
        changed("lora:", "cutoff_len: 8\nlora:"),
        "x.yaml:6 cutoff_len: another tool's name",
        "here it is train.max_length",
    ),
    (
        GOOD + "  warmup_ratio: 0.1\n",
        "x.yaml:12 train.warmup_ratio: another tool's name",
        "here it is train.warmup_steps",
    ),
    (
        GOOD + "  max_seq_length: 8\n",
        "x.yaml:12 train.max_seq_length: another tool's name",
        "here it is train.max_length",
    ),
    (
        GOOD + "  micro_batch_size: 8\n",
        "train.micro_batch_size: another tool's name",
        "here it is train.per_device_train_batch_size",
    ),
    (GOOD + "  output_dir: x\n", "x.yaml:12 train.output_dir: cannot be set in a recipe", "--outputs DIR"),
    ("output_dir: x\n" + GOOD, "x.yaml:1 output_dir: cannot be set in a recipe", "--outputs DIR"),
    (GOOD + "  hub_token: hf_x\n", "x.yaml:12 train.hub_token: cannot be set in a recipe", "HF_TOKEN"),
    # what needs or excludes each other
    (GOOD + "full: {}\n", "x.yaml:12 full: both lora: and full: are given", "exactly one of"),
    (re.sub("(?s)lora:.*(?=train:)", "", GOOD), "x.yaml:1: no method section", "exactly one of"),
    (
        GOOD.replace("  name_or_path: some/model\n", ""),
        "x.yaml:1 model: no base model",
        "one of name_or_path",
    ),
    (
        changed("dtype:", "dtype: float32\n  from_recipe: tiny_base"),
        "x.yaml:1 model: name_or_path and from_recipe exclude",
        "one of",
    ),
    (
        changed("name_or", "weights: random"),
        "x.yaml:2 model.weights: random weights need model.contract",
        "configs/models/",
    ),
    (
        changed("name_or", "{}\n  contract: a\n  from_recipe: b".format("weights: random")),
        "x.yaml:4 model.from_recipe: random",
        "keep one",
    ),
    (
        GOOD + "  eval_strategy: epoch\n",
        "x.yaml:12 train.eval_strategy: there is nothing to evaluate on",
        "set data.eval",
    ),
    (
        GOOD + "early_stopping: {early_stopping_patience: 2}\n",
        "x.yaml:12 early_stopping: early stopping needs data.eval",
        "eval file",
    ),
    (
        GOOD + "early_stopping: {early_stopping_patience: 2}\n",
        "x.yaml:10 train.eval_strategy: early stopping needs",
        "steps or epoch",
    ),
    (
        GOOD + "  save_strategy: no\nearly_stopping: {early_stopping_patience: 2}\n",
        "x.yaml:12 train.save_strategy: early stopping",
        "",
    ),
    # faults of the file itself
    (
        GOOD + "  learning_rate: 1e-4\n",
        "x.yaml:12 train.learning_rate: given twice, first on line 11",
        "keep one",
    ),
    (GOOD + "model:\n  dtype: float32\n", "x.yaml:12 model: given twice, first on line 1", "keep one"),
    (changed("r:", "\tr: 8"), "x.yaml:7: indented with a tab", "spaces"),
    ("", "x.yaml:1: the file is empty", ""),
    ("- model\n", "x.yaml:1: a list stands where `key: value` lines are expected", ""),
    (GOOD + "  5: x\n", "x.yaml:12: the key 5 is read as a number", "'5'"),
    (GOOD + "---\nmodel: {}\n", "x.yaml:12: a second document begins", "one document"),
    (GOOD + "  <<: {seed: 1}\n", "x.yaml:12: a merge key (<<)", "nothing is inherited"),
    (GOOD.replace("lora:", "lora: &shared"), "x.yaml:6: an anchor (&shared)", "nothing is inherited"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found", "do"), FAULTS, ids=[f"{i}-{found}" for i, (_, found, _) in enumerate(FAULTS)]
)
def test_a_mistake_is_answered_where_it_stands_with_what_to_do(refused, text, found, do):
    said = refused(text)
    at = said.find(found)
    assert at >= 0, said
    assert do in said[at:].split("\nx.yaml")[0], said


def test_a_file_that_is_not_utf_8_is_answered_with_the_line(tmp_path):
    (tmp_path / "x.yaml").write_bytes(GOOD.encode() + b"  run_name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"x\.yaml:12: not UTF-8"):
        recipes.load(str(tmp_path / "x.yaml"))


def test_all_problems_are_told_at_once_in_the_order_of_the_file(refused):
    text = (
        GOOD.replace("dtype: bfloat16", "dtype: bf16")
        .replace("r: 8", "lora_rank: 8")
        .replace("16\n", "x\n")
        .replace("[q_proj", "[3")
    )
    said = refused(text + "  seed: 1\n  seed: 2\n  lr: 3\nfull:\n", "train.max_stepz=3", "nonsense")
    assert [line.split(": ")[0] for line in said.splitlines() if not line.startswith(" ")] == [
        "x.yaml:13 train.seed",  # the file's own faults come first
        "x.yaml:3 model.dtype",
        "x.yaml:6 lora",
        "x.yaml:7 lora.lora_rank",
        "x.yaml:8 lora.lora_alpha",
        "x.yaml:9 lora.target_modules[0]",
        "x.yaml:14 train.lr",
        "override 'train.max_stepz=3' train.max_stepz",
        "override 'nonsense'",
        "x.yaml:15 full",
    ]


def test_each_missing_key_is_told_once(refused):
    said = refused(re.sub("(?s)lora:.*(?=train:)", "lora:\n", GOOD))
    missing = [
        "x.yaml:6 lora: 'r' is missing",
        "x.yaml:6 lora: 'lora_alpha' is missing",
        "x.yaml:6 lora: 'target_modules' is missing",
    ]
    assert [line for line in said.splitlines() if not line.startswith(" ")] == missing


def test_what_a_typo_has_as_consequence_is_not_told_as_well(refused):
    assert "no base model" not in refused(changed("name_or", "name_or_pat: x"))
    assert "no method section" not in refused(changed("lora:", "lara:"))
    assert "needs data.eval" not in refused(
        changed("train: rows", "train: a\n  evl: b") + "early_stopping: {early_stopping_patience: 1}\n"
    )


@pytest.mark.parametrize("section", ["model", "data", "lora", "train", "early_stopping"])
def test_an_empty_section_is_told_what_it_lacks(refused, section):
    content = yaml.safe_load(GOOD) | {section: None}
    assert re.search(
        rf"x\.yaml:\d+ {section}: '\w+' is missing", refused(yaml.safe_dump(content, sort_keys=False))
    )


ANSWERS = re.compile(
    " is not .|out of range|too short|too long|is missing|unknown key|another tool's name|in the wrong place"
)
WRONG: list[object] = [
    None,
    True,
    0,
    -1,
    2.0,
    2.5,
    "",
    "no",
    "x",
    "1_0",
    [],
    [None],
    [[]],
    [{"x": 1}],
    {},
    {"x": 1},
    {"x": None},
]


def test_every_wrong_value_of_every_key_is_answered_in_words():
    """No value makes the answer itself fail, and none leaves out what is expected."""
    for section, its in check.schema()["properties"].items():
        for key in its.get("properties", ()):
            for value in WRONG:
                for where, found, _ in check.faults({section: {key: value}}):
                    assert found
                    if where[:2] == (section, key):
                        assert re.search(
                            r" is not .|out of range|too short|too long|is missing|unknown key|another"
                            r" tool|wrong place",
                            found,
                        )


# ---- typos

CHANGES = [
    lambda word, i: word[:i] + ("q" if word[i] == "z" else "z") + word[i + 1 :],  # substituted
    lambda word, i: word[:i] + word[i + 1 :],  # dropped
    lambda word, i: word[: i + 1] + word[i:],  # doubled
]


def keys(value, limits, path=()):
    """The path of every key in `value` whose names the schema knows (a free mapping takes any)."""
    for option in check.alternatives(limits):
        if "allOf" in option:  # peft: has the fields of the class that its peft_type names
            option = next(
                part["then"]
                for part in option["allOf"]
                if part["then"]["properties"]["peft_type"]["const"] == value["peft_type"]
            )
        if isinstance(value, dict) and "properties" in option:
            for key, child in value.items():
                yield (*path, key), option["properties"]
                yield from keys(child, option["properties"][key], (*path, key))
        elif isinstance(value, list) and "items" in option:
            for i, child in enumerate(value):
                yield from keys(child, option["items"], (*path, i))


def renamed(text, line, word, name):
    """`text` with the key `word` on its line `line` renamed."""
    lines = text.splitlines(keepends=True)
    lines[line - 1], count = re.subn(rf"(?<!\w){word}(?=:)", name or "''", lines[line - 1])
    assert count == 1, f"{word} on line {line}"
    return "".join(lines)


def written():
    """Every key that any shipped recipe writes, once: {(its path without numbers, the names that are valid
    there): (the first recipe that writes it, its path)}.
    """
    found: dict = {}
    for name in recipes.names():
        content, _ = yamlfile.load(recipes.find(name))
        for path, valid in keys(content, check.schema()):
            words = tuple(word for word in path if isinstance(word, str))
            found.setdefault((words, frozenset(valid)), (name, path))
    return found


WRITTEN = written()


def test_the_keys_that_are_tried_are_of_all_sections_that_people_write():
    assert {words[0] for words, _ in WRITTEN} >= {"model", "data", "lora", "peft", "train", "probes"}
    assert len(WRITTEN) > 100


@pytest.mark.parametrize("section", sorted({words[0] for words, _ in WRITTEN}))
def test_every_key_with_one_character_wrong_is_refused_with_a_suggestion(tmp_path, section):
    file, accepted, silent = tmp_path / "x.yaml", [], []
    for (words, valid), (name, path) in WRITTEN.items():
        if words[0] != section:
            continue
        text, word = recipes.find(name).read_text(encoding="utf-8"), words[-1]
        _, lines = yamlfile.load(recipes.find(name))
        typos = {change(word, i) for change in CHANGES for i in {0, len(word) // 2, len(word) - 1}} - valid
        for typo in sorted(
            typos - {"learning_rate"}
        ):  # for learning_rates: answered with train.learning_rate
            file.write_text(renamed(text, lines[path], word, typo), encoding="utf-8")
            try:
                recipes.load(str(file))
                accepted.append((path, typo))
            except RecipeError as error:
                told = [p for p in error.problems if p.where.endswith(yamlfile.dotted((*path[:-1], typo)))]
                if not (told and SUGGESTS.search(told[0].do)):
                    silent.append((path, typo, str(error)))
    assert accepted == []
    assert silent == []


# ---- overrides


def test_overrides_set_keys_of_any_kind(load):
    given = [
        "lora.r=16",
        "lora.target_modules=[q_proj,v_proj,o_proj]",
        "lora.rank_pattern={q_proj: 4}",
        "train.bf16=true",
    ]
    given += ["train.run_name=a=b", "train.max_length=null", "probes.keep=[]", " model.dtype = float32 "]
    loaded = load(GOOD, *given)
    assert loaded.lora.r == 16
    assert loaded.lora.target_modules == ["q_proj", "v_proj", "o_proj"]
    assert loaded.lora.rank_pattern == {"q_proj": 4}
    assert loaded.train.given == {"learning_rate": 2e-4, "bf16": True, "run_name": "a=b", "max_length": None}
    assert loaded.sections["probes"] == {"keep": []}
    assert loaded.model.dtype == "float32"
    assert loaded.overrides["lora.r"] == "lora.r=16"
    assert list(loaded.overrides) == [text.partition("=")[0].strip() for text in given]


def test_an_override_mends_what_the_file_has_wrong(load):
    assert load(changed("r:", "r: x"), "lora.r=8").lora.r == 8


def test_overrides_may_make_a_section(load):
    loaded = load(
        changed("train: rows", "train: a\n  eval: b"),
        "early_stopping.early_stopping_patience=2",
        "train.eval_strategy=epoch",
    )
    assert loaded.early_stopping.given == {"early_stopping_patience": 2}


WRONG_OVERRIDES = [
    ("nonsense", "not section.key=value", "e.g. lora.r=16"),
    ("lora.r", "not section.key=value", "e.g. lora.r=16"),
    ("=8", "not section.key=value", "e.g. lora.r=16"),
    ("lora.=8", "not section.key=value", "e.g. lora.r=16"),
    (".r=8", "not section.key=value", "e.g. lora.r=16"),
    ("", "not section.key=value", "e.g. lora.r=16"),
    ("r=8", "not section.key=value", "write it as lora.r"),
    ("lr=1e-4", "not section.key=value", "here it is train.learning_rate"),
    ("--resume", "not section.key=value", "e.g. lora.r=16"),
    ("a.b.c=1", "not section.key=value", "a.b={c: 1}"),
    ("data.limits.truncated=0.1", "not section.key=value", "data.limits={truncated: 0.1}"),
    ("lora.r=", "has no value", "lora.r=null"),
    ("lora.r= ", "has no value", "lora.r=null"),
    ("lora.target_modules=[q_proj,", "not YAML", "quotation marks"),
    ("lora.target_modules=@_proj", "not YAML", "quotation marks"),
    ("lora.target_modules=*proj", "an alias (*proj)", "quotation marks"),
    ("lora.rank_pattern={q_proj:4}", "'q_proj:4' is read as a key without a value", "`q_proj: 4`"),
    ("lora.rank_pattern={q: 4, q: 5}", "given twice", "keep one"),
    ("lora.r=8.0", "lora.r: 8.0 is not a whole number", "write 8"),
    ("lora.r=x", "lora.r: the text 'x' is not a whole number", ""),
    ("lora.r=0", "lora.r: 0 is out of range", "at least 1"),
    ("lora.r=.inf", "lora.r: not a finite number", ""),
    ("lora.target_modules=[q_proj,3]", "lora.target_modules[1]: 3 is not a text", ""),
    ("lora.rr=8", "lora.rr: unknown key", "did you mean r?"),
    ("lara.r=8", "lara: unknown section", "did you mean lora?"),
    ("lora.lora_rank=8", "lora.lora_rank: another tool's name", "here it is lora.r"),
    (
        "lora.learning_rate=1",
        "lora.learning_rate: stands in the wrong place",
        "write it as train.learning_rate",
    ),
    ("train.output_dir=x", "train.output_dir: cannot be set in a recipe", "--outputs DIR"),
    ("full.r=8", "full.r: stands in the wrong place", "write it as lora.r"),
    (
        "early_stopping.early_stopping_threshold=1",
        "early_stopping: 'early_stopping_patience' is missing",
        "say after how many",
    ),
]


@pytest.mark.parametrize(
    ("override", "found", "do"), WRONG_OVERRIDES, ids=[text or "empty" for text, _, _ in WRONG_OVERRIDES]
)
def test_a_wrong_override_is_answered_by_its_own_text(refused, override, found, do):
    problems = refused(GOOD, override).split("\noverride")
    assert problems[0].startswith(f"override {override!r}")
    assert found in problems[0]
    assert do in problems[0]


def test_an_override_given_twice_is_answered(refused):
    assert "override 'lora.r=4': given twice, first as 'lora.r=16'" in refused(GOOD, "lora.r=16", "lora.r=4")


def test_an_override_into_a_section_that_is_no_mapping_leaves_the_file_to_blame(refused):
    assert "x.yaml:6 lora: the list [] is not a mapping" in refused(
        re.sub("(?s)lora:.*(?=train:)", "lora: []\n", GOOD), "lora.r=8"
    )


# ---- the rows of advice


# The answers to some, as a person would give them. Whether each is true: test_other_tools.py.
ANSWERED = {
    "lr": "train.learning_rate",
    "lora_rank": "lora.r",
    "lora_target_linear": "lora.target_modules: all-linear",
    "micro_batch_size": "train.per_device_train_batch_size",
    "load_in_4bit": "model.quantize: nf4",
    "sequence_len": "train.max_length",
    "wandb_project": "WANDB_PROJECT in the environment",
    "auto_resume_from_checkpoints": "RESUME=1",
    "plot_loss": "loss.png",
    "adapter_path": "model.name_or_path",
}


@pytest.mark.parametrize("half", [0, 1])  # a hundred problems are told at once
@pytest.mark.parametrize("section", ["", "model", "data", "lora", "train"])
def test_a_key_of_another_tool_is_answered_at_its_line_in_every_section(load, section, half):
    lines = GOOD.splitlines()
    words = sorted(OTHER_NAMES)[half::2]
    first = lines.index(f"{section}:") + 1 if section else 0
    lines[first:first] = [f"{'  ' * bool(section)}{word}: 1" for word in words]
    with pytest.raises(RecipeError) as error:
        load("\n".join(lines) + "\n")
    told = {p.where: p for p in error.value.problems}
    for line, word in enumerate(words, first + 1):
        problem = told.pop(f"x.yaml:{line} {section}.{word}" if section else f"x.yaml:{line} {word}")
        assert problem.found == "another tool's name" and ANSWERED.get(word, " ") in problem.do
    assert not told, "nothing else is wrong"


def test_the_nearest_name_is_found():
    assert nearest("Lora_Alhpa", ["lora_alpha", "lora_bias", "r"]) == "lora_alpha"
    assert nearest("x", ["r", "alpha"]) == "r"
    assert nearest("seq_cls", ["SEQ_CLS", "CAUSAL_LM"]) == "SEQ_CLS"
    assert nearest("x", []) == ""


def test_long_lists_are_cut_with_a_count():
    assert listed("abc") == "a, b, c"
    assert listed(map(str, range(25)), most=2) == "0, 1, and 23 more"


def test_an_error_carries_every_problem():
    raise_if([])
    problems = [Problem("x.yaml:1 a", "is wrong", "mend it"), Problem("x.yaml:2 b", "too")]
    with pytest.raises(RecipeError) as error:
        raise_if(problems)
    assert error.value.problems == problems
    assert str(error.value) == "x.yaml:1 a: is wrong\n    -> mend it\nx.yaml:2 b: too"
    assert isinstance(error.value, ValueError)


def test_the_scripts_answer_with_the_problem_and_exit_code_2():
    command = [sys.executable, "scripts/plan.py", "tiny_facts", "lora.rank=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: 1 problem\noverride 'lora.rank=4' lora.rank: another tool's name\n    -> here it is"
        " lora.r\n"
    )
    assert done.stdout == ""


# ---- secrets


LONG = "hf_" + "x" * 34
SECRETS = [
    "train.hub_token=of_mine",
    "hub_token=of_mine",
    "train.HUB_TOKEN=of_mine",
    "train.hub_token.x=of_mine",
    "use_auth_token=of_mine",
    f"train.token={LONG}",
    f"hub_token:{LONG}",
    f"train.wrong={{a: {LONG}}}",
]


@pytest.mark.parametrize("override", SECRETS)
def test_a_token_in_an_override_is_not_repeated(refused, override):
    told = refused(GOOD, override)
    assert "of_mine" not in told and LONG not in told and override.partition("_token")[0][:5] in told


# ---- large


LARGE = {
    "unknown keys": "".join(f"  wrong_key_{i}: 1\n" for i in range(10_000)),
    "wrong items": f"  report_to: [{', '.join(['1'] * 60_000)}]\n",
    "a long key": f"  {'x' * 150_000}: 1\n",
    "one key again and again": "  seed: 1\n" * 20_000,
}


@pytest.mark.parametrize("lines", LARGE.values(), ids=LARGE)
def test_a_large_file_full_of_mistakes_is_told_within_seconds_and_not_at_length(lines, refused):
    began = time.process_time()  # a search of each pair of lines takes minutes
    told = refused(GOOD + lines)
    assert time.process_time() - began < 30
    assert len(told) < 30_000 and "x.yaml:1" in told


def test_a_key_with_a_character_that_cannot_be_seen_is_told_in_an_override_too(refused):
    assert "zero width space (U+200B)" in refused(GOOD, "lora.r\u200b=4")
    assert "non-breaking space (U+00A0)" in refused(changed("r: 8", "r: 8\u00a0"))
