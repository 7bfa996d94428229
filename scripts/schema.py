"""Write recipe.schema.json and sections.py anew from the installed peft and trl: `make schema`."""

import json
import subprocess
import sys
from pathlib import Path

from lora_recipes.recipe import schema, typed

if __name__ == "__main__":
    room, made = Path(schema.__file__).parent, schema.recipe_schema()
    (room / "recipe.schema.json").write_text(json.dumps(made, indent=1) + "\n", encoding="ascii")
    (room / "sections.py").write_text(typed.source(made), encoding="ascii")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", room / "sections.py"], check=True)
    print(f"wrote recipe.schema.json and sections.py in {room.name}/")
