"""Write recipe.schema.json and sections.py anew from the installed peft and trl: `make schema`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lora_recipes.recipe import schema, typed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check, room, made = parser.parse_args().check, Path(schema.__file__).parent, schema.recipe_schema()
    texts = {
        "recipe.schema.json": json.dumps(made, indent=1) + "\n",
        "sections.py": formatted(typed.source(made)),
    }
    stale = [name for name, text in texts.items() if (room / name).read_text(encoding="ascii") != text]
    if check:
        print(f"stale: {', '.join(stale)}: run `make schema`" if stale else "the schema is current")
        return 1 if stale else 0
    for name in stale:
        (room / name).write_text(texts[name], encoding="ascii")
    print(f"wrote {', '.join(stale)}" if stale else "the schema is current")
    return 0


def formatted(source: str) -> str:
    """As `ruff format` leaves it."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "sections.py", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
