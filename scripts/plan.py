"""Show what a recipe would train: `python scripts/plan.py RECIPE [section.key=value ...] [--json] [--fit GB]
[--compare]`.
"""

import json
import sys

from lora_recipes.core import cli
from lora_recipes.recipe import layout, load
from lora_recipes.recipe.base import resolve


def main() -> int:
    """Parse, check the recipe before anything slow is imported, plan."""
    parser = cli.parser("Show what a recipe would train, without weights or GPU.")
    parser.add_argument(
        "--devices",
        type=int,
        choices=range(1, 4097),
        metavar="N",
        help="number of processes to plan for (default: 1, or as --accelerate says)",
    )
    parser.add_argument(
        "--accelerate", metavar="NAME", help="plan for this file of configs/accelerate/ (or a path)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--fit",
        type=float,
        metavar="GB",
        help="which settings fit a card of GB x 10^9 bytes, fastest first, instead",
    )
    parser.add_argument(
        "--compare", action="store_true", help="the memory of full fine-tuning, LoRA and QLoRA, instead"
    )
    given = parser.parse_args()

    def action() -> None:
        resolved = resolve(load.load(given.recipe, given.overrides), given.outputs)
        from lora_recipes.memory import choices, fits
        from lora_recipes.planning import plan

        chosen = layout.of(given.devices or 1)
        if given.accelerate:
            from lora_recipes.training import launch

            chosen = launch.wanted([*launch.words(given.accelerate, given.devices), "scripts/train.py"])
        made = plan.make(resolved, chosen)
        if given.compare:
            print("\n".join(fits.comparison(choices.compare(resolved, made.gate))))
        if given.fit:
            print("\n".join(fits.table(choices.fit(resolved, given.fit, made.gate), given.fit)))
        if given.compare or given.fit:
            return
        plan.beside_lora(made, resolved, plan.add_memory(made, resolved))
        print(
            json.dumps(made.facts | {"warnings": made.warnings}, indent=2, ensure_ascii=False)
            if given.json
            else made.text()
        )

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
