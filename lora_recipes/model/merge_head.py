"""What a merge of a classifier has beside that of a language model (model/merge.py): the class that other
programs load it as, its labels, and what they do not know of it.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.head import Head
from lora_recipes.core.yamlfile import shown
from lora_recipes.data.labels import padded
from lora_recipes.model import heads
from lora_recipes.recipe.base import Folder


def fits(adapter: Path, source: Path) -> None:
    """RecipeError where no other program would load the classifier in `adapter` merged into the base in
    `source`.
    """
    if heads.loaded_as(Folder(source).real_config().get_text_config()) is None:
        found = "transformers has no class for sequence classification of this family: none would load it"
        do = "use the adapter as it is: lora-recipes predict"
        raise RecipeError(Problem(shown(adapter), found, do))


def seal(target: Path, head: Head, tokenizer: Any) -> str:
    """Name the class in the config of the merged model in `target`, and write labels.json beside it; the name
    of that class.
    """
    name = heads.loaded_as(AutoConfig.from_pretrained(target, trust_remote_code=False))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert name, "fits() was asked first"
    config |= {"architectures": [name], "pad_token_id": padded(tokenizer).pad_token_id}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    head.save(target)
    return name


def notes(record: dict[str, Any]) -> list[str]:
    """What merge.json says of a classifier, for a person; nothing of another model."""
    if "labels" not in record:
        return []
    said = [f"{len(record['labels'])} classes, pooling {record['pooling']}"]
    if record["pooling"] == "mean":
        said.append(
            "NOTE        AutoModelForSequenceClassification loads it and pools the last token, as its class"
            " does: other answers. lora-recipes predict and serve pool as it was trained"
        )
    return said
