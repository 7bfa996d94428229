"""Train a recipe: plan, check, one SFTTrainer, verify, and leave a run folder. `make train RECIPE=x`."""

import errno
import math
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase, ProgressCallback
from trl import SFTTrainer

from lora_recipes import build, card, evaluate, watch
from lora_recipes import plan as plans
from lora_recipes.messages import Problem, RecipeError
from lora_recipes.recipe import Recipe
from lora_recipes.run import RunFolder, differences, environment, newest_whole, now, replace_folder, steps_of, write
from lora_recipes.yamlfile import shown


def say(text: str = "") -> None:
    """Print on the first process only."""
    if PartialState().is_main_process:
        print(text, flush=True)


def train(recipe: Recipe, outputs: Path, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Train `recipe` into `outputs/<name>/` and return its run.json. RecipeError when anything is not as the recipe says.

    `resume` continues from the newest whole checkpoint; `force` replaces a run that is there. Neither is assumed.
    """
    folder = RunFolder(outputs / recipe.name)
    _may_start(folder, recipe, resume, force)
    _base(recipe, outputs)
    plan = plans.make(recipe, outputs, PartialState().num_processes, network=True)
    say(str(plan))
    if wrong := build.contract_differences(recipe, outputs):
        do = "the plan describes another model: correct the contract, or name_or_path"
        raise RecipeError([Problem(recipe.at("model", "contract"), line, do) for line in wrong])
    tokenizer = build.tokenizer(recipe, outputs)
    facts = _resume_facts(plan, tokenizer)
    checkpoint = _checkpoint(folder, recipe, facts) if resume else None
    if checkpoint is None and PartialState().is_main_process:
        shutil.rmtree(folder.path, ignore_errors=True)
    PartialState().wait_for_everyone()

    arguments = build.sft_config(recipe, folder)
    callbacks = [watch.Record(folder, checkpoint), watch.Finite(recipe)]
    trainer = build.trainer(recipe, arguments, build.model(recipe, outputs), tokenizer, plan.train, plan.evaluation, callbacks)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(watch.Progress())
    _as_planned(trainer, recipe, plan)
    record = folder.record if checkpoint else _begin(folder, recipe, outputs, plan, facts, trainer, tokenizer)
    say(f"\ntraining into {shown(folder.path)}/" + (f", from {checkpoint.name}" if checkpoint else ""))
    try:
        record |= _run(trainer, recipe, folder, checkpoint)
        _finish(trainer, recipe, folder, record, tokenizer)
    except (RecipeError, KeyboardInterrupt) as error:
        _record(folder, record | {"status": "failed", "error": str(error) or "interrupted", "ended": now()})
        raise
    return record


def _may_start(folder: RunFolder, recipe: Recipe, resume: bool, force: bool) -> None:
    where, saved = shown(folder.path), [p.name for p in steps_of(folder.checkpoints)]
    if resume and force:
        raise RecipeError(Problem(where, "RESUME and FORCE exclude each other", "continue the run, or begin it anew"))
    if folder.finished and not force:
        do = f"FORCE=1 trains it anew and replaces it; or copy the recipe to a new name: configs/recipes/{recipe.name}_2.yaml"
        raise RecipeError(Problem(where, "holds a finished run", do))
    if saved and not (resume or force):
        raise RecipeError(Problem(where, f"holds an unfinished run ({saved[0]})", "RESUME=1 continues it, FORCE=1 begins anew"))
    if resume and not saved:
        raise RecipeError(Problem(where, "there is no checkpoint to resume from", "run without RESUME=1"))


def _base(recipe: Recipe, outputs: Path) -> None:
    """Make what the recipe builds on: a random checkpoint from the contract, or the model of another recipe."""
    if recipe.model.get("weights") == "random":
        with PartialState().main_process_first():
            build.random_base(recipe, outputs)
    if not recipe.model.get("from_recipe"):
        return
    base = build.base_recipe(recipe)
    folder = RunFolder(outputs / base.name)
    if folder.finished:
        if (folder.path / "recipe.yaml").read_text() != base.to_yaml():
            do = f"make train RECIPE={base.name} FORCE=1"
            raise RecipeError(Problem(shown(folder.path), f"was trained from another version of the recipe {base.name}", do))
        return
    if PartialState().num_processes > 1:
        do = f"train it first, in one process: make train RECIPE={base.name}"
        raise RecipeError(Problem(recipe.at("model", "from_recipe"), f"the base {base.name} is not trained yet", do))
    say(f"base {base.name} is not trained yet: training it first\n")
    train(base, outputs, force=True)
    say("\n")


def _resume_facts(plan: plans.Plan, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "train data sha256": plan.facts["data"]["train"]["sha256"],
        "tokens sha256": watch.sha256(plan.train),
        "chat template sha256": watch.sha256(tokenizer.chat_template),
        "processes": PartialState().num_processes,
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


def _as_planned(trainer: SFTTrainer, recipe: Recipe, plan: plans.Plan) -> None:
    """What the trainer holds is what the plan said: trainable parameters, and rows."""
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    if recipe.method == "lora" and trainable in (0, total):
        found = f"{trainable:,} of {total:,} parameters are trainable: {'nothing' if not trainable else 'everything'} would be trained"
        raise RecipeError(Problem(recipe.at("lora"), found, "an adapter trains a small share; look at target_modules and modules_to_save"))
    planned = plan.facts["model"]["trainable"]
    if trainable != planned:
        raise RecipeError(
            Problem(recipe.at(recipe.method), f"{trainable:,} trainable parameters, {planned:,} planned", "please report this")
        )
    rows, steps = len(trainer.train_dataset), plan.facts["steps"]
    batches = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    if batches != steps["per_epoch"]:
        found = f"{rows:,} rows give {batches} steps an epoch, {steps['per_epoch']} planned"
        raise RecipeError(Problem(recipe.at("train"), found, "please report this"))


def _begin(
    folder: RunFolder, recipe: Recipe, outputs: Path, plan: plans.Plan, facts: dict[str, Any], trainer: SFTTrainer, tokenizer: Any
) -> dict[str, Any]:
    config = trainer.model.config
    base = {"name_or_path": build.base_path(recipe, outputs), "revision": getattr(config, "_commit_hash", None)}
    base |= {"config_sha256": watch.sha256(build.real_config(recipe, outputs).to_dict())}
    record = {"status": "running", "recipe": recipe.name, "started": now(), **environment(), "base": base, "plan": plan.facts}
    record["hardware"] |= {"device": str(trainer.args.device), "processes": PartialState().num_processes, **watch.accelerator()}
    record |= {"resume_facts": facts, "warnings": plan.warnings}
    record["probes"] = {"before": evaluate.probes(trainer.model, tokenizer, recipe)}
    if PartialState().is_main_process:
        write(folder.path / "recipe.yaml", recipe.to_yaml())
    _record(folder, record)
    return record


def _record(folder: RunFolder, record: dict[str, Any]) -> None:
    if PartialState().is_main_process:
        folder.write_record(record)


def _run(trainer: SFTTrainer, recipe: Recipe, folder: RunFolder, checkpoint: Path | None) -> dict[str, Any]:
    began = time.monotonic()
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError) as error:
        raise _explained(error, trainer, folder) from error
    seconds = time.monotonic() - began
    metrics = {k: v for k, v in output.metrics.items() if isinstance(v, int | float)}
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    done = trainer.state.global_step
    memory = {"max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} | watch.accelerator_memory()
    return {"steps": done, "epochs": trainer.state.epoch, "seconds": round(seconds, 2), "metrics": metrics, "memory": memory}


def _explained(error: OSError | RuntimeError, trainer: SFTTrainer, folder: RunFolder) -> Exception:
    """A full disk comes as OSError 28 or, from inside torch.save, as a RuntimeError that does not say so."""
    existing = next(p for p in (folder.checkpoints, *folder.checkpoints.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if not (full or "No space left" in str(error) or ("inline_container" in str(error) and free < 64 * 2**20)):
        return error
    whole, _ = newest_whole(folder.checkpoints, PartialState().num_processes)
    kept = (
        f"{whole.name} is whole: free some space, then RESUME=1" if whole else "no checkpoint is whole yet: free some space, then FORCE=1"
    )
    found = f"the disk is full ({free / 2**20:.1f} MiB free) while saving at step {trainer.state.global_step}"
    return RecipeError(Problem(shown(folder.checkpoints), found, kept))


def untrained(model: torch.nn.Module) -> list[str]:
    """The adapted modules whose A or B is not finite, or all zero: a zero factor means that nothing was learned there."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                for weight in getattr(module, kind).parameters() if hasattr(getattr(module, kind), "parameters") else []:
                    if not weight.isfinite().all():
                        found.append(f"{name}.{kind} is not finite")
                    elif not weight.any():
                        found.append(f"{name}.{kind} is all zero")
    return found


def _finish(trainer: SFTTrainer, recipe: Recipe, folder: RunFolder, record: dict[str, Any], tokenizer: Any) -> None:
    if recipe.method == "lora" and (wrong := untrained(trainer.accelerator.unwrap_model(trainer.model))):
        do = "the adapter is not saved; look at the learning rate, the number of steps and whether these modules are used at all"
        raise RecipeError([Problem(recipe.at("lora", "target_modules"), line, do) for line in wrong[:20]])
    record["probes"]["after"] = evaluate.probes(trainer.model, tokenizer, recipe)
    final = folder.result(recipe.method)
    temporary = final.with_name(f".{final.name}.tmp")
    trainer.save_model(str(temporary))
    if PartialState().is_main_process:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths; recipe.yaml says the same
        record |= {"status": "finished", "ended": now()}
        record["result_bytes"] = sum(p.stat().st_size for p in temporary.glob("*.safetensors"))
        card.write(temporary, recipe, record)
        replace_folder(temporary, final)
        watch.draw(folder)
        folder.write_record(record)
    _report(recipe, folder, record)


def _report(recipe: Recipe, folder: RunFolder, record: dict[str, Any]) -> None:
    metrics = record["metrics"]
    losses = [f"{name} {metrics[key]:.4f}" for name, key in (("train loss", "train_loss"), ("eval loss", "eval_loss")) if key in metrics]
    say(f"\n{record['steps']} steps in {record['seconds']:.1f} s; {', '.join(losses)}")
    if recipe.method == "lora":
        say("every adapted module has finite, non-zero A and B")
    lines = evaluate.table(record["probes"]["before"], record["probes"]["after"])
    say("\n".join(["", *lines]) if lines else "")
    final = folder.result(recipe.method)
    say(f"{shown(final)}/  {record['result_bytes']:,} bytes;  also run.json, metrics.jsonl, loss.png, recipe.yaml")
