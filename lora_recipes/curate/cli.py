"""`lora-recipes data VERB IN... OUT`: the verbs of this room, each a file with its options and its deed."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Protocol

from lora_recipes.core import cli
from lora_recipes.core.errors import nearest
from lora_recipes.curate import (
    convert,
    dedupe,
    extract,
    filter,
    mix,
    review,
    secrets,
    split,
    synthesise,
    tokens,
)


class Verb(Protocol):
    """A file of a verb."""

    TOLD: str  # what it does, in one sentence; what else is to know, after an empty line

    def options(self, parser: ArgumentParser) -> None:
        """Declare its words and options."""

    def run(self, given: Namespace) -> str:
        """Do it; what to print. `given.verb` is its name."""


VERBS: dict[str, Verb] = {
    "convert": convert,
    "dedupe": dedupe,
    "extract": extract,
    "filter": filter,
    "mix": mix,
    "review": review,
    "secrets": secrets,
    "split": split,
    "synthesise": synthesise,
    "tokens": tokens,
}
HELP = "lora-recipes data VERB --help tells the options of a verb; docs/curate.md what each does and keeps."


def main(words: Sequence[str]) -> int:
    """Parse the verb and its words, act, and return the exit code."""
    top = ArgumentParser(
        prog="lora-recipes data",
        description="Make a data set: convert, clean, compare, mix, split and synthesise files of rows.",
        epilog=HELP,
    )
    shared = ArgumentParser(add_help=False)
    shared.add_argument("--traceback", action="store_true", help="show where an error was raised")
    top.add_argument("--traceback", action="store_true", help="show where an error was raised")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, verb in VERBS.items():
        first = verb.TOLD.split("\n\n")[0]
        parser = verbs.add_parser(
            name,
            help=first[0].lower() + first[1:].rstrip("."),
            description=verb.TOLD,
            formatter_class=RawDescriptionHelpFormatter,
            parents=[shared],
        )
        verb.options(parser)
    name, *rest = words or ["--help"]
    if name not in VERBS:
        if not name.startswith("-"):
            top.error(
                f"there is no {name!r}: did you mean {nearest(name, VERBS)}? They are {', '.join(VERBS)}"
            )
        top.parse_args([name, *rest])  # --help ends here
    given = verbs.choices[name].parse_intermixed_args(rest)
    given.verb = name

    def act() -> None:
        print(VERBS[name].run(given))

    return cli.run(act, given.traceback, getattr(given, "out", None))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
