"""`lora-recipes contract`: what it writes is what the shipped contracts say, and what it refuses is said in a
word; contracts of a user's own; and a hub that does not answer.
"""

import json
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from lora_recipes.__main__ import main
from lora_recipes.core import hub
from lora_recipes.core.errors import RecipeError
from lora_recipes.data.render import chat_template
from lora_recipes.model import write_contract
from lora_recipes.planning import plan
from lora_recipes.recipe import contract
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from tests.cases import families
from tests.recipe.test_contract import built, shapes
from tests.typed import there

DEAD = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def silent(monkeypatch):
    """A hub that cannot be reached."""
    monkeypatch.setattr(constants, "ENDPOINT", DEAD)


def published(name: str, folder: Path, **more) -> Path:
    """The config.json of the contract `name` as transformers writes it, and `more`."""
    config = AutoConfig.for_model(**contract.load(name).config)
    config.architectures = [contract.load(name).architecture]
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


@pytest.mark.parametrize(
    "name", ["qwen3_06b", "qwen25_7b", "mistral_7b", "phi4_mini", "gemma3_4b", "qwen3_30b_a3b", "gpt_oss_20b"]
)
def test_from_a_published_config_the_shipped_contract_is_written(name, tmp_path):
    made = write_contract.make(str(published(name, tmp_path)), "mine").contract
    shipped = contract.load(name)
    assert (made.architecture, made.parameters, made.shapes) == (
        shipped.architecture,
        shipped.parameters,
        shipped.shapes,
    )
    # What equals the class's default and is in no list of ours is not stated.
    assert made.config.items() <= shipped.config.items()
    assert set(shipped.config) - set(made.config) <= {"query_pre_attn_scalar"}


def test_of_a_two_part_model_the_text_part_is_written(tmp_path):
    made = write_contract.make(str(published("tiny_qwen35", tmp_path)), "mine").contract
    shipped = contract.load("tiny_qwen35")
    assert (made.architecture, made.parameters, made.shapes) == (
        "Qwen3_5ForConditionalGeneration",
        shipped.parameters,
        shipped.shapes,
    )
    assert made.config["model_type"] == "qwen3_5_text"
    assert shipped.text_config.items() >= {k: v for k, v in made.config.items() if k != "model_type"}.items()


@pytest.mark.parametrize("family", ["gpt2", "phi3", "deepseek_v3", "falcon_h1", "nemotron_h"])
def test_a_contract_of_any_family_builds_the_model_it_was_made_from(family, tmp_path):
    folder = families.make(family, tmp_path)
    made = write_contract.make(str(folder), str(tmp_path / "mine.yaml"))
    write_contract.write(made)
    read = contract.load("mine.yaml", beside=tmp_path)
    stored = AutoConfig.from_pretrained(folder)
    assert read.differences(stored.get_text_config().to_dict()) == []
    assert read.departures(shapes(built(read.config))) == []
    assert shapes(built(read.config)) == shapes(built(stored.to_dict()))


def test_the_chat_template_is_named_where_trl_carries_it_and_copied_where_not(tmp_path, capsys):
    folder = published("qwen3_06b", tmp_path / "base")
    assert "need model.chat_template" in write_contract.make(str(folder), "mine").warning
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template("qwen3", "")}))
    assert write_contract.make(str(folder), "mine").contract.chat_template == "qwen3"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["contract", str(folder), "--name", str(tmp_path / "mine.yaml")]) == 0
    said = capsys.readouterr().out
    assert "Qwen3ForCausalLM, 596,049,920 parameters, 7 kinds of projection, chat template" in said
    assert "-> in a recipe: model.contract: mine.yaml" in said
    read = contract.load("mine.yaml", beside=tmp_path)
    assert Path(there(read.chat_template)).read_text() == "{{ messages[0].content }}"


def test_nothing_is_overwritten_unasked_and_print_writes_nothing(tmp_path, capsys):
    folder, mine = published("tiny_qwen3", tmp_path / "base"), tmp_path / "mine.yaml"
    assert main(["contract", str(folder), "--name", str(mine), "--print"]) == 0
    assert capsys.readouterr().out.count("\n") > 10 and not mine.exists()
    mine.write_text("mine")
    assert main(["contract", str(folder), "--name", str(mine)]) == 2
    assert "is already there" in capsys.readouterr().err and mine.read_text() == "mine"
    assert main(["contract", str(folder), "--name", str(mine), "--force"]) == 0
    assert contract.read(mine).parameters == contract.load("tiny_qwen3").parameters
    assert main(["contract", str(folder), "--name", "qwen3_4b"]) == 2
    assert "configs/models/qwen3_4b.yaml: is already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("README.md", "", "has no config.json\n    -> name the folder of a whole checkpoint"),
        ("adapter_config.json", '{"base_model_name_or_path": "a/b"}', "is an adapter, not a base model"),
        (
            "config.json",
            '{"model_type": "qwen9"}',
            "names the model_type 'qwen9', which transformers",
        ),
        ("config.json", '{"hidden_size": 3}', "Should have a `model_type` key"),
        ("config.json", "{", "is not a valid JSON file"),
        ("config.json", '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "no causal language"),
        (
            "config.json",
            '{"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}',
            "is quantised already (awq",
        ),
        (
            "config.json",
            '{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}',
            "brings Python code of its own",
        ),
    ],
    ids=["none", "adapter", "unknown", "no type", "no json", "encoder", "quantised", "code"],
)
def test_what_no_contract_can_be_made_of_is_refused_in_a_word(file, content, said, tmp_path, capsys):
    (tmp_path / file).write_text(content)
    assert main(["contract", str(tmp_path), "--name", "mine"]) == 2
    assert said in capsys.readouterr().err


def test_without_the_hub_an_id_is_refused_at_once(silent, capsys):
    began = time.monotonic()
    assert main(["contract", "owner/model", "--print"]) == 2
    said = capsys.readouterr().err
    assert "owner/model: is not on this machine, and 127.0.0.1:9 cannot be reached" in said
    assert "name a folder that holds its config.json" in said
    assert main(["contract", "./model", "--print"]) == 2
    assert "./model: is no folder here" in capsys.readouterr().err
    assert time.monotonic() - began < 10


def test_without_the_hub_a_plan_says_the_true_choices_at_once(silent, write_recipe, tmp_path):
    path = write_recipe("qwen3_8b_fact", model={"name_or_path": "owner/model", "dtype": "bfloat16"})
    began = time.monotonic()
    with pytest.raises(RecipeError) as error:
        plan.make(resolve(recipes.load(str(path)), tmp_path))
    assert time.monotonic() - began < 10
    said = str(error.value)
    assert "model.name_or_path: owner/model is not on this machine, and 127.0.0.1:9 cannot be reached" in said
    for choice in ("name a folder", "hf download owner/model", "model.contract: one of configs/models/"):
        assert choice in said


@pytest.mark.parametrize("named", ["/nowhere/model", "./model", "bases/mine/model"])
def test_a_path_that_is_nowhere_is_not_looked_for_on_the_hub(named, write_recipe, tmp_path):
    path = write_recipe("qwen3_8b_fact", model={"name_or_path": named, "dtype": "bfloat16"})
    with pytest.raises(RecipeError, match=f"name_or_path: {named} is no folder here"):
        plan.make(resolve(recipes.load(str(path)), tmp_path))


def test_a_hub_that_takes_the_call_and_never_answers_is_waited_for_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        began = time.monotonic()
        assert "cannot be reached" in hub.silent()
        assert time.monotonic() - began < 5
        again = time.monotonic()
        assert "cannot be reached" in hub.silent()
        assert time.monotonic() - again < 0.2


def test_a_folder_with_config_and_tokenizer_plans_without_contract_and_asks_no_hub(
    tmp_path, silent, write_recipe
):
    folder = families.make("qwen3", tmp_path)
    rows = families.rows(tmp_path)
    path = write_recipe(
        "qwen3_8b_fact",
        model={"name_or_path": str(folder), "dtype": "float32"},
        data__train=str(rows),
        probes=...,
    )
    hub._silent.cache_clear()
    made = plan.make(resolve(recipes.load(str(path)), tmp_path))
    assert made.facts.model.base == 40_128 and "contract" not in made.text().split("adapter")[0]
    assert there(made.facts.data.train.tokens) > 0
    assert hub._silent.cache_info().misses == 0


def test_a_recipe_names_a_contract_of_its_own_beside_itself(tmp_path, silent, write_recipe):
    folder = published("qwen3_06b", tmp_path / "base")
    assert main(["contract", str(folder), "--name", str(tmp_path / "mine.yaml")]) == 0
    path = write_recipe("qwen3_8b_fact", model__contract="mine.yaml")
    recipe = recipes.load(str(path))
    made = plan.make(resolve(recipe, tmp_path / "outputs"))
    assert made.facts.model.base == 596_049_920 and "contract mine:" in made.text()
    assert recipe.anywhere()["model"]["contract"] == str((tmp_path / "mine.yaml").resolve())
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(RecipeError, match=r"model.contract: the contract mine.yaml is not there"):
        resolve(recipes.load(str(path)), tmp_path)


def test_a_plan_says_whose_chat_template_it_rendered_with_and_what_to_do_without_one(tmp_path, write_recipe):
    path = write_recipe("phi4_mini_style")
    template = "configs/models/phi4_mini.jinja"
    made = plan.make(resolve(recipes.load(str(path)), tmp_path))
    assert f"from the chat template alone: the contract's, {template})" in made.text()
    folder = published("phi4_mini", tmp_path / "base")
    assert main(["contract", str(folder), "--name", str(tmp_path / "bare.yaml")]) == 0
    path = write_recipe("phi4_mini_style", model__contract="bare.yaml")
    with pytest.raises(RecipeError) as error:
        plan.make(resolve(recipes.load(str(path)), tmp_path))
    assert "its contract names no chat template\n    -> set model.chat_template" in str(error.value)
    assert "hf download microsoft/Phi-4-mini-instruct --include 'tokenizer*'" in str(error.value)
    path = write_recipe("phi4_mini_style", model__contract="bare.yaml", model__chat_template=template)
    made = plan.make(resolve(recipes.load(str(path)), tmp_path))
    assert f"from the chat template alone: {template})" in made.text()


def test_a_target_of_another_family_is_answered_with_the_familys_own(tmp_path):
    recipe = recipes.load("phi4_mini_style", ["lora.target_modules=[q_proj, down_proj]"])
    with pytest.raises(RecipeError, match=r"target_modules\[0\]: 'q_proj' matches no module.*\n.*qkv_proj"):
        plan.make(resolve(recipe, tmp_path))
