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
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import cli, environment, locate, lock, provenance, stops, weights
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
# The methods whose result is computed anew here, and how far PEFT's may be from that, relative: what float32
# may lose in a sum, and in a singular value decomposition.
RECOMPUTED = {"cat": 1e-5, "linear": 1e-5, "svd": 1e-4}
NOTHING = 1e-5  # relative: a combination that is smaller than that beside its parts
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
    unproven: bool = False,
) -> CombinedRecord:
    """Combine the adapters `words` (name=folder, a folder or a recipe's name) into outputs/<name>/adapter;
    returns its run.json.

    `base` replaces the base that the adapters name; `unproven` takes adapters that nothing proves, and the
    result then says which. RecipeError when they do not belong together, when the result is not what PEFT was
    asked for, or when vLLM could not serve it; then nothing is left behind.
    """
    chosen, run = locate.named(words, outputs), RunFolder(outputs / name)
    raise_if(asked.problems(len(chosen)) + _place(run, chosen, force))
    with lock.runs(chosen.values(), "combines", run.path):
        lock.unserved(run.path)
        return _into(run, chosen, asked, base, unproven)


def _into(
    run: RunFolder, chosen: dict[str, Path], asked: Combination, base: Path | None, unproven: bool
) -> CombinedRecord:
    """Combine the adapters `chosen` into `run`, which is free for them."""
    name = run.path.name
    read = {key: adapters.read(folder) for key, folder in chosen.items()}
    known = {key: provenance.read(folder) for key, folder in chosen.items()}
    source = locate.base_of(read, base)
    raise_if([fault for key, a in read.items() for fault in export.check(a, source, known[key])])
    raise_if(_together(read, known, asked))
    # No answers are held against a record here: of an adapter without hashes nothing is known.
    notes = {
        key: provenance.not_proven(folder, known[key], unproven, "combines", only_hashes=True)
        for key, folder in chosen.items()
    }
    lacking = {key: "; ".join(said) for key, said in notes.items() if said}
    temporary = run.path / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        facts = _combine(read, known, source, asked, name, temporary, lacking)
        record = CombinedRecord(
            status="finished",
            recipe=name,
            ended=now(),
            versions=environment.versions(),
            git=environment.git(),
            command=environment.command(),
            hardware=environment.hardware(),
            combined=Combined(
                adapters={key: shown(f) for key, f in chosen.items()},
                **asdict(asked),
                **facts,
                not_proven=lacking,
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
    lacking: dict[str, str],
) -> dict[str, Any]:
    """Write the combined adapter to `target`; what was measured of it. `lacking`: which of the adapters are
    not proven, and why.
    """
    parts = {
        f"part{i}": adapter for i, adapter in enumerate(read.values())
    }  # names on the server may hold dots, PEFT's may not
    first = next((p for p in known.values() if p), None)
    model = attach.attach(attach.base(source, first), parts)
    _add(model, list(parts), asked)
    model.save_pretrained(str(target), selected_adapters=["default"])
    found = measured(adapters.read(target), list(read.values()), asked)
    _as_asked(found, asked)
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
        unproven=lacking,
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
    return facts | {
        "from_sum": found.from_sum,
        "recomputed": found.recomputed,
        "reloaded_logits": apart,
    }


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


@dataclass(frozen=True)
class Measured:
    """A combination, as its files hold it, against its parts; relative Frobenius distances over all modules.

    `size`: beside the root of the sum of squares of the weighted parts. `from_sum`: from the weighted sum of
    their deltas. `recomputed`: from what the method makes of the parts, computed here; None: it was not.
    """

    size: float
    from_sum: float
    recomputed: float | None


@torch.no_grad()
def measured(made: Adapter, parts: list[Adapter], asked: Combination) -> Measured:
    """Hold the combination in the files of `made` against the files of `parts`, in float64.

    Nothing of PEFT's is used: A and B are read here, their scalings come from each adapter_config.json. svd
    is the best approximation of its rank (Eckart and Young): the root of what it is farther from the sum than
    that, squared.
    """
    files = [load_file(adapter.file) for adapter in (made, *parts)]
    apart = whole = own = sizes = off = 0.0
    for module in made.modules:
        (b, a, scale), *rest = (
            _factors(adapter, tensors, module) for adapter, tensors in zip((made, *parts), files, strict=True)
        )
        b = scale * b
        terms = [(w * s * left, right) for w, (left, right, s) in zip(asked.weights, rest, strict=True)]
        total = torch.cat([left for left, _ in terms], 1), torch.cat([right for _, right in terms])
        from_sum = _size(*_minus(total, (b, a))) ** 2
        apart, whole, own = apart + from_sum, whole + _size(*total) ** 2, own + _size(b, a) ** 2
        sizes += sum(_size(*term) ** 2 for term in terms)
        if asked.combination_type == "linear":
            roots = [(w * s, math.sqrt(abs(w * s))) for w, (_, _, s) in zip(asked.weights, rest, strict=True)]
            left = torch.stack([r * f[0] for (_, r), f in zip(roots, rest, strict=True)]).sum(0)
            right = torch.stack([math.copysign(r, ws) * f[1] for (ws, r), f in zip(roots, rest, strict=True)])
            off += _size(*_minus((left, right.sum(0)), (b, a))) ** 2
        elif asked.combination_type == "svd":
            lost = torch.linalg.svdvals(_core(*total))[a.shape[0] :].square().sum().item()
            off += max(from_sum - lost, 0.0)
        else:
            off += from_sum
    return Measured(
        math.sqrt(own / sizes) if sizes else 0.0,
        math.sqrt(apart / whole) if whole else math.inf,
        (math.sqrt(off / sizes) if sizes else math.inf) if asked.combination_type in RECOMPUTED else None,
    )


def _factors(
    adapter: Adapter, tensors: dict[str, torch.Tensor], module: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """B [out, r] and A [r, in] of `module` in float64, and the factor of their product."""
    pair = adapter.modules[module]
    return tensors[pair["B"]].double(), tensors[pair["A"]].double(), adapters.scaling(adapter.config, module)


def _minus(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a difference of products."""
    return torch.cat([one[0], -other[0]], 1), torch.cat([one[1], other[1]])


def _core(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A small matrix with the singular values of the product `left` [m, k] `right` [k, n]."""
    return torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T


def _size(left: torch.Tensor, right: torch.Tensor) -> float:
    """Frobenius norm of the product."""
    return _core(left, right).norm().item()


def _as_asked(found: Measured, asked: Combination) -> None:
    """RecipeError when the combination does nothing, or is not what was asked of PEFT."""
    if not found.size > NOTHING:
        nothing = "the combination does nothing: the adapters cancel each other"
        raise RecipeError(Problem(cli.command(WEIGHTS=""), nothing, "other weights"))
    kind = asked.combination_type
    if found.recomputed is not None and not found.recomputed <= RECOMPUTED[kind]:
        said = f"what PEFT saved is {found.recomputed:.1e} from {kind} of the adapters' files, at most"
        said += f" {RECOMPUTED[kind]:.0e} is rounding"
        raise RecipeError(Problem(cli.command(METHOD=kind), said, "nothing was written; please report this"))


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
            _told(done),
            (
                f"saved and loaded again: logits differ by at most {done.reloaded_logits:.1e}; the saved"
                " files pass vLLM's rules"
            ),
            *(f"NOT PROVEN  {name}: {said}" for name, said in done.not_proven.items()),
            f"{shown(folder)}/  {done.bytes:,} bytes",
        ]
    )


def _told(done: Combined) -> str:
    if done.recomputed is None:
        return (
            f"NOT PROVEN  that PEFT's {done.combination_type} is what it should be: it was not computed anew"
        )
    files = "computed anew from the adapters' files in float64"
    return f"{done.recomputed:.1e} from {done.combination_type} {files} (relative)"
