"""Train a recipe: `python scripts/train.py RECIPE [section.key=value ...] [--resume] [--force]`, or under `accelerate launch`."""

import sys

from lora_recipes import cli, recipe


def main() -> int:
    """Parse, check the recipe before anything slow is imported, train."""
    parser = cli.parser("Train a recipe into outputs/<name>/.")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    parser.add_argument("--force", action="store_true", help="replace a run that is already there")
    given = parser.parse_args()

    def action() -> None:
        checked = recipe.load(given.recipe, given.overrides)
        from lora_recipes.train import train

        train(checked, given.outputs, given.resume, given.force)

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
