"""The benchmarks of training: the GPU's goes from end to end in a dry run; tables say what was measured."""

import json
import sys

import pytest

from benchmarks import gpu, train


def test_a_dry_run_of_the_gpus_benchmark_measures_ours_and_the_script_by_hand(tmp_path):
    gpu.main(["--dry-run", "--outputs", str(tmp_path / "outputs"), "--results", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    ours, script = found["runs"]
    assert [ours["arm"], script["arm"]] == ["lora-recipes, LoRA, padded", "TRL script, LoRA"]
    assert ours["steps"] == script["steps"] == 2
    # The first of two batches warms up: the tokens are those of the second, the same for both.
    assert ours["tokens"] == script["tokens"] > 0 and ours["positions"] == script["positions"]
    assert ours["loss"] == pytest.approx(script["loss"], rel=1e-5)
    assert ours["planned_peak"] > 0 and ours["base"] > ours["trainable"] > 0
    said = (tmp_path / "gpu.md").read_text()
    assert "a dry run" in said and "| lora-recipes, LoRA, padded |" in said


def test_ratios_are_of_one_round_and_a_contender_that_failed_says_why():
    def run(contender, number, seconds, **more):
        figures = {"seconds": seconds, "cpu_s": 2 * seconds, "start_s": 1.0, "start_cpu_s": 1.0}
        figures |= {"rss_peak": 2**30, "steps": 4, "positions": 200, "tokens": 100, "load": 0.5}
        return {"job": "dense, short rows", "contender": contender, "round": number} | figures | more

    # The second round was twice as slow for all: no ratio sees it.
    runs = [run("TRL script", 1, 10.0), run("lora-recipes", 1, 5.0)]
    runs += [run("TRL script", 2, 20.0), run("lora-recipes", 2, 10.0)]
    runs += [{"job": "dense, short rows", "contender": "other", "round": 1, "load": 0.5, "failed": "no GPU"}]
    script, ours, other = train.summary(runs)
    assert script["seconds_ratio"] == [1, 1, 1] and ours["seconds_ratio"] == [0.5, 0.5, 0.5]
    assert other == {"contender": "other", "failed": "no GPU"}
    lines = train.table([script, ours, other])
    assert "| 7.5 (5.0-10.0) | 15.0 (10.0-20.0) | 0.50 | 0.50 | 13 | 50% | 4 |" in lines[3]
    assert "did not train: no GPU" in lines[4] and lines[4].count("|") == lines[0].count("|")


def test_a_command_that_trains_nothing_has_failed(tmp_path):
    ended = train.measured([sys.executable, "-c", "pass"], tmp_path, "nothing", 1)
    assert "nothing was said" in ended["failed"] and ended["whole_s"] > 0
    raised = train.measured([sys.executable, "-c", "raise ValueError('no rows')"], tmp_path, "raises", 1)
    assert raised["failed"] == "ValueError: no rows (exit 1)"
    assert "failed" not in train.measured([sys.executable, "-c", "pass"], tmp_path, "none", 1, trains=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "denze"], "'denze' is not one of dense hybrid smollm2"),
        (["--rows", "short tall"], "'tall' is not one of short mixed long"),
        (["--rounds", "0"], "'0' is no whole number from 1 on"),
        (["--only", "bare nonsense"], "no contender here has 'nonsense' in its name"),
    ],
)
def test_what_cannot_be_measured_is_said_first(words, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert told in f"{capsys.readouterr().err}{ended.value}"
