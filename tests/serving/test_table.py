"""The table of vLLM's classes against those that are installed."""

import os
import subprocess

import pytest

from lora_recipes.core import files
from lora_recipes.serving import command, rules

pytestmark = pytest.mark.vllm

if not (command.ENVIRONMENT / ".ready").exists():
    pytest.skip("vLLM is not installed: make setup-serve", allow_module_level=True)


def test_the_table_is_what_the_installed_classes_say():
    script = [str(command.python()), str(files.ROOT / "scripts" / "vllm_table.py"), "--check"]
    environment = os.environ | {"PYTHONPATH": str(files.ROOT / "scripts" / "vllm_cpu"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=1800, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert rules.table()["vllm"].startswith(f"{rules.VLLM}.")
