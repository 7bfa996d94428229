"""Train a recipe: `python scripts/train.py RECIPE [section.key=value ...] [--resume] [--force] [--accelerate
NAME]`.
"""

import sys

from lora_recipes.core import cli
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.recipe import load
from lora_recipes.recipe.base import resolve


def main() -> int:
    """Parse, check the recipe before anything slow is imported, train."""
    parser = cli.parser("Train a recipe into outputs/<name>/.")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    parser.add_argument("--force", action="store_true", help="replace a run that is already there")
    parser.add_argument(
        "--accelerate",
        metavar="NAME",
        help="a file of configs/accelerate/ (or a path): start several processes",
    )
    parser.add_argument(
        "--processes", type=int, help="how many (default: as the file says, else one for each GPU)"
    )
    parser.add_argument("--launch", default="", help="more options of `accelerate launch`")
    given = parser.parse_args()

    def action() -> int | None:
        checked = load.load(given.recipe, given.overrides)
        if given.accelerate:
            from lora_recipes.training import launch

            flags = [f"--{name}" for name in ("resume", "force", "traceback") if getattr(given, name)]
            script = [__file__, given.recipe, *given.overrides, "--outputs", str(given.outputs), *flags]
            words = launch.words(given.accelerate, given.processes, given.launch)
            return launch.start(words, script, checked, RunFolder(given.outputs / checked.name))
        from lora_recipes.training.train import train

        train(resolve(checked, given.outputs), given.resume, given.force)
        return None

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
