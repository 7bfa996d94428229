"""Make a data set: `lora-recipes data`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
