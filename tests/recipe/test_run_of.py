"""What merge, eval, serve, combine and chat make of the recipe that they are given: one answer for all."""

import json

import pytest

from lora_recipes.__main__ import main
from lora_recipes.core import record
from lora_recipes.core.errors import RecipeError
from lora_recipes.recipe import load as recipes
from tests.core.test_run_folder import RUN


@pytest.fixture
def own(tmp_path):
    """A recipe of one's own, and its run in tmp_path/outputs as training leaves it, with an override."""
    file = tmp_path / "mine" / "own.yaml"
    file.parent.mkdir()
    file.write_text(recipes.load("tiny_facts").to_yaml())
    run = tmp_path / "outputs" / "own"
    run.mkdir(parents=True)
    content = record.plain(RUN)
    content["plan"] |= {"recipe": "own", "overrides": ["lora.r=2"]}
    (run / "run.json").write_text(json.dumps(content))
    (run / "recipe.yaml").write_text(
        json.dumps(recipes.load(str(file), ["lora.r=2"]).anywhere())  # JSON is YAML
    )
    return file


@pytest.mark.parametrize("word", ["own", "own/adapter", "/nowhere/adapter", "tiny_facts"])
def test_a_name_or_a_folder_stays_as_it_is(word, tmp_path):
    assert recipes.run_of(word, tmp_path) == word
    assert recipes.runs_of([f"a={word}", word], tmp_path) == [f"a={word}", word]


def test_a_file_means_its_run_from_any_folder(own, tmp_path, monkeypatch, capsys):
    outputs = tmp_path / "outputs"
    assert recipes.run_of(str(own), outputs) == "own"
    monkeypatch.chdir(own.parent)
    for word in ("own.yaml", "./own.yaml", "../mine/own.yaml"):
        assert recipes.run_of(word, outputs) == "own"
    assert recipes.runs_of(["a=own.yaml", "./own.yaml"], outputs) == ["a=own", "own"]
    assert capsys.readouterr().err == ""


def test_a_file_here_goes_before_a_shipped_recipe_and_the_name_alone_is_the_shipped_one(
    own, monkeypatch, capsys
):
    monkeypatch.chdir(own.parent)
    own.with_name("tiny_rslora.yaml").write_text(own.read_text())
    assert recipes.find("tiny_rslora.yaml").absolute().parent == own.parent
    assert recipes.find("tiny_rslora").parent.parent == recipes.RECIPES


def test_another_file_of_the_same_name_is_said(own, tmp_path, capsys):
    other = tmp_path / "other" / "own.yaml"
    other.parent.mkdir()
    other.write_text(own.read_text().replace("seed: ", "weight_decay: 0.5\n  seed: "))
    assert recipes.run_of(str(other), tmp_path / "outputs") == "own"
    said = capsys.readouterr().err
    assert "was trained from another recipe" in said and "train.weight_decay" in said and "lora.r" not in said


@pytest.mark.parametrize("verb", ["merge", "eval", "serve", "chat", "combine", "push"])
def test_a_file_that_is_not_there_is_told_by_every_verb(verb, own, tmp_path, capsys):
    words = [verb, str(own.with_name("gone.yaml"))]
    words += ["--outputs", str(tmp_path / "outputs")] if verb != "chat" else []
    words += ["x.yaml", "--weights", "1", "1", "--name", "n"] if verb == "combine" else []
    assert main(words) == 2
    assert "gone.yaml: no such file" in capsys.readouterr().err


def test_where_only_the_file_is_gone_the_run_is_named(own, tmp_path):
    own.unlink()
    with pytest.raises(RecipeError, match=r"own is there: name it own, without \.yaml"):
        recipes.run_of(str(own), tmp_path / "outputs")
