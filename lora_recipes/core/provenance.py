"""What training knows and adapter_config.json cannot say: `provenance.json`, beside the adapter. Imports no
torch.

It is what a merge and a live proof read: which weights the base had, how it was quantised, and what PEFT
answered at the end of training.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import write
from lora_recipes.core.yamlfile import shown

FILE = "provenance.json"


@dataclass(frozen=True)
class Probe:
    """A text as the server will see it, and the log-probability (nats) of each of its tokens but the first,
    by PEFT.

    `prompt` is a text, or messages that the chat template renders with `options`; its tokens are
    `input_ids[:prompt_tokens]`. `base` and `adapter` belong to `input_ids[1:]`.
    """

    prompt: str | list[dict[str, Any]]
    prompt_tokens: int
    input_ids: list[int]
    base: list[float]
    adapter: list[float]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """`fingerprint`: of the base's weights (weights.fingerprint), None for one that was never a folder here.
    `dtype`: of the probes.
    """

    recipe: str
    name_or_path: str
    revision: str | None
    fingerprint: str | None
    dtype: str
    quantize: str | None
    chat_template_kwargs: dict[str, Any]
    probes: list[Probe]

    def save(self, folder: Path) -> None:
        """Write provenance.json into `folder`."""
        write(folder / FILE, json.dumps(asdict(self), ensure_ascii=False) + "\n")


def read(folder: Path) -> Provenance | None:
    """The provenance beside the adapter in `folder`; None where there is none: the adapter comes from
    elsewhere.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known = Provenance(**found | {"probes": [Probe(**probe) for probe in found["probes"]]})
        if any(not len(p.base) == len(p.adapter) == len(p.input_ids) - 1 for p in known.probes):
            raise KeyError("probes of unequal lengths")
        return known
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        found = f"is not as training wrote it: {type(error).__name__}: {error}"
        raise RecipeError(
            Problem(
                shown(file),
                found,
                "copy the adapter again, or remove the file: nothing is compared with PEFT then",
            )
        ) from None
