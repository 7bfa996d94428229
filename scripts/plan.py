"""Show what a recipe would train: `python scripts/plan.py RECIPE [section.key=value ...] [--json] [--fit GB]
[--compare]`.
"""

import json
import sys

from lora_recipes.core import cli, record
from lora_recipes.recipe import recipe


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
        checked = recipe.load(given.recipe, given.overrides)
        from lora_recipes.memory import choices, fits
        from lora_recipes.planning import plan, processes

        chosen = processes.of(given.devices or 1)
        if given.accelerate:
            from lora_recipes.training import launch

            chosen = launch.wanted([*launch.words(given.accelerate, given.devices), "scripts/train.py"])
        made = plan.make(checked, given.outputs, chosen)
        if given.compare:
            print("\n".join(fits.comparison(choices.compare(checked, given.outputs, made.gate))))
        if given.fit:
            print("\n".join(fits.table(choices.fit(checked, given.outputs, given.fit, made.gate), given.fit)))
        if given.compare or given.fit:
            return
        plan.beside_lora(made, checked, given.outputs, plan.add_memory(made, checked, given.outputs))
        print(
            json.dumps(record.plain(made.facts) | {"warnings": made.warnings}, indent=2, ensure_ascii=False)
            if given.json
            else made.text()
        )

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
