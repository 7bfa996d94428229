"""What stands in no recipe and changes numbers is refused: by its file and line, option or variable, and by
what the trainer really has.
"""

import json
import shlex
from typing import Any

import pytest
import torch

from lora_recipes.core.errors import RecipeError
from lora_recipes.data import gate
from lora_recipes.model import build
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.layout import SINGLE, Layout
from lora_recipes.training import launch, outside
from lora_recipes.training.train import train

MINE = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: false
"""


@pytest.fixture
def float32(write_recipe):
    """A recipe that says float32, with the defaults of everything else."""

    def load(**changes):
        return recipes.load(str(write_recipe("tiny_base", name="plain", **changes)))

    return load


def refusals(recipe, words=None, environment=True):
    with pytest.raises(RecipeError) as caught:
        launch.contradicts(recipe, words and [*words, "--module", "lora_recipes"], environment)
    return [str(problem) for problem in caught.value.problems]


VARIABLES = [
    ("ACCELERATE_MIXED_PRECISION", "bf16", "the plan says no"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", "the plan says no"),
    ("ACCELERATE_DOWNCAST_BF16", "yes", "the plan says false"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "the plan says no"),
    ("ACCELERATE_DYNAMO_MODE", "max-autotune", "the plan says default"),
    ("ACCELERATE_DYNAMO_USE_DYNAMIC", "true", "the plan says false"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "the plan says 1"),
    ("ACCELERATE_GRADIENT_CLIPPING", "0.3", "the plan says 1.0"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "the plan says false"),
    ("ACCELERATE_USE_FSDP", "1", "the plan says false"),
    ("ACCELERATE_USE_MEGATRON_LM", "true", "the plan says false"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "the plan says false"),
    ("NVIDIA_TF32_OVERRIDE", "1", "the plan says false"),
    ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "the plan says false"),
    ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "the plan says strict"),
    ("XLA_USE_BF16", "1", "the plan says false"),
]


@pytest.mark.parametrize(("variable", "value", "planned"), VARIABLES)
def test_a_variable_that_changes_numbers_is_named_with_its_value(
    variable, value, planned, float32, monkeypatch
):
    monkeypatch.setenv(variable, value)
    (said,) = refusals(float32(train__gradient_accumulation_steps=...))
    assert said.startswith(f"the environment: {variable}={value}: ") and planned in said


@pytest.mark.parametrize(
    ("variable", "value", "change"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"train__bf16": True}),
        ("ACCELERATE_MIXED_PRECISION", "no", {"train__bf16": True}),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", {"train__torch_compile": True}),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {"train__gradient_accumulation_steps": 4}),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.50", {"train__max_grad_norm": 0.5}),
        ("NVIDIA_TF32_OVERRIDE", "0", {}),
        ("TORCH_COMPILE_DISABLE", "1", {}),
        ("ACCELERATE_USE_CPU", "False", {}),
    ],
)
def test_a_variable_that_says_what_the_recipe_says_is_none_of_our_business(
    variable, value, change, float32, monkeypatch
):
    monkeypatch.setenv(variable, value)
    launch.contradicts(float32(**change), None)


def test_a_variable_stops_training_before_anything_is_made(float32, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match=r"ACCELERATE_MIXED_PRECISION=bf16: .*plain.yaml:\d+ model.dtype"):
        train(resolve(float32(), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_users_file_is_refused_at_its_line_by_launch_plan_and_process(float32, tmp_path, monkeypatch):
    mine = tmp_path / "my_accelerate.yaml"
    mine.write_text(MINE)
    recipe, words = float32(), launch.words(str(mine), None)
    for said in (refusals(recipe, words), refusals(recipe, words, environment=False)):
        assert len(said) == 1 and "my_accelerate.yaml:3 mixed_precision: " in said[0]
    monkeypatch.setenv(launch.ASKED, "")
    with pytest.raises(RecipeError, match=r"my_accelerate.yaml:3 mixed_precision"):
        launch.start(words, ["train", "x"], resolve(recipe, tmp_path))
    monkeypatch.setenv(launch.ASKED, shlex.join([*words, "train.py"]))
    with pytest.raises(RecipeError, match=r"my_accelerate.yaml:3 mixed_precision"):
        train(resolve(recipe, tmp_path / "out"))
    launch.contradicts(float32(model__dtype="bfloat16"), [*words, "train.py"])


def test_the_file_that_accelerate_finds_by_itself_counts_too(float32, tmp_path, monkeypatch):
    mine = tmp_path / "default_config.yaml"
    mine.write_text(MINE)
    import accelerate.commands.config.config_args as theirs
    import accelerate.commands.launch as launcher

    for module in theirs, launcher, outside:
        monkeypatch.setattr(module, "default_config_file", str(mine))
    monkeypatch.setattr(theirs, "default_yaml_config_file", str(mine))
    assert "default_config.yaml:3 mixed_precision: " in refusals(float32(), ["--num_processes", "2"])[0]


OPTIONS = [
    (["--mixed_precision", "fp16"], "accelerate launch --mixed_precision: "),
    (["--mixed_precision=bf16"], "accelerate launch --mixed_precision: "),
    (["--dynamo_backend", "inductor"], "accelerate launch --dynamo_backend: "),
    (["--gradient_accumulation_steps", "7"], "accelerate launch --gradient_accumulation_steps: "),
    (
        ["--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "SHARDED_STATE_DICT"],
        "FULL_STATE_DICT",
    ),
]


@pytest.mark.parametrize(("options", "named"), OPTIONS)
def test_an_option_of_the_launcher_is_named(options, named, float32):
    words = [*launch.words("single", 1), *options]
    assert any(named in said for said in refusals(float32(), words))


@pytest.mark.parametrize(
    "line",
    [
        "fsdp_ignored_modules: lora_A",
        "fsdp_activation_checkpointing: true",
        "fsdp_cpu_ram_efficient_loading: true",
        "fsdp_state_dict_type: SHARDED_STATE_DICT",
    ],
)
def test_a_line_of_fsdps_own_is_named(line, float32, tmp_path):
    key = line.split(":")[0]
    lines = (launch.FILES / "fsdp2.yaml").read_text().splitlines()
    (tmp_path / "mine.yaml").write_text("\n".join(["#", *(x for x in lines if key not in x), f"  {line}"]))
    words = launch.words(str(tmp_path / "mine.yaml"), 2)
    assert any(f"fsdp_config.{key}: {key} is " in said for said in refusals(float32(), words))


def test_an_option_that_accelerate_does_not_know_is_said_without_its_two_hundred_lines(float32):
    (said,) = refusals(float32(), ["--mixed_precisionn", "no"])
    assert said.endswith("accelerate refuses it: unrecognized arguments: --mixed_precisionn")


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3", "multi_node"])
def test_the_shipped_files_leave_everything_to_the_recipe(name, float32):
    for recipe in (float32(), float32(model__dtype="bfloat16", train__max_grad_norm=0.3)):
        launch.contradicts(recipe, [*launch.words(name, 4), "train.py"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gradient_clipping": 0.3}, "gradient_clipping: 0.3; the plan says 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: True; the plan says False"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, "optimizer: changes what is trained"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: changes what is trained"),
        ({"communication_data_type": "fp16"}, "communication_data_type: changes"),
        ({"train_micro_batch_size_per_gpu": 99}, "train_micro_batch_size_per_gpu: 99; the plan says"),
    ],
)
def test_deepspeeds_own_file_is_held_against_the_recipe_line_by_line(change, named, float32, tmp_path):
    settings = json.loads((launch.FILES / "zero2.json").read_text()) | change
    (tmp_path / "mine.json").write_text(json.dumps(settings, indent=1))
    text = (launch.FILES / "zero2.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("configs/accelerate/zero2.json", "mine.json"))
    (said,) = refusals(float32(), launch.words(str(tmp_path / "mine.yaml"), 2))
    assert "mine.json:" in said and named in said
    launch.contradicts(float32(), [*launch.words("zero2", 2), "train.py"])


# what the trainer really has


@pytest.fixture
def trainer(case, tmp_path):
    """A real trainer of a tiny recipe that says float32, and that recipe."""

    def make(**changes):
        recipe = recipes.load(str(case("qwen_base_eos", **changes)))
        resolved = resolve(recipe, tmp_path / "out")
        rows = gate.pass_through(resolved, network=False)
        arguments, base = build.sft_config(recipe, resolved.folder), build.model(resolved)
        made, _ = build.trainer(resolved, arguments, base, rows.tokenizer, rows.train, None, [], 1)
        return made, recipe

    return make


def found(made, recipe, plan=SINGLE):
    try:
        launch.check(None, made, recipe, plan)
    except RecipeError as error:
        return str(error)
    return ""


def test_a_trainer_as_planned_passes_in_float32_and_in_bfloat16(trainer):
    assert found(*trainer()) == ""
    assert found(*trainer(model__dtype="bfloat16", train__max_grad_norm=0.3)) == ""


def test_what_the_early_answer_did_not_see_is_seen_in_the_trainer(trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    said = found(*trainer())
    assert "mixed_precision is bf16 in the trainer; the plan says no" in said
    assert "the trainer multiplies in bfloat16; the plan says float32" in said
    assert "dynamo_backend is AOT_EAGER in the trainer" in said
    assert "ACCELERATE_MIXED_PRECISION" in said.split("-> look at")[1]


def test_a_number_that_changed_on_the_way_to_the_trainer_is_seen(trainer):
    made, recipe = trainer(train__max_grad_norm=0.5, train__seed=3)
    made.args.max_grad_norm, made.args.seed = 1.0, 4
    said = found(made, recipe)
    assert "max_grad_norm is 1.0 in the trainer; the plan says 0.5" in said
    assert "seed is 4 in the trainer; the plan says 3" in said


def test_fewer_bits_in_a_product_are_seen_whatever_set_them(trainer):
    made, recipe = trainer()
    products: Any = torch.backends.mkldnn
    was = products.matmul.fp32_precision
    try:
        products.matmul.fp32_precision = "bf16"
        numbers = torch.full((256, 256), 1 + 2**-12)
        if (numbers @ torch.eye(256) == numbers).all():
            pytest.skip("this processor multiplies float32 in full, whatever is asked")
        assert "float32 is multiplied with fewer bits here" in found(made, recipe)
    finally:
        products.matmul.fp32_precision = was
    assert found(made, recipe) == ""


def test_another_layout_than_the_planned_one_is_seen_without_a_launcher(trainer):
    made, recipe = trainer()
    assert "DDP, 2 processes was planned; what runs is one process" in found(made, recipe, Layout("DDP", 2))
