"""The report of an ablation: what it says of means, intervals, old and failed runs. The runs are copies of a
real one.
"""

import base64
import json
import math
import re
import shutil
import subprocess
import sys

import pytest

from lora_recipes.ablation import figures, report
from lora_recipes.ablation.spec import FILE
from lora_recipes.core import interval
from lora_recipes.core.errors import RecipeError
from lora_recipes.recipe import load as recipes

LOSSES = {"r2": [1.30, 1.34, 1.32], "r4": [1.20, 1.24, 1.22], "r8": [1.21, 1.23, 1.19]}


@pytest.fixture
def folder(trained, tmp_path):
    """An ablation's folder: ranks 2, 4, 8 with the eval losses of LOSSES, all else as the run of tiny_facts
    left it.
    """
    sections = recipes.load("tiny_facts").sections
    arms = {}
    for name, losses in LOSSES.items():
        lora = sections["lora"] | {"r": int(name[1:])}
        arms[name] = {"overrides": [f"lora.r={name[1:]}"], "sections": sections | {"lora": lora}}
        for seed, loss in enumerate(losses, 1):
            run = tmp_path / "ranks" / name / f"s{seed}"
            shutil.copytree(trained / "tiny_facts", run)
            recipe = recipes.load("tiny_facts", [f"lora.r={name[1:]}", f"train.seed={seed}"])
            (run / "recipe.yaml").write_text(recipe.to_yaml())
            change(run, lambda record, loss=loss: record["metrics"].update(eval_loss=loss))
            change(run, lambda record, r=lora["r"]: record["plan"]["model"].update(trainable=1024 * r))
            (run / "metrics.jsonl").write_text(
                "".join(json.dumps({"step": s, "eval_loss": loss + 1 / s}) + "\n" for s in (10, 20))
            )
    content = {
        "name": "ranks",
        "question": "Which rank?",
        "recipe": "tiny_facts",
        "seeds": [1, 2, 3],
        "arms": arms,
    }
    (tmp_path / "ranks" / FILE).write_text(json.dumps(content))
    return tmp_path / "ranks"


def change(run, edit):
    """Change run.json in place."""
    file = run / "run.json"
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("freedom", range(1, 31))
def test_the_table_of_t_holds_95_percent_of_the_density(freedom):
    """By Simpson's rule on Student's density, 20,000 intervals from -t to t."""
    t, n = interval.T[freedom - 1], 20_000
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    step = 2 * t / n
    density = [scale * (1 + (i * step - t) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(n + 1)]
    assert step / 3 * (
        density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])
    ) == pytest.approx(0.95, abs=1e-4)


def test_the_interval_is_that_of_student():
    found = interval.mean([1.0, 2.0, 3.0])  # 4.303 x 1 / sqrt(3)
    assert (
        found.value == 2
        and found.half == pytest.approx(2.4843, abs=1e-3)
        and str(found) == "2.0000 +- 2.4843"
    )
    assert str(interval.mean([1.5])) == "1.5000 (one seed)"
    assert interval.mean([0.0] * 100).half == 0


def test_a_difference_is_that_of_pairs_and_not_of_two_intervals():
    """By scipy.stats.ttest_rel(b, a).confidence_interval(0.95): two intervals that overlap by most of their
    width, and a plain difference; and the other way round, where the seeds go against each other.
    """
    a, b = {1: 2.50, 2: 2.70, 3: 2.10}, {1: 2.46, 2: 2.67, 3: 2.07}
    found = interval.paired(b, a)
    assert found and (found.low, found.high) == pytest.approx((-0.0476755, -0.0189912), abs=2e-5)
    assert found.shown and found.signed() == "-0.0333 +- 0.0143"
    assert interval.mean(list(a.values())).low < 1.7 and interval.mean(list(b.values())).high > 3.1
    crossed = interval.paired({1: 1.30, 2: 1.31, 3: 1.34}, {1: 1.29, 2: 1.25, 3: 1.21})
    assert crossed and (crossed.low, crossed.high) == pytest.approx((-0.0830700, 0.2164034), abs=2e-5)
    assert not crossed.shown


def test_only_seeds_that_both_have_are_paired_and_one_pair_shows_nothing():
    found = interval.paired({1: 1.0, 3: 2.0}, {2: 5.0, 3: 1.5})
    assert found == interval.Mean(0.5, None, 1) and not found.shown
    assert found.signed() == "+0.5000 (one seed)"
    assert interval.paired({1: 1.0}, {2: 1.0}) is None


def test_a_change_a_token_has_the_interval_of_its_rows():
    """Of 4 rows of 10, 20, 30 and 40 tokens; by hand: -30 / 100; residuals 1, 3, -3, -1, their s is
    sqrt(20 / 3); 3.182 x 2.58199 / sqrt(4) / 25.
    """
    found = interval.per_unit([-2.0, -3.0, -12.0, -13.0], [10, 20, 30, 40])
    assert (found.value, found.half) == pytest.approx((-0.3, 0.164318), abs=1e-5) and found.shown
    alike = interval.per_unit([-2.0, -3.0, -12.0, -13.0], [25] * 4)
    plain = interval.mean([-2 / 25, -3 / 25, -12 / 25, -13 / 25])
    assert (alike.value, alike.half) == pytest.approx((plain.value, plain.half))
    assert interval.per_unit([3.0], [6]) == interval.Mean(0.5, None, 1)


@pytest.mark.parametrize(
    ("better", "worse", "p"),  # scipy.stats.binomtest(better, better + worse).pvalue, but for the first
    [
        (0, 0, 1),
        (3, 3, 1),
        (4, 0, 0.125),
        (0, 6, 0.03125),
        (1, 8, 0.0390625),
        (2, 9, 0.0654297),
        (21, 9, 0.0427739),
    ],
)
def test_the_exact_test_of_mcnemar(better, worse, p):
    assert interval.mcnemar(better, worse) == pytest.approx(p, abs=1e-7)


def test_the_winner_is_said_with_those_from_which_no_difference_is_shown(folder):
    """r4 - r8 by seed: -0.01, +0.01, +0.03; 4.303 x 0.02 / sqrt(3) = 0.0497. r2 - r4: 0.1 with every seed."""
    said = report.write(folder)
    assert "Lowest eval loss: r8, 1.2100 +- 0.0497 nats a token." in said
    assert (
        "No difference shown between r8 and r4: +0.0100 +- 0.0497 seed by seed, an interval with 0 in it."
        in said
    )
    assert "The smallest of them is r4, with 4,096 trainable parameters to 8,192." in said
    assert "between r8 and r2" not in said


def test_each_arm_is_held_against_the_first_seed_by_seed(folder):
    """Where the losses of r4 go up and down with those of r2, the difference is plain though the intervals
    overlap; r8 - r2: -0.09, -0.11, -0.13.
    """
    for seed, loss in enumerate([1.29, 1.34, 1.31], 1):
        change(folder / "r4" / f"s{seed}", lambda record, loss=loss: record["metrics"].update(eval_loss=loss))
    said = report.write(folder)
    assert re.search(r"^arm .* against r2 ", said, re.M)
    assert re.search(r"^r4 .* -0\.0067 \+- 0\.0143 \(none shown\) ", said, re.M)
    assert re.search(r"^r8 .* -0\.1100 \+- 0\.0497  ", said, re.M)
    found = json.loads((folder / "report.json").read_text())
    assert (found["reference"], found["kind"], found["seeds"]) == ("r2", "eval_loss", [1, 2, 3])
    r2, r4, r8 = (found["arms"][name] for name in ("r2", "r4", "r8"))
    assert "difference" not in r2 and r2["losses"] == {"1": 1.30, "2": 1.34, "3": 1.32}
    assert not r4["difference"]["shown"] and r8["difference"]["shown"]
    assert r8["difference"]["mean"] == pytest.approx(-0.11)
    assert r8["difference"]["half"] == pytest.approx(4.303 * 0.02 / math.sqrt(3), abs=1e-6)
    assert "differences.png" in (folder / "report.md").read_text()


def test_probes_are_pairs_whatever_the_number_of_seeds(folder):
    """Four of eight probes fail with every seed of r4, and one more with one seed of three: 5 worse of 5."""
    for seed in (1, 2, 3):

        def fail(record, seed=seed):
            for probe in record["probes"]["after"][: 5 if seed == 2 else 4]:
                probe["top"] = [["nothing", 1.0]]

        change(folder / "r4" / f"s{seed}", fail)
    said = report.write(folder)
    assert re.search(r"^arm .* probes against r2 ", said, re.M)
    assert re.search(r"^r4 .* 0 better, 5 worse, p 0\.062 ", said, re.M)
    assert re.search(r"^r8 .* 0 better, 0 worse, p 1 ", said, re.M)
    found = json.loads((folder / "report.json").read_text())["arms"]["r4"]["probes"]
    assert found == {"better": 0, "worse": 5, "asked": 8, "p": 0.0625}


def test_a_clear_winner_is_said_to_be_one(folder):
    for seed in (1, 2, 3):
        change(
            folder / "r2" / f"s{seed}",
            lambda record, seed=seed: record["metrics"].update(eval_loss=0.1 + seed / 1000),
        )
    said = report.write(folder)
    assert "Lowest eval loss: r2" in said
    assert "Its difference from every other arm, seed by seed, has an interval without 0." in said


def test_one_seed_says_that_nothing_can_be_told_apart(folder):
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(content | {"seeds": [1]}))
    said = report.write(folder)
    assert "One seed shows no difference from r4: r8 +0.0100, r2 +0.1000." in said
    assert "none shown" not in said and "differences.png" not in (folder / "report.md").read_text()


def test_the_table_has_what_a_choice_needs(folder):
    head, *lines = report.rows(
        [report._arm(folder, json.loads((folder / FILE).read_text()), name) for name in LOSSES], "eval_loss"
    )
    assert head == [
        "arm",
        "seeds",
        "eval loss",
        "against r2",
        "changed",
        "kept",
        "probes against r2",
        "trainable",
        "seconds",
        "peak memory",
        "adapter",
        "servable rank",
    ]
    r2 = dict(zip(head, lines[0], strict=True))
    assert (
        r2["eval loss"] == "1.3200 +- 0.0497"
        and r2["trainable"] == "2,048"
        and r2["servable rank"] == "8"
        and r2["changed"] == "4.0 of 4"
    )
    assert re.fullmatch(r"\d+\.\d MiB planned", r2["peak memory"]) and r2["adapter"] == "0.02 MB"


def test_the_pages_hold_table_and_pictures_and_html_needs_no_other_file(folder):
    report.write(folder)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    images = re.findall(r'<img src="([^"]*)"', page)
    assert len(images) == 4 and all(
        base64.b64decode(i.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG") for i in images
    )
    assert "http" not in page and "1.2100 \xb1 0.0497" in page and "<tr class=best><td>r8</td>" in page
    named = re.findall(r"!\[.*\]\((.*)\)", text)
    assert named == ["arms.png", "differences.png", "curves.png", "r.png"] and all(
        (folder / name).is_file() for name in named
    )
    assert "| r8 | 3 | 1.2100 +- 0.0497 |" in text


def test_what_the_question_holds_is_no_markup(folder):
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(content | {"question": "r < 8 & <script>?"}))
    report.write(folder)
    assert "r &lt; 8 &amp; &lt;script&gt;?" in (folder / "report.html").read_text()


def test_runs_that_failed_are_missing_or_of_an_older_recipe_are_told_and_not_counted(folder):
    change(folder / "r2" / "s1", lambda record: record.update(status="failed", error="the disk is full"))
    shutil.rmtree(folder / "r2" / "s2")
    file = folder / "r8" / "s3" / "recipe.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.003", "learning_rate: 0.004"))
    said = report.write(folder)
    assert "r2: s1 failed: the disk is full" in said and "r2: s2 was not run" in said
    assert (
        "r8: s3 is of an older recipe (train.learning_rate: the run began with 0.004, now it is 0.003)"
        in said
    )
    assert re.search(r"^r2 +1 of 3 +1\.3200 \(one seed\)", said, re.M) and re.search(
        r"^r8 +2 of 3", said, re.M
    )


def test_runs_that_were_not_made_alike_are_told(folder):
    change(folder / "r2" / "s1", lambda record: record["versions"].update(torch="2.12.0"))
    change(folder / "r4" / "s1", lambda record: record["plan"]["data"]["eval"].update(sha256="0" * 64))
    said = report.write(folder)
    assert "the runs are of different versions: " in said and "torch 2.12.0" in said
    assert "the runs are of different eval rows, whose losses do not compare: " in said


def test_without_an_eval_split_the_last_training_loss_is_compared_and_named_so(folder):
    for run in folder.glob("*/s*"):
        change(run, lambda record: record["metrics"].pop("eval_loss"))
        (run / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 2, "train_loss": 9.0}\n'
        )
    said = report.write(folder)
    assert (
        "train loss, last logged" in said
        and "2.5000 +- 0.0000" in said
        and "not how it does on others" in said
    )


def test_runs_too_short_to_log_a_loss_are_told_and_end_in_no_traceback(folder):
    for run in folder.glob("r*/s*"):
        change(run, lambda record: record["metrics"].pop("eval_loss"))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "train_loss": 1.0}) + "\n")
    assert "No run is finished and logged a loss" in report.write(folder)


def test_an_adapter_that_no_server_takes_has_no_servable_rank(folder):
    change(folder / "r4" / "s1", lambda record: record.update(not_servable=["serves no DoRA"]))
    said = report.write(folder)
    assert re.search(r"^r4 .* no$", said, re.M) and re.search(r"^r8 .* 8$", said, re.M)


def test_a_folder_without_an_ablation_or_with_a_broken_one_is_said(tmp_path):
    with pytest.raises(RecipeError, match="no ablation was run here"):
        report.write(tmp_path)
    (tmp_path / FILE).write_text('{"name": 1')
    with pytest.raises(RecipeError, match="is not as an ablation leaves it"):
        report.write(tmp_path)


def test_keys_that_vary_together_share_one_picture_and_others_have_their_own():
    """R and alpha = 2 r; the learning rate crosses both."""

    def arm(r, rate):
        sections = {"lora": {"r": r, "lora_alpha": 2 * r}, "train": {"learning_rate": rate}}
        texts = [
            f"lora.r={r}",
            f"lora.lora_alpha={2 * r}",
            f"train.learning_rate={rate}",
            "train.max_steps=5",
        ]
        return report.Arm(f"r{r}_{rate}", texts, sections, {}, {})

    found = figures._varied([arm(r, rate) for r in (2, 4) for rate in (0.1, 0.2)])
    assert list(found) == ["lora.r", "train.learning_rate"]
    assert list(found["lora.r"]) == ["learning_rate 0.1", "learning_rate 0.2"]
    assert [value for value, _ in found["lora.r"]["learning_rate 0.1"]] == [2, 4]


def test_a_report_imports_no_torch(folder):
    code = (
        "import sys; from pathlib import Path; from lora_recipes.ablation import report;"
        f" report.write(Path({str(folder)!r}))"
    )
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
