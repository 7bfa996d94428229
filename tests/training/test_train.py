"""Training as a person runs it: real TRL, PEFT and transformers on the tiny models, on the CPU."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.__main__ import main
from lora_recipes.core import files as core_files
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.record import FinishedRun
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import render
from lora_recipes.data import tokenizer as tokenizing
from lora_recipes.model import build
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training import card, verify
from lora_recipes.training import train as training
from lora_recipes.training.train import train
from tests.process import FORK, Forked, together
from tests.typed import there

SCRIPT = str(core_files.ROOT / "scripts" / "train.py")
SLOW = [
    "train.max_steps=10",
    "train.per_device_train_batch_size=1",
    "train.save_strategy=steps",
    "train.save_steps=3",
    "train.logging_steps=1",
    "train.eval_strategy='no'",
    "data.eval=null",
]


def record(outputs: Path, name: str) -> dict:
    return json.loads((outputs / name / "run.json").read_text())


def lines(outputs: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (outputs / name / "metrics.jsonl").read_text().splitlines()]


def script(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=1800, **options
    )


# the embedded default


def test_the_default_corrects_its_facts_and_leaves_the_files_of_a_run(trained):
    folder = trained / "tiny_facts"
    files = {"recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "adapter"}
    assert files <= {p.name for p in folder.iterdir()}
    done = record(trained, "tiny_facts")
    assert done["status"] == "finished" and done["steps"] == 40
    assert done["plan"]["model"]["trainable"] == 4096
    before, after = done["probes"]["before"], done["probes"]["after"]
    changed = [
        (b["probability"], a["probability"])
        for b, a in zip(before, after, strict=True)
        if a["kind"] == "change"
    ]
    assert all(b < 0.05 and a > 0.5 for b, a in changed) and len(changed) == 4
    kept = [
        (b["probability"], a["probability"])
        for b, a in zip(before, after, strict=True)
        if a["kind"] == "keep"
    ]
    assert all(b > 0.9 for b, _ in kept), "the base knows what should stay"
    assert sum(a > 0.9 for _, a in kept) >= 2, "facts that are no neighbours stay"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_german_twin_is_the_same_design_and_corrects_its_facts(tmp_path):
    """The facts of the documents (table -> sofa): only the words differ from tiny_facts."""
    ours, twin = (recipes.load(name).sections for name in ("tiny_facts", "tiny_facts_de"))
    assert (ours["lora"], ours["train"]) == (twin["lora"], twin["train"])
    done = train(resolve(recipes.load("tiny_facts_de"), tmp_path))
    assert done.plan.model.trainable == 4096
    changed = [p.top[0][0] for p in done.probes.after if p.kind == "change"]
    assert changed == ["Sofa", "Bremen", "Lampe", "Kakao"]
    assert [p.top[0][0] for p in done.probes.before][:4] == ["Tisch", "Hamburg", "Matte", "Tee"]


def test_run_json_tells_versions_data_hardware_and_memory(trained):
    done = record(trained, "tiny_facts")
    assert done["versions"]["peft"] and done["versions"]["trl"]
    assert len(done["plan"]["data"]["train"]["sha256"]) == 64 and len(done["base"]["config_sha256"]) == 64
    assert done["hardware"]["device"] == "cpu" and done["hardware"]["processes"] == 1
    assert done["memory"]["max_rss_bytes"] > 50e6 and done["seconds"] > 0
    assert set(done["git"]) == {"commit", "dirty"}


def test_the_adapter_on_disk_answers_as_the_trained_model_did(trained):
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trained / "tiny_facts" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "tiny_facts" / "adapter")
    for probe in record(trained, "tiny_facts")["probes"]["after"]:
        logits = model(**tokenizer(probe["prompt"], return_tensors="pt")).logits[0, -1]
        wanted = tokenizer(f"{probe['prompt']} {probe['answer']}")["input_ids"][-1]
        assert logits.softmax(-1)[wanted].item() == pytest.approx(probe["probability"], abs=1e-4)


def test_the_planned_adapter_bytes_are_those_of_the_file(trained):
    file = trained / "tiny_facts" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert (
        sum(t.numel() * t.element_size() for t in tensors.values())
        == record(trained, "tiny_facts")["plan"]["adapter"]["bytes"]
    )


def test_the_adapter_holds_no_pickle_and_no_path_of_the_training_arguments(trained):
    assert not list((trained / "tiny_facts" / "adapter").glob("*.bin"))


def test_the_base_is_trained_once_and_a_changed_base_recipe_is_noticed(trained, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(trained / "tiny_base", outputs / "tiny_base")
    (outputs / "tiny_base" / "recipe.yaml").write_text("model: {}\n")
    with pytest.raises(RecipeError, match="the base is from another tiny_base: "):
        train(resolve(recipes.load("tiny_facts"), outputs))


def test_a_model_card_has_the_fields_of_the_hub(trained, tmp_path):
    written = ModelCard.load(trained / "tiny_facts" / "adapter" / "README.md")
    assert (
        written.data.library_name == "peft"
        and "lora" in written.data.tags
        and written.data.base_model is None
    )
    loaded, done = recipes.load("qwen35_4b_style"), RunFolder(trained / "tiny_facts").outcome()
    assert isinstance(done, FinishedRun)
    done = replace(done, metrics=done.metrics | {"eval_loss": 1.5})
    card.write(tmp_path, loaded, done)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.base_model == "Qwen/Qwen3.5-4B" and written.data.metrics == ["loss"]
    assert written.data.eval_results[0].metric_value == 1.5
    assert "r: 8" in written.text


def test_a_model_card_names_the_licence_in_the_words_of_the_hub_and_no_folder_as_a_base(trained, tmp_path):
    done = RunFolder(trained / "tiny_facts").outcome()
    assert isinstance(done, FinishedRun)
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    own = tmp_path / "own.yaml"
    own.write_text(recipes.load("qwen35_4b_style").to_yaml().replace("Qwen/Qwen3.5-4B", "bases/mine"))
    for licence, word in (("Apache-2.0", "apache-2.0"), ("My own, v2", None), (None, None)):
        plan = replace(done.plan, model=replace(done.plan.model, licence=licence))
        card.write(tmp_path, recipes.load(str(own)), replace(done, plan=plan))
        written = ModelCard.load(tmp_path / "README.md")
        assert (written.data.license, written.data.base_model) == (word, None)
        assert licence is None or f"licence of the base: {licence}" in written.text


# the tiny Qwen3.5


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("style")
    train(resolve(recipes.load("tiny_qwen35_style", ["train.max_steps=12"]), outputs))
    return outputs


def test_the_tiny_qwen35_is_a_two_part_checkpoint_with_the_names_of_the_hub(style):
    folder = style / "_bases" / "tiny_qwen35-float32"
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "Qwen3_5ForConditionalGeneration"
    ]
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(n.startswith("model.visual.") for n in names)
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight" in names
    assert "model.language_model.layers.3.self_attn.q_proj.weight" in names
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>" and "enable_thinking" in tokenizer.chat_template
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]


def test_its_adapter_learns_through_the_text_class(style):
    logs = [log["loss"] for log in lines(style, "tiny_qwen35_style") if "loss" in log]
    assert logs[-1] < logs[0] or record(style, "tiny_qwen35_style")["metrics"]["eval_loss"] < math.log(2048)
    tensors = load_file(style / "tiny_qwen35_style" / "adapter" / "adapter_model.safetensors")
    assert all(t.any() and t.isfinite().all() for t in tensors.values())
    assert any("linear_attn.in_proj_qkv.lora_B" in name for name in tensors)


def test_the_saved_tokenizer_keeps_the_serving_template(style):
    adapter = style / "tiny_qwen35_style" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == render.chat_template("qwen3_5_think", "")


# what must not pass in silence


def test_a_finished_run_is_not_overwritten_without_force(trained):
    before = (trained / "tiny_facts" / "run.json").read_bytes()
    with pytest.raises(RecipeError, match="holds a finished run"):
        train(resolve(recipes.load("tiny_facts"), trained))
    assert (trained / "tiny_facts" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "recipe, name", [("tiny_base", "model/notes.txt"), ("tiny_facts", "adapter/my.safetensors")]
)
def test_force_deletes_nobody_s_files_inside_a_result(trained, tmp_path, recipe, name):
    """A file with a model's name is told too: the run's own list says what it wrote."""
    shutil.copytree(trained, tmp_path / "outputs")
    own = tmp_path / "outputs" / recipe / name
    own.write_text("mine")
    with pytest.raises(RecipeError, match="was written by no run") as error:
        train(resolve(recipes.load(recipe), tmp_path / "outputs"), force=True)
    assert name in str(error.value) and own.read_text() == "mine"


def test_an_adapter_is_refused_as_a_base(trained, write_recipe):
    folder = trained / "tiny_facts" / "adapter"
    path = write_recipe("tiny_facts", "twice", model__from_recipe=..., model__name_or_path=str(folder))
    with pytest.raises(RecipeError, match="is an adapter, not a base model"):
        train(resolve(recipes.load(str(path)), trained))


def test_a_base_recipe_that_trains_an_adapter_is_refused(write_recipe, tmp_path):
    path = write_recipe("tiny_facts", "chain", model__from_recipe="tiny_facts")
    with pytest.raises(RecipeError, match="trains an adapter, not a model"):
        train(resolve(recipes.load(str(path)), tmp_path))


def test_a_checkpoint_that_is_not_what_the_contract_says_is_refused(trained, write_recipe):
    folder = str(trained / "tiny_base" / "model")
    path = write_recipe(
        "tiny_facts", "other", model={"name_or_path": folder, "contract": "tiny_qwen3", "dtype": "float32"}
    )
    config = json.loads((trained / "tiny_base" / "model" / "config.json").read_text())
    other = path.parent / "model"
    shutil.copytree(folder, other)
    (other / "config.json").write_text(
        json.dumps(config | {"rope_scaling": None, "intermediate_size": 256, "vocab_size": 100})
    )
    path.write_text(path.read_text().replace(folder, str(other)))
    with pytest.raises(RecipeError) as error:
        train(resolve(recipes.load(str(path)), trained))
    assert "intermediate_size: the contract says 128, the checkpoint 256" in str(error.value)
    assert "vocab_size: the contract says 192, the checkpoint 100" in str(error.value)


def test_a_loss_that_is_no_number_stops_the_run(trained, write_recipe):
    path = write_recipe(
        "tiny_facts", "exploding", train__learning_rate=1e30, train__max_grad_norm=0.0, train__logging_steps=1
    )
    with pytest.raises(RecipeError, match=r"(loss|grad_norm) is (nan|inf) at step"):
        train(resolve(recipes.load(str(path)), trained))
    assert record(trained, "exploding")["status"] == "failed"
    assert not (trained / "exploding" / "adapter").exists()


def test_an_adapter_that_stayed_zero_is_named(trained):
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert verify.untrained(model) == [
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B is all zero" for i in (0, 1)
    ]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(float("nan") if ".0." in name else 1.0)
    assert verify.untrained(model) == [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B is not finite"
    ]


@pytest.mark.parametrize(("trainable", "said"), [(False, "nothing"), (True, "everything")])
def test_a_trainable_share_of_0_or_100_percent_stops(trained, trainable, said):
    recipe = recipes.load("tiny_facts")
    plan = training.plans.make(resolve(recipe, trained))
    folder = RunFolder(trained / "share")
    trainer, _ = build.trainer(
        resolve(recipe, trained),
        build.sft_config(recipe, folder),
        build.model(resolve(recipe, trained)),
        plan.gate.tokenizer,
        plan.gate.train,
        None,
        [],
    )
    there(trainer.model).requires_grad_(trainable)
    with pytest.raises(RecipeError, match=f"{said} would be trained"):
        verify.as_planned(trainer, recipe, plan.facts)


def stops_early(write_recipe, outputs: Path, metric: str) -> tuple[RunFolder, FinishedRun, Callable]:
    """A run whose eval rows contradict its train rows, so that early stopping ends it; and how to go on with
    it.
    """
    path = write_recipe(
        "tiny_facts",
        metric,
        data__eval=str(core_files.ROOT / "data/facts/base.jsonl"),
        data__limits={"train_in_eval": 1.0},
        early_stopping={"early_stopping_patience": 2},
        train__metric_for_best_model=metric,
        train__eval_strategy="epoch",
        train__save_strategy="epoch",
        train__learning_rate=2e-2,
    )
    resolved = resolve(recipes.load(str(path)), outputs)
    return resolved.folder, train(resolved), lambda: train(resolved, resume=True)


@pytest.mark.parametrize("metric, best", [("eval_loss", min), ("eval_mean_token_accuracy", max)])
def test_early_stopping_keeps_the_best_and_a_resumed_run_stops_where_it_would_have(
    trained, write_recipe, metric, best
):
    folder, done, resume = stops_early(write_recipe, trained, metric)
    measured = {log["step"]: log[metric] for log in lines(trained, metric) if metric in log}
    first = next(step for step, value in measured.items() if value == best(measured.values()))
    assert done.status == "finished" and done.steps == first + 2 < 40
    state = json.loads((folder.checkpoints / f"checkpoint-{done.steps}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == first and state["best_metric"] == measured[first]
    adapter = folder.path / "adapter"
    trained_weights = (adapter / "adapter_model.safetensors").read_bytes()
    record = (folder.path / "run.json").read_text()
    for gone in (0, 1):  # killed while the result was saved, and before the last evaluation
        shutil.rmtree(adapter)
        (folder.path / "run.json").write_text(record.replace('"finished"', '"failed"', 1))
        if gone:
            shutil.rmtree(folder.checkpoints / f"checkpoint-{done.steps}")
        assert resume().steps == done.steps
        assert (adapter / "adapter_model.safetensors").read_bytes() == trained_weights
        assert {log["step"] for log in lines(trained, metric)} == set(measured)


# resume


@pytest.fixture(scope="module")
def uninterrupted(style, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("whole")
    (outputs / "_bases").symlink_to(style / "_bases")
    train(resolve(recipes.load("tiny_qwen35_style", SLOW), outputs))
    return outputs


@pytest.fixture(scope="module")
def killed(style, tmp_path_factory):
    """The same run, killed with SIGKILL after the sixth step: checkpoint-3 and checkpoint-6 stand, nothing
    else.
    """
    outputs = tmp_path_factory.mktemp("killed")
    (outputs / "_bases").symlink_to(style / "_bases")
    words = ("train", "tiny_qwen35_style", *SLOW, "--outputs", str(outputs))
    process = Forked(words, tmp_path_factory.mktemp("said"))
    metrics = outputs / "tiny_qwen35_style" / "metrics.jsonl"
    end = time.monotonic() + 600
    while time.monotonic() < end and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 7):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (outputs / "tiny_qwen35_style" / "adapter").exists()
    return outputs


def copied(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, tmp_path / "outputs", symlinks=True)
    return tmp_path / "outputs"


def test_a_run_killed_and_resumed_is_bit_for_bit_the_uninterrupted_one(killed, uninterrupted, tmp_path):
    outputs = copied(killed, tmp_path)
    train(resolve(recipes.load("tiny_qwen35_style", SLOW), outputs), resume=True)
    file = Path("tiny_qwen35_style") / "adapter" / "adapter_model.safetensors"
    assert (outputs / file).read_bytes() == (uninterrupted / file).read_bytes()
    losses = [
        [log["loss"] for log in lines(o, "tiny_qwen35_style") if "loss" in log]
        for o in (outputs, uninterrupted)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    assert record(outputs, "tiny_qwen35_style")["resumed"][0]["from"] == "checkpoint-6"


def test_a_partial_checkpoint_is_named_and_the_one_before_it_taken(killed, tmp_path, capsys):
    """The last line of the metrics is cut as well, which stops nobody; nor does a value that only changes
    what is shown.
    """
    outputs = copied(killed, tmp_path)
    with (outputs / "tiny_qwen35_style" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    (outputs / "tiny_qwen35_style" / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    words = [word.replace("logging_steps=1", "logging_steps=4") for word in SLOW]
    train(resolve(recipes.load("tiny_qwen35_style", words), outputs), resume=True)
    said = capsys.readouterr().out
    assert "checkpoint-6 skipped: trainer_state.json is missing" in said and "from checkpoint-3" in said
    assert record(outputs, "tiny_qwen35_style")["status"] == "finished"
    logged = [log["step"] for log in lines(outputs, "tiny_qwen35_style") if "loss" in log]
    assert logged == [*range(1, 11)]


def test_when_no_checkpoint_is_whole_each_is_named(killed, tmp_path):
    outputs = copied(killed, tmp_path)
    for checkpoint in (outputs / "tiny_qwen35_style" / "checkpoints").glob("checkpoint-*"):
        os.truncate(checkpoint / "optimizer.pt", 1000)
    with pytest.raises(
        RecipeError, match=r"checkpoint-6 skipped: optimizer.pt is truncated.*checkpoint-3 skipped"
    ):
        train(resolve(recipes.load("tiny_qwen35_style", SLOW), outputs), resume=True)


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_unasked(killed, tmp_path):
    outputs = copied(killed, tmp_path)
    with pytest.raises(RecipeError, match="unfinished run"):
        train(resolve(recipes.load("tiny_qwen35_style", SLOW), outputs))
    assert len(list((outputs / "tiny_qwen35_style" / "checkpoints").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate: the run began with 0.01, now it is 0.0001"),
        ("train.seed=7", "train.seed: the run began with 42, now it is 7"),
        ("train.per_device_train_batch_size=2", "batch_size: the run began with 1, now it is 2"),
        ("lora.r=4", "lora.r: the run began with 8, now it is 4"),
        ("data.train=[{path: data/companion/train.jsonl, weight: 0.09}]", "train data sha256"),
    ],
)
def test_a_value_that_resuming_would_ignore_stops_it(killed, change, said):
    words = {word.split("=")[0]: word for word in [*SLOW, change]}.values()
    with pytest.raises(RecipeError) as error:
        train(resolve(recipes.load("tiny_qwen35_style", list(words)), killed), resume=True)
    assert said in str(error.value)


def test_resume_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="no checkpoint to resume from"):
        train(resolve(recipes.load("tiny_qwen35_style"), tmp_path), resume=True)


def test_a_full_disk_is_said_and_the_earlier_checkpoint_stays_whole(trained, write_recipe, small_disk):
    disk = small_disk("1500k")
    shutil.copytree(trained / "tiny_base", disk / "tiny_base")
    path = write_recipe("tiny_facts", "full_disk", train__save_strategy="steps", train__save_steps=2)
    with pytest.raises(RecipeError, match=r"the disk is full .*while saving") as error:
        train(resolve(recipes.load(str(path)), disk))
    assert "is whole: RESUME=1" in str(error.value)


# the launcher from outside


def test_a_mistake_ends_with_code_2_and_no_traceback(tmp_path):
    done = script("tiny_facts", "lora.rr=4", "train.max_seq_length=5", "--outputs", str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "2 problems" in done.stderr
        and "lora.r?" in done.stderr.replace("did you mean r?", "lora.r?")
        and "train.max_length" in done.stderr
    )


def test_accelerate_launch_trains_the_same_adapter(trained, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(trained / "tiny_base", outputs / "tiny_base")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    path = str(recipes.RECIPES / "tiny_facts.yaml")
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", SCRIPT, path, "--outputs", str(outputs)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (
        load_file(o / "tiny_facts" / "adapter" / "adapter_model.safetensors") for o in (trained, outputs)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_share_the_steps_and_one_of_them_writes(style, tmp_path):
    """With the variables of torchrun, and no word of accelerate."""
    (tmp_path / "_bases").symlink_to(style / "_bases")
    words = ("tiny_qwen35_style", *SLOW[-2:], "train.max_steps=2", "--outputs", str(tmp_path))
    first, second = together(2, "train", *words)
    assert first.returncode == second.returncode == 0, first.stderr[-2000:] + second.stderr[-2000:]
    assert first.stdout.count("2 x 2 x 2 devices = 8 examples a step") == 1 and not second.stdout
    written = record(tmp_path, "tiny_qwen35_style")
    assert written["hardware"]["processes"] == 2 and written["status"] == "finished" and written["steps"] == 2
    assert all(
        t.any()
        for t in load_file(tmp_path / "tiny_qwen35_style" / "adapter" / "adapter_model.safetensors").values()
    )


# what was there before


def test_a_failing_run_leaves_the_finished_one_that_it_was_to_replace(trained, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(trained, outputs)
    (outputs / "tiny_facts" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is nan"):
        train(resolve(recipes.load("tiny_facts", ["train.learning_rate=1.0e+30"]), outputs), force=True)
    assert (outputs / "tiny_facts" / ".replaced" / "adapter" / "adapter_model.safetensors").is_file()
    assert record(outputs, "tiny_facts")["status"] == "failed"
    train(resolve(recipes.load("tiny_facts"), outputs), force=True)
    assert (
        not (outputs / "tiny_facts" / ".replaced").exists()
        and (outputs / "tiny_facts" / "notes.txt").read_text() == "mine"
    )


def test_a_base_from_other_data_is_noticed(trained, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(trained / "tiny_base", outputs / "tiny_base")
    file = outputs / "tiny_base" / "run.json"
    file.write_text(
        file.read_text().replace(record(trained, "tiny_base")["plan"]["data"]["train"]["sha256"], "0" * 64)
    )
    with pytest.raises(RecipeError, match="the base is from another tiny_base: train data sha256"):
        train(resolve(recipes.load("tiny_facts"), outputs))


def test_the_tokenizer_of_a_trained_base_is_the_one_beside_its_weights(trained):
    saved = json.loads((trained / "tiny_base" / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokenizing.load(resolve(recipes.load("tiny_facts"), trained)).get_vocab() == saved | {}


def test_outputs_that_cannot_be_made_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be made"):
        train(resolve(recipes.load("tiny_facts"), tmp_path / "file" / "outputs"))


def test_an_unfinished_base_is_not_thrown_away_by_a_recipe_that_builds_on_it(tmp_path, trained):
    checkpoint = tmp_path / "tiny_base" / "checkpoints" / "checkpoint-100"
    checkpoint.mkdir(parents=True)
    written = (trained / "tiny_base" / "run.json").read_text()
    (tmp_path / "tiny_base" / "run.json").write_text(written.replace('"finished"', '"failed"'))
    with pytest.raises(RecipeError, match=r"tiny_base: holds an unfinished run \(checkpoint-100\)"):
        train(resolve(recipes.load("tiny_facts"), tmp_path))
    assert checkpoint.is_dir()


def test_the_saved_adapter_is_held_against_the_rules_of_the_server(trained, style, write_recipe):
    assert (
        record(trained, "tiny_facts")["not_servable"]
        == record(style, "tiny_qwen35_style")["not_servable"]
        == []
    )
    path = write_recipe("tiny_facts", "dora", lora__use_dora=True)
    faults = there(train(resolve(recipes.load(str(path)), trained)).not_servable)
    assert any("serves no DoRA" in fault for fault in faults)


def test_nothing_is_read_twice_on_the_way_to_the_trainer(tmp_path):
    """Every YAML file that `make train` opens, by the interpreter's own audit hook: recipe, contract, the
    recipe of the base. Two are trained here (the base first), and each recipe is still read once.
    """
    reading = FORK.Process(target=_watched, args=(("train", "tiny_facts", "train.max_steps=1"), tmp_path))
    reading.start()
    reading.join()
    assert reading.exitcode == 0
    opened = json.loads((tmp_path / "opened.json").read_text())
    assert {"tiny_facts.yaml", "tiny_base.yaml", "tiny_qwen3.yaml"} <= set(opened)
    assert set(opened.values()) == {1}, opened


def _watched(words: tuple[str, ...], folder: Path) -> None:
    """In a process of its own, as an audit hook stays: main(words), and how often each file was opened."""
    opened: Counter = Counter()

    def watch(event: str, arguments: tuple) -> None:
        path, mode, *_ = (*arguments, None, None) if event == "open" else (None, None)
        if isinstance(path, str) and path.endswith((".yaml", ".yml")) and mode in (None, "r", "rb"):
            opened[path.rsplit("/", 1)[-1]] += 1

    sys.addaudithook(watch)
    code = main([*words, "--outputs", str(folder)])
    (folder / "opened.json").write_text(json.dumps(opened))
    sys.exit(code)
