"""Checkpoints of several parts: their text trains, by the text model's class or by the published one, and
what stands beside it stays as it came.
"""

import json

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from lora_recipes.__main__ import main
from lora_recipes.core.errors import RecipeError
from lora_recipes.model import build, checkpoint
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import Folder, resolve
from tests.cases import families

# family: the class that trains, and what is not trained beside it
TRAINS = {
    "gemma3": ("Gemma3ForCausalLM", "vision_tower, multi_modal_projector"),
    "mistral3": ("MistralForCausalLM", "vision_tower, multi_modal_projector"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "visual"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "visual"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for bases, rows and runs."""
    return tmp_path_factory.mktemp("parts")


def recipe(place, name, base=None, **lora):
    path = place / f"{name}.yaml"
    sections = {
        "model": {"name_or_path": str(base or families.make(name, place / "bases")), "dtype": "float32"},
        "data": {"train": str(families.rows(place))},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "max_length": 128,
            "learning_rate": 1.0e-2,
            "logging_steps": 1,
            "save_strategy": "no",
        },
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def planned(path):
    return plan.make(resolve(recipes.load(str(path)), path.parent / "runs"))


def refused(path):
    with pytest.raises(RecipeError) as caught:
        planned(path)
    return str(caught.value)


@pytest.mark.parametrize("name", TRAINS)
def test_its_text_is_trained_merged_and_served_and_the_rest_stays(name, place, capsys):
    path, (kind, beside) = recipe(place, name), TRAINS[name]
    run = place / "runs" / name
    for verb, *words in (["train"], ["merge"], ["serve", "--dry-run"]):
        assert main([verb, str(path), *words, "--outputs", str(place / "runs")]) == 0, capsys.readouterr().err
    said = (run / "plan.txt").read_text()
    assert (
        f"as {kind}; {beside}: not loaded" in said or f"class {kind}; {beside}: loaded, not trained" in said
    )
    base, merged = (load_file(f / "model.safetensors") for f in (place / "bases" / name, run / "merged"))
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    changed = {n for n in base if not torch.equal(base[n], merged[n])}
    assert base.keys() == merged.keys()
    assert len(changed) == len(adapter) / 2 == 14  # q, k, v, o, gate, up, down of two layers
    assert not any("vis" in n or "multi_modal" in n for n in [*changed, *adapter])
    served = load_file(run / "serving" / "adapter_model.safetensors")
    names = {n.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for n in served}
    assert names == changed  # the names of the published class, which vLLM builds
    read = json.loads((run / "merged" / "config.json").read_text())
    assert read["architectures"] == [families.FAMILIES[name][0]]


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llava", "gemma4"])
def test_the_text_part_answers_as_the_published_class_does(name, place):
    folder = families.make(name, place / "bases")
    ids = torch.arange(5, 45)[None]
    text = checkpoint.load(Folder(folder)).eval()
    whole = checkpoint.load(Folder(folder), getattr(transformers, families.FAMILIES[name][0])).eval()
    with torch.no_grad():
        assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert type(text) is not type(whole)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("exclude", [["{tower}"], ".*{tower}.*"])
def test_excluding_a_tower_says_what_is_so_anyway(name, exclude, place):
    tower = TRAINS[name][1].split(",")[0]
    given = (
        [e.format(tower=tower) for e in exclude] if isinstance(exclude, list) else exclude.format(tower=tower)
    )
    assert (
        planned(recipe(place, name)).facts.model
        == planned(recipe(place, name, exclude_modules=given)).facts.model
    )


@pytest.mark.parametrize(
    ("name", "targets", "tower"),
    [
        ("gemma3", ".*vision_tower.*(q|v)_proj", "vision_tower"),
        ("gemma3", ".*(language_model|vision_tower).*q_proj", "vision_tower"),
        ("qwen2_5_vl", ".*visual.*qkv", "visual"),
        ("qwen2_5_vl", r"model\.(visual|language_model)\..*_proj", "visual"),
        ("qwen2_5_vl", ["q_proj", "qkv"], "visual"),
    ],
)
def test_targets_in_a_tower_are_refused_by_name(name, targets, tower, place):
    said = refused(recipe(place, name, target_modules=targets))
    assert f"{tower}: text alone is trained here" in said
    assert "lora.target_modules" in said


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_a_pattern_that_names_no_tower_means_the_text_model(name, place):
    made = planned(recipe(place, name, target_modules=r".*\.(q_proj|v_proj)"))
    (coverage,) = {tuple(c.adapted) for c in made.facts.coverage}
    assert coverage == ("self_attn.q_proj", "self_attn.v_proj")


def test_full_fine_tuning_leaves_the_towers_frozen(place):
    base = resolve(recipes.load(str(recipe(place, "qwen2_5_vl"))), place).base
    trained = {n.split(".")[1] for n, p in build.meta_model(base).named_parameters() if p.requires_grad}
    assert trained == {"language_model", "weight"}  # model.language_model, lm_head.weight
