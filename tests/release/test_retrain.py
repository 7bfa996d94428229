"""`retrain`: what is new since the release, from the deployed adapter, promoted only where it is better."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_recipes.core import release_folder
from lora_recipes.core.errors import Exit, RecipeError
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.release.conftest import git, lines

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def released(project, capsys):
    """Its release lora-v1 is deployed."""
    assert project.release() == 0
    capsys.readouterr()
    return project


def retrain(project, *words):
    return project.call("retrain", "own", "--source", str(project.source), *words)


def add(project, rows):
    with (project.source / "train.jsonl").open("a") as file:
        file.writelines(rows)
    return project.commit()


def deployed(project):
    return json.loads((project.outputs / "own" / "deployed.json").read_text())["tag"]


def test_what_is_new_is_trained_from_the_deployed_adapter_and_promoted(released, capsys):
    commit = add(released, lines("corrections.jsonl")[4:])
    assert retrain(released, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "4 of 8 rows are new" in said and "promoted as lora-v2 if better" in said
    assert not (released.outputs / "own.retrain").exists() and deployed(released) == "lora-v1"
    assert retrain(released) == Exit.DONE
    assert deployed(released) == "lora-v2" and git(released.source, "rev-parse", "lora-v2^{}") == commit
    run = json.loads((released.outputs / "own.retrain" / "run.json").read_text())
    assert run["plan"]["data"]["train"]["rows"] == 4
    losses = run["compared"]["losses"]
    assert losses["trained"]["loss"] + losses["half"] < losses["base"]["loss"], "better by its interval"
    before = released.record["evaluation"]["sets"]["eval"]["trained"]["loss"]
    assert losses["base"]["loss"] == pytest.approx(before, abs=1e-6), "it is the deployed one's"
    found = release_folder.deployed(released.outputs / "own")
    assert found and found[1].recipe == "own" and len(release_folder.rows(*found)) == 8
    assert any("goes on from lora-v1" in note for note in found[1].notes)
    assert not (released.outputs / "own.retrain" / "merged").exists()
    capsys.readouterr()
    assert retrain(released) == Exit.NOTHING_NEW, "what was promoted is what counts now"
    assert "unchanged since that commit (git diff)" in capsys.readouterr().out


def test_nothing_new_is_said_with_a_code_of_its_own(released, capsys):
    (released.source / "notes.md").write_text("another file")
    (released.source / "train.jsonl").write_text("".join(reversed(lines("corrections.jsonl")[:4])))
    released.commit()
    assert retrain(released) == Exit.NOTHING_NEW
    said = capsys.readouterr().out
    assert "0 of 4 rows are new" in said and "nothing new" in said, "read, and the same in another order"
    assert not (released.outputs / "own.retrain").exists()


def test_what_is_not_better_stays_out_and_is_not_trained_twice(released, capsys):
    add(released, ['{"text": "The old sun bakes no bread."}\n'])
    for again in (False, True):  # a scheduler does not train the same every night
        assert retrain(released) == Exit.NOT_BETTER
        said = capsys.readouterr().out
        assert "not better by its interval: lora-v1 stays" in said
        assert ("the very same was trained before" in said) is again
        assert ("training into" in said) is not again
    assert deployed(released) == "lora-v1" and released.tags() == ["lora-v1"]
    held = released.source / "eval.jsonl"
    held.write_text("".join(held.read_text().splitlines(keepends=True)[:3]))
    released.commit()
    assert retrain(released) == Exit.NOT_BETTER, "on other rows it is asked anew"
    assert "training into" in capsys.readouterr().out


def test_what_breaks_on_the_way_has_a_code_and_leaves_what_is_deployed(released, capsys):
    recipe = released.outputs / "own" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lora_alpha: 4", "lora_alpha: 8"))
    add(released, lines("corrections.jsonl")[4:5])
    assert retrain(released) == Exit.FAILED
    assert "warm_start.from_adapter" in (said := capsys.readouterr().err) and "another scaling" in said
    assert deployed(released) == "lora-v1"


def broken_release(project):
    (project.outputs / "_releases" / "lora-v1" / WEIGHTS).write_bytes(b"")


REFUSED = {
    lambda p: (p.outputs / "own" / "deployed.json").unlink(): (2, "there is no deployed.json"),
    broken_release: (Exit.CHANGED, "was changed since the release"),
    lambda p: (p.source / "x").write_text("x"): (Exit.DIRTY, "differ from the commit"),
    lambda p: add(p, ["no row\n"]): (2, "train.jsonl:5"),
    lambda p: (p.outputs / "_releases" / "lora-v1" / "rows.blake2b").unlink(): (2, "not the list of rows"),
}


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_retrained_is_refused_before(released, capsys, number):
    change, (code, found) = list(REFUSED.items())[number]
    change(released)
    assert retrain(released) == code and found in " ".join(capsys.readouterr().err.split())
    assert not (released.outputs / "own.retrain").exists()


def test_training_goes_on_from_the_very_tensors_of_an_adapter(project):
    """At a learning rate of nearly nothing they stay what they were; another shape is refused."""
    words = [f"warm_start.from_adapter={project.adapter}", "train.max_steps=1", "train.learning_rate=1e-12"]
    recipe = recipes.load(str(project.source / "own.yaml"), words)
    own = project.outputs / "on"
    own.mkdir()
    (own / "tiny_base").symlink_to(project.outputs / "tiny_base")
    train(resolve(recipe, own))
    before, after = (load_file(at / WEIGHTS) for at in (project.adapter, own / "own" / "adapter"))
    assert (
        all(torch.allclose(before[n], after[n], atol=1e-9) for n in before) and before.keys() == after.keys()
    )
    other = recipes.load(str(project.source / "own.yaml"), [*words, "lora.r=2", "lora.lora_alpha=2"])
    with pytest.raises(RecipeError, match="has other tensors"):
        train(resolve(other, own), force=True)
