"""Show what a recipe would train: `python scripts/plan.py RECIPE [section.key=value ...] [--json]`."""

import json
import sys

from lora_recipes import cli, recipe


def main() -> int:
    """Parse, check the recipe before anything slow is imported, plan."""
    parser = cli.parser("Show what a recipe would train, without weights or GPU.")
    parser.add_argument(
        "--devices", type=int, choices=range(1, 4097), metavar="N", default=1, help="number of processes to plan for (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    given = parser.parse_args()

    def action() -> None:
        checked = recipe.load(given.recipe, given.overrides)
        from lora_recipes import plan

        made = plan.make(checked, given.outputs, given.devices)
        print(json.dumps(made.facts | {"warnings": made.warnings}, indent=2, ensure_ascii=False) if given.json else made.text())

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
