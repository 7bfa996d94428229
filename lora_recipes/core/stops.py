"""Where a reply stops, as files say it: `eos_token_id` of generation_config.json, which transformers and vLLM
both read. Imports no torch.
"""

import json
from pathlib import Path
from typing import Any

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import write
from lora_recipes.core.yamlfile import shown

FILE = "generation_config.json"


def settings(folder: Path) -> dict[str, Any]:
    """What generation_config.json in `folder` says; empty where there is none. RecipeError for broken
    JSON.
    """
    return _json(folder / FILE)


def ids(eos: Any) -> list[int]:
    """An `eos_token_id` (null, one, or several) as a list of token ids."""
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def of(folder: Path) -> list[int]:
    """The token ids at which a reply of the model or adapter in `folder` stops, as its generation_config.json
    says it, or the config.json of a model; empty where nothing is said.
    """
    config = _json(folder / "config.json")
    text = config.get("text_config") or config
    said = [settings(folder).get("eos_token_id"), config.get("eos_token_id"), text.get("eos_token_id")]
    return next((found for eos in said if (found := ids(eos))), [])


def token_id(token: str, *folders: Path) -> int | None:
    """The id of an added token, by the first tokenizer.json in `folders` that has it."""
    for folder in folders:
        for added in _json(folder / "tokenizer.json").get("added_tokens") or []:
            if added.get("content") == token:
                return int(added["id"])
    return None


def of_adapter(folder: Path, base: Path) -> list[int]:
    """As `of`; for an adapter from elsewhere the end that its own tokenizer names."""
    if found := of(folder):
        return found
    eos = _json(folder / "tokenizer_config.json").get("eos_token")
    token = eos.get("content") if isinstance(eos, dict) else eos
    found_id = token_id(token, folder, base) if token else None
    return [] if found_id is None else [found_id]


def save(folder: Path, said: dict[str, Any], stops: list[int]) -> None:
    """Write generation_config.json into `folder`: `said`, with replies that stop at `stops`.

    As JSON, not by GenerationConfig: that one refuses to save many published files (a temperature beside
    do_sample: false).
    """
    # Where it says so, transformers may take the model's config.json instead.
    said = {key: value for key, value in said.items() if key != "_from_model_config"}
    eos = {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    write(folder / FILE, json.dumps(said | eos, indent=2) + "\n")


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(Problem(shown(file), f"broken JSON: {error}", "copy the file again")) from None
    return found if isinstance(found, dict) else {}
