"""Go on from the adapter that is deployed with the rows that are new since its release, and put the result in
its place only where it is better: `make retrain RECIPE=x`, for a scheduler, which reads the exit code.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, files, git, interval, lock, release_folder, yamlfile
from lora_recipes.core.errors import Exit, Problem, RecipeError
from lora_recipes.core.record import Compared, Manifest, SetLosses
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import read, sources
from lora_recipes.evaluation import evaluate
from lora_recipes.model import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.recipe import Recipe, as_saved, document
from lora_recipes.release import release
from lora_recipes.training.train import train


@dataclass
class Source:
    """An entry of data.train: its rows that the release was not trained on, as they stand there, of `rows`
    in all; `read` is False where git says that none of its files has changed.
    """

    entry: dict[str, Any]
    new: list[dict[str, Any]]
    digests: set[bytes]
    rows: int = 0
    read: bool = True

    def __str__(self) -> str:
        """For a person."""
        if not self.read:
            return f"{self.entry['path']}: unchanged since that commit (git diff)"
        return f"{self.entry['path']}: {len(self.new):,} of {self.rows:,} rows are new"


@dataclass(frozen=True)
class Job:
    """What is retrained: `recipe` of the run in `folder`; `place` and `manifest` of the release that is
    deployed; the rows of `found`, and the `tag` of what comes of it.
    """

    recipe: Recipe
    folder: RunFolder
    source: git.Repository
    place: Path
    manifest: Manifest
    found: list[Source]
    tag: str

    @property
    def new(self) -> int:
        """Rows to train."""
        return sum(len(source.new) for source in self.found)

    @property
    def candidate(self) -> RunFolder:
        """Where it is trained, anew each time."""
        return RunFolder(self.folder.path.with_name(f"{self.folder.path.name}.retrain"))


def retrain(
    word: str, outputs: Path, source: Path, tag: str | None, unproven: bool = False, dry_run: bool = False
) -> Exit:
    """Train what is new of the recipe that `word` means, compare, promote; says what it does.

    Returns DONE where the new adapter is deployed, as the release `tag` (default: the number at the end of
    the last one's, and one more); NOTHING_NEW and NOT_BETTER leave all as it is. RecipeError with FAILED
    where something broke on the way, with another code where it was refused before. `unproven` promotes
    an adapter that cannot be merged; `dry_run` only says what would be done.
    """
    outputs = outputs.absolute()
    folder = RunFolder(outputs / recipes.run_of(word, outputs))
    if not folder.path.is_dir():
        folder.outcome()
    with lock.held(folder.path / release_folder.DEPLOYED, "retrains"):
        job = _job(folder, outputs, source, tag)
        print("\n".join(_told(job)), flush=True)
        if not job.new:
            print("nothing new: nothing to train", flush=True)
            return Exit.NOTHING_NEW
        if dry_run:
            print("dry run     nothing is trained, nothing is changed", flush=True)
            return Exit.DONE
        try:
            return _retrain(job, outputs, unproven)
        except Exception as error:
            problem = files.refused(error, job.candidate.path, "while retraining")
            found = error.problems if isinstance(error, RecipeError) else [problem] if problem else None
            if found is None:
                raise
            raise RecipeError(found, Exit.FAILED) from error


def _job(folder: RunFolder, outputs: Path, source: Path, tag: str | None) -> Job:
    """What is asked, looked at. RecipeError where it cannot be done."""
    repository = git.repository(source)
    there = release_folder.deployed(folder.path)
    name = folder.path.name
    if there is None:
        do = cli.command("release", RECIPE=name, TAG="lora-v1")
        raise RecipeError(
            Problem(shown(folder.path), "nothing of it is released: there is no deployed.json", do)
        )
    place, manifest = there
    recipe = dataclasses.replace(recipes.load(str(folder.path / "recipe.yaml")), name=name)
    if recipe.lora is None or recipe.classify:
        found = "retraining goes on from an adapter with lora:, and compares losses of tokens"
        do = f"train it anew: {cli.command('train', RECIPE=name, FORCE=True)}"
        raise RecipeError(Problem(recipe.at("classify" if recipe.classify else recipe.method), found, do))
    if not recipe.data.eval:
        do = "name held-out rows: they decide"
        raise RecipeError(Problem(recipe.at("data"), "has no eval: nothing to compare the adapters on", do))
    tag = tag or _next(manifest.tag, repository, outputs)
    release.free(repository, outputs, tag)
    return Job(recipe, folder, repository, place, manifest, list(_sources(recipe, repository, there)), tag)


def _next(tag: str, repository: git.Repository, outputs: Path) -> str:
    """`lora-v1.2.3` -> `lora-v1.2.4`, or the next that is free."""
    while repository.tagged(tag) or release_folder.place(outputs, tag).exists():
        last = re.search(r"\d+$", tag)
        tag = f"{tag[: last.start()]}{int(last[0]) + 1}" if last else f"{tag}.1"
    return tag


def _sources(recipe: Recipe, repository: git.Repository, there: tuple[Path, Manifest]) -> Iterator[Source]:
    """Each entry of data.train, with what is new in it. RecipeError where rows are faulty."""
    place, manifest = there
    known, changed = release_folder.rows(place, manifest), repository.changed(manifest.commit)
    reader = read.Reader(recipe, "train")
    for number, one in enumerate(reader.sources):
        try:
            held = [repository.holds(file) for file in sources.named(recipe.file(one.entry["path"]))]
        except (OSError, ValueError):  # reading it says what is wrong
            held = []
        released = bool(held) and all(h in manifest.data.sources for h in held)
        if released and changed is not None and not changed & set(held):
            yield Source(one.entry, [], set(), read=False)
            continue
        found = Source(one.entry, [], set())
        for row, raw in reader.with_raw(number):
            found.rows += 1
            found.digests.add(digest := read.content(row))
            if digest not in known:
                found.new.append(raw)
        read.raise_first(reader.faults, "data.train")
        yield found


def _told(job: Job) -> list[str]:
    of = job.manifest
    return [
        f"deployed    {of.tag}, commit {of.commit[:12]}",
        f"now         commit {job.source.commit[:12]}",
        *(f"{'rows' if i == 0 else '':11} {source}" for i, source in enumerate(job.found)),
        f"to train    {job.new:,} rows, from the adapter of {of.tag}; promoted as {job.tag} if better",
    ]


def _retrain(job: Job, outputs: Path, unproven: bool) -> Exit:
    recipe, same = _written(job)
    losses = _before(job, recipe) if same else None
    if losses:
        print("the very same was trained before, and is not trained again", flush=True)
    else:
        train(resolve(recipe, outputs), force=True)
        evaluate.evaluation(recipe.name, outputs)
        losses = evaluate.against(recipe.name, outputs, job.place)
        _record(job, losses)
    change = interval.Mean(losses.trained.loss - losses.base.loss, losses.half, losses.rows)
    better = change.shown and change.value < 0
    print(
        f"\nheld out    {losses.trained.loss:.4f}, {job.manifest.tag} {losses.base.loss:.4f}: change"
        f" {change.signed(unit='row')} nats a token ({losses.rows:,} rows, each asked of both)",
        flush=True,
    )
    if not better:
        print(f"not better by its interval: {job.manifest.tag} stays", flush=True)
        return Exit.NOT_BETTER
    _prove(job, unproven)
    made = _promoted(job, outputs, unproven)
    print("\n".join([*release.told(made), f"deployed    {made.tag}"]), flush=True)
    return Exit.DONE


def _before(job: Job, recipe: Recipe) -> SetLosses | None:
    """The losses of the candidate that is there, where it was compared with what is deployed now, on the
    rows that are held out now.
    """
    known = job.candidate.run
    if known is None or known.compared is None or known.status != "finished":
        return None
    split = read.read(recipe, "eval")
    split = read.by_assistant_turn(split) if recipe.data.rows == "assistant_turn" else split
    found = known.compared
    same = found.adapter_sha256 == job.manifest.adapter_sha256 and found.losses.sha256 == split.sha256
    return found.losses if same else None


def _record(job: Job, losses: SetLosses) -> None:
    """What came of the comparison, in run.json of the candidate."""
    known = job.candidate.record
    assert known, "it was trained"
    at, of = files.now(), job.manifest
    found = Compared(at=at, tag=of.tag, adapter_sha256=of.adapter_sha256, losses=losses)
    job.candidate.write_record(dataclasses.replace(known, compared=found))


def _written(job: Job) -> tuple[Recipe, bool]:
    """The recipe of the candidate, written with its rows: the new rows alone, from the deployed A and B. And
    whether the same stood there before.
    """
    folder = job.candidate.path / "new"
    before = {file.name: file.read_bytes() for file in folder.glob("*") if file.is_file()}
    shutil.rmtree(folder, ignore_errors=True)
    entries: list[dict[str, Any]] = []
    for number, source in enumerate(job.found):
        if source.new:
            file = folder / f"{number}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in source.new)
            files.write(file, text)
            kept = {k: source.entry[k] for k in ("format", "columns", "weight") if k in source.entry}
            entries.append(kept | {"path": str(file)})
    assert job.recipe.lora
    sections = job.recipe.anywhere()
    sections["data"].pop("mix", None)
    sections["data"]["train"] = entries
    sections["lora"] = as_saved(job.recipe.lora)
    sections["warm_start"] = {"from_adapter": str(job.place)}
    file = folder / f"{job.candidate.path.name}.yaml"
    files.write(file, yamlfile.dump(document(sections)))
    return recipes.load(str(file)), before == {f.name: f.read_bytes() for f in folder.iterdir()}


def _prove(job: Job, unproven: bool) -> None:
    """Merge it, which compares it with what training recorded; the merged model itself is of no use here."""
    run = job.candidate.run
    if unproven and run and run.plan.adapter and not run.plan.adapter.merges:
        return
    output = job.candidate.path / "merged"
    merge.merge(job.candidate.result("lora"), output, force=output.exists())
    shutil.rmtree(output)


def _promoted(job: Job, outputs: Path, unproven: bool) -> Manifest:
    checked = release.check(job.candidate, outputs, job.tag, job.source.root, unproven)
    checked = dataclasses.replace(
        checked,
        name=job.folder.path.name,
        notes=[f"it goes on from {job.manifest.tag}, with the rows that were new", *checked.notes],
    )
    data, _ = release.rows(checked, outputs)
    data = dataclasses.replace(data, sources=release.hashes(job.recipe, job.source))
    known = release_folder.rows(job.place, job.manifest)
    made = release.write(
        checked, outputs, job.tag, data, [*known, *(d for s in job.found for d in s.digests)]
    )
    place = release_folder.place(outputs, job.tag)
    release_folder.deploy(job.folder.path, made, place, "retrain", made.at)
    return made
