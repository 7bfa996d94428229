"""Adapters on routed experts (lora.target_parameters): merged, and held against the stored tensors of base
and adapter, however a class stores its experts.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from lora_recipes.core import adapter_folder
from lora_recipes.core.errors import RecipeError
from lora_recipes.model import attach, build, router, stored, targets
from lora_recipes.model import merge as merging
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from tests.cases import families

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# family: an expert's tensor in its files. Mixtral's have other names than its class has, gpt-oss keeps them
# in one, and transposed, Granite calls them linear layers.
STORED = {
    "qwen3_moe": "model.layers.1.mlp.experts.2.up_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
    "granitemoe": "model.layers.1.block_sparse_moe.input_linear.weight",
}


def saved(base: Path, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora: dict[str, Any] = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], **lora)
    config.target_parameters, config.init_lora_weights = EXPERTS, False
    get_peft_model(model, config).save_pretrained(str(folder))


@pytest.fixture(scope="module", params=STORED)
def made(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """A family, its base and an adapter on q_proj and the routed experts, as PEFT saves it: random A and B,
    another rank and another alpha on one of the two."""
    folder = tmp_path_factory.mktemp(request.param)
    base = families.make(request.param, folder)
    saved(base, folder / "adapter")
    return request.param, base, folder / "adapter"


def test_experts_of_a_text_model_merge_into_the_part_of_a_larger_one(tmp_path):
    base, name = (
        families.make("qwen3_5_moe", tmp_path),
        "model.language_model.layers.1.mlp.experts.2.up_proj.weight",
    )
    saved(base, tmp_path / "adapter")
    record = merge(tmp_path / "adapter", tmp_path / "merged", base, unproven=True)
    assert record["tensors_computed"] == 5 and record["tensors_not_compared"] == []
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (base, tmp_path / "merged"))
    assert not torch.equal(before, after)


def test_a_router_that_has_another_name_in_the_files_merges_into_it(tmp_path):
    base = families.make("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "gate"])
    config.init_lora_weights = False
    get_peft_model(model, targets.resolved(model, config)).save_pretrained(str(tmp_path / "adapter"))
    record = merge(tmp_path / "adapter", tmp_path / "merged", base, unproven=True)
    assert record["tensors_computed"] == 2 * 2 and record["tensors_not_compared"] == []


def test_an_adapter_on_routed_experts_merges_into_the_tensors_of_each_expert(made, tmp_path):
    family, base, adapter = made
    record = merge(adapter, tmp_path / "merged", base, unproven=True)
    assert record["modules"] == record["tensors_computed"] == 6
    assert record["tensors_not_compared"] == [] and record["logit_max"] < 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert set(before) == set(after), "the names of its files are kept"
    assert not torch.equal(before[STORED[family]], after[STORED[family]])


@pytest.mark.parametrize("wrong", ["left as it was", "of the other experts", "half of the update"])
def test_a_stored_expert_that_is_not_base_and_adapter_is_named(made, tmp_path, wrong):
    family, base, folder = made
    adapter, name = adapter_folder.read(folder), STORED[family]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    attached = attach.attach(model, {"default": adapter})
    changes = stored.changes(attached, adapter)
    merged: Any = attached.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path)
    was, tensors = load_file(base / "model.safetensors")[name], load_file(tmp_path / "model.safetensors")
    names = list(merged.state_dict())
    assert stored.check(adapter, base, tmp_path, changes, names, {}, merged)["tensors_computed"] == 6
    delta = tensors[name] - was
    others = delta.roll(1, 0) if delta.ndim == 3 else tensors[name.replace(".2.", ".1.")] - was
    change = {"left as it was": 0 * delta, "of the other experts": others, "half of the update": delta / 2}
    save_file(tensors | {name: (was + change[wrong]).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match=rf"is not base \+ adapter: {name} is off by"):
        stored.check(adapter, base, tmp_path, changes, names, {}, merged)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_bfloat16_experts_are_rounded_once(tmp_path, monkeypatch, arithmetic):
    """Merged in float32 one parameter after the other, also where the model itself does not fit in it."""
    monkeypatch.setattr(merging, "_arithmetic", lambda *_: (arithmetic, ""))
    base = families.make("qwen3_moe", tmp_path)
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    shutil.rmtree(base)
    half.save_pretrained(base)
    families.tokenizer().save_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[], target_parameters=EXPERTS)
    config.init_lora_weights = False
    get_peft_model(half, config).save_pretrained(str(tmp_path / "adapter"))
    record = merge(tmp_path / "adapter", tmp_path / "merged", base, unproven=True)
    assert record["dtype"] == "bfloat16" and record["arithmetic"] == arithmetic
    assert record["tensors_computed"] == 4


@pytest.mark.parametrize("name", [*(["granitemoe"] if not families.OLDER else []), "mixtral", "qwen3_moe"])
def test_the_load_balancing_loss_of_the_trainer_is_the_model_s_own(tmp_path, name):
    """TRL asks the config for num_experts, which Granite's does not have."""
    model: Any = AutoModelForCausalLM.from_pretrained(families.make(name, tmp_path)).eval()
    router.name_experts(model)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5  # each class reads one of the two
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids, output_router_logits=True)
        add_fused_lm_head(model)
        trained = model(input_ids=ids, labels=ids, output_router_logits=True, fused_lm_head=True)
    assert own.aux_loss > 1 and trained.aux_loss.item() == pytest.approx(own.aux_loss.item(), rel=1e-5)
    assert trained.loss.item() == pytest.approx(own.loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {},
            "load-balancing loss x 0.001 in the trained loss (router_aux_loss_coef of the base's config",
        ),
        (
            {"router_aux_loss_coef": 0.02},
            "load-balancing loss x 0.02 in the trained loss (router_aux_loss_coef",
        ),
        ({"router_aux_loss_coef": 0.0}, "no load-balancing loss (router_aux_loss_coef of train: 0 or none)"),
    ],
)
def test_the_plan_says_whether_the_load_balancing_loss_and_the_routers_are_trained(tmp_path, train, said):
    base, rows = families.make("qwen3_moe", tmp_path), families.rows(tmp_path)
    sections: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": str(rows)},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"max_steps": 2, "learning_rate": 1e-3} | train,
    }
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(sections))
    recipe = recipes.load(str(tmp_path / "moe.yaml"))
    model = build.meta_model(resolve(recipe, tmp_path).base)
    ((label, text),) = router.lines(model, recipe)
    assert label == "router" and text.startswith(said) and text.endswith("; routers frozen")
    ((_, text),) = router.lines(model, recipe, ["model.layers.0.mlp.gate"])
    assert text.endswith("; routers trained")
