"""Steps against what the real Trainer, SFTTrainer, accelerate and schedulers count, and the printed
arithmetic against itself.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from trl import SFTConfig, SFTTrainer

from lora_recipes.data import tokenizer as tokenizing
from lora_recipes.planning.steps import Steps, chart
from lora_recipes.recipe import contract, recipe
from lora_recipes.recipe import load as recipes
from tests.typed import there


class Started(Exception):
    """Training is about to begin: all counts are made."""


class StopAtOnce(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise Started


def trainer(folder: Path, of: Steps, callbacks: list[TrainerCallback] | None = None) -> Trainer:
    """A real Trainer of a tiny model over `of.rows` rows of three tokens, on one device."""
    config = AutoConfig.for_model(**contract.load("tiny_qwen3").config | {"num_hidden_layers": 1})
    rows = [[1, 2, 3]] * of.rows
    return Trainer(
        AutoModelForCausalLM.from_config(config),
        TrainingArguments(**options(folder, of)),
        train_dataset=data(rows),
        callbacks=callbacks,
    )


def data(rows: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def options(folder: Path, of: Steps) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": of.per_device,
        "gradient_accumulation_steps": of.accumulation,
        "num_train_epochs": of.epochs,
        "max_steps": of.max_steps,
        "warmup_steps": of.warmup_steps,
        "dataloader_drop_last": of.drop_last,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def test_the_companion_recipe_takes_750_steps(tmp_path: Path) -> None:
    # SOURCES.md S1: 1,000 rows, 2 per device x 2 accumulation, 3 epochs.
    steps = Steps(1000, 2, 2, 1, 3, warmup_steps=0.03)
    assert (steps.total, steps.examples, steps.per_epoch, steps.warmup) == (750, 4, 250, 23)
    assert str(steps) == "2 x 2 x 1 device = 4 examples a step, ceil(1000 / 4) x 3 = 750 steps"
    assert steps.warmup_said == "750 x 0.03 = 22.5, rounded up: 23 steps"
    real = trainer(tmp_path, steps, [StopAtOnce()])
    with pytest.raises(Started):
        real.train()
    assert real.state.max_steps == 750


# rows, per device, accumulation, epochs, max_steps, drop_last
TRAINED = [
    (10, 2, 2, 3, -1, False),  # the last of 3 steps has 2 examples
    (10, 2, 2, 3, -1, True),
    (11, 2, 2, 1, -1, False),  # the last batch has 1 example
    (11, 2, 2, 1, -1, True),  # 5 whole batches make 3 steps, not floor(11 / 4) = 2
    (12, 4, 1, 2, -1, False),
    (7, 2, 3, 1.5, -1, False),
    (10, 1, 1, 0.25, -1, False),
    (3, 4, 2, 2, -1, False),  # fewer rows than a batch
    (10, 2, 2, 3, 4, False),
    (10, 2, 2, 3, 6, False),
    (10, 2, 2, 1, 4, True),
    (100, 1, 1, 0.07, -1, False),  # 7.000000000000001 steps
]


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_a_real_training_takes_as_many_steps_and_epochs(case: tuple, tmp_path: Path) -> None:
    rows, per_device, accumulation, epochs, max_steps, drop_last = case
    steps = Steps(rows, per_device, accumulation, 1, epochs, max_steps, 0, drop_last)
    real = trainer(tmp_path, steps)
    real.train()
    assert real.state.global_step == real.state.max_steps == steps.total
    assert real.state.epoch == pytest.approx(steps.passes)


def test_a_real_sft_training_takes_as_many_steps(tmp_path: Path) -> None:
    steps = Steps(11, 2, 2, 1, 2, warmup_steps=0.3)
    config = AutoConfig.for_model(**contract.load("tiny_qwen3").config)
    rows = [[1, 2, 3 + i] for i in range(11)]
    arguments = SFTConfig(
        **options(tmp_path, steps),
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    tokenizer = tokenizing.make(contract.load("tiny_qwen3"))
    real = SFTTrainer(
        AutoModelForCausalLM.from_config(config),
        args=arguments,
        train_dataset=data(rows),
        processing_class=tokenizer,
    )
    real.train()
    assert real.state.global_step == steps.total == 6
    assert there(real.lr_scheduler).state_dict()["last_epoch"] == 6


def batches_of(steps: Steps, process: int) -> BatchSamplerShard:
    return BatchSamplerShard(
        BatchSampler(range(steps.rows), steps.per_device, steps.drop_last), steps.devices, process
    )


def test_each_of_several_devices_sees_as_many_batches_as_accelerate_deals() -> None:
    for rows, per_device, accumulation, devices, drop_last in product(
        (1, 7, 8, 9, 10, 31), (1, 2, 4), (1, 3), (1, 2, 3), (False, True)
    ):
        steps = Steps(rows, per_device, accumulation, devices, 1, drop_last=drop_last)
        for process in range(devices):
            dealt = [len(batch) for batch in batches_of(steps, process)]
            if devices > 1:
                assert len(dealt) == len(batches_of(steps, process)) == steps.batches
        if devices == 1:
            dealt = [len(batch) for batch in BatchSampler(range(rows), per_device, drop_last)]
            assert len(dealt) == steps.batches
        if steps.batches:
            # The examples of the last step: what the devices get after all whole steps of an epoch.
            first = (steps.per_epoch - 1) * accumulation
            shards = (
                [[len(b) for b in batches_of(steps, i)][first:] for i in range(devices)]
                if devices > 1
                else [dealt[first:]]
            )
            assert steps.last == sum(map(sum, shards)), steps


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_steps_of_several_devices_are_those_trainer_counts_from_accelerates_loader(
    devices: int, drop_last: bool, tmp_path: Path
) -> None:
    for rows, per_device, accumulation, epochs in product((50, 63, 64, 65), (1, 4), (1, 3), (1, 2.5)):
        steps = Steps(rows, per_device, accumulation, devices, epochs, drop_last=drop_last)
        loader = DataLoader(TensorDataset(torch.arange(rows)), batch_size=per_device, drop_last=drop_last)
        dealt = len(prepare_data_loader(loader, num_processes=devices, process_index=devices - 1))
        assert dealt == steps.batches
        # Trainer's own line (set_initial_training_values), written out: it cannot be run for processes that
        # are not there.
        per_epoch = max(dealt // accumulation + int(dealt % accumulation > 0), 1)
        assert (steps.per_epoch, steps.total) == (per_epoch, ceil(epochs * per_epoch))


@pytest.mark.parametrize(
    ("warmup_steps", "warmup"),
    [
        (0, 0),
        (0.03, 23),
        (0.5, 375),
        (0.999, 750),
        (1, 1),
        (1.0, 1),
        (10, 10),
        (10.9, 10),
        (0.07, 53),
        (1000, 1000),
    ],
)
def test_warm_up_is_what_training_arguments_count(warmup_steps: float, warmup: int, tmp_path: Path) -> None:
    steps = Steps(1000, 2, 2, 1, 3, warmup_steps=warmup_steps)
    real = TrainingArguments(**options(tmp_path, steps)).get_warmup_steps(steps.total)
    assert steps.warmup == real == warmup


def test_warm_up_is_said_with_its_arithmetic() -> None:
    assert Steps(1000, 2, 2, 1, 3, warmup_steps=0.5).warmup_said == "750 x 0.5 = 375 steps"
    assert Steps(1000, 2, 2, 1, 3, warmup_steps=10).warmup_said == "10 steps"
    assert Steps(1000, 2, 2, 1, 3).warmup_said == "0 steps"
    assert Steps(4, 1, 1, 1, 1, warmup_steps=100).warmup_said == "100 steps (the whole run)"
    assert (
        Steps(100, 1, 1, 1, 1, warmup_steps=0.07).warmup_said
        == "100 x 0.07 = 7.000000000000001, rounded up: 8 steps"
    )


# The printed arithmetic


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            Steps(11, 2, 2, 1, 3),
            "2 x 2 x 1 device = 4 examples a step, ceil(11 / 4) x 3 = 9 steps (an epoch's last step has 3)",
        ),
        (
            Steps(10, 2, 2, 2, 3),
            "2 x 2 x 2 devices = 8 examples a step, ceil(10 / 8) x 3 = 6 steps (an epoch's last step has 4)",
        ),
        (
            Steps(11, 2, 2, 1, 3, drop_last=True),
            (
                "2 x 2 x 1 device = 4 examples a step, ceil(floor(11 / 2) / 2) x 3 = 9 steps (an epoch's last"
                " step has 2)"
            ),
        ),
        (
            Steps(11, 4, 1, 2, 3, drop_last=True),
            "4 x 1 x 2 devices = 8 examples a step, floor(11 / 8) x 3 = 3 steps",
        ),
        (
            Steps(10, 2, 2, 1, 0.5),
            "2 x 2 x 1 device = 4 examples a step, ceil(10 / 4) x 0.5 = 1.5, rounded up: 2 steps",
        ),
        (Steps(5, 1, 1, 1, 1.0), "1 x 1 x 1 device = 1 example a step, ceil(5 / 1) x 1 = 5 steps"),
        (Steps(4, 4, 1, 1, 1), "4 x 1 x 1 device = 4 examples a step, ceil(4 / 4) x 1 = 1 step"),
        (
            Steps(100, 1, 1, 1, 0.07),
            (
                "1 x 1 x 1 device = 1 example a step, ceil(100 / 1) x 0.07 = 7.000000000000001, rounded up: 8"
                " steps"
            ),
        ),
        (
            Steps(10, 2, 2, 1, 3, 4),
            "2 x 2 x 1 device = 4 examples a step, max_steps = 4 steps (1.40 epochs of 10 rows)",
        ),
        (
            Steps(1000, 2, 2, 1, 3, 2000),
            "2 x 2 x 1 device = 4 examples a step, max_steps = 2000 steps (8.00 epochs of 1,000 rows)",
        ),
    ],
)
def test_steps_are_said_as(steps: Steps, said: str) -> None:
    assert str(steps) == said


def test_the_printed_arithmetic_is_true() -> None:
    for rows, per_device, accumulation, devices, epochs, drop_last in product(
        (8, 9, 10, 11, 24, 25, 1000), (1, 2, 3), (1, 2, 5), (1, 2), (1, 3, 0.5, 2.7), (False, True)
    ):
        steps = Steps(rows, per_device, accumulation, devices, epochs, drop_last=drop_last)
        said = re.fullmatch(
            r"(.+) devices? = (\d+) examples? a step, (.+\)) x ([\d.]+) = (?:([\d.]+), rounded up: )?(\d+)"
            r" steps?( \(.+)?",
            str(steps),
        )
        assert said, str(steps)
        size, examples, formula, factor, exact, total, rest = said.groups()
        assert eval_arithmetic(size.replace("x", "*")) == int(examples)
        value = eval_arithmetic(formula) * float(factor)
        assert value == float(exact or total)
        assert ceil(value) == int(total) == steps.total
        assert bool(rest) == (steps.last < steps.examples and steps.total >= steps.per_epoch)


def eval_arithmetic(text: str) -> Fraction:
    """The value of a formula of whole numbers, `*`, `/`, ceil() and floor(), exact."""
    exact = re.sub(r"\d+", lambda number: f"Fraction({number.group()})", text)
    names = {"Fraction": Fraction, "ceil": ceil, "floor": floor}
    return Fraction(eval(exact, {"__builtins__": {}}, names))  # noqa: S307


# Numbers that train nothing


def with_train(folder: Path, **train: Any) -> recipe.Recipe:
    sections = {
        "model": {"contract": "tiny_qwen35", "weights": "random", "dtype": "float32"},
        "data": {"train": "data/companion/train.jsonl"},
        "full": {},
        "train": {"learning_rate": 2e-4, **train},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return recipes.load(str(folder / "mine.yaml"))


def test_a_batch_larger_than_the_rows_with_drop_last_is_a_problem(tmp_path: Path) -> None:
    r = with_train(tmp_path, dataloader_drop_last=True)
    (problem,) = Steps(7, 4, 1, 2, 3, 5, drop_last=True).problems(r)
    assert problem.where.endswith("mine.yaml:10 train.dataloader_drop_last")
    assert problem.found == "drop_last leaves none of the 7 rows: a batch takes 8"
    assert Steps(8, 4, 1, 2, 3, 5, drop_last=True).problems(r) == []
    assert Steps(7, 4, 1, 2, 3, 5).problems(r) == []
    # Trainer trains nothing then, and says nothing.
    real = trainer(tmp_path / "out", Steps(3, 4, 1, 1, 3, 5, drop_last=True))
    real.train()
    assert (real.state.global_step, real.state.max_steps) == (0, 5)


def test_max_steps_0_is_a_problem_and_negative_means_epochs(tmp_path: Path) -> None:
    (problem,) = Steps(10, 2, 2, 1, 3, 0).problems(with_train(tmp_path, max_steps=0))
    assert problem.where.endswith("mine.yaml:10 train.max_steps")
    assert Steps(10, 2, 2, 1, 3, 0).total == 0
    assert Steps(10, 2, 2, 1, 3, -7).total == 9


# The chart


def linear(total: int) -> Callable[[int], float]:
    return lambda step: 2e-4 * (1 - step / total)


def bars(lines: list[str]) -> list[str]:
    return [line.split("|", 1)[1] for line in lines[:-1]]


@pytest.mark.parametrize("total", [1, 2, 3, 9, 10, 59, 60, 61, 100, 999, 100_000])
def test_a_chart_has_the_peak_on_its_first_line_and_the_last_step_at_its_end(total: int) -> None:
    lines = chart(linear(total), total)
    assert len(lines) == 6
    assert lines[0].startswith("   2.0e-04 |#")
    assert max(map(len, bars(lines))) <= min(total, 60)
    axis = lines[-1].removeprefix("      step +")
    assert axis.split() == (["1"] if total == 1 else ["1", str(total)])
    assert total < 4 or len(axis) == min(total, 60)
    assert all(len(below) >= len(above) for above, below in zip(bars(lines), bars(lines)[1:], strict=False))


@pytest.mark.parametrize("total", [1, 2, 59, 60, 61, 100_000])
def test_a_constant_is_a_block_and_zero_is_empty(total: int) -> None:
    assert bars(chart(lambda step: 1e-3, total)) == ["#" * min(total, 60)] * 5
    zero = chart(lambda step: 0.0, total)
    assert bars(zero) == [""] * 5
    assert all(line.startswith("   0.0e+00 |") for line in zero[:-1])


def test_a_peak_of_a_single_step_is_not_lost() -> None:
    lines = chart(lambda step: 1.0 if step == 54_321 else 0.0, 100_000)
    assert bars(lines) == [" " * 32 + "#"] * 5
    assert lines[0].startswith("   1.0e+00 |")


def test_a_chart_of_a_real_schedule_rises_through_the_warm_up_and_falls() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = get_scheduler("cosine", optimizer, 23, 750)
    lines = chart(lambda step: 2e-4 * schedule.lr_lambdas[0](step), 750)
    assert lines[0].startswith("   2.0e-04 | ")  # not at the start
    assert bars(lines)[0].strip(" ").count(" ") == 0
    assert len(bars(lines)[4]) < 60  # the end is low
