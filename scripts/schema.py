"""Write lora_recipes/recipe/recipe.schema.json anew from the installed peft and trl: `make schema`."""

import json
from pathlib import Path

from lora_recipes.recipe import schema

if __name__ == "__main__":
    path = Path(schema.__file__).with_name("recipe.schema.json")
    path.write_text(json.dumps(schema.recipe_schema(), indent=1) + "\n", encoding="ascii")
    print(f"wrote {path.name}: {path.stat().st_size:,} bytes")
