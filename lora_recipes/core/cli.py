"""What every script does around its one call: errors without a traceback, exit codes, and libraries that keep
to themselves; and how messages spell a command.
"""

import contextlib
import gc
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_recipes.core import files
from lora_recipes.core.errors import Exit, RecipeError
from lora_recipes.core.files import INSTALLED

# seconds; the first of several processes says an error that all of them have, and the launcher ends the
# others
PATIENCE = 15


def run(action: Callable[[], int | None], traceback: bool, outputs: Path | None = None) -> int:
    """Call `action` and return its exit code (None: 0). `outputs`: where it writes.

    A RecipeError is printed and answered with its code (2, unless a caller is told more: errors.Exit), what
    the disk refuses and any OSError with 2, Ctrl-C with 130; all other errors are bugs and keep their
    traceback.
    """
    quiet()
    try:
        return action() or 0
    except RecipeError as error:
        if traceback:
            raise
        return _said(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # `make plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if traceback:
            raise
        if problem := files.refused(error, outputs or Path.cwd()):
            return _said(RecipeError(problem))
        if not isinstance(error, OSError):
            raise
        # The machine's own: no such file, a file where a folder is wanted, no connection.
        print(f"error: {error}\n    -> --traceback shows where", file=sys.stderr)
        return Exit.REFUSED
    return 0


def _said(error: RecipeError) -> int:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE)
    print(
        f"error: {len(error.problems)} problem{'s' * (len(error.problems) != 1)}\n{error}",
        file=sys.stderr,
    )
    return error.code


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around an import of torch, transformers and trl: no garbage is looked for among the half million
    objects that they make and keep, now or later. That search takes a sixth of the import's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet() -> None:
    """Settings that the libraries read when they are imported, so that only what matters is printed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # says on every start that an optional CPU kernel is not installed
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
    )  # DeepSpeed, at every step
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
    )  # TRL's own name for it
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault(
            "TQDM_DISABLE", "1"
        )  # transformers' bars that have no switch, as of reading GGUF


# Variables of the Makefile that are plain words after `lora-recipes VERB`; the others are options, two of
# another name.
_WORDS = ("RECIPE", "ABLATION", "ADAPTERS", "MODEL", "OVER", "SET", "VERB")
_OPTIONS = {"DRY": "--dry-run", "Q": "--ask"}


def by_make() -> bool:
    """Was this program called by make or by scripts/*.py, and not as `lora-recipes`? A package has no
    Makefile.

    Processes that a launcher starts are `python -m lora_recipes`; make leaves MAKELEVEL in their environment.
    """
    called = Path(sys.argv[0])
    if INSTALLED or called.stem == "lora-recipes":
        return False
    return called.parts[-2:] != ("lora_recipes", "__main__.py") or "MAKELEVEL" in os.environ


def command(verb: str = "", **given: str | list[str] | bool) -> str:
    """A command for a message, as this program was called: `make train RECIPE=x FORCE=1`, or `lora-recipes
    train x --force`. Without a verb: what to add to one.

    `given`: variables of the Makefile. True is a switch, a list words in one variable, "" the bare name.
    """
    made = by_make()
    words = ["make" if made else "lora-recipes", verb] if verb else []
    spelled = variable if made else option
    return " ".join([*words, *(spelled(name, value) for name, value in given.items())])


def extra(name: str) -> str:
    """How an extra of pyproject.toml is installed: beside an installed package, or into the .venv of a
    checkout.
    """
    install = (
        "pip install --no-build-isolation" if name == "deepspeed" else "pip install"
    )  # setup needs torch
    return (
        f"{install} 'lora-recipes[{name}]'"
        if INSTALLED
        else f".venv/bin/{install} -c constraints.txt -e '.[{name}]'"
    )


def variable(name: str, value: str | list[str] | bool) -> str:
    """As make takes it."""
    if isinstance(value, list):
        return f"{name}='{' '.join(value)}'"
    return f"{name}=1" if value is True else f"{name}={shlex.quote(value)}" if value else name


def option(name: str, value: str | list[str] | bool) -> str:
    """The same for `lora-recipes` and scripts/*.py."""
    known = _OPTIONS.get(name, f"--{name.lower().replace('_', '-')}")
    words = value if isinstance(value, list) else [value] if isinstance(value, str) and value else []
    said = " ".join(map(shlex.quote, words))
    if name in _WORDS:
        return said or name.lower()
    return f"{known} {said}".rstrip()
