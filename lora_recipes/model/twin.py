"""What the class of a base does, asked of a small twin of it: its own class and kinds of layers, narrow, with
random weights, run on this machine before anything is loaded.

A config says little of it: whether attention looks ahead, whether TRL's loss is that of the model's own
logits, whether packed rows are kept apart, whether a prefix can be put before the layers, and which modules
are called. Where the class cannot be made small, nothing is said here; loss and direction are asked again of
the base itself before the first step.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, listed
from lora_recipes.model import parts, router, targets
from lora_recipes.recipe.base import Base
from lora_recipes.recipe.recipe import Recipe

NARROWER = (16, 8, 64, 4, 1)  # how many times; 1: as wide as it is
NARROWEST = 64  # hidden size
LARGEST = 30_000_000  # parameters of a twin: 0.1 s each (measured)
_VOCABULARY = 96
_TOKENS = 24  # of a text for it
_DEEPEST = 8  # layers
_SPREAD = 20.0  # of its logits: a cap of 50 then moves the loss by percents, rounding in float32 by 1e-6
_APART = 1e-4  # shares of the spread, and of a loss, that float32's rounding does not reach: 1e-6 (measured)
# Fields of a config that are counts and ids, not widths.
_COUNTS = re.compile(
    r"layer|expert|group|token|_ids?$|position|window|chunk|num_|^n_(?!embd|inner)|heads|conv|top|length"
    r"|pattern|interval|period|offset|every|max_|min_"
)
# What a class may raise that was made narrower than its code expects, or is called as it cannot be.
_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    RuntimeError,
    AssertionError,
    ImportError,
    ArithmeticError,
    StrictDataclassError,
)


def _one_thread(run: Callable[..., Any]) -> Any:
    """Runs `run` on one thread: on models this small a second one only waits, on a busy machine for long (5 s
    of processor time with two, 1 with one, of a 4B; measured).
    """

    @functools.wraps(run)
    def alone(*given: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(*given)
        finally:
            torch.set_num_threads(threads)

    return alone


@dataclass(frozen=True)
class Judged:
    """What a twin does: `ahead`: how far a later token moves the logits of earlier ones, a share of their
    spread; `own`: cross entropy of its logits, nats a token; `fused`: TRL's loss, or what TRL raises;
    `auxiliary`: what TRL raises when it adds the load-balancing loss of experts.
    """

    ahead: float
    own: float
    fused: float | str
    auxiliary: str = ""

    @property
    def looks_ahead(self) -> bool:
        """Does a later token change what is answered for earlier ones?"""
        return self.ahead > _APART

    @property
    def agrees(self) -> bool:
        """Is TRL's loss that of the model's own logits?"""
        return not isinstance(self.fused, str) and abs(self.fused - self.own) <= _APART * max(1.0, self.own)


@dataclass(frozen=True)
class Asked:
    """The class and the config of a model: what an answer is kept by."""

    kind: Any
    words: str
    config: PreTrainedConfig = field(compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Asked":
        """Those of `model`."""
        words = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
        return cls(type(model), json.dumps(words, sort_keys=True, default=str), copy.deepcopy(model.config))


def make(asked: Asked) -> PreTrainedModel | None:
    """A twin of what is asked of, in eval mode and float32; None where its class cannot be made small, or
    does not run here by itself.
    """
    width = getattr(asked.config.get_text_config(), "hidden_size", 0)
    for times in NARROWER:
        if times > 1 and width // times < NARROWEST:
            continue
        try:
            narrow = _narrow(asked.config, times)
            with torch.device("meta"):
                size = asked.kind._from_config(narrow, dtype=torch.float32).num_parameters()
            if size > LARGEST:
                continue
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made = _filled(asked.kind._from_config(narrow, dtype=torch.float32).eval())
                router.name_experts(made)
                return made
        except _ERRORS:
            continue
    return None


def _narrow(config: PreTrainedConfig, times: int) -> PreTrainedConfig:
    """`config` with widths divided by `times` where they can be, and as many layers as show each kind."""
    config = copy.deepcopy(config)
    for part in (config, *(p for p in vars(config).values() if isinstance(p, PreTrainedConfig))):
        _shallow(part)
        for name, value in list(vars(part).items()):
            setattr(part, name, _narrower(name, value, times))
    return config


def _narrower(name: str, value: Any, times: int) -> Any:
    """The field `name` of a config, divided by `times` where it is a width."""
    if name.endswith("token_id") and type(value) is int:
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        return ends.get(name, _VOCABULARY - 1)  # an image's place: in no text here
    if name.endswith(("token_id", "token_ids")):
        return [1] if isinstance(value, list) else value
    if name == "sliding_window" and type(value) is int:
        return min(value, _TOKENS // 3)  # else no text here is longer
    if type(value) is not int or value < 32:
        return 0 if name == "num_kv_shared_layers" else value  # with layers that are cut away
    if "vocab_size" in name:
        return _VOCABULARY
    if "chunk_size" in name:  # a text is filled up to it: 8 s with 256 on Granite-4's layers, 0.3 with 16
        return 16
    return value // times if not _COUNTS.search(name) and value % times == 0 else value


def _shallow(config: PreTrainedConfig) -> None:
    depth = getattr(config, "num_hidden_layers", None)
    if type(depth) is not int:
        return
    lists = {name: v for name, v in vars(config).items() if isinstance(v, list) and len(v) == depth}
    kinds: list[Any] = [*lists.values(), getattr(config, "layers_block_type", [])]
    shows = max(
        (list(map(str, kind)).index(value) for kind in kinds for value in set(map(str, kind))), default=0
    )
    fewer = min(depth, max(2, shows + 1), _DEEPEST)
    config.num_hidden_layers = fewer
    for name, value in lists.items():
        setattr(config, name, value[:fewer])


@torch.no_grad()
def _filled(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with random numbers where it begins with equal ones (a bias of zeros, which TRL could leave out
    unseen), and with logits as far apart as those of a trained model."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0)  # else attention hardly tells one text from another
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    head = model.get_output_embeddings()
    if head is not None and (spread := _logits(model, _text()).std().item()) > 0:
        head.weight.mul_(_SPREAD / spread)
    return model


def _text(first: int = 3) -> torch.Tensor:
    return torch.arange(first, first + _TOKENS)[None]


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def judge(model: PreTrainedModel) -> Judged | None:
    """What the class of `model` does with its head and its attention; None where no twin of it runs here. A
    process asks once of each config.
    """
    return _judge(Asked.of(model))


@functools.lru_cache(maxsize=64)
@_one_thread
def _judge(asked: Asked) -> Judged | None:
    model, ids = make(asked), _text()
    if model is None:
        return None
    try:
        logits, changed = _logits(model, ids), ids.clone()
        changed[0, -1] = 2
        moved = (_logits(model, changed) - logits)[:, :-1].abs().max().item()
    except _ERRORS:
        return None
    own = cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    add_fused_lm_head(model)
    routed = hasattr(model.config.get_text_config(), "output_router_logits")
    auxiliary = _auxiliary(model, ids) if routed else ""
    return Judged(moved / max(logits.std().item(), 1e-9), own, _fused(model, ids), auxiliary)


def alone(trained: parts.Trained, config: PreTrainedConfig) -> float | None:
    """How far the text model that is `trained` by itself is from the published class of `config`, with the
    same weights and without an image: a share of the spread of its logits. None where it is that class, or no
    twin of it runs here.
    """
    named = parts.published(config)
    if named is None or not trained.beside or trained.whole:
        return None
    words = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _alone(Asked(named, words, config), trained.kind)


@functools.lru_cache(maxsize=8)
@_one_thread
def _alone(asked: Asked, kind: Any) -> float | None:
    whole = make(asked)
    if whole is None:
        return None
    try:
        text = kind._from_config(copy.deepcopy(whole.config.get_text_config()), dtype=torch.float32).eval()
        held = whole.state_dict()
        places = parts.places_of(text, held)
        text.load_state_dict({name: held[place] for name, place in places.items()})
        wanted, found = _logits(whole, _text()), _logits(text, _text())
    except _ERRORS:
        return None
    return ((found - wanted).abs().max() / wanted.std()).item()


def warnings(trained: parts.Trained, config: PreTrainedConfig) -> list[str]:
    """What is right here and may be otherwise where the published class answers."""
    apart = alone(trained, config)
    if apart is None or apart <= _APART:
        return []
    name, named = trained.kind.__name__, parts.published(config).__name__
    return [
        f"transformers' {named} answers otherwise than {name}, its text model, which is trained: logits apart"
        f" by {apart:.2g} of their spread (a small twin of both, the same weights); {cli.command('serve')}"
        " proves live whether the server answers as was trained"
    ]


def packed(model: PreTrainedModel, attention: str | None = None) -> str | None:
    """What is wrong with two rows in one, as TRL packs them, in the class of `model`; empty where each is
    answered as it is alone, None where no twin of it runs here. `attention`: what it will train with; flash
    attention knows where a row ends by other means than the twin's.
    """
    flash = "flash" in (attention or "") and model._supports_flash_attn
    return _packed(Asked.of(model), flash, attention if attention in ("sdpa", "eager") else None)


@functools.lru_cache(maxsize=64)
@_one_thread
def _packed(asked: Asked, flash: bool, attention: str | None) -> str | None:
    model = make(asked)
    if model is None:
        return None
    rows = [_text(3)[0].tolist(), _text(40)[0].tolist()]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": row} for row in rows]
    )
    del batch["labels"]
    try:
        if attention is not None:
            model.set_attn_implementation(attention)
        alone = _logits(model, torch.tensor(rows[1:]))
        with torch.no_grad():
            found = model(**batch, use_cache=False).logits.float()[:, -_TOKENS:]
    except _ERRORS as error:
        return said(error)
    apart = ((found - alone).abs().max() / alone.std()).item()
    if flash or not apart > _APART:
        return ""
    return f"a row changes what is answered in the one behind it, by {apart:.2g} of the spread"


@_one_thread
def prefixed(model: PreTrainedModel) -> str:
    """What is wrong with a prefix of PEFT's (PREFIX_TUNING) before the layers of the class of `model`; empty
    where it is learned, or where no twin of it runs here.
    """
    twin = make(Asked.of(model))
    if twin is None:
        return ""
    try:
        prefix = get_peft_model(twin, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
        mask = torch.ones_like(_text())
        logits = prefix(input_ids=_text(), attention_mask=mask, use_cache=False).logits
        if logits.requires_grad:
            logits.square().mean().backward()
    except _ERRORS as error:
        return said(error)
    learned = any(p.grad is not None and bool(p.grad.any()) for p in prefix.parameters())
    return "" if learned else "its layers do not read it"


def idle(model: PreTrainedModel, adapted: Iterable[str]) -> list[str]:
    """The kinds of modules among those that are `adapted` (names in `model`) that no gradient reaches: the
    class uses their weight and never calls them. Empty where no twin of it runs here.
    """
    return list(_idle(Asked.of(model), tuple(adapted)))


@functools.lru_cache(maxsize=64)
@_one_thread
def _idle(asked: Asked, adapted: tuple[str, ...]) -> tuple[str, ...]:
    model = make(asked)
    here = set(adapted) & {name for name, _ in model.named_modules()} if model is not None else set()
    if model is None or not here:
        return ()
    try:
        config = LoraConfig(r=2, target_modules=sorted(here), task_type="CAUSAL_LM")
        attached = get_peft_model(model, targets.resolved(model, config))
        logits = attached(input_ids=_text(), use_cache=False).logits
        cross_entropy(logits[0, :-1].float(), _text()[0, 1:]).backward()
    except _ERRORS:
        return ()
    reached: dict[str, bool] = {}
    for name, parameter in attached.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            one = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.").partition(".lora_")[0])
            moves = parameter.grad is not None and bool(parameter.grad.any())
            reached[one] = reached.get(one, False) or moves
    return tuple(sorted(name for name, moves in reached.items() if not moves))


def _fused(model: Any, ids: torch.Tensor) -> float | str:
    """TRL's loss of `model`, which has TRL's head; or the error that it ends in."""
    try:
        with torch.no_grad():
            found: float = model(input_ids=ids, labels=ids, fused_lm_head=True).loss.item()
    except _ERRORS as error:
        return said(error)
    return found


def _auxiliary(model: Any, ids: torch.Tensor) -> str:
    """What TRL raises when it takes the load-balancing loss of `model`, as it does in each step (TRL 1.16,
    sft_trainer.py); empty where it gets one. A class that computes none gives 0, which is no tensor.
    """
    try:
        with torch.no_grad():
            asked = model(input_ids=ids, labels=ids, fused_lm_head=True, output_router_logits=True)
            asked.aux_loss.mean().item()
    except _ERRORS as error:
        return said(error)
    return ""


def said(error: Exception) -> str:
    """The first line of an error of somebody else's code."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def problems(model: PreTrainedModel, config: PeftConfig | None, recipe: Recipe, base: Base) -> list[Problem]:
    """What the class of `model`, that of `base`, cannot do of what `recipe` asks for. `config`: of its
    adapter, whose targets are all there.
    """
    of_class = [] if recipe.classify else _of_class(model, recipe, base)  # TRL's loss of it is not taken
    return [*of_class, *_of_adapter(model, config, recipe)]


def _of_class(model: PreTrainedModel, recipe: Recipe, base: Base) -> Iterator[Problem]:
    name, found = type(model).__name__, judge(model)
    if model.base_model is model:
        said = f"TRL's loss takes the hidden states of the model inside {name}, looked for under"
        yield Problem(base.at, f"{said} {model.base_model_prefix!r}: it is not there", "name another base")
    elif found and found.looks_ahead:
        said = (
            f"{name} as its config.json sets it up is an encoder: a later token changes what it answers for"
        )
        do = "name a decoder, a checkpoint that continues text: here the loss on a token sees the token"
        yield Problem(base.at, f"{said} earlier ones", do)
    elif found and not found.agrees:
        said = f"fails on it: {found.fused}"
        if not isinstance(found.fused, str):
            said = f"is not that of its own logits: {found.fused:.3f} against {found.own:.3f} nats a token"
            said += " (a small twin of it, random weights)"
        do = "TRL takes lm_head alone, and its class does more to the logits: it would be trained for other"
        yield Problem(base.at, f"TRL's loss of {name} {said}", f"{do} answers; name another base")
    elif found and found.auxiliary and router.coefficient(model, recipe):
        do = "set train.router_aux_loss_coef: 0 (the router is frozen unless lora: names it)"
        said = f"TRL's load-balancing loss of {name} fails: {found.auxiliary}"
        yield Problem(recipe.at("train", "router_aux_loss_coef"), said, do)
    for key in ("packing", "padding_free"):
        apart = key == "padding_free" or recipe.train.packing_strategy != "wrapped"
        if getattr(recipe.train, key) and apart:
            if wrong := packed(model, recipe.model.attn_implementation):
                do = f"set train.{key}: false; packing_strategy: wrapped runs, but lets rows see each other"
                yield Problem(recipe.at("train", key), f"{name} does not keep packed rows apart: {wrong}", do)
            return


def _of_adapter(model: PreTrainedModel, config: PeftConfig | None, recipe: Recipe) -> Iterator[Problem]:
    name = type(model).__name__
    if recipe.peft and recipe.peft.peft_type == "PREFIX_TUNING" and (wrong := prefixed(model)):
        said, do = f"PEFT cannot put a prefix before the layers of {name}: {wrong}", "PROMPT_TUNING, or lora:"
        yield Problem(recipe.at("peft", "peft_type"), said, do)
    if isinstance(config, LoraConfig) and (unused := idle(model, targets.matched(model, config))):
        said = f"{name} never calls {listed(unused)}: an adapter there would learn nothing"
        names = listed(dict.fromkeys(".".join(each.split(".")[-2:]) for each in unused))
        do = f"leave them out: exclude_modules: [{names}]"
        yield Problem(recipe.at("lora", "target_modules"), said, do)
