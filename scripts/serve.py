"""Serve adapters in vLLM, proven live: `lora-recipes serve`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
