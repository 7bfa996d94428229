"""pass@k of base and adapter on a running server: `lora-recipes passk`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["passk", *sys.argv[1:]]))
