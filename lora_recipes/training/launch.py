"""Start a run in several processes by accelerate's own launcher; and in each of them: does what was asked for
run, and as the recipe says?

accelerate 1.15 falls back in silence: `--cpu --num_processes 2` starts one process, FSDP without GPUs becomes
plain DDP.
"""

import contextlib
import io
import json
import logging
import os
import shlex
import signal
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from lora_recipes.core import cli, lock
from lora_recipes.core.errors import Problem, RecipeError, nearest, raise_if
from lora_recipes.core.files import ROOT, find, looked, now
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.recipe import layout
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.layout import Layout
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.training import outside

FILES = ROOT / "configs" / "accelerate"
ASKED = "LORA_RECIPES_LAUNCH"  # the words of `accelerate launch`, for the processes that `start` starts
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "NCCL communicator was aborted",
    "Broken pipe",
)


@dataclass(frozen=True)
class Asked:
    """What an `accelerate launch` was asked for: the layout, its words as given, and as a person typed
    them.
    """

    layout: Layout
    words: list[str]
    said: str


def words(name: str, processes: int | None, more: str = "") -> list[str]:
    """The words for `accelerate launch`: the file `name` of configs/accelerate/ (or a path), as many
    processes, and `more` of its options.

    Without `processes`: as the file says, else one for each GPU.
    """
    file = FILES / f"{name}.yaml"
    file = file if file.is_file() else Path(name)
    known = sorted(p.stem for p in FILES.glob("*.yaml"))
    if not file.is_file():
        do = f"did you mean {nearest(name, known)}? There are {', '.join(known)}"
        raise RecipeError(Problem(cli.command(ACCELERATE=""), f"there is no {name}", do))
    found = ["--config_file", str(file), *shlex.split(more)]
    if (
        processes is None
        and "num_processes" not in file.read_text(encoding="utf-8")
        and "--num_processes" not in found
    ):
        processes = torch.cuda.device_count()
        if not processes:
            do = f"{cli.command(PROCESSES='2')} starts two on the CPU (ddp and zero2)"
            raise RecipeError(
                Problem(
                    cli.command(PROCESSES=""), f"{name} takes one process a GPU, and there is no GPU here", do
                )
            )
    return [*found, "--num_processes", str(processes)] if processes else found


def parsed(given: list[str]) -> Namespace:
    """`given` as accelerate understands it, its configuration file included."""
    logging.getLogger("accelerate.commands.launch").setLevel(
        logging.ERROR
    )  # names every default that it takes
    usage = io.StringIO()
    options: Namespace
    try:
        with contextlib.redirect_stderr(usage):  # 200 lines of options, and at the end what is wrong
            chosen = launch_command_parser().parse_args(given)
        options, _, _ = _validate_launch_command(chosen)
    except (ValueError, OSError, SystemExit) as error:
        said = usage.getvalue().strip().rpartition("error: ")[2] or error
        raise RecipeError(
            Problem(f"accelerate launch {shlex.join(given)}", f"accelerate refuses it: {said}")
        ) from None
    if named := options.deepspeed_config_file:
        beside = Path(options.config_file or ".").parent
        options.deepspeed_config_file = str(find(named, beside))
        if not Path(options.deepspeed_config_file).is_file():
            raise RecipeError(
                Problem(
                    f"accelerate launch {shlex.join(given)}", f"{named} is not there", looked(named, beside)
                )
            )
    return options


def wanted(given: list[str]) -> Layout:
    """The layout that the words of `accelerate launch` ask for."""
    options = parsed(given)
    processes = max(options.num_processes or 1, 1)
    if options.use_deepspeed:
        stage = options.zero_stage
        if options.deepspeed_config_file:
            stage = json.loads(Path(options.deepspeed_config_file).read_text(encoding="utf-8"))[
                "zero_optimization"
            ]["stage"]
        return Layout(f"ZeRO-{stage if stage is not None else 2}", processes)
    return Layout(f"FSDP{options.fsdp_version}", processes) if options.use_fsdp else layout.of(processes)


def asked() -> Asked | None:
    """What the `accelerate launch` that started this process was asked for; None when something else started
    it.
    """
    given = shlex.split(os.environ[ASKED]) if ASKED in os.environ else None
    for parent in psutil.Process().parents() if given is None else ():
        try:
            if (given := _after_launch(parent.cmdline())) is not None:
                break
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return None if given is None else Asked(wanted(given), given, _said(given))


def _said(given: list[str]) -> str:
    return f"accelerate launch {shlex.join(_options(given))}"


def _options(given: list[str]) -> list[str]:
    """The words of accelerate itself, without the script and what is the script's."""
    return given[
        : next((i for i, word in enumerate(given) if word.endswith(".py") or word == "--module"), None)
    ]


def _after_launch(command: list[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command line that is one."""
    for i, word in enumerate(command[:4]):
        if Path(word).name == "accelerate" and command[i + 1 : i + 2] == ["launch"]:
            return command[i + 2 :]
        if Path(word).name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[i + 1 :]
    return None


def runs(accelerator: Any) -> Layout:
    """What runs: from the trainer's own `accelerate.Accelerator`."""
    kind, processes = accelerator.distributed_type.value, accelerator.num_processes
    if kind == "DEEPSPEED":
        return Layout(f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}", processes)
    return (
        Layout(f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}", processes)
        if kind == "FSDP"
        else layout.of(processes)
    )


def planned(found: Asked | None) -> Layout:
    """The layout to plan for: as asked (`found`: what `asked` says), and as many processes as there are.
    RecipeError where those differ already.
    """
    processes = PartialState().num_processes
    if found is None:
        return layout.of(processes)
    asked = found.layout
    real = Layout(asked.kind if processes > 1 or asked.processes == 1 else layout.ONE, processes)
    raise_if(_differ(found, real))
    if asked.kind == layout.FSDP2 and PartialState().device.type == "cpu":
        raise_if(_differ(found, layout.of(processes)))  # what accelerate would make of it
    return real


def contradicts(recipe: Recipe, given: list[str] | None, environment: bool = True) -> None:
    """RecipeError when the words of `accelerate launch` (`given`), its file or, where `environment` is true,
    the variables of this process say otherwise than the recipe what numbers come out. Before anything is
    loaded.
    """
    options = parsed(given) if given is not None else None
    raise_if(outside.contradictions(recipe, options, _options(given or []), environment))


def would_refuse(recipe: Recipe) -> list[str]:
    """What the variables of this process say against the recipe, a line each, for a plan: training in one
    process would refuse it.
    """
    found = outside.contradictions(recipe, None, [])
    return [f"training here would refuse: {p.where}: {p.found}; {p.do}" for p in found]


def check(
    found: Asked | None, trainer: Any, recipe: Recipe, plan: Layout, chosen: Collection[str] = ()
) -> None:
    """RecipeError when what runs is not what `accelerate launch` was asked for (`found`: what `asked` says)
    and what was planned: the layout (`plan`), precision, and every number of the recipe but those that the
    plan has `chosen`.
    """
    real = runs(trainer.accelerator)
    problems = _differ(found, real) if found else []
    if real != plan and not problems:
        do = "look at the ACCELERATE_ variables of the environment"
        problems = [Problem(recipe.at("train"), f"{plan} was planned; what runs is {real}", do)]
    options = _options(found.words) if found else None
    raise_if(problems + outside.differences(trainer, recipe, options, chosen))


def _differ(found: Asked, real: Layout) -> list[Problem]:
    if found.layout == real:
        return []
    two = cli.command("train", ACCELERATE="ddp", PROCESSES="2")
    do = f"{two} starts two processes on a CPU; FSDP2 needs GPUs"
    return [Problem(found.said, f"asks for {found.layout}; what runs is {real}", do)]


def start(given: list[str], arguments: list[str], resolved: Resolved) -> int:
    """Run `lora-recipes` with `arguments` under `accelerate launch` with the options `given`; its exit code.

    When a process ends badly the launcher ends the others; what was said is here who it was, and run.json
    says `failed`.
    """
    words = [*given, "--module", "lora_recipes", *arguments]
    os.environ[ASKED] = shlex.join(words)
    options = parsed(words)
    contradicts(resolved.recipe, words, environment=False)
    if options.use_fsdp and not torch.cuda.is_available():
        found = "accelerate would run plain DDP instead: FSDP2 needs GPUs"
        raise RecipeError(
            Problem(
                f"accelerate launch {shlex.join(given)}",
                found,
                f"{cli.command(ACCELERATE='ddp')} runs on the CPU",
            )
        )
    options.main_process_port = 0 if options.num_machines == 1 else options.main_process_port  # any free one
    try:
        launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code > 0:
            how = f"ended with exit code {code}; what it said stands above"
        else:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})" + (
                ", as by a lack of memory" if code == -9 else ""
            )
        text = f"process {rank} of {options.num_processes} {how}; the others were stopped"
        _failed(resolved.folder, text)
        if code == 2:  # a RecipeError, said already
            return 2
        raise RecipeError(
            Problem(
                resolved.recipe.name,
                text,
                f"{cli.command(RESUME=True)} continues from the newest whole checkpoint,"
                f" {cli.command(FORCE=True)} begins anew",
            )
        ) from None
    except SignalException as error:
        _failed(resolved.folder, f"stopped by {signal.Signals(error.sigval).name}")
        raise KeyboardInterrupt from None
    except ImportError as error:
        raise RecipeError(
            Problem(cli.command(ACCELERATE=""), str(error).split(" =>")[0], cli.extra("deepspeed"))
        ) from None
    return 0


def _failed(folder: RunFolder, text: str) -> None:
    """Say in run.json what the processes themselves could not; not where another run's are at work."""
    if lock.free(folder.path) and (run := folder.record) and run.status == "running":
        folder.write_record(replace(run, status="failed", error=text, ended=now()))


def lost(error: Exception, recipe: Recipe, step: int) -> Problem | None:
    """What an error of the collective operations means: another process is gone. None for other errors, and
    in one process.
    """
    if PartialState().num_processes == 1 or not any(word in str(error) for word in LOST):
        return None
    found = f"another process of this run is gone at step {step}: {str(error).splitlines()[0][:200]}"
    return Problem(recipe.at("train"), found, "its own error stands above or below this one")
