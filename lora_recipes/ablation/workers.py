"""Processes that train one run after another, several at once, and may die without taking the others along.
Imports no torch.
"""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lora_recipes.ablation.spec import Run
from lora_recipes.core import cli
from lora_recipes.core.yamlfile import shown

Task = tuple[Run, dict[str, Any]]  # a run, and what train() is told with it
SPAWN = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
SERVER = multiprocessing.get_context("forkserver")  # without CUDA: the libraries are imported once for all
SERVER.set_forkserver_preload(["lora_recipes.ablation.preload"])


@dataclass(frozen=True)
class Outcome:
    """What became of a run, in a sentence."""

    name: str
    failed: bool
    said: str


class Worker:
    """One process. It lives as long as it is given runs of its group, and none of them fails."""

    def __init__(self, kind: str, make: Callable[[], Any], outputs: Path, device: str | None):
        self.kind, self.outputs = kind, outputs
        self.run: Run | None = None
        context: Any = SERVER if device is None else SPAWN
        self.pipe, theirs = context.Pipe()
        with _visible(device):
            # no daemon: out of memory asks a process of its own
            self.process = context.Process(target=_work, args=(theirs, outputs, dict(os.environ)))
            self.process.start()
        theirs.close()
        with contextlib.suppress(OSError):  # it died meanwhile: `end` says so
            self.pipe.send(make)

    def begin(self, task: Task, lone: bool) -> None:
        """Hand it a run. `lone`: it is the only one of its group, so that nothing need be kept for a next."""
        self.run = task[0]
        with contextlib.suppress(OSError):  # it died meanwhile: `end` says so
            self.pipe.send((*task, lone))

    def end(self) -> Outcome:
        """What became of the run that it was handed."""
        run, self.run = self.run, None
        assert run is not None
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            how += " (the system does that when memory runs out)" if code == -signal.SIGKILL else ""
            log = f"{shown(self.outputs / run.recipe.name)}.log"
            return Outcome(str(run), True, f"FAILED: its process was {how}; {log} has what it said")

    def close(self) -> None:
        """Let it end."""
        if self.run:  # interrupted: it has had the same signal, and is given the time to write run.json
            self.process.join(10)
            self.process.terminate()
        self.pipe.close()
        self.process.join()


def each(
    tasks: Sequence[Task],
    group: Callable[[Run], str],
    make: Callable[[], Any],
    outputs: Path,
    devices: Sequence[str | None],
) -> Iterator[Outcome]:
    """The outcome of each task, as they end. As many processes at once as there are `devices`
    (CUDA_VISIBLE_DEVICES of each).

    In each process `make()` gives the function that trains: called as (run, how, outputs, lone), it returns
    an Outcome. A process takes runs of one `group` only, and none after one that failed.
    """
    waiting, sizes = list(tasks), Counter(group(run) for run, _ in tasks)
    workers: list[Worker | None] = [None] * len(devices)
    try:
        while waiting or any(worker and worker.run for worker in workers):
            for slot, worker in enumerate(workers):
                if not waiting or (worker and worker.run):
                    continue
                task = next((t for t in waiting if worker and group(t[0]) == worker.kind), waiting[0])
                waiting.remove(task)
                kind = group(task[0])
                if worker and worker.kind != kind:
                    worker.close()
                    worker = None
                worker = workers[slot] = worker or Worker(kind, make, outputs, devices[slot])
                worker.begin(task, lone=sizes[kind] == 1)
            ready = set(wait([worker.pipe for worker in workers if worker and worker.run]))
            for slot, worker in enumerate(workers):
                if worker and worker.pipe in ready:
                    outcome = worker.end()
                    if outcome.failed:
                        worker.close()
                        workers[slot] = None
                    yield outcome
    finally:
        for worker in workers:
            if worker:
                worker.close()


@contextlib.contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """What a process that starts now sees of the GPUs."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif device is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _work(pipe: Connection, outputs: Path, environment: dict[str, str]) -> None:
    """In the process: train what comes until nothing comes any more. What a run prints goes into the .log
    beside its folder. `environment`: of the command, which a server that was begun earlier may not have.
    """
    os.environ.update(environment)
    cli.quiet()  # before `make` comes, whose module imports the libraries
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        train_one = pipe.recv()()
        while True:
            run, how, lone = pipe.recv()
            path = Path(f"{outputs / run.recipe.name}.log")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as log:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pipe.send(
                        Outcome(
                            str(run),
                            True,
                            f"FAILED: another process is training it ({shown(path)} is locked)",
                        )
                    )
                    continue
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                outcome = train_one(run, how, outputs, lone)
                sys.stdout.flush()
                sys.stderr.flush()
            pipe.send(outcome)
