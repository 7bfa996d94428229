"""Several adapters as one: `python scripts/combine.py a=FOLDER b=FOLDER --weights 0.7 0.3 --method linear
--name mix`.
"""

import argparse
import sys
from pathlib import Path

from lora_recipes.core import cli
from lora_recipes.core.files import ROOT


def main() -> int:
    """Parse, combine, print the figures."""
    parser = argparse.ArgumentParser(
        description="Combine adapters of one base into one that merges and serves like a trained one."
    )
    parser.add_argument("adapters", nargs="+", help="a recipe's name, an adapter folder, or name=folder")
    parser.add_argument(
        "--weights", nargs="+", type=float, required=True, help="one for each adapter, in the same order"
    )
    parser.add_argument(
        "--method",
        default="cat",
        help="combination_type of PEFT's add_weighted_adapter (default: cat, which is exact)",
    )
    parser.add_argument("--name", required=True, help="the result stands in outputs/NAME/adapter")
    parser.add_argument(
        "--density", type=float, help="share of values that ties, dare and magnitude_prune keep"
    )
    parser.add_argument(
        "--svd-rank", type=int, help="rank of the svd methods (default: the adapters' largest)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the dare methods, which drop at random (default: 0)"
    )
    parser.add_argument(
        "--outputs", type=Path, default=ROOT / "outputs", help="where the run folders are (default: outputs/)"
    )
    parser.add_argument(
        "--base", type=Path, help="folder of the base (default: the one that the adapters name)"
    )
    parser.add_argument("--force", action="store_true", help="replace a combination of that name")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    given = parser.parse_args()

    def action() -> None:
        from lora_recipes.model import combine

        asked = combine.Combination(given.weights, given.method, given.density, given.svd_rank, given.seed)
        record = combine.combine(given.adapters, asked, given.name, given.outputs, given.base, given.force)
        print(combine.report(record, given.outputs / given.name / "adapter"))

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
