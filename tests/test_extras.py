"""Extras are extras: without any of them recipes are planned and trained, and what needs one says which.

They are not hidden from the import system but absent: the packages that a process finds are links to the
installed ones, except theirs.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lora_recipes.core import cli

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("bitsandbytes", "curate", "deepspeed", "docs", "gguf", "lm-eval", "toxicity")
# Also required by torch.
NEEDED = {"setuptools"}


# One process for all: to import the libraries takes longer than what is asked of them.
ASK = """
import sys
from lora_recipes.__main__ import main
for words in {words}:
    sys.argv = ["lora-recipes", *words]
    try:
        code = main()
    except SystemExit as left:
        code = left.code
    print("code", code, file=sys.stderr)
"""


@pytest.fixture
def without(tmp_path):
    """Runs commands in a Python that has none of the extras; the code and the errors of each."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) | {"test"} == set(extras), "a new extra: say here whether it is absent in this test"
    gone = {Requirement(text).name.lower() for name in EXTRAS for text in extras[name]} - NEEDED
    modules = {
        module
        for module, owners in packages_distributions().items()
        if {owner.lower().replace("_", "-") for owner in owners} & gone
    }
    assert "bitsandbytes" in modules, "else this test would show nothing"
    (site := tmp_path / "site-packages").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.split("-")[0].split(".")[0].lower() not in modules | gone:
            (site / entry.name).symlink_to(entry)

    def run(*commands):
        words = [[str(word) for word in command] for command in commands]
        # -S: the environment's own packages are not found beside these
        command = [sys.executable, "-S", "-c", ASK.replace("{words}", repr(words))]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return re.findall(r"(?s)(.*?)code (\d+)\n", done.stderr)

    return run


def test_without_any_extra_recipes_are_trained_and_what_needs_one_says_which(without, case, tmp_path):
    recipe, outputs = case("qwen_base_eos", train__max_steps=1), ["--outputs", tmp_path / "out"]
    needs = [
        ["model.quantize=nf4"],
        ["train.optim=adamw_8bit"],
        ["train.optim=paged_adamw_32bit", "learning_rates.loraplus_lr_ratio=4"],
    ]
    (prompts := tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?"}\n')
    rows = ["data", "dedupe", recipe.parent / "rows.jsonl", tmp_path / "unique.jsonl"]
    trained, synthesised, unique, near, *refused = without(
        ["train", recipe, *outputs],
        ["data", "synthesise", prompts, tmp_path / "rows.jsonl", "--method", "teacher"],
        [*rows, "--exact"],
        [*rows, "--overwrite"],
        *(["plan", recipe, *words, *outputs] for words in needs),
    )
    assert unique[1] == "0" and near[1] == "2" and cli.extra("curate") in near[0], (unique, near)
    assert trained[1] == "0", trained
    assert synthesised[1] == "2" and cli.extra("curate") in synthesised[0]
    assert list(tmp_path.glob("out/*/adapter/adapter_model.safetensors"))
    for (said, code), (first, *_) in zip(refused, needs, strict=True):
        assert code == "2" and first.partition("=")[0] in said
        assert (cli.extra("bitsandbytes") if "quantize" in first else "bitsandbytes") in said
