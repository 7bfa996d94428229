"""Check the companion conversations against BRIEF.md, measure them, and write train.jsonl, eval.jsonl and
eval_few.jsonl.

Usage: python data/companion/make.py [--check]     (--check writes nothing and fails when the files on disk
are not current)
"""

import json
import random
import re
import statistics
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).resolve().parent
EVAL_TOPICS = ("dogs", "hearing_and_hearing_aids", "letters_and_stamps", "moving_house", "tea_and_breakfast")
PER_FILE = 20  # conversations in a topic file
FEW = 5  # every fifth eval row is in eval_few.jsonl: what a slow machine can afford
MAX_WORDS = 300  # a conversation has fewer words than this
LIMIT = 0.3  # two conversations whose word 3-grams overlap (Jaccard) this much are near-duplicates
MARKDOWN = re.compile(r"[*_#`<>|\[\](){}]|^A: (?:-|\d{1,2}[.)]) ")
ROLES = {"U: ": "user", "A: ": "assistant"}


def words(text):
    """The lower-case words of a text."""
    return re.findall(r"[a-z0-9]+(?:'[a-z0-9]+)*", text.lower())


def spoken(row, role=None):
    """The lines of a row, of one role or of both."""
    return [turn["content"] for turn in row["prompt"] + row["completion"] if role in (None, turn["role"])]


def line_problems(line, turn):
    """What is wrong with one line, which is to be turn number `turn` (from 0) of its conversation."""
    if line[:3] != ("U: ", "A: ")[turn % 2] or line[3:] != line[3:].strip() or not line[3:]:
        yield f"expected a line that begins with '{'UA'[turn % 2]}: '"
    if not line.isascii():
        yield "not plain ASCII"
    if line.startswith("A: ") and MARKDOWN.search(line):
        yield "markdown or brackets in a reply"


def read_topic(path):
    """The conversations of one file: (rows, places, problems); a place is file:line of the conversation's
    first line.
    """
    rows, places, problems, start = [], [], [], 1
    for number, block in enumerate(
        path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n---\n"), 1
    ):
        lines = block.split("\n")
        last = start + len(lines) - 1
        for turn, line in enumerate(lines):
            problems += [f"{path}:{start + turn}: {what}" for what in line_problems(line, turn)]
        if not lines[-1].startswith("A: "):
            problems.append(f"{path}:{last}: a conversation ends with an 'A: ' line")
        if sum(len(line[3:].split()) for line in lines) >= MAX_WORDS:
            problems.append(f"{path}:{start}: a conversation of {MAX_WORDS} words or more")
        if lines[-1].count("?") > 1:
            problems.append(f"{path}:{last}: more than one question mark in the last reply")
        turns = [{"role": ROLES.get(line[:3], "?"), "content": line[3:]} for line in lines]
        rows.append(
            {
                "id": f"{path.stem}-{number:02}",
                "topic": path.stem,
                "prompt": turns[:-1],
                "completion": turns[-1:],
            }
        )
        places.append(f"{path}:{start}")
        start = last + 2
    if len(rows) != PER_FILE:
        problems.append(f"{path}:1: {len(rows)} conversations, expected {PER_FILE}")
    return rows, places, problems


def read_all(folder):
    """All topic files of a folder, by name: (rows, places, problems)."""
    parts = [read_topic(path) for path in sorted(folder.glob("*.txt"))]
    return tuple([item for part in parts for item in part[i]] for i in range(3))


def similarities(texts):
    """{(i, j): Jaccard similarity of the word 3-gram sets} for all pairs of texts that share a 3-gram."""
    grams = [set(zip(w, w[1:], w[2:], strict=False)) for w in map(words, texts)]
    holders, shared = defaultdict(list), Counter()
    for i, gram_set in enumerate(grams):
        for gram in gram_set:
            holders[gram].append(i)
    for numbers in holders.values():
        shared.update(combinations(numbers, 2))
    return {(i, j): n / (len(grams[i]) + len(grams[j]) - n) for (i, j), n in shared.items()}


def repeated(rows, find):
    """What `find` returns for a row, with the ids of the rows it is in, where that is more than one; most
    frequent first.
    """
    where = defaultdict(list)
    for row in rows:
        for item in sorted(set(find(row))):
            where[item].append(row["id"])
    return sorted(
        ((item, ids) for item, ids in where.items() if len(ids) > 1),
        key=lambda pair: (-len(pair[1]), pair[0]),
    )


def sentences(row):
    """The sentences of five words or more in a row's replies."""
    found = (words(part) for line in spoken(row, "assistant") for part in re.split(r"[.!?;]+", line))
    return [" ".join(part) for part in found if len(part) >= 5]


def opening(row):
    """The first three words of a row's last reply."""
    return [" ".join(words(row["completion"][0]["content"])[:3])]


def statistics_table(rows, whole):
    """The figures that are printed and quoted in README.md, as (name, value) pairs; `whole` is similarities()
    of the rows.
    """
    ids, held_out = [row["id"] for row in rows], [row["topic"] in EVAL_TOPICS for row in rows]

    def highest(pairs):
        pair = max(sorted(pairs), key=pairs.get, default=None)
        return f"{pairs[pair]:.3f} ({ids[pair[0]]}, {ids[pair[1]]})" if pair else "0"

    last = similarities([row["completion"][0]["content"] for row in rows])
    lengths = [len(row["completion"][0]["content"].split()) for row in rows]
    turns = Counter(len(row["prompt"]) // 2 + 1 for row in rows)
    twice, first = repeated(rows, sentences), repeated(rows, opening)
    return [
        ("rows (train + eval)", f"{held_out.count(False)} + {held_out.count(True)}"),
        ("topics", len({row["topic"] for row in rows})),
        ("rows with 1, 2, 3, 4 user turns", ", ".join(str(turns[n]) for n in (1, 2, 3, 4))),
        (
            "words in the last reply: min, median, max",
            f"{min(lengths)}, {statistics.median(lengths):g}, {max(lengths)}",
        ),
        ("words in all", sum(len(words(line)) for row in rows for line in spoken(row))),
        ("distinct words", len({word for row in rows for line in spoken(row) for word in words(line)})),
        ("highest 3-gram Jaccard, whole conversations", highest(whole)),
        ("highest 3-gram Jaccard, last replies", highest(last)),
        (
            "highest 3-gram Jaccard, train against eval",
            highest({p: s for p, s in whole.items() if held_out[p[0]] != held_out[p[1]]}),
        ),
        ("reply sentences of 5+ words in two rows", sum(len(in_rows) == 2 for _, in_rows in twice)),
        ("reply sentences of 5+ words in more than two rows", sum(len(in_rows) > 2 for _, in_rows in twice)),
        (
            "most frequent openings of last replies",
            ", ".join(f"'{o}' {len(i)} ({len(i) / len(rows):.2%})" for o, i in first[:3]),
        ),
    ]


def rendered(rows):
    """{file name: text} of the three files; the train rows in a fixed shuffled order, so that topics mix."""
    train, held_out = (
        [row for row in rows if (row["topic"] in EVAL_TOPICS) == wanted] for wanted in (False, True)
    )
    random.Random(0).shuffle(train)
    return {
        name: "".join(json.dumps(row) + "\n" for row in part)
        for name, part in (
            ("train.jsonl", train),
            ("eval.jsonl", held_out),
            ("eval_few.jsonl", held_out[::FEW]),
        )
    }


def write(path, text):
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="ascii", newline="\n")
    temporary.replace(path)


def make(root, check=False):
    """Check, measure and write (or compare) the data under `root`; returns the problems and the
    statistics.
    """
    rows, places, problems = read_all(root / "conversations")
    missing = set(EVAL_TOPICS) - {row["topic"] for row in rows}
    problems += [f"{root / 'conversations' / topic}.txt:1: missing" for topic in sorted(missing)]
    whole = similarities(["\n".join(spoken(row)) for row in rows])
    problems += [
        f"{places[j]}: near-duplicate of {places[i]} ({s:.2f})"
        for (i, j), s in sorted(whole.items())
        if s >= LIMIT
    ]
    if problems:
        return problems, []
    for name, text in rendered(rows).items():
        if not check:
            write(root / name, text)
        elif not (root / name).exists() or (root / name).read_bytes() != text.encode("ascii"):
            problems.append(f"{root / name}:1: not current; run python data/companion/make.py")
    return problems, statistics_table(rows, whole)


def main(arguments):
    """Run make() here and print what it found."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    problems, table = make(HERE, check=bool(arguments))
    for name, value in table:
        print(f"{name:<50} {value}")
    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
