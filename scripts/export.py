"""A merged model in fewer bits, and what that lost: `lora-recipes export`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
