"""Release an adapter: `lora-recipes release`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["release", *sys.argv[1:]]))
