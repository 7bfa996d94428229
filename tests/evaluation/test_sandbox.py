"""Generated code in the sandbox: what is hostile is contained and judged failing, what is right passes, by
every level that this machine has.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_recipes.core.errors import RecipeError
from lora_recipes.evaluation import sandbox
from lora_recipes.evaluation.sandbox import JAIL, LEVELS, Limits, Sandbox, Unusable

LIMITS = Limits(seconds=1, memory=2**28)
HASTY = Limits(seconds=1, clock=1)
SEVEN = "def check(candidate):\n    assert candidate() == 7"


@pytest.fixture(scope="module", params=LEVELS)
def box(request):
    found = Sandbox(request.param, LIMITS)
    if why := sandbox.leaks(found):
        pytest.skip(why)
    return found


@pytest.fixture(scope="module")
def strongest():
    return sandbox.find(LIMITS)


def jailed():
    """The processes of any sandbox."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(JAIL) in (p.info["cmdline"] or [])]


def nothing_left():
    until = time.monotonic() + 10
    while found := jailed():
        assert time.monotonic() < until, found
        time.sleep(0.05)


CONTAINED = {
    "fork bomb": ("import os\ndef f():\n    while True: os.fork()", "error", "PermissionError"),
    "daemon": (
        "import os, time\ndef f():\n    if not os.fork():\n        os.setsid(); time.sleep(99)\n    return 7",
        "error",
        "PermissionError",
    ),
    "program": ("import subprocess\ndef f(): subprocess.run(['/bin/sh'])", "error", "PermissionError"),
    "disk": (
        "def f():\n    for n in range(9999):\n        open(f'x{n}', 'wb').write(bytes(2**20))\n    return 7",
        "error",
        "Error",
    ),
    "many files": ("def f():\n    for n in range(9999): open(f'x{n}', 'w')\n    return 7", "error", "Error"),
    "memory": ("def f(): return bytes(2**29) and 7", "memory", "256 MiB"),
    "endless": ("def f():\n    while True: pass", "time", "processor time"),
    "signal": ("import os\ndef f(): os.kill(os.getppid(), 9); return 7", "error", "PermissionError"),
    "its group": ("import os\ndef f(): os.kill(-1, 9); return 7", "error", "PermissionError"),
}
FORGED = {  # by every level alike
    "exits": ("import sys\ndef f(): sys.exit(0)", "error", "SystemExit: 0"),
    "exits at once": ("import os\ndef f(): os._exit(0)", "ended", "it has ended"),
    "exits before": ("import sys\ndef f(): return 7\nsys.exit(0)", "not_loaded", "SystemExit: 0"),
    "at exit": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(): return 8", "failed", ""),
    "equals everything": ("class Y:\n    def __eq__(s, o): return True\ndef f(): return Y()", "failed", ""),
    "an int that does": (
        "class Y(int):\n    def __eq__(s, o): return True\n    __ne__ = __eq__\ndef f(): return Y(8)",
        "failed",
        "",
    ),
    "patches": (
        "import builtins, sys\nbuiltins.AssertionError = builtins.print = lambda *a: None\n"
        "sys.excepthook = lambda *a: None\ndef check(c): pass\ndef f(): return 8",
        "failed",
        "",
    ),
    "reads the frames": (  # of its own process: there is its peer, and no verdict
        "import sys\ndef f():\n    at = sys._getframe()\n    while 'peer' not in at.f_locals: "
        "at = at.f_back\n    at.f_locals['peer'].send({'verdict': 'passed', 'value': 8})\n    return 7",
        "failed",
        "",
    ),
    "writes past": (
        "import os\ndef f():\n    for n in range(64):\n        try: os.write(n, b'passed' * 9)\n"
        "        except OSError: pass\n    return 7",
        "ended",
        "no answer",
    ),
    "skips": ("import unittest\ndef f(): raise unittest.SkipTest", "error", "SkipTest"),
    "too much": ("def f(): return 'x' * 10**7", "error", "up to 8,388,608 cross"),
    "no code": ("def f(:", "not_loaded", "SyntaxError: invalid syntax (sample, line 1)"),
    "another name": ("def g(): return 7", "not_loaded", "AttributeError"),
}


@pytest.mark.parametrize("name", CONTAINED)
def test_what_is_hostile_is_contained_and_fails(box, name):
    code, verdict, said = CONTAINED[name]
    found = box.judge(code, "f", SEVEN)
    assert (found.verdict, found.passed) == (verdict, False) and said in found.said, found
    nothing_left()


@pytest.mark.parametrize("name", FORGED)
def test_no_sample_says_of_itself_that_it_passed(strongest, name):
    code, verdict, said = FORGED[name]
    found = strongest.judge(code, "f", SEVEN)
    assert (found.verdict, found.passed) == (verdict, False) and said in found.said, found


def test_nothing_of_this_machine_is_seen_or_changed(box, tmp_path):
    (own := tmp_path / "own.txt").write_text("mine")
    own.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        steps = [
            f"open({str(own)!r}).read()",
            f"open({str(own)!r}, 'w').write('')",
            f"os.truncate({str(own)!r}, 0)",
            f"os.chmod({str(own)!r}, 0)",
            f"os.utime({str(own)!r}, (1, 1))",
            f"os.setxattr({str(own)!r}, 'user.x', b'1')",
            f"os.chown({str(own)!r}, 0, 0)",
            f"resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE)",
            f"os.sched_setaffinity({os.getpid()}, {{0}})",
            f"os.listdir({str(Path.home())!r}).index({next(iter(os.listdir(Path.home())), '')!r})",  # noqa: PTH208
            "os.listdir('/proc').index('1')",
            f"open('/proc/{os.getpid()}/cmdline').read()",
            "open('/etc/passwd').read()",
            "os.environ['PATH']",
            f"socket.create_connection({server.getsockname()!r})",
            "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
            "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0 or exit_now",
        ]
        code = f"import ctypes, os, resource, socket\ndef f(n):\n    return eval({steps!r}[n])"
        test = f"for n in range({len(steps)}):\n    try: found = f(n)\n    except Exception: pass\n"
        found = box.judge(code, "f", test + "    else: raise AssertionError(n, found)")
        assert found.passed, found
        with pytest.raises(BlockingIOError):
            server.accept()
    assert own.read_text() == "mine" and own.stat().st_mode & 0o777 == 0o666 and own.stat().st_mtime > 1


PLAIN = """
import collections, decimal, itertools
def helper(x): return x + 1
def f(x): return x
def sort(xs): xs.sort(); return None
def apply(g, xs): return [g(x) for x in xs]
def count(): yield from itertools.count()
def fail(x): raise {0: ValueError, 1: KeyError}[x]("words", 3)
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def pop(self): return self.items.pop()
def loud(): print("x" * 10**8); return "quiet"
def money(): return decimal.Decimal("1.10")
"""
USES = """
import math, decimal
for value in [None, True, 1.5, 10**50, -0.0, "\\ud800", (1, [2]), {3}, frozenset({4}), {(1,): b"x"}, 1j,
              bytearray(b"y"), float("inf"), [{"a": [(1, 2)]}]]:
    assert f(value) == value and type(f(value)) is type(value), value
assert math.isnan(f(math.nan))
xs = [3, 1, 2]
assert sort(xs) is None and xs == [1, 2, 3]
assert apply(lambda x: x * 2, xs) == [2, 4, 6]
counted = count()
assert [next(counted) for _ in range(3)] == [0, 1, 2]
for n, kind in enumerate([ValueError, KeyError]):
    try: fail(n)
    except kind as error: assert error.args == ("words", 3)
    else: assert False
stack = Stack()
assert stack.push(1).push(2).pop() == 2 and stack.items == [1]
assert loud() == "quiet" and money() == decimal.Decimal("1.10") and helper(1) == given(2) == 2
"""


def test_what_is_right_passes_and_values_cross_as_they_are(strongest):
    found = strongest.judge(PLAIN, "f", USES, "def given(x): return x\ndef f(x):\n    'what to write'")
    assert found.passed, found


@pytest.mark.parametrize(
    "test, verdict, said",
    [
        ("import sys\nsys.exit(0)", "error", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended", "process of the test"),
        ("while True: pass", "time", "by the test"),
        ("try: f(1)\nexcept BaseException: pass", "ended", "it has ended"),
        ("f(object())", "error", "a object of the test does not cross"),
        ("nowhere()", "error", "name 'nowhere' is not defined"),
    ],
)
def test_a_test_that_does_not_come_to_its_end_is_not_passed(strongest, test, verdict, said):
    found = strongest.judge("import os\ndef f(x): os._exit(0)", "f", test)
    assert found.verdict == verdict and said in found.said, found


def test_a_test_that_sleeps_is_ended_by_the_clock(box):
    found = Sandbox(box.level, HASTY).judge("def f(): pass", "f", "import time\ntime.sleep(99)")
    assert found.verdict == "time" and "no end within 1 s" in found.said


def test_a_killed_run_leaves_nothing_behind(box):
    program = (
        "from lora_recipes.evaluation.sandbox import Sandbox, Limits\n"
        f"Sandbox({box.level!r}, Limits(60)).judge('def f():\\n    while True: pass', 'f', 'f()')"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root) as process:
        until = time.monotonic() + 60
        while sum(p.cpu_times().user for p in jailed() if p.is_running()) < 0.3:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.kill()
    nothing_left()


def test_without_a_sandbox_nothing_runs_unless_told():
    with pytest.raises(RecipeError, match=r"none holds on this machine \(\).*\n.*CONFIRM_RUN_UNSAFE_CODE=1"):
        sandbox.find(levels=())
    found = sandbox.find(LIMITS, unsafe=True, levels=())
    assert found.level == "none" and found.judge("def f(): return 7", "f", SEVEN).passed
    assert found.judge("def f():\n    while True: pass", "f", SEVEN).verdict == "time"


def test_a_level_that_is_not_here_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unusable, match="no bwrap"):
        Sandbox("bubblewrap").judge("", "f", "")
    assert sandbox.leaks(Sandbox("bubblewrap")) == "there is no bwrap"


def test_what_leaks_is_named():
    """The attempts find what is open: without a sandbox nearly all of it is."""
    found = sandbox.leaks(Sandbox("none", LIMITS))
    assert found.startswith(("failed: ", "what it sent", "it changed"))
