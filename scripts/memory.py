"""Llama-2 in full, by LoRA and by QLoRA: predicted peak memory beside the figures of the documents: `python
scripts/memory.py`.
"""

import argparse
import sys
from pathlib import Path

from lora_recipes.core import cli
from lora_recipes.recipe import load
from lora_recipes.recipe.base import resolve

# (recipe, method of choices.compare) -> what the chapter on LLM fine-tuning says, GB, and why ours is another
# figure
DOCUMENTS = {
    ("llama2_7b_lora", "full"): (
        114,
        (
            "the document keeps Adam's two states in float32 (56 GB; torch keeps them in the weights'"
            " bfloat16) and 30 GB of activations (checkpointing keeps a layer's input, and TRL builds no"
            " logits)"
        ),
    ),
    ("llama2_7b_lora", "LoRA"): (
        35,
        "the document leaves room for 20 GB of activations; with checkpointing they are a tenth of it",
    ),
    ("llama2_7b_lora", "QLoRA"): (
        12,
        "the same: base, adapter and states agree, activations are those of checkpointed layers",
    ),
    ("llama2_13b_qlora", "QLoRA"): (
        18,
        "the same; and the optimiser's state is paged, so that it does not count here",
    ),
}


def main() -> int:
    """Rehearse, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()

    def action() -> None:
        from lora_recipes.memory import choices, fits

        print(f"{'recipe':<18}{'method':<8}{'predicted GB':>13}{'document GB':>13}  parts, GB")
        for name in dict.fromkeys(name for name, _ in DOCUMENTS):
            for method, memory in choices.compare(resolve(load.load(name), Path("outputs"))).items():
                document, why = DOCUMENTS.get((name, method), ("-", ""))
                parts = ", ".join(
                    f"{part} {size / 1e9:.1f}" for part, size in memory.parts.items() if size >= 5e7
                )
                least = f" (at least: {memory.unknown})" if memory.unknown else ""
                print(f"{name:<18}{method:<8}{memory.peak_bytes / 1e9:>13.1f}{document:>13}  {parts}{least}")
                print(
                    *(f"{'':<26}{line}" for line in (why, *memory.notes) if line),
                    sep="\n",
                    end="\n" if why or memory.notes else "",
                )
        print(
            f"\nfor a process add its reserve (x {fits.RESERVED_MEDIAN:.3f} to {fits.RESERVED_WORST:.3f})"
            " and its CUDA context (141 MiB on a T4)"
        )

    return cli.run(action, False)


if __name__ == "__main__":
    sys.exit(main())
