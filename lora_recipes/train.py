"""Train a recipe: plan, check, one SFTTrainer, verify, and leave a run folder. `make train RECIPE=x`."""

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import ProgressCallback

from lora_recipes import adapter, bases, build, card, data, evaluate, launch, reference, servable, start, usage, watch
from lora_recipes import plan as plans
from lora_recipes.fits import Memory
from lora_recipes.messages import Problem, RecipeError, listed, raise_if
from lora_recipes.plan import Plan
from lora_recipes.provenance import Provenance, local
from lora_recipes.recipe import Recipe
from lora_recipes.resume import differences, may_start, newest_whole
from lora_recipes.run import RunFolder, environment, make_folder, now, replace_folder, write
from lora_recipes.yamlfile import shown


@dataclass
class Session:
    """One training run while it lasts."""

    recipe: Recipe
    outputs: Path
    folder: RunFolder
    plan: Plan
    expected: Memory
    trainer: Any  # trl.SFTTrainer, whose `model` is typed as optional
    facts: dict[str, Any]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the rows were made with."""
        return self.plan.gate.tokenizer


def train(recipe: Recipe, outputs: Path, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Train `recipe` into `outputs/<name>/` and return its run.json. RecipeError when anything is not as the recipe says.

    `resume` continues from the newest whole checkpoint; `force` replaces a run that is there. Neither is assumed.
    """
    outputs = outputs.absolute()  # adapter_config.json names its base by it
    make_folder(outputs)
    PartialState(cpu=recipe.train.get("use_cpu", not torch.cuda.is_available()))  # joins the other processes, on the CPU too
    folder = RunFolder(outputs / recipe.name)
    may_start(folder, resume, force)
    _base(recipe, outputs)
    raise_if(start.warm_ready(recipe, outputs))
    plan = plans.make(recipe, outputs, launch.planned(), network=True)
    expected = plans.add_memory(plan, recipe, outputs, accelerator=torch.cuda.is_available())
    say(plan.text())
    if wrong := bases.contract_differences(recipe, outputs):
        do = "the plan describes another model: correct the contract, or name_or_path"
        raise RecipeError([Problem(recipe.at("model", "contract"), line, do) for line in wrong])
    facts = _resume_facts(plan, recipe, outputs)
    checkpoint = _checkpoint(folder, recipe, facts) if resume else None
    arguments, base = build.sft_config(recipe, folder), build.model(recipe, outputs)
    callbacks = [watch.Record(folder, checkpoint), watch.Seal(), watch.Finite(recipe)]
    rows, steps = (plan.gate.train, plan.gate.evaluation), plan.facts["steps"]["total"]
    trainer = build.trainer(recipe, arguments, base, plan.gate.tokenizer, *rows, callbacks, steps, outputs)
    launch.check(trainer.accelerator)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(watch.Progress())
    session = Session(recipe, outputs, folder, plan, expected, trainer, facts)
    evaluate.as_planned(trainer, recipe, plan.facts)
    record = _continue(session, checkpoint) if checkpoint else _begin(session)
    say(f"\ntraining into {shown(folder.path)}/" + (f", from {checkpoint.name}" if checkpoint else ""))
    try:
        record |= _run(session, checkpoint)
        _finish(session, record)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk must not hide what filled it
            _save(folder, record | {"status": "failed", "error": str(error) or type(error).__name__, "ended": now()})
        if isinstance(error, KeyboardInterrupt):
            say("\nwhere a checkpoint was saved, RESUME=1 continues from it")
        if folder.replaced.exists():
            say(f"the run that was to be replaced is kept in {shown(folder.replaced)}/")
        raise
    if PartialState().is_main_process:
        _report(session, record)
    return record


def say(text: str = "") -> None:
    """Print on the first process only."""
    if PartialState().is_main_process:
        print(text, flush=True)


def _save(folder: RunFolder, record: dict[str, Any]) -> None:
    if PartialState().is_main_process:
        folder.write_record(record)


def _base(recipe: Recipe, outputs: Path) -> None:
    """Make what the recipe builds on: a random checkpoint from the contract, or the model of another recipe."""
    if recipe.model.get("weights") == "random":
        with PartialState().main_process_first():
            build.random_base(recipe, outputs)
    if not recipe.model.get("from_recipe"):
        return
    base = bases.recipe_of(recipe)
    folder = RunFolder(outputs / base.name)
    if folder.finished:
        changed = differences(folder, base, {"train data sha256": data.read(base, "train").sha256})
        if changed:
            do = f"make train RECIPE={base.name} FORCE=1, or set it back"
            raise RecipeError([Problem(shown(folder.path), f"the base is from another {base.name}: {line}", do) for line in changed])
        return
    if PartialState().num_processes > 1:
        do = f"train it first, in one process: make train RECIPE={base.name}"
        raise RecipeError(Problem(recipe.at("model", "from_recipe"), f"the base {base.name} is not trained yet", do))
    say(f"the base {base.name} is not trained yet: training it first\n")
    train(base, outputs)
    say("\n")


def _resume_facts(plan: Plan, recipe: Recipe, outputs: Path) -> dict[str, Any]:
    """What a resumed run must find as it was, beyond the recipe."""
    return {
        "train data sha256": plan.facts["data"]["train"]["sha256"],
        "tokens sha256": watch.sha256(plan.gate.train),
        "chat template sha256": watch.sha256(plan.gate.tokenizer.chat_template),
        "base weights": reference.fingerprint(recipe, outputs),
        "base revision": getattr(bases.real_config(recipe, outputs), "_commit_hash", None),
        "layout": str(plan.layout),
    }


def _checkpoint(folder: RunFolder, recipe: Recipe, facts: dict[str, Any]) -> Path:
    if changed := differences(folder, recipe, facts):
        do = "the trainer would ignore it and go on with the old value: set it back, or FORCE=1 to begin anew"
        raise RecipeError([Problem(shown(folder.path), line, do) for line in changed])
    checkpoint, skipped = newest_whole(folder.checkpoints, PartialState().num_processes)
    for line in skipped:
        say(f"WARNING     {line}")
    if checkpoint is None:
        raise RecipeError(Problem(shown(folder.checkpoints), "no checkpoint is whole: " + "; ".join(skipped), "FORCE=1 begins anew"))
    return checkpoint


def _begin(session: Session) -> dict[str, Any]:
    """Clear the folder (what was there was asked to go), and write recipe.yaml and the first run.json."""
    PartialState().wait_for_everyone()  # all have looked at the folder before the first one changes it
    recipe, folder, trainer = session.recipe, session.folder, session.trainer
    config = bases.real_config(recipe, session.outputs)
    base = {"name_or_path": bases.path(recipe, session.outputs), "revision": getattr(config, "_commit_hash", None)}
    base |= {"config_sha256": watch.sha256(config.to_dict())}
    record = {"status": "running", "recipe": recipe.name, "started": now(), **environment(), "base": base, "plan": session.plan.facts}
    record["hardware"] |= {"device": str(trainer.args.device), "processes": PartialState().num_processes, **watch.accelerator()}
    record |= {"resume_facts": session.facts, "warnings": session.plan.warnings}
    if not session.plan.layout.sharded:
        trainer.model.to(trainer.args.device)  # DeepSpeed would do it later
        record["probes"] = {"before": evaluate.probes(trainer.model, session.tokenizer, recipe)}
    if PartialState().is_main_process:
        folder.clear()
        write(folder.path / "recipe.yaml", recipe.to_yaml())
        folder.write_record(record)
    PartialState().wait_for_everyone()
    return record


def _continue(session: Session, checkpoint: Path) -> dict[str, Any]:
    record = session.folder.record
    record.pop("error", None)
    record |= {"status": "running", "resumed": [*record.get("resumed", []), {"from": checkpoint.name, "at": now()}]}
    _save(session.folder, record)
    return record


def _run(session: Session, checkpoint: Path | None) -> dict[str, Any]:
    began, trainer, before = time.monotonic(), session.trainer, usage.now()
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        recipe, step = session.recipe, trainer.state.global_step
        problem = usage.out_of_memory(error, recipe, session.outputs, session.plan.gate, session.expected, step)
        if problem := problem or launch.lost(error, recipe, step) or watch.explained(error, recipe, session.folder, step):
            raise RecipeError(problem) from error
        raise
    seconds = time.monotonic() - began
    metrics = {k: v for k, v in output.metrics.items() if isinstance(v, int | float)}
    if trainer.eval_dataset is not None:
        last: dict[str, Any] = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
        fresh = last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end
        metrics |= last if fresh else trainer.evaluate()
    peak = usage.measured(before)
    say(f"\n{peak.line(session.expected)}")
    steps, epochs = trainer.state.global_step, trainer.state.epoch
    return {"steps": steps, "epochs": epochs, "seconds": round(seconds, 2), "metrics": metrics, "memory": peak.facts(session.expected)}


def _finish(session: Session, record: dict[str, Any]) -> None:
    """Verify, then move the result into place; run.json says `finished` only after that."""
    recipe, folder, trainer = session.recipe, session.folder, session.trainer
    sharded = session.plan.layout.sharded
    if recipe.method == "lora" and not sharded:
        _learned(recipe, evaluate.untrained(trainer.accelerator.unwrap_model(trainer.model)))
    if sharded:  # only now are the weights where they can be used
        with start.base_of(trainer.model):
            record["probes"] = {"before": evaluate.probes(trainer.model, session.tokenizer, recipe)}
    record["probes"]["after"] = evaluate.probes(trainer.model, session.tokenizer, recipe)
    provenance = None if recipe.whole else _provenance(session)
    final = folder.result(recipe.method)
    temporary = final.with_name(f".{final.name}.tmp")
    if PartialState().is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was cut off here
    PartialState().wait_for_everyone()
    trainer.save_model(str(temporary))
    if PartialState().is_main_process:
        if sharded:
            _learned(recipe, evaluate.incomplete(temporary, session.plan.facts["model"]["trainable"]))
        start.convert(trainer.accelerator.unwrap_model(trainer.model), temporary)
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths; recipe.yaml says the same
        record |= {"status": "finished", "ended": now()}
        record["result_bytes"] = sum(p.stat().st_size for p in temporary.glob("*.safetensors"))
        card.write(temporary, recipe, record)
        if provenance:
            provenance.save(temporary)
            faults = servable.check(adapter.read(temporary, anything=True), local(provenance.name_or_path, provenance.revision))
            record["not_servable"] = [f"{fault.found}: {fault.do}" for fault in faults]
        replace_folder(temporary, final)
        watch.draw(folder)
        folder.write_record(record)
        shutil.rmtree(folder.replaced, ignore_errors=True)


def _learned(recipe: Recipe, wrong: list[str]) -> None:
    """RecipeError when there is something `wrong` with A or B."""
    if wrong:
        do = "the adapter is not saved; look at the learning rate, the number of steps and whether these modules are used at all"
        raise RecipeError(Problem(recipe.at("lora", "target_modules"), f"not learned: {listed(wrong)}", do))


def _provenance(session: Session) -> Provenance:
    splits = session.plan.gate.splits
    model, rows = session.trainer.accelerator.unwrap_model(session.trainer.model), splits["eval"].rows or splits["train"].rows
    return reference.provenance(model, session.tokenizer, session.recipe, rows, session.outputs)


def _report(session: Session, record: dict[str, Any]) -> None:
    metrics = record["metrics"]
    losses = [f"{name} {metrics[key]:.4f}" for name, key in (("train loss", "train_loss"), ("eval loss", "eval_loss")) if key in metrics]
    say(f"\n{record['steps']} steps in {record['seconds']:.1f} s; {', '.join(losses)}")
    if not session.recipe.whole:
        say(f"every {'adapted module has finite, non-zero A and B' if session.recipe.method == 'lora' else 'trained tensor has changed'}")
        faults = [f"WARNING     vLLM cannot serve it as it is: {fault}" for fault in record["not_servable"]]
        say("\n".join(faults or ["the saved files pass vLLM's rules for adapters"]))
    if lines := evaluate.table(record["probes"]["before"], record["probes"]["after"]):
        say("\n" + "\n".join(lines))
    final = session.folder.result(session.recipe.method)
    say(f"\n{shown(final)}/  {record['result_bytes']:,} bytes;  beside it run.json, metrics.jsonl, loss.png, recipe.yaml")
