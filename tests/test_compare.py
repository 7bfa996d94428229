"""The comparison of methods: an arm runs as the shipped recipe does, and the page says what was measured."""

import importlib.util
import json

import pytest

from lora_recipes.core import files

ROOT = files.ROOT
SPEC = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
assert SPEC and SPEC.loader
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "compare.json").read_text())


def test_the_page_says_what_was_measured(result):
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    made, found, reading = page.partition(compare.READING)
    assert made == compare.page(result) + "\n" and found and reading
    assert (ROOT / "docs" / "compare.png").read_bytes().startswith(b"\x89PNG") and result["seconds"] < 300


def test_the_counts_are_those_of_the_document(result):
    counts = {label: {run["trainable"] for run in runs} for label, runs in result["runs"].items()}
    assert (
        counts["LoRA r 4 on q,k,v,o"] == {4096}
        and counts["LoRA r 4 on v"] == {1024}
        and counts["full"] == {94656}
    )
    assert all(
        len(runs) == 5 and len(run["losses"]) == compare.EPOCHS
        for runs in result["runs"].values()
        for run in runs
    )


def test_the_rates_are_those_that_the_rule_chooses_and_none_lies_at_the_edge(result):
    for label, tried in result["sweep"].items():
        assert compare.chosen(tried) == result["rates"][label]
        assert compare.RATES[0] < result["rates"][label] < compare.RATES[-1], (
            "the best rate may lie beyond the edge"
        )


def test_an_arm_trains_its_own_method_and_asks_every_kept_sentence(tmp_path):
    compare.base(1, tmp_path)
    done = compare.run(compare.ARMS["LoRA r 4 on v"], 3e-2, 1, tmp_path)
    assert done["trainable"] == 1024 and len(done["losses"]) == 50 and done["losses"][-1] < done["losses"][0]
    assert (
        done["corrected"] >= 3
        and done["corrected_probability"] > 0.5
        and 0 < done["kept"] < 32
        and done["forgotten"] > 0.1
    )
    assert len(json.loads((tmp_path / "arm" / "run.json").read_text())["probes"]["after"]) == 4 + 32


def test_an_interval_is_student_s(result):
    assert compare.mean([{"x": x} for x in (1, 2, 3, 4, 5)], "x") == pytest.approx(
        (3, 2.776 * (2.5 / 5) ** 0.5)
    )
