"""An ablation on many machines: a Slurm array, or SkyPilot jobs, one arm with one seed a job. Writes files,
starts nothing. No torch.

Fields and options: slurm.schedmd.com/sbatch.html and job_array.html;
docs.skypilot.co/en/latest/reference/yaml-spec.html, storage.html and cli.html. Each job is `lora-recipes
ablate --only ARM/sSEED`: it skips what is finished and continues what was cut off, so that jobs may be sent
again.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from lora_recipes.ablation.spec import Ablation, Run
from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.files import INSTALLED, ROOT, write
from lora_recipes.core.yamlfile import shown

ENGINES = ("slurm", "skypilot")


def generate(
    engine: str, ablation: Ablation, runs: Sequence[Run], command: Sequence[str], outputs: Path, need: str
) -> str:
    """Write the files for `engine` into the ablation's folder; what to do with them, in words.

    `command`: the arguments of `lora-recipes ablate` that name the ablation. `need`: the memory of the
    largest arm, in words.
    """
    file, folder = Path(command[0]), ablation.folder(outputs)
    if engine == "skypilot" and INSTALLED:
        do = f"git clone the repository and run it there, or {cli.command(ON='slurm')}"
        raise RecipeError(
            Problem(cli.command(ON="skypilot"), "each machine gets the checkout, and this is none", do)
        )
    if engine == "skypilot" and file.suffix in (".yaml", ".yml"):
        if not file.resolve().is_relative_to(ROOT):
            do = f"put it into {shown(ROOT / 'configs' / 'ablations')}/"
            raise RecipeError(
                Problem(
                    cli.command(ON="skypilot"),
                    f"{shown(file)} is not in the folder that goes to each machine",
                    do,
                )
            )
        command = [str(file.resolve().relative_to(ROOT)), *command[1:]]
    head = f"# {ablation.name}: {ablation.question}\n# {len(runs)} jobs, an arm with a seed each; {need}.\n"
    made = (_slurm if engine == "slurm" else _skypilot)(head, ablation, runs, command, outputs)
    for name, text in made.items():
        write(folder / name, text)
    do = f"sbatch {shown(folder / 'slurm.sh')}   (and --partition, --time as your cluster wants them)"
    where = shlex.quote(str(outputs))
    if engine == "skypilot":
        do, where = (
            f"GPUS=L4:1 BUCKET=a-name-of-yours bash {shown(folder / 'skypilot.sh')}",
            "A-COPY-OF-THE-BUCKET",
        )
    return (
        f"jobs        {len(runs)}: {do}\nreport      python -m lora_recipes ablate {shlex.join(command)}"
        f" --report --outputs {where}"
    )


def _slurm(
    head: str, ablation: Ablation, runs: Sequence[Run], command: Sequence[str], outputs: Path
) -> dict[str, str]:
    """One array. All jobs and this machine share a file system, with this folder and its Python on it."""
    options = {
        "job-name": ablation.name,
        "array": f"0-{len(runs) - 1}",
        "ntasks": "1",
        "gres": "gpu:1",
        "output": f'"{ablation.folder(outputs)}/slurm-%A_%a.log"',
    }
    lines = [
        "#!/bin/bash",
        head.rstrip(),
        *(f"#SBATCH --{key}={value}" for key, value in options.items()),
        "#SBATCH --requeue",
    ]
    lines += [
        "set -euo pipefail",
        "RUNS=(",
        *(f"  {run}" for run in runs),
        ")",
        f"cd {shlex.quote(str(Path.cwd()))}",
    ]
    train = shlex.join([sys.executable, "-m", "lora_recipes", "ablate", *command, "--outputs", str(outputs)])
    lines.append(f'exec {train} --only "${{RUNS[$SLURM_ARRAY_TASK_ID]}}"')
    return {"slurm.sh": "\n".join([*lines, ""])}


def _skypilot(
    head: str, ablation: Ablation, runs: Sequence[Run], command: Sequence[str], outputs: Path
) -> dict[str, str]:
    """A managed job of a task for each run; they share a bucket, and each machine makes its own .venv."""
    made = {
        arm.recipe.model.from_recipe or "random weights"
        for arm in ablation.arms
        if arm.recipe.model.name_or_path is None
    }
    do = (
        "train it first, put it where every machine reads it, and name it by model.name_or_path; or"
        f" {cli.command(ON='slurm')}, with one file system"
    )
    raise_if(
        [
            Problem(cli.command(ON="skypilot"), f"each machine would make its own base ({name})", do)
            for name in sorted(made)
        ]
    )
    name = ablation.name.replace("_", "-").replace(".", "-").lower()
    task = {
        "name": name,
        "workdir": str(ROOT),
        "envs": {"RUN": None, "BUCKET": None, "RESULTS": "/results"},  # null: must be given with --env
        "file_mounts": {
            "/results": {"name": "${BUCKET}", "mode": "MOUNT_CACHED"}
        },  # MOUNT cannot append, which metrics.jsonl needs
        "setup": "make setup",
        "run": f".venv/bin/python -m lora_recipes ablate {shlex.join(command)}"
        ' --outputs "$RESULTS" --only "$RUN"',
    }
    lines = [
        "#!/bin/bash",
        head.rstrip(),
        "# Needs SkyPilot (pip install skypilot) and an account with a cloud: `sky check`.",
        "set -euo pipefail",
    ]
    lines += [
        ': "${GPUS:?which GPU, e.g. GPUS=L4:1}" "${BUCKET:?the bucket for the results}"',
        f"cd {shlex.quote(str(ROOT))}",
    ]
    file = shlex.quote(str(ablation.folder(outputs) / "skypilot.yaml"))
    lines.append(f"for run in {' '.join(map(str, runs))}; do")
    lines.append(
        f'  sky jobs launch --yes --detach-run --name {name} --gpus "$GPUS" --env RUN="$run" --env'
        f' BUCKET="$BUCKET" {file}'
    )
    return {
        "skypilot.yaml": head + yaml.safe_dump(task, sort_keys=False, width=200),
        "skypilot.sh": "\n".join([*lines, "done", ""]),
    }
