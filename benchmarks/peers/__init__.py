"""Other trainers on the job of make bench, each in the environment that make bench-peers made of the file
beside.

Each stands twice: with what the job states and its own defaults for all else, and with its best settings that
run here. Names are the peers' own; none of their code is here.
"""

from pathlib import Path
from typing import Any

from benchmarks.jobs import Command, Setting
from lora_recipes.core.files import ROOT

ENVIRONMENTS = ROOT / ".venv-peers"
COMMANDS = {"llamafactory": "llamafactory-cli", "ms-swift": "swift", "axolotl": "axolotl"}


def versions() -> dict[str, str]:
    """Each peer, and what its file pins it to."""
    files = sorted(Path(__file__).parent.glob("*.txt"))
    lines = [next(line for line in f.read_text().splitlines() if not line.startswith("#")) for f in files]
    return {f.stem: line.partition("==")[2] for f, line in zip(files, lines, strict=True)}


def _bin(peer: str) -> str:
    return str(ENVIRONMENTS / peer / "bin" / COMMANDS[peer])


def _common(s: Setting) -> dict[str, Any]:
    train = s.job.train
    same = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "logging_steps", "seed")
    return {key: train[key] for key in same} | {
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "use_cpu": s.cpu,
    }


def _llamafactory(name: str, **more: Any) -> Command:
    def command(s: Setting) -> list[str]:
        tags = {"role_tag": "role", "content_tag": "content"}
        tags |= {"user_tag": "user", "assistant_tag": "assistant"}
        columns = {"messages": "messages"}
        rows = {"file_name": str(s.chats), "formatting": "sharegpt", "columns": columns, "tags": tags}
        s.written("dataset_info.json", {"rows": rows})
        asked = _common(s) | {
            "model_name_or_path": str(s.base),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": s.job.rank,
            "lora_alpha": 2 * s.job.rank,
            "lora_target": "all",
            "dataset_dir": str(s.folder),
            "dataset": "rows",
            "cutoff_len": s.job.train["max_length"],
            "output_dir": s.output(name),
            "overwrite_cache": True,
            "report_to": "none",
        }
        return [
            _bin("llamafactory"),
            "train",
            str(s.written(f"{name}.yaml", asked | more)),
        ]

    return command


def _swift(name: str, **more: Any) -> Command:
    def command(s: Setting) -> list[str]:
        types = {"dense": "qwen3", "hybrid": "qwen3_5", "smollm2": "llama"}
        asked = _common(s) | {
            "model": str(s.base),
            "model_type": types[s.job.model],
            "template": "chatml",
            "torch_dtype": s.job.section["dtype"],
            "tuner_type": "lora",
            "lora_rank": s.job.rank,
            "lora_alpha": 2 * s.job.rank,
            "target_modules": "all-linear",
            "dataset": str(s.chats),
            "split_dataset_ratio": 0,
            "max_length": s.job.train["max_length"],
            "output_dir": s.output(name),
            "report_to": "none",
        }
        return [_bin("ms-swift"), "sft", str(s.written(f"{name}.json", asked | more))]

    return command


def _axolotl(name: str, **more: Any) -> Command:
    def command(s: Setting) -> list[str]:
        train = s.job.train
        asked = {
            "base_model": str(s.base),
            "datasets": [{"path": str(s.chats), "ds_type": "json", "type": "chat_template"}],
            "dataset_prepared_path": s.output(f"{name}_rows"),
            "adapter": "lora",
            "lora_r": s.job.rank,
            "lora_alpha": 2 * s.job.rank,
            "lora_target_linear": True,
            "sequence_len": train["max_length"],
            "micro_batch_size": train["per_device_train_batch_size"],
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "learning_rate": train["learning_rate"],
            "logging_steps": train["logging_steps"],
            "seed": train["seed"],
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": s.cpu,
            "output_dir": s.output(name),
        }
        if s.cpu:  # it turns them on by itself, and they are written for CUDA
            asked |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
        return [_bin("axolotl"), "train", str(s.written(f"{name}.yaml", asked | more))]

    return command


def contenders() -> dict[str, Command]:
    """Those whose environment is there, by name and version."""
    one = {"per_device_train_batch_size": 1}
    fast: dict[str, dict[str, Command]] = {
        "llamafactory": {
            "LLaMA-Factory {}, its defaults": _llamafactory("lf_defaults"),
            "LLaMA-Factory {}, neat packing": _llamafactory(
                "lf_best", neat_packing=True, disable_gradient_checkpointing=True, **one
            ),
        },
        "ms-swift": {
            "ms-swift {}, its defaults": _swift("swift_defaults"),
            "ms-swift {}, grouped by length": _swift(
                "swift_best", train_sampling_strategy="group_by_length", gradient_checkpointing=False
            ),
        },
        "axolotl": {
            "Axolotl {}, its defaults": _axolotl("axolotl_defaults"),
            "Axolotl {}, packed": _axolotl("axolotl_best", sample_packing=True, micro_batch_size=1),
        },
    }
    return {
        name.format(version): command
        for peer, version in versions().items()
        if Path(_bin(peer)).exists()
        for name, command in fast[peer].items()
    }
