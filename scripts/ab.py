"""Two models on a server, blind: which answers better: `lora-recipes ab`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["ab", *sys.argv[1:]]))
