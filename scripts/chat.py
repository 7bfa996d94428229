"""Ask base and adapter on a running server side by side: `python scripts/chat.py MODEL [--ask QUESTION]
[--url URL]`.
"""

import argparse
import sys

from lora_recipes.core import cli


def main() -> int:
    """Parse, ask, print."""
    parser = argparse.ArgumentParser(description="Ask base and adapter on a running server side by side.")
    parser.add_argument(
        "model",
        nargs="?",
        default=cli.DEFAULT,
        help=f"the adapter's name on the server (default: {cli.DEFAULT})",
    )
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="QUESTION",
        help="may be given more than once (default: its probes)",
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    given = parser.parse_args()

    def action() -> None:
        from lora_recipes.serving.chat import chat

        print(chat(given.url, given.model, given.ask))

    return cli.run(action, given.traceback)


if __name__ == "__main__":
    sys.exit(main())
