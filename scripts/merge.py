"""Merge an adapter into its base, verified: `python scripts/merge.py RECIPE|ADAPTER_FOLDER [--base DIR]
[--dtype float32] [--force]`.
"""

import argparse
import sys
from pathlib import Path

from lora_recipes.core import cli
from lora_recipes.core.files import ROOT


def main() -> int:
    """Parse, merge, print the figures."""
    parser = argparse.ArgumentParser(description="Merge an adapter into its base and verify the result.")
    parser.add_argument(
        "adapter",
        nargs="?",
        default=cli.DEFAULT,
        help=f"a recipe's name, or an adapter folder (default: {cli.DEFAULT})",
    )
    parser.add_argument(
        "--outputs", type=Path, default=ROOT / "outputs", help="where the run folders are (default: outputs/)"
    )
    parser.add_argument(
        "--base", type=Path, help="folder of the base (default: the one in adapter_config.json)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="dtype to merge and save in (default: the base's)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the merged model (default: merged/ beside adapter/, else NAME.merged)",
    )
    parser.add_argument("--force", action="store_true", help="replace a merged model that is already there")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    given = parser.parse_args()

    def action() -> None:
        from lora_recipes.core import locate
        from lora_recipes.model import merge

        is_folder = "/" in given.adapter or (Path(given.adapter) / "adapter_config.json").is_file()
        folder = (
            Path(given.adapter).absolute()
            if is_folder
            else locate.run_folder(given.adapter, given.outputs).result("lora")
        )
        output = given.output or folder.with_name(
            "merged" if folder.name == "adapter" else f"{folder.name}.merged"
        )
        record = merge.merge(folder, output, given.base, given.dtype, given.force)
        print(merge.report(record, output))

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
