"""What git says of a repository, and the one thing that is written there: an annotated tag. Imports no
torch.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lora_recipes.core.errors import Exit, Problem, RecipeError, listed
from lora_recipes.core.yamlfile import shown

STATUS = ("status", "--porcelain")


@dataclass(frozen=True)
class Answer:
    """What a call of git printed: its output where it is `done`, else its last words."""

    done: bool
    said: str


def ask(folder: Path, *words: str) -> Answer:
    """Call git in `folder`. Variables that name another repository (a hook sets them) are left out, and it
    asks nobody for a password.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _ELSEWHERE}
    environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:  # there is no git, or it may not be started
        return Answer(False, f"git: {error.strerror}")
    if done.returncode == 0:
        return Answer(True, done.stdout.rstrip("\n"))
    return Answer(False, " ".join((done.stderr.strip() or f"exit code {done.returncode}").split())[-300:])


_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")


@dataclass(frozen=True)
class Repository:
    """A git repository with files: `root`, and the `commit` that is checked out."""

    root: Path
    commit: str

    def dirty(self, without: Path) -> list[str]:
        """What differs from the commit, untracked files too, as git's short status has it; the folder
        `without`, where results go, is not looked at.
        """
        apart = without.resolve()
        inside = apart.is_relative_to(self.root) and apart != self.root
        out = [f":(top,exclude,literal){apart.relative_to(self.root)}"] if inside else []
        return self._lines(*STATUS, "--", ":(top)", *out)

    def tagged(self, tag: str) -> str | None:
        """The tag that leaves no room for one named `tag`: it itself, or one that is a part of its name, as
        `a` of `a/b`, or the other way round; None where there is room.
        """
        parts = tag.split("/")
        names = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        for name in reversed(names):
            if ask(self.root, "rev-parse", "--quiet", "--verify", f"refs/tags/{name}").done:
                return name
        below = self._lines("for-each-ref", "--count=1", "--format=%(refname:strip=2)", f"refs/tags/{tag}/")
        return below[0] if below else None

    def tagger(self) -> Problem | None:
        """Why git would make no annotated tag here: it does not know by whom."""
        known = ask(self.root, "var", "GIT_COMMITTER_IDENT")
        do = "git config user.name ..., and user.email"
        return None if known.done else Problem("git", f"does not know who tags: {known.said}", do)

    def holds(self, file: Path) -> str | None:
        """`file` as the commit has it, a path from the root; None where it has no such file."""
        file = file.resolve()
        if not file.is_relative_to(self.root):
            return None
        path = file.relative_to(self.root).as_posix()
        return path if ask(self.root, "cat-file", "-e", f"{self.commit}:{path}").done else None

    def changed(self, since: str) -> set[str] | None:
        """The files, by their paths from the root, that differ between the commit `since` and this one; None
        where git does not know that commit (a shallow clone, a history that was written anew).
        """
        answer = ask(self.root, "diff", "--name-only", "--no-renames", "-z", since, self.commit)
        return set(filter(None, answer.said.split("\0"))) if answer.done else None

    def tag(self, name: str, message: str) -> None:
        """An annotated tag on the commit."""
        made = ask(self.root, "tag", "-a", "-m", message, "--", name, self.commit)
        if not made.done:
            raise RecipeError(Problem(name, f"git makes no tag: {made.said}", "do what it says"))

    def _lines(self, *words: str) -> list[str]:
        answer = ask(self.root, *words)
        if not answer.done:
            found = f"git {words[0]} fails: {answer.said}"
            raise RecipeError(Problem(shown(self.root), found, "do what it says"), Exit.NO_REPOSITORY)
        return answer.said.splitlines()


def repository(folder: Path) -> Repository:
    """The repository that holds `folder`. RecipeError, each with a code of its own, where there is no git,
    and where there is no repository with a commit and with files.
    """
    if shutil.which("git") is None:
        do = "install git: a release is a tag in the repository of its source"
        raise RecipeError(Problem("git", "is not on this machine", do), Exit.NO_GIT)
    if not folder.is_dir():
        raise RecipeError(Problem(shown(folder), "is no folder", "name a repository"), Exit.NO_REPOSITORY)
    root, commit = (ask(folder, "rev-parse", *w) for w in (["--show-toplevel"], ["--verify", "HEAD"]))
    if not root.done:
        do = f"name one; or git init {shown(folder)}, and commit"
        found = f"is no git repository with files ({root.said})"
        raise RecipeError(Problem(shown(folder), found, do), Exit.NO_REPOSITORY)
    if not commit.done:
        do = "commit what the release is of"
        raise RecipeError(Problem(shown(folder), "is a repository without a commit", do), Exit.NO_REPOSITORY)
    return Repository(Path(root.said).resolve(), commit.said)


def name_problem(folder: Path, tag: str) -> Problem | None:
    """Why git takes no tag named `tag`; None where it does."""
    fits = (
        not tag.startswith("-") and tag != "HEAD" and ask(folder, "check-ref-format", f"refs/tags/{tag}").done
    )
    do = "letters, digits, - . _ and /, e.g. lora-v1.2.3 (man git-check-ref-format)"
    return (
        None if fits and tag.isprintable() else Problem(f"tag {tag!r}", "git takes no tag of that name", do)
    )


def changes(found: list[str]) -> str:
    """Lines of git's short status, for a person."""
    return f"{len(found)} files differ from the commit: {listed((line[3:] for line in found), 5)}"
