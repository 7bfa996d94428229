"""The answers to names of other tools are true: the keys exist and take the values, the commands have the
options, and where there is nothing to set, the reason holds.
"""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import trl
import yaml
from peft import AdaLoraConfig, LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from trl import SFTConfig

from lora_recipes.core.errors import RecipeError
from lora_recipes.core.files import ROOT
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import gate
from lora_recipes.model import build
from lora_recipes.recipe import check
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.other_tools import OTHER_NAMES, OWNED, Answer, Environment, Nothing, Run, Write
from lora_recipes.recipe.recipe import METHODS
from lora_recipes.training import launch
from lora_recipes.training.train import train
from tests.cases import families
from tests.typed import there

ROWS: dict[str, Answer] = {**OTHER_NAMES, **OWNED}
SECTIONS = check.schema()["properties"]
KEYS = {f"{section}.{key}" for section, its in SECTIONS.items() for key in its.get("properties", ())}


def of_kind(kind):
    return sorted(word for word, answer in ROWS.items() if isinstance(answer, kind))


@pytest.mark.parametrize("word", of_kind(Write))
def test_a_key_that_an_answer_names_exists_and_takes_the_value_it_names(word):
    answer = ROWS[word]
    assert isinstance(answer, Write)
    for name in (answer.key, *answer.also):
        assert name in KEYS or (name.endswith(":") and name[:-1] in SECTIONS), f"{word}: {name}"
    if answer.value:
        section, key = answer.key.split(".")
        sections = {section: {key: yaml.safe_load(answer.value)}}
        assert not [fault for fault in check.faults(sections) if fault[0][:2] == (section, key)], word


def test_a_key_in_the_words_of_any_answer_exists():
    for word, answer in ROWS.items():
        named = re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z]\w+", str(answer))
        assert set(named) <= KEYS | {"train.py"}, f"{word}: {answer}"


def test_what_was_asked_of_4_and_8_bits_is_answered_by_nf4():
    """By name, so that a new row of this kind cannot say otherwise: quantised bases are trained here."""
    bits = {word for word in OTHER_NAMES if re.search("bit|quant|qlora", word)}
    assert {
        "load_in_4bit",
        "load_in_8bit",
        "quantization_bit",
        "quantize_base",
        "bnb_4bit_quant_type",
    } <= bits
    for word in bits - {"bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"}:
        assert str(OTHER_NAMES[word]).startswith("here it is model.quantize: nf4"), word
    for word in ("load_in_8bit", "quantization_bit"):
        assert "8 bits is not offered" in str(OTHER_NAMES[word])
    assert SECTIONS["model"]["properties"]["quantize"]["enum"] == ["nf4"], "then 8 bits may be offered"


@pytest.mark.parametrize("word", ["use_peft", "adapter", "finetuning_type"])
def test_who_asks_for_an_adapter_is_told_every_method_section(word):
    answer = OTHER_NAMES[word]
    assert isinstance(answer, Write)
    assert {answer.key, *answer.also} == {f"{method}:" for method in METHODS}


@pytest.mark.parametrize("word", of_kind(Run))
def test_a_command_that_an_answer_names_has_the_option(word):
    answer = ROWS[word]
    assert isinstance(answer, Run)
    script = f"scripts/{answer.verb}.py"
    help_ = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, check=True)
    assert answer.option.split(" ")[0] in help_.stdout.decode()
    target = re.search(rf"(?m)^{answer.verb}:.*\n\t(.*)", (ROOT / "Makefile").read_text())
    assert target and answer.variable in target[1]


@pytest.mark.parametrize("word", of_kind(Environment))
def test_a_variable_that_an_answer_names_is_read_by_the_library(word):
    answer = ROWS[word]
    assert isinstance(answer, Environment)
    package = {"HF": huggingface_hub, "WANDB": transformers}[answer.variable.split("_")[0]]
    sources = Path(there(package.__file__)).parent.rglob("*.py")
    assert any(re.search(rf"(?:environ|env)\W.*{answer.variable}", p.read_text()) for p in sources)


def test_no_answer_is_hidden_by_a_real_key_and_owned_fields_are_real():
    real = {key for its in SECTIONS.values() for key in its.get("properties", ())}
    assert not real & set(OTHER_NAMES)
    assert not {name.split(".")[1] for name in OWNED} & set(OTHER_NAMES)
    classes: dict[str, Any] = {
        "train": [SFTConfig],
        "lora": [LoraConfig],
        "peft": PEFT_TYPE_TO_CONFIG_MAPPING.values(),
    }
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"} if families.OLDER else set()
    for name in OWNED:
        section, field = name.split(".")
        fields = {f.name for cls in classes[section] for f in dataclasses.fields(cls)}
        assert field in fields | newer, name


# ---- nothing to set: each reason, and what shows that it is true


def run_files(trained, recipe):
    folder = trained / "tiny_facts"
    return all((folder / name).stat().st_size for name in ("metrics.jsonl", "loss.png"))


def memory_is_recorded(trained, recipe):
    return any(
        "bytes" in key for key in json.loads((trained / "tiny_facts" / "run.json").read_text())["memory"]
    )


def only_safetensors(trained, recipe):
    results = trained / "tiny_base" / "model", trained / "tiny_facts" / "adapter"
    names = [p.name for folder in results for p in folder.iterdir()]
    return any(n.endswith(".safetensors") for n in names) and not any(n.endswith(".bin") for n in names)


def cuda_or_cpu(trained, recipe):
    made = build.sft_config(recipe, RunFolder(trained / "none"))
    return made.use_cpu is not torch.cuda.is_available() and made.device.type in ("cpu", "cuda")


def class_of_the_config(trained, recipe):
    base = build.model(resolve(recipe, trained))
    return base.config.architectures == [type(base).__name__]


def rows_are_read_anew(trained, recipe):
    path = trained / "rows.jsonl"
    found = []
    for text in ("The dog", "The train"):
        path.write_text(json.dumps({"text": text}) + "\n")
        changed = recipes.load("tiny_facts", [f"data.train={path}"])
        found.append(gate.pass_through(resolve(changed, trained), False).train[0].input_ids)
    return found[0] != found[1]


def no_row_waits_until_training(trained, recipe):
    """A fault in the last of 3,000 rows stops the run before it has a folder; a stream came to it late."""
    rows = ['{"text": "The dog"}'] * 2999 + ['{"txet": "The dog"}']
    (trained / "many.jsonl").write_text("\n".join(rows) + "\n")
    changed = recipes.load("tiny_facts", [f"data.train={trained / 'many.jsonl'}"])
    with pytest.raises(RecipeError, match=r"many\.jsonl:3000"):
        train(replace(resolve(changed, trained), recipe=replace(changed, name="streamed")))
    return not (trained / "streamed").exists()


def supervised_fine_tuning_alone(trained, recipe):
    """Of all trainers that trl and transformers have the package names and builds one."""
    named = {
        name
        for path in (ROOT / "lora_recipes").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
        if name
    }
    sources = [p for of in (trl, transformers) for p in Path(there(of.__file__)).parent.rglob("*trainer*.py")]
    known = {name for p in sources for name in re.findall(r"(?m)^class (\w*Trainer)\b", p.read_text())}
    assert {"DPOTrainer", "GRPOTrainer", "RewardTrainer", "SFTTrainer"} <= known
    rows = gate.pass_through(resolve(recipe, trained), False)
    resolved, folder = resolve(recipe, trained), RunFolder(trained / "none")
    base, arguments = build.model(resolved), build.sft_config(recipe, folder)
    made, _ = build.trainer(resolved, arguments, base, rows.tokenizer, rows.train, rows.evaluation, [], None)
    its = {cls.__name__ for cls in type(made).__mro__}  # transformers' Trainer is below it
    return isinstance(made, trl.SFTTrainer) and "SFTTrainer" in named and named & known <= its


def accelerate_numbers_the_processes(trained, recipe):
    """Two real processes; the state is where SFTConfig.local_process_index has its number from."""
    probe = trained / "probe.py"
    probe.write_text(
        "import os; from accelerate import PartialState as S\n"
        "os.write(1, b'rank %d\\n' % S(cpu=True).local_process_index)"  # in one piece, as print need not be
    )
    made = build.sft_config(recipe, RunFolder(trained / "none"))
    assert made.distributed_state.local_process_index == made.local_process_index == 0
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.words("ddp", 2), str(probe)]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True, check=True, timeout=1800)
    return sorted(re.findall(r"rank \d", done.stdout)) == ["rank 0", "rank 1"]


def stored_as_uint8(trained, recipe):
    return build.nf4("bfloat16").bnb_4bit_quant_storage == torch.uint8


def never_inference(trained, recipe):
    return there(build.peft_config(recipe)).inference_mode is False


def peft_names_the_base(trained, recipe):
    saved = json.loads((trained / "tiny_facts" / "adapter" / "adapter_config.json").read_text())
    return "tiny_base" in saved["base_model_name_or_path"]


def causal_language_model(trained, recipe):
    return there(build.peft_config(recipe)).task_type == "CAUSAL_LM"


def total_step_is_given(trained, recipe):
    made = build.peft_config(recipes.load("tiny_adalora"), total_step=77)
    return isinstance(made, AdaLoraConfig) and made.total_step == 77


def the_trainer_gets_tokens(trained, recipe):
    return set(gate.pass_through(resolve(recipe, trained), False).train.dataset.column_names) == {
        "input_ids",
        "labels",
    }


SHOWN = {
    "logging_dir": run_files,
    "plot_loss": run_files,
    "log_peak_memory_stats": memory_is_recorded,
    "save_safetensors": only_safetensors,
    "use_mps_device": cuda_or_cpu,
    "model_type": class_of_the_config,
    "overwrite_cache": rows_are_read_anew,
    "dataset_prepared_path": rows_are_read_anew,
    "dataset_streaming": no_row_waits_until_training,
    "stage": supervised_fine_tuning_alone,
    "rl": supervised_fine_tuning_alone,
    "bnb_4bit_quant_storage": stored_as_uint8,
    "train.dataset_kwargs": the_trainer_gets_tokens,
    "train.local_rank": accelerate_numbers_the_processes,
    "peft.task_type": causal_language_model,
    "peft.total_step": total_step_is_given,
    "peft.inference_mode": never_inference,
    "lora.inference_mode": never_inference,
    "peft.base_model_name_or_path": peft_names_the_base,
    "lora.base_model_name_or_path": peft_names_the_base,
}


def test_every_row_with_nothing_to_set_has_its_reason_shown():
    assert set(of_kind(Nothing)) == set(SHOWN)


@pytest.mark.parametrize("word", SHOWN)
def test_the_reason_for_nothing_to_set_is_true(word, trained):
    assert SHOWN[word](trained, recipes.load("tiny_facts")), str(ROWS[word])
