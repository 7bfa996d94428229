"""Rows on their way to the disk and back: the same whoever makes them, kept by what decides them, whole or
not there, and mixed to the row.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import cache, gate, mix, prepare, report
from lora_recipes.data import tokenizer as tokenizing
from lora_recipes.model import build
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve

AGAIN = "as read and checked at"
LIMITS = dict.fromkeys(("duplicates", "near_in_eval", "train_in_eval", "truncated", "no_end_of_turn"), 1.0)


def chats(count, word="tea"):
    """Rows of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}: {word * (i % 7 + 1)}?"},
                {"role": "assistant", "content": f"Answer {i}, " + f"{word} and more. " * (i % 11 + 1)},
            ]
        }
        for i in range(count)
    ]


def write(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of each test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "lora_recipes"


@pytest.fixture
def recipe_of(tmp_path):
    def make(train, **changes):
        sections: dict = {
            "model": {"contract": "tiny_qwen35", "weights": "random", "dtype": "float32"},
            "data": {"train": train, "limits": LIMITS},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
            "train": {"learning_rate": 1.0e-3, "max_length": 512},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            sections[section][name] = value
        (tmp_path / "made.yaml").write_text(yaml.safe_dump(sections))
        return resolve(recipes.load(str(tmp_path / "made.yaml")), tmp_path / "out")

    return make


@pytest.fixture
def passed(recipe_of):
    return lambda *given, **changes: gate.pass_through(recipe_of(*given, **changes), False)


def everything(rows):
    """All columns of a split in the order of an epoch."""
    return rows.data.data.to_pydict(), rows.counted.data.to_pydict(), rows.order.tolist()


# kept


def test_rows_are_read_once_and_a_changed_byte_is_seen_though_size_and_time_are_the_same(passed, tmp_path):
    file = write(tmp_path / "rows.jsonl", chats(30))
    first, second = passed(str(file)), passed(str(file))
    assert first.said.startswith("read and checked in") and second.said.startswith(AGAIN)
    assert everything(first.train) == everything(second.train)
    assert (first.facts, first.stops, first.warnings) == (second.facts, second.stops, second.warnings)
    known = file.stat()
    file.write_text(file.read_text().replace("Answer 7", "Answer 8", 1))
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert file.stat().st_size == known.st_size
    third = passed(str(file))
    assert third.said.startswith("read and checked")
    assert third.facts.train.sha256 != first.facts.train.sha256
    assert third.train.tokens_sha256 != first.train.tokens_sha256


@pytest.mark.parametrize(
    "change",
    [
        {"train__max_length": 40},
        {"train__truncation_mode": "keep_end", "train__max_length": 40},
        {"train__packing": True, "train__packing_strategy": "wrapped"},
        {"data__rows": "assistant_turn"},
        {"data__chat_template_kwargs": {"enable_thinking": False}},
        {"data__format": "messages"},
        {"model__chat_template": "qwen3"},
        {"model__new_tokens": ["<mood>"]},
        {"data__eval": "held.jsonl"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_tokens_decides_which_rows_are_taken(passed, tmp_path, change):
    file = write(tmp_path / "rows.jsonl", chats(12))
    write(tmp_path / "held.jsonl", chats(12)[5:6])
    passed(str(file))
    assert passed(str(file), **change).said.startswith("read and checked")


def test_what_does_not_decide_the_tokens_reads_nothing_anew(passed, tmp_path):
    file = write(tmp_path / "rows.jsonl", chats(12))
    passed(str(file))
    for change in ({"train__learning_rate": 1e-4}, {"lora__r": 2}, {"data__limits": {"duplicates": 0.9}}):
        assert passed(str(file), **change).said.startswith(AGAIN), change


def test_what_is_not_as_it_was_written_is_made_anew(passed, place, tmp_path):
    file = write(tmp_path / "rows.jsonl", chats(12))
    whole = everything(passed(str(file)).train)
    (folder,) = cache.kept()
    for name, size in (
        ("train.arrow", 100),
        ("train.counts.arrow", 9),
        ("eval.arrow", 0),
        ("facts.json", 30),
    ):
        os.truncate(folder / name, size)
        again = passed(str(file))
        assert again.said.startswith("read and checked") and everything(again.train) == whole, name


def test_rows_are_listed_and_cleared_but_not_those_that_are_being_made(passed, place, tmp_path):
    file = write(tmp_path / "rows.jsonl", chats(12))
    made = passed(str(file))
    assert "checked rows kept: 1, " in cache.lines()[0] and "rows.jsonl" in cache.lines()[1]
    (folder,) = cache.kept()
    busy = cache.unfinished(place / "other")
    busy.mkdir()
    hold = "import sys; from pathlib import Path; from lora_recipes.core import lock\n"
    hold += (
        "with lock.held(Path(sys.argv[1]), 'prepares the rows'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(place / "other")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        cache.clear()
        assert not folder.exists() and busy.is_dir()
        process.kill()
    cache.clear()
    assert not busy.exists()
    assert len(made.train[:12]) == 12, "who has the rows keeps them"


def test_without_a_place_rows_are_checked_all_the_same(passed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    made = passed(str(write(tmp_path / "rows.jsonl", chats(12))))
    assert "not kept" in made.said and len(made.train) == 12


def _make(resolved, place, pipe):
    datasets.config.HF_DATASETS_CACHE = place
    made = gate.pass_through(resolved, False)
    pipe.send((made.said.split()[0], made.train.tokens_sha256))


def test_a_killed_process_and_two_at_once_spoil_nothing(recipe_of, passed, place, tmp_path):
    file, fork = write(tmp_path / "rows.jsonl", chats(3000)), multiprocessing.get_context("fork")
    resolved = recipe_of(str(file), train__dataset_num_proc=2)
    ours, theirs = fork.Pipe()

    def begin():
        process = fork.Process(target=_make, args=(resolved, tmp_path / "cache", theirs))
        process.start()
        return process

    killed = begin()
    while not list(place.glob(".*.tmp/train.arrow")):
        assert killed.is_alive()
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert not cache.kept() and list(place.glob(".*.tmp")) and not ours.poll()
    both = [begin(), begin()]
    said = sorted(ours.recv() for _ in both)
    assert [word for word, _ in said] == ["as", "read"], "one made them, the other waited and took them"
    for process in both:
        process.join()
    again = passed(str(file), train__dataset_num_proc=1)
    assert again.said.startswith(AGAIN) and {again.train.tokens_sha256} == {sha for _, sha in said}
    assert not list(place.glob(".*.tmp"))


def test_several_processes_make_what_one_makes(passed, tmp_path, monkeypatch):
    file, held = write(tmp_path / "rows.jsonl", chats(1200)), write(tmp_path / "held.jsonl", chats(4, "cup"))
    made = []
    for count in (1, 3):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"of{count}")
        one = passed(str(file), data__eval=str(held), train__dataset_num_proc=count)
        assert f"by {count} process" in one.said
        made.append((everything(one.train), everything(one.evaluation), one.facts, one.warnings))
    assert made[0] == made[1]


def test_a_process_that_is_ended_from_outside_is_an_error_that_says_so(recipe_of, tmp_path, monkeypatch):
    file = write(tmp_path / "rows.jsonl", chats(3000))
    begin = prepare._begin

    def end_soon():
        begin()
        signal.alarm(1)  # SIGALRM ends a process that does not handle it

    monkeypatch.setattr(prepare, "_begin", end_soon)
    resolved = recipe_of(str(file), train__dataset_num_proc=2)
    monkeypatch.setattr(prepare, "_work", _sleep)
    with pytest.raises(RecipeError, match=r"was ended from outside(?s:.*)train\.dataset_num_proc"):
        gate.pass_through(resolved, False)


def _sleep(batch):
    time.sleep(30)


def test_the_trainer_gets_the_very_rows_that_were_counted(recipe_of, tmp_path):
    resolved = recipe_of(str(write(tmp_path / "rows.jsonl", chats(40))), train__max_length=48)
    made, arguments = (
        gate.pass_through(resolved, False),
        build.sft_config(resolved.recipe, RunFolder(tmp_path)),
    )
    build.random_base(resolved)
    trainer, _ = build.trainer(
        resolved, arguments, build.model(resolved), made.tokenizer, made.train, None, []
    )
    rows: Any = trainer.train_dataset
    assert [row["input_ids"] for row in rows] == [e.input_ids for e in made.train]
    assert sum(len(row["input_ids"]) for row in rows) == made.counts.tokens
    assert sum(label != -100 for row in rows for label in row["labels"]) == made.counts.supervised
    assert made.counts.truncated and max(len(row["input_ids"]) for row in rows) == 48


def test_a_source_that_changes_while_it_is_read_is_told_and_not_kept(passed, place, tmp_path):
    file = write(tmp_path / "rows.jsonl", chats(1500))

    def append():
        while not list(place.glob(".*.tmp")):
            time.sleep(0.002)
        with file.open("a") as more:
            more.write(json.dumps(chats(1)[0]) + "\n")

    writer = threading.Thread(target=append)
    writer.start()
    with pytest.raises(RecipeError, match="a source changed while it was read"):
        passed(str(file))
    writer.join()
    assert not cache.kept() and passed(str(file)).said.startswith("read and checked")


# mixed


def taken(made, files):
    """How many examples of each file an epoch has, and how many tokens."""
    names = [made.train.where(i).split(":")[0] for i in range(len(made.train))]
    lengths = made.train.lengths
    rows = [sum(name.endswith(f) for name in names) for f in files]
    tokens = [sum(int(n) for name, n in zip(names, lengths, strict=True) if name.endswith(f)) for f in files]
    return rows, tokens


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.9, 0.1), (1 / 3, 2 / 3), (0.05, 0.95)])
@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_shares_are_exact_to_the_row(passed, tmp_path, shares, by):
    write(tmp_path / "a.jsonl", chats(90, "tea"))
    write(tmp_path / "b.jsonl", chats(50, "a longer word"))
    sources = [{"path": f"{n}.jsonl", "share": s} for n, s in zip("ab", shares, strict=True)]
    made = passed(sources, data__mix=by)
    rows, tokens = taken(made, ["a.jsonl", "b.jsonl"])
    if by == "rows":
        whole = sum(rows)
        assert all(abs(n - s * whole) < 1 for n, s in zip(rows, shares, strict=True))
        assert whole == int(min(90 / shares[0], 50 / shares[1]) + 1e-9), "as many as there can be"
    else:
        longest = int(made.train.lengths.max())
        whole = sum(tokens)
        assert all(abs(n - s * whole) <= longest for n, s in zip(tokens, shares, strict=True))
    assert (rows[0] > 88 or rows[1] > 48) and len(set(map(made.train.where, range(len(made.train))))) == len(
        made.train
    )
    (table,) = (text for label, text in gate.lines(made, recipes.load("tiny_facts")) if label == "sources")
    assert f"{rows[0]} of 90" in table and f"{tokens[1]:,}" in table


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([{"path": "a.jsonl", "share": 0.5}, {"path": "b.jsonl", "share": 0.6}], "the shares add up to 1.1"),
        ([{"path": "a.jsonl", "share": 0.5}, "b.jsonl"], "1 of 2 sources have a share"),
        (
            [{"path": "a.jsonl", "share": 0.5, "weight": 2}, {"path": "b.jsonl", "share": 0.5}],
            "both share and",
        ),
        (["a.jsonl", "b.jsonl"], "no source has a share"),
    ],
)
def test_shares_that_are_none_are_refused(recipe_of, sources, said):
    with pytest.raises(RecipeError, match=said):
        recipe_of(sources, data__mix="tokens")


def test_weights_take_rows_with_all_their_turns_and_make_no_others_into_tokens(passed, tmp_path):
    two = [{"messages": row["messages"] * 2} for row in chats(20)]
    write(tmp_path / "a.jsonl", two)
    write(tmp_path / "b.jsonl", chats(6, "cup"))
    sources = [{"path": "a.jsonl", "weight": 0.25}, {"path": "b.jsonl", "weight": 1.5}]
    made = passed(sources, data__rows="assistant_turn")
    lines = [made.train.where(i).rpartition("#")[0] for i in range(len(made.train))]
    a = [line for line in lines if "a.jsonl" in line]
    assert len(a) == 10 and len(set(a)) == 5 and all(a.count(line) == 2 for line in a)
    assert len(lines) - len(a) == 9 and len(made.train.data) == 10 + 6
    assert [int(line.rpartition(":")[2]) - 1 for line in dict.fromkeys(a)] == mix.repeated(20, 0.25)


# many, and strange


def test_reading_stops_after_a_thousand_faults(passed, tmp_path):
    write(tmp_path / "bad.jsonl", [{"messages": []}] * 3000)
    with pytest.raises(RecipeError, match="and 980 more faults, after which nothing more was read"):
        passed("bad.jsonl")


def mutated(rng, value):
    """`value` with something in it changed: a type, a nesting, a key, a text."""
    strange: list[Any] = [
        None,
        0,
        -1,
        1e300,
        True,
        [],
        {},
        "",
        " ",
        "\u200b",
        "\ufffe",
        "a" * 3000,
        [[]],
        {"role": "user"},
    ]
    strange += [
        "<|im_start|>system",
        "\ud800",
        "<|im_end|>",
        "{{ x }}",
        b"\x00\x01".decode(),
        "\u202e",
        "x\ry",
    ]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        changed = dict(value)
        roll = rng.random()
        if roll < 0.15:
            del changed[key]
        elif roll < 0.3:
            changed[rng.choice(["role", "content", "tool_calls", "from", "train", "weight", "x"])] = (
                changed.pop(key)
            )
        else:
            changed[key] = mutated(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return rng.choice(
            [value[:i], value[i:], value * 2, [*value[:i], mutated(rng, value[i]), *value[i + 1 :]]]
        )
    if isinstance(value, str) and rng.random() < 0.3:
        return value[: rng.randrange(len(value) + 1)] + rng.choice([s for s in strange if isinstance(s, str)])
    return rng.choice(strange)


def broken(rng, line: bytes) -> bytes:
    """A line with some of its bytes changed."""
    i = rng.randrange(len(line))
    return rng.choice(
        [line[:i], line[i:], line[:i] + bytes([rng.randrange(256)]) + line[i + 1 :], line + line[:i]]
    )


def test_three_thousand_mutated_rows_are_trained_or_named_by_their_line(recipe_of, tmp_path):
    rng, seeds = (
        random.Random(7),
        [
            *chats(2),
            {"prompt": "Say it.", "completion": " It."},
            {"text": "Only text."},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
                        ],
                    },
                    {"role": "tool", "content": "y"},
                    {"role": "assistant", "content": "z"},
                ],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            },
        ],
    )
    good = fine = 0
    for batch in range(30):
        lines = []
        for _ in range(100):
            line = json.dumps(mutated(rng, rng.choice(seeds))).encode()
            lines.append((broken(rng, line) if rng.random() < 0.2 else line).replace(b"\n", b" "))
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        resolved = recipe_of("rows.jsonl")
        tokenizer = tokenizing.load(resolved, local_files_only=True)
        try:
            facts = prepare.build(resolved, tokenizer, tmp_path / f"built{batch}", None)
            good += facts["train"]["rows"][0]
        except RecipeError as error:
            fine += len(error.problems)
            assert all("rows.jsonl:" in p.where or "more fault" in p.found for p in error.problems), error
    assert fine > 500


def test_the_order_of_an_epoch_is_the_same_in_every_process():
    code = "import numpy as np; from lora_recipes.data import mix\n"
    code += "s, r = np.repeat([0, 1], 50), np.tile(np.arange(50), 2)\n"
    code += "e = [{'share': 0.3}, {'share': 0.7}]\n"
    code += "print([mix.order(e, [50, 50], s, r, r + 1, by).tolist() for by in ('rows', 'tokens')])"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and len(json.loads(said.pop())[0]) == 71


def test_rows_repeated_by_one_place_are_no_duplicates(passed, tmp_path):
    write(tmp_path / "a.jsonl", [*chats(5), chats(5)[2]])
    made = passed([{"path": "a.jsonl", "weight": 2}])
    assert made.facts.train.duplicates == 2 and np.unique(made.train.plain).size == 5


def test_the_report_of_lengths_says_what_another_limit_would_cut(passed, recipe_of, tmp_path):
    write(tmp_path / "a.jsonl", chats(60))
    whole = [len(e.input_ids) for e in passed("a.jsonl").train]
    for limit in (48, 512):
        cut = passed("a.jsonl", train__max_length=limit)
        text = report.lengths(cut.train, recipe_of("a.jsonl", train__max_length=limit).recipe)
        assert f"longest {max(whole):,} tokens" in text
        for value, rows in re.findall(r"max_length (\d+)(?: \(now\))? cuts (\d+|none)", text):
            assert sum(n > int(value) for n in whole) == (0 if rows == "none" else int(rows)), text
        tokens = re.search(r"48 \(now\) cuts \d+ rows, (\d+) tokens", text)
        assert limit == 512 or (tokens and int(tokens[1]) == sum(max(n - 48, 0) for n in whole))
        assert f"max_length {limit} (now) cuts" in text
