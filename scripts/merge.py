"""Merge an adapter into its base, verified: `lora-recipes merge`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
