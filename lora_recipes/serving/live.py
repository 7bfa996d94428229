"""Is the adapter that answers the adapter that was trained? A server's answers against the base's and against
PEFT's. Imports no torch.
"""

import json
import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.provenance import Probe, Provenance, Question
from lora_recipes.serving.endpoint import Endpoint

# Asked where an adapter brings no probes: only whether it changes the base's answer can be seen then.
GENERAL = (
    "The",
    "Once upon a time there was",
    "Question: what is two and two? Answer:",
    "Guten Morgen, wie geht es",
)

# share of the adapter's own effect by which the server may depart from PEFT, beside twice what the base
# departs by
FAR = 0.1
# largest difference of a probability of a classifier in float32; a base in 16 bits is off by more: see
# docs/classify.md
NEAR = 1e-3


@dataclass(frozen=True)
class Proof:
    """What was measured of one adapter: mean absolute differences of log-probabilities, nats a token.

    `moved`: server with adapter against server's base. `repeat`: the server's base against itself, asked
    again. `effect`: adapter against base by PEFT, at the end of training. `apart`: server with adapter
    against PEFT with adapter. `noise`: the server's base against PEFT's base (other kernels, other dtype).
    These three are None without provenance. `rendered`: does the server make the same tokens of the probes'
    prompts? `by_default`: also for a request that sends no chat_template_kwargs? `runs_on`: tokens that end a
    reply in training, and no answer on this server. `question`: what PEFT's answer to it came to, and
    `ended`: did the server's answer to it end? `stop_text`: what ends a reply where that is no token.
    `made_of`: which parts of a combination were not proven.
    """

    name: str
    moved: float
    repeat: float = 0.0
    effect: float | None = None
    apart: float | None = None
    noise: float | None = None
    rendered: bool = True
    by_default: bool = True
    runs_on: tuple[str, ...] = ()
    question: Question | None = None
    ended: bool = True
    stop_text: str | None = None
    made_of: str | None = None

    @property
    def limit(self) -> float:
        """The largest `apart` that is taken for the trained adapter."""
        return FAR * (self.effect or 0.0) + 2 * (self.noise or 0.0)

    @property
    def fault(self) -> str | None:
        """Why it is not the adapter that was trained; None when it is."""
        if self.moved <= self.repeat:
            return "not live: the server answers as the base does"
        if self.effect is None or self.apart is None or self.noise is None:
            return None
        if not self.rendered:
            return (
                "the server renders another prompt than was trained: check --chat-template and its arguments"
            )
        if self.noise > self.effect:
            return (
                f"not proven: the server's base is {self.noise:.4f} from PEFT's, more than the adapter's"
                " effect: another base?"
            )
        if self.apart > self.limit:
            return f"not what was trained: {self.apart:.4f} from PEFT, at most {self.limit:.4f} allowed"
        if self.runs_on:
            return (
                f"never stops: training ended a reply with {', '.join(self.runs_on)}, this server goes on"
                f" there: {cli.command('serve')} starts one that does not (--generation-config)"
            )
        if self.question and self.question.ended and not self.ended:
            return (
                f"runs on: by PEFT the answer to a question of the rows ended after {self.question.ended}"
                f" tokens, here not within {self.question.room}"
            )
        return None

    @property
    def notes(self) -> list[str]:
        """What to know of one that is live."""
        said = [] if self.by_default else ["requests must send the chat_template_kwargs of training"]
        if self.made_of:
            said.append(f"BUT {self.made_of}")
        if self.stop_text:
            said.append(f'requests must send "stop": [{json.dumps(self.stop_text)}]')
        if self.question and not self.ended:
            said.append(
                f"BUT the answer to a question of the rows did not end within {self.question.room} tokens,"
                f" nor by PEFT within {self.question.asked}: it has not learned to stop"
            )
        if self.effect is not None and self.limit >= self.effect:
            said.append(
                "BUT this server's noise is so near the adapter's effect that a wrong scaling would not show:"
                f" {cli.command('serve', DTYPE='float32')} proves it"
            )
        return said


def prove(endpoint: Endpoint, base: str, adapters: dict[str, Provenance | None]) -> list[Proof]:
    """Ask the server for each adapter (by name); `base` is the name of the base on it. RecipeError when it
    does not answer.

    What answers as the base itself can be a merged model, compared with PEFT's answers; a model that came
    without any has no proof.
    """
    return [_prove(endpoint, base, name, known) for name, known in adapters.items() if known or name != base]


def _prove(endpoint: Endpoint, base: str, name: str, known: Provenance | None) -> Proof:
    if known is None or not known.probes:
        ids = [tokens for text in GENERAL if len(tokens := endpoint.tokens(base, text, {})) > 1]
        alone = _answers(endpoint, base, ids)
        return Proof(
            name, apart(_answers(endpoint, name, ids), alone), apart(_answers(endpoint, base, ids), alone)
        )
    probes, ids = known.probes, [p.input_ids for p in known.probes]
    trained, untrained = _of(probes, "adapter"), _of(probes, "base")
    served = _answers(endpoint, name, ids)
    alone, again = (
        [_answers(endpoint, base, ids) for _ in range(2)] if base != name else [untrained, untrained]
    )
    rendered = all(
        endpoint.tokens(name, p.prompt, p.options) == p.input_ids[: p.prompt_tokens] for p in probes
    )
    plain = [{k: v for k, v in p.options.items() if k != "chat_template_kwargs"} for p in probes]
    by_default = all(
        endpoint.tokens(name, p.prompt, o) == p.input_ids[: p.prompt_tokens]
        for p, o in zip(probes, plain, strict=True)
    )
    return Proof(
        name,
        moved=apart(served, alone),
        repeat=apart(alone, again),
        effect=apart(trained, untrained),
        apart=apart(served, trained),
        noise=apart(alone, untrained),
        rendered=rendered,
        by_default=by_default,
        runs_on=tuple(
            token for i, token in known.stops.items() if not endpoint.stops_at(name, *_openings(known)[0], i)
        ),
        question=known.question,
        ended=_ended(endpoint, name, known),
        stop_text=known.stop_text,
        made_of=known.made_of if known.unproven else None,
    )


def _openings(known: Provenance) -> list[tuple[str | list[dict[str, Any]], dict[str, Any]]]:
    """What may be asked of the server as a client would: (prompt, options)."""
    return [(q.prompt, q.options) for q in (known.question, *known.probes) if q]


def _ended(endpoint: Endpoint, name: str, known: Provenance) -> bool:
    """Does the answer to the question that training asked end by itself? True where it asked none."""
    if (asked := known.question) is None:
        return True
    stop = {"stop": [known.stop_text]} if known.stop_text else {}
    return endpoint.write(name, asked.prompt, asked.options | stop, asked.room).ended


def _answers(endpoint: Endpoint, model: str, ids: list[list[int]]) -> list[float]:
    return [x for tokens in ids for x in endpoint.logprobs(model, tokens)]


def _of(probes: list[Probe], which: str) -> list[float]:
    return [x for probe in probes for x in getattr(probe, which)]


def apart(one: list[float], other: list[float]) -> float:
    """Mean absolute difference."""
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class ClassProof:
    """A classifier on a server: the largest difference of a probability from PEFT's at the end of training,
    over `texts` texts; `rendered`: does the server make the same tokens of them?
    """

    name: str
    apart: float
    texts: int
    rendered: bool

    @property
    def fault(self) -> str | None:
        """Why it is not what was trained; None where it is."""
        if not self.texts:
            return "not proven: training recorded no text, as all were cut at train.max_length"
        if not self.rendered:
            return "the server makes other tokens of a text than training did: another tokenizer?"
        if not self.apart <= NEAR:
            return f"not what was trained: a probability is {self.apart:.2g} from PEFT's, {NEAR:g} is allowed"
        return None

    def __str__(self) -> str:
        """For a person, one line."""
        found = f"largest difference of a probability from PEFT's, {self.texts} texts: {self.apart:.1e}"
        return f"{self.name}: {self.fault or 'live'}; {found}"


def classified(endpoint: Endpoint, name: str, known: Provenance) -> ClassProof:
    """Ask the server for the classes of the texts that training asked."""
    apart, rendered = 0.0, True
    for called in known.called:
        rendered &= endpoint.tokens(name, called.text, {}) == called.input_ids
        most = max(called.logits)
        powers = [math.exp(x - most) for x in called.logits]
        served = endpoint.shares(name, called.text)
        wanted = [p / sum(powers) for p in powers]
        apart = max(apart, *(abs(a - b) for a, b in zip(served, wanted, strict=True)))
    return ClassProof(name, apart, len(known.called), rendered)


def table(proofs: list[Proof]) -> str:
    """The proofs for a person, one a line."""
    width = max(len("adapter"), *(len(p.name) for p in proofs))
    lines = [
        "mean |difference| of log-probabilities, nats a token",
        (
            f"{'adapter':<{width}}  {'from base':>9}  {'(by PEFT)':>9}  {'from PEFT':>9}  {'allowed':>8} "
            f" {'noise':>7}  verdict"
        ),
    ]
    for p in proofs:
        numbers = [
            (p.moved, 9),
            (p.effect, 9),
            (p.apart, 9),
            (p.limit if p.effect is not None else None, 8),
            (p.noise, 7),
        ]
        cells = "  ".join(f"{'-' if n is None else f'{n:.4f}':>{w}}" for n, w in numbers)
        good = "live" if p.effect is not None else "live; not compared with PEFT (no provenance.json)"
        good += "; ended its answer" if p.question and p.ended else ""
        good = "; ".join([good, *p.notes])
        lines.append(f"{p.name:<{width}}  {cells}  {p.fault or good}")
    return "\n".join(lines)
