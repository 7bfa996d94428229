"""The JSON Schema of a recipe: valid, and taking every field of the libraries' classes with its own
default.
"""

import dataclasses
import enum

import pytest
import yaml
from jsonschema import Draft202012Validator
from peft import LoraConfig
from trl import SFTConfig

from lora_recipes.recipe import check, schema
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.other_tools import OWNED
from tests.typed import there

CLASSES = {"lora": LoraConfig, "train": SFTConfig}


def plain(value):
    """A default value as YAML would hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    return value


def defaults(section):
    """Every field that a recipe may set, with the class's own default."""
    result = {}
    for field in dataclasses.fields(CLASSES[section]):
        if field.init and f"{section}.{field.name}" not in OWNED:
            value = field.default
            if field.default_factory is not dataclasses.MISSING:
                value = field.default_factory()
            assert value is not dataclasses.MISSING
            result[field.name] = plain(value)
    return result


@pytest.fixture(scope="module")
def made():
    """The schema as the installed libraries give it now."""
    return schema.recipe_schema()


def test_the_schema_is_a_valid_one_of_its_draft(made):
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(made)


def test_no_key_is_taken_that_the_classes_do_not_have(made):
    for section, cls in CLASSES.items():
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        owned = {name.partition(".")[2] for name in OWNED if name.startswith(f"{section}.")}
        assert set(made["properties"][section]["properties"]) == known - owned


@pytest.mark.parametrize("section", CLASSES)
def test_every_field_takes_its_own_default(section):
    for name, value in defaults(section).items():
        limits = check.schema()["properties"][section]["properties"][name]
        assert not list(Draft202012Validator(limits).iter_errors(value)), f"{section}.{name} = {value!r}"
        assert not [
            fault for fault in check.faults({section: {name: value}}) if fault[0][:2] == (section, name)
        ], f"{section}.{name} = {value!r}"


def test_a_recipe_of_every_field_loads(tmp_path):
    lora = defaults("lora") | {"target_modules": ["q_proj"]}
    sections = {
        "model": {"name_or_path": "a", "dtype": "float32"},
        "data": {"train": "b"},
        "lora": lora,
        "train": defaults("train"),
    }
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    loaded = recipes.load(str(tmp_path / "all.yaml"))
    assert loaded.sections == sections
    assert len(there(loaded.lora).given) + len(loaded.train.given) > 120


def objects(value, path=""):
    """Every mapping of the schema that has keys of its own."""
    if isinstance(value, dict):
        if "properties" in value and value.get("type") == "object":
            yield path, value
        for key, child in value.items():
            yield from objects(child, f"{path}/{key}")
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from objects(child, f"{path}/{i}")


def test_every_mapping_with_keys_of_its_own_is_closed_to_others(made):
    """PEFT drops unknown keys of loftq_config, eva_config and the like without a word."""
    found = dict(objects(made))
    assert len(found) > 15
    # `peft:` is closed by the part that belongs to its peft_type.
    assert [path for path, limits in found.items() if limits.get("additionalProperties") is not False] == [
        "/properties/peft"
    ]
    assert {
        then["then"]["properties"]["peft_type"]["const"] for then in made["properties"]["peft"]["allOf"]
    } == set(schema.PEFT_TYPES)
    for name in ("loftq_config", "corda_config", "eva_config"):
        assert {"type": "object", "additionalProperties": True} not in check.alternatives(
            made["properties"]["lora"]["properties"][name]
        )


def test_words_that_the_classes_name_are_enumerated(made):
    """A plain text would let a typo wait until the model is loaded."""
    train, lora = made["properties"]["train"]["properties"], made["properties"]["lora"]["properties"]
    for name in (
        "lr_scheduler_type",
        "optim",
        "eval_strategy",
        "save_strategy",
        "loss_type",
        "packing_strategy",
        "train_sampling_strategy",
    ):
        assert defaults("train")[name] in train[name]["enum"]
    assert lora["bias"]["enum"] == ["none", "all", "lora_only"]
    assert not [
        option
        for option in check.alternatives(lora["init_lora_weights"])
        if any("[" in word for word in option.get("enum", []))
    ]


def test_every_limit_is_that_of_a_real_field(made):
    real = {
        name
        for section in ("lora", "train", "early_stopping")
        for name in made["properties"][section]["properties"]
    }
    real |= {name for kind in made["properties"]["peft"]["allOf"] for name in kind["then"]["properties"]}
    assert set(schema.LIMITS) <= real
    assert set(schema.ALSO) <= real
