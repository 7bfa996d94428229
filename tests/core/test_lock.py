"""Who writes to a run folder: one process at a time, for as long as it lives."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from lora_recipes.core import lock
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.files import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from lora_recipes.core import lock
run = Path(sys.argv[1])
with lock.served([run]) if sys.argv[3] == "served" else lock.held(run, "trains"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds=600.0, how="held"):
    """Another process that holds the lock of `folder`, or serves it, until it is killed."""
    code = [sys.executable, "-c", HOLDER, str(folder), str(seconds), how]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_has_it_and_gets_it_when_that_process_is_killed(tmp_path):
    first = holder(tmp_path / "run")
    try:
        with pytest.raises(RecipeError) as error, lock.held(tmp_path / "run", "trains"):
            pass
        who = (
            rf"process {first.pid} on {re.escape(socket.gethostname())}, which trains since 20\d\d-.*\+00:00"
        )
        assert re.search(who, str(error.value)) and f"kill {first.pid}" in str(error.value)
        assert not lock.free(tmp_path / "run")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert str(first.pid) in lock.file(tmp_path / "run").read_text(), "it had no time to clean up"
    with lock.held(tmp_path / "run", "trains"):
        assert str(os.getpid()) in lock.file(tmp_path / "run").read_text()


@pytest.mark.parametrize(
    "left", ["", "not JSON", '{"pid": 1}', '{"pid": 1, "host": "gone", "since": "", "doing": ""}']
)
def test_a_file_that_is_left_behind_holds_nobody_up(tmp_path, left):
    lock.file(tmp_path / "run").write_text(left)
    said = pytest.raises(RecipeError, match="is in use by process")
    with lock.held(tmp_path / "run", "trains"), said, lock.held(tmp_path / "run", "merges"):
        pass


def test_one_folder_by_two_names_is_one_folder_and_removing_it_frees_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with lock.held(tmp_path / "run", "trains"):
        (tmp_path / "run").rmdir()
        for name in ("run", "link"):
            with pytest.raises(RecipeError, match="is in use"), lock.held(tmp_path / name, "trains"):
                pass
        with lock.held(tmp_path / "other", "trains"):
            pass


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    """As a loader's workers are: they may live a moment longer than a training run that was killed."""
    with lock.held(tmp_path / "run", "trains"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(120,))
        child.start()
        assert not lock.free(tmp_path / "run")
    try:
        end = time.monotonic() + 30
        while not lock.free(tmp_path / "run"):  # it gives it up as soon as it runs
            assert time.monotonic() < end
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_who_waits_gets_it_in_the_end(tmp_path):
    first, began = holder(tmp_path / "base", 1.0), time.monotonic()
    with lock.held(tmp_path / "base", "makes this base", wait=True):
        assert time.monotonic() - began > 0.5
    first.wait()


def test_a_folder_that_cannot_be_written_to_is_said(small_disk, capsys):
    disk = small_disk("300k")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with lock.held(disk / "run", "merges"):
        assert "run is not locked: Read-only file system" in capsys.readouterr().err


def test_results_are_locked_by_their_run(tmp_path):
    for inside in ("run/adapter", "run/checkpoints/checkpoint-5", "alone/adapter"):
        (tmp_path / inside).mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    with lock.held(tmp_path / "run", "trains"):
        for inside in ("adapter", "checkpoints/checkpoint-5"):
            with (
                pytest.raises(RecipeError, match="which trains"),
                lock.runs([tmp_path / "run" / inside], "merges"),
            ):
                pass
        with lock.runs([tmp_path / "alone" / "adapter"], "merges", tmp_path / "new"):
            assert lock.free(tmp_path / "alone") and not lock.free(tmp_path / "new")


def test_a_result_is_not_replaced_under_servers_however_many_and_is_free_when_the_last_is_killed(tmp_path):
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    servers = [holder(adapter, how="served") for _ in range(2)]
    try:
        for replaced in (adapter, tmp_path / "run"):
            with pytest.raises(RecipeError, match=f"process {servers[-1].pid} .*which serves it since"):
                lock.unserved(replaced)
        lock.unserved(tmp_path / "run" / "merged")
        lock.unserved(tmp_path / "ru")
        with lock.held(tmp_path / "run", "evaluates"):
            pass
        servers[-1].kill()
        servers[-1].wait()
        with pytest.raises(RecipeError, match=f"process {servers[0].pid} .*which serves it since"):
            lock.unserved(adapter)  # the one that lives is named, not the last that came
    finally:
        for server in servers:
            server.kill()
            server.wait()
    lock.unserved(adapter)
    (tmp_path / "run" / "run.json").unlink()
    with lock.served([adapter]), pytest.raises(RecipeError, match="serves it"):
        lock.unserved(adapter)
