"""Base against trained model: `python scripts/evaluate.py RECIPE [data.kept=FILE ...] [--adapter DIR] [--base
DIR]`.
"""

import sys
from pathlib import Path

from lora_recipes.core import cli


def main() -> int:
    """Parse, evaluate, print."""
    parser = cli.parser(
        "Ask base and trained model of a run the same: held-out loss, probes, what was forgotten,"
        " generations."
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        help="another adapter for the same base, asked on this run's data (e.g. a combination)",
    )
    parser.add_argument(
        "--base", type=Path, help="folder of the base (default: the one that the adapter names)"
    )
    given = parser.parse_args()

    def action() -> None:
        from lora_recipes.evaluation import evaluate

        print(
            evaluate.report(
                evaluate.evaluation(given.recipe, given.outputs, given.overrides, given.adapter, given.base)
            )
        )

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
