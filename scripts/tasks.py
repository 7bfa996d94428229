"""Write a repository's own tasks for pass@k: `lora-recipes tasks`."""

import sys

from lora_recipes.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["tasks", *sys.argv[1:]]))
