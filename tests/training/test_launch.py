"""Several processes: real ones on the CPU, talking by gloo, started as a person starts them."""

import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_recipes.core import files
from lora_recipes.core.checkpoints import fault
from lora_recipes.core.errors import RecipeError
from lora_recipes.planning import plan, processes
from lora_recipes.planning.processes import Sizes
from lora_recipes.recipe import layout
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.layout import Layout
from lora_recipes.training import launch
from lora_recipes.training.train import train
from tests.process import Forked, run, together
from tests.typed import there

SCRIPT = str(files.ROOT / "scripts" / "train.py")
TWO = ["--accelerate", "ddp", "--processes", "2"]


def record(outputs: Path, name: str) -> dict:
    return json.loads((outputs / name / "run.json").read_text())


def adapter(outputs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(outputs / name / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A recipe without dropout on a random tiny model, and the outputs of two processes that trained it, with
    one lock on the run between them.
    """
    folder = tmp_path_factory.mktemp("pair")
    sections = yaml.safe_load(recipes.load("tiny_facts").to_yaml())
    sections["model"] = yaml.safe_load(recipes.load("tiny_base").to_yaml())["model"]
    sections["lora"] |= {
        "lora_dropout": 0.0
    }  # two processes draw the same masks, one draws another for each batch
    sections["train"] |= {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "eval_strategy": "no",
    }
    sections["train"] |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(sections))
    done = run("train", str(path), "--outputs", str(folder / "two"), *TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    return path, folder / "two", done


def test_two_processes_train_bit_for_bit_what_one_trains_with_the_same_examples_a_step(pair, tmp_path):
    """Gradient sums of two are the same in both orders; of more processes, or with accumulation in each, they
    need not be.
    """
    path, two, _ = pair
    train(resolve(recipes.load(str(path), ["train.gradient_accumulation_steps=2"]), tmp_path))
    one, other = adapter(tmp_path, "pair"), adapter(two, "pair")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_first_process_prints_and_writes(pair):
    _, two, done = pair
    assert (
        done.stdout.count("training into") == 1
        and done.stdout.count("2 x 1 x 2 devices = 4 examples a step") == 1
    )
    assert done.stdout.count("step 4/4") == 1
    logged = [json.loads(line) for line in (two / "pair" / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logged if "loss" in log] == [1, 2, 3, 4]
    written = record(two, "pair")
    assert written["status"] == "finished" and written["plan"]["layout"] == {"kind": "DDP", "processes": 2}
    assert written["hardware"]["processes"] == 2


def test_a_run_of_two_processes_resumes_bit_for_bit_and_not_with_another_number(pair, tmp_path):
    path, two, _ = pair
    shutil.copytree(two, tmp_path / "two")
    folder = tmp_path / "two" / "pair"
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    shutil.rmtree(folder / "adapter")
    (folder / "run.json").write_text(
        (folder / "run.json").read_text().replace('"status": "finished"', '"status": "failed"')
    )
    with pytest.raises(
        RecipeError, match="layout: the run began with DDP, 2 processes, now it is one process"
    ):
        train(resolve(recipes.load(str(path)), tmp_path / "two"), resume=True)
    done = together(2, "train", str(path), "--outputs", str(tmp_path / "two"), "--resume")
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:]
    assert "from checkpoint-2" in done[0].stdout and not done[1].stdout
    one, other = adapter(two, "pair"), adapter(tmp_path / "two", "pair")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_process_that_dies_ends_the_run_with_its_name_and_signal(pair, tmp_path):
    path, _, _ = pair
    words = ("train", str(path), "train.max_steps=2000", "--outputs", str(tmp_path), *TWO)
    launcher, deadline, victim = Forked(words, tmp_path), time.monotonic() + 600, None
    try:
        while victim is None and time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.2)
            if (tmp_path / "pair" / "checkpoints" / "checkpoint-2" / "SHA256SUMS").is_file():
                victim = next(
                    c for c in psutil.Process(launcher.pid).children() if c.environ().get("RANK") == "1"
                )
        assert victim is not None, "the run did not begin"
        victim.send_signal(signal.SIGKILL)
        done = launcher.completed(600)
    finally:
        launcher.kill()
    assert done.returncode == 2
    assert "process 1 of 2 was ended by signal 9 (SIGKILL)" in done.stderr and "RESUME=1" in done.stderr
    assert record(tmp_path, "pair")["status"] == "failed"
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ], "none is left"


# what was asked is what runs


def test_one_process_in_place_of_two_is_an_error(pair, tmp_path):
    path, _, _ = pair
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        SCRIPT,
        str(path),
    ]
    done = subprocess.run(
        [*words, "--outputs", str(tmp_path)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode != 0
    assert "--num_processes 2: asks for DDP, 2 processes; what runs is one process" in done.stderr
    assert not (tmp_path / "pair").exists()


def test_fsdp_that_would_become_plain_ddp_is_refused_by_the_launcher_and_in_the_process(
    pair, tmp_path, monkeypatch
):
    if torch.cuda.is_available():
        pytest.skip("FSDP2 runs where GPUs are")
    path, _, _ = pair
    recipe, words = recipes.load(str(path)), launch.words("fsdp2", 2)
    monkeypatch.setenv(launch.ASKED, "")  # set by start; taken back after the test
    with pytest.raises(RecipeError, match="would run plain DDP instead"):
        launch.start(words, ["train", str(path)], resolve(recipe, tmp_path))
    monkeypatch.setenv(launch.ASKED, shlex.join([*launch.words("fsdp2", 1), SCRIPT]))
    with pytest.raises(RecipeError, match="asks for FSDP2, 1 processes; what runs is one process"):
        train(resolve(recipe, tmp_path))


def test_a_mistake_that_all_processes_make_is_said_once_and_without_a_traceback(pair, tmp_path):
    path, _, _ = pair
    done = run("train", str(path), "lora.target_modules=[q_projj]", "--outputs", str(tmp_path), *TWO)
    assert (
        done.returncode == 2
        and done.stderr.count("did you mean q_proj?") == 1
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["single"], Layout()),
        (["ddp", 4], Layout("DDP", 4)),
        (["fsdp2", 4], Layout("FSDP2", 4)),
        (["zero2", 4], Layout("ZeRO-2", 4)),
        (["zero3", 4], Layout("ZeRO-3", 4)),
        (["multi_node", None], Layout("DDP", 8)),
    ],
)
def test_each_shipped_file_asks_for_what_its_name_says(words, wanted):
    name, processes = (*words, None)[:2]
    assert launch.wanted([*launch.words(name, processes), "train.py"]) == wanted


def test_every_file_of_configs_accelerate_is_tested_above():
    assert {p.stem for p in launch.FILES.glob("*.yaml")} == {
        "single",
        "ddp",
        "fsdp2",
        "zero2",
        "zero3",
        "multi_node",
    }


def test_a_name_that_is_no_file_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean fsdp2"):
        launch.words("fsdp", 2)


def test_without_a_gpu_the_number_of_processes_must_be_said():
    if torch.cuda.is_available():
        pytest.skip("one process a GPU")
    with pytest.raises(RecipeError, match="PROCESSES=2 starts two on the CPU"):
        launch.words("ddp", None)


# the plan


PARTS = {
    "base": 8000,
    "adapter": 400,
    "gradients": 400,
    "optimiser": 800,
    "activations": 5000,
    "workspace": 10,
}
SIZES = Sizes(trainable=100, largest=500, ends=1000, width=2, trained=4)


def test_ddp_holds_everything_and_a_copy_of_the_gradients():
    parts, _ = processes.per_device(Layout("DDP", 4), PARTS, SIZES)
    assert parts == PARTS | {"buckets": 400}


def test_zero2_divides_gradients_and_optimiser_state():
    parts, said = processes.per_device(Layout("ZeRO-2", 4), PARTS, SIZES)
    assert parts == PARTS | {"gradients": 100, "optimiser": (800 + 400) // 4, "buckets": processes.BUCKET * 4}
    assert "float32 masters" in " ".join(said)


def test_zero3_divides_the_base_too_and_gathers_a_layer():
    parts, _ = processes.per_device(Layout("ZeRO-3", 4), PARTS, SIZES)
    assert parts["base"] == 2000 and parts["gathered"] == (500 + 1000) * 2 and parts["adapter"] == 400


def test_fsdp2_divides_the_adapter_too():
    parts, _ = processes.per_device(Layout("FSDP2", 4), PARTS, SIZES)
    assert (parts["base"], parts["adapter"], parts["gradients"], parts["optimiser"]) == (2000, 100, 100, 200)
    assert parts["gathered"] == (2 * 500 + 1000) * 2 and "buckets" not in parts


@pytest.mark.parametrize("stage", [2, 3])
def test_the_arithmetic_has_the_numbers_of_deepspeeds_files(stage):
    zero = json.loads((launch.FILES / f"zero{stage}.json").read_text())["zero_optimization"]
    assert (
        zero["stage"] == stage and zero["reduce_bucket_size"] == processes.BUCKET and not zero["overlap_comm"]
    )
    if stage == 3:
        assert (
            zero["stage3_param_persistence_threshold"] == processes.PERSISTENT
            and zero["stage3_max_live_parameters"] == 0
        )


def test_the_plan_says_what_each_device_holds(pair, tmp_path):
    recipe = recipes.load(str(pair[0]))
    made = plan.make(resolve(recipe, tmp_path), Layout("ZeRO-3", 8))
    alone = plan.add_memory(plan.make(resolve(recipe, tmp_path)), resolve(recipe, tmp_path))
    found = plan.add_memory(made, resolve(recipe, tmp_path))
    assert there(made.facts.steps).examples == 16 and found.parts["base"] == alone.parts["base"] // 8
    assert "ZeRO-3, 8 processes" in made.text()
    assert there(made.facts.memory).parts["buckets"] == processes.BUCKET * 4


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("ZeRO-3", "model.quantize=nf4", "cut the packed 4-bit weights apart"),
        ("FSDP2", "model.quantize=nf4", "leaves 4-bit weights of integer storage whole"),
        ("ZeRO-2", "model.quantize=nf4", "not shown"),
        ("FSDP2", "lora.init_lora_weights=eva", "not shown"),
        ("ZeRO-3", "lora.use_dora=true", "not shown"),
        ("ZeRO-2", "model.dtype=bfloat16", "DeepSpeed trains the adapter in the base's bfloat16"),
        ("DDP", "lora.init_lora_weights=loftq", "not shown"),
        ("FSDP1", "lora.r=4", "was not shown to work"),
        ("one process", "train.fsdp=full_shard", "where to train is no part of a recipe"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_plan(tmp_path, kind, change, said):
    with pytest.raises(RecipeError, match=said):
        plan.make(
            resolve(recipes.load("tiny_qwen35_style", [change]), tmp_path),
            Layout(kind, 1 if kind == layout.ONE else 2),
        )


@pytest.mark.parametrize("change", ["model.device_map=auto", "train.model_init_kwargs={device_map: auto}"])
def test_a_device_map_is_no_part_of_a_recipe(change):
    """It would spread one process over all devices, where each layout here has one process a device."""
    with pytest.raises(RecipeError, match=r"unknown key|cannot be set in a recipe"):
        recipes.load("tiny_qwen35_style", [change])


# DeepSpeed, where it is installed


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_saves_the_whole_adapter_that_ddp_saves(pair, tmp_path, name):
    """Not bit for bit: it adds gradients up in another order. Largest difference of an entry measured: see
    docs/scaling.md.
    """
    path, two, _ = pair
    done = run("train", str(path), "--outputs", str(tmp_path), "--accelerate", name, "--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = adapter(tmp_path, "pair"), adapter(two, "pair")
    assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=2e-4) for key in one)
    assert fault(tmp_path / "pair" / "checkpoints" / "checkpoint-4", ranks=2) is None
    assert fault(tmp_path / "pair" / "checkpoints" / "checkpoint-4", ranks=3) is not None


@needs_deepspeed
def test_an_adapter_that_zero3_divides_is_saved_whole(pair, tmp_path):
    """With a threshold of 0 A and B themselves are divided."""
    path, two, _ = pair
    settings = json.loads((launch.FILES / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "all.json").write_text(json.dumps(settings))
    file = tmp_path / "all.yaml"
    file.write_text(
        (launch.FILES / "zero3.yaml")
        .read_text()
        .replace("configs/accelerate/zero3.json", str(tmp_path / "all.json"))
    )
    done = run("train", str(path), "--outputs", str(tmp_path), "--accelerate", str(file), "--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = adapter(tmp_path, "pair"), adapter(two, "pair")
    assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=2e-4) for key in one)
