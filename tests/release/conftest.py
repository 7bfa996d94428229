"""A project as people have it: a git repository with a recipe and its rows, beside it the outputs."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lora_recipes.__main__ import main
from lora_recipes.core.files import ROOT
from lora_recipes.recipe import load as recipes


def git(folder, *words):
    """What git prints."""
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def lines(name):
    return (ROOT / "data" / "facts" / name).read_text(encoding="utf-8").splitlines(keepends=True)


@dataclass
class Project:
    """The repository `source` with recipe.yaml, train.jsonl and eval.jsonl; `outputs` with its run `own`."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    @property
    def adapter(self) -> Path:
        return self.outputs / "own" / "adapter"

    @property
    def record(self):
        return json.loads((self.outputs / "own" / "run.json").read_text())

    def write(self, **changed) -> None:
        """Fields of run.json, otherwise."""
        (self.outputs / "own" / "run.json").write_text(json.dumps(self.record | changed))

    def commit(self, message="more") -> str:
        git(self.source, "add", ".")
        git(self.source, "commit", "-qm", message)
        return git(self.source, "rev-parse", "HEAD")

    def call(self, verb, *words) -> int:
        return main([verb, *words, "--outputs", str(self.outputs)])

    def release(self, tag="lora-v1", *words) -> int:
        return self.call("release", "own", "--tag", tag, "--source", str(self.source), *words)

    def tags(self) -> list[str]:
        return git(self.source, "tag").split()


@pytest.fixture(scope="session")
def made(trained, tmp_path_factory):
    """One that is trained, merged and evaluated."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.source.mkdir()
    shutil.copytree(trained / "tiny_base", project.outputs / "tiny_base")
    sections = recipes.load("tiny_facts").sections
    sections["data"] = {"train": "train.jsonl", "eval": "eval.jsonl"}
    sections["train"] |= {"num_train_epochs": 5, "eval_strategy": "no"}
    (project.source / "own.yaml").write_text(yaml.safe_dump(sections))
    (project.source / "train.jsonl").write_text("".join(lines("corrections.jsonl")[:4]))
    (project.source / "eval.jsonl").write_text("".join(lines("rephrased.jsonl")))
    git(project.source, "init", "-q")
    for key, value in (("name", "Tester"), ("email", "tester@example.org")):
        git(project.source, "config", f"user.{key}", value)
    project.commit("first")
    assert project.call("train", str(project.source / "own.yaml")) == 0
    assert project.call("merge", "own") == 0
    assert project.call("eval", "own") == 0
    return project


@pytest.fixture
def project(made, tmp_path):
    """A copy that a test may write into; its base stays where it was."""
    shutil.copytree(made.source, tmp_path / "source")
    shutil.copytree(made.outputs / "own", tmp_path / "outputs" / "own")
    recipe = tmp_path / "outputs" / "own" / "recipe.yaml"
    for file in (recipe, recipe.with_name("run.json")):  # as if it had been trained here
        file.write_text(file.read_text().replace(str(made.folder), str(tmp_path)))
    (tmp_path / "outputs" / "tiny_base").symlink_to(made.outputs / "tiny_base")
    return Project(tmp_path)
