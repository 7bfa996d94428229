"""A server with the OpenAI routes that answers as a test says, badly too: `Peer(lambda asked: ...)`."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


class Asked:
    """One request: its body and headers, and how to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], number: int):
        self.handler, self.body, self.number = handler, body, number
        self.headers = handler.headers
        self.text = body.get("prompt") or (body["messages"][-1]["content"] if body else "")

    def say(self, text: str | None, finish: str = "stop", usage=(7, 40), **more) -> None:
        """A completion, of a chat or of a text."""
        counts = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True)) if usage else None
        said = (
            {"text": text} if "prompt" in self.body else {"message": {"role": "assistant", "content": text}}
        )
        choice = {"index": 0, "finish_reason": finish} | said
        self.send(200, json.dumps({"model": "big", "choices": [choice], "usage": counts} | more))

    def send(self, status: int, text: str, kind: str = "application/json", **headers: str) -> None:
        self.handler.send_response(status)
        body = text.encode()
        ours = {"Content_Type": kind, "Content_Length": str(len(body)), "Connection": "close"}
        for name, value in (ours | headers).items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(body)

    def half(self) -> None:
        """A whole answer of half a JSON."""
        self.send(200, '{"model": "big", "choices": [{"index": 0, "mess')

    def broken_off(self) -> None:
        """Half an answer, and the connection ends."""
        self.send(200, '{"model": ', Content_Length="1000")
        self.handler.close_connection = True

    def dripping(self, seconds: float) -> None:
        """A byte now and then: no read ever waits long."""
        self.send(200, "", Content_Length="100000")
        for _ in range(int(seconds / 0.05)):
            self.handler.wfile.write(b" ")
            self.handler.wfile.flush()
            time.sleep(0.05)


class Peer:
    """What was asked is in `asked`, by the server's own thread."""

    def __init__(self, answer: Callable[[Asked], None], models: tuple[str, ...] = ("big",)):
        peer = self
        self.asked: list[Asked] = []
        lock = Lock()

        class Handler(BaseHTTPRequestHandler):
            wbufsize = -1  # one packet an answer: of two, the second waits 40 ms for the first one's receipt

            def do_GET(self):
                data = [{"id": name, "object": "model"} for name in models]
                Asked(self, {}, 0).send(200, json.dumps({"object": "list", "data": data}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    asked = Asked(self, body, len(peer.asked))
                    peer.asked.append(asked)
                with suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                    answer(asked)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # of five at once the sixth would ask again after a second

            def handle_error(self, *_: object) -> None:
                """Who asked has gone, while what is left was sent."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [asked.body for asked in self.asked]


@contextmanager
def serving(answer: Callable[[Asked], None], models: tuple[str, ...] = ("big",)):
    """A peer that answers while the test is inside."""
    peer = Peer(answer, models)
    thread = Thread(target=peer.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield peer
    finally:
        peer.server.shutdown()
        peer.server.server_close()
        thread.join()
