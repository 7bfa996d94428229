"""Write lora_recipes/recipe/recipe.schema.json anew from the installed peft and trl: `make schema`."""

import argparse
import json
import sys
from pathlib import Path

from lora_recipes.recipe import schema


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is stale")
    path = Path(schema.__file__).with_name("recipe.schema.json")
    made = json.dumps(schema.recipe_schema(), indent=1) + "\n"
    if parser.parse_args().check:
        current = path.is_file() and path.read_text(encoding="ascii") == made
        print(f"{path.name} is current" if current else f"{path.name} is stale: run `make schema`")
        return 0 if current else 1
    path.write_text(made, encoding="ascii")
    print(f"wrote {path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
