"""A sample of rows as one page on which a person marks each keep, drop or edit; and the marks taken back."""

import hashlib
import json
import math
import random
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import lora_recipes
from lora_recipes.core import files
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import inputs, work
from lora_recipes.curate.inputs import Inputs, Item
from lora_recipes.curate.work import Outcome, dropped, kept

TOLD = """Make a page with a sample of the rows to judge by hand, then take the marks back.

review IN page.html          samples, and writes the page: open it in a browser, no server or network needed.
                             K keeps a row, D drops it, E edits it, S saves the marks into a file.
review IN OUT --marks FILE   writes the rows: those marked drop are dropped, those edited are replaced, all
                             others stay as they are."""
FORMAT = "lora-recipes review 1"
LARGEST = 64 * 2**20  # bytes of the rows on a page, which the browser holds in memory
# What people read of a row, in any form that recipes read (data/forms.py); else it is among the other fields.
READ = (
    *("system", "messages", "conversations", "history", "prompt", "instruction", "input", "text"),
    *("completion", "output", "chosen", "rejected"),
)
INSIDE = ("content", "value", "text")  # of a message, a ShareGPT turn, a part of a content
MARKS = ("keep", "drop", "edit", "none")
Place = tuple[str | int, ...]


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    told = "x.html for the page; with --marks x.jsonl, x.jsonl.gz or x.parquet"
    parser.add_argument("out", type=Path, metavar="OUT", help=told)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--share",
        type=float,
        metavar="SHARE",
        help="of the rows to sample (default: 0.05; often 0.05 to 0.1)",
    )
    parser.add_argument("--seed", type=int, help="of the sample (default: 0)")
    parser.add_argument(
        "--marks", type=Path, metavar="FILE", help="the marks that the page saved, to take back"
    )


def run(given: Namespace) -> str:
    """Write the page, or take its marks back."""
    is_page = given.out.suffix.lower() in (".html", ".htm")
    if is_page and given.marks:
        do = "give x.jsonl, x.jsonl.gz or x.parquet: the rows are written there"
        raise RecipeError(Problem(f"OUT {given.out}", "a page, with --marks", do))
    if not is_page and not given.marks:
        do = "first the page: OUT is x.html; then the rows: OUT is x.jsonl, with --marks FILE"
        raise RecipeError(Problem(f"OUT {given.out}", "neither a page nor with --marks", do))
    if given.marks:
        unused = [f"--{name}" for name in ("share", "seed") if getattr(given, name) is not None]
        raise_if([Problem(name, "is of the page, not with --marks", "leave it out") for name in unused])
        return _take_back(given)
    return _page(given)


def digest(row: dict[str, Any]) -> str:
    """SHA-256 of a row's content, by which a mark finds it again."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---- the page


def _page(given: Namespace) -> str:
    share, seed = 0.05 if given.share is None else given.share, given.seed or 0
    if not 0 < share <= 1:
        raise RecipeError(Problem("--share", f"{share:g} is no share", "above 0, at most 1"))
    out: Path = given.out
    report = out.with_suffix(".report.json")
    there = [file for file in (out, report) if file.exists() and not given.overwrite]
    raise_if(
        [
            Problem(shown(file), "is already there", "--overwrite replaces it; or give another OUT")
            for file in there
        ]
    )
    read = inputs.of(given, texts=True)
    rows, total = sample(read, share, seed)
    if not rows:
        raise RecipeError(
            Problem(", ".join(given.inputs), "no row can be read", "mend them (convert says more)")
        )
    name = Path(given.inputs[0]).name.split(".")[0]
    text = page(FORMAT, name, f"{', '.join(given.inputs)}: {len(rows):,} of {total:,} rows", rows)
    if len(text) > LARGEST:
        found = (
            f"{len(rows):,} rows are {len(text) / 2**20:.0f} MiB, more than the {LARGEST // 2**20} of a page"
        )
        raise RecipeError(Problem("--share", found, f"at most {share * LARGEST / len(text):.2g}"))
    facts = {
        "verb": given.verb,
        "options": {"share": share, "seed": seed},
        "inputs": read.sha256,
        "read": total,
        "sampled": len(rows),
        "rows": [{"where": row["where"], "sha256": row["sha256"]} for row in rows],
        "versions": {"lora-recipes": lora_recipes.__version__},
    }
    _write({out: text, report: json.dumps(facts, indent=2, ensure_ascii=False) + "\n"})
    lines = [
        ("sampled", f"{len(rows):,} of {total:,} rows (--share {share:g} --seed {seed})"),
        ("wrote", f"{shown(out)}: open it in a browser; S saves the marks"),
        ("report", shown(report)),
    ]
    return "\n".join(f"{label:12}{text}" for label, text in lines)


def _write(texts: dict[Path, str]) -> None:
    """All of these files or, where the disk is full, none."""
    near = {file: file.with_name(f".{file.name}.tmp") for file in texts}
    with files.writing(next(iter(texts)), "while the page was written"):
        try:
            for file, text in texts.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                near[file].write_text(text, encoding="utf-8")
            for file in texts:
                near[file].replace(file)
        finally:
            for left in near.values():
                left.unlink(missing_ok=True)


def page(
    form: str, name: str, title: str, rows: list[dict[str, Any]], verdicts: list[list[str]] | None = None
) -> str:
    """The text of a page on `rows`, whose marks are saved as NAME.marks.json of the format `form`.
    `verdicts`: key, label and mark of each button, in place of keep, drop and edit.

    No text of a row can end the script element that holds it.
    """
    key = hashlib.sha256("".join(row["sha256"] for row in rows).encode()).hexdigest()
    content = {"format": form, "name": name, "title": title, "key": key, "rows": rows}
    data = json.dumps(content | ({"verdicts": verdicts} if verdicts else {}), ensure_ascii=True)
    template = resources.files("lora_recipes.curate").joinpath("review.html").read_text(encoding="utf-8")
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    return template.replace("@DATA@", data)


def sample(read: Inputs, share: float, seed: int) -> tuple[list[dict[str, Any]], int]:
    """Different rows for the page, `share` of all that can be read (one at least), in their order; and how
    many there are.
    """
    total = sum(1 for item in read if not item.fault)
    wanted = min(total, max(1, round(share * total)))
    chosen = set(random.Random(seed).sample(range(total), wanted))
    rows: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(item for item in read if not item.fault):
        if number in chosen:
            rows.setdefault(sha := digest(item.raw), _shown(item, sha, read))
    return list(rows.values()), total


def _shown(item: Item, sha256: str, read: Inputs) -> dict[str, Any]:
    fields = [*dict.fromkeys([*READ, *read.columns.values()])]
    texts = [found for name in fields if name in item.raw for found in _texts(item.raw[name], (name,), name)]
    rest = {k: v for k, v in item.raw.items() if k not in fields and v is not None}
    row = {"where": item.where, "sha256": sha256, "texts": texts}
    return row | ({"rest": json.dumps(rest, indent=2, ensure_ascii=False, default=str)} if rest else {})


def _texts(value: Any, path: Place, label: str) -> Iterator[tuple[Place | None, str, str]]:
    """Every text of a field: where it is (None: not to be edited), what it is called, and itself."""
    if isinstance(value, str):
        yield path, label, value
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _texts(inner, (*path, i), f"{label} {i + 1}")
    elif isinstance(value, dict):
        said = value.get("role") or value.get("from")
        for key in INSIDE:
            if key in value:
                yield from _texts(value[key], (*path, key), f"{label}: {said}" if said else label)
        if value.get("tool_calls"):
            calls = json.dumps(value["tool_calls"], indent=2, ensure_ascii=False)
            yield None, f"{label}: tool calls", calls


# ---- the marks


def _take_back(given: Namespace) -> str:
    marks = read_marks(given.marks)
    read = inputs.of(given, texts=True)
    here = {sha for item in read if not item.fault and (sha := digest(item.raw)) in marks}
    gone = [mark for sha, mark in marks.items() if sha not in here]
    if gone:
        found = (
            f"{len(gone)} of {len(marks)} marks are of rows that are not in IN, the first {gone[0]['where']}"
        )
        do = "name the file that the page was made of, as it was"
        raise RecipeError(Problem(shown(given.marks), found, do))

    def judge(item: Item) -> Outcome:
        mark = marks.get(digest(item.raw))
        if mark is None or mark["mark"] == "none":
            return kept(item.raw, notes=["not judged"])
        if mark["mark"] == "drop":
            return dropped("marked drop")
        if mark["mark"] == "edit":
            return kept(_edited(item.raw, mark["texts"], given.marks), notes=["edited"])
        return kept(item.raw, notes=["marked keep"])

    judged = Counter(mark["mark"] for mark in marks.values())
    judged.pop("none", None)
    settings = {"columns": read.columns, "marks": files.sha256(given.marks), "skip_faulty": given.skip_faulty}
    with work.Work(given.verb, given.out, settings, read.sha256, overwrite=given.overwrite) as job:
        job.run(read, judge)
        return "\n".join([job.finish(judged=dict(judged)), *_worth(judged)])


def read_marks(file: Path, form: str = FORMAT, known: tuple[str, ...] = MARKS) -> dict[str, dict[str, Any]]:
    """The marks of a file by the digest of their row. RecipeError for a file that no page of the format
    `form`, with the marks `known`, saved.
    """
    do = "name the file that S saved on the page, x.marks.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(Problem(shown(file), f"cannot be read ({error.strerror})", do)) from None
    except (ValueError, RecursionError):
        raise RecipeError(Problem(shown(file), "is no JSON: no file of marks", do)) from None
    rows = content.get("rows") if isinstance(content, dict) and content.get("format") == form else None
    sound = isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("sha256"), str)
        and row.get("mark") in known
        and (row["mark"] != "edit" or isinstance(row.get("texts"), dict))
        for row in rows
    )
    if not sound:
        raise RecipeError(Problem(shown(file), f"is no file of marks ({form})", do))
    assert isinstance(rows, list)
    return {row["sha256"]: row for row in rows}


def _edited(row: dict[str, Any], texts: dict[str, str], file: Path) -> dict[str, Any]:
    """A copy of `row` with `texts`, each under the JSON of its path."""
    made = json.loads(json.dumps(row, default=str))
    for where, text in texts.items():
        try:
            *path, last = json.loads(where)
            inner = made
            for key in path:
                inner = inner[key]
            if not isinstance(text, str) or not isinstance(inner[last], str):
                raise TypeError("no text")
        except (ValueError, TypeError, KeyError, IndexError):
            found = f"an edit of {where}, where the row has no text"
            raise RecipeError(Problem(shown(file), found, "save the marks anew on the page")) from None
        inner[last] = text
    return made


def _worth(judged: Counter[str]) -> list[str]:
    """What the sample says of all rows."""
    count = judged.total()
    if not count:
        return [f"{'WARNING':12}no row was judged: all rows are as they were"]
    low, high = wilson(judged["drop"], count)
    said = f"{judged['drop']} of {count} judged rows dropped, {judged['edit']} edited"
    return [f"{'judged':12}{said}: of all rows {low:.1%} to {high:.1%} would be dropped (95 %)"]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, `hits` of `count` (at least one) drawn at random: Wilson, Journal of the
    American Statistical Association 22 (1927), 209-212.
    """
    z2 = 1.959964**2
    middle = (hits + z2 / 2) / (count + z2)
    half = math.sqrt(z2 * (hits * (count - hits) / count + z2 / 4)) / (count + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
