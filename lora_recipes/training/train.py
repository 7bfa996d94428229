"""Train a recipe: plan, check, one SFTTrainer, verify, and leave a run folder. `make train RECIPE=x`."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedModel, ProgressCallback
from trl import SFTConfig

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import base_fit, checkpoints, cli, environment, files, lock, provenance, weights
from lora_recipes.core.checkpoints import newest_whole
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.files import now, write
from lora_recipes.core.record import BaseModel, FinishedRun, Probes, Resumed, ResumeFacts, Run
from lora_recipes.core.run_folder import PLAN, RunFolder, make_folder
from lora_recipes.core.yamlfile import dump, shown
from lora_recipes.data import labels, read
from lora_recipes.data.gate import Gate
from lora_recipes.data.labels import LabelGate
from lora_recipes.memory.fits import Memory
from lora_recipes.model import answers, build, heads, initialise, package, probes
from lora_recipes.model.checkpoint import contract_differences
from lora_recipes.model.initialise import Start
from lora_recipes.planning import plan as plans
from lora_recipes.planning import space
from lora_recipes.planning.plan import Plan
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import Recipe, document
from lora_recipes.training import launch, loss, usage, verify, watch
from lora_recipes.training.finish import Session, finish, report, say
from lora_recipes.training.resume import differences, left, may_start


@dataclass(frozen=True)
class Shared:
    """What runs of one process need not make anew (ablate): who gives the tokenised rows and the base, and
    the memory once planned.
    """

    rows: Callable[[Resolved, bool], Gate] = labels.gate
    model: Callable[[Resolved], PreTrainedModel] = build.model
    memory: Memory | None = None


ALONE = Shared()


def train(
    resolved: Resolved,
    resume: bool = False,
    force: bool = False,
    shared: Shared = ALONE,
    oversized: bool = False,
) -> FinishedRun:
    """Train a recipe into `outputs/<name>/` and return its run.json. RecipeError when anything is not as the
    recipe says.

    `resume` continues from the newest whole checkpoint; `force` replaces a run that is there;
    `oversized` trains what is planned to need more memory than the device has. None is assumed.
    """
    asked = launch.asked()
    launch.contradicts(resolved.recipe, asked.words if asked else None)
    make_folder(resolved.outputs)
    # Joins the other processes, on the CPU too.
    PartialState(cpu=resolved.recipe.train.given.get("use_cpu", not torch.cuda.is_available()))
    ranks = PartialState().num_processes
    with (
        files.writing(resolved.folder.path, "before the first step", lambda: left(resolved.folder, ranks)),
        _alone(resolved.folder),
        _unbegun(resolved.folder),
    ):
        return _train(resolved, resume, force, shared, asked, oversized)


@contextlib.contextmanager
def _unbegun(folder: RunFolder) -> Iterator[None]:
    """A run that is refused before it begins leaves nothing behind, so that the next one may begin."""
    try:
        yield
    except BaseException:
        if PartialState().is_main_process and not (folder.path / "run.json").exists():
            folder.unbegun()
        raise


def _train(
    resolved: Resolved,
    resume: bool,
    force: bool,
    shared: Shared,
    asked: launch.Asked | None,
    oversized: bool,
) -> FinishedRun:
    recipe, folder = resolved.recipe, resolved.folder
    may_start(folder, resume, force)
    prepare_base(resolved, oversized)
    raise_if(warm_ready(resolved))
    plan = plans.make(resolved, launch.planned(asked), network=True, rows=shared.rows)
    raise_if(plan.here)
    real = resolved.base.real_config()
    raise_if(contract_differences(resolved.base, real))
    arguments = build.sft_config(recipe, folder, plan.batches)
    before = folder.run if resume else None
    facts = resume_facts(plan, resolved, real, before)
    checkpoint = _checkpoint(folder, recipe, facts, arguments, real) if resume else None
    expected = plans.add_memory(plan, resolved, torch.cuda.is_available(), shared.memory)
    say(plan.short(f"{shown(folder.path / PLAN)}, or {cli.command('plan', RECIPE=recipe.name)}"))
    if not oversized:
        raise_if(usage.beyond(expected, resolved, plan.gate, plan.layout))
    base, counted = shared.model(resolved), watch.Counted()
    callbacks = [watch.Record(folder, checkpoint), watch.Seal(), watch.Finite(recipe), counted]
    rows = (plan.gate.train, plan.gate.evaluation)
    assert plan.facts.steps, "the tokenizer is there, so the steps were counted"
    steps = plan.facts.steps.total
    if isinstance(plan.gate, LabelGate):
        trainer: Any = heads.trainer(resolved, arguments, base, plan.gate, callbacks)
        start = Start()
    else:
        trainer, start = build.trainer(
            resolved, arguments, base, plan.gate.tokenizer, *rows, callbacks, steps
        )
    launch.check(asked, trainer, recipe, plan.layout, plan.batches.fields)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(watch.Progress())
    session = Session(resolved, plan, expected, trainer, start, facts, real)
    verify.as_planned(trainer, recipe, plan.facts)
    session.run = _continue(session, checkpoint) if checkpoint else _begin(session)
    watch.tensorboard(trainer, folder, checkpoint)
    say(f"\ntraining into {shown(folder.path)}/" + (f", from {checkpoint.name}" if checkpoint else ""))
    try:
        session.run = _run(session, checkpoint, counted)
        ranks = PartialState().num_processes
        with files.writing(folder.path, "while saving the result", lambda: left(folder, ranks)):
            done = finish(session)
    except BaseException as error:
        if PartialState().is_main_process:
            folder.release()
            shutil.rmtree(folder.unfinished(recipe.method), ignore_errors=True)
        with contextlib.suppress(OSError):  # a full disk must not hide what filled it
            said = str(error) or type(error).__name__
            _save(folder, replace(session.run, status="failed", error=said, ended=now()))
        if isinstance(error, KeyboardInterrupt):
            say(f"\nwhere a checkpoint was saved, {cli.command(RESUME=True)} continues from it")
        if folder.replaced.exists():
            say(f"the run that was to be replaced is kept in {shown(folder.replaced)}/")
        raise
    if PartialState().is_main_process:
        report(session, done)
    return done


@contextlib.contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """The first process holds the lock of the run for all of its processes; all of them hear who else has
    it.
    """
    with contextlib.ExitStack() as stack:
        refused: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                stack.enter_context(lock.held(folder.path, "trains"))
                lock.unserved(folder.path)
            except RecipeError as error:
                refused = [error.problems]
        if PartialState().num_processes > 1:
            broadcast_object_list(refused)
        if refused[0]:
            raise RecipeError(refused[0])
        yield


def _save(folder: RunFolder, run: Run) -> None:
    if PartialState().is_main_process:
        folder.write_record(run)


def prepare_base(resolved: Resolved, oversized: bool = False) -> None:
    """Make what the recipe builds on: a checkpoint from the contract or from a package, or the model of
    another recipe. `oversized` as in `train`.
    """
    recipe, maker = resolved.recipe, resolved.base.maker
    if make := {"random": build.random_base, "package": package.base}.get(recipe.model.weights):
        with contextlib.ExitStack() as stack:
            stack.enter_context(PartialState().main_process_first())
            if PartialState().is_main_process:  # another run may be making it
                stack.enter_context(lock.held(Path(resolved.base.weights), "makes this base", wait=True))
                if (shipped := resolved.base.contract and resolved.base.contract.package) and not Path(
                    resolved.base.weights
                ).is_dir():
                    say(f"making the base of {shipped.name} {shipped.version}, once: {shipped.holds}\n")
            make(resolved)
    if maker is None:
        return
    base, folder = maker.recipe, maker.folder
    if folder.finished:
        changed = differences(folder, base, {"train_data_sha256": read.read(base, "train").sha256})
        if changed:
            do = f"{cli.command('train', RECIPE=base.name, FORCE=True)}, or set it back"
            raise RecipeError(
                [
                    Problem(shown(folder.path), f"the base is from another {base.name}: {line}", do)
                    for line in changed
                ]
            )
        return
    if PartialState().num_processes > 1:
        do = f"train it first, in one process: {cli.command('train', RECIPE=base.name)}"
        raise RecipeError(
            Problem(recipe.at("model", "from_recipe"), f"the base {base.name} is not trained yet", do)
        )
    say(f"the base {base.name} is not trained yet: training it first\n")
    train(maker, oversized=oversized)
    say("\n")


def warm_ready(resolved: Resolved) -> list[Problem]:
    """Was what a warm start begins from trained, and on the weights that the base has now?"""
    recipe = resolved.recipe
    if recipe.warm_start and recipe.warm_start.from_adapter:
        given, base = initialise.given_adapter(recipe), resolved.base.folder
        adapter = adapters.read(given, anything=True)
        return base_fit.fit(adapter, base, provenance.read(given)) if base else []
    if resolved.warm is None:
        return []
    name, folder = resolved.warm.recipe.name, resolved.warm.folder
    where = resolved.recipe.at("warm_start", "from_recipe")
    if not isinstance(done := folder.run, FinishedRun):
        return [
            Problem(where, f"{shown(folder.path)} holds no finished run", cli.command("train", RECIPE=name))
        ]
    if (before := done.resume_facts.base_weights) != answers.fingerprint(resolved.base, before):
        found = f"{name} was trained on other weights than the base has now"
        return [Problem(where, found, cli.command("train", RECIPE=name, FORCE=True))]
    return []


def resume_facts(
    plan: Plan, resolved: Resolved, real: PreTrainedConfig, before: Run | None = None
) -> ResumeFacts:
    """What a resumed run must find as it was, beyond the recipe. `real`: the config of the base's weights;
    `before`: the run that is to be continued, whose kind of fingerprint is taken.
    """
    return ResumeFacts(
        train_data_sha256=plan.facts.data.train.sha256,
        tokens_sha256=plan.gate.train.tokens_sha256,
        chat_template_sha256=watch.sha256(plan.gate.tokenizer.chat_template),
        base_weights=answers.fingerprint(resolved.base, before.resume_facts.base_weights if before else None),
        base_revision=getattr(real, "_commit_hash", None),
        layout=str(plan.layout),
        classes=plan.gate.names if isinstance(plan.gate, LabelGate) else None,
        batching=plan.batches.resumed,
    )


def _checkpoint(
    folder: RunFolder, recipe: Recipe, facts: ResumeFacts, arguments: SFTConfig, real: PreTrainedConfig
) -> Path:
    changed = differences(folder, recipe, vars(facts))
    run = folder.run
    # Earlier versions hashed the base's path too; another transformers has other defaults.
    known = run and weights.whole(run.resume_facts.base_weights)
    same = run and run.versions.get("transformers") == environment.versions().get("transformers")
    if run and known and same and run.base.config_sha256 != _config_sha256(real):
        changed.append("base config: the run began with another config.json of the base")
    if changed:
        do = "the trainer would ignore it and go on with the old value: set it back, or"
        do += f" {cli.command(FORCE=True)} to begin anew"
        raise RecipeError([Problem(shown(folder.path), line, do) for line in changed])
    if recipe.train.save_only_model:  # their files are as asked for, and none would be found whole
        found = "the checkpoints were saved without the optimizer, as it says: no run can go on from them"
        do = f"{cli.command(FORCE=True)} begins anew; without it a later run can be resumed"
        raise RecipeError(Problem(recipe.at("train", "save_only_model"), found, do))
    checkpoint, said = newest_whole(folder.checkpoints, PartialState().num_processes)
    for line in said:
        say(f"WARNING     {line}")
    if checkpoint is None:
        raise RecipeError(
            Problem(
                shown(folder.checkpoints),
                "no checkpoint is whole: " + "; ".join(said),
                f"{cli.command(FORCE=True)} begins anew",
            )
        )
    if wrong := verify.taken(checkpoint, skips=arguments.fp16):
        do = "take it away, and the one before it is taken; or " + cli.command(FORCE=True)
        raise RecipeError(Problem(shown(checkpoint), wrong, do))
    if arguments.load_best_model_at_end:
        watch.best_is_whole(checkpoints.state(checkpoint).get("best_model_checkpoint"))
    return checkpoint


def _config_sha256(config: PreTrainedConfig) -> str:
    """Hash of a base's config, wherever it lies."""
    found = config.to_dict()
    return watch.sha256(
        {k: v for k, v in found.items() if k not in ("_name_or_path", "transformers_version")}
    )


def _begin(session: Session) -> Run:
    """Clear the folder (what was there was asked to go), and write recipe.yaml and the first run.json."""
    PartialState().wait_for_everyone()  # all have looked at the folder before the first one changes it
    recipe, folder, trainer = session.recipe, session.folder, session.trainer
    if lost := session.start.lost():
        say(
            f"\nwarm start  A and B leave out {lost.mean:.1%} of the update (mean of modules;"
            f" {lost.worst:.1%} of {lost.module})"
        )
    before = checked = None
    if not session.plan.layout.sharded:
        trainer.model.to(trainer.args.device)  # DeepSpeed would do it later
        if recipe.classify is None:
            checked = loss.check(trainer, session.plan.gate.train, session.resolved)
        before = Probes(before=probes.probes(trainer.model, session.tokenizer, recipe))
    run = Run(
        status="running",
        recipe=recipe.name,
        started=now(),
        versions=environment.versions(),
        git=environment.git(),
        command=environment.command(),
        hardware=environment.hardware(
            device=str(trainer.args.device), processes=PartialState().num_processes, **watch.accelerator()
        ),
        base=BaseModel(
            name_or_path=session.resolved.base.weights,
            revision=getattr(session.real, "_commit_hash", None),
            config_sha256=_config_sha256(session.real),
        ),
        plan=session.plan.facts,
        resume_facts=session.facts,
        warnings=session.plan.warnings,
        warm_start=lost,
        loss_check=checked,
        probes=before,
    )
    if PartialState().is_main_process:
        folder.clear()
        folder.write_record(run)  # first: files of a run without it are somebody's own
        write(folder.path / "recipe.yaml", dump(document(recipe.anywhere())))
        write(folder.path / PLAN, session.plan.text() + "\n")
        folder.reserve(space.result(session.plan.facts, session.tokenizer))
    PartialState().wait_for_everyone()
    return run


def _continue(session: Session, checkpoint: Path) -> Run:
    run = session.folder.run
    assert run, "a checkpoint is taken only where its run.json was compared"
    again = [*(run.resumed or []), Resumed(from_=checkpoint.name, at=now())]
    run = replace(run, status="running", error=None, resumed=again)
    _save(session.folder, run)
    if PartialState().is_main_process:
        session.folder.reserve(space.result(session.plan.facts, session.tokenizer))
    return run


def _run(session: Session, checkpoint: Path | None, counted: watch.Counted) -> Run:
    """Train; the run with what came of it."""
    began, trainer, before = time.monotonic(), session.trainer, usage.now()
    # asked now: with save_total_limit the checkpoint may be gone at the end
    at_end = checkpoint is not None and checkpoints.is_last(checkpoint)
    if at_end:
        trainer.add_callback(watch.Ended())
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except watch.Ended.Now:
        output = trainer._finalize_training(None, 0, time.time())
    except Exception as error:
        recipe, step = session.recipe, trainer.state.global_step
        problem = usage.out_of_memory(error, session.resolved, session.plan.gate, session.expected, step)
        if (
            problem := problem
            or launch.lost(error, recipe, step)
            or watch.explained(error, recipe, session.folder, step)
            or _unloadable(error, checkpoint, counted)
        ):
            raise RecipeError(problem) from error
        raise
    _trained(session, checkpoint, counted, at_end)
    seconds = time.monotonic() - began
    metrics = {k: v for k, v in output.metrics.items() if isinstance(v, int | float)}
    if not counted.taken:
        metrics.pop("train_loss", None)  # the mean of no step
    if trainer.eval_dataset is not None:
        last: dict[str, Any] = next(
            (log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {}
        )
        fresh = last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end
        metrics |= last if fresh else trainer.evaluate()
    peak = usage.measured(before)
    say(f"\n{peak.line(session.expected)}")
    steps, epochs = trainer.state.global_step, trainer.state.epoch
    return replace(
        session.run,
        steps=steps,
        epochs=epochs,
        seconds=round(seconds, 2),
        metrics=metrics,
        memory=peak.facts(session.expected),
    )


def _unloadable(error: Exception, checkpoint: Path | None, counted: watch.Counted) -> Problem | None:
    """An error before the first step of a resumed run is one of reading the checkpoint."""
    if checkpoint is None or counted.taken or isinstance(error, RecipeError):
        return None
    found = f"cannot be continued from: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    do = "take it away, and the one before it is taken; --traceback shows where"
    return Problem(shown(checkpoint), found, do)


def _trained(session: Session, checkpoint: Path | None, counted: watch.Counted, last: bool) -> None:
    """RecipeError when the steps that were taken are not those that the trainer counts, or are none."""
    began, steps = int(checkpoint.name.split("-")[1]) if checkpoint else 0, session.plan.facts.steps
    ended, total = session.trainer.state.global_step, steps.total if steps else None
    if found := miscounted(began, counted.taken, ended, total, last):
        do = f"the result is not saved; {cli.command(FORCE=True)} begins anew"
        raise RecipeError(Problem(shown(checkpoint or session.folder.path), found, do))


def miscounted(began: int, taken: int, ended: int, total: int | None, last: bool = False) -> str | None:
    """What is wrong with a run that began after step `began`, took `taken` steps, and ended at step `ended`
    by the trainer's count; None when nothing is. `total`: steps that were planned. `last`: it began from a
    checkpoint after which no step was left.
    """
    if began + taken != ended:
        return f"the trainer counts {ended} steps; {taken} were taken after step {began}"
    if not (taken or last) and (total is None or began < total):
        return f"no step was trained: the trainer stopped at step {began}" + (f" of {total}" if total else "")
    return None
