"""Reading YAML: scalars of version 1.2, lines, and every fault of a file answered with its line."""

import math
import time
from pathlib import Path

import pytest
import yaml

from lora_recipes.core import yamlfile
from lora_recipes.core.errors import RecipeError


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write bytes or text as x.yaml in the working folder; returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(content):
        path = tmp_path / "x.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def value(text):
    """The value of the key `a`."""
    return yamlfile.parse(f"a: {text}", "x")[0]["a"]


def refusal(path):
    """What the RecipeError for the file says."""
    with pytest.raises(RecipeError) as error:
        yamlfile.load(path)
    return str(error.value)


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "0.0002", ".2e-3", "+2e-4", "20e-5"])
def test_a_number_is_a_number_however_it_is_written(text):
    assert value(text) == 2e-4


@pytest.mark.parametrize(
    ("text", "meant"),
    [("3", 3), ("-3", -3), ("0", 0), ("true", True), ("False", False), ("~", None), ("", None)],
)
def test_plain_scalars_have_the_types_of_yaml_1_2(text, meant):
    assert value(text) == meant
    assert type(value(text)) is type(meant)


@pytest.mark.parametrize(
    "word",
    ["no", "No", "yes", "on", "OFF", "y", "n", "12:30:45", "2001-12-14", "1_000", "0x1F", "=", "1e", "e5"],
)
def test_words_that_yaml_1_1_takes_for_something_else_stay_words(word):
    assert value(word) == word


def test_quotation_marks_make_a_text_of_anything():
    assert [value(f"'{text}'") for text in ("2e-4", "true", "null", "3")] == ["2e-4", "true", "null", "3"]


def test_infinity_and_nan_are_read_as_what_they_are():
    assert value(".inf") == math.inf
    assert math.isnan(value(".nan"))


def test_every_key_and_every_item_knows_its_line(written):
    text = (
        "# a comment\na:\n  b: 1\n\n  c: [x,\n      y]\n  d:\n    - e: 1\n      f: 2\n    - {e: 3,\n       f:"
        " 4}\n"
    )
    content, lines = yamlfile.load(written(text))
    assert content == {"a": {"b": 1, "c": ["x", "y"], "d": [{"e": 1, "f": 2}, {"e": 3, "f": 4}]}}
    found = {yamlfile.dotted(key): line for key, line in lines.items() if key}
    assert found == {
        "a": 2, "a.b": 3, "a.c": 5, "a.c[0]": 5, "a.c[1]": 6, "a.d": 7,
        "a.d[0]": 8, "a.d[0].e": 8, "a.d[0].f": 9, "a.d[1]": 10, "a.d[1].e": 10, "a.d[1].f": 11,
    }  # fmt: skip


def test_a_byte_order_mark_is_accepted(written):
    assert yamlfile.load(written(b"\xef\xbb\xbfa: 1\n")) == ({"a": 1}, {(): 1, ("a",): 1})


def test_windows_line_ends_are_accepted(written):
    assert yamlfile.load(written("a: 1\r\nb:\r\n  c: x\r\n"))[0] == {"a": 1, "b": {"c": "x"}}


def test_characters_beyond_ascii_are_read_as_they_stand(written):
    assert yamlfile.load(written("a: Die Katze schl\u00e4ft\n"))[0] == {"a": "Die Katze schl\u00e4ft"}


def test_a_leading_document_mark_is_accepted(written):
    assert yamlfile.load(written("%YAML 1.2\n---\na: 1\n...\n"))[0] == {"a": 1}


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: given twice, first on line 1"),
        ("a:\n  b: 1\n  b: 1\n", 3, "a.b: given twice, first on line 2"),
        ("a:\n  - {b: 1,\n     b: 2}\n", 3, "a[0].b: given twice, first on line 2"),
        ("a:\n\tb: 1\n", 2, "indented with a tab"),
        ("a: 1\nb:\n  c: 1\n\td: 1\n", 4, "indented with a tab"),
        ("", 1, "the file is empty"),
        ("# only a comment\n\n", 1, "the file is empty"),
        ("- a\n- b\n", 1, "a list stands where"),
        ("just words\n", 1, "a text stands where"),
        ("3\n", 1, "a number stands where"),
        (b"a: 1\nb: caf\xe9\n", 2, "not UTF-8"),
        ("a: 1\n".encode("utf-16"), 1, "not UTF-8"),
        ("a: 1\nb: x\x01y\n", 2, "control character (0x01)"),
        ("a: &x [1]\n", 1, "an anchor (&x)"),
        ("a: 1\nb: *x\n", 2, "an alias (*x)"),
        ("a: {}\nb:\n  <<: {c: 1}\n", 3, "a merge key (<<)"),
        ("a: 1\nb: !!python/name:os.system x\n", 2, "a tag (!!python/name:os.system)"),
        ("a: !mine 1\n", 1, "a tag (!mine)"),
        ("a: !!int ''\n", 1, "a tag (!!int)"),
        ("a: 1\n---\nb: 1\n", 2, "a second document begins"),
        ("---\n---\na: 1\n", 2, "a second document begins"),
        ("a:\n  5: x\n", 2, "the key 5 is read as a number"),
        ("true: x\n", 1, "the key true is read as true or false"),
        ("null: x\n", 1, "the key null is read as null"),
        ("1e3: x\n", 1, "the key 1e3 is read as a number"),
        ("a: 1\nb: {{ c }}\n", 2, "a list or a mapping cannot be a key"),
        ("a:\n  b: {c:1}\n", 2, "'c:1' is read as a key without a value"),
        ("a:\n  b:1\n  c: 2\n", 2, "b:1 is read as one word"),
        ("a: [b,\n  c\nd: 1\n", 1, "for what opens here"),
        ("a: 1\nb: 'c\nd: 1\n", 2, "for what opens here"),
        ("a: 1\nb: @c\n", 2, "not YAML"),
        ("a: 1\nb: 2: 3\n", 2, "not YAML"),
        ("a: " + "9" * 5000, "", "cannot be read: Exceeds the limit"),
    ],
)
def test_a_faulty_file_is_answered_with_its_line(written, text, line, found):
    said = refusal(written(text))
    assert found in said
    assert said.startswith(f"x.yaml:{line}" if line else "x.yaml: ")


def test_all_keys_at_fault_are_told_at_once(written):
    said = refusal(written("a: 1\na: 2\n5: x\n<<: {b: 1}\nc: {d:1}\n"))
    assert [line.split(" ")[0].rstrip(":") for line in said.splitlines()[::2]] == [
        "x.yaml:2",
        "x.yaml:3",
        "x.yaml:4",
        "x.yaml:5",
    ]


def test_an_anchor_that_stands_for_itself_ends_in_a_message(written):
    assert "an anchor (&a)" in refusal(written("&a [*a, *a]\n"))


def test_a_missing_file_and_a_folder_are_errors_of_the_users(tmp_path):
    assert "cannot be read (No such file" in refusal(tmp_path / "none.yaml")
    assert "cannot be read (Is a directory" in refusal(tmp_path)


TEXTS = [
    "2e-4",
    "1e5",
    "no",
    "on",
    "true",
    "null",
    "~",
    "",
    "5",
    "-1",
    ".5",
    "1.",
    "12:30",
    "2001-12-14",
    "0x1F",
    "1_000",
    "<<",
    "=",
]
TEXTS += [
    "*a",
    "&a",
    "!a",
    "a: b",
    "# a",
    "- a",
    "[a]",
    "{a}",
    "@a",
    "%a",
    "'a'",
    '"a"',
    " a ",
    "a\nb",
    "a\tb",
    "\u00e4",
    "\U0001f600",
    "a" * 300,
    "\u201ca\u201d",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_reads_back_the_same(text):
    content = {"a": {"text": text, "list": [text, text], text: 1}}
    assert yamlfile.parse(yamlfile.dump(content), "x")[0] == content
    assert yaml.safe_load(yamlfile.dump(content)) == content, "other tools read YAML 1.1"


@pytest.mark.parametrize("number", [0, 1, -1, 2e-4, 1e-300, 1e20, 0.1, True, False, None])
def test_numbers_and_switches_read_back_the_same(number):
    back = yamlfile.parse(yamlfile.dump({"a": number}), "x")[0]["a"]
    assert back == number
    assert type(back) is type(number)


def test_a_list_that_is_used_twice_is_written_twice():
    shared = ["q_proj"]
    assert yamlfile.parse(yamlfile.dump({"a": shared, "b": shared}), "x")[0] == {
        "a": ["q_proj"],
        "b": ["q_proj"],
    }


def test_paths_are_shown_from_here(tmp_path, monkeypatch):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    assert yamlfile.shown(tmp_path / "a" / "x.yaml") == "x.yaml"
    assert yamlfile.shown(tmp_path / "x.yaml") == "../x.yaml"
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")
    assert yamlfile.shown(tmp_path / "x.yaml") == str(tmp_path / "x.yaml")


# ---- characters that cannot be seen, and files that are no settings


UNSEEN = {
    "no-break space for a space": ("a: 1\nb:\u00a02\n", "x.yaml:2", "non-breaking space (U+00A0)"),
    "no-break space after a number": ("a: 1\nb: 0.001\u00a0\n", "x.yaml:2 b", "non-breaking space (U+00A0)"),
    "no-break space as indentation": ("a:\n\u00a0 b: 1\n", "x.yaml:2", "non-breaking space (U+00A0)"),
    "zero width space in a key": ("lora:\n  r\u200b: 8\n", "x.yaml:2", "zero width space (U+200B)"),
    "byte order mark in the middle": ("a: 1\n\ufeffb: 2\n", "x.yaml:2", "byte order mark (U+FEFF)"),
    "soft hyphen in a word": ("a: [q_proj, v\u00ad_proj]\n", "x.yaml:1 a[1]", "soft hyphen (U+00AD)"),
    "direction mark at the end": ("a: 'x\u200e'\n", "x.yaml:1 a", "left-to-right mark (U+200E)"),
    "wide space": ("a:\u30001\n", "x.yaml:1", "ideographic space (U+3000)"),
    "quotation marks": ("a: \u201cq_proj\u201d\n", "x.yaml:1 a", "would be part of the value"),
    "other quotation marks": ("a: [\u00abx\u00bb]\n", "x.yaml:1 a[0]", "would be part of the value"),
}


@pytest.mark.parametrize("text, where, found", UNSEEN.values(), ids=UNSEEN)
def test_a_character_that_cannot_be_seen_is_named_with_its_line(text, where, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        yamlfile.load(Path("x.yaml"))
    told = [p for p in error.value.problems if p.where.startswith(where) and found in p.found]
    assert told and told[0].do, str(error.value)


@pytest.mark.parametrize(
    "text",
    ["a: '10\u00a0000 F'\n", "a: |\n  caf\u00e9\u00a0!\n", "a: 'x' # \u00a0\n", 'a: "\u201cyes\u201d"\n'],
)
def test_such_a_character_that_is_meant_is_taken(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert yamlfile.load(tmp_path / "x.yaml")[0]["a"]


HUGE = {
    "many keys": "".join(f"key_{i}: {i}\n" for i in range(600_000)),
    "one list": f"a: [{', '.join(['q_proj'] * 1_300_000)}]\n",
    "one text": f"a: {'x' * 10_000_000}\n",
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_a_file_of_megabytes_is_refused_at_once(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(RecipeError, match="bytes are too many for a file of settings"):
        yamlfile.load(tmp_path / "x.yaml")
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{b: " * 30_000, "- " * 60_000, "&a [" + "*a, " * 9])
def test_lists_in_lists_without_end_are_one_error(text):
    began = time.monotonic()
    with pytest.raises(RecipeError, match=r"in each other|anchor"):
        yamlfile.parse(text, "x.yaml")
    assert time.monotonic() - began < 5
