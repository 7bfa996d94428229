"""What is seen and kept while training runs: the progress line, metrics.jsonl, the loss curve, and a stop
when a number is no number.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from lora_recipes.core import cli, files
from lora_recipes.core.checkpoints import fault, seal
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.run_folder import RunFolder, logged
from lora_recipes.core.yamlfile import shown
from lora_recipes.planning import trackers
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.training.resume import left

SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "eval_mean_token_accuracy")


class Progress(ProgressCallback):
    """transformers' progress bar, with one readable line a logging step instead of a dictionary. No bar where
    no terminal is.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self.training_bar: Any = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
        self.current_step = 0

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """A bar for the evaluation, on a terminal only."""
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Print the line above the bar."""
        if (
            state.is_world_process_zero
            and self.training_bar is not None
            and logs
            and "train_runtime" not in logs
        ):
            values = [f"{key} {float(logs[key]):.4g}" for key in SHOWN if key in logs]
            self.training_bar.write(
                f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  {'  '.join(values)}"
            )


class Record(TrainerCallback):
    """Appends every log to metrics.jsonl. When a run is resumed, lines after the checkpoint's step are
    dropped first.
    """

    def __init__(self, folder: RunFolder, checkpoint: Path | None):
        self.file = folder.metrics
        if checkpoint and self.file.is_file() and PartialState().is_main_process:
            step = int(checkpoint.name.split("-")[1])
            kept = [log for log in logged(self.file) if log["step"] <= step]
            self.file.write_text("".join(f"{json.dumps(log)}\n" for log in kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """One line of JSON."""
        if state.is_world_process_zero and logs:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def tensorboard(trainer: Any, folder: RunFolder, checkpoint: Path | None) -> None:
    """Where train.report_to has TensorBoard: into the run folder, and when it is resumed on from the
    checkpoint's step. What was told after it is taken back, as TensorBoard does by a writer's purge_step.
    """
    for told in trainer.callback_handler.callbacks:
        if isinstance(told, TensorBoardCallback):
            told.logging_dir = str(trackers.tensorboard(folder.path))
            if checkpoint and PartialState().is_main_process:
                step = int(checkpoint.name.split("-")[1])
                told.tb_writer = told._SummaryWriter(told.logging_dir, purge_step=step + 1)


class Seal(TrainerCallback):
    """Closes each checkpoint with the hashes of its files, and reads none back that is not what was saved."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the trainer has written the checkpoint, each process its part."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The trainer logs its runtime, then loads the best checkpoint."""
        if "train_runtime" in (logs or {}) and args.load_best_model_at_end:
            best_is_whole(state.best_model_checkpoint)


class Counted(TrainerCallback):
    """How many steps were really taken; what a checkpoint says of itself is not counted."""

    taken = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more."""
        self.taken += 1


class Ended(TrainerCallback):
    """Ends a run whose checkpoint is its last before a further step is taken, when all is loaded: the trainer
    itself asks only after a step (transformers 5.24, Trainer._run_epoch).
    """

    class Now(Exception):
        """Nothing is left to train."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The other callbacks have begun: this one is the last of them."""
        raise Ended.Now


def best_is_whole(named: str | None) -> None:
    """RecipeError when the best checkpoint so far, whose weights the run ends with, is not what was saved."""
    if named is None:
        return
    best = Path(named)
    wrong = fault(best, PartialState().num_processes) if best.is_dir() else "it is not there"
    if wrong:
        do = f"put it back as it was, or {cli.command(FORCE=True)} begins anew"
        raise RecipeError(Problem(shown(best), f"the best checkpoint so far cannot be used: {wrong}", do))


class Finite(TrainerCallback):
    """Stops when a loss or a gradient norm is NaN or infinite; the trainer would go on to the end."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Look at what is logged."""
        for key in ("loss", "grad_norm", "eval_loss"):
            if logs and key in logs and not math.isfinite(float(logs[key])):
                do = "lower train.learning_rate, set train.max_grad_norm, or use float32"
                found = f"{key} is {logs[key]} at step {state.global_step}"
                raise RecipeError(Problem(self.recipe.at("train", "learning_rate"), found, do))


def explained(error: Exception, recipe: Recipe, folder: RunFolder, step: int) -> Problem | None:
    """What an exception out of the trainer means to a user, or None when it is a bug.

    A disk that takes no more may stop any step. A missing package, or an argument that does not go with the
    others, comes before the first.
    """
    if isinstance(error, ImportError | ValueError) and not isinstance(error, RecipeError) and step == 0:
        do = "install what it names, or choose another value"
        return Problem(recipe.at("train"), f"the trainer cannot begin: {str(error).splitlines()[0]}", do)
    doing, ranks = f"while saving at step {step}", PartialState().num_processes
    return files.refused(error, folder.path, doing, lambda: left(folder, ranks))


def sha256(value: Any) -> str:
    """Hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def accelerator() -> dict[str, Any]:
    """Name and memory of the GPU, empty without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


def draw(folder: RunFolder) -> None:
    """loss.png: training and evaluation loss, and the learning rate, over the steps of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = logged(folder.metrics)
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "train loss"), ("eval_loss", "eval loss")):
        points = [(log["step"], log[key]) for log in logs if key in log]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o" if key == "eval_loss" else None, label=label)
    axis.set(xlabel="step", ylabel="loss (nats a token)", title=folder.path.name)
    rates = [(log["step"], log["learning_rate"]) for log in logs if "learning_rate" in log]
    if rates:
        other = axis.twinx()
        other.plot(*zip(*rates, strict=True), color="0.7", linestyle="--", label="learning rate")
        other.set_ylabel("learning rate")
        other.set_ylim(0, None)
    if any(drawn.get_legend_handles_labels()[0] for drawn in figure.axes):
        figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(folder.path / "loss.png", dpi=120)
    pyplot.close(figure)
