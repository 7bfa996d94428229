"""Adapters that vLLM would refuse, and those that it would serve wrongly without a word: each is refused with
its own reason.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_recipes.core import adapter_folder, files, safetensors, weights
from lora_recipes.core.errors import RecipeError
from lora_recipes.model import build
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import export, rules

PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the two tiny models: the dense one, and the two-part Qwen3.5."""
    outputs = tmp_path_factory.mktemp("bases")
    for name in ("tiny_base", "tiny_qwen35_style"):
        build.random_base(resolve(recipes.load(name), outputs))
    return {
        "dense": outputs / "_bases" / "tiny_qwen3-float32",
        "hybrid": outputs / "_bases" / "tiny_qwen35-float32",
    }


def saved(base: Path, folder: Path, **config) -> Path:
    """An adapter with random A and B, written by PEFT itself."""
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, dataclasses.replace(plain, **config)).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def good(bases, tmp_path_factory) -> Path:
    return saved(bases["dense"], tmp_path_factory.mktemp("good"))


@pytest.fixture
def copy(good, tmp_path):
    """A copy of a good adapter to break."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def edit_config(folder: Path, **changes) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def edit_tensors(folder: Path, change) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({k: v for name, value in load_file(file).items() for k, v in change(name, value).items()}, file)
    return folder


def faults(folder: Path, base: Path | None = None) -> str:
    return "\n".join(map(str, export.check(adapter_folder.read(folder), base)))


def test_a_good_adapter_has_no_fault(good, bases):
    assert faults(good, bases["dense"]) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "serves no DoRA"),
        ({"bias": "all"}, "no adapter with bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "no whole modules (lm_head)"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trained token embeddings"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "OLoRA"}, "changes the base model"),
        ({"r": 16}, "says rank 16"),
        ({"rank_pattern": {"q_proj": 32}}, "says rank 32"),
        ({"target_modules": ["q_proj", "v_proj", "o_projj"]}, "target_modules names 'o_projj'"),
        ({"r": 1024}, "above 512"),
        ({"layer_replication": [[0, 2]]}, "layer replication"),
    ],
)
def test_settings_that_are_refused_or_misread_are_named(copy, changes, said):
    assert said in faults(edit_config(copy, **changes))


def test_rank_4_in_the_config_of_a_rank_8_adapter_is_seen_in_the_tensors(copy):
    assert "says rank 4 for model.layers.0.self_attn.q_proj, its lora_A has 8" in faults(
        edit_config(copy, r=4)
    )


def test_nan_in_a_tensor_is_named(copy):
    def spoil(name, value):
        return {
            name: np.where(np.arange(value.size).reshape(value.shape) == 3, np.nan, value)
            if "0.self_attn.q_proj.lora_B" in name
            else value
        }

    assert f"1 tensors hold NaN or infinity: {PREFIX}.0.self_attn.q_proj.lora_B.weight" in faults(
        edit_tensors(copy, spoil)
    )


def test_an_untrained_adapter_is_named(copy):
    assert "every lora_B is zero" in faults(
        edit_tensors(copy, lambda n, v: {n: v * 0 if "lora_B" in n else v})
    )


def test_one_untrained_module_is_named(copy):
    broken = edit_tensors(copy, lambda n, v: {n: v * 0 if "1.self_attn.v_proj.lora_B" in n else v})
    assert f"lora_B is all zero in {PREFIX}.1.self_attn.v_proj.lora_B.weight" in faults(broken)


def test_a_doubled_prefix_is_named(copy):
    broken = edit_tensors(
        copy, lambda n, v: {n.replace("base_model.model.", "base_model.model.base_model.model.", 1): v}
    )
    assert "stands twice" in faults(broken)


def test_names_of_no_module_of_the_base_are_counted(copy, bases):
    broken = edit_tensors(copy, lambda n, v: {n.replace("model.layers", "transformer.h"): v})
    assert "4 of 4 modules are not in" in faults(broken, bases["dense"])


def test_more_layers_than_the_base_has_are_counted(copy, bases):
    broken = edit_tensors(copy, lambda n, v: {n: v, n.replace("layers.1.", "layers.7."): v})
    assert "2 of 6 modules are not in" in faults(broken, bases["dense"])


def test_an_adapter_of_another_base_is_named_by_its_names_or_shapes(copy, bases):
    assert "4 of 4 modules are not in" in faults(copy, bases["hybrid"])
    wider = edit_tensors(copy, lambda n, v: {n: np.concatenate([v, v], 1) if "lora_A" in n else v})
    assert "lora_A has the shape [8, 128]" in faults(
        wider, bases["dense"]
    ) and "another base model" in faults(wider, bases["dense"])


def test_a_lost_half_is_named(copy):
    assert "A or B is missing" in faults(
        edit_tensors(copy, lambda n, v: {} if "0.self_attn.q_proj.lora_A" in n else {n: v})
    )


def test_z_without_qkv_is_named(bases, tmp_path):
    alone = saved(bases["hybrid"], tmp_path / "z", target_modules=["in_proj_z"])
    assert "in_proj_z is adapted without in_proj_qkv" in faults(alone, bases["hybrid"])
    both = saved(bases["hybrid"], tmp_path / "both", target_modules=["in_proj_z", "in_proj_qkv"])
    assert faults(both, bases["hybrid"]) == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", b'{"r": 8, "lora', "broken JSON"),
        ("adapter_config.json", b"", "broken JSON"),
        ("adapter_config.json", b'{"peft_type": "LOHA", "r": 8}', "peft_type is LOHA"),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q"]}',
            "has no r",
        ),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "r": "8", "lora_alpha": 8, "target_modules": ["q"]}',
            "r is '8'",
        ),
        ("adapter_model.safetensors", b"", "truncated, empty"),
        ("adapter_model.safetensors", b"\x08\0\0\0\0\0\0\0nonsense", "broken header"),
        ("adapter_model.safetensors", b"\x02\0\0\0\0\0\0\0{}", "holds no LoRA tensor"),
    ],
)
def test_broken_files_are_named(copy, name, content, said):
    (copy / name).write_bytes(content)
    with pytest.raises(RecipeError) as error:
        raise RecipeError(export.check(adapter_folder.read(copy), None))
    assert said in str(error.value) and name in str(error.value)


def test_a_cut_file_is_named(copy):
    file = copy / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(RecipeError, match="is truncated"):
        adapter_folder.read(copy)


def test_sharded_training_state_is_told_from_an_adapter(copy):
    (copy / "adapter_model.safetensors").rename(copy / "pytorch_model_fsdp.bin")
    with pytest.raises(RecipeError, match=r"pytorch_model_fsdp.bin: sharded or pickled"):
        adapter_folder.read(copy)


def test_no_folder_and_no_adapter_in_it_are_told_apart(tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        adapter_folder.read(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"no adapter_config\.json in it"):
        adapter_folder.read(tmp_path)


@pytest.mark.parametrize(
    ("ranks", "given", "result"), [([8], None, 8), ([4, 12], None, 16), ([8], 64, 64), ([512], None, 512)]
)
def test_the_rank_to_serve_is_that_of_the_largest_adapter(ranks, given, result):
    assert rules.rank_to_serve(ranks, given) == result


@pytest.mark.parametrize(
    ("ranks", "given", "said"),
    [
        ([32], 16, "below the adapter's rank 32\n    -> use 32"),
        ([8], 12, "not one of 1, 8, 16"),
        ([600], None, "merge the adapter"),
    ],
)
def test_a_rank_that_cannot_serve_is_refused_with_the_one_to_use(ranks, given, said):
    with pytest.raises(RecipeError) as error:
        rules.rank_to_serve(ranks, given)
    assert said in str(error.value)


def test_an_adapter_for_a_two_part_checkpoint_is_exported_under_the_names_of_that_class(bases, tmp_path):
    source = saved(
        bases["hybrid"], tmp_path / "text", target_modules=["q_proj", "in_proj_qkv", "in_proj_z", "down_proj"]
    )
    assert faults(source, bases["hybrid"]) == ""
    changed = export.export(adapter_folder.read(source), bases["hybrid"], tmp_path / "serving")
    exported = adapter_folder.read(tmp_path / "serving")
    assert changed == len(exported.modules) == 11  # 1 full-attention layer, 2 x 3 linear, 4 mlp
    assert all(f"{m}.weight" in weights.shapes(bases["hybrid"]) for m in exported.modules)
    ours, theirs = load_file(source / "adapter_model.safetensors"), load_file(exported.file)
    for name, value in ours.items():
        assert (
            theirs[name.replace("base_model.model.model.", "base_model.model.model.language_model.", 1)]
            == value
        ).all()


def test_an_adapter_for_a_text_only_checkpoint_keeps_its_names(good, bases, tmp_path):
    assert export.export(adapter_folder.read(good), bases["dense"], tmp_path / "serving") == 0
    assert (tmp_path / "serving" / "adapter_model.safetensors").stat().st_size > 0


def test_the_rules_hold_in_the_installed_vllm():
    """The constants that the rules rest on, read from vLLM's own files where it is installed."""
    found = list(files.ROOT.glob(".venv-serve/lib/python3*/site-packages/vllm/config/lora.py"))
    if not found:
        pytest.skip("no .venv-serve with vLLM here")
    assert f"MaxLoRARanks = Literal[{', '.join(map(str, rules.MAX_LORA_RANKS))}]" in found[0].read_text()
    helper = (found[0].parents[1] / "lora" / "peft_helper.py").read_text()
    assert all(f'"{init}"' in helper for init in rules.PLAIN_INITS)
    assert all(key in helper for key in rules.UNSUPPORTED if key != "trainable_token_indices")


def test_bfloat16_values_are_read_without_torch(tmp_path):
    raw = np.array([1.0, -2.5, 3.0e38], np.float32)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(
        len(header).to_bytes(8, "little") + header + (raw.view(np.uint32) >> 16).astype("<u2").tobytes()
    )
    assert np.allclose(safetensors.values(file, safetensors.header(file)["a"]), raw, rtol=0.01)


def config(architecture: str, **more) -> dict:
    return {"architectures": [architecture], **more}


@pytest.mark.parametrize(
    ("architecture", "modules", "said"),
    [
        ("FalconForCausalLM", ["query_key_value"], "FalconForCausalLM, but no LoRA on it"),
        ("StableLmForCausalLM", ["q_proj"], "StableLmForCausalLM, but no LoRA on it"),
        ("RecurrentGemmaForCausalLM", ["q_proj"], "has no class RecurrentGemmaForCausalLM"),
        ("BertForMaskedLM", ["query"], "has no class BertForMaskedLM"),
        ("Glm4ForCausalLM", ["model.layers.0.mlp.gate_up_proj"], "gate_up_proj of Glm4ForCausalLM; it takes"),
        ("Phi3ForCausalLM", ["q_proj", "o_proj"], "no adapter on q_proj of Phi3ForCausalLM"),
        ("GPTBigCodeForCausalLM", ["c_attn", "c_fc"], "no adapter on c_attn of GPTBigCodeForCausalLM"),
        ("SmolLM3ForCausalLM", ["q_proj", "lm_head"], "no adapter on lm_head of SmolLM3ForCausalLM"),
    ],
)
def test_a_class_or_module_on_which_vllm_serves_no_adapter_is_named(architecture, modules, said):
    [(found, do)] = rules.class_faults(config(architecture), modules)
    assert said in found and do


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("Phi3ForCausalLM", ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]),
        ("GPTNeoXForCausalLM", ["query_key_value", "dense", "dense_4h_to_h"]),
        ("Qwen3MoeForCausalLM", ["q_proj", "mlp.gate", "mlp.experts.0.up_proj"]),
        ("Qwen3_5ForConditionalGeneration", ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj"]),
        ("GraniteForCausalLM", ["q_proj", "lm_head", "embed_tokens"]),
    ],
)
def test_what_a_class_takes_is_let_through(architecture, modules):
    assert list(rules.class_faults(config(architecture), modules)) == []


def test_the_language_model_within_decides_where_its_config_does():
    """Of LLaVA and its like: named by `architectures` of the text_config, or by its model_type."""
    for text in {"model_type": "mistral"}, config("MistralForCausalLM"):
        two_part = config("LlavaForConditionalGeneration", text_config=text)
        assert list(rules.class_faults(two_part, ["q_proj", "down_proj"])) == []
        [(found, _)] = rules.class_faults(two_part, ["query_key_value"])
        assert "query_key_value of LlavaForConditionalGeneration" in found


def test_a_class_that_transformers_code_may_run_is_said_to_be_untried():
    helium = config("HeliumForCausalLM")
    assert list(rules.class_faults(helium, ["q_proj"])) == [] and rules.no_class(helium) is None
    [said] = rules.untried(helium)
    assert "no class HeliumForCausalLM" in said and "only the start tells" in said
    assert rules.untried(config("LlamaForCausalLM")) == []
