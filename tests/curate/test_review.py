"""The page is used as a person uses it, in a real Chromium, by keyboard; its marks come back as a file."""

import json

import pytest

from lora_recipes.__main__ import main
from lora_recipes.curate.review import FORMAT, wilson
from tests.cases import browser

NASTY = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> & @DATA@"


@pytest.fixture
def rows(tmp_path):
    """Five rows of three forms, one of them with what would break a page."""
    made = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
        {
            "messages": [{"role": "user", "content": NASTY}, {"role": "assistant", "content": "No."}],
            "path": "a.py",
        },
        {"instruction": "Add.", "input": "1 1", "output": "3"},
        {"text": "plain text\nof two lines"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


@pytest.fixture
def review(tmp_path, monkeypatch):
    """`lora-recipes data review` in the rows' folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["data", "review", "in.jsonl", *words])


@pytest.fixture
def page(tmp_path, rows, review):
    """All five rows on a page, in a browser."""
    try:
        program = browser.find()
    except browser.NoBrowser as error:
        pytest.skip(str(error))
    assert review("page.html", "--share", "1") == 0
    opened = browser.Page(program, tmp_path / "browser", (tmp_path / "page.html").as_uri())
    yield opened
    opened.close()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_judged_by_the_keyboard_in_a_browser_and_the_marks_taken_back(page, rows, review, tmp_path):
    assert page.value("document.title") == "Review of in"
    assert page.value("document.querySelectorAll('pre')[1].textContent") == "Because."
    page.press("k")
    assert NASTY in page.value("document.getElementById('row').innerText")  # shown, and not run
    assert '"path": "a.py"' in page.value("document.querySelector('details pre').textContent")
    page.press("d")
    page.press("e")
    assert page.value("document.activeElement.value") == "Add."
    page.value("(box => { box.focus(); box.select(); })(document.querySelectorAll('textarea')[2])")
    page.write('2, "exactly" \u00fc')
    page.press("Enter", browser.CONTROL)
    page.press("e")
    page.write("thrown away")
    page.press("Escape")
    page.press("d")
    page.press("ArrowLeft")
    page.press("u")
    assert page.value("document.getElementById('count').textContent") == (
        "row 4 of 5: 1 kept, 1 dropped, 1 edited, 2 to go (not saved)"
    )
    page.value("window.old = true")
    page.send("Page.reload")  # what is not saved is asked for, and what was marked is still there
    page.wait(
        "!window.old && document.readyState === 'complete' && !!document.querySelector('footer button')"
    )
    assert page.asked == ["beforeunload"]
    assert page.value("document.getElementById('where').textContent") == "in.jsonl:4"
    page.press("s")
    marks = page.saved("in.marks.json")
    assert [row["mark"] for row in json.loads(marks.read_text())["rows"]] == [
        "keep",
        "drop",
        "edit",
        "none",
        "none",
    ]
    assert page.value("document.title") == "Review of in"

    assert review("out.jsonl", "--marks", str(marks)) == 0
    edited = rows[2] | {"output": '2, "exactly" \u00fc'}
    assert read(tmp_path / "out.jsonl") == [rows[0], edited, rows[3], rows[4]]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["judged"] == {"keep": 1, "drop": 1, "edit": 1}
    assert read(tmp_path / "out.dropped.jsonl")[0]["reason"] == "marked drop"


def test_the_page_asks_nobody(rows, review, tmp_path):
    assert review("page.html", "--share", "1") == 0
    text = (tmp_path / "page.html").read_text()
    template, data = text.split('id="data">')[0], text.split('id="data">')[1].split("</script>")[0]
    assert "default-src 'none'" in template
    assert "<" not in data and json.loads(data)["rows"][1]["texts"][0][2] == NASTY
    assert "://" not in text


def test_a_sample_is_exact_and_the_same_each_time(review, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(200)))
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert review(f"{name}.html", "--share", "0.1", "--seed", seed) == 0
    a, b, c = ((tmp_path / f"{name}.html").read_text() for name in "abc")
    assert a == b != c
    report = json.loads((tmp_path / "a.report.json").read_text())
    assert (report["read"], report["sampled"]) == (200, 20)
    before = (tmp_path / "a.html").read_bytes()
    assert review("a.html") == 2 and "already there" in capsys.readouterr().err
    assert (tmp_path / "a.html").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x.jsonl"], "neither a page nor with --marks"),
        (["x.html", "--marks", "m.json"], "a page, with --marks"),
        (["x.html", "--share", "0"], "0 is no share"),
        (["x.jsonl", "--marks", "in.jsonl", "--seed", "1"], "is of the page"),
        (["x.jsonl", "--marks", "gone.json"], "cannot be read"),
        (["x.jsonl", "--marks", "in.jsonl"], "no file of marks"),
        (["x.jsonl", "--marks", "binary"], "is no JSON"),
        (["x.jsonl", "--marks", "other"], "of rows that are not in IN"),
        (["x.jsonl", "--marks", "astray"], "where the row has no text"),
    ],
)
def test_what_cannot_be_done_is_said(words, told, rows, review, tmp_path, capsys):
    from lora_recipes.curate.review import digest

    (tmp_path / "in.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, sha in (("other", "0" * 64), ("astray", digest(rows[0]))):
        mark = {"sha256": sha, "where": "in.jsonl:1", "mark": "edit", "texts": {'["messages",0]': "x"}}
        (tmp_path / name).write_text(json.dumps({"format": FORMAT, "rows": [mark]}))
    assert review(*words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists() and not (tmp_path / "x.html").exists()


def test_a_full_disk_is_one_clear_word_and_leaves_no_page(rows, review, small_disk, capsys):
    disk = small_disk("16k")
    (disk / "ballast").write_bytes(bytes(8_000))
    assert review(str(disk / "page.html"), "--share", "1") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert [file.name for file in disk.iterdir()] == ["ballast"]


def test_wilson_has_the_published_interval():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263 and 0 of 20."""
    assert [round(x, 4) for x in wilson(81, 263)] == [0.2553, 0.3662]
    assert [round(x, 4) for x in wilson(0, 20)] == [0.0, 0.1611]
