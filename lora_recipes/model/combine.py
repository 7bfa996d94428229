"""Several adapters as one: `make combine`. PEFT's add_weighted_adapter into an adapter that merges and serves
like a trained one, proven.

Which methods there are, and what each needs, is PEFT's (peft/tuners/lora/model.py); what it lets pass in
silence is refused here.
"""

import dataclasses
import math
import re
import shutil
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import cli, environment, locate, lock, provenance, stops
from lora_recipes.core import safetensors as weights
from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError, nearest, raise_if
from lora_recipes.core.files import now, replace_folder
from lora_recipes.core.provenance import Probe, Provenance
from lora_recipes.core.record import Combined, CombinedRecord
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.model import answers, attach
from lora_recipes.recipe import load as recipes
from lora_recipes.serving import export, rules
from lora_recipes.serving.live import GENERAL

# Task arithmetic scales by 0.3 to 1 (arXiv 2212.04089); extrapolation goes a little beyond.
USUAL_WEIGHT = 3
METHODS = typing.get_args(typing.get_type_hints(LoraModel.add_weighted_adapter)["combination_type"])
ONE_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # these add A to A and B to B
EXACT = 1e-5  # relative: what float32 may lose in a sum of deltas or a singular value decomposition
RELOADED = 1e-4  # largest logit difference between the combined model and the saved adapter on a fresh base


@dataclass(frozen=True)
class Combination:
    """What is asked: add_weighted_adapter's arguments under its own names, and the `seed` of the methods that
    drop at random.
    """

    weights: list[float]
    combination_type: str
    density: float | None = None
    svd_rank: int | None = None
    seed: int = 0

    def problems(self, count: int) -> list[Problem]:
        """What PEFT would not understand, or understand otherwise, for `count` adapters."""
        found, kind = [], self.combination_type
        if len(self.weights) != count:
            found.append(
                Problem(
                    cli.command(WEIGHTS=""),
                    f"{len(self.weights)} weights for {count} adapters",
                    "one each, in the same order",
                )
            )
        if bad := [w for w in self.weights if not math.isfinite(w) or w == 0]:
            found.append(
                Problem(
                    cli.command(WEIGHTS=""),
                    f"{bad[0]:g} is no weight",
                    "a number other than 0; leave the adapter out instead",
                )
            )
        if kind not in METHODS:
            return [
                *found,
                Problem(
                    cli.command(METHOD=""),
                    f"PEFT has no {kind!r}",
                    f"did you mean {nearest(kind, METHODS)}? One of {', '.join(METHODS)}",
                ),
            ]
        if count == 1 and kind != "linear":
            found.append(
                Problem(
                    cli.command(METHOD=""),
                    f"PEFT takes linear for a single adapter, whatever is asked, not {kind}",
                    cli.command(METHOD="linear"),
                )
            )
        drops = kind.removesuffix("_svd") in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
        if drops and not (self.density and 0 < self.density <= 1):
            found.append(
                Problem(
                    cli.command(DENSITY=""),
                    f"{kind} needs the share of values to keep",
                    f"above 0, at most 1, e.g. {cli.command(DENSITY='0.5')}",
                )
            )
        if not drops and self.density is not None:
            found.append(Problem(cli.command(DENSITY=""), f"{kind} keeps every value", "leave it out"))
        if self.svd_rank is not None and (self.svd_rank < 1 or not kind.endswith("svd")):
            do = "a rank of at least 1" if kind.endswith("svd") else "leave it out"
            found.append(Problem(cli.command(SVD_RANK=""), f"{self.svd_rank} with {kind}", do))
        return found


def combine(
    words: list[str],
    asked: Combination,
    name: str,
    outputs: Path,
    base: Path | None = None,
    force: bool = False,
) -> CombinedRecord:
    """Combine the adapters `words` (name=folder, a folder or a recipe's name) into outputs/<name>/adapter;
    returns its run.json.

    `base` replaces the base that the adapters name. RecipeError when they do not belong together, when the
    result is not what PEFT was asked for, or when vLLM could not serve it; then nothing is left behind.
    """
    chosen, run = locate.named(words, outputs), RunFolder(outputs / name)
    raise_if(asked.problems(len(chosen)) + _place(run, chosen, force))
    with lock.runs(chosen.values(), "combines", run.path):
        return _into(run, chosen, asked, base)


def _into(run: RunFolder, chosen: dict[str, Path], asked: Combination, base: Path | None) -> CombinedRecord:
    """Combine the adapters `chosen` into `run`, which is free for them."""
    name = run.path.name
    read = {key: adapters.read(folder) for key, folder in chosen.items()}
    known = {key: provenance.read(folder) for key, folder in chosen.items()}
    source = locate.base_of(read, base)
    raise_if([fault for key, a in read.items() for fault in export.check(a, source, known[key])])
    raise_if(_together(read, known, asked))
    temporary = run.path / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        facts = _combine(read, known, source, asked, name, temporary)
        record = CombinedRecord(
            status="finished",
            recipe=name,
            ended=now(),
            versions=environment.versions(),
            git=environment.git(),
            command=environment.command(),
            hardware=environment.hardware(),
            combined=Combined(
                adapters={key: shown(f) for key, f in chosen.items()}, **asdict(asked), **facts
            ),
        )
        replace_folder(temporary, run.result("lora"))
        for stale in ("serving", "merged"):  # made of what stood here before
            shutil.rmtree(run.path / stale, ignore_errors=True)
        run.write_record(record)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if run.path.is_dir() and not any(run.path.iterdir()):
            run.path.rmdir()
    return record


def _place(run: RunFolder, chosen: dict[str, Path], force: bool) -> list[Problem]:
    """May the result stand in `run`? A trained run is never replaced, nor an adapter that is being
    combined.
    """
    named = cli.command(NAME=run.path.name)
    if not re.fullmatch(r"[\w.-]*\w", run.path.name):
        return [Problem(named, "is no name", "letters, digits, . _ -")]
    if run.path.name in recipes.names():
        return [Problem(named, "is a recipe's name: its run belongs there", "give another name")]
    if any(run.path.resolve() in folder.resolve().parents for folder in chosen.values()):
        return [
            Problem(shown(run.path), "holds one of the adapters that are to be combined", "give another name")
        ]
    if run.path.exists() and any(run.path.iterdir()):
        if not isinstance(run.record, CombinedRecord):
            return [Problem(shown(run.path), "holds something else than a combination", "give another name")]
        if not force:
            return [Problem(shown(run.path), "is already there", f"{cli.command(FORCE=True)} replaces it")]
    return []


def _together(
    read: dict[str, Adapter], known: dict[str, Provenance | None], asked: Combination
) -> list[Problem]:
    """What keeps these adapters apart: other modules, ranks that cannot be added, or another way of being
    trained and served.
    """
    (first, one), *others = read.items()
    problems = []
    for name, other in others:
        if differ := sorted(set(one.modules) ^ set(other.modules)):
            found = f"{name} and {first} adapt different modules, e.g. {differ[0]}"
            problems.append(Problem(shown(other.path), found, "train them with the same target_modules"))
    ranks = {name: {a.tensors[pair["A"]].shape[0] for pair in a.modules.values()} for name, a in read.items()}
    if asked.combination_type in ONE_RANK and len(set().union(*ranks.values())) > 1:
        said = "; ".join(f"{name} {', '.join(map(str, sorted(r)))}" for name, r in ranks.items())
        problems.append(
            Problem(
                "METHOD",
                f"{asked.combination_type} adds A to A and B to B: one rank everywhere ({said})",
                "cat or svd",
            )
        )
    for key, what in (
        ("quantize", "model.quantize"),
        ("dtype", "model.dtype"),
        ("chat_template_kwargs", "data.chat_template_kwargs"),
    ):
        if (
            len(values := {name: getattr(p, key) for name, p in known.items() if p})
            and len({str(v) for v in values.values()}) > 1
        ):
            said = "; ".join(f"{name}: {value}" for name, value in values.items())
            problems.append(
                Problem(
                    "ADAPTERS", f"they were trained with different {what} ({said})", "one model has one of it"
                )
            )
    templates = {a.path / "chat_template.jinja" for a in read.values()}
    if len({t.read_text(encoding="utf-8") if t.is_file() else "" for t in templates}) > 1:
        problems.append(
            Problem("ADAPTERS", "they were trained with different chat templates", "one model has one of it")
        )
    return problems


def _combine(
    read: dict[str, Adapter],
    known: dict[str, Provenance | None],
    source: Path,
    asked: Combination,
    name: str,
    target: Path,
) -> dict[str, Any]:
    """Write the combined adapter to `target`; what was measured of it."""
    parts = {
        f"part{i}": adapter for i, adapter in enumerate(read.values())
    }  # names on the server may hold dots, PEFT's may not
    first = next((p for p in known.values() if p), None)
    model = attach.attach(attach.base(source, first), parts)
    _add(model, list(parts), asked)
    off, own = _from_sum(model, list(parts), asked)
    if not own > EXACT:
        raise RecipeError(
            Problem(
                cli.command(WEIGHTS=""),
                "the combination does nothing: the adapters cancel each other",
                "other weights",
            )
        )
    if (asked.combination_type == "cat" or len(parts) == 1) and off > EXACT:
        raise RecipeError(
            Problem(
                "METHOD",
                f"the combination is {off:.1e} from the weighted sum, and should be it",
                "please report this",
            )
        )
    model.save_pretrained(str(target), selected_adapters=["default"])
    tokenizer = attach.tokenizer(next(iter(read.values())).path, source)
    tokenizer.save_pretrained(target)
    ends = [i for a in read.values() for i in attach.stops(a.path, tokenizer, model)]
    stops.save(target, stops.settings(source), list(dict.fromkeys(ends)))
    asks = [probe for p in known.values() if p for probe in p.probes] or _general(tokenizer)
    probes = [_asked(model, probe) for probe in asks]
    config = next(iter(read.values())).config
    Provenance(
        recipe=name,
        name_or_path=first.name_or_path if first else config["base_model_name_or_path"],
        revision=config.get("revision"),
        fingerprint=weights.fingerprint(source),
        dtype=first.dtype if first else str(model.dtype).removeprefix("torch."),
        quantize=first.quantize if first else None,
        chat_template_kwargs=first.chat_template_kwargs if first else {},
        probes=probes,
        stops={i: token for p in known.values() if p for i, token in p.stops.items()},
        stop_text=next((p.stop_text for p in known.values() if p and p.stop_text), None),
    ).sealed(target).save(target)
    saved = adapters.read(target)
    raise_if(export.check(saved, source))
    apart = _reloaded(model, saved, source, first, probes)
    rank, ranks = adapters.rank(saved.config), [adapters.rank(a.config) for a in read.values()]
    facts = {
        "rank": rank,
        "ranks": ranks,
        "max_lora_rank": rules.max_lora_rank(rank),
        "bytes": saved.file.stat().st_size,
    }
    return facts | {"from_sum": off, "reloaded_logits": apart}


def _add(model: PeftModel, parts: list[str], asked: Combination) -> None:
    """Add the combination as the adapter `default`, active."""
    configs: dict[str, Any] = model.peft_config
    targets = configs[parts[0]].target_modules
    # the modules are the same (by tensor), however each config words them; PEFT refuses a list beside a
    # pattern
    for part in parts:
        configs[part] = dataclasses.replace(configs[part], target_modules=targets)
    # PEFT folds each scaling into A and B and sets lora_alpha = r, but keeps use_rslora: a second factor of
    # sqrt(r), in silence. It also runs init_lora_weights before it overwrites what that made.
    configs[parts[0]] = dataclasses.replace(configs[parts[0]], use_rslora=False, init_lora_weights=True)
    torch.manual_seed(asked.seed)  # of the dare methods, which drop at random
    try:
        model.add_weighted_adapter(
            parts,
            asked.weights,
            "default",
            asked.combination_type,
            density=asked.density,
            svd_rank=asked.svd_rank,
        )
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise RecipeError(
            Problem("METHOD", f"PEFT refuses {asked.combination_type}: {str(error).splitlines()[0]}")
        ) from None
    configs["default"].target_modules = targets
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if (
            ".default." in name
        ):  # slices of the singular vectors: laid out as they will be when they are read back
            parameter.data = parameter.data.contiguous()
    model.eval()


@runtime_checkable
class _Delta(Protocol):
    """What every kind of LoRA layer has of its own, and LoraLayer itself has not."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor: ...


@torch.no_grad()
def _from_sum(model: PeftModel, parts: list[str], asked: Combination) -> tuple[float, float]:
    """How far the combination is from the weighted sum of the adapters' deltas, relative to the sum; and its
    size, relative to the parts'.

    Frobenius norms over all modules.
    """
    apart = whole = own = sizes = 0.0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            assert isinstance(module, _Delta)
            delta = module.get_delta_weight
            deltas = [w * delta(part).float() for part, w in zip(parts, asked.weights, strict=True)]
            total, made = torch.stack(deltas).sum(0), delta("default").float()
            apart, whole = apart + _square(made - total), whole + _square(total)
            own, sizes = own + _square(made), sizes + sum(map(_square, deltas))
    return math.sqrt(apart / whole) if whole else math.inf, math.sqrt(own / sizes)


def _square(delta: torch.Tensor) -> float:
    return delta.square().sum().item()


def _general(tokenizer: Any) -> list[Probe]:
    texts = {text: list(tokenizer(text)["input_ids"]) for text in GENERAL}
    return [Probe(text, len(ids), ids, [], []) for text, ids in texts.items() if len(ids) > 1]


def _asked(model: PeftModel, probe: Probe) -> Probe:
    """`probe` answered by the base and by the combination, as training leaves it for the live proof."""
    with model.disable_adapter():
        base = answers.logprobs(model, probe.input_ids)
    return dataclasses.replace(probe, base=base, adapter=answers.logprobs(model, probe.input_ids))


def _reloaded(
    model: PeftModel, saved: Adapter, source: Path, known: Provenance | None, probes: list[Probe]
) -> float:
    """The largest logit difference between `model` and the saved adapter on a fresh base; RecipeError when it
    is another model.
    """
    fresh, apart = attach.attach(attach.base(source, known), {"default": saved}), 0.0
    for probe in probes:
        ids = torch.tensor([probe.input_ids], device=model.device)
        with torch.no_grad():
            one, two = (m(input_ids=ids, use_cache=False).logits.float() for m in (model, fresh))
        apart = max(apart, (one - two).abs().max().item())
    if not apart <= RELOADED:
        found = f"the saved adapter answers otherwise than the combined model: logits differ by {apart:.1e}"
        raise RecipeError(Problem(shown(saved.path), found, "please report this"))
    return apart


def report(record: CombinedRecord, folder: Path) -> str:
    """The record for a person."""
    done = record.combined
    parts = " + ".join(f"{w:g} x {name}" for w, name in zip(done.weights, done.adapters, strict=True))
    cat = f"{' + '.join(map(str, done.ranks))} = " if done.combination_type == "cat" else ""
    far = [f"{w:g}" for w in done.weights if abs(w) > USUAL_WEIGHT]
    warned = [f"WARNING     a weight of {', '.join(far)} is far from what is usual, -1 to 1; is it meant?"]
    return "\n".join(
        [
            *(warned if far else []),
            (
                f"{parts}, {done.combination_type}: rank {cat}{done.rank}, vLLM needs --max-lora-rank"
                f" {done.max_lora_rank}"
            ),
            f"{100 * done.from_sum:.2g} % from the weighted sum of their deltas (Frobenius, all modules)",
            (
                f"saved and loaded again: logits differ by at most {done.reloaded_logits:.1e}; the saved"
                " files pass vLLM's rules"
            ),
            f"{shown(folder)}/  {done.bytes:,} bytes",
        ]
    )
