"""Hold generated code against the style of a repository: `lora-recipes style`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["style", *sys.argv[1:]]))
