"""Read a YAML file into plain values, remembering on which line each stands; write one that reads back the
same.

Scalars are those of YAML 1.2: `2e-4` is a number, `no` and `on` are words. Duplicate keys, tabs, a BOM, other
encodings, an empty file, a list where a mapping is meant, anchors, merge keys and second documents are
answered here, once, for recipes and contracts alike.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lora_recipes.core.errors import Problem, RecipeError, raise_if

Key = tuple[str | int, ...]
Lines = dict[Key, int]  # ("lora", "target_modules", 1) -> line, counted from 1

# yaml.org/spec/1.2.2, section 10.3.2; each with the characters that it can begin with
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


# bytes; the longest shipped recipe has 3,000. What is wrong with a file of this size is told in seconds.
LARGEST = 256 * 1024
DEEPEST = (
    50  # levels of lists and mappings in each other; libyaml's parser is recursive, and would not return
)
LONGEST_KEY = 1000
# Characters that look like a space or like nothing: of the classes space, format and separator. Those that
# stand inside words of some scripts and emoji (the joiners) are meant where they stand in quotation marks.
_INVISIBLE = re.compile("[\u0085\u00a0\u00ad\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]")
_OPENING, _CLOSING = (
    "\u201c\u201d\u201e\u201f\u2018\u2019\u201a\u201b\u00ab",
    "\u201c\u201d\u2018\u2019\u00bb",
)


def invisible(text: str) -> str:
    """The first character of `text` that cannot be seen, named; empty where there is none."""
    found = _INVISIBLE.search(text)
    return "" if found is None else f"{_name(found[0])} (U+{ord(found[0]):04X})"


def _name(character: str) -> str:
    name = unicodedata.name(character, "CONTROL CHARACTER").lower()
    name = {"no-break space": "non-breaking space", "zero width no-break space": "byte order mark"}.get(
        name, name
    )
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # a base that is chosen
    """SafeLoader with the scalars of YAML 1.2 instead of 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either version would read as something else: YAML 1.1 takes `1e5` for a
    word, 1.2 for a number.
    """

    def ignore_aliases(self, data: Any) -> bool:
        """Write a list that is used twice out twice: `_Loader` takes no anchors."""
        return True


def _quoted(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    strange = invisible(text) or (text[:1] in _OPENING and text[-1:] in _CLOSING)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if text and strange else None)


_Dumper.add_representer(str, _quoted)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def shown(path: Path) -> str:
    """`path` as a person would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../..") else relative


def dotted(key: Key) -> str:
    """`("data", "train", 0, "path")` -> `data.train[0].path`."""
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in key).removeprefix(".")


def dump(value: dict[str, Any]) -> str:
    """`value` as YAML that `load` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def load(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in the YAML file `path`, and the line of each of its keys. RecipeError lists everything
    wrong with the file.
    """
    value, lines, problems = read(path)
    raise_if(problems)
    return value, lines


def read(path: Path) -> tuple[dict[str, Any], Lines, list[Problem]]:
    """As `load`, but with the faults of single keys returned, so that the caller can add its own. RecipeError
    when there is no mapping.
    """
    name = shown(path)
    try:
        if path.is_file() and (size := path.stat().st_size) > LARGEST:
            do = f"at most {LARGEST:,}: rows of data stand in files of their own, which data.train names"
            raise RecipeError(Problem(name, f"{size:,} bytes are too many for a file of settings", do))
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            Problem(f"{name}:{_line(raw, error.start)}", "not UTF-8 text", "save the file as UTF-8")
        ) from None
    except OSError as error:
        raise RecipeError(Problem(name, f"cannot be read ({error.strerror})")) from None
    value, lines, problems = parse(text, name)
    if not isinstance(value, dict):
        found = (
            "the file is empty"
            if value is None
            else f"{_kind(value)} stands where `key: value` lines are expected"
        )
        raise RecipeError([*problems, Problem(f"{name}:1", found, "compare with its neighbours in configs/")])
    return value, lines, problems


def parse(text: str, name: str) -> tuple[Any, Lines, list[Problem]]:
    """The value of the YAML `text`, the line of each key path in it, and the problems of single keys
    (duplicates and the like).

    RecipeError for what leaves no value to speak of: broken syntax, anchors, tags, a second document.
    """
    builder = _Builder(name)
    value = None
    try:
        refused = list(_refused(text, name))
        if not refused:
            node = yaml.compose(text, Loader=_Loader)
            value = None if node is None else builder.build(node, ())
    except yaml.YAMLError as error:
        raise RecipeError(_syntax(error, text, name)) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of more than 4,300 digits; 1,000 brackets in each other
        raise RecipeError(Problem(name, f"cannot be read: {error}")) from None
    raise_if(refused)
    return value, builder.lines, builder.problems


class _Builder:
    """Builds plain values from YAML nodes; `lines` and `problems` gather along the way."""

    def __init__(self, name: str):
        self.name = name
        self.lines: Lines = {}
        self.problems: list[Problem] = []
        self.scalars = _Loader("")

    def build(self, node: yaml.Node, path: Key) -> Any:
        """The value of `node`, which stands at `path`."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            self._seen(node, path)
            return self.scalars.construct_object(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, value_node)
            if key is None:
                continue
            here, line = (*path, key), key_node.start_mark.line + 1
            if key in result:
                self._problem(
                    line, dotted(here), f"given twice, first on line {self.lines[here]}", "keep one"
                )
            self.lines[here] = line
            result[key] = self.build(value_node, here)
        return result

    def _seen(self, node: Any, path: Key) -> None:
        """A problem where the scalar `node` is not what it looks like."""
        line, text = node.start_mark.line + 1, node.value
        # In quotation marks it is meant, but for one at an end, which is a slip of the clipboard.
        strange = invisible(text if not node.style else text[:1] + text[-1:])
        if strange:
            do = "type the value anew; in the middle of a text in quotation marks it is taken as meant"
            self._problem(line, dotted(path), f"the value holds {strange}, which cannot be seen", do)
        elif not node.style and len(text) > 1 and text[0] in _OPENING and text[-1] in _CLOSING:
            found = f"the quotation marks {text[0]} {text[-1]} would be part of the value"
            self._problem(line, dotted(path), found, "write \" or ' instead")

    def _key(self, node: Any, value: Any) -> str | None:
        """The name that `node` gives to `value`; None, and a problem, where it gives none."""
        line = node.start_mark.line + 1
        if strange := invisible(node.value if isinstance(node, yaml.ScalarNode) else ""):
            shown = _INVISIBLE.sub("", node.value).strip()
            self._problem(line, shown, f"the key holds {strange}, which cannot be seen", "type the line anew")
            return None
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_KEY:
            self._problem(line, "", f"a key of {len(node.value):,} characters", "a key is a name")
            return None
        key = self.scalars.construct_object(node) if isinstance(node, yaml.ScalarNode) else node
        if isinstance(key, yaml.Node):
            self._problem(
                line,
                "",
                "a list or a mapping cannot be a key",
                "write a plain name; there are no {{ templates }} here",
            )
        elif not isinstance(key, str):
            do = f"a key is a name; in quotation marks, {node.value!r}, it is one"
            self._problem(line, "", f"the key {node.value or 'is empty and'} is read as {_kind(key)}", do)
        elif key == "<<" and not node.style:
            self._problem(line, "", "a merge key (<<)", "nothing is inherited: write the values out")
        elif (
            ":" in key
            and not node.style
            and isinstance(value, yaml.ScalarNode)
            and not (value.value or value.style)
        ):
            first, _, rest = key.partition(":")  # {a:1} is YAML for {"a:1": null}
            self._problem(
                line,
                "",
                f"{key!r} is read as a key without a value",
                f"a space after the colon: `{first}: {rest}`",
            )
        else:
            return key
        return None

    def _problem(self, line: int, where: str, found: str, do: str) -> None:
        self.problems.append(Problem(f"{self.name}:{line} {where}".rstrip(), found, do))


_BEGINS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def _refused(text: str, name: str) -> Iterator[Problem]:
    """What is YAML but has no place here. Found before anything is built: an alias can stand for itself, or
    for a billion values.
    """
    inherit = (
        "nothing is inherited or shared: write the values out (a text that begins so stands in quotation"
        " marks)"
    )
    begun, depth = False, 0
    for token in yaml.scan(text, Loader=_Loader):
        where = f"{name}:{token.start_mark.line + 1}"
        depth += isinstance(token, _BEGINS) - isinstance(token, _ENDS)
        if depth > DEEPEST:
            yield Problem(
                where, f"more than {DEEPEST} lists and mappings in each other", "no setting needs them"
            )
            return
        if isinstance(token, yaml.AnchorToken):
            yield Problem(where, f"an anchor (&{token.value})", inherit)
        elif isinstance(token, yaml.AliasToken):
            yield Problem(where, f"an alias (*{token.value})", inherit)
        elif isinstance(token, yaml.TagToken):
            yield Problem(where, f"a tag ({''.join(filter(None, token.value))})", "write the plain value")
        elif isinstance(token, yaml.DocumentStartToken) and begun:
            yield Problem(where, "a second document begins (---)", "one file, one document")
        begun |= not isinstance(token, yaml.StreamStartToken | yaml.DirectiveToken)


def _syntax(error: yaml.YAMLError, text: str, name: str) -> Problem:
    """What is wrong with the syntax, on the line where it begins: that of the opening bracket, when one is
    never closed.
    """
    if isinstance(error, yaml.reader.ReaderError):
        line = _line(text.encode(), error.position)
        return Problem(
            f"{name}:{line}", f"not YAML: a control character ({error.character:#04x})", "remove it"
        )
    assert isinstance(error, yaml.MarkedYAMLError)
    mark, opened = error.problem_mark or error.context_mark, error.context_mark
    line = mark.line + 1 if mark else 1
    for number, content in enumerate(text.split("\n"), 1):
        where = f"{name}:{number}"
        if abs(number - line) > 1:
            continue
        if strange := invisible(content):
            return Problem(where, f"{strange} stands here, which cannot be seen", "type the line anew")
        if "\t" in content[: len(content) - len(content.lstrip())]:
            return Problem(where, "indented with a tab", "YAML indents with spaces only")
        if glued := re.match(r"\s*(\w+):([^\s:/]\S*)\s*(#.*)?$", content):
            key, value = glued.group(1, 2)
            return Problem(
                where,
                f"{key}:{value} is read as one word",
                f"write `{key}: {value}`, with a space after the colon",
            )
    found = f"not YAML: {error.problem or error.context}"
    if opened and opened.line + 1 < line and re.search("flow|quoted", error.context or ""):
        found, line = f"{found} by line {line}, for what opens here", opened.line + 1
    return Problem(
        f"{name}:{line}",
        found,
        "write `key: value`, with a space after the colon; quote a text that holds other marks",
    )


def _line(raw: bytes, position: int) -> int:
    return raw[:position].count(b"\n") + 1


def _kind(value: Any) -> str:
    kinds = {
        "list": "a list",
        "str": "a text",
        "bool": "true or false",
        "int": "a number",
        "float": "a number",
        "NoneType": "null",
    }
    return kinds[type(value).__name__]
