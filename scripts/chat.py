"""Ask base and adapter on a running server side by side: `lora-recipes chat`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
