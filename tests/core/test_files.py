"""What a disk that takes no more means to a person: the libraries' own errors, on a real small disk."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from lora_recipes.core import files
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.yamlfile import shown

WORDS = {str(i): i for i in range(30_000)}
WRITERS = {
    "torch.save": lambda path: torch.save(torch.ones(200_000), path),
    "torch.save, many tensors": lambda path: torch.save([torch.ones(1_000) for _ in range(300)], path),
    "safetensors": lambda path: save_file({"a": torch.ones(200_000)}, path),
    "tokenizers": lambda path: Tokenizer(models.WordLevel(WORDS, unk_token="0")).save(str(path)),
    "Python": lambda path: path.write_text("x" * 600_000),
    "files.write": lambda path: files.write(path, "x" * 600_000),
    "posix_fallocate": lambda path: os.posix_fallocate(os.open(path, os.O_CREAT | os.O_WRONLY), 0, 600_000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_clear_word_whoever_writes(small_disk, writer):
    disk = small_disk("300k")
    with pytest.raises(RecipeError) as error, files.writing(disk, "while saving", lambda: "nothing is lost"):
        WRITERS[writer](disk / "file")
    (problem,) = error.value.problems
    assert problem.where.startswith(shown(disk)) and problem.found.startswith("the disk is full (")
    assert problem.found.endswith("MiB free) while saving"), problem.found
    assert problem.do == "free some space; nothing is lost"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_disk_is_told_from_a_full_one(small_disk, writer):
    disk = small_disk("300k")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(RecipeError, match="is read-only\n    -> name another folder"), files.writing(disk):
        WRITERS[writer](disk / "file")


def test_a_disk_without_room_for_one_more_file_says_that(small_disk):
    disk = small_disk("300k,nr_inodes=4")
    with pytest.raises(RecipeError, match=r"the disk is full \(no more files: its"), files.writing(disk):
        for i in range(9):
            (disk / str(i)).write_text("")


def test_a_limit_of_the_shell_is_told_from_a_full_disk(tmp_path):
    code = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from pathlib import Path
from test_files import WRITERS, files
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name, write in WRITERS.items():
    try:
        with files.writing(Path({str(tmp_path)!r})):
            write(Path({str(tmp_path / "file")!r}))
    except Exception as error:
        print(name, type(error).__name__, error.problems[0].found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    said = done.stdout.splitlines()
    assert len(said) == len(WRITERS), done.stderr
    assert all(line.endswith("RecipeError a file would be larger than is allowed here") for line in said), (
        said
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_what_was_written_half_does_not_stay(small_disk):
    disk = small_disk("300k")
    files.write(disk / "run.json", "before")
    with pytest.raises(OSError, match="No space left"):
        files.write(disk / "run.json", "x" * 600_000)
    assert [p.name for p in disk.iterdir()] == ["run.json"] and (disk / "run.json").read_text() == "before"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        PermissionError(errno.EACCES, "Permission denied"),  # a port below 1024: no file is named
        RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
        ValueError("the file system is read-only, says somebody"),
    ],
)
def test_other_errors_are_not_the_disks(tmp_path, error):
    assert files.refused(error, tmp_path) is None


def test_the_reason_behind_another_librarys_error_is_found(tmp_path):
    try:
        try:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(tmp_path / "file"))
        except OSError as reason:
            raise RuntimeError("the save failed") from reason
    except RuntimeError as error:
        problem = files.refused(error, Path("/elsewhere"))
    assert problem is not None and problem.where.endswith("file") and "quota" in problem.found


def test_what_stood_there_goes_only_when_the_new_folder_is_in_place(tmp_path):
    old, new = tmp_path / "adapter", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    files.replace_folder(new, old)
    assert (old / "name").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(FileNotFoundError):
        files.replace_folder(tmp_path / "none", old)
    assert (old / "name").read_text() == "new", "nothing is lost"
