"""The end of a training run: verify what was learned, save it, move it into place, say what came of it."""

import math
import shutil
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig

from lora_recipes.core import adapter_folder, record, stops
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.files import now, replace_folder
from lora_recipes.core.head import Head
from lora_recipes.core.locate import local
from lora_recipes.core.provenance import Provenance, Question
from lora_recipes.core.record import FinishedRun, Probes, ResumeFacts, Run, Scores
from lora_recipes.core.run_folder import RunFolder, logged
from lora_recipes.core.yamlfile import shown
from lora_recipes.data.labels import LabelGate
from lora_recipes.memory.fits import Memory
from lora_recipes.model import answers, heads, probes, scores
from lora_recipes.model.initialise import Start
from lora_recipes.planning.plan import Plan
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import Recipe
from lora_recipes.serving import export
from lora_recipes.training import card, verify, watch


@dataclass
class Session:
    """One training run while it lasts; `run` is what is known of it so far, from its beginning on."""

    resolved: Resolved
    plan: Plan
    expected: Memory
    trainer: Any  # trl.SFTTrainer, whose `model` is typed as optional
    start: Start  # how the adapter began
    facts: ResumeFacts
    real: PreTrainedConfig  # of the base's weights
    run: Run = field(init=False)
    question: Question | None = None  # whether an answer ends, once trained

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        return self.resolved.recipe

    @property
    def folder(self) -> RunFolder:
        """Where the run is."""
        return self.resolved.folder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the rows were made with."""
        return self.plan.gate.tokenizer


def say(text: str = "") -> None:
    """Print on the first process only."""
    if PartialState().is_main_process:
        print(text, flush=True)


def finish(session: Session) -> FinishedRun:
    """Verify, save, read back what was saved, then move the result into place; run.json says `finished` only
    after that. All processes get what the first one wrote.
    """
    recipe, folder, trainer = session.recipe, session.folder, session.trainer
    sharded = session.plan.layout.sharded
    # accelerate's autocast comes off: what is asked from here on is what PEFT answers of the saved files
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=sharded)
    if recipe.method == "lora" and not sharded:
        _learned(recipe, verify.untrained(trainer.accelerator.unwrap_model(trainer.model)))
    if sharded:  # only now are the weights where they can be used
        with session.start.base_of(trainer.model):
            session.run = replace(
                session.run, probes=Probes(before=probes.probes(trainer.model, session.tokenizer, recipe))
            )
    if isinstance(session.plan.gate, LabelGate):
        session.run = replace(session.run, scores=_scores(session, session.plan.gate))
    assert session.run.probes
    asked = replace(session.run.probes, after=probes.probes(trainer.model, session.tokenizer, recipe))
    session.run = replace(session.run, probes=asked)
    provenance = None if recipe.whole else _provenance(session)
    session.question = provenance.question if provenance else None
    final, temporary = folder.result(recipe.method), folder.unfinished(recipe.method)
    if PartialState().is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was cut off here
        folder.release()
    PartialState().wait_for_everyone()
    trainer.save_model(str(temporary))
    if PartialState().is_main_process:
        if sharded:
            _learned(recipe, verify.incomplete(temporary, session.plan.facts.model.trainable))
        if not recipe.whole:
            model = trainer.accelerator.unwrap_model(trainer.model)
            session.start.convert(model, temporary)
            if not sharded and (wrong := verify.written(model, temporary, session.start.state)):
                found, do = f"was not written as it was trained: {listed(wrong, 3)}", "look at the disk"
                raise RecipeError(Problem(shown(temporary), found, f"{do}; it is not kept"))
        # A pickle with this machine's paths; recipe.yaml says the same.
        (temporary / "training_args.bin").unlink(missing_ok=True)
        _beside(session, temporary)
        not_servable = _sealed(provenance, temporary, recipe) if provenance else None
        size = sum(p.stat().st_size for p in temporary.glob("*.safetensors"))
        files = sorted({"README.md", *(p.name for p in temporary.iterdir())})
        done = record.finished(session.run, now(), size, files, not_servable)
        card.write(temporary, recipe, done)
        replace_folder(temporary, final)
        watch.draw(folder)
        if done.scores:
            scores.draw(done.scores, folder.path / "confusion.png")
        folder.write_record(done)
        shutil.rmtree(folder.replaced, ignore_errors=True)
        session.run = done
    shared: list[Any] = [session.run]
    return cast(FinishedRun, broadcast_object_list(shared)[0])


def _learned(recipe: Recipe, wrong: list[str]) -> None:
    """RecipeError when there is something `wrong` with A or B."""
    if wrong:
        do = (
            "the adapter is not saved; look at the learning rate, the number of steps and whether these"
            " modules are used at all"
        )
        raise RecipeError(Problem(recipe.at("lora", "target_modules"), f"not learned: {listed(wrong)}", do))


def _beside(session: Session, folder: Path) -> None:
    """Write beside the weights in `folder` what a person or a server must know of them: where a reply ends,
    or the classes.
    """
    recipe, base = session.recipe, session.resolved.base
    if isinstance(gate := session.plan.gate, LabelGate):
        assert recipe.classify, "labels.gate asks for it"
        cut = recipe.train.max_length, recipe.train.truncation_mode
        Head(gate.names, recipe.classify.pooling, *cut).save(folder)
        return
    source = local(base.weights, base.revision)
    stops.save(folder, stops.settings(source) if source else {}, list(gate.stops.all))


def _sealed(provenance: Provenance, folder: Path, recipe: Recipe) -> list[str] | None:
    """Write provenance.json into `folder`; why vLLM cannot serve the adapter there, None for a classifier,
    which is served merged.
    """
    provenance.sealed(folder).save(folder)
    if recipe.classify:
        return None
    base = local(provenance.name_or_path, provenance.revision)
    faults = export.check(adapter_folder.read(folder, anything=True), base)
    return [f"{fault.found}: {fault.do}" for fault in faults]


def _scores(session: Session, gate: LabelGate) -> Scores | None:
    """What the classifier calls the held-out rows; None without any."""
    if not gate.evaluation:
        return None
    model = session.trainer.accelerator.unwrap_model(session.trainer.model)
    logits = heads.logits(model, gate.tokenizer, [e.input_ids for e in gate.evaluation])
    called, sha256 = [e.labels[0] for e in gate.evaluation], gate.facts.eval.sha256
    return scores.of(logits.numpy(), called, gate.names, gate.majority, sha256)


def _provenance(session: Session) -> Provenance:
    gate = session.plan.gate
    model = session.trainer.accelerator.unwrap_model(session.trainer.model)
    if isinstance(gate, LabelGate):
        return answers.classified(model, gate, session.resolved)
    rows = gate.evaluation.told.head or gate.train.told.head
    whole = not session.plan.layout.sharded
    return answers.provenance(model, session.start, gate, session.resolved, rows, whole)


def worse(logs: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    """What the losses in `logs` (metrics.jsonl) say against the run: it ends worse than it began.

    The held-out loss is of the same rows each time: any rise counts. The training loss differs from batch to
    batch: the means of the first and the last fifth of its logs are compared, and a rise of 5 % counts, of
    five logs and more where it is twice its standard error too, by the scatter from log to log (von Neumann,
    Ann. Math. Statist. 12, 1941, 367).
    """
    found = []
    do = f"lower {recipe.at('train', 'learning_rate')}, or look at the rows"
    train = [log["loss"] for log in logs if "loss" in log]
    fifth = max(len(train) // 5, 1)
    first, last = sum(train[:fifth]) / fifth if train else 0, sum(train[-fifth:]) / fifth if train else 0
    steps = [(after - before) ** 2 for before, after in pairwise(train)] if len(train) > 4 else []
    noise = 2 * math.sqrt(sum(steps) / len(steps) / fifth) if steps else 0.0
    if len(train) > 1 and last > max(1.05 * first, first + noise):
        found.append(
            f"training ends worse than it began: loss {first:.4f} at first, {last:.4f} at last; {do}"
        )
    held = [log["eval_loss"] for log in logs if "eval_loss" in log]
    if len(held) > 1 and held[-1] > held[0]:
        do = "fewer epochs, or keep the best (load_best_model_at_end, early_stopping:)"
        found.append(f"held-out loss ends higher, {held[-1]:.4f}, than at first, {held[0]:.4f}; {do}")
    return found


def report(session: Session, run: FinishedRun) -> None:
    """What came of it, for a person."""
    metrics = run.metrics
    losses = [
        f"{name} {metrics[key]:.4f}"
        for name, key in (("train loss", "train_loss"), ("eval loss", "eval_loss"))
        if key in metrics
    ]
    say(f"\n{run.steps} steps in {run.seconds:.1f} s; {', '.join(losses)}")
    if not session.recipe.whole:
        lora = session.recipe.method == "lora"
        said = "adapted module has finite, non-zero A and B" if lora else "trained tensor has changed"
        say(f"every {said}")
    if session.recipe.classify:
        say("\n".join(["", *scores.text(run.scores)]) if run.scores else "no row was held out: not measured")
    elif not session.recipe.whole:
        faults = [f"WARNING     vLLM cannot serve it as it is: {fault}" for fault in run.not_servable or []]
        say("\n".join(faults or ["the saved files pass vLLM's rules for adapters"]))
    if asked := session.question:
        ended = f"ended after {asked.ended}" if asked.ended else "did not end within"
        warning = "" if asked.ended else "WARNING     "
        most = f" (of {asked.asked} allowed)" if asked.ended else f" {asked.asked}"
        say(f"{warning}the answer to a question of the rows {ended}{most} tokens")
    if lines := probes.table(run.probes.before, run.probes.after):
        say("\n" + "\n".join(lines))
    final = session.folder.result(session.recipe.method)
    say(
        f"\n{shown(final)}/  {run.result_bytes:,} bytes;  beside it run.json, metrics.jsonl, loss.png,"
        " recipe.yaml"
    )
    for line in worse(logged(session.folder.metrics), session.recipe):
        say(f"WARNING     {line}")
