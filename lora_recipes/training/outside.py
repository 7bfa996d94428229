"""What changes numbers and stands in no recipe: accelerate's file and options, variables of the environment.

`contradictions` is the early answer: it names file:line, option or variable. `differences` is the proof: what
the trainer's Accelerator and this machine's arithmetic are, before the first step, against the plan. The
names are those of accelerate 1.15 (accelerate/commands/launch.py, utils/launch.py, utils/dataclasses.py).
"""

import json
import os
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from lora_recipes.core import cli, yamlfile
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.recipe.recipe import Recipe

REMOVE = "take it away: the recipe decides ({key})"
LAYOUT = f"take it away: {cli.command(ACCELERATE='ddp')}, fsdp2, zero2 or zero3 starts several"
LAYOUT += " processes (docs/scaling.md)"


@dataclass(frozen=True)
class Setting:
    """`name` in accelerate's file and options, `variable` in the environment; either may be "".

    `planned`: what the recipe says, where it says it (`key`). `silent`: values that leave it to the recipe.
    `launched`: does the launcher itself set the variable for the processes that it starts?
    """

    name: str
    variable: str
    planned: Callable[[Recipe], Any]
    key: str = ""
    silent: tuple[str, ...] = ()
    do: str = REMOVE
    launched: bool = False


def precision(recipe: Recipe) -> str:
    """`bf16`, `fp16` or `no`, as the plan has it."""
    from lora_recipes.model import build  # trl: seconds, and only asked where something is said

    flags = build.precision(recipe)[0]
    return "fp16" if flags["fp16"] else "bf16" if flags["bf16"] else "no"


def compiled(recipe: Recipe) -> str:
    """The backend of torch.compile, `no` without."""
    train = recipe.train
    asks = train.torch_compile or train.torch_compile_backend or train.torch_compile_mode
    return (train.torch_compile_backend or "inductor") if asks else "no"


def tf32(recipe: Recipe) -> bool:
    """Is float32 computed in TF32 where a GPU has it? transformers turns it on with torch.compile."""
    return bool(recipe.train.tf32 or compiled(recipe) != "no")


def _cpu(recipe: Recipe) -> bool:
    return recipe.train.use_cpu or not torch.cuda.is_available()


def _off(recipe: Recipe) -> bool:
    return False


FALSE = ("", "false", "0", "no", "none")
SETTINGS = (
    Setting(
        "mixed_precision",
        "ACCELERATE_MIXED_PRECISION",
        precision,
        "model.dtype, train.bf16, train.fp16",
        silent=("no", "false"),
        launched=True,
    ),
    Setting("downcast_bf16", "ACCELERATE_DOWNCAST_BF16", _off, "model.dtype", silent=FALSE),
    Setting(
        "dynamo_backend",
        "ACCELERATE_DYNAMO_BACKEND",
        compiled,
        "train.torch_compile",
        silent=("no",),
        launched=True,
    ),
    Setting(
        "dynamo_mode",
        "ACCELERATE_DYNAMO_MODE",
        lambda r: r.train.torch_compile_mode or "default",
        "train.torch_compile_mode",
        silent=("default",),
        launched=True,
    ),
    *(
        Setting(
            f"dynamo_{name}",
            f"ACCELERATE_DYNAMO_{name.upper()}",
            _off,
            "train.torch_compile",
            FALSE,
            REMOVE,
            True,
        )
        for name in ("use_fullgraph", "use_dynamic", "use_regional_compilation")
    ),
    Setting(
        "gradient_accumulation_steps",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        lambda r: r.train.gradient_accumulation_steps,
        "train.gradient_accumulation_steps",
        silent=("auto",),
    ),
    Setting(
        "gradient_clipping",
        "ACCELERATE_GRADIENT_CLIPPING",
        lambda r: r.train.max_grad_norm,
        "train.max_grad_norm",
        silent=("auto",),
    ),
    Setting("use_cpu", "ACCELERATE_USE_CPU", _cpu, "train.use_cpu", silent=FALSE, launched=True),
    Setting("", "ACCELERATE_USE_DEEPSPEED", _off, silent=FALSE, do=LAYOUT, launched=True),
    Setting("", "ACCELERATE_USE_FSDP", _off, silent=FALSE, do=LAYOUT, launched=True),
    Setting("use_megatron_lm", "ACCELERATE_USE_MEGATRON_LM", _off, silent=FALSE, do=LAYOUT),
    Setting("use_parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG", _off, silent=FALSE, do=LAYOUT),
    # FSDP's own: only read under FSDP. Else weights of all ranks but the first are unset, a save holds shards
    # that PEFT cannot load, gradients of a module are not summed, activations are recomputed twice.
    Setting("fsdp_cpu_ram_efficient_loading", "", _off, silent=FALSE, do="set it to false"),
    Setting(
        "fsdp_state_dict_type",
        "",
        lambda r: "FULL_STATE_DICT",
        silent=("none",),
        do="set FULL_STATE_DICT: PEFT loads no shards",
    ),
    Setting("fsdp_ignored_modules", "", _off, silent=FALSE, do="remove it: their gradients are not summed"),
    Setting("fsdp_activation_checkpointing", "", _off, "train.gradient_checkpointing", silent=FALSE),
    # Read by the libraries below torch.
    Setting("", "NVIDIA_TF32_OVERRIDE", tf32, "train.tf32"),
    Setting("", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", tf32, "train.tf32", silent=FALSE),
    Setting("", "ONEDNN_DEFAULT_FPMATH_MODE", lambda r: "strict", "model.dtype"),
    Setting("", "DNNL_DEFAULT_FPMATH_MODE", lambda r: "strict", "model.dtype"),
    Setting("", "XLA_USE_BF16", _off, "model.dtype", silent=FALSE),
    Setting("", "XLA_DOWNCAST_BF16", _off, "model.dtype", silent=FALSE),
    Setting("", "TORCH_COMPILE_DISABLE", lambda r: compiled(r) == "no", "train.torch_compile", silent=FALSE),
    Setting("", "TORCHDYNAMO_DISABLE", lambda r: compiled(r) == "no", "train.torch_compile", silent=FALSE),
)

# DeepSpeed's own file: what leaves numbers as the recipe says, and where it says it. Every other key is
# refused: an optimizer section replaces train.optim, a scheduler section the learning rates.
_AUTO = ("auto",)
DEEPSPEED: dict[str, Callable[[Recipe], Any]] = {
    "gradient_clipping": lambda r: r.train.max_grad_norm,
    "gradient_accumulation_steps": lambda r: r.train.gradient_accumulation_steps,
    "train_micro_batch_size_per_gpu": lambda r: r.train.per_device_train_batch_size,
    "train_batch_size": lambda r: "auto",
    "bf16.enabled": lambda r: precision(r) == "bf16",
    "fp16.enabled": lambda r: precision(r) == "fp16",
    "zero_optimization.zero_quantized_weights": _off,
    "zero_optimization.zero_quantized_gradients": _off,
    "zero_optimization.zero_quantized_nontrainable_weights": _off,
}
HARMLESS = {
    *("zero_optimization", "bf16", "fp16", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler"),
    *("comms_logger", "tensorboard", "wandb", "csv_monitor", "aio", "checkpoint", "timers", "compile"),
}


def _same(found: Any, planned: Any) -> bool:
    """Is `found`, as people write it, what was planned?"""
    text = str(found).strip().lower()
    if isinstance(planned, bool):
        return (text not in FALSE) == planned
    if isinstance(planned, int | float):
        try:
            return float(text) == planned
        except ValueError:
            return False
    return text == str(planned).lower()


def _problem(where: str, name: str, found: Any, recipe: Recipe, setting: Setting) -> Problem:
    key = setting.key or "docs/scaling.md"
    planned = setting.planned(recipe)
    said = (
        f"{name} is {found}; the plan says {str(planned).lower() if isinstance(planned, bool) else planned}"
    )
    at = f" ({recipe.at(*setting.key.split(',')[0].split('.'))})" if setting.key else ""
    return Problem(where, said + at, setting.do.format(key=key))


def contradictions(
    recipe: Recipe, options: Namespace | None, given: list[str], environment: bool = True
) -> list[Problem]:
    """What the launcher's `options` (accelerate's own reading of the words `given`), DeepSpeed's file and the
    environment say against the recipe. `options` is None where no launcher is known; `environment`: are the
    variables of this process those of the training?
    """
    found: list[Problem] = []
    told = set()
    if options is not None:
        plain = launch_command_parser()
        for setting in SETTINGS:
            value = getattr(options, setting.name, None) if setting.name else None
            if value is None or _silent(value, setting) or value == plain.get_default(setting.name):
                continue
            if not _same(value, setting.planned(recipe)):
                told.add(setting.variable)
                where = _written(setting.name, given, options.config_file)
                found.append(_problem(where, setting.name, value, recipe, setting))
        if options.deepspeed_config_file:
            found += _deepspeed_file(Path(options.deepspeed_config_file), recipe)
    for setting in SETTINGS if environment else ():
        value = os.environ.get(setting.variable) if setting.variable else None
        skip = setting.variable in told or (
            options is not None
            and setting.launched
            and setting.do == LAYOUT  # `launch.wanted` compares those
        )
        if not value or skip or _silent(value, setting) or _same(value, setting.planned(recipe)):
            continue
        where = f"the environment: {setting.variable}={value}"
        found.append(_problem(where, setting.name or setting.variable, value, recipe, setting))
    return found


def _silent(value: Any, setting: Setting) -> bool:
    return str(value).strip().lower() in setting.silent


def _written(name: str, given: list[str], file: str | None) -> str:
    """Where `name` was said to the launcher: the option, else the line of accelerate's file."""
    for word in given:
        if word.split("=")[0].replace("-", "_").strip("_") == name:
            return f"accelerate launch {word.split('=')[0]}"
    path = Path(file or default_config_file)
    try:
        _, lines, _ = yamlfile.read(path)
    except RecipeError:
        return yamlfile.shown(path)
    short = name.removeprefix("fsdp_").removeprefix("dynamo_")
    for key, line in lines.items():
        if key and key[-1] in (name, short, _OF_DISTRIBUTED.get(name)):
            return f"{yamlfile.shown(path)}:{line} {yamlfile.dotted(key)}"
    return yamlfile.shown(path)


_OF_DISTRIBUTED = {"use_megatron_lm": "distributed_type", "use_parallelism_config": "parallelism_config"}


def _deepspeed_file(path: Path, recipe: Recipe) -> Iterator[Problem]:
    """What DeepSpeed's file says against the recipe, each with its line."""
    try:
        config, lines, _ = yamlfile.read(path)  # JSON is YAML, and so each key has its line
    except RecipeError:
        config, lines = json.loads(path.read_text(encoding="utf-8")), {}
    for key in lines or {(k,): 1 for k in config}:
        name = yamlfile.dotted(key)
        value: Any = config
        for part in key:
            value = value[part]
        where = f"{yamlfile.shown(path)}:{lines.get(key, 1)} {name}"
        if name in DEEPSPEED:
            planned = DEEPSPEED[name](recipe)
            if value != "auto" and not _same(value, planned):
                yield Problem(where, f"{value}; the plan says {planned}", 'write "auto": the recipe decides')
        elif len(key) == 1 and key[0] not in HARMLESS and value not in (None, False, 0, {}, "auto"):
            found = "changes what is trained, and no plan knows of it"
            yield Problem(
                where, found, "remove it: the recipe decides (train.optim, train.lr_scheduler_type, ...)"
            )


# ---- before the first step


def differences(
    trainer: Any, recipe: Recipe, given: list[str] | None, chosen: Collection[str] = ()
) -> list[Problem]:
    """What `trainer` and its Accelerator have against what the recipe says: precision, compilation, clipping,
    accumulation, every number of `train:` but those that the plan has `chosen`; and how this machine
    multiplies. `given`: the launcher's words.
    """
    accelerator, found = trainer.accelerator, []
    pairs = [
        ("mixed_precision", accelerator.mixed_precision, precision(recipe)),
        ("dynamo_backend", accelerator.state.dynamo_plugin.backend.value, compiled(recipe)),
        *_plugins(accelerator.state, recipe),
        *(
            (key, getattr(trainer.args, key), value)
            for key, value in recipe.train.given.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in chosen
        ),
    ]
    for name, real, planned in pairs:
        if not _same(real, planned):
            key = next((s.key.split(",")[0] for s in SETTINGS if s.name == name), "")
            key = key or (f"train.{name}" if name in recipe.train.given else "train")
            said = f"{name} is {real} in the trainer; the plan says {planned}"
            found.append(Problem(recipe.at(*key.split(".")), said, _suspects(given)))
    return [*found, *_arithmetic(accelerator, recipe, given)]


def _plugins(state: Any, recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """What accelerate's plugins have, and what was planned: (name, real, planned)."""
    for name in "megatron_lm_plugin", "parallelism_config":
        yield name, getattr(state, name, None), None
    if plugin := getattr(state, "deepspeed_plugin", None):
        for key, planned in DEEPSPEED.items():
            real: Any = plugin.deepspeed_config
            for part in key.split("."):
                real = real.get(part, "auto") if isinstance(real, dict) else "auto"
            if real != "auto" and key != "train_batch_size":
                yield f"DeepSpeed's {key}", real, planned(recipe)
    if plugin := getattr(state, "fsdp_plugin", None):
        yield "fsdp_cpu_ram_efficient_loading", bool(plugin.cpu_ram_efficient_loading), False
        yield "fsdp_activation_checkpointing", bool(plugin.activation_checkpointing), False
        yield "fsdp_ignored_modules", bool(plugin.ignored_modules), False
        yield "fsdp_state_dict_type", plugin.state_dict_type.name, "FULL_STATE_DICT"


def _arithmetic(accelerator: Any, recipe: Recipe, given: list[str] | None) -> Iterator[Problem]:
    """Multiply on the device as the training will, and look at what came out: whatever set the precision.

    1 + 2^-12 is exact in float32 and comes out of a product with the identity unchanged; TF32, bfloat16 and
    float16 keep 10, 7 and 10 bits after the point and give 1.
    """
    size = 64 if accelerator.device.type == "cpu" else 1024  # TF32's kernels are for large matrices
    numbers = torch.full((size, size), 1 + 2**-12, device=accelerator.device)
    one = torch.eye(size, device=accelerator.device)
    at = recipe.at("model", "dtype")
    exact = bool((numbers @ one == numbers).all())
    if not exact and not tf32(recipe):
        found = "float32 is multiplied with fewer bits here (TF32 or bfloat16); the plan says float32"
        yield Problem(at, found, _suspects(given) + "; train.tf32: true makes TF32 part of the recipe")
    if getattr(accelerator.state, "deepspeed_plugin", None):
        return  # it casts the weights, not the operations
    with accelerator.autocast():
        real = str((numbers @ one).dtype).removeprefix("torch.")
    planned = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[precision(recipe)]
    if real != planned:
        yield Problem(at, f"the trainer multiplies in {real}; the plan says {planned}", _suspects(given))


def _suspects(given: list[str] | None) -> str:
    """Where it may come from, for what the early answer did not know of."""
    prefixes = (
        "ACCELERATE_",
        "FSDP_",
        "TORCH",
        "CUBLAS",
        "NVIDIA_",
        "ONEDNN",
        "DNNL",
        "MKL",
        "XLA_",
        "PYTORCH",
    )
    names = sorted(n for n in os.environ if n.startswith(prefixes))
    words = f"accelerate launch {' '.join(given)}" if given else ""
    return "look at " + (
        "; ".join(filter(None, (words, ", ".join(names)))) or "what this process was started by"
    )
