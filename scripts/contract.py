"""Write a contract from a checkpoint's config.json: `lora-recipes contract`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["contract", *sys.argv[1:]]))
