"""Samples of a served model, through the OpenAI routes of its server: what was answered stands in a journal,
and is not asked again. Imports no torch.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_recipes.core import cli
from lora_recipes.core.errors import Exit, Problem, RecipeError, listed
from lora_recipes.curate.teacher import Answer, Budget, Journal, Key, Refused, Request, Teacher, library
from lora_recipes.curate.work import progress
from lora_recipes.serving.endpoint import Endpoint

KEY = "VLLM_API_KEY"  # the server's own name for it

TIMEOUT = 900.0  # seconds of one answer: 512 tokens from a busy CPU


@dataclass(frozen=True)
class Served:
    """A model of a server: its name there, and the folder or hub id behind it."""

    name: str
    root: str

    def journal(self, folder: Path) -> Path:
        """The file of its answers in `folder`; another one where the weights behind its name are others."""
        files = sorted(p for p in Path(self.root).glob("*") if p.suffix in (".safetensors", ".bin", ".json"))
        state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        of = hashlib.sha256(repr((self.name, self.root, state)).encode()).hexdigest()[:8]
        return folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', self.name)}.{of}.jsonl"


def served(url: str, names: Sequence[str], recipe: str) -> list[Served]:
    """The models `names` of the server, by default its base and `recipe`; the first is what others are
    compared with. RecipeError where it does not answer, or has not all of them.
    """
    library()
    try:
        models = Endpoint(url, timeout=30).models()
    except RecipeError as error:
        raise RecipeError(error.problems, Exit.NO_ENDPOINT) from None
    wanted = list(dict.fromkeys(names or [next(iter(models)), recipe]))
    if missing := [name for name in wanted if name not in models]:
        do = f"{cli.command('serve', RECIPE=recipe)}, or name some of those"
        raise RecipeError(Problem(url, f"serves no {listed(missing)}, but {listed(models)}", do))
    return [Served(name, models[name]) for name in wanted]


def answers(url: str, model: Served, requests: list[Request], folder: Path) -> list[Answer | Refused]:
    """What the model answers to each request. RecipeError where the server stops: what it has answered is
    kept in `folder`, and the same call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(model.journal(folder))
    key = Key.of(KEY if os.environ.get(KEY) else None)
    try:
        return asyncio.run(
            _all(Teacher(url, key, journal, Budget(), timeout=TIMEOUT, retries=2), requests, model.name)
        )
    except RecipeError as error:
        raise RecipeError(error.problems, Exit.NO_ENDPOINT) from None
    finally:
        journal.close()


async def _all(teacher: Teacher, requests: list[Request], name: str) -> list[Answer | Refused]:
    done = 0

    async def ask(request: Request) -> Answer | Refused:
        nonlocal done
        answer = await teacher.ask(request)
        done += 1
        progress(f"ask {name}", done, len(requests), done == len(requests), "samples")
        return answer

    async with teacher:
        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(ask(request)) for request in requests]
        except* RecipeError as errors:
            raise errors.exceptions[0] from None
    return [task.result() for task in asked]
