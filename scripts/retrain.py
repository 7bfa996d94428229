"""Go on from the adapter that is deployed: `lora-recipes retrain`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["retrain", *sys.argv[1:]]))
