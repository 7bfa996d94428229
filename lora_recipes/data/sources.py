"""Rows from where they are: JSONL, JSON arrays, CSV, TSV and Parquet, packed or not, folders and globs of
them, data sets on the hub. Row by row, each with its place; what cannot be read is a fault there. Imports no
torch.
"""

import csv
import gzip
import io
import itertools
import json
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lora_recipes.core import files, hub, yamlfile
from lora_recipes.core.errors import Problem, listed
from lora_recipes.data.row import DECODER, Fault, Twice

# Bytes of one line, and so of one row: ten million tokens and more. A file without line breaks would be read
# whole before anything is known of it.
LINE = 32 * 2**20
ARRAY = 256 * 2**20  # bytes of a JSON array, unpacked: it is parsed in memory
BATCH = 256  # rows of a Parquet file that are in memory at once, of the row group that is open
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # ending -> first bytes
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMS = "JSONL, a JSON array, CSV, TSV or Parquet"
# A file of a folder that is held out by its name: train beside test must not be trained in silence.
HELD_OUT = re.compile(r"(^|[^a-z])(test|eval|valid|validation|dev)([^a-z]|$)", re.IGNORECASE)
Rows = Iterator[tuple[str, dict[str, Any]]]


class Ended(Problem):
    """A fault after which no more of the file is read."""


class Finds(Protocol):
    """Who says where a path is looked for: a recipe, or the command line."""

    def file(self, path: str) -> Path:
        """The file or folder that it means, there or not."""

    def looked(self, path: str) -> str:
        """Where it was looked for, in words."""


def rows(source: dict[str, Any], at: str, faults: list[Problem], notes: list[str], recipe: Finds) -> Rows:
    """Every row of a source with its place: `file:line`, or `file row n` (from 0) of Parquet, JSON arrays and
    the hub. What cannot be read as a row is added to `faults`, which files a folder or a glob means to
    `notes`.
    """
    path = recipe.file(source["path"])
    if _is_hub(source, recipe):
        yield from _hub(source, at, faults)
        return
    if options := [k for k in ("name", "split", "revision", "streaming") if k in source]:
        found = f"{' and '.join(options)} would be ignored"
        faults.append(Ended(at, found, f"{yamlfile.shown(path)} is no data set on the hub"))
    try:
        members = named(path)
    except OSError as error:
        faults.append(Ended(at, f"{yamlfile.shown(path)} cannot be read ({error.strerror})"))
        return
    except _Unclear as error:
        faults.append(Ended(at, f"{yamlfile.shown(path)} {error.args[0]}", error.args[1]))
        return
    if members == [path]:
        yield from _file(path, at, faults)
    elif members:
        notes.append(f"{len(members)} files of {source['path']}: {listed(f.name for f in members)}")
        for member in members:
            before, found_any = len(faults), False
            for row in _file(member, at, faults):
                found_any = True
                yield row
            if not found_any and len(faults) == before:
                faults.append(Ended(at, f"{yamlfile.shown(member)} has no rows", "remove the file"))
    else:
        is_glob = re.search(r"[*?[]", source["path"])
        found = "matches no file" if is_glob else "cannot be read (No such file or directory)"
        looked = recipe.looked(source["path"])
        do = f"give a file ({FORMS}), a folder, a glob, or owner/name of a data set on the hub"
        which = source["path"] if looked else yamlfile.shown(path)
        faults.append(Ended(at, f"{which} {found}", f"{looked}; {do}" if looked else do))


def content(source: dict[str, Any], recipe: Finds) -> str | None:
    """What stands for all bytes of a source and for the names of its files: two sources with one content have
    the same rows, with the same places. None where that cannot be said before they are read.
    """
    path = recipe.file(source["path"])
    if _is_hub(source, recipe):
        return _hub_content(source)
    try:
        found = [(yamlfile.shown(f), _no_file(f) or files.sha256(f)) for f in named(path)]
    except (OSError, _Unclear):
        return None
    return json.dumps(found)


def _is_hub(source: dict[str, Any], recipe: Finds) -> bool:
    path = recipe.file(source["path"])
    return not path.exists() and _kind(path) not in (*ENDINGS, ".txt") and hub.is_id(source["path"])


def named(path: Path) -> list[Path]:
    """The files that a source names: itself, those of a folder or a glob; none where nothing is there."""
    if path.exists() and not path.is_dir():
        return [path]
    found = _members(path) if path.is_dir() else _rows_alone(files.matches(path, Path("/")))
    if found:
        _one_kind(found)
    return found


def _kind(path: Path) -> str:
    """`.jsonl`, `.csv`, ...: the ending of the file's name, without the one of its packing."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


class _Unclear(ValueError):
    """A folder or a glob that is not one source: what was found, what to do."""


def _members(folder: Path) -> list[Path]:
    """The data files of a folder, in order of name. _Unclear where it cannot be said which."""
    inside = _rows_alone(sorted(folder.iterdir()))
    found = [f for f in inside if _kind(f) in ENDINGS and f.name[0] not in "._" and not f.is_dir()]
    if {"dataset_info.json", "state.json"} <= {f.name for f in inside}:
        do = "write it as Parquet: datasets.load_from_disk(...).to_parquet('rows.parquet')"
        raise _Unclear("is a folder of datasets.save_to_disk (Arrow)", do)
    if not found:
        folders = [f.name for f in inside if f.is_dir()]
        inner = f"; it has the folders {listed(folders)}: name one, or a glob" if folders else ""
        raise _Unclear("is a folder without a data file", f"{FORMS}{inner}")
    held_out = [f for f in found if HELD_OUT.search(f.name)]
    if held_out and len(held_out) < len(found):
        others = listed(f.name for f in found if f not in held_out)
        do = "name the files of each split, in a list or by a glob"
        raise _Unclear(f"holds {others} beside {listed(f.name for f in held_out)}", do)
    return found


def _rows_alone(found: list[Path]) -> list[Path]:
    """Without what a data verb leaves beside its rows: the report and the rows that it dropped."""
    names = {f.name for f in found}
    ends = (".report.json", ".dropped.jsonl")
    stems = {n.removesuffix(ends[1]) for n in names if n.endswith(ends[1])}
    beside = {s + end for s in stems for end in ends if (found[0].parent / f"{s}{ends[0]}").exists()}
    return [f for f in found if f.name not in beside]


def _one_kind(members: list[Path]) -> None:
    """_Unclear where they are of several kinds, or one is there packed and not."""
    kinds = sorted({_kind(f) or "no ending" for f in members})
    if len(kinds) > 1:
        do = f"name those of one kind by a glob, e.g. *{kinds[0]}; or list them as sources of their own"
        raise _Unclear(f"has files of several kinds: {', '.join(kinds)}", do)
    stems = Counter(f.with_suffix("") if f.suffix.lower() in PACKED else f for f in members)
    if twice := [stem.name for stem, times in stems.items() if times > 1]:
        raise _Unclear(f"has {twice[0]} both packed and not", "remove one")


def _no_file(path: Path) -> str:
    """What `path` is, when reading it would wait for a writer or never end; empty for a file, for a folder
    and where nothing is.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    kinds = {
        stat.S_ISFIFO: "a pipe",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISSOCK: "a socket",
    }
    passing = path.is_absolute() and path.parts[1] in ("dev", "proc") and not stat.S_ISDIR(mode)
    return next((what for kind, what in kinds.items() if kind(mode)), "no file that stays" if passing else "")


def _file(path: Path, at: str, faults: list[Problem]) -> Rows:
    """The rows of one file, by what its name and its first bytes say it is."""
    name = yamlfile.shown(path)
    if wrong := _no_file(path):
        do = "rows are read more than once: write them into a file"
        faults.append(Ended(at, f"{name} is {wrong}", do))
        return
    try:
        with path.open("rb") as file:
            head = file.peek(4)[:4]
            packing = next((k for k, first in PACKED.items() if head.startswith(first)), "")
            if path.suffix.lower() in PACKED and packing != path.suffix.lower() and head:
                do = "name it as what it is, or write it anew"
                faults.append(Ended(name, f"no {path.suffix.lower()[1:]} file, as its name says", do))
            elif head == b"PAR1" or _kind(path) == ".parquet":
                yield from _parquet(path, name, faults)
            elif head == b"PK\x03\x04":
                faults.append(Ended(name, "a zip archive (or a spreadsheet)", f"unpack it: {FORMS}"))
            else:
                stream = _unpacked(file, packing)
                delimiter = DELIMITERS.get(_kind(path))
                yield from (
                    _table(stream, name, delimiter, faults) if delimiter else _lines(stream, name, faults)
                )
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            faults.append(Ended(at, f"{name} cannot be read ({error.strerror})"))
        else:  # gzip and zstd have no error number
            faults.append(Ended(name, f"a broken packed file: {error}", "copy it again, or pack it again"))


def _unpacked(file: BinaryIO, packing: str) -> BinaryIO:
    """A stream of the file's own bytes. Truncated or broken, it raises EOFError, zlib.error or OSError."""
    if packing == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if packing == ".zst":
        import pyarrow  # 1 s to import; Python has no zstd before 3.14

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd"))
    return file


def _begun(line: bytes, where: str, faults: list[Problem]) -> bytes | None:
    """The first line of a text without its byte order mark; None, and a fault, where it is UTF-16."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        faults.append(Ended(where, "UTF-16, not UTF-8", "save the file as UTF-8"))
        return None
    return line.removeprefix(b"\xef\xbb\xbf")


def _lines(stream: BinaryIO, name: str, faults: list[Problem]) -> Rows:
    """The rows of JSONL, a line at a time; of a JSON array where the text begins with a bracket."""
    begun = False  # blank lines first are no content
    for number in itertools.count(1):
        if not (line := stream.readline(LINE + 1)):
            return
        where = f"{name}:{number}"
        if number == 1:
            first = _begun(line, where, faults)
            if first is None:
                return
            line = first
        if not begun and line.lstrip()[:1] == b"[":
            yield from _array(line, stream, name, number, faults)
            return
        if len(line) > LINE:
            found = f"a line of more than {LINE // 2**20} MiB"
            faults.append(Ended(where, found, "one row a line (JSONL); cut what is longer than a context"))
            return
        if not begun and line.strip() == b"{":
            do = "write one row a line (JSONL): jq -c . in.json > out.jsonl; or a list of rows"
            faults.append(Ended(where, "a JSON object over several lines", do))
            return
        begun = begun or bool(line.strip())
        found_row = _parsed(line.removesuffix(b"\n")) if line.strip() else None
        if isinstance(found_row, dict):
            yield where, found_row
        elif found_row:
            faults.append(Problem(where, *found_row))


def _array(line: bytes, stream: BinaryIO, name: str, number: int, faults: list[Problem]) -> Rows:
    """The rows of a JSON array whose first line, the file's line `number`, is read already."""
    raw = line + stream.read(ARRAY + 1 - len(line))
    if len(raw) > ARRAY:
        do = "write one row a line (JSONL), which is read line by line: jq -c '.[]' in.json > out.jsonl"
        faults.append(Ended(name, f"a JSON array of more than {ARRAY // 2**20} MiB", do))
        return
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at_line = number + raw.count(b"\n", 0, error.start)
        found = f"not UTF-8 (byte {raw[error.start]:#x})"
        faults.append(Ended(f"{name}:{at_line}", found, "save the file as UTF-8"))
        return
    i = _past(text, text.index("[") + 1)
    empty = text[i : i + 1] == "]"
    for row in itertools.count() if not empty else ():
        try:
            found_row, end = _next(text, i)
        except (ValueError, RecursionError) as error:
            at_line = number + text.count("\n", 0, getattr(error, "pos", i))
            do = f"row {row} of the array; nothing after it is read"
            faults.append(Ended(f"{name}:{at_line}", _refused(error)[0], do))
            return
        if isinstance(found_row, dict):
            yield f"{name} row {row}", found_row
        else:
            faults.append(Problem(f"{name} row {row}", *found_row))
        i = _past(text, end)
        if text[i : i + 1] != ",":
            break
        i = _past(text, i + 1)
    where = f"{name}:{number + text.count(chr(10), 0, i)}"
    if text[i : i + 1] != "]":
        faults.append(Ended(where, "broken JSON: the array does not end here", "write , or ]"))
    elif text[i + 1 :].strip():
        faults.append(Ended(where, "something follows the JSON array", "one array a file, or JSONL"))


def _next(text: str, i: int) -> tuple[dict[str, Any] | Fault, int]:
    """The row of a JSON array that begins at `i`, or why it is none, and where it ends."""
    try:
        value, end = DECODER.raw_decode(text, i)
    except Twice as error:
        return _refused(error), json.JSONDecoder().raw_decode(text, i)[1]
    return _unfit(value) or value, end


def _past(text: str, i: int) -> int:
    """The first place from `i` on that JSON does not count as white space."""
    blank = re.compile(r"[ \t\r\n]*").match(text, i)
    return blank.end() if blank else i


def _refused(error: Exception) -> Fault:
    """What json says of a text, in words."""
    if isinstance(error, Twice):
        return (
            f"the key {str(error)!r} stands twice in one object",
            "keep one: JSON takes the last in silence",
        )
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} at column {error.colno}", "one whole JSON object a line"
    # a number of more than 4,300 digits; brackets a thousand deep
    return f"JSON that Python cannot read: {error}", ""


def _unfit(value: Any) -> Fault | None:
    """Why a decoded value is no row: no object, or text that cannot be made into tokens."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800..\\udfff)", "repair the text that was cut there"
    except RecursionError as error:
        return _refused(error)
    if isinstance(value, dict):
        return None
    return f"a {type(value).__name__}, not an object", 'write {"messages": [...]}'


_KEY = re.compile(r'"[ \t\r\n]*:')


def _keys(value: Any) -> int:
    """How many keys all objects in `value` have."""
    if isinstance(value, dict):
        return len(value) + sum(_keys(v) for v in value.values() if isinstance(v, dict | list))
    return sum(_keys(v) for v in value if isinstance(v, dict | list)) if isinstance(value, list) else 0


def _parsed(line: bytes) -> dict[str, Any] | Fault:
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
        if len(_KEY.findall(text)) != _keys(value):  # a key may stand twice, or a text looks like one
            value = DECODER.decode(text)
    except UnicodeDecodeError as error:
        return (
            f"not UTF-8 (byte {line[error.start]:#x} at column {error.start + 1})",
            "save the file as UTF-8",
        )
    except (ValueError, RecursionError) as error:
        return _refused(error)
    return _unfit(value) or value


def _table(stream: BinaryIO, name: str, delimiter: str, faults: list[Problem]) -> Rows:
    """The rows of CSV or TSV, named by the line where they begin; every value is text. The first line names
    the columns, a field in double quotes may hold line breaks.
    """
    read = _Physical(stream, name, faults)
    reader = csv.reader(read, delimiter=delimiter, strict=True)
    csv.field_size_limit(LINE)  # of the process; Python's own is 128 KiB
    header: list[str] | None = None
    while True:
        read.size, begins = 0, reader.line_num + 1
        try:
            if not (fields := next(reader)):
                continue  # a blank line
        except StopIteration:
            return
        except csv.Error as error:
            do = 'a field with a quote in it stands in quotes, and its own quotes twice: "say ""hi"""'
            faults.append(Ended(f"{name}:{begins}", f"broken CSV: {error}; nothing after it is read", do))
            return
        if fault := _bytes(fields, header):
            faults.append(Problem(f"{name}:{begins}", *fault))
            if header is None:
                return
        elif header is None:
            header = [column or f"(column {i})" for i, column in enumerate(fields, 1)]
            if fault := _header(header, delimiter):
                faults.append(Ended(f"{name}:{begins}", *fault))
                return
        elif len(fields) != len(header):
            found = f"{len(fields)} columns, but the header has {len(header)}"
            faults.append(
                Problem(f"{name}:{begins}", found, f"a text that holds {delimiter!r} stands in quotes")
            )
        else:
            yield f"{name}:{begins}", dict(zip(header, map(_chat, fields), strict=True))


def _chat(text: str) -> Any:
    """A field of CSV: messages where it is a list of them as JSON text, else the text."""
    if text.lstrip().startswith("["):
        value = _parsed(b'{"v":' + text.encode("utf-8") + b"}")
        its = value.get("v") if isinstance(value, dict) else None
        if isinstance(its, list) and its and all(isinstance(m, dict) and "role" in m for m in its):
            return its
    return text


class _Physical:
    """The lines of a file for csv.reader. Bytes that are no UTF-8 come as surrogates, a row (`size` bytes
    since it began) of more than LINE ends the file with a fault.
    """

    def __init__(self, stream: BinaryIO, name: str, faults: list[Problem]):
        self.stream, self.name, self.faults = stream, name, faults
        self.number = self.size = 0

    def __iter__(self) -> "_Physical":
        return self

    def __next__(self) -> str:
        line: bytes | None = self.stream.readline(LINE + 1)
        self.number += 1
        where = f"{self.name}:{self.number}"
        if line and self.number == 1:
            line = _begun(line, where, self.faults)
        self.size += len(line or b"")
        if self.size > LINE:
            found = f"a row of more than {LINE // 2**20} MiB up to here"
            self.faults.append(Ended(where, found, "is a quote before it never closed?"))
            raise StopIteration
        if not line:
            raise StopIteration
        return line.decode("utf-8", errors="surrogateescape")


def _bytes(fields: list[str], header: list[str] | None) -> Fault | None:
    """The first byte that is no UTF-8 in a row of CSV."""
    for i, text in enumerate(fields):
        if wrong := re.search("[\udc80-\udcff]", text):
            column = header[i] if header and i < len(header) else i + 1
            found = f"not UTF-8 (byte {ord(wrong[0]) - 0xDC00:#x} in column {column})"
            return found, "save the file as UTF-8"
    return None


def _header(header: list[str], delimiter: str) -> Fault | None:
    """What is wrong with the names of the columns."""
    twice = [column for column, times in Counter(header).items() if times > 1]
    if twice:
        return f"the column {twice[0]!r} stands twice in the header", "rename or remove one"
    other = next((d for d in ";\t|," if d != delimiter and d in header[0]), None)
    if len(header) == 1 and other:
        return f"one column, {header[0]!r}: {other!r} separates here", f"write the file with {delimiter!r}"
    return None


def _parquet(path: Path, name: str, faults: list[Problem]) -> Rows:
    """The rows of a Parquet file, BATCH at a time. A null inside a value is a field that the row does not
    have: a column has one schema for all rows.
    """
    import pyarrow
    from pyarrow import parquet  # 1.4 s to import

    if path.suffix.lower() in PACKED:
        faults.append(Ended(name, "a packed Parquet file", "unpack it: Parquet packs its columns itself"))
        return
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            if twice := [c for c, times in Counter(file.schema_arrow.names).items() if times > 1]:
                faults.append(Ended(name, f"the column {twice[0]!r} stands twice", "rename or remove one"))
                return
            for batch in file.iter_batches(BATCH):
                for value in batch.to_pylist():
                    yield f"{name} row {number}", {k: without_nulls(v) for k, v in value.items()}
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        do = "copy it again; is it Parquet, and whole?"
        faults.append(Ended(f"{name} row {number}", f"a broken Parquet file: {first}", do))


def without_nulls(value: Any) -> Any:
    """`value` without the nulls that Arrow puts where one row has a field and another has not; `content` of a
    message may be null.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _hub(source: dict[str, Any], at: str, faults: list[Problem]) -> Rows:
    split, read = source.get("split", "train"), 0
    try:
        for value in _loaded(**source):
            yield f"{source['path']}[{split}] row {read}", {k: without_nulls(v) for k, v in value.items()}
            read += 1
    except Exception as error:  # every kind of network, hub and format error; its first line says which
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        unreachable = hub.silent()
        why = (
            f"the hub does not give it ({unreachable}), and it is not in the cache" if unreachable else first
        )
        do = "a local file ends in .jsonl, .json, .csv, .tsv or .parquet; a data set on the hub is owner/name"
        after = f" after row {read - 1}" if read else ""
        faults.append(Ended(at, f"the data set {source['path']} cannot be loaded{after}: {why}", do))


def _loaded(
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    **_: Any,
) -> Any:
    """A data set on the hub: as it lies in the cache of `datasets`, or as a stream."""
    from datasets import config, load_dataset  # 1 s to import, and only hub data needs it

    offline = config.HF_HUB_OFFLINE
    # Then it comes from the cache or fails, without the retries.
    config.HF_HUB_OFFLINE = offline or bool(hub.silent())
    try:
        return load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    finally:
        config.HF_HUB_OFFLINE = offline


def _hub_content(source: dict[str, Any]) -> str | None:
    """The bytes of its Arrow files; of a stream the commit that it comes from."""
    try:
        if not source.get("streaming"):
            found = [files.sha256(Path(f["filename"])) for f in _loaded(**source).cache_files]
            return json.dumps([source["path"], source.get("split"), found])
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(source["path"], revision=source.get("revision"), timeout=hub.SECONDS)
        return json.dumps([source["path"], source.get("name"), source.get("split"), commit.sha])
    except Exception:  # as in _hub, which says it
        return None
