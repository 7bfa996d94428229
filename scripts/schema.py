"""Write recipe.schema.json anew from the installed peft and trl, and docs/run_json.md: `make schema`."""

import json
from pathlib import Path

from lora_recipes.core import record
from lora_recipes.core.files import ROOT
from lora_recipes.recipe import schema

if __name__ == "__main__":
    path = Path(schema.__file__).with_name("recipe.schema.json")
    path.write_text(json.dumps(schema.recipe_schema(), indent=1) + "\n", encoding="ascii")
    print(f"wrote {path.name}: {path.stat().st_size:,} bytes")
    docs = ROOT / "docs" / "run_json.md"
    docs.write_text(record.page(), encoding="utf-8")
    print(f"wrote docs/{docs.name}")
