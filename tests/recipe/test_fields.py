"""Every field of SFTConfig and LoraConfig has its row, and the row is true: what is refused is refused, what
is honoured reaches the library, what is checked is checked by a rule that a recipe can break.
"""

import dataclasses
import inspect
from pathlib import Path

import pytest
import transformers
from accelerate.utils import DynamoBackend
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from trl import SFTConfig

from lora_recipes.core import files
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.model import build
from lora_recipes.recipe import check, rules
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.fields import NEVER, TAKEN, table
from lora_recipes.recipe.recipe import Recipe

CLASSES = {"train": SFTConfig, "lora": LoraConfig}
ROWS = table()
FOLDER = RunFolder(Path("outputs/none"))


def of(*fates):
    return [name for name, row in ROWS.items() if row.fate in fates]


def changed(name, value):
    """The embedded default with one more key, whatever the schema says of it."""
    section, key = name.split(".")
    loaded = recipes.load("tiny_facts")
    its = loaded.sections[section] | {key: value}
    return Recipe(loaded.name, loaded.path, loaded.sections | {section: its}, loaded.lines)


def test_every_field_of_the_classes_has_one_row_and_no_other_has():
    real = {f"{s}.{f.name}" for s, cls in CLASSES.items() for f in dataclasses.fields(cls) if f.init}
    assert real <= set(ROWS)
    pinned = (files.ROOT / "constraints.txt").read_text().splitlines()
    if f"transformers=={transformers.__version__}" in pinned:  # an older one lacks fields that have a row
        assert set(ROWS) == real
    assert all(row.said for row in ROWS.values() if row.fate != "honoured")


@pytest.mark.parametrize("name", of("owned", "refused"))
def test_what_is_owned_or_refused_is_an_error_that_says_what_the_row_says(name):
    by_rule = [rule for rule in rules.RULES if rule.key == name and rule.against in NEVER]
    if by_rule:  # of what it holds: false is what the class has
        found = rules.problems(changed(name, {"a": 1}), rules.Facts())
        assert [p for p in found if name in p.where and p.found == by_rule[0].found], found
        return
    with pytest.raises(RecipeError) as error:
        recipes.load("tiny_facts", [f"{name}=true"])
    assert f"{name}: cannot be set in a recipe\n    -> {ROWS[name].said}" in str(error.value)


def another(name):
    """A value that the field takes and that is not its default; None where a plain one is not known."""
    section, key = name.split(".")
    limits = check.schema()["properties"][section]["properties"][key]
    default, options = limits.get("default"), check.alternatives(limits)
    for option in options:
        words = [w for w in option.get("enum", []) if w not in (default, "no", "none")]
        if words:
            return words[0]
        if option.get("type") == "boolean":
            return not default
        if option.get("type") in ("integer", "number"):
            high = limits.get("exclusiveMaximum")
            return 0.5 if high == 1 else int(default if isinstance(default, int | float) else 0) + 3
        if option.get("type") == "string":
            return "text"
    return None


# Read before the library's class sees them, or words of its own.
ELSEWHERE = {
    "train.assistant_only_loss": "labels are made with it; TRL takes it with raw conversations only",
    "train.tf32": "this machine",
    "train.bf16": "build.precision",
    "train.dataloader_prefetch_factor": "wants dataloader_num_workers",
    "train.debug": "words of its own",
    "train.include_num_input_tokens_seen": "words of its own",
    "train.lr_scheduler_kwargs": "a mapping",
    "train.log_level_replica": "a word for other processes",
    "train.load_best_model_at_end": "wants evaluations",
    "train.eval_strategy": "wants rows",
    "train.dataloader_pin_memory": "false on a CPU",
    "train.torch_compile": "takes minutes to set up",
    "train.optim_args": "a text of pairs",
    "train.packing_strategy": "bfd-requeue is renamed",
    "lora.layers_pattern": "wants layers_to_transform",
}


@pytest.mark.parametrize("name", [n for n in TAKEN if n not in ELSEWHERE and another(n) is not None])
def test_what_is_taken_reaches_the_library_as_it_is(name):
    section, key = name.split(".")
    value = another(name)
    loaded = changed(name, value)
    made = build.sft_config(loaded, FOLDER) if section == "train" else build.peft_config(loaded)
    held = getattr(made, key)
    held = getattr(held, "value", held)
    assert held in (value, [value], {value}), f"{held!r} is not {value!r}"


def test_most_fields_that_are_taken_are_tried():
    tried = [n for n in TAKEN if n not in ELSEWHERE and another(n) is not None]
    assert len(tried) > 85
    assert set(ELSEWHERE) <= set(TAKEN)


@pytest.mark.parametrize("name", of("checked"))
def test_what_is_checked_names_a_rule_that_is_there(name):
    """That each of them fires is test_rules.py's, for every rule of the table."""
    checks = [rule for rule in rules.RULES if rule.key == name]
    assert checks and all(rule.against in ROWS[name].said for rule in checks)


def test_words_of_other_libraries_are_theirs():
    assert {b.value.lower() for b in DynamoBackend} - {"no"} >= rules.COMPILERS
    assert {b.value.lower() for b in DynamoBackend} - {"no", "ipex"} <= rules.COMPILERS
    taken = set(rules.CHECKPOINTING) - {"selective", "preserve_rng_state"}
    assert taken <= set(inspect.signature(checkpoint).parameters)
