"""Runs inside the sandbox, by a bare interpreter: locks itself in, then plays the sample or its checker.

Two such processes judge a sample. The one runs generated code, and answers calls; the other runs the test,
calls the first through two pipes, and alone can say that the test passed. Only plain values cross, taken
apart here: an object that equals everything, a patched builtin or an exit stays on the side of the sample.
Imports the standard library alone, and nothing of this package: sandbox.py starts it by its path.
"""

import builtins
import contextlib
import ctypes
import json
import operator
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

NOBODY = 65534
LONGEST = 8 * 2**20  # bytes of a frame
PAST = "what it writes is no answer"
SAID = 300  # characters of an error that are repeated
ROOM = "16m"  # of the folder that may be written to, where there is one; in at most FILES files
FILES = 256
LIBC = ctypes.CDLL(None, use_errno=True)

# ---- locking in


class Refused(Exception):
    """This machine does not let a part of the sandbox be made."""


def checked(result: int, what: str) -> int:
    """The result of a call of the C library; Refused where it failed."""
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def lock_in(given: dict[str, Any]) -> None:
    """Never to see again what is outside. `given`: level, readable (folders), seconds, memory (bytes)."""
    os.umask(0o022)
    os.environ.clear()  # bubblewrap sets PWD
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: nothing outlives the process that started it
    level, writable = given["level"], "/tmp" if given["level"] != "landlock" else None
    if level == "namespaces":
        new_world(given["readable"])
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
    elif level == "bubblewrap":
        new_tmp()  # bubblewrap's own has no limit of files
    os.chdir(writable or "/")
    limits(given["seconds"], given["memory"], processes=level == "namespaces")
    capabilities = (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    checked(LIBC.capset(header, capabilities), "capset")
    checked(LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")
    abi = LIBC.syscall(444, None, 0, 1)  # landlock_create_ruleset: which version there is
    if abi > 0:
        landlock(abi, given["readable"], writable)
    elif level == "landlock":
        raise Refused("the kernel has no Landlock")
    filter_calls(CALLS | CHANGES if level == "landlock" else CALLS)


def limits(seconds: int, memory: int, processes: bool) -> None:
    """Of processor time, memory, files and threads. `processes`: where they are counted for this sandbox."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**23, 2**23))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))


def new_world(readable: list[str]) -> None:
    """Namespaces of its own: of users, mounts, processes, network, IPC and names. Returns in its only
    process; the ones outside wait for it, and end as it ends.
    """
    ready, made = os.pipe(), os.pipe()
    uid, gid = os.getuid(), os.getgid()
    if child := os.fork():
        os.close(made[0])
        os.close(ready[1])
        if os.read(ready[0], 1):  # a user's number is given from outside
            own = [f"0 {uid} 1\n", f"0 {gid} 1\n"]
            both = [f"{line}{NOBODY} {NOBODY} 1\n" for line in own] if uid == 0 else own
            if write_maps(child, both) or write_maps(child, own):
                os.write(made[1], b".")
        os.close(made[1])
        ended_with(child)
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
    os.close(made[1])
    kinds = (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x8000000, 0x4000000)  # CLONE_NEWUSER, NS, PID, ...
    checked(LIBC.unshare(sum(kinds)), "namespaces")
    os.write(ready[1], b".")
    if not os.read(made[0], 1):
        raise Refused("a user namespace cannot be given a user")
    for end in (*ready, made[0]):
        os.close(end)
    new_root(readable)
    if child := os.fork():
        ended_with(child)
    os.setsid()
    with contextlib.suppress(OSError):  # where it was not root, this number has no owner: root counts as it
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def write_maps(pid: int, lines: list[str]) -> bool:
    """Who a process in a new user namespace is outside."""
    try:
        for name, text in zip(("setgroups", "gid_map", "uid_map"), ("deny", lines[1], lines[0]), strict=True):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def ended_with(child: int) -> NoReturn:
    """Wait for the child, and end as it does."""
    for number in (0, 1):
        os.close(number)
    status = os.waitpid(child, 0)[1]
    os._exit(os.waitstatus_to_exitcode(status) % 256 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """The system call, checked."""
    words = [word.encode() if word else None for word in (source, target, kind)]
    checked(LIBC.mount(*words, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def new_root(readable: list[str]) -> None:
    """A root in memory that holds `readable` to be read, /tmp to be written, and four devices."""
    read_only, no_suid, no_dev, no_exec, remount, bind, recursive = 1, 2, 4, 8, 32, 4096, 16384
    mount("none", "/", None, recursive | 1 << 18)  # MS_PRIVATE: what is mounted here is seen here alone
    mount("tmpfs", "/tmp", "tmpfs", no_suid | no_dev, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    checked(LIBC.syscall(155 if os.uname().machine == "x86_64" else 41, b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    for path in readable:
        if os.path.islink(f"/old{path}"):
            os.symlink(os.readlink(f"/old{path}"), path)
            continue
        os.makedirs(path, 0o755, exist_ok=True)
        mount(f"/old{path}", path, None, bind | recursive)
        had = os.statvfs(path).f_flag & (no_suid | no_dev | no_exec | 1024 | 2048)  # locked, and atime's
        mount("none", path, None, bind | remount | read_only | no_suid | no_dev | had)
    os.mkdir("/dev", 0o755)
    for name in ("null", "zero", "random", "urandom"):
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY))
        mount(f"/old/dev/{name}", f"/dev/{name}", None, bind)
    os.mkdir("/tmp")
    new_tmp()
    checked(LIBC.umount2(b"/old", 2), "umount")  # MNT_DETACH
    os.rmdir("/old")
    mount("none", "/", None, bind | remount | read_only | no_suid | no_dev)


def new_tmp() -> None:
    """The folder that may be written to, in memory: of nothing in it is a trace left."""
    mount("tmpfs", "/tmp", "tmpfs", 2 | 4 | 8, f"size={ROOM},nr_inodes={FILES},mode=1777")


def landlock(abi: int, readable: list[str], writable: str | None) -> None:
    """Read `readable` alone, write `writable` alone; no TCP; no signals and no abstract sockets outwards.
    `abi`: the version of the kernel's Landlock, which says what of this it can.
    """
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    scopes = (rights, 3, 3)[: 1 if abi < 4 else 2 if abi < 6 else 3]
    attributes = struct.pack(f"={len(scopes)}Q", *scopes)
    rules = checked(LIBC.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock")
    file, folder, write, truncate = 1 << 2, 1 << 3, 1 << 1, 1 << 14
    allowed = [(path, file | folder if os.path.isdir(path) else file) for path in readable]
    allowed += [("/dev/null", file | write | truncate), ("/dev/urandom", file)]
    for path, right in [*allowed, *([(writable, rights & ~1)] if writable else [])]:
        if not os.path.exists(path):
            continue
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", right & rights, at)
        checked(LIBC.syscall(445, rules, 1, rule, 0), "landlock_add_rule")
        os.close(at)
    checked(LIBC.syscall(446, rules, 0), "landlock_restrict_self")
    os.close(rules)


# Calls that are refused, by their numbers on x86_64 and aarch64 (-1: it has none).
CALLS = {
    "socket": (41, 198),
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "inotify_init": (253, -1),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    # what a user's processes may do to each other
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "kcmp": (312, 272),
    # memory that outlives the process, or that its limit does not count
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
CHANGES = {  # of files that may not be opened: Landlock has no word on them
    "chmod": (90, -1),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "lchown": (94, -1),
    "fchownat": (260, 54),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
    "truncate": (76, 45),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "removexattrat": (466, 466),
}
OWN = {"kill": (62, 129), "tgkill": (234, 131)}  # to itself alone
CLONE, CLONE3, PAIR, LIMIT = (56, 220), 435, (53, 199), (302, 261)  # clone, clone3, socketpair, prlimit64
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH


def filter_calls(refused: dict[str, tuple[int, int]]) -> None:
    """A seccomp filter: no calls `refused`, no further processes, nothing done to others. Threads, and pairs
    of sockets that lead nowhere (asyncio wants one), stay.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise Refused(f"which calls to refuse is known on {' and '.join(MACHINES)}, and this is {machine}")
    column, arch = MACHINES[machine]
    load, equal, above, has, both, answer = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x50000 | 1, 0x80000000  # EPERM
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(above, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # the calls of x32
    for numbers in refused.values():
        if numbers[column] >= 0:
            code += [(equal, 0, 1, numbers[column]), (answer, 0, 0, refuse)]
    code += [(equal, 0, 1, CLONE3), (answer, 0, 0, 0x50000 | 38)]  # ENOSYS: libraries then call clone
    first, second = (load, 0, 0, 16), (load, 0, 0, 24)  # arguments, their lower halves
    ends = [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    code += [(equal, 0, 4, CLONE[column]), first, (has, 1, 0, 0x10000), *ends]  # CLONE_THREAD
    for numbers in OWN.values():
        code += [(equal, 0, 4, numbers[column]), first, (equal, 1, 0, os.getpid()), *ends]
    code += [(equal, 0, 4, LIMIT[column]), first, (equal, 1, 0, 0), *ends]  # 0: itself
    # A pair of datagram sockets could send elsewhere.
    code += [(equal, 0, 5, PAIR[column]), second, (both, 0, 0, 0xF), (equal, 1, 0, 1), *ends]
    code += [(answer, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    whole = struct.pack("@HP", len(code), ctypes.addressof(program))
    checked(LIBC.prctl(22, 2, whole, 0, 0), "seccomp")


# ---- values that cross


class Gone(BaseException):
    """The other side has ended, or says what it cannot mean. No Exception: a test may catch those."""


LATE = {  # values of a few more classes, where the side that has one knows it: module -> name -> read
    "decimal": {"Decimal": lambda made, text: made(text)},
    "fractions": {"Fraction": lambda made, text: made(text)},
    "datetime": {name: lambda made, text: made.fromisoformat(text) for name in ("date", "datetime", "time")},
    "pathlib": {name: lambda made, text: made(text) for name in ("PosixPath", "PurePosixPath")},
}
PLAIN: tuple[tuple[Any, Callable[[Any], Any]], ...] = (  # bool before int
    (bool | float | None, lambda value: value),
    (str, str),
    (int, lambda value: int(value) if abs(value) < 2**53 else ["i", hex(value)]),
    (complex, lambda value: ["c", value.real, value.imag]),
    (bytes, lambda value: ["b", value.hex()]),
    (bytearray, lambda value: ["B", value.hex()]),
)
MANY = {list: "l", tuple: "t", set: "s", frozenset: "z"}
MUTABLE = "lsdB"


class Peer:
    """One side of the pipes. `held`: what the other side may name, but not see. `answers`: what it may
    ask.
    """

    def __init__(self, read: BinaryIO, write: BinaryIO, answers: dict[str, Callable[..., Any]]):
        self.read, self.write, self.answers = read, write, answers
        self.held: list[Any] = []
        self.gone = ""

    def send(self, frame: dict[str, Any]) -> None:
        """Write a frame. ValueError where it is too long."""
        line = json.dumps(frame).encode()
        if len(line) > LONGEST:
            raise ValueError(f"a value of {len(line):,} bytes; up to {LONGEST:,} cross")
        try:
            self.write.write(struct.pack("=I", len(line)) + line)
            self.write.flush()
        except OSError:
            self.ended("it has ended")

    def receive(self) -> dict[str, Any]:
        """The next frame. Gone where there is none."""
        head = self.read.read(4)
        length = struct.unpack("=I", head)[0] if len(head) == 4 else 0
        line = self.read.read(length) if length <= LONGEST else b""
        if not length or len(line) < length:
            self.ended(PAST if line or length else "it has ended")
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError):
            frame = None
        if not isinstance(frame, dict):
            self.ended(PAST)
        return frame

    def ended(self, why: str) -> NoReturn:
        """Say so from now on, whatever the test catches."""
        self.gone = self.gone or why
        raise Gone(self.gone)

    def ask(self, what: str, of: int, *given: Any, **named: Any) -> Any:
        """What the other side answers; its exceptions are raised here."""
        if self.gone:
            raise Gone(self.gone)
        self.send({"do": what, "of": of, "given": self.out(given), "named": self.out(named)})
        while "do" in (frame := self.receive()):
            self.serve(frame)
        if "error" in frame:
            raise self.error(frame["error"])
        value = self.back(frame.get("value"))
        try:
            for at, changed in frame.get("changed") or ():
                replace(given[at], self.back(changed))
        except (LookupError, TypeError, ValueError, AttributeError):
            self.ended(PAST)
        return value

    def serve(self, frame: dict[str, Any]) -> None:
        """Do what a frame asks, and answer."""
        try:
            given, named = self.back(frame["given"]), self.back(frame["named"])
            value = self.answers[frame["do"]](self.held[frame["of"]], *given, **named)
            changed = [
                (at, new)
                for at, old in enumerate(frame["given"][1])
                if isinstance(old, list) and old[0] in MUTABLE and (new := self.out(given[at])) != old
            ]
            self.send({"value": self.out(value), "changed": changed})
        except Gone:
            raise
        except BaseException as error:
            self.send({"error": described(error, self)})

    def out(self, value: Any) -> Any:
        """`value` as JSON. What is no plain value stays here, under a number."""
        for kind, said in PLAIN:
            if isinstance(value, kind):
                return said(value)
        for kind, tag in MANY.items():
            if isinstance(value, kind):
                return [tag, [self.out(one) for one in value]]
        if isinstance(value, dict):
            return ["d", [[self.out(k), self.out(v)] for k, v in value.items()]]
        if isinstance(value, Remote):
            return ["y", value._of]
        kind = type(value)
        if kind.__name__ in LATE.get(kind.__module__, ()):
            return ["v", kind.__module__, kind.__name__, str(value)]
        if not (callable(value) or "get" in self.answers):
            raise TypeError(f"a {kind.__name__} of the test does not cross to the sample")
        self.held.append(value)
        return ["x", len(self.held) - 1]

    def back(self, said: Any) -> Any:
        """The value of that JSON."""
        try:
            return self._back(said)
        except (LookupError, TypeError, ValueError, AttributeError, ImportError, RecursionError):
            self.ended(PAST)

    def _back(self, said: Any) -> Any:
        if not isinstance(said, list):
            return said
        tag, *rest = said
        if tag == "d":
            return {self._back(k): self._back(v) for k, v in rest[0]}
        for kind, known in MANY.items():
            if tag == known:
                return kind(map(self._back, rest[0]))
        if tag == "v":
            module, name, text = rest
            return LATE[module][name](getattr(__import__(module), name), text)
        plain: dict[str, Callable[..., Any]] = {
            "i": lambda text: int(text, 16),
            "c": complex,
            "b": bytes.fromhex,
            "B": bytearray.fromhex,
            "x": lambda of: Remote(self, int(of)),
            "y": lambda of: self.held[of],
        }
        return plain[tag](*rest)

    def error(self, said: Any) -> BaseException:
        """The exception that the other side describes, of the nearest class that this side has."""
        classes, args, text = self.back(said)
        known = (getattr(sys.modules.get(module), name, None) for module, name in classes)
        kinds = (kind for kind in known if isinstance(kind, type) and issubclass(kind, BaseException))
        # unittest.SkipTest would pass what it skips
        kind = next((kind for kind in kinds if not kind.__module__.startswith("unittest")), Exception)
        made = kind.__new__(kind, *args)
        made.args = args
        made.__dict__["told"] = f"{classes[0][1]}: {text}"  # its own words may be those of a method there
        return made


def described(error: BaseException, peer: Peer) -> Any:
    """An exception as it crosses: its classes, its arguments where they are plain, and its text."""
    classes = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]
    plain = (int, float, type(None))
    args = tuple(one if isinstance(one, plain) else str(one)[:SAID] for one in error.args)
    return peer.out((classes, args, str(error)[:SAID]))


def replace(value: Any, new: Any) -> None:
    """What the sample did to an argument is done to the test's own."""
    if isinstance(value, list | bytearray):
        value[:] = new
    else:
        value.clear()
        value.update(new)


class Remote:
    """Something on the other side that is no plain value: a function, an object, an iterator. It equals
    itself alone, whatever it says of itself there.
    """

    __slots__ = ("_of", "_peer")

    def __init__(self, peer: Peer, of: int):
        self._peer, self._of = peer, of

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call it."""
        return self._peer.ask("call", self._of, *given, **named)

    def __getattr__(self, name: str) -> Any:
        """Its attribute."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("get", self._of, name)

    def __iter__(self) -> Iterator[Any]:
        """Its items."""
        found: Iterator[Any] = self._peer.ask("iter", self._of)
        return found

    def __next__(self) -> Any:
        """Its next item."""
        return self._peer.ask("next", self._of)

    def __len__(self) -> int:
        """How many it has."""
        return int(self._peer.ask("len", self._of))

    def __getitem__(self, key: Any) -> Any:
        """One of them."""
        return self._peer.ask("item", self._of, key)

    def __bool__(self) -> bool:
        """Is it true?"""
        return bool(self._peer.ask("bool", self._of))


ANSWERS: dict[str, Callable[..., Any]] = {
    "call": lambda found, *given, **named: found(*given, **named),
    "get": getattr,
    "next": next,
    "len": len,
    "item": operator.getitem,
    "bool": bool,
    "iter": iter,
}

# ---- the two parts


def play_sample(peer: Peer, told: dict[str, Any]) -> None:
    """Run the code, then answer calls until nobody asks. Number 0 of `held` is its module."""
    module = ModuleType("sample")
    sys.modules["sample"] = module
    peer.held.append(module)
    try:
        exec(compile(told["code"], "sample", "exec"), module.__dict__)
        getattr(module, told["entry_point"])
    except BaseException as error:
        peer.send({"error": described(error, peer)})
        return
    peer.send({"value": True})
    with contextlib.suppress(Gone):
        while True:
            peer.serve(peer.receive())


def play_checker(peer: Peer, told: dict[str, Any]) -> dict[str, Any]:
    """Run the test against the sample; what came of it, with the seconds of the test.

    The names of the prompt are the task's own text, run here; `entry_point`, and what neither this side nor
    Python knows, is the sample's.
    """
    try:
        loaded = peer.receive()
        if "error" in loaded:
            return {"verdict": "not_loaded", "said": text_of(peer.error(loaded["error"]))}
        names = Names(peer)
        exec(compile(told["prompt"], "prompt", "exec"), names)
        names[told["entry_point"]] = candidate = names[Names.MODULE](told["entry_point"])
        exec(compile(told["test"], "test", "exec"), names)
        if "check" in names:
            names["check"](candidate)
    except Gone as error:
        return {"verdict": "ended", "said": str(error)}
    except AssertionError as error:
        verdict = {"verdict": "failed", "said": text_of(error)}
    except BaseException as error:
        verdict = {"verdict": "error", "said": text_of(error)}
    else:
        verdict = {"verdict": "passed", "said": ""}
    return {"verdict": "ended", "said": peer.gone} if peer.gone else verdict


class Names(dict[str, Any]):
    """The global names of a test; what it has not, the sample may have."""

    MODULE = "\0sample"

    def __init__(self, peer: Peer):
        super().__init__({"__name__": "test", self.MODULE: lambda name: peer.ask("get", 0, name)})

    def __missing__(self, name: str) -> Any:
        """Python's own, else the sample's. KeyError where nobody has it."""
        if hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        try:
            return self[self.MODULE](name)
        except AttributeError:
            raise KeyError(name) from None


def text_of(error: BaseException) -> str:
    """Its class and its words; of the sample's, as it had them there."""
    told = getattr(error, "told", f"{type(error).__name__}: {error}")
    return str(told)[:SAID].removesuffix(": ")


def main() -> None:
    """Lock in as the first word says, tell so on standard error, then play the part for which standard input
    has what it needs.
    """
    given = json.loads(sys.argv[1])
    try:
        if given["level"] != "none":
            lock_in(given)
        else:
            limits(given["seconds"], given["memory"], processes=False)
    except (Refused, OSError) as error:
        os.write(2, json.dumps({"refused": str(error)}).encode() + b"\n")
        os._exit(3)
    read, write, verdict = (os.dup(number) for number in (0, 1, 2))
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.write(verdict, b'{"locked": true}\n')
    sample = given["part"] == "sample"
    answers = ANSWERS if sample else {"call": ANSWERS["call"]}
    peer = Peer(os.fdopen(read, "rb"), os.fdopen(write, "wb"), answers)
    with contextlib.suppress(Gone):
        if sample:
            os.close(verdict)
            play_sample(peer, peer.receive())
        else:
            os.write(verdict, json.dumps(play_checker(peer, peer.receive())).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
