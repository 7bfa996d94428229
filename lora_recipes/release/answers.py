"""Keep what a server answers, where the one who asked agreed: a proxy between clients and vLLM. It passes all
on as it comes, streams too, and writes an answer that is whole into a log of rows, credentials and personal
data replaced before anything is on the disk. Imports no torch.
"""

import http.client
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import now
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate.secrets import cleaned
from lora_recipes.curate.shapes import SHAPES

CONSENT = "X-Log-Consent"  # the header of a request whose answer may be kept: yes
HOW = ("header", "everyone")
ROUTES = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
SAID = ("content", "reasoning_content", "reasoning")  # of a message, in parts where it is streamed
LARGEST = 64 * 2**20  # bytes of a request, and of an answer that is kept
PATIENCE = 900.0  # seconds between two parts of an answer
# Of one connection, not of the message (RFC 9110, 7.6.1); and what would keep the answer from being read.
_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
_HOP |= {"transfer-encoding", "upgrade", "host", "accept-encoding", "content-length", "proxy-connection"}


@dataclass
class Log:
    """The file of rows, and what was counted: `kept`, `replaced` (credentials and the like), `passed`
    (without consent), `unfit` (no whole answer of text), `lost` (the disk took no more).
    """

    file: Path
    counts: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, times: int = 1) -> None:
        """Say it at the end."""
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + times

    def keep(self, row: dict[str, Any]) -> None:
        """Append `row`, cleaned. A disk that refuses it is told, and keeps no client waiting."""
        found: list[str] = []
        line = (json.dumps(cleaned(row, SHAPES, found), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            with self._lock:
                there = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    if os.write(there, line) != len(line):
                        raise OSError("only a part was written")
                finally:
                    os.close(there)
        except OSError as error:
            self.count("lost")
            print(
                f"WARNING     an answer is not kept: {error.strerror or error}", file=sys.stderr, flush=True
            )
            return
        self.count("kept")
        self.count("replaced", len(found))

    def __str__(self) -> str:
        """For a person."""
        told = ("kept", "replaced", "passed", "unfit", "lost")
        return ", ".join(f"{self.counts.get(name, 0):,} {name}" for name in told)


def rows(route: str, asked: bytes, said: bytes) -> Iterator[dict[str, Any]]:
    """The rows, as recipes read them, of one exchange: `asked` and `said` are the bodies of a request and of
    its answer, a stream of events or one object. Nothing where it is not whole, or no text.
    """
    try:
        request = json.loads(asked)
        prompt = request[ROUTES[route]]
        choices = list(_streamed(said) if request.get("stream") else json.loads(said)["choices"])
        options = {k: request[k] for k in ("tools", "chat_template_kwargs") if request.get(k)}
        for choice in choices:
            completion = _reply(choice["message"]) if "message" in choice else choice["text"]
            if (
                not _texts(prompt)
                or not completion
                or (isinstance(completion, list) != isinstance(prompt, list))
            ):
                continue
            about = {"model": str(request.get("model", "")), "at": now()}
            about["finish_reason"] = choice.get("finish_reason")
            yield {"prompt": prompt, "completion": completion, **options, **about}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return


def _reply(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The message of a row; none where nothing is said in it. What a template does not read stays: whoever
    reads the row says so.
    """
    kept = {k: message[k] for k in (*SAID, "tool_calls") if message.get(k)}
    return [{"role": "assistant", "content": "", **kept}] if kept else []


def _texts(prompt: Any) -> bool:
    """A text, or messages of text alone?"""
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(m.get("content") or "", str) for m in prompt)
    return isinstance(prompt, str) and bool(prompt)


def _streamed(said: bytes) -> list[dict[str, Any]]:
    """The choices of a stream of events, each put together; none where its end did not come."""
    choices: dict[int, dict[str, Any]] = {}
    ended = False
    for line in said.decode("utf-8").splitlines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            ended = True
        elif data:
            for part in json.loads(data).get("choices", []):
                one = choices.setdefault(part["index"], {})
                one["finish_reason"] = part.get("finish_reason") or one.get("finish_reason")
                if "delta" in part:
                    _add(one.setdefault("message", {}), part["delta"])
                else:
                    one["text"] = one.get("text", "") + part["text"]
    return [choices[i] for i in sorted(choices)] if ended else []


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """A part of a message; a tool call comes in parts too."""
    for key in SAID:
        if delta.get(key):
            message[key] = message.get(key, "") + delta[key]
    for part in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        while len(calls) <= part["index"]:
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[part["index"]], part.get("function") or {}
        call |= {"id": part["id"]} if part.get("id") else {}
        for key in ("name", "arguments"):
            call["function"][key] += function.get(key) or ""


def keep(url: str, host: str, port: int, file: Path, consent: str | None) -> int:
    """Pass on what comes to `host`:`port` to the server at `url` until Ctrl-C, and keep in `file` what may be
    kept: answers to requests with the header X-Log-Consent: yes (`consent`: header), or all of them, where
    whoever runs it says that everyone has agreed (everyone). RecipeError without either.
    """
    if consent not in HOW:
        do = (
            f"{cli.command(CONSENT='header')} keeps the answers to requests that say {CONSENT}: yes;"
            f" {cli.command(CONSENT='everyone')} says that everyone who asks has agreed"
        )
        found = f"is {consent!r}" if consent else "is not said: nothing is kept without it"
        raise RecipeError(Problem(cli.option("CONSENT", ""), found, do))
    if file.suffix != ".jsonl":
        raise RecipeError(Problem(shown(file), "is no name for a log of rows", "x.jsonl"))
    base = _address(url)
    file.parent.mkdir(parents=True, exist_ok=True)
    log = Log(file)
    try:
        server = Server((host, port), base, log, consent == "everyone")
    except (OSError, OverflowError) as error:
        do = f"{cli.command(PORT='another')}; or stop what listens there"
        raise RecipeError(Problem(f"{host}:{port}", f"cannot be listened on: {error}", do)) from None
    said = "everyone has agreed" if consent == "everyone" else f"requests that say {CONSENT}: yes"
    print(f"passing on  http://{host}:{server.server_port} to {url}", flush=True)
    print(f"keeping     {said}: {shown(file)}\nCtrl-C ends it", flush=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        server.serve_forever(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        server.server_close()
    print(f"answers     {log}", flush=True)
    return 0


def _address(url: str) -> SplitResult:
    """The server's. RecipeError where it is none."""
    try:
        base = urlsplit(url.rstrip("/").removesuffix("/v1"))
        sound = base.scheme in ("http", "https") and bool(base.hostname) and base.port != 0
    except ValueError:  # a port that is no number
        sound = False
    if not sound:
        raise RecipeError(Problem(url, "is no address of a server", "http://127.0.0.1:8000"))
    return base


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Server(ThreadingHTTPServer):
    """Listens at `address` for the server at `base`; answers to `everyone` are kept, or to who agreed."""

    daemon_threads = True
    request_queue_size = 128  # of the standard library's five at once, a sixth would try again after a second

    def __init__(self, address: tuple[str, int], base: SplitResult, log: Log, everyone: bool):
        super().__init__(address, Proxy)
        self.base, self.log, self.everyone = base, log, everyone


class Proxy(BaseHTTPRequestHandler):
    """Passes one connection's requests on."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what follows a reply's headers waits 40 ms for their receipt

    def _pass(self) -> None:
        size = self.headers.get("Content-Length") or "0"
        if self.headers.get("Transfer-Encoding") or not size.isdigit() or int(size) > LARGEST:
            self.close_connection = True
            self.send_error(411 if not size.isdigit() or self.headers.get("Transfer-Encoding") else 413)
            return
        asked = self.rfile.read(int(size))
        kind = (
            http.client.HTTPSConnection if self.server.base.scheme == "https" else http.client.HTTPConnection
        )
        way = kind(str(self.server.base.hostname), self.server.base.port, timeout=PATIENCE)
        agreed = self.server.everyone or self.headers.get(CONSENT, "").strip().lower() == "yes"
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (*_HOP, CONSENT.lower())}
        try:
            way.request(self.command, self.server.base.path + self.path, asked or None, headers)
            answer = way.getresponse()
        except (OSError, ValueError, http.client.HTTPException) as error:  # a path that HTTP has not
            self._gone(error)
            return
        try:
            said = self._answer(answer)
        except (OSError, http.client.HTTPException):  # either side left in the middle
            self.close_connection = True
            said = None
        finally:
            way.close()
        self._log(asked, said if answer.status == 200 else None, agreed)

    def _gone(self, error: Exception) -> None:
        text = json.dumps({"error": {"message": f"no server answers behind this proxy: {error}"}}).encode()
        self.send_response(502)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _answer(self, answer: http.client.HTTPResponse) -> bytes | None:
        """Pass it on as it comes; returns all of it, None where it is too large to be kept."""
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        bare = self.command == "HEAD" or answer.status in (204, 304)
        chunked = answer.length is None and not bare and self.request_version != "HTTP/1.0"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif answer.length is not None:
            self.send_header("Content-Length", str(answer.length))
        else:
            self.close_connection = True
        self.end_headers()
        said, kept = bytearray(), True
        while not bare and (part := answer.read1(2**16)):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            self.wfile.flush()
            kept = kept and len(said) + len(part) <= LARGEST
            if kept:
                said += part
        if answer.length:  # a part of it did not come
            raise http.client.IncompleteRead(bytes(said))
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        return bytes(said) if kept else None

    def _log(self, asked: bytes, said: bytes | None, agreed: bool) -> None:
        route = urlsplit(self.path).path
        if self.command != "POST" or route not in ROUTES:
            return
        if not agreed:
            self.server.log.count("passed")
            return
        found = list(rows(route, asked, said)) if said else []
        for row in found:
            self.server.log.keep(row)
        if not found:
            self.server.log.count("unfit")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = _pass

    def log_message(self, *_: Any) -> None:
        """Nothing: a line for each request would be a log of its own."""
