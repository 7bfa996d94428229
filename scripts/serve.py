"""Serve adapters in vLLM, proven live: `python scripts/serve.py [RECIPE|FOLDER|name=FOLDER ...] [--dry-run]
[-- vLLM options]`.
"""

import argparse
import sys
from pathlib import Path

from lora_recipes.core import cli
from lora_recipes.core.files import ROOT


def arguments() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = argparse.ArgumentParser(
        description="Check adapters, start vLLM, prove that they are live, stay up.",
        epilog="after --: vLLM's own",
    )
    parser.add_argument(
        "what",
        nargs="*",
        help=f"a recipe's name, a folder (adapter or whole model), or name=folder (default: {cli.DEFAULT})",
    )
    parser.add_argument(
        "--outputs", type=Path, default=ROOT / "outputs", help="where the run folders are (default: outputs/)"
    )
    parser.add_argument(
        "--base", type=Path, help="folder of the base (default: the one in adapter_config.json)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--max-lora-rank", type=int, help="(default: the smallest that fits)")
    parser.add_argument("--dtype", help="(default: the base's)")
    parser.add_argument(
        "--dynamic", action="store_true", help="let adapters be added and removed while it runs"
    )
    deeds = parser.add_mutually_exclusive_group()
    deeds.add_argument(
        "--dry-run",
        action="store_true",
        help="the checks, the exported adapter and the vLLM command; nothing is started",
    )
    deeds.add_argument(
        "--check", metavar="URL", help="prove the adapters on a server that runs (default: all that it has)"
    )
    deeds.add_argument(
        "--add", metavar="URL", help="add the adapters to a server that runs with --dynamic, proven"
    )
    deeds.add_argument("--remove", metavar="URL", help="remove the adapters (names) from it")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def main() -> int:
    """Parse, then serve, check, add or remove."""
    words = sys.argv[1:]
    own, extra = (
        (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    )
    given = arguments().parse_args(own)

    def action() -> int:
        from lora_recipes.serving import serve
        from lora_recipes.serving.command import Options

        if given.check:
            return serve.check(given.check, given.what, given.outputs)
        if given.add:
            return serve.add(given.add, given.what or [cli.DEFAULT], given.outputs)
        if given.remove:
            return serve.remove(given.remove, given.what)
        options = Options(
            given.host, given.port, given.max_lora_rank, given.dtype, given.dynamic, extra, given.outputs
        )
        return serve.serve(given.what or [cli.DEFAULT], given.outputs, given.base, options, given.dry_run)

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
