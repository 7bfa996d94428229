"""Run an ablation: `python scripts/ablate.py NAME [--jobs N] [--dry-run]`, or RECIPE section.key=value,value
... for the quick case.
"""

import argparse
import sys
from pathlib import Path

from lora_recipes.ablation import spec
from lora_recipes.ablation.cluster import ENGINES
from lora_recipes.core import cli
from lora_recipes.core.files import ROOT

cli.quiet()  # here, because the processes that train import this file first


def main() -> int:
    """Parse, check every arm before anything slow is imported, run."""
    parser = argparse.ArgumentParser(description="Train every arm of an ablation, and report.")
    parser.add_argument("name", help="a name in configs/ablations/, or a path; with values to try: a recipe")
    parser.add_argument("over", nargs="*", metavar="section.key=value,value", help="e.g. lora.r=2,4,8")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[], help="of the quick case (default: the recipe's own, once)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        choices=range(1, 65),
        metavar="N",
        help="processes at once (default: one for each GPU, or 1)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ARM[/sSEED]", help="these runs alone, without a report"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--on", choices=ENGINES, help="write files that train each run as a job of its own, and start none"
    )
    either.add_argument("--dry-run", action="store_true", help="plan every arm, train none")
    either.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--force", action="store_true", help="train finished runs anew too")
    parser.add_argument(
        "--outputs", type=Path, default=ROOT / "outputs", help="where the run folders are (default: outputs/)"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    given = parser.parse_args()

    def action() -> int:
        checked = spec.quick(given.name, given.over, given.seeds) if given.over else spec.load(given.name)
        if given.report:
            from lora_recipes.ablation import report

            print(report.write(checked.folder(given.outputs)))
            return 0
        from lora_recipes.ablation.ablate import ablate, spread

        if given.on:
            seeds = ["--seeds", *map(str, given.seeds)] if given.seeds else []
            print(spread(checked, given.outputs, given.on, [given.name, *given.over, *seeds], given.only))
            return 0
        return int(ablate(checked, given.outputs, given.jobs, given.only, given.dry_run, given.force) > 0)

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
