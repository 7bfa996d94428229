"""Is the adapter that answers the adapter that was trained? A server's answers against the base's and against
PEFT's. Imports no torch.
"""

import json
import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError
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
# and how many times what the merged model departs by as transformers computes it, in the same dtype
MERGED = 3
SMALLEST = 1e-30  # of a probability: float32 has 0 for less than 1e-45


@dataclass(frozen=True)
class Proof:
    """What was measured of one adapter: mean absolute differences of log-probabilities, nats a token.

    `moved`: server with adapter against server's base. `repeat`: the server's base against itself, asked
    again. `effect`: adapter against base by PEFT, at the end of training. `apart`: server with adapter
    against PEFT with adapter. `noise`: the server's base against PEFT's base (other kernels, other dtype).
    These three are None without provenance. `rendered`: does the server make the same tokens of the probes'
    prompts? `by_default`: also for a request that sends no chat_template_kwargs? `runs_on`: tokens that end a
    reply in training, and no answer on this server. `question`: what PEFT's answer to it came to, and
    `ended`: did the server's answer to it end (True where it was not asked for, as of what fails already)?
    `stop_text`: what ends a reply where that is no token.
    `made_of`: which parts of a combination were not proven. `merged`: of a merged model, what it departs from
    PEFT by as transformers computes it. `share`: of a classifier, the largest difference of a probability.
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
    merged: float = 0.0
    share: float | None = None

    @property
    def limit(self) -> float:
        """The largest `apart` that is taken for the trained adapter."""
        return FAR * (self.effect or 0.0) + 2 * (self.noise or 0.0) + MERGED * self.merged

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
    proof = Proof(
        name,
        moved=apart(served, alone),
        repeat=apart(alone, again),
        effect=apart(trained, untrained),
        apart=apart(served, trained),
        noise=apart(alone, untrained),
        merged=known.apart if base == name else 0.0,
        rendered=rendered,
        by_default=by_default,
        runs_on=tuple(
            token for i, token in known.stops.items() if not endpoint.stops_at(name, *_openings(known)[0], i)
        ),
        question=known.question,
        stop_text=known.stop_text,
        made_of=known.made_of if known.unproven else None,
    )
    # the longest answer of all is asked for last, and not of what failed before
    return proof if proof.fault else replace(proof, ended=_ended(endpoint, name, known))


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


def classified(endpoint: Endpoint, name: str, known: Provenance) -> Proof:
    """Ask the server, which has a merged classifier alone, for the classes of the texts that training asked.
    RecipeError where it asked none.
    """
    if not (asked := known.called):
        found = "is not proven: training recorded no text, as all were cut at train.max_length"
        raise RecipeError(Problem(name, found, "a larger train.max_length; the server cuts none"))
    shares = [endpoint.shares(name, called.text) for called in asked]
    served = [math.log(max(share, SMALLEST)) for each in shares for share in each]
    trained, untrained = ([x for called in asked for x in getattr(called, of)] for of in ("adapter", "base"))
    return Proof(
        name,
        moved=apart(served, untrained),
        effect=apart(trained, untrained),
        apart=apart(served, trained),
        noise=0.0,
        merged=known.apart,
        rendered=all(endpoint.tokens(name, called.text, {}) == called.input_ids for called in asked),
        share=max(abs(math.exp(a) - math.exp(b)) for a, b in zip(served, trained, strict=True)),
    )


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
            (p.merged or p.noise, 7),
        ]
        cells = "  ".join(f"{'-' if n is None else f'{n:.4f}':>{w}}" for n, w in numbers)
        good = "live" if p.effect is not None else "live; not compared with PEFT (no provenance.json)"
        good += "; ended its answer" if p.question and p.ended else ""
        if p.share is not None:
            good += f"; a probability differs by {p.share:.1e} at most"
        good = "; ".join([good, *p.notes])
        lines.append(f"{p.name:<{width}}  {cells}  {p.fault or good}")
    return "\n".join(lines)
