"""Ablations: the file and its grid, every bad input, arms in one process against arms alone, and what is left
of a run that was cut off.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_recipes.__main__ import main
from lora_recipes.ablation import ablate as ablating
from lora_recipes.ablation import arms, report, spec, workers
from lora_recipes.ablation.ablate import ablate, state
from lora_recipes.ablation.reuse import Kept, group
from lora_recipes.core import lock
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.record import FinishedRun
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.memory.fits import GIB, PARTS, Memory
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import Shared, train
from tests import process
from tests.typed import there


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(ours: Path, theirs: Path) -> bool:
    one, other = adapter(ours), adapter(theirs)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def write(tmp_path):
    """Writes an ablation file, a question in its first line; returns its path."""

    def write(text: str, name: str = "mine") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text("# Which?\n" + text)
        return str(path)

    return write


@pytest.fixture
def outputs(trained, tmp_path):
    """An outputs folder of one's own, with the trained base."""
    shutil.copytree(trained / "tiny_base", tmp_path / "outputs" / "tiny_base")
    return tmp_path / "outputs"


# the file


@pytest.mark.parametrize("name", spec.names())
def test_every_shipped_ablation_loads_with_three_seeds_and_two_arms_or_more(name):
    loaded = spec.load(name)
    assert len(loaded.arms) >= 2 and loaded.seeds == (1, 2, 3) and loaded.question.endswith("?")


@pytest.mark.parametrize("name", [name for name in spec.names() if name.startswith("tiny")])
def test_every_shipped_tiny_ablation_plans(name, trained, tmp_path, capsys):
    shutil.copytree(trained / "tiny_base", tmp_path / "tiny_base")
    assert ablate(spec.load(name), tmp_path, dry=True) == 0
    runs = len(spec.load(name).runs())
    assert f"= {runs} runs, " in capsys.readouterr().out and not (tmp_path / "ablations").exists()


def test_the_published_grid_of_ranks_and_rates_is_the_one_asked_for():
    loaded = spec.load("qwen35_4b_rank")
    found = set()
    for arm in loaded.arms:
        lora = there(arm.recipe.lora)
        found.add((lora.r, lora.lora_alpha, arm.recipe.train.learning_rate))
    assert found == {(r, 2 * r, rate) for r in (4, 8, 16, 32, 64) for rate in (1e-4, 3e-4, 1e-3)}
    assert len(loaded.runs()) == 45


def test_a_grid_becomes_named_arms_and_a_key_with_one_value_is_in_no_name(write):
    text = (
        "recipe: tiny_facts\ngrid:\n  lora.r: [2, 4]\n  train.learning_rate: [0.001, 3.0e-4]\n "
        " train.max_steps: [5]\nseeds: [7]\n"
    )
    loaded = spec.load(write(text))
    assert [arm.name for arm in loaded.arms] == ["r2_lr1e-3", "r2_lr3e-4", "r4_lr1e-3", "r4_lr3e-4"]
    assert all(arm.recipe.train.max_steps == 5 for arm in loaded.arms)
    run = loaded.runs()[0]
    assert (
        run.recipe.name == "ablations/mine/r2_lr1e-3/s7"
        and run.recipe.train.seed == 7
        and there(run.recipe.lora).r == 2
    )


def test_named_arms_stand_at_every_point_of_the_grid(write):
    text = (
        "recipe: tiny_facts\narms:\n  lora:\n  rs: [lora.use_rslora=true]\ngrid: {lora.r: [2, 4]}\nseeds:"
        " [1]\n"
    )
    loaded = spec.load(write(text))
    assert [arm.name for arm in loaded.arms] == ["lora_r2", "lora_r4", "rs_r2", "rs_r4"]
    given = [there(arm.recipe.lora).given for arm in loaded.arms]
    assert [lora.get("use_rslora") for lora in given] == [None, None, True, True]


@pytest.mark.parametrize(
    "value", [3, 1e-5, 0.25, True, None, "cosine", "no", "2", "a b", ["q_proj", "v_proj"], {"min_lr": 1e-5}]
)
def test_a_value_of_a_grid_reads_back_as_it_was_written(value, write_recipe):
    overridden = recipes._value("", spec.written(value))
    assert overridden == (value, [])


def test_two_keys_with_the_same_initials_are_named_in_full():
    assert spec.short(["lora.r", "train.learning_rate"]) == {"lora.r": "r", "train.learning_rate": "lr"}
    assert (
        spec.short(["train.max_steps", "lora.modules_x", "train.min_steps"])["train.max_steps"]
        == "train.max_steps"
    )


def test_the_quick_case_takes_values_from_the_command_line():
    loaded = spec.quick("tiny_facts", ["lora.r=2,4", "lora.target_modules=[q_proj, v_proj],[v_proj]"])
    assert [arm.name for arm in loaded.arms] == [
        "r2_tmq_proj+v_proj",
        "r2_tmv_proj",
        "r4_tmq_proj+v_proj",
        "r4_tmv_proj",
    ]
    assert loaded.name == "tiny_facts-r-tm" and loaded.seeds == (42,)


# bad input

GOOD = {"recipe": "recipe: tiny_facts\n", "grid": "grid: {lora.r: [2, 4]}\n", "seeds": "seeds: [1, 2]\n"}
BAD = {
    "an unknown key of an arm": (
        {"grid": "arms:\n  big:\n    - lora.rr=4\n"},
        r"mine\.yaml:5 arms\.big\[0\]: lora\.rr: unknown key",
    ),
    "an unknown key of the grid": (
        {"grid": "grid:\n  lora.rr: [2, 4]\n"},
        r"mine\.yaml:4 grid\.lora\.rr\[0\]: lora\.rr: unknown key",
    ),
    "a wrong value of the grid": (
        {"grid": "grid:\n  lora.r: [2, big]\n"},
        r"mine\.yaml:4 grid\.lora\.r\[1\]: lora\.r: the text 'big'",
    ),
    "an unknown key": (
        {"grid": "gird: {lora.r: [2]}\n"},
        r"mine\.yaml:3 gird: unknown key\n    -> did you mean grid\?",
    ),
    "two arms with one name": (
        {"grid": "arms:\n  a: []\n  a: [lora.r=2]\n"},
        r"mine\.yaml:5 arms\.a: given twice, first on line 4",
    ),
    "one name from the grid": (
        {"grid": "grid: {data.train: [a/b, a-b]}\n"},
        r"mine\.yaml:3 grid\.data\.train\[1\]: two arms with one name, ta-b",
    ),
    "two arms that are one run": (
        {"grid": "arms:\n  a: []\n  b: [lora.r=4]\n"},
        r"mine\.yaml:5 arms\.b: b is the same run as a",
    ),
    "an arm that is no folder": (
        {"grid": "arms:\n  a/b: []\n"},
        r"mine\.yaml:4 arms\.a/b: an arm's name is a folder's",
    ),
    "an arm that is no list": (
        {"grid": "arms:\n  a: lora.r=4\n"},
        r"mine\.yaml:4 arms\.a: not a list of section\.key=value",
    ),
    "a key in arm and grid": (
        {"grid": "arms:\n  a: [lora.r=3]\ngrid: {lora.r: [2]}\n"},
        r"mine\.yaml:5 grid\.lora\.r\[0\]: lora\.r=2: given twice",
    ),
    "an empty grid": ({"grid": "grid: {}\n"}, r"mine\.yaml:3 grid: an empty grid"),
    "a grid without values": (
        {"grid": "grid:\n  lora.r: []\n"},
        r"mine\.yaml:4 grid\.lora\.r: an empty grid: no value to try",
    ),
    "a grid value that is no list": (
        {"grid": "grid:\n  lora.r: 4\n"},
        r"mine\.yaml:4 grid\.lora\.r: not a list of values\n.*lora\.r: \[4, \.\.\.\]",
    ),
    "a grid value twice": (
        {"grid": "grid: {lora.r: [2, 4, 2]}\n"},
        r"mine\.yaml:3 grid\.lora\.r\[2\]: 2 is given twice",
    ),
    "no arms": ({"grid": ""}, r"there are no arms"),
    "a seed twice": ({"seeds": "seeds: [1, 2, 1]\n"}, r"mine\.yaml:4 seeds\[2\]: the seed 1 is given twice"),
    "no seeds": ({"seeds": ""}, r"seeds: no seeds"),
    "a seed that is none": (
        {"seeds": "seeds: [1, -1, x]\n"},
        r"seeds\[1\]: -1 is no seed(.|\n)*seeds\[2\]: x is no seed",
    ),
    "the seed as an arm": (
        {"grid": "grid: {train.seed: [1, 2]}\n"},
        r"mine\.yaml:3 grid\.train\.seed: sets train\.seed\n    -> seeds:",
    ),
    "an unknown recipe": (
        {"recipe": "recipe: tiny_fact\n"},
        r"mine\.yaml:2 recipe: RECIPE=tiny_fact: no recipe of that name",
    ),
    "no recipe": ({"recipe": ""}, r"recipe: no recipe is named"),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
def test_a_bad_file_is_told_by_line_and_key(changes, said, write):
    with pytest.raises(RecipeError) as error:
        spec.load(write("".join((GOOD | changes).values())))
    assert re.search(said, str(error.value)), str(error.value)


def test_a_file_without_a_question_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("".join(GOOD.values()))
    with pytest.raises(RecipeError, match=r"mine\.yaml:1: no question in the first line"):
        spec.load(str(path))


def test_an_unknown_ablation_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean tiny_rank"):
        spec.load("tiny_ranks")


@pytest.mark.parametrize(
    "over",
    [["lora.r"], ["lora.r="], ["lora.r=2,2"], ["lora.rr=2,4"], ["lora.r=2", "lora.r=4"], ["lora.r=[2"]],
)
def test_bad_values_on_the_command_line_are_told_with_their_text(over):
    with pytest.raises(RecipeError, match=r"OVER '"):
        spec.quick("tiny_facts", over)


def test_what_does_not_fit_the_model_is_told_for_every_arm_before_any_is_trained(write, outputs):
    arms = (
        "  good: []\n  typo: ['lora.target_modules=[q_projj, v_proj]']\n  none:"
        " [lora.layers_to_transform=99]\n"
    )
    text = f"recipe: tiny_facts\narms:\n{arms}seeds: [1]\n"
    with pytest.raises(RecipeError) as error:
        ablate(spec.load(write(text)), outputs)
    assert "arm typo: override 'lora.target_modules=[q_projj, v_proj]'" in str(
        error.value
    ) and "arm none: " in str(error.value)
    assert not (outputs / "ablations").exists()


# memory, and how many at once


def memory(base: float, rest: float) -> Memory:
    return Memory(
        dict.fromkeys(PARTS, 0) | {"base": int(base * GIB), "activations": int(rest * GIB)}, "a layer", 1, 1
    )


def test_arms_are_planned_with_their_memory_and_those_of_one_shape_share_a_rehearsal(write, trained, capsys):
    text = "recipe: tiny_facts\ngrid:\n  lora.r: [2, 64]\n  train.learning_rate: [0.1, 0.2]\nseeds: [1, 2]\n"
    loaded = spec.load(write(text))
    plans = arms.planned(arms.resolved(loaded.runs(), trained), False, False)
    found = {name: made[1] for name, made in plans.items()}
    assert (
        found["r2_lr0.1"] is found["r2_lr0.2"]
        and found["r64_lr0.1"].peak_bytes > found["r2_lr0.1"].peak_bytes
    )
    assert there(plans["r64_lr0.2"][0].facts.memory).peak_bytes == found["r64_lr0.2"].peak_bytes
    alone = plan.make(resolve(loaded.arms[0].recipe, trained))
    assert (
        plan.add_memory(alone, resolve(loaded.arms[0].recipe, trained), accelerator=False).parts
        == found["r2_lr0.1"].parts
    )
    assert re.search(
        r"^r2_lr0.1 .* 0\.00\d+ GiB  lora.r=2", "\n".join(arms.table(loaded, plans, False)), re.M
    )


@pytest.mark.parametrize(
    ("jobs", "cards", "free", "expected"),
    [
        (None, [], 100, [None]),
        (3, [], 100, [None] * 3),
        (9, [], 11, [None] * 2),  # 4 to train, 1 for the base that is kept, half for the libraries
        (2, [], 1, [None]),  # less than one: one is tried, and said
        (None, [("0", 80), ("1", 80)], 100, ["0", "1"]),
        (3, [("0", 80), ("1", 80)], 100, ["0", "1", "0"]),
        (3, [("GPU-a", 10), ("GPU-b", 6)], 100, ["GPU-a", "GPU-b"]),
        (2, [("0", 80), ("1", 80)], 2, ["0"]),  # the machine's own memory is short
        (1, [("0", 1)], 100, ["0"]),
    ],
)
def test_as_many_run_at_once_as_memory_allows_and_in_turn_over_the_gpus(jobs, cards, free, expected, capsys):
    """A run of 4 GiB, 1 of them the base: at most 5.14 GiB of a GPU."""
    cards = [(name, room * GIB) for name, room in cards]
    assert arms.devices(jobs, [memory(1, 3), memory(1, 1)], cards, free * GIB, GIB // 2) == expected
    asked = jobs or max(len(cards), 1)
    assert (f"at once, not {asked}: a run takes up to" in capsys.readouterr().out) == (
        asked > len(expected) or free == 1 or (cards[:1] == [("0", GIB)])
    )


# arms in one process

PLAIN = ["train.max_steps=6", "train.logging_steps=2"]
SEQUENCE = {  # each changes the model that it is given, and the random state, in its own way
    "gaussian": ["lora.init_lora_weights=gaussian", "lora.r=8"],
    "pissa": ["lora.init_lora_weights=pissa"],
    "words": ["lora.trainable_token_indices=[3, 5]"],
    "dora": ["lora.use_dora=true", "lora.lora_dropout=0.1"],
    "plain": ["lora.r=2", "train.learning_rate=0.01", "train.per_device_train_batch_size=3"],
}


@pytest.mark.parametrize(
    ("base", "arms_of"),
    [
        ([], list(SEQUENCE)),
        (["model.dtype=bfloat16"], ["pissa", "plain"]),
        (["model.quantize=nf4"], ["dora", "plain"]),
    ],
    ids=["float32", "bfloat16", "nf4"],
)
def test_arms_in_one_process_are_bit_for_bit_those_trained_alone(base, arms_of, write, outputs):
    lines = "".join(f"  {name}: {json.dumps([*base, *PLAIN, *SEQUENCE[name]])}\n" for name in arms_of)
    loaded, kept = spec.load(write(f"recipe: tiny_facts\narms:\n{lines}seeds: [1]\n")), Kept()
    runs, alone = loaded.runs(), outputs.parent / "alone"
    shutil.copytree(outputs / "tiny_base", alone / "tiny_base")
    assert len({group(run.recipe) for run in runs}) == 1
    plans = arms.planned(arms.resolved(runs, outputs), True, False)
    for run in runs:
        outcome = kept(run, {"memory": plans[run.arm][1]}, outputs)
        assert not outcome.failed, outcome.said
    for run in runs:
        train(resolve(run.recipe, alone), shared=Shared(memory=plans[run.arm][1]))
        assert equal(alone / run.recipe.name, outputs / run.recipe.name), run.arm


def test_an_arm_after_others_in_another_process_is_what_training_it_here_makes(done, trained, tmp_path):
    shutil.copytree(trained / "tiny_base", tmp_path / "tiny_base")
    run = next(run for run in spec.load(str(done[0] / "three.yaml")).runs() if str(run) == "r4/s2")
    record = train(resolve(run.recipe, tmp_path))
    assert equal(tmp_path / run.recipe.name, done[0] / "outputs" / run.recipe.name)
    other = RunFolder(done[0] / "outputs" / run.recipe.name).outcome()
    assert isinstance(other, FinishedRun)
    assert record.memory.planned_peak_bytes == other.memory.planned_peak_bytes


def test_the_base_is_loaded_and_the_rows_are_tokenised_once(write, outputs):
    kept = Kept()
    loaded = spec.load(
        write("recipe: tiny_facts\ngrid: {lora.r: [2, 4], train.max_steps: [2]}\nseeds: [1]\n")
    )
    assert not kept(loaded.runs()[0], {}, outputs).failed
    base, rows = there(kept.base), there(kept.gate).train
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert not kept(loaded.runs()[1], {}, outputs).failed
    assert kept.base is base and there(kept.gate).train is rows
    assert base.state_dict().keys() == before.keys() and all(
        torch.equal(before[n], t) for n, t in base.state_dict().items()
    )


def test_runs_that_differ_in_more_than_the_adapter_and_the_schedule_share_no_process(write):
    arms = [
        "[]",
        "[lora.r=2]",
        "[train.weight_decay=0.1]",
        "[train.max_length=16]",
        "[model.dtype=bfloat16]",
        "[train.optim=sgd]",
    ]
    lines = "".join(f"  a{i}: {text}\n" for i, text in enumerate(arms))
    loaded = spec.load(write(f"recipe: tiny_facts\narms:\n{lines}seeds: [1]\n"))
    kinds = [group(run.recipe) for run in loaded.runs()]
    assert len(set(kinds[:3])) == 1 and len(set(kinds[2:])) == 4


# what stays, what goes on, what is trained anew


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """Two processes, two good arms and one whose loss is no number; returns the outputs folder and what was
    said.
    """
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(trained / "tiny_base", folder / "outputs" / "tiny_base")
    (folder / "three.yaml").write_text(THREE)
    said = process.run(
        "ablate", str(folder / "three.yaml"), "--outputs", str(folder / "outputs"), "--jobs", "2"
    )
    return folder, said


THREE = """# Which of three?
recipe: tiny_facts
arms:
  r2: [lora.r=2]
  wild: [train.learning_rate=1e30, train.max_grad_norm=0]
  r4: []
grid:
  train.max_steps: [6]
  train.logging_steps: [1]
seeds: [1, 2]
"""


def test_a_failed_arm_is_reported_the_rest_go_on_and_the_exit_code_says_so(done):
    folder, said = done
    assert said.returncode == 1, said.stderr
    assert said.stdout.count("6 steps in") == 4 and said.stdout.count("FAILED: ") == 2
    assert "2 of 6 runs failed: wild/s1, wild/s2" in said.stderr or "wild/s2, wild/s1" in said.stderr
    assert "wild: s1 failed: " in said.stdout and "is nan" in said.stdout
    assert {p.name for p in (folder / "outputs" / "ablations" / "three").glob("*/*/adapter")} == {"adapter"}


def test_every_run_is_a_run_folder_and_its_words_are_beside_it(done):
    arm = done[0] / "outputs" / "ablations" / "three" / "r2"
    assert {"run.json", "recipe.yaml", "metrics.jsonl", "adapter"} <= {p.name for p in (arm / "s1").iterdir()}
    assert "every adapted module has finite" in (arm / "s1.log").read_text()
    assert not (done[0] / "outputs" / "ablations" / "three" / "tiny_base").exists(), "the base is shared"


@pytest.fixture
def again(done, tmp_path):
    """A copy of what was done, and what each run's folder says now: `again(changes to the file)` -> {run:
    state}.
    """
    shutil.copytree(done[0] / "outputs", tmp_path / "outputs")

    def again(old: str = "", new: str = "") -> dict[str, tuple[str, str]]:
        (tmp_path / "three.yaml").write_text(THREE.replace(old, new) if old else THREE)
        loaded = spec.load(str(tmp_path / "three.yaml"))
        found = arms.resolved(loaded.runs(), tmp_path / "outputs")
        plans = arms.planned(found, network=False, cuda=False)
        return {
            f"{run.arm}/s{run.seed}": state(found[run.arm].by(run.recipe), plans[run.arm][0])
            for run in loaded.runs()
        }

    return again


def test_finished_runs_stay_and_failed_ones_are_taken_up_again(again):
    found = again()
    assert {name for name, (how, _) in found.items() if how == "finished"} == {
        "r2/s1",
        "r2/s2",
        "r4/s1",
        "r4/s2",
    }
    assert all(
        found[name][0] == "anew" and "no whole checkpoint" in found[name][1]
        for name in ("wild/s1", "wild/s2")
    )


def test_a_changed_arm_is_trained_anew_and_a_changed_way_of_showing_is_not(again):
    found = again("r2: [lora.r=2]", "r2: [lora.r=3]")
    assert (
        found["r2/s1"] == ("anew", "lora.r: the run began with 2, now it is 3")
        and found["r4/s1"][0] == "finished"
    )
    assert again("train.logging_steps: [1]", "train.logging_steps: [2]")["r2/s1"][0] == "finished"
    assert again("seeds: [1, 2]", "seeds: [2, 3]")["r2/s3"] == ("new", "")


def test_outputs_of_an_older_recipe_or_of_other_data_are_trained_anew_and_not_reported(again, tmp_path):
    folder = tmp_path / "outputs" / "ablations" / "three"
    file = folder / "r2" / "s1" / "recipe.yaml"
    file.write_text(file.read_text().replace("max_length: 32", "max_length: 24"))
    record = folder / "r4" / "s2" / "run.json"
    content = json.loads(record.read_text())
    content["plan"]["data"]["eval"]["sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    found = again()
    assert found["r2/s1"] == ("anew", "train.max_length: the run began with 24, now it is 32")
    assert found["r4/s2"] == ("anew", "eval data: other rows than it was evaluated on")
    said = report.write(folder)
    assert (
        "r2: s1 is of an older recipe (train.max_length: the run began with 24, now it is 32)" in said
        and "1 of 2" in said
    )


def test_an_unreadable_record_and_a_lost_adapter_are_trained_anew(again, tmp_path):
    folder = tmp_path / "outputs" / "ablations" / "three"
    (folder / "r2" / "s1" / "run.json").write_text("{")
    shutil.rmtree(folder / "r2" / "s2" / "adapter")
    found = again()
    assert found["r2/s1"][0] == found["r2/s2"][0] == "anew" and "cannot be read" in found["r2/s1"][1]
    assert "r2: s1 broken: cannot be read" in report.write(folder)


def test_an_ablation_of_an_ablations_output_is_refused(done, write):
    run = done[0] / "outputs" / "ablations" / "three" / "r2" / "s1"
    with pytest.raises(
        RecipeError, match=r"mine\.yaml:2 recipe: .*recipe\.yaml is the output of the ablation three"
    ):
        spec.load(write(f"recipe: {run / 'recipe.yaml'}\ngrid: {{lora.r: [2, 4]}}\nseeds: [1]\n"))
    with pytest.raises(
        RecipeError,
        match=r"mine\.yaml:3 grid\.model\.from_recipe.*recipe\.yaml is the output of the ablation three",
    ):
        spec.load(
            write(
                "recipe: tiny_facts\ngrid: {model.from_recipe: [tiny_base,"
                f" '{run / 'recipe.yaml'}']}}\nseeds: [1]\n"
            )
        )
    arms = f"arms:\n  a: [model.from_recipe=null, 'model.name_or_path={run / 'merged'}']\n"
    with pytest.raises(
        RecipeError, match=r"mine\.yaml:4 arms\.a: .*merged is the output of the ablation three"
    ):
        spec.load(write(f"recipe: tiny_facts\n{arms}seeds: [1]\n"))


def test_only_names_arms_or_runs(done, tmp_path):
    loaded = spec.load(str(done[0] / "three.yaml"))
    assert [(run.arm, run.seed) for run in ablating._chosen(loaded, ["r2/s2", "r4"])] == [
        ("r4", 1),
        ("r2", 2),
        ("r4", 2),
    ]
    with pytest.raises(RecipeError, match=r"ONLY=r3: no such arm or run\n    -> did you mean r"):
        ablate(loaded, tmp_path, only=["r3"])


def test_a_process_that_is_killed_costs_one_run_which_then_goes_on_bit_for_bit(trained, tmp_path):
    """SIGKILL after a checkpoint, as when memory runs out: the next run begins in a new process, the killed
    one continues later.
    """
    outputs, file = tmp_path / "outputs", tmp_path / "killed.yaml"
    shutil.copytree(trained / "tiny_base", outputs / "tiny_base")
    words = ["train.max_steps=160", "train.save_strategy=steps", "train.save_steps=40"]
    arms = f"  long: {json.dumps(words)}\n  other: [train.max_steps=2]\n"
    file.write_text(f"# Which?\nrecipe: tiny_facts\narms:\n{arms}seeds: [1]\n")
    launched = process.Forked(("ablate", str(file), "--outputs", str(outputs)), tmp_path)
    folder, until = outputs / "ablations" / "killed" / "long" / "s1", time.monotonic() + 600
    while not list(folder.glob("checkpoints/checkpoint-*/SHA256SUMS")):
        assert launched.poll() is None and time.monotonic() < until, launched.completed()
        time.sleep(0.01)
    os.kill(json.loads(lock.file(folder).read_text())["pid"], signal.SIGKILL)
    first = launched.completed()
    assert first.returncode == 1, first.stderr
    assert "[1/2] long/s1: FAILED: its process was killed by SIGKILL" in first.stdout
    assert "[2/2] other/s1: 2 steps" in first.stdout and "long: s1 running: not at its end" in first.stdout
    second = process.run("ablate", str(file), "--outputs", str(outputs))
    assert second.returncode == 0, second.stderr
    assert (
        "continues   long/s1: from checkpoint-" in second.stdout
        and "to do       1 of 2 runs; 1 are finished and stay" in second.stdout
    )
    alone = tmp_path / "alone"
    shutil.copytree(trained / "tiny_base", alone / "tiny_base")
    run = spec.load(str(file)).runs()[0]
    assert json.loads((outputs / run.recipe.name / "run.json").read_text())["resumed"]
    train(resolve(run.recipe, alone))
    assert equal(alone / run.recipe.name, outputs / run.recipe.name)


@pytest.mark.parametrize("seeds", [["1"], ["1", "2"]])
def test_seeds_beside_an_ablation_s_own_are_refused(seeds, capsys):
    assert main(["ablate", "tiny_rank", "--dry-run", "--seeds", *seeds]) == 2
    assert "SEEDS: an ablation has its own seeds" in capsys.readouterr().err


def trains_nothing():
    """Makes what trains in a process, where the run must not be reached."""
    return pytest.fail


def test_two_commands_do_not_train_the_same_run(done):
    """The second is told, by the lock on the log of the run."""
    import fcntl

    outputs = done[0] / "outputs"
    run = spec.load(str(done[0] / "three.yaml")).runs()[0]
    with (outputs / f"{run.recipe.name}.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        (outcome,) = workers.each([(run, {})], str, trains_nothing, outputs, [None])
    assert outcome.failed and outcome.said.startswith("FAILED: another process is training it")


def test_a_checked_ablation_imports_no_torch_until_it_plans():
    code = (
        "import sys; from lora_recipes.ablation import report, spec; spec.load('tiny_rank'); sys.exit('torch'"
        " in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_may_be_made_from_rows_that_are_there(trained):
    kept, loaded = Kept(), recipes.load("tiny_facts")
    one, two = (plan.make(resolve(loaded, trained), rows=kept.rows) for _ in range(2))
    assert (
        one.text() == two.text()
        and one.gate.train is two.gate.train
        and one.gate.tokenizer is not two.gate.tokenizer
    )
