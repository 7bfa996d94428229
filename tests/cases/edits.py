"""What happens to adapter folders after training: each edit, and the words by which it must be named."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Edit:
    """`make` edits a folder; `said` is in the refusal; `moves`: does PEFT answer otherwise then?"""

    make: Callable[[Path], None]
    said: str
    moves: bool = True


def config(**changes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return make


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file({name: tensor.contiguous() for name, tensor in change(found).items()}, file)

    return make


def one_byte(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def exchanged(one: str, two: str, kind: str) -> Callable[[Tensors], Tensors]:
    """The tensors of `kind` (lora_A) of modules that differ in `one` for `two` change places."""

    def change(found: Tensors) -> Tensors:
        swap = {one: two, two: one}
        either = f"{re.escape(one)}|{re.escape(two)}"
        names = {n: re.sub(either, lambda m: swap[m[0]], n) if kind in n else n for n in found}
        return {n: found[names[n]] for n in found}

    return change


def negative(found: Tensors) -> Tensors:
    return {n: -t if "lora_B" in n else t for n, t in found.items()}


def other_start(found: Tensors) -> Tensors:
    """A of another run, B of this one."""
    torch.manual_seed(1)
    return {n: torch.randn_like(t) if "lora_A" in n else t for n, t in found.items()}


FILE = r"adapter_model\.safetensors: was changed after training"
EDITS: dict[str, Edit] = {
    "lora_alpha": Edit(config(lora_alpha=64), "lora_alpha: is 64, training wrote 4"),
    "lora_alpha, a little": Edit(config(lora_alpha=4.5), "lora_alpha: is 4.5, training wrote 4"),
    "use_rslora": Edit(config(use_rslora=True), "use_rslora: is True, training wrote False"),
    # PEFT sets it back, with a warning, where the layer is a Linear
    "fan_in_fan_out": Edit(config(fan_in_fan_out=True), "fan_in_fan_out: is True", moves=False),
    "alpha_pattern": Edit(config(alpha_pattern={"q_proj": 99, "v_proj": 99}), "alpha_pattern: is"),
    "one byte": Edit(one_byte, FILE, moves=False),
    "sign of B": Edit(tensors(negative), FILE),
    "k and v": Edit(tensors(exchanged("k_proj", "v_proj", "lora_")), FILE),
    "A of another layer": Edit(tensors(exchanged("layers.0.", "layers.1.", "lora_A")), FILE),
    "A of another run": Edit(tensors(other_start), FILE),
    "bfloat16": Edit(tensors(lambda t: {n: x.bfloat16() for n, x in t.items()}), FILE, moves=False),
    "a tokenizer cut short": Edit(
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"tokenizer\.json: was saved by training and is miss",
    ),
}
# Faults of the file itself: named also where there is no provenance to compare with.
BROKEN: dict[str, Edit] = {
    "float8": Edit(tensors(lambda t: {n: x.to(torch.float8_e4m3fn) for n, x in t.items()}), "F8_E4M3"),
    "a missing A": Edit(
        tensors(lambda t: {n: x for n, x in t.items() if n != next(k for k in t if "lora_A" in k)}),
        "A or B is missing",
    ),
    "a missing prefix": Edit(
        tensors(lambda t: {n.removeprefix("base_model.model."): x for n, x in t.items()}), "no LoRA tensor"
    ),
    "every B zero": Edit(
        tensors(lambda t: {n: x * ("lora_B" not in n) for n, x in t.items()}), "every lora_B is zero"
    ),
    "not a number": Edit(
        tensors(lambda t: {n: x / 0 if "lora_B" in n else x for n, x in t.items()}), "NaN or infinity"
    ),
}
