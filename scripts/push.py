"""Publish an adapter on the Hugging Face Hub: `lora-recipes push`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
