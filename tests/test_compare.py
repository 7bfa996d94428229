"""The comparison of methods: an arm runs as the shipped recipe does, and each method gets its own rate."""

import importlib.util
import json

import pytest

from lora_recipes.core import files

ROOT = files.ROOT
SPEC = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
assert SPEC and SPEC.loader
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)


def test_of_the_rates_that_correct_the_facts_the_one_that_forgets_least_is_chosen():
    def tried(rate, corrected, probability, forgotten):
        return {
            "rate": rate,
            "corrected": corrected,
            "corrected_probability": probability,
            "forgotten": forgotten,
        }

    too_low, third, gentle, rough = (
        tried(1e-4, 1, 0.30, 0.0),
        tried(3e-4, 3, 0.85, 0.1),
        tried(1e-3, 4, 0.81, 0.2),
        tried(3e-3, 4, 0.99, 0.9),
    )
    assert compare.chosen([too_low, third, gentle, rough]) == 1e-3, "three of four are not enough"
    assert compare.chosen([too_low, third]) == 3e-4, "where none is enough, the one that corrects best"


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


def test_an_interval_is_student_s():
    assert compare.mean([{"x": x} for x in (1, 2, 3, 4, 5)], "x") == pytest.approx(
        (3, 2.776 * (2.5 / 5) ** 0.5)
    )
