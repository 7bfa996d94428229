"""A stand-in for the Hugging Face Hub on the loopback address: the calls that huggingface_hub makes to
publish, answered as the hub answers them, and kept.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import yaml

Answer = tuple[int, bytes]
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """What a repository holds: file -> bytes; `large`: those in LFS."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs"})
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"first").hexdigest()])


@dataclass
class Hub:
    """Users by token, repositories, LFS objects; and each request as (method and path, headers, body).

    `fault`: (request, body) -> an answer instead of the hub's own, or None. `makes_public`: whatever is
    asked.
    """

    url: str = ""
    users: dict[str, str] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    fault: Callable[[str], Answer | None] = lambda _: None
    makes_public: bool = False

    def made(self, start: str) -> list[str]:
        """The requests that begin so."""
        return [request for request, _, _ in self.asked if request.startswith(start)]

    def answer(self, request: str, headers: dict[str, str], body: bytes) -> Answer:
        """The hub's answer to one request."""
        if fault := self.fault(request):
            return fault
        if request.startswith("PUT /lfs/"):  # a store of its own, by a signed address
            if hashlib.sha256(body).hexdigest() != request.removeprefix("PUT /lfs/"):
                return 400, b"another hash"
            self.objects[request.removeprefix("PUT /lfs/")] = body
            return 200, b""
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if token not in self.users:
            return said(401, f"Invalid username or password: {token}")  # it repeats what it was sent
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return method(self, self.users[token], json_of(body), **match.groupdict())
        return said(404, f"no such route: {request}")

    def whoami(self, user, body) -> Answer:
        return ok({"type": "user", "name": user, "orgs": []})

    def create(self, user, body) -> Answer:
        name = f"{body['organization'] or user}/{body['name']}"
        if not name.startswith(f"{user}/"):
            return said(403, "You don't have the rights to create a model under this namespace")
        if name in self.repos:
            return said(409, "You already created this model repo")
        private = body.get("visibility") == "private" or body.get("private") is True
        self.repos[name] = Repo(private and not self.makes_public)
        return ok({"url": f"{self.url}/{name}"})

    def model(self, user, body, repo, revision=None) -> Answer:
        found = self.repos.get(repo)
        if found is None or (found.private and not repo.startswith(f"{user}/")):
            return 404, b"RepoNotFound"
        if revision and revision not in ("main", found.commits[-1]):
            return said(404, "no such revision")
        siblings = [sibling(name, content, name in found.large) for name, content in found.files.items()]
        return ok({"id": repo, "sha": found.commits[-1], "private": found.private, "siblings": siblings})

    def validate(self, user, body) -> Answer:
        found = re.match(r"(?s)---\n(.*?)\n---\n", body["content"])
        try:
            card = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError as error:
            return 400, json.dumps({"errors": [{"message": f"bad YAML: {error}"}]}).encode()
        if card is None:
            return ok({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        base = card.get("base_model")
        wrong = (
            [] if base is None or re.fullmatch(REPO, base) else [{"message": '"base_model" is no model id'}]
        )
        return (400 if wrong else 200), json.dumps({"errors": wrong, "warnings": []}).encode()

    def preupload(self, user, body, repo) -> Answer:
        ignored = self.repos[repo].files.get(".gitignore", b"").decode().split()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": file["path"] in ignored,
            }
            for file in body["files"]
        ]
        return ok({"files": files})

    def batch(self, user, body, repo) -> Answer:
        objects = [
            {
                **one,
                "actions": {
                    "upload": {"href": f"{self.url}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.url}/verify"},
                },
            }
            for one in body["objects"]
        ]
        return ok({"transfer": "basic", "objects": objects})

    def verify(self, user, body) -> Answer:
        there = len(self.objects.get(body["oid"], b"")) == body["size"]
        return ok({}) if there else said(404, "no such object")

    def commit(self, user, lines, repo) -> Answer:
        found = self.repos[repo]
        if lines[0]["value"].get("parentCommit", found.commits[-1]) != found.commits[-1]:
            return said(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del found.files[value["path"]]
                continue
            large = line["key"] == "lfsFile"
            content = self.objects[value["oid"]] if large else base64.b64decode(value["content"])
            found.files[value["path"]] = content
            (found.large.add if large else found.large.discard)(value["path"])
        found.commits.append(hashlib.sha1(json.dumps(lines).encode()).hexdigest())
        return ok(
            {"commitUrl": f"{self.url}/{repo}/commit/{found.commits[-1]}", "commitOid": found.commits[-1]}
        )


ROUTES: dict[str, Callable[..., Answer]] = {
    r"GET /api/whoami-v2": Hub.whoami,
    r"POST /api/repos/create": Hub.create,
    rf"GET /api/models/{REPO}(/revision/(?P<revision>\w+))?": Hub.model,
    r"POST /api/validate-yaml": Hub.validate,
    rf"POST /api/models/{REPO}/preupload/main": Hub.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Hub.batch,
    r"POST /verify": Hub.verify,
    rf"POST /api/models/{REPO}/commit/main": Hub.commit,
}


def ok(answer) -> Answer:
    return 200, json.dumps(answer).encode()


def said(code: int, error: str) -> Answer:
    return code, json.dumps({"error": error}).encode()


def json_of(body: bytes):
    """A body; a commit's is one JSON value a line."""
    values = [json.loads(line) for line in body.splitlines()]
    return values if len(values) > 1 else (values or [None])[0]


def sibling(name: str, content: bytes, large: bool):
    """A file of a repository; a large one is a pointer in git."""
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    )
    blob = pointer if large else content
    of_git = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    found = {"rfilename": name, "size": len(content), "blobId": of_git}
    if large:
        found["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
    return found


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """The stand-in on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer: of two, the second waits 40 ms for the first one's receipt

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = f"{self.command} {urlsplit(self.path).path}"
            hub.asked.append((request, headers, body))
            code, answer = hub.answer(request, headers, body)
            self.send_response(code)
            if answer == b"RepoNotFound":
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "text/html" if answer[:1] == b"<" else "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
