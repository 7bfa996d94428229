"""Keep and look at what is answered: `lora-recipes monitor`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["monitor", *sys.argv[1:]]))
