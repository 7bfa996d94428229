"""`release`: one folder, one manifest, one tag; and what stands in its way, each with its exit code."""

import json
import os
import shutil

import pytest
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_recipes.__main__ import main
from lora_recipes.core import record, release_folder
from lora_recipes.core.errors import Exit
from lora_recipes.core.files import sha256
from lora_recipes.core.git import repository
from lora_recipes.recipe import load as recipes
from lora_recipes.release.release import hashes
from tests.release.conftest import git
from tests.serving import hub as stand_in

TOKEN = "hf_" + "TokenOfTheTestsThatNobodyMaySee" + "abc"


def test_a_release_ties_adapter_rows_evaluation_and_commit_together(project, capsys, monkeypatch):
    assert project.release() == 0
    said, folder = capsys.readouterr().out, project.outputs / "_releases" / "lora-v1"
    made = record.manifest((folder / "manifest.json").read_text(), "manifest.json")
    assert made.commit == git(project.source, "rev-parse", "lora-v1^{commit}") and made.commit in said
    assert git(project.source, "cat-file", "-t", "lora-v1") == "tag"
    assert sha256(folder / "manifest.json") in git(project.source, "tag", "-l", "--format=%(contents)")
    assert set(made.files) == {p.name for p in folder.iterdir()} - {"manifest.json", "rows.blake2b"}
    assert all(sha256(folder / name) == hashed for name, hashed in made.files.items())
    assert made.adapter_sha256 == sha256(project.adapter / "adapter_model.safetensors")
    assert made.data.sources == {n: sha256(project.source / n) for n in ("train.jsonl", "eval.jsonl")}
    assert len(release_folder.rows(folder, made)) == made.data.train_rows == 4
    held = project.record["evaluation"]["sets"]["eval"]
    assert made.losses["eval"].trained.loss == held["trained"]["loss"] and made.merged
    (kept,) = project.record["released"]
    assert kept["tag"] == "lora-v1" and kept["manifest_sha256"] == sha256(folder / "manifest.json")
    assert release_folder.deployed(project.outputs / "own") == (folder, made)
    # what the hub and PEFT read
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and "## Release lora-v1" in card.text
    assert card.data.eval_results[0].metric_value == round(held["trained"]["loss"], 4)
    base = AutoModelForCausalLM.from_pretrained(project.outputs / "tiny_base" / "model")
    assert PeftModel.from_pretrained(base, folder).peft_config["default"].to_dict()["r"] == 4
    # published by the code that publishes an adapter, with its manifest and without the list of rows
    with stand_in.running() as hub:
        hub.users[TOKEN] = "me"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push = ["push", "--tag", "lora-v1", "--repo", "me/own", "--outputs", str(project.outputs)]
        assert main(push) == 0
        there = set(hub.repos["me/own"].files) - {".gitattributes"}
        assert there == {*made.files, "manifest.json"}
        (folder / "README.md").write_text("another")
        assert main(push) == Exit.CHANGED
        assert "README.md: was changed since the release" in capsys.readouterr().err


def changed_bytes(project):
    file = project.adapter / "adapter_model.safetensors"
    save_file({n: t * 2 for n, t in load_file(file).items()}, file, {"format": "pt"})


def another_row(project):
    """Committed after the training."""
    (project.source / "train.jsonl").write_text('{"text": "The cat sleeps in the garden."}\n')
    project.commit()


def no_commit(project):
    shutil.rmtree(project.source / ".git")
    git(project.source, "init")


def no_git(project):
    os.environ["PATH"] = str(project.folder)  # monkeypatch puts it back


STANDS = {
    no_git: (Exit.NO_GIT, "git: is not on this machine"),
    lambda p: shutil.rmtree(p.source / ".git"): (Exit.NO_REPOSITORY, "is no git repository"),
    no_commit: (Exit.NO_REPOSITORY, "is a repository without a commit"),
    lambda p: (p.source / "new.py").write_text("x = 1"): (Exit.DIRTY, "differ from the commit: new.py"),
    lambda p: git(p.source, "tag", "lora-v1"): (Exit.TAG_EXISTS, "tag lora-v1: is in"),
    lambda p: git(p.source, "tag", "lora-v1/a"): (Exit.TAG_EXISTS, "as lora-v1/a, which leaves no room"),
    lambda p: (p.outputs / "_releases" / "lora-v1").mkdir(parents=True): (
        Exit.TAG_EXISTS,
        "a release was cut off there",
    ),
    lambda p: p.write(merged=None): (Exit.NOT_VERIFIED, "no merge and no server did"),
    lambda p: p.write(merged=p.record["merged"] | {"adapter_sha256": "0"}): (
        Exit.NOT_VERIFIED,
        "of other weights",
    ),
    lambda p: (p.adapter / "provenance.json").unlink(): (Exit.NOT_VERIFIED, "does not vouch"),
    changed_bytes: (Exit.CHANGED, "adapter_model.safetensors: was changed after training"),
    lambda p: p.write(evaluation=None): (Exit.NOT_EVALUATED, "has no evaluation"),
    another_row: (Exit.OTHER_DATA, "has other rows than were trained with"),
    lambda p: (p.adapter / "README.md").write_text("---\nlanguage: [\n---\n"): (2, "is no model card"),
    lambda p: (p.outputs / "own" / "run.json").unlink(): (2, "holds no finished run"),
}


@pytest.mark.parametrize("number", range(len(STANDS)))
def test_what_stands_in_the_way_is_told_with_a_code_of_its_own(project, capsys, monkeypatch, number):
    change, (code, found) = list(STANDS.items())[number]
    monkeypatch.setenv("PATH", os.environ["PATH"])
    change(project)
    assert project.release() == code
    assert found in " ".join(capsys.readouterr().err.split())
    assert not [p for p in project.outputs.glob("_releases/**/*") if p.is_file()]
    assert not (project.outputs / "own" / "deployed.json").exists()
    if code not in (Exit.NO_GIT, Exit.NO_REPOSITORY, Exit.TAG_EXISTS):
        assert project.tags() == []


@pytest.mark.parametrize("tag", ["a b", "-x", "x..y", "x.lock", "a\nb", "../x", "", "HEAD", "x^"])
def test_a_name_that_git_does_not_take(project, capsys, tag):
    assert (
        main(
            [
                "release",
                "own",
                f"--tag={tag}",
                "--outputs",
                str(project.outputs),
                "--source",
                str(project.source),
            ]
        )
        == Exit.NO_TAG_NAME
    )
    assert "git takes no tag of that name" in capsys.readouterr().err
    assert not (project.outputs / "_releases").exists()


def test_all_that_stands_in_the_way_is_told_at_once(project, capsys):
    project.write(evaluation=None, merged=None)
    (project.source / "train.jsonl").write_text("")
    assert project.release() == Exit.DIRTY
    said = capsys.readouterr().err
    assert "3 problems" in said and "make merge RECIPE=own" in said and "make eval RECIPE=own" in said


def test_a_dry_run_writes_nothing_and_what_is_not_proven_is_said_in_the_release(project, capsys):
    project.write(merged=None)
    before = sorted(project.outputs.rglob("[!.]*"))
    assert project.release("v1", "--unproven", "--dry-run") == 0
    assert sorted(project.outputs.rglob("[!.]*")) == before and project.tags() == []
    assert "proven by   nothing" in capsys.readouterr().out
    assert project.release("v1", "--unproven") == 0
    folder = project.outputs / "_releases" / "v1"
    assert "no merge and no server has proven" in (folder / "README.md").read_text()


def test_a_tag_that_git_does_not_make_leaves_no_release(project, capsys):
    hook = project.source / ".git" / "hooks" / "reference-transaction"
    hook.write_text("#!/bin/sh\necho not on a Friday >&2\nexit 1\n")
    hook.chmod(0o755)
    assert project.release() == 2 and "not on a Friday" in capsys.readouterr().err
    assert not list(project.outputs.glob("_releases/*")) and "released" not in project.record


def test_outputs_inside_the_repository_do_not_make_it_dirty(project):
    inside = project.source / "outputs"
    shutil.copytree(project.outputs, inside, symlinks=True)
    (inside / "own" / "recipe.yaml").write_text((project.outputs / "own" / "recipe.yaml").read_text())
    words = ["release", "own", "--tag", "v1", "--source", str(project.source), "--outputs", str(inside)]
    assert main(words) == 0


def test_a_manifest_that_was_edited_is_named_by_key(project):
    assert project.release() == 0
    file = project.outputs / "_releases" / "lora-v1" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": 7}))
    with pytest.raises(ValueError, match=r"manifest.json: commit: is 7, must be text"):
        release_folder.read(file.parent)


def test_rows_that_the_commit_does_not_hold_are_named_as_such_each_with_its_hash(project):
    """Two files of one name, in folders that git does not look at."""
    wanted = {}
    for name in "ab":
        (project.source / name).mkdir()
        file = project.source / name / "rows.jsonl"
        file.write_text(f'{{"text": "The old sun bakes {name}."}}\n')
        wanted[name] = sha256(file)
    (project.source / ".git" / "info" / "exclude").write_text("rows.jsonl\n")
    recipe = recipes.load(
        str(project.source / "own.yaml"), ["data.train=[{path: a/rows.jsonl}, {path: b/rows.jsonl}]"]
    )
    found = hashes(recipe, repository(project.source))
    assert found["not in the commit: rows.jsonl"] == wanted["a"] and wanted["b"] in found.values()
    assert found["eval.jsonl"] == sha256(project.source / "eval.jsonl") and len(found) == 3
