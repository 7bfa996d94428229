"""The table of vLLM's classes against those that are installed, and what it refuses against what they do."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_recipes.core import adapter_folder, files
from lora_recipes.serving import command, export, rules
from tests.cases import families

pytestmark = pytest.mark.vllm

if not (command.ENVIRONMENT / ".ready").exists():
    pytest.skip("vLLM is not installed: make setup-serve", allow_module_level=True)


ADAPTED = {
    "falcon": ["query_key_value", "dense"],
    "recurrent_gemma": ["q_proj", "linear_x"],
    "glm4": ["q_proj", "gate_up_proj"],
    "gpt_bigcode": ["c_attn", "c_fc"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "opt": ["q_proj", "fc1"],
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A base and an adapter of PEFT on it, exported, of each family."""
    made, folder = {}, tmp_path_factory.mktemp("families")
    for name, targets in ADAPTED.items():
        base = families.make(name, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(str(folder / f"{name}-adapter"))
        export.export(adapter_folder.read(folder / f"{name}-adapter"), base, folder / f"{name}-serving")
        made[name] = base, folder / f"{name}-serving"
    return made


@pytest.fixture(scope="module")
def by_vllm(adapters, vllm_forks) -> list[Any]:
    """What tests/cases/vllm_takes.py finds, in one process: the table, then each adapter."""
    words = [str(path) for pair in adapters.values() for path in pair]
    script = str(Path(families.__file__).with_name("vllm_takes.py"))
    scripts = files.ROOT / "scripts"
    environment = os.environ | {"PYTHONPATH": f"{scripts}:{scripts / 'vllm_cpu'}", "HF_HUB_OFFLINE": "1"}
    called = [str(vllm_forks / "bin" / "python"), script, *words]
    done = subprocess.run(called, capture_output=True, text=True, timeout=1800, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('"', "{"))]


def test_the_table_is_what_the_installed_classes_say(by_vllm):
    assert by_vllm[0] == Path(rules.__file__).with_name("vllm.json").read_text(), "stale: make vllm-table"
    assert rules.table()["vllm"].startswith(f"{rules.VLLM}.")


def test_what_the_rules_refuse_is_what_vllm_does_not_take(adapters, by_vllm):
    """By the code that a worker of vLLM runs: an adapter is refused, or taken in part, or whole."""
    said = {}
    for name, (base, adapter) in adapters.items():
        config = json.loads((base / "config.json").read_text())
        said[name] = bool(list(rules.class_faults(config, adapter_folder.read(adapter).modules)))
    found = dict(zip(ADAPTED, by_vllm[1:], strict=True))
    assert said == {name: bool(f["error"] or f["ignored"]) for name, f in found.items()}, found
    assert sum(said.values()) == 4
    assert "expected target modules" in found["glm4"]["error"]
    assert "does not support LoRA" in found["falcon"]["error"]
    assert {m.rsplit(".", 1)[-1] for m in found["gpt_bigcode"]["ignored"]} == {"c_attn"}
