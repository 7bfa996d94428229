"""What training knows and adapter_config.json cannot say: `provenance.json`, beside the adapter. Imports no
torch.

It is what a merge and a live proof read: which weights the base had, how it was quantised, what PEFT answered
at the end of training, and the hashes of the files that were saved.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import sha256, write
from lora_recipes.core.yamlfile import shown

FILE = "provenance.json"
CONFIG = "adapter_config.json"
# What a person writes anew when a base moves. Which base it is, the fingerprint of its weights says.
WHERE = ("base_model_name_or_path", "revision")


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
class Question:
    """A chat question of the rows, and what PEFT's greedy answer to it came to at the end of training.

    `ended`: tokens until it ended by itself, the end included; None where `asked` tokens did not suffice.
    `room`: the most that a server may be asked for.
    """

    prompt: list[dict[str, Any]]
    options: dict[str, Any]
    asked: int
    ended: int | None
    room: int


@dataclass(frozen=True)
class Called:
    """A text as a classifier saw it, and the log-probability (nats) of each of its classes by PEFT at the end
    of training: `adapter`, and `base` by the trained head on the base alone.
    """

    text: str
    input_ids: list[int]
    base: list[float]
    adapter: list[float]


@dataclass(frozen=True)
class Provenance:
    """`fingerprint`: of the base's weights (weights.fingerprint), None for one that was never a folder here.
    `dtype`: of the probes. `files`: SHA-256 of each file that was saved beside it; `adapter_config`: what
    that file said. Both are empty where the version that trained did not record them yet. `stops`: the tokens
    that ended a reply in training, by id; `stop_text`: what ended it where that was no token. `question`:
    None where no reply was trained, or training could not ask. `unproven`: of a combination, the adapters in
    it that were not proven, and what of each was not. `called`: of a classifier, in place of probes. `apart`:
    of a merged model, how far its own answers, as transformers computes them in the dtype in which it is
    stored, are from these (mean absolute difference, nats).
    """

    recipe: str
    name_or_path: str
    revision: str | None
    fingerprint: str | None
    dtype: str
    quantize: str | None
    chat_template_kwargs: dict[str, Any]
    probes: list[Probe]
    stops: dict[int, str] = field(default_factory=dict)
    stop_text: str | None = None
    question: Question | None = None
    files: dict[str, str] = field(default_factory=dict)
    adapter_config: dict[str, Any] = field(default_factory=dict)
    unproven: dict[str, str] = field(default_factory=dict)
    called: list[Called] = field(default_factory=list)
    apart: float = 0.0

    @property
    def made_of(self) -> str:
        """Which of the adapters in a combination were not proven, for a person."""
        return f"it was combined of adapters that were not proven: {', '.join(self.unproven)}"

    def sealed(self, folder: Path) -> "Provenance":
        """With the hashes of the files in `folder`, so that a later edit of one is named. The model card is
        not among them: people write in it.
        """
        files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file()}
        for name in ("README.md", FILE, CONFIG):
            files.pop(name, None)
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return replace(self, files=files, adapter_config=said)

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
        typed: dict[str, Any] = {"probes": [Probe(**probe) for probe in found["probes"]]}
        typed["stops"] = {int(i): token for i, token in found.get("stops", {}).items()}
        typed["called"] = [Called(**called) for called in found.get("called", [])]
        typed["question"] = Question(**found["question"]) if found.get("question") else None
        known = Provenance(**found | typed)
        if any(not len(p.base) == len(p.adapter) == len(p.input_ids) - 1 for p in known.probes):
            raise KeyError("probes of unequal lengths")
        if any(len(c.base) != len(c.adapter) for c in known.called):
            raise KeyError("classes of unequal number")
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


def edited(folder: Path, known: Provenance) -> list[Problem]:
    """Each file in `folder` that is not as it was saved there; of adapter_config.json the keys, and what they
    were.
    """
    do = f"copy the adapter again; if the change is meant, remove {FILE}: then nothing is proven of it"
    found = []
    for name, hashed in known.files.items():
        if not (folder / name).is_file():
            found.append(Problem(shown(folder / name), "was saved by training and is missing", do))
        elif sha256(folder / name) != hashed:
            found.append(
                Problem(shown(folder / name), "was changed after training (its hash is another)", do)
            )
    if known.adapter_config:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        free = WHERE if known.fingerprint else ()
        for key in sorted((set(said) | set(known.adapter_config)) - set(free)):
            now, then = said.get(key), known.adapter_config.get(key)
            if now != then:
                where = f"{shown(folder / CONFIG)} {key}"
                found.append(Problem(where, f"is {now!r}, training wrote {then!r}", do))
    return found


def not_proven(
    folder: Path,
    known: Provenance | None,
    asked: bool,
    does: str,
    only_hashes: bool = False,
    looked_at: str = "names, ranks and shapes fit",
) -> list[str]:
    """What cannot be said of the adapter in `folder`, for a person, where `known` says too little.

    RecipeError where nobody `asked` for what is not proven: there is no provenance at all, or it is a
    combination of adapters that were not proven, or it came without hashes and `only_hashes` would tell a
    change here. `does` is what would be done with it, `looked_at` what was seen of it nevertheless.
    """
    found, do = [], ""
    if known is None:
        do = f"copy the adapter with its {FILE}"
        found.append(
            f"no {FILE} beside it: that nothing was changed since training, and that this is its base,"
            f" is not proven; {looked_at}, no more"
        )
    elif known.unproven:
        do = "combine adapters that are proven"
        found.append(known.made_of)
    if known and not known.files:
        do = do or ("train it anew with this version" if only_hashes else "")
        found.append(
            f"{FILE} is of an earlier version, without hashes: a change since training that hardly moves the"
            " answers is not seen"
        )
    if do and not asked:
        do = f"{do}, or {cli.command(UNPROVEN=True)} {does} it as it is"
        raise RecipeError(Problem(shown(folder), "; ".join(found), do))
    return found
