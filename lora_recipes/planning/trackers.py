"""The experiment trackers of train.report_to: is each here, what is to be installed, and what of the
environment it reads. None is imported for that: some take seconds, some begin a run.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.integrations import integration_utils as known

from lora_recipes.core.errors import nearest
from lora_recipes.core.yamlfile import shown


@dataclass(frozen=True)
class Tracker:
    """`here`: does transformers find it. `package`: what pip installs (of the modules `modules`; default: the
    same name). `needs`: the variable without which it cannot begin. `reads`: how those begin that it reads.
    """

    here: Callable[[], bool]
    package: str
    modules: tuple[str, ...] = ()
    needs: str = ""
    reads: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Are its modules on this machine, whatever transformers makes of them?"""
        modules = self.modules or (self.package,)
        return all(importlib.util.find_spec(module) is not None for module in modules)


# Each name of transformers' INTEGRATION_TO_CALLBACK (5.24).
TRACKERS = {
    "azure_ml": Tracker(known.is_azureml_available, "azureml-sdk", ("azureml",)),
    "clearml": Tracker(known.is_clearml_available, "clearml", reads=("CLEARML_",)),
    "codecarbon": Tracker(known.is_codecarbon_available, "codecarbon", reads=("CODECARBON_",)),
    "comet_ml": Tracker(known.is_comet_available, "comet-ml", ("comet_ml",), "COMET_API_KEY", ("COMET_",)),
    "dagshub": Tracker(
        known.is_dagshub_available,
        "dagshub mlflow",
        ("dagshub", "mlflow"),
        "MLFLOW_TRACKING_URI",
        ("HF_DAGSHUB_", "MLFLOW_"),
    ),
    "dvclive": Tracker(known.is_dvclive_available, "dvclive", reads=("HF_DVCLIVE_", "DVCLIVE_")),
    "flyte": Tracker(known.is_flytekit_available, "flytekit"),
    "kubeflow": Tracker(  # not a package: a Kubeflow TrainJob sets the variable
        known.is_kubeflow_available, "", ("transformers",), "KUBEFLOW_TRAINER_SERVER_URL", ("KUBEFLOW_",)
    ),
    "mlflow": Tracker(known.is_mlflow_available, "mlflow", reads=("MLFLOW_", "HF_MLFLOW_")),
    "neptune": Tracker(known.is_neptune_available, "neptune", reads=("NEPTUNE_",)),
    "swanlab": Tracker(known.is_swanlab_available, "swanlab", reads=("SWANLAB_",)),
    "tensorboard": Tracker(known.is_tensorboard_available, "tensorboard", reads=("TENSORBOARD_",)),
    "trackio": Tracker(known.is_trackio_available, "trackio", reads=("TRACKIO_",)),
    # known.is_wandb_available imports it
    "wandb": Tracker(lambda: importlib.util.find_spec("wandb") is not None, "wandb", reads=("WANDB_",)),
}
# Variables by which a tracker records nothing, and one that neither transformers 5.24 nor wandb 0.31 reads.
SILENT = {"COMET_MODE": "disabled", "SWANLAB_MODE": "disabled", "WANDB_MODE": "disabled"}
IDLE = {"WANDB_DISABLED": "wandb"}


def problem(asked: str | list[str] | None, resolved: Sequence[str]) -> str:
    """Why train.report_to, `asked`, cannot be; empty where it can. `resolved`: the names that
    TrainingArguments made of it, for `all`.
    """
    names: Sequence[str | None] = asked if isinstance(asked, list) else [asked]
    if list(names) in ([], ["none"]):
        return ""
    if list(names) == ["all"]:
        return "" if resolved else "no tracker is installed here"
    return "; ".join(filter(None, (_problem(name, names) for name in dict.fromkeys(names))))


def _problem(name: str | None, names: Sequence[str | None]) -> str:
    if name in ("all", "none"):
        return f"{name} stands alone"
    if name not in TRACKERS:
        said = f"did you mean {nearest(name, TRACKERS)}? " if name else ""
        return f"transformers knows no tracker {name!r}: {said}they are {', '.join(TRACKERS)}"
    if names.count(name) > 1:
        return f"{name} is named {names.count(name)} times, and would be told everything as often"
    tracker = TRACKERS[name]
    lacks = name == "dagshub" and tracker.needs not in os.environ  # transformers asks for it after the model
    if tracker.here() and not lacks:
        return ""
    if not tracker.installed:
        return f"{name} is not installed here: pip install {tracker.package}"
    if "mlflow" in tracker.package and os.environ.get("DISABLE_MLFLOW_INTEGRATION"):
        return f"{name} is turned off by DISABLE_MLFLOW_INTEGRATION in the environment"
    if tracker.needs:
        return f"{name} needs {tracker.needs} in the environment"
    return f"{name} is installed, and transformers does not take it: another version, perhaps"


def said(asked: str | list[str] | None, resolved: Sequence[str], folder: Path) -> str:
    """What the run in `folder` will tell, a line for each tracker; empty where none is told.

    With the variables of the environment that each reads, by name: a value may be a secret.
    """
    lines = []
    for name in resolved:
        place = f" in {shown(tensorboard(folder))}/" if name == "tensorboard" else ""
        read = sorted(v for v in os.environ if v.startswith(TRACKERS[name].reads or ("\0",)))
        lines.append(f"{name}{place}" + (f"; it reads {', '.join(read)} of the environment" if read else ""))
    if lines and asked in ("all", ["all"]):
        lines[0] = f"all that are here: {', '.join(resolved)}\n{lines[0]}"
    return "\n".join(lines)


def warnings(resolved: Sequence[str]) -> list[str]:
    """What the environment holds against the trackers that the run will tell."""
    found = [
        f"{variable}={off} is in the environment: {name} is in train.report_to, and records nothing"
        for variable, off in SILENT.items()
        for name in resolved
        if variable.startswith(TRACKERS[name].reads or ("\0",))
        and os.environ.get(variable, "").lower() == off
    ]
    return found + [
        f"{variable} is in the environment, and nothing reads it: {name} is told (train.report_to: none)"
        for variable, name in IDLE.items()
        if name in resolved and os.environ.get(variable)
    ]


def tensorboard(folder: Path) -> Path:
    """Where TensorBoard's files of the run in `folder` go, also when it is resumed. transformers alone would
    take a new folder under checkpoints/ each time.
    """
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return Path(given).expanduser() if given else folder / "tensorboard"
