"""`monitor`: answers are kept with consent alone, cleaned, whole; and a look at them finds drift."""

import contextlib
import http.client
import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from lora_recipes.__main__ import main
from lora_recipes.core.errors import Exit
from lora_recipes.release.answers import Log, Server
from tests.release.conftest import lines

SECRET = "anna.larsson@example-mail.org"
WORDS = ["My mail ", "is anna.lars", "son@example-mail.org", "."]


def event(**part):
    return b"data: " + json.dumps({"choices": [{"index": 0, **part}]}).encode() + b"\n\n"


STREAM = [event(delta={"role": "assistant", "content": word}) for word in WORDS]
STREAM += [event(delta={}, finish_reason="stop"), b"data: [DONE]\n\n"]
CHAT = {"message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop", "index": 0}


class Upstream(BaseHTTPRequestHandler):
    """What vLLM sends: one object, or a stream of events; `model: cut` ends in the middle."""

    protocol_version = "HTTP/1.1"
    went = threading.Event()  # the client has the first event

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == "Bearer key" and "X-Log-Consent" not in self.headers
        self.send_response(200)
        if asked.get("stream"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for i, part in enumerate(STREAM):
                if i == 1:
                    assert self.went.wait(30), "the first event is passed on before the second is there"
                if i == 2 and asked["model"] == "cut":
                    self.close_connection = True
                    return
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        said = json.dumps({"choices": [CHAT]}).encode()
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(url, consent="", **more):
    """The body that comes back."""
    body = json.dumps(
        {"model": "own", "messages": [{"role": "user", "content": f"{SECRET}?"}], **more}
    ).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
    headers |= {"x-log-consent": consent} if consent else {}
    Upstream.went.clear()
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/chat/completions", body, headers), timeout=60
    ) as answer:
        first = answer.read1(5)
        Upstream.went.set()
        return first + answer.read()


def test_answers_are_passed_on_as_they_come_and_kept_cleaned_where_consent_was_given(tmp_path):
    log = Log(tmp_path / "answers.jsonl")
    with (
        serving(ThreadingHTTPServer(("127.0.0.1", 0), Upstream)) as up,
        serving(Server(("127.0.0.1", 0), urlsplit(up), log, False)) as url,
    ):
        assert ask(url) == json.dumps({"choices": [CHAT]}).encode()
        ask(url, "no")
        assert not log.file.exists(), "without consent nothing is kept"
        ask(url, "yes")
        assert ask(url, "yes", stream=True) == b"".join(STREAM)
        with pytest.raises((http.client.HTTPException, OSError)):  # it is cut for the client, too
            ask(url, "yes", stream=True, model="cut")
    nobody = Server(("127.0.0.1", 0), urlsplit("http://127.0.0.1:9"), log, True)
    with serving(nobody) as url, pytest.raises(urllib.error.HTTPError, match="502"):
        ask(url)
    kept = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert SECRET not in log.file.read_text() and log.file.stat().st_mode & 0o077 == 0
    assert [row["completion"][0]["content"] for row in kept] == ["My mail is [EMAIL]."] * 2
    assert kept[0]["prompt"] == [{"role": "user", "content": "[EMAIL]?"}] and kept[1]["model"] == "own"
    assert log.counts == {"passed": 2, "kept": 2, "replaced": 4, "unfit": 1}


@pytest.mark.parametrize("consent", [[], ["--consent", "yes"]])
def test_no_proxy_starts_without_a_word_about_consent(tmp_path, capsys, consent):
    words = ["monitor", "own", "--log", str(tmp_path / "a.jsonl"), "--url", "http://127.0.0.1:9", *consent]
    assert main(words) == 2
    assert "CONSENT" in (said := capsys.readouterr().err) and "X-Log-Consent: yes" in said


@pytest.mark.parametrize("url", ["localhost:8000", "http://x:abc", "http://", "ftp://x", "http://[x"])
def test_what_is_no_address_of_a_server(tmp_path, capsys, url):
    words = ["monitor", "own", "--log", str(tmp_path / "a.jsonl"), "--url", url, "--consent", "header"]
    assert main(words) == 2 and "is no address of a server" in capsys.readouterr().err


def answer(text, model="own", end="stop"):
    prompt, _, last = text.strip().rpartition(" ")
    return json.dumps(
        {"prompt": prompt, "completion": f" {last}", "model": model, "at": "", "finish_reason": end}
    )


def test_a_look_at_kept_answers_makes_a_page_and_finds_drift(project, tmp_path, capsys):
    assert project.release() == 0
    texts = [json.loads(line)["text"] for line in lines("base.jsonl")]
    strange = ["zebra quorum xylem plinth", "lemon key train dog sour", "York cat under tastes basket"] * 4
    log = tmp_path / "answers.jsonl"

    def look(*words):
        code = project.call("monitor", "own", "--log", str(log), "--share", "1", *words)
        return code, "".join(capsys.readouterr())

    log.write_text("".join(answer(t) + "\n" for t in texts) + answer(texts[0], end="length") + "\n")
    code, said = look()
    assert code == Exit.DONE and "no rise shown" in said and "(1 were cut and are left out)" in said
    assert (tmp_path / "answers.review.html").is_file() and not project.record["monitored"]["drift"]
    assert look()[0] == 2, "the page is not replaced unasked"
    log.write_text("".join(answer(t) + "\n" for t in strange))
    code, said = look("--force")
    assert code == Exit.DRIFT and "higher: drift" in said and project.record["monitored"]["drift"]
    log.write_text(answer(texts[0]) + "\n" + answer(texts[1], "base") + "\n")
    code, said = look("--force")
    assert code == 2 and "several models answered: own (1), base (1)" in said
    assert look("--force", "--model", "own")[0] == Exit.TOO_FEW
    log.write_text('{"text": "a row"}\n')
    assert look("--force")[0] == 2
