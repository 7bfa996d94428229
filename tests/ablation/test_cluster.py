"""What is written for a cluster is run here as the cluster would run it: the body of the script, with the
variables that it sets.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from lora_recipes.ablation import cluster, report, spec
from lora_recipes.ablation.ablate import spread
from lora_recipes.core import files
from lora_recipes.core.errors import RecipeError
from tests import process
from tests.typed import there

SCRIPT = str(files.ROOT / "scripts" / "ablate.py")
OVER = ["lora.r=2,4", "train.max_steps=2", "train.logging_steps=1"]


def bash(file, **variables):
    """Run a script as it is, with these variables."""
    command = ["bash", str(file)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env=os.environ | variables, check=False
    )


@pytest.fixture
def outputs(trained, tmp_path):
    """An outputs folder with a blank in its name, and the trained base in it."""
    folder = tmp_path / "my outputs"
    shutil.copytree(trained / "tiny_base", folder / "tiny_base")
    return folder


def test_a_job_of_a_slurm_array_trains_its_run_and_the_report_collects_what_is_there(outputs, capsys):
    loaded = spec.quick("tiny_facts", OVER)
    said = spread(loaded, outputs, "slurm", ["tiny_facts", *OVER])
    folder = outputs / "ablations" / "tiny_facts-r"
    file = folder / "slurm.sh"
    assert "peak GPU" in capsys.readouterr().out and "sbatch " in said
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", file.read_text(), re.M))
    assert options["array"] == "0-1" and options["gres"] == "gpu:1" and options["job-name"] == "tiny_facts-r"
    assert options["output"] == f'"{folder}/slurm-%A_%a.log"' and not list(folder.glob("*/s*"))
    done = bash(file, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    assert [str(p.relative_to(folder)) for p in folder.glob("*/*/adapter")] == ["r4/s42/adapter"]
    assert bash(file, SLURM_ARRAY_TASK_ID="2").returncode != 0, "there is no such run"
    collect = there(re.search(r"report +python (.*)$", said, re.M))[1]
    done = subprocess.run(
        f"{sys.executable} {collect}", shell=True, cwd=files.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and re.search(r"^r4 +1 +[0-9.]+ \(one seed\)", done.stdout, re.M), done.stdout
    assert "r2: s42 was not run" in done.stdout
    assert (folder / "report.html").is_file() and json.loads((folder / "ablation.json").read_text())[
        "seeds"
    ] == [42]


@pytest.fixture
def anywhere(trained, write_recipe):
    """The recipe with its base named by a path that each machine has."""
    base = trained / "tiny_base" / "model"
    return str(
        write_recipe(
            "tiny_facts", model={"name_or_path": str(base), "contract": "tiny_qwen3", "dtype": "float32"}
        )
    )


# docs.skypilot.co/en/latest/reference/yaml-spec.html
FIELDS = {"name", "workdir", "envs", "file_mounts", "setup", "run"}


def test_a_skypilot_job_runs_what_it_says_and_each_run_is_launched_once(anywhere, tmp_path):
    loaded = spec.quick(anywhere, OVER, [1, 2])
    command = [anywhere, *OVER, "--seeds", "1", "2"]
    with pytest.raises(RecipeError, match="is not in the folder that goes to each machine"):
        cluster.generate("skypilot", loaded, loaded.runs(), command, tmp_path, "")
    # the recipe of a quick ablation may be a file that each machine has; here it lies outside, so that it is
    # named absolutely
    made = cluster._skypilot("# head\n", loaded, loaded.runs(), command, tmp_path)
    task = yaml.safe_load(made["skypilot.yaml"])
    assert set(task) == FIELDS and task["envs"]["RUN"] is None and task["envs"]["BUCKET"] is None
    assert task["file_mounts"] == {task["envs"]["RESULTS"]: {"name": "${BUCKET}", "mode": "MOUNT_CACHED"}}
    results = tmp_path / "results"
    start, module, *words = subprocess.run(
        ["bash", "-c", task["run"].replace(".venv/bin/python", r"printf %s\\n")],
        cwd=task["workdir"],
        env=os.environ | {"RUN": "r4/s2", "RESULTS": str(results)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert (start, module) == ("-m", "lora_recipes")
    done = process.run(*words)  # as bash would hand them to Python
    assert done.returncode == 0, done.stderr
    assert [p.parent.name for p in results.glob("ablations/*/*/s2/adapter")] == ["s2"]
    assert "r4: " not in report.write(results / "ablations" / loaded.name).splitlines()[0]

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sky").write_text('#!/bin/bash\nprintf "%s " "$@" >> "$LOG"; echo >> "$LOG"\n')
    (tmp_path / "bin" / "sky").chmod(0o755)
    (tmp_path / "launch.sh").write_text(made["skypilot.sh"])
    path, log = f"{tmp_path / 'bin'}:{os.environ['PATH']}", tmp_path / "log"
    assert bash(tmp_path / "launch.sh", PATH=path, LOG=str(log)).returncode != 0 and not log.exists(), (
        "no GPUS and no BUCKET"
    )
    assert bash(tmp_path / "launch.sh", PATH=path, LOG=str(log), GPUS="L4:1", BUCKET="b").returncode == 0
    lines = log.read_text().splitlines()
    assert [there(re.search(r"--env RUN=(\S+) --env BUCKET=b", line))[1] for line in lines] == [
        "r2/s1",
        "r4/s1",
        "r2/s2",
        "r4/s2",
    ]
    assert all(line.startswith("jobs launch --yes --detach-run") and "--gpus L4:1" in line for line in lines)


def test_machines_that_share_no_files_are_not_sent_to_train_a_base_each(tmp_path):
    loaded = spec.load("tiny_rank")
    with pytest.raises(RecipeError, match=r"ON=skypilot: each machine would make its own base \(tiny_base\)"):
        cluster.generate("skypilot", loaded, loaded.runs(), ["tiny_rank"], tmp_path, "")
    with pytest.raises(RecipeError, match=r"its own base \(random weights\)"):
        cluster.generate("skypilot", spec.load("tiny_targets"), [], ["tiny_targets"], tmp_path, "")


def test_a_file_is_named_from_the_folder_that_the_jobs_start_in(tmp_path, monkeypatch):
    monkeypatch.chdir(files.ROOT / "configs")
    loaded = spec.load("ablations/qwen35_4b_rank.yaml")
    cluster.generate("skypilot", loaded, loaded.runs(), ["ablations/qwen35_4b_rank.yaml"], tmp_path, "")
    assert (
        " configs/ablations/qwen35_4b_rank.yaml --outputs"
        in (tmp_path / "ablations/qwen35_4b_rank/skypilot.yaml").read_text()
    )


def test_files_for_a_cluster_go_with_no_report_and_no_dry_run():
    done = subprocess.run(
        [sys.executable, SCRIPT, "tiny_rank", "--on", "slurm", "--report"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "not allowed with" in done.stderr
