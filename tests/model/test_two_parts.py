"""Checkpoints of several parts: their text trains, by the text model's class or by the published one, and
what stands beside it stays as it came.
"""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AyaVisionConfig

from lora_recipes.__main__ import main
from lora_recipes.core.errors import RecipeError
from lora_recipes.model import build, checkpoint, parts, twin
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import Folder, resolve
from tests.cases import families
from tests.typed import there

# family: the class that trains, and what is not trained beside it
TRAINS = {
    "gemma3": ("Gemma3ForCausalLM", "vision_tower, multi_modal_projector"),
    "mistral3": ("MistralForCausalLM", "vision_tower, multi_modal_projector"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "visual"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "visual"),
}


REPLY = {"role": "assistant", "content": "A cat."}


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


def edit(folder, **fields):
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(read | fields))


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


def test_a_text_part_that_does_not_load_from_the_files_is_not_taken(place):
    name, folder = "gemma3", place / "renamed"
    shutil.copytree(families.make(name, place / "bases"), folder)
    tensors = load_file(folder / "model.safetensors")
    vision = {n: t for n, t in tensors.items() if not n.startswith("language_model")}
    text = {n.replace("language_model.model.", "model.language_model."): t for n, t in tensors.items()}
    save_file(vision | {n: t for n, t in text.items() if n not in tensors}, folder / "model.safetensors")
    assert type(checkpoint.load(Folder(folder))).__name__ == "Gemma3ForCausalLM"  # an older form of its names
    lost = text.pop("model.language_model.norm.weight")
    save_file(vision | {n: t for n, t in text.items() if n not in tensors}, folder / "model.safetensors")
    said = refused(recipe(place, "renamed", folder))
    assert "lacks 1 of the tensors of Gemma3ForConditionalGeneration" in said and lost.numel() == 32


def test_an_unknown_model_type_is_named(place):
    folder = place / "unknown"
    shutil.copytree(families.make("gemma3", place / "bases"), folder)
    edit(folder, model_type="gemma99")
    assert "names the model_type 'gemma99', which transformers" in refused(recipe(place, "unknown", folder))


def test_a_class_that_does_not_continue_text_is_refused(place):
    folder = place / "retrieval"
    shutil.copytree(families.make("gemma3", place / "bases"), folder)
    edit(folder, architectures=["Gemma3ForSequenceClassification"])
    assert "is Gemma3ForSequenceClassification: no causal" in refused(recipe(place, "retrieval", folder))


def test_names_that_a_merge_would_not_find_are_refused_by_the_plan(place):
    """Transformers 5.24 writes the text layers of a Kimi K2.5 as `blocks`, and reads them again."""
    base = resolve(recipes.load(str(recipe(place, "gemma3"))), place).base
    assert checkpoint.unnamed(base, ["model.layers.0.self_attn.q_proj"]) == []
    (problem,) = checkpoint.unnamed(base, ["model.layers.0.self_attn.q_proj", "model.blocks.0.mlp.up_proj"])
    assert "1 of the 2 adapted modules under other names: model.blocks.0.mlp.up_proj" in problem.found


def test_a_published_class_that_answers_otherwise_is_told(place):
    """Aya Vision of transformers 5.24 leaves out the logit_scale of its Cohere2."""
    config = AutoConfig.from_pretrained(families.make("mistral3", place / "bases"))
    trained = there(parts.of(config))
    assert twin.alone(trained, config) == 0.0 and twin.warnings(trained, config) == []
    text = {"model_type": "cohere2", **families.FAMILIES["cohere2"][1]}
    config = AyaVisionConfig(text_config=text, vision_config=families.FAMILIES["gemma3"][1]["vision_config"])
    assert twin.warnings(there(parts.of(config)), config)[0].startswith("transformers' AyaVisionForCond")


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}]},
                {"role": "assistant", "content": "A."},
            ]
        },
        {"prompt": "What is it?", "completion": "A cat.", "images": ["cat.png"]},
    ],
)
def test_rows_with_images_are_refused(row, place):
    path = recipe(place, "gemma3")
    (place / "images.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RecipeError, match=r"images.jsonl:1[^#]*images, audio and video are not"):
        plan.make(resolve(recipes.load(str(path), [f"data.train={place / 'images.jsonl'}"]), place))


def test_a_class_whose_loss_trl_cannot_take_is_refused_by_the_plan(place):
    """Llama4ForCausalLM looks for its backbone under `language_model`, which it has not."""
    assert "TRL's loss" in refused(recipe(place, "llama4", target_modules=["q_proj"]))
