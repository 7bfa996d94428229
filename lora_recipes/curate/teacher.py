"""A teacher behind an OpenAI-compatible endpoint: asked by the openai client at a pace and within a budget,
again where it failed, and never twice for the same: what it has answered stands in a journal.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, listed
from lora_recipes.core.yamlfile import shown

SECRET = 8  # characters: a shorter key ("EMPTY", as vLLM's examples have it) is sent, and hides nothing
LONGEST_WAIT = 300.0  # seconds that a Retry-After may ask for; a quota of the day is not waited for
MOST_BACKOFF = 60.0  # seconds
GIVE_UP = 5  # requests in a row that were not answered in all their attempts: it is not them
SYNC = 1.0  # seconds between two fsyncs of the journal: one takes up to 40 ms, and nothing else goes on
CUT = 300  # characters of what a server says that are repeated
# Status of an answer that another attempt may better; all others are the request's fault, or the user's.
AGAIN = (408, 409, 425, 429)
OURS = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405)


T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """The API key, from the environment variable `variable` and nowhere else; without a name, none."""

    variable: str | None = None
    value: str = field(default="", repr=False)

    @classmethod
    def of(cls, variable: str | None) -> Self:
        """The key in that variable. What is given in place of a name is not repeated: it may be the key."""
        if variable is None:
            return cls()
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
            found = "takes the name of an environment variable, and this is none"
            do = "--key OPENAI_API_KEY; if what was given is a key, others can see it: make a new one"
            raise RecipeError(Problem("--key", found, do))
        if not (value := os.environ.get(variable, "")):
            raise RecipeError(Problem("--key", f"{variable} is not set in the environment"))
        if not re.fullmatch(r"[\x21-\x7e]+", value):
            found = f"{variable} holds white space, or characters that no HTTP header can carry"
            raise RecipeError(Problem("--key", found, "set it to the key alone"))
        return cls(variable, value)

    def hidden(self, text: str) -> str:
        """`text` without the key, which a server may repeat."""
        return text.replace(self.value, "[the API key]") if self.within(text) else text

    def within(self, text: str) -> bool:
        """Does `text` hold the key?"""
        return len(self.value) >= SECRET and self.value in text


@dataclass(frozen=True)
class Request:
    """What is asked: messages and the parameters of the OpenAI API, model and seed among them; or, in place
    of messages, a `prompt` to go on with.
    """

    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    prompt: str | None = None

    @property
    def _asked(self) -> Any:
        return self.messages if self.prompt is None else self.prompt

    @cached_property
    def key(self) -> str:
        """Hash of all that the answer depends on; where the server stands is not part of it."""
        said = json.dumps([self._asked, self.parameters], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def most(self) -> tuple[int, int]:
        """Upper bounds of the tokens that it reads and writes: no tokenizer makes more tokens than bytes; 64
        for what the chat template adds.
        """
        written = self.parameters.get("max_completion_tokens", self.parameters.get("max_tokens"))
        asked = json.dumps(self._asked, ensure_ascii=False)
        return 64 + len(asked.encode(errors="replace")), written or 0


@dataclass(frozen=True)
class Answer:
    """What the teacher said, why it stopped, and what the server counts; None where it does not count."""

    text: str
    finish: str
    model: str
    read: int | None
    written: int | None


@dataclass(frozen=True)
class Refused:
    """No answer to one request, and why; `asked` is False where the budget did not let it be asked."""

    reason: str
    asked: bool = True


class Journal:
    """One JSON line for each answer, by the request's key, written before the answer is used: what has been
    paid for is not asked again, in this run or in one that goes on after it.
    """

    def __init__(self, path: Path):
        self.path, self.notes, self._synced = path, list[str](), 0.0
        self._at: dict[str, tuple[int, int]] = {}  # key -> where its line begins, its length: texts stay out
        self._file = path.open("a+b")
        self._file.seek(0)
        broken, end, line = 0, 0, b"\n"
        for line in self._file:
            if (key := _entry(line).get("key")) and line.endswith(b"\n"):
                self._at[key] = (end, len(line))
            else:
                broken += 1
            end += len(line)
        if broken > 1 and not self._at:
            found = "is no journal of answers, and would be written on"
            raise RecipeError(Problem(shown(path), found, "move it away, or give another OUT"))
        if broken:
            self.notes.append(f"{shown(path)}: {broken} broken line{'s' * (broken > 1)}, asked again")
        if not line.endswith(b"\n"):  # the half line of a killed run
            self._file.write(b"\n")

    @property
    def answers(self) -> int:
        """How many it holds."""
        return len(self._at)

    def find(self, key: str) -> Answer | None:
        """The answer to that request, if it was asked before."""
        if key not in self._at:
            return None
        begins, length = self._at[key]
        self._file.seek(begins)
        said = _entry(self._file.read(length))
        return Answer(said["text"], said["finish"], said["model"], said["read"], said["written"])

    def add(self, key: str, answer: Answer) -> None:
        """Keep it: safe from a killed process at once, from a failing machine within SYNC."""
        line = json.dumps({"key": key} | vars(answer), ensure_ascii=True).encode() + b"\n"
        begins = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        if time.monotonic() - self._synced > SYNC:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        self._at[key] = (begins, len(line))

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a full disk, which has been told
            self._file.close()


def _entry(line: bytes) -> dict[str, Any]:
    """A line of the journal; empty where it is none."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) and {"key", *Answer.__annotations__} == said.keys() else {}


@dataclass
class Budget:
    """What may be used, and what is. Tokens are the server's own count; where it does not count, and where an
    attempt broke off that may be paid for all the same, the upper bound of the request is counted, and told.

    `prices`: of a million tokens read, and written, in any currency; `cost` is in the same.
    """

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    sent: int = 0  # attempts
    read: int = 0
    written: int = 0
    uncounted: int = 0  # attempts whose tokens are an upper bound
    reused: int = 0  # answers that stood in the journal: their tokens are in `read` and `written` too
    reused_tokens: int = 0
    unsent: int = 0  # requests that are let through and not sent yet
    held: dict[str, tuple[int, int]] = field(default_factory=dict)  # requests under way -> their bounds

    def paid(self, read: int, written: int) -> float:
        """What so many tokens cost."""
        return (read * self.prices[0] + written * self.prices[1]) / 1e6

    def room(self, most: tuple[int, int]) -> bool:
        """May a request of these bounds be sent, whatever becomes of it and of those under way?"""
        read = self.read + most[0] + sum(r for r, _ in self.held.values())
        written = self.written + most[1] + sum(w for _, w in self.held.values())
        return (
            (self.requests is None or self.reused + self.sent + self.unsent < self.requests)
            and (self.tokens is None or read + written <= self.tokens)
            and (self.cost is None or self.paid(read, written) <= self.cost)
        )

    def count(self, answer: Answer | None, most: tuple[int, int]) -> None:
        """Count the tokens of an answer; None: of an attempt that broke off."""
        read, written = (answer.read, answer.written) if answer else (None, None)
        self.uncounted += read is None or written is None
        self.read += most[0] if read is None else read
        self.written += most[1] if written is None else written

    def reuse(self, answer: Answer, most: tuple[int, int]) -> None:
        """Count an answer of the journal: what a run goes on from was paid within the same budget."""
        before = self.read + self.written
        self.count(answer, most)
        self.reused += 1
        self.reused_tokens += self.read + self.written - before


class _Again(Exception):
    """An attempt that failed, and that another may better. `wait`: seconds that the server asks for; `paid`:
    the server may have done the work.
    """

    def __init__(self, reason: str, wait: float | None = None, paid: bool = False):
        super().__init__(reason)
        self.wait, self.paid = wait, paid


class _No(Exception):
    """The server refuses this request, now and later."""


@dataclass
class Teacher:
    """The endpoint at `url`. `timeout`: seconds for an attempt from first to last byte; `backoff`: seconds
    before the second attempt, doubled for each that follows; `per_minute`: attempts, None for no limit.
    """

    url: str
    key: Key
    journal: Journal
    budget: Budget
    concurrency: int = 8
    per_minute: float | None = None
    timeout: float = 300
    retries: int = 5
    backoff: float = 1
    retried: int = 0
    _answered: bool = False  # any request of this run
    _failed: int = 0  # in a row
    _free: float = 0  # when the next attempt may begin

    async def __aenter__(self) -> Self:
        """Open the client, which holds connections of this event loop."""
        openai = library()
        self.url = address(self.url)
        # The key goes to the server that was named: no redirects, and no proxy to this machine itself.
        http = openai.DefaultAsyncHttpx2Client(follow_redirects=False, trust_env=not is_local(self.url))
        self._client = openai.AsyncOpenAI(
            api_key=self.key.value or "EMPTY",
            base_url=self.url,
            max_retries=0,
            timeout=self.timeout,
            http_client=http,
        )
        self._openai = openai
        self._slots = asyncio.Semaphore(self.concurrency)
        self._freed = asyncio.Condition()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self._client.close()

    async def model(self) -> str:
        """The model that the server has, where it has one alone. RecipeError where it must be said."""
        try:
            body = await self._attempts(lambda: self._client.models.with_raw_response.list(), _json)
        except (_Again, _No) as error:
            raise self._stopped(f"does not say which models it has: {error}", "--model NAME") from None
        data = body.get("data")
        names = [str(m["id"]) for m in data if isinstance(m, dict) and "id" in m] if data else []
        if len(names) == 1:
            return names[0]
        found = f"serves {listed(names)}" if names else "does not say which models it has"
        raise RecipeError(Problem(self.url, self.key.hidden(found), "choose one: --model NAME"))

    def said(self) -> dict[str, Any]:
        """For the report."""
        used = self.budget
        return {
            "url": self.url,
            "requests": used.sent,
            "again": self.retried,
            "from_journal": used.reused,
            "tokens_read": used.read,
            "tokens_written": used.written,
            "tokens_of_the_journal": used.reused_tokens,
            "counted_by_upper_bound": used.uncounted,
            "cost": round(used.paid(used.read, used.written), 6) if any(used.prices) else None,
        }

    async def ask(self, request: Request) -> Answer | Refused:
        """The answer, from the journal or the server. RecipeError where the server cannot be used at all."""
        most = request.most
        if answer := self.journal.find(request.key):
            self.budget.reuse(answer, most)
            return answer
        async with self._slots:
            if not await self._reserved(request):
                return Refused("the budget is used up", asked=False)
            try:
                answer = await self._attempts(lambda: self._send(request), self._answer, most)
            except (_Again, _No) as error:
                # Of a server that has answered others, a refusal says something of this request.
                self._failed += not (self._answered and isinstance(error, _No))
                if self._failed >= GIVE_UP:
                    raise self._stopped(
                        f"has no answer to {GIVE_UP} requests in a row; the last: {error}"
                    ) from None
                return Refused(f"no answer: {error}")
            finally:
                self.budget.held.pop(request.key, None)
                async with self._freed:
                    self._freed.notify_all()
        self._failed, self._answered = 0, True
        self.journal.add(request.key, answer)
        return answer

    async def _reserved(self, request: Request) -> bool:
        """Hold what the request may use at most; wait for those under way where it would not fit now."""
        async with self._freed:
            while not self.budget.room(request.most):
                if not self.budget.held:
                    return False
                await self._freed.wait()
            self.budget.held[request.key] = request.most
            self.budget.unsent += 1
        return True

    def _send(self, request: Request) -> Awaitable[Any]:
        given = {k: v for k, v in request.parameters.items() if k != "model"}
        model, client = request.parameters["model"], self._client
        if request.prompt is not None:
            create = client.completions.with_raw_response.create
            return create(model=model, prompt=request.prompt, extra_body=given)
        create = client.chat.completions.with_raw_response.create
        return create(model=model, messages=request.messages, extra_body=given)

    async def _attempts(
        self,
        send: Callable[[], Awaitable[Any]],
        read: Callable[[Any], T],
        most: tuple[int, int] = (0, 0),
    ) -> T:
        """What `read` makes of the server's answer to `send`; _Again after the last attempt."""
        for attempt in range(self.retries + 1):
            await self._turn()
            self.budget.sent += any(most)
            self.budget.unsent -= attempt == 0 and any(most)
            try:
                answer = await self._attempt(send, read)
            except _Again as error:
                if error.paid and any(most):
                    self.budget.count(None, most)
                if attempt == self.retries or not self.budget.room((0, 0)):
                    raise
                self.retried += 1
                wait = min(self.backoff * 2**attempt, MOST_BACKOFF) * random.uniform(0.5, 1)
                if error.wait is not None:  # everybody waits, or the next request is refused in its place
                    self._free = max(self._free, time.monotonic() + error.wait)
                await asyncio.sleep(max(wait, error.wait or 0))
            else:
                if isinstance(answer, Answer):
                    self.budget.count(answer, most)
                return answer
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, send: Callable[[], Awaitable[Any]], read: Callable[[Any], T]) -> T:
        openai = self._openai
        try:
            async with asyncio.timeout(self.timeout):  # the client's own counts from byte to byte
                raw = await send()
        except (TimeoutError, openai.APITimeoutError):
            raise _Again(f"nothing within {self.timeout:g} s", paid=True) from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            reason = self.key.hidden(str(cause or error)) or type(cause).__name__
            reached = type(cause).__name__ != "ConnectError"  # httpx2's; it was not sent then
            raise _Again(f"the connection failed: {reason[:CUT]}", paid=reached) from None
        except openai.OpenAIError as error:
            raise _Again(self.key.hidden(str(error))[:CUT], paid=True) from None
        try:
            return read(raw)
        except _Malformed as error:
            raise _Again(self.key.hidden(str(error))[:CUT], paid=True) from None

    def _status(self, error: Any) -> Exception:
        """What an answer with an error status means: for one attempt, one request, or the run."""
        status, headers = error.status_code, error.response.headers
        said = self.key.hidden(_message(error.body))[:CUT]
        body = error.body if isinstance(error.body, dict) else {}
        if status in (401, 403):  # what it says may repeat a part of the key
            do = (
                f"look at the key in {self.key.variable}"
                if self.key.variable
                else "name a key: --key VARIABLE"
            )
            return self._stopped(f"does not let us in ({status})", do)
        if "insufficient_quota" in (body.get("code"), body.get("type")) or status == 402:
            return self._stopped(f"says that nothing is left to be spent ({status}): {said}")
        if status in OURS:
            do = "look at --url and --model"
            if to := headers.get("location"):
                do = f"it sends us on to {self.key.hidden(to)[:CUT]}: name that one, if it is right"
            return self._stopped(f"answers {status}: {said}", do)
        if status in AGAIN or status >= 500:
            wait = _wait(headers)
            if wait is not None and wait > LONGEST_WAIT:
                return self._stopped(f"asks to be left alone for {wait:,.0f} s ({status}): {said}")
            return _Again(f"{status}: {said}", wait)
        return _No(f"{status}: {said}")

    def _answer(self, raw: Any) -> Answer:
        body = _json(raw)
        try:
            choice = body["choices"][0]
            usage = body.get("usage") or {}
            text = (choice["message"].get("content") if "message" in choice else choice["text"]) or ""
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (LookupError, TypeError, AttributeError):
            raise _Malformed(f"no completion: {json.dumps(body)}") from None
        if not isinstance(text, str):
            raise _Malformed(f"no text in a completion: {json.dumps(text)}")
        read, written = (n if isinstance(n, int) and n >= 0 else None for n in counts)
        finish, model = (
            self.key.hidden(str(v or "")) for v in (choice.get("finish_reason"), body.get("model"))
        )
        if self.key.within(text):
            text, finish = self.key.hidden(text), "key"
        return Answer(text, finish, model, read, written)

    async def _turn(self) -> None:
        """Wait until an attempt may begin."""
        while (wait := self._free - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if self.per_minute:
            self._free = time.monotonic() + 60 / self.per_minute

    def _stopped(self, found: str, do: str = "") -> RecipeError:
        on = f"{self.journal.answers} answers are kept; the same command goes on from them"
        return RecipeError(
            Problem(self.url, found, "; ".join(filter(None, [do, on * (self.journal.answers > 0)])))
        )


class _Malformed(Exception):
    """An answer of status 200 that is no answer."""


def address(url: str) -> str:
    """The base of the endpoint's routes: `http://host:port` means its /v1. RecipeError for what is none."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        found = "has a user, a password or a query in it, where a key would be seen and kept"
        raise RecipeError(Problem("--url", found, "http://host:port, and --key VARIABLE"))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(Problem("--url", f"{url!r} is no address", "http://host:port, or https://host/v1"))
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def is_local(url: str) -> bool:
    """Is it this machine?"""
    return (urlsplit(url).hostname or "") in ("127.0.0.1", "localhost", "::1")


def library() -> Any:
    """The openai client, without its own words. RecipeError where it is not installed."""
    try:
        import openai
    except ImportError:
        do = cli.extra("curate")
        raise RecipeError(Problem("openai", "the client of OpenAI's API is not installed", do)) from None
    for name in ("openai", "httpx2"):  # OPENAI_LOG=debug would show the headers of answers
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return openai


def _json(raw: Any) -> dict[str, Any]:
    """The object that an answer of the client holds."""
    text = raw.http_response.text
    try:
        body = json.loads(text)
    except ValueError:
        kind = raw.http_response.headers.get("content-type", "no type")
        raise _Malformed(f"what answers is no JSON ({kind}): {' '.join(text.split())}") from None
    if not isinstance(body, dict):
        raise _Malformed(f"no completion: {text}")
    return body


def _message(body: Any) -> str:
    """What the body of an error says, in one line."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(said or "it says no more").split())


def _wait(headers: Any) -> float | None:
    """Seconds that Retry-After asks for: a number, or a date."""
    said = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return None
