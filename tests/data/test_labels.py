"""Rows of a text and its class: what is wrong is told before training, and what is counted is there."""

import json
from collections import Counter

import pytest

from lora_recipes.core.errors import RecipeError
from lora_recipes.data import labels
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve

GOOD = [
    {"text": f"{word} {i} {i * i}", "label": word} for i in range(6) for word in ("read", "write", "kill")
]
OTHER = [
    {"text": f"{word} number {i + 100}", "label": word}
    for i in range(2)
    for word in ("read", "write", "kill")
]


@pytest.fixture
def through(tmp_path):
    """Take rows through the gate of tiny_classify."""

    def gate(train, held=OTHER, *words):
        for name, rows in (("train", train), ("eval", held)):
            (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        given = [f"data.train={tmp_path}/train.jsonl", "classify.labels=[kill, read, write]", *words]
        given += [f"data.eval={tmp_path}/eval.jsonl"]
        last = {word.split("=")[0]: word for word in given}
        recipe = recipes.load("tiny_classify", list(last.values()))
        return labels.pass_through(resolve(recipe, tmp_path), True)

    return gate


def test_rows_become_tokens_and_the_place_of_their_class(through):
    found = through(GOOD)
    assert found.names == ["kill", "read", "write"]
    assert [found.names[e.labels[0]] for e in found.train] == [row["label"] for row in GOOD]
    assert found.tokenizer.decode(found.train[0].input_ids) == GOOD[0]["text"]
    assert [(c.train, c.eval, c.weight) for c in found.classes] == [(6, 2, 1.0)] * 3
    assert dict(labels.lines(found, recipes.load("tiny_classify")))["classes"].startswith("kill 6 (33.3 %)")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x", "label": "raed"}, "'raed' is none of the 3"),
        ({"text": "x", "label": 3}, "label is 3, no text"),
        ({"text": "x", "label": True}, "label is true or false"),
        ({"text": "x", "label": ["read", "write"]}, "several classes of one text are not offered"),
        ({"text": "x", "label": None}, "no 'label'"),
        ({"text": "x", "label": " "}, "label is empty"),
        ({"text": "  ", "label": "read"}, "text is empty"),
        ({"text": 7, "label": "read"}, "text is no text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "a row of messages, to be written"),
        ({"text": "a\u0007b", "label": "read"}, "control character U+0007"),
    ],
)
def test_a_faulty_row_is_named_by_its_line(row, said, through):
    with pytest.raises(RecipeError) as raised:
        through([*GOOD, row])
    assert said in str(raised.value)
    assert f"train.jsonl:{len(GOOD) + 1}" in str(raised.value)


def test_the_nearest_class_is_offered(through):
    with pytest.raises(RecipeError, match="did you mean read"):
        through([*GOOD, {"text": "x", "label": "raed"}])


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([r for r in GOOD if r["label"] == "read"], [], "all 6 rows are of one class, 'read'"),
        ([r for r in GOOD if r["label"] != "kill"], [], "no row is of the class 'kill'"),
        ([*(r for r in GOOD if r["label"] != "kill"), GOOD[2]], [], "one row alone is of the class 'kill'"),
        (GOOD, ["classify.class_weight={raed: 2}"], "'raed' is no class"),
        (GOOD, ["data.limits={unsupervised: 0.5}"], "is of rows that are written"),
        ([*GOOD, *GOOD], [], "repeat an earlier row"),
        ([*GOOD, *OTHER], [], "of the eval rows stand in train too"),
    ],
)
def test_rows_that_teach_no_classes_are_refused(rows, words, said, through):
    with pytest.raises(RecipeError) as raised:
        through(rows, OTHER, *words)
    assert said in str(raised.value)


def test_what_is_doubtful_is_a_warning(through):
    held = [r for r in OTHER if r["label"] != "kill"]
    twice = {"text": GOOD[0]["text"].upper(), "label": "write"}
    found = "\n".join(through([*GOOD, twice], held).warnings)
    assert "no eval row is of the class kill" in found
    assert "1 rows have the text of another row and another class" in found
    assert "weighs them" in "\n".join(
        through([*GOOD, *({"text": f"more {i} of it {i}", "label": "read"} for i in range(60))]).warnings
    )


def test_balanced_weights_give_each_class_the_same_share_of_the_loss(through):
    rows = [*GOOD, *({"text": f"more {i} of it {i}", "label": "read"} for i in range(5))]
    found = through(rows, OTHER, "classify.class_weight=balanced")
    assert found.weights == pytest.approx([23 / 3 / 6, 23 / 3 / 11, 23 / 3 / 6])
    assert through(rows, OTHER, "classify.class_weight={kill: 2}").weights == [2.0, 1.0, 1.0]


def test_texts_are_cut_at_the_end_that_the_recipe_says(through):
    long = {"text": "one two three four five six seven", "label": "read"}
    whole = through([*GOOD, long]).train[-1].input_ids
    words = ["train.max_length=3", "data.limits={truncated: 1, near_in_eval: 1}"]
    assert through([*GOOD, long], OTHER, *words).train[-1].input_ids == whole[:3]
    kept = through([*GOOD, long], OTHER, *words, "train.truncation_mode=keep_end")
    assert kept.train[-1].input_ids == whole[-3:]
    assert kept.counts.truncated > 0


def made(write_recipe, tmp_path, **classify):
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in GOOD * 2))
    rows = {"train": str(tmp_path / "rows.jsonl"), "limits": {"duplicates": 1, "train_in_eval": 1}}
    path = write_recipe("tiny_classify", data=rows, classify=classify)
    return labels.pass_through(resolve(recipes.load(str(path)), tmp_path), True)


def test_a_validation_split_is_made_of_each_class_alike_and_by_its_seed(write_recipe, tmp_path):
    one, again, other = (
        made(write_recipe, tmp_path, validation=0.25, validation_seed=seed) for seed in (1, 1, 2)
    )
    assert one.names == ["kill", "read", "write"]
    assert Counter(e.labels[0] for e in one.evaluation) == {0: 3, 1: 3, 2: 3}
    wheres = [[e.where for e in found.evaluation] for found in (one, again, other)]
    assert wheres[0] == wheres[1] != wheres[2]
    assert not set(wheres[0]) & {e.where for e in one.train}


def test_a_label_file_gives_the_order(write_recipe, tmp_path):
    (tmp_path / "classes.txt").write_text("write\nkill\n\nread\n")
    assert made(write_recipe, tmp_path, labels=str(tmp_path / "classes.txt"), validation=0.25).names == [
        "write",
        "kill",
        "read",
    ]
    (tmp_path / "classes.txt").write_text("write\nread\nwrite\n")
    with pytest.raises(RecipeError, match="names write twice"):
        made(write_recipe, tmp_path, labels=str(tmp_path / "classes.txt"), validation=0.25)


def test_the_shipped_rows_are_those_that_their_script_makes(tmp_path, monkeypatch):
    import importlib.util

    from lora_recipes.core.files import ROOT

    file = ROOT / "data" / "commands" / "make.py"
    spec = importlib.util.spec_from_file_location("make_commands", file)
    assert spec and spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.main()
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (file.parent / name).read_bytes()
