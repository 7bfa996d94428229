"""Does vLLM's own code take an adapter? `vllm_takes.py BASE ADAPTER BASE ADAPTER...`, run by the serving
environment: a model is built and loaded as a worker does it, its LoRA layers are put in, the adapter is
loaded and activated; no engine is started.

A line of JSON each: {"error": what was raised, or null, "ignored": modules that no layer took}; before them
the table as scripts/vllm_table.py finds it (`looked_at_again`), a string.
"""

import json
import os
import sys
import tempfile
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import vllm_table
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin


class Runner(LoRAModelRunnerMixin):
    """The part of a model runner that has to do with LoRA."""


def ignored(config: VllmConfig, adapter: str) -> list[str]:
    """The modules of `adapter` that no layer of the model took; raises what vLLM raises."""
    runner: Any = Runner()
    runner.load_lora_model(get_model(vllm_config=config), config, torch.device("cpu"))
    lora = runner.lora_manager._load_adapter(LoRARequest("a", 1, adapter))
    names, manager = set(lora.loras), runner.lora_manager._adapter_manager
    manager.add_adapter(lora)
    manager.activate_adapter(1)
    taken = {name for module in manager.modules for name in [module, *manager.packed_modules.get(module, [])]}
    return sorted(names - taken)


def main() -> None:
    print(json.dumps(vllm_table.text(vllm_table.looked_at_again())))
    torch.accelerator.empty_cache = lambda: None  # as vLLM's runner for the CPU does
    words = sys.argv[1:]
    for first, (base, adapter) in enumerate(zip(words[::2], words[1::2], strict=True)):
        error, left = None, []
        try:
            options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
            config = EngineArgs(base, dtype="float32", max_model_len=128, **options).create_engine_config()
            with set_current_vllm_config(config):
                if not first:
                    init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
                destroy_model_parallel()
                initialize_model_parallel(1, 1)
                left = ignored(config, adapter)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"error": error, "ignored": left}), flush=True)


if __name__ == "__main__":
    main()
