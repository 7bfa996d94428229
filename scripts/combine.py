"""Combine several adapters into one: `lora-recipes combine`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["combine", *sys.argv[1:]]))
