"""Contracts against what transformers builds, and both against figures from elsewhere: published totals, and
arithmetic by hand.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_recipes.core import yamlfile
from lora_recipes.core.errors import RecipeError
from lora_recipes.recipe import contract
from lora_recipes.recipe.contract import Contract
from tests.typed import there

# name: hidden, intermediate, layers, heads, KV heads, head dim, vocab, tied, biases on q/k/v, norms on q/k,
# total. Figures: the models' published config.json. Totals: the hub's safetensors index of each (those whose
# names do not begin with tiny; Llama-2's files also hold 64 x layers of rotation); hidden 896, head dim 64,
# vocab 151,936 of Qwen2.5-Coder-0.5B also in SOURCES.md S2; SmolLM2-135M: the header of its GGUF file.
# tiny_qwen3 and its German twin are ours: their total was added up on paper,
# 192 x 64 + 2 x (4 x 64 x 64 + 3 x 64 x 128 + 2 x 64 + 2 x 32) + 64.
DENSE = {
    "llama2_7b": (4096, 11008, 32, 32, 32, 128, 32000, False, False, False, 6_738_415_616),
    "llama2_13b": (5120, 13824, 40, 40, 40, 128, 32000, False, False, False, 13_015_864_320),
    "llama31_8b": (4096, 14336, 32, 32, 8, 128, 128256, False, False, False, 8_030_261_248),
    "llama33_70b": (8192, 28672, 80, 64, 8, 128, 128256, False, False, False, 70_553_706_496),
    "llama32_3b": (3072, 8192, 28, 24, 8, 128, 128256, True, False, False, 3_212_749_824),
    "qwen25_coder_05b": (896, 4864, 24, 14, 2, 64, 151936, True, True, False, 494_032_768),
    "qwen25_coder_7b": (3584, 18944, 28, 28, 4, 128, 152064, False, True, False, 7_615_616_512),
    "mistral_7b": (4096, 14336, 32, 32, 8, 128, 32768, False, False, False, 7_248_023_552),
    "mistral_small_24b": (5120, 32768, 40, 32, 8, 128, 131072, False, False, False, 23_572_403_200),
    "qwen25_7b": (3584, 18944, 28, 28, 4, 128, 152064, False, True, False, 7_615_616_512),
    "qwen3_06b": (1024, 3072, 28, 16, 8, 128, 151936, True, False, True, 596_049_920),
    "qwen3_17b": (2048, 6144, 28, 16, 8, 128, 151936, True, False, True, 1_720_574_976),
    "qwen3_14b": (5120, 17408, 40, 40, 8, 128, 151936, False, False, True, 14_768_307_200),
    "qwen3_32b": (5120, 25600, 64, 64, 8, 128, 151936, False, False, True, 32_762_123_264),
    "smollm3_3b": (2048, 11008, 36, 16, 4, 128, 128256, True, False, False, 3_075_098_624),
    "qwen3_4b": (2560, 9728, 36, 32, 8, 128, 151936, True, False, True, 4_022_468_096),
    "qwen3_8b": (4096, 12288, 36, 32, 8, 128, 151936, False, False, True, 8_190_735_360),
    "smollm2_135m": (576, 1536, 30, 9, 3, 64, 49152, True, False, False, 134_515_008),
    "tiny_qwen3": (64, 128, 2, 2, 2, 32, 192, True, False, True, 94_656),
    "tiny_qwen3_de": (64, 128, 2, 2, 2, 32, 192, True, False, True, 94_656),
    "tiny_commands": (64, 128, 2, 2, 2, 32, 1024, True, False, True, 147_904),
}
# name: hidden, intermediate, layers (every fourth full), heads, KV heads, head dim, linear key heads and
# their dim, linear value heads and their dim, convolution width, vocab, tied, total. The 4B's total:
# SOURCES.md S1. The 9B's hidden size, heads, head dim and vocab: S2; its total by the closed form below only.
# tiny_qwen35 is ours.
HYBRID = {
    "qwen35_4b": (2560, 9216, 32, 16, 4, 256, 16, 128, 32, 128, 4, 248320, True, 4_205_751_296),
    "qwen35_9b": (4096, 12288, 32, 16, 4, 256, 16, 128, 32, 128, 4, 248320, False, 8_953_803_264),
    "tiny_qwen35": (128, 256, 4, 4, 2, 32, 1, 128, 2, 128, 4, 2048, True, 1_123_404),
}


def added(
    h: int,
    i: int,
    layers: int,
    heads: int,
    kv: int,
    d: int,
    vocab: int,
    tied: bool,
    more: int = 0,
    norms: int = 2,
) -> int:
    """The parameters of a decoder by hand: q, k, v and o, a gated MLP of width `i`, `norms` vectors of the
    hidden size in a layer, `more` parameters in it beside these, and one norm at the end.
    """
    layer = 2 * h * heads * d + 2 * h * kv * d + 3 * h * i + norms * h + more
    return vocab * h * (1 if tied else 2) + layers * layer + h


# name: hidden, MLP width (0: experts instead), layers, heads, KV heads, head dim, vocab, tied, what else a
# layer has, norms in a layer; total. Figures: the published config.json. Totals: the hub's safetensors index;
# Gemma 3's is that of the whole model, WHOLE below, less its other parts.
FAMILIES = {
    # q, k and v are rows of one tensor, gate and up of another: the same count.
    "phi4": ((5120, 17920, 40, 40, 10, 128, 100352, False, 0, 2), 14_659_507_200),
    "phi4_mini": ((3072, 8192, 32, 24, 8, 128, 200064, True, 0, 2), 3_836_021_760),
    # Norms before and behind both parts; Gemma 3 has one over each head's q and k too.
    "gemma2_9b": ((3584, 14336, 42, 16, 8, 256, 256000, True, 0, 4), 9_241_705_984),
    "gemma3_4b": ((2560, 10240, 34, 8, 4, 256, 262208, True, 2 * 256, 4), 3_880_263_168),
    "gemma3_27b": ((5376, 21504, 62, 32, 16, 128, 262208, True, 2 * 128, 4), 27_009_346_304),
    # Norms over the whole of q and of k.
    "olmo3_7b": ((4096, 11008, 32, 32, 32, 128, 100278, False, 2 * 4096, 2), 7_298_011_136),
    # Biases on q, k and v; four norms.
    "glm4_9b": ((4096, 13696, 40, 32, 2, 128, 151552, False, (32 + 2 * 2) * 128, 4), 9_400_279_040),
    "granite4_micro": ((2560, 8192, 40, 40, 8, 64, 100352, True, 0, 2), 3_402_836_480),
    # 128 experts of width 768, a router, norms over each head's q and k.
    "qwen3_30b_a3b": (
        (2048, 0, 48, 32, 4, 128, 151936, False, 128 * (3 * 2048 * 768 + 2048) + 2 * 128, 2),
        30_532_122_624,
    ),
    # 32 experts of width 2880 with a bias on each of their three projections, a router with one; biases on
    # q, k, v and o; a sink for each head.
    "gpt_oss_20b": (
        (
            *(2880, 0, 24, 64, 8, 64, 201088, False),
            32 * (3 * 2880 * 2880 + 3 * 2880 + 2880 + 1) + (64 + 2 * 8) * 64 + 2880 + 64,
            2,
        ),
        20_914_757_184,
    ),
}
# The published total of the whole model: with SigLIP's tower (27 layers of width 1152, 4304 in the MLP,
# biases everywhere, 4096 positions, patches of 14 x 14 x 3) and the projector with its norm.
SIGLIP = (
    (3 * 14 * 14 + 1 + 4096) * 1152
    + 27 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
    + 2 * 1152
)
WHOLE = {"gemma3_4b": 4_300_079_472, "gemma3_27b": 27_432_406_640}
NAMES = sorted(DENSE | HYBRID | FAMILIES)
# Names in a config that decide no tensor's shape, and the width of an MLP that Qwen3-30B-A3B has in no layer.
SHAPELESS = {
    *(
        "max_position_embeddings",
        "initializer_range",
        "sliding_window",
        "num_experts_per_tok",
        "norm_topk_prob",
    ),
    *("query_pre_attn_scalar",),
}
# The biases of the layers' modules; the others have none.
QKV = {f"self_attn.{p}_proj.bias" for p in "qkv"}
BIASED = {
    **dict.fromkeys(("qwen25_7b", "qwen25_coder_05b", "qwen25_coder_7b", "glm4_9b"), QKV),
    "gpt_oss_20b": QKV | {"self_attn.o_proj.bias", "mlp.router.bias"},
}


@cache
def model(name: str) -> PreTrainedModel:
    return built(contract.load(name).config)


def built(config: dict[str, Any]) -> PreTrainedModel:
    """The text model of a contract's `config` on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config).get_text_config())


def shapes(of: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in of.named_parameters()}


# One contract of each config class: what holds for the class is tried once.
KINDS = sorted(
    {contract.load(name).text_config.get("model_type", "qwen3_5"): name for name in reversed(NAMES)}.values()
)


def copied(name: str, folder: Path, change: Any) -> Contract:
    """The contract `name` as read from a changed copy of its file."""
    content, _ = yamlfile.load(contract.CONTRACTS / f"{name}.yaml")
    change(content)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return contract.read(path)


def test_every_contract_has_independent_figures_here() -> None:
    assert set(contract.names()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_builds_what_the_contract_says(name: str) -> None:
    assert contract.load(name).departures(shapes(model(name))) == []


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_total_is_the_published_one_and_the_closed_form(name: str) -> None:
    h, i, layers, heads, kv, d, vocab, tied, bias, norms, total = DENSE[name]
    closed = added(h, i, layers, heads, kv, d, vocab, tied, bias * (heads + 2 * kv) * d + norms * 2 * d)
    assert (closed, contract.load(name).parameters, model(name).num_parameters()) == (total, total, total)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_total_of_another_kind_is_the_published_one_and_the_closed_form(name: str) -> None:
    figures, total = FAMILIES[name]
    found = (added(*figures), contract.load(name).parameters, model(name).num_parameters())
    assert found == (total, total, total)
    if name in WHOLE:
        assert WHOLE[name] == total + SIGLIP + 1152 * figures[0] + 1152


@pytest.mark.parametrize("name", HYBRID)
def test_a_hybrid_total_is_the_known_one_and_the_closed_form(name: str) -> None:
    h, i, layers, heads, kv, d, key_heads, key_dim, value_heads, value_dim, width, vocab, tied, total = (
        HYBRID[name]
    )
    keys, values = key_heads * key_dim, value_heads * value_dim
    # q is twice as wide as its heads: the other half is the output gate. q and k have a norm over the head
    # dim each.
    full = h * 2 * heads * d + 2 * h * kv * d + heads * d * h + 2 * d
    # q, k and v in one projection under one convolution; z (the gate), a and b (decay and step, one number a
    # head each, decay with two vectors of its own), one norm over a value head, the projection out.
    linear = (
        h * (2 * keys + values)
        + (2 * keys + values) * width
        + h * values
        + 2 * h * value_heads
        + 2 * value_heads
        + value_dim
        + values * h
    )
    closed = (
        vocab * h * (1 if tied else 2) + layers // 4 * (full + 3 * linear) + layers * (3 * h * i + 2 * h) + h
    )
    assert (closed, contract.load(name).parameters, model(name).num_parameters()) == (total, total, total)


@pytest.mark.parametrize("name", NAMES)
def test_the_built_config_has_the_published_dimensions(name: str) -> None:
    config, parameters = model(name).config, shapes(model(name))
    if name not in HYBRID:
        h, i, layers, heads, kv, d, vocab, tied = (DENSE.get(name) or FAMILIES[name][0])[:8]
        q = heads * d
    else:
        h, i, layers, heads, kv, d = HYBRID[name][:6]
        vocab, tied = HYBRID[name][-3:-1]
        q = 2 * heads * d
    assert (config.hidden_size, config.num_hidden_layers) == (h, layers)
    width = getattr(config, "shared_intermediate_size", config.intermediate_size)
    assert width == i or i == 0
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, kv)
    assert (config.vocab_size, config.tie_word_embeddings, "lm_head.weight" in parameters) == (
        vocab,
        tied,
        not tied,
    )
    of = {
        n.split(".")[-2]: shape
        for n, shape in parameters.items()
        if ".self_attn." in n and n.endswith(".weight")
    }
    if "qkv_proj" in of:
        assert (of["qkv_proj"], of["o_proj"]) == ((q + 2 * kv * d, h), (h, heads * d))
        return
    assert (of["q_proj"], of["k_proj"], of["v_proj"], of["o_proj"]) == (
        (q, h),
        (kv * d, h),
        (kv * d, h),
        (h, heads * d),
    )


def test_every_fourth_layer_of_the_hybrids_has_attention_and_the_others_do_not() -> None:
    for name in HYBRID:
        attention = {int(n.split(".")[2]) for n in shapes(model(name)) if ".self_attn.q_proj" in n}
        linear = {int(n.split(".")[2]) for n in shapes(model(name)) if ".linear_attn.in_proj_qkv" in n}
        everything = set(range(HYBRID[name][2]))
        assert attention == {i for i in everything if i % 4 == 3}
        assert linear == everything - attention


def test_the_query_projection_of_the_9b_is_twice_as_wide_as_another_framework_says() -> None:
    # SOURCES.md S2 has [4096, 4096] = 16 heads x 256; transformers adds the output gate, as wide again.
    assert there(contract.load("qwen35_9b").shapes)["self_attn.q_proj"] == [2 * 16 * 256, 4096]


@pytest.mark.parametrize("name", NAMES)
def test_the_biases_are_those_of_the_published_architecture(name: str) -> None:
    biased = {n.split(".", 3)[-1] for n in shapes(model(name)) if n.endswith(".bias")}
    assert biased == BIASED.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_shapes_names_every_projection_of_the_layers(name: str) -> None:
    linear = {
        n.split(".", 3)[-1]
        for n, m in model(name).named_modules()
        if isinstance(m, nn.Linear) and ".layers." in n
    }
    assert set(contract.load(name).shapes or {}) == linear


@pytest.mark.parametrize("name", NAMES)
def test_the_published_class_exists_and_takes_the_config(name: str) -> None:
    c = contract.load(name)
    published = getattr(transformers, c.architecture)
    text = AutoConfig.for_model(**c.config).get_text_config()
    assert isinstance(text, (published.config_class, type(published.config_class().get_text_config())))


def test_the_two_part_model_is_published_with_a_vision_tower_that_fits_its_text_model() -> None:
    c = contract.load("tiny_qwen35")
    with torch.device("meta"):
        whole = getattr(transformers, c.architecture)._from_config(AutoConfig.for_model(**c.config))
    vision = sum(p.numel() for n, p in whole.named_parameters() if ".visual." in n)
    assert vision > 0
    assert whole.num_parameters() - vision == c.parameters
    assert c.config["vision_config"]["out_hidden_size"] == c.text_config["hidden_size"]


@pytest.mark.parametrize("name", KINDS)
def test_changing_any_one_dimension_is_noticed(name: str, tmp_path: Path) -> None:
    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return ["mamba" if value[0] == "full_attention" else "full_attention", *value[1:]]
        return not value if isinstance(value, bool) else 2 * value or 4  # no experts become some

    text = contract.load(name).text_config
    left = SHAPELESS | ({"intermediate_size"} if name == "qwen3_30b_a3b" else set())
    tried = [k for k, v in text.items() if isinstance(v, bool | int | list) and k not in left]
    assert len(tried) >= 7
    for key in tried:

        def change(content: dict[str, Any], key: str = key) -> None:
            part = content["config"].get("text_config", content["config"])
            part[key] = changed(part[key])

        other = copied(name, tmp_path, change)
        try:
            found = other.departures(shapes(built(other.config)))
        except StrictDataclassError:
            # transformers wants as many layer_types
            assert "layer_types" in text and key == "num_hidden_layers"
            continue
        assert found, key


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_total_or_shape_is_noticed_and_said(name: str, tmp_path: Path) -> None:
    real = shapes(model(name))
    total = contract.load(name).parameters
    one_more = copied(name, tmp_path, lambda content: content.update(parameters=total + 1))
    assert one_more.departures(real) == [f"{total:,} parameters, the contract says {total + 1:,}"]
    for key, shape in (contract.load(name).shapes or {}).items():
        wrong = [shape[0] + 1, shape[1]]
        other = copied(
            name, tmp_path, lambda content, key=key, wrong=wrong: content["shapes"].update({key: wrong})
        )
        assert other.departures(real) == [f"{key} {shape}, the contract says {wrong}"]


def test_a_shape_of_a_module_that_does_not_exist_is_noticed(tmp_path: Path) -> None:
    other = copied(
        "tiny_qwen3", tmp_path, lambda content: content["shapes"].update({"self_attn.w_proj": [1, 2]})
    )
    assert other.departures(shapes(model("tiny_qwen3"))) == [
        "self_attn.w_proj nowhere, the contract says [1, 2]"
    ]


@pytest.mark.parametrize("name", ["llama2_7b", "qwen25_coder_05b", "qwen3_4b", "qwen35_4b"])
def test_every_field_that_decides_a_shape_is_stated(name: str) -> None:
    stated, real = contract.load(name).text_config, shapes(model(name))
    fields = AutoConfig.for_model(**contract.load(name).config).to_dict()
    for key, value in fields.items():
        if key in stated or not isinstance(value, bool | int) or key.endswith("_token_id"):
            continue
        other = built(
            contract.load(name).config | {key: not value if isinstance(value, bool) else 2 * value + 1}
        )
        assert shapes(other) == real, f"{key} decides a shape: the contract must state it"


@pytest.mark.parametrize("name", NAMES)
def test_every_contract_of_a_kind_states_the_same_fields_and_only_real_ones(name: str) -> None:
    # transformers takes an unknown field without a word: `hidden_sise: 5` would leave the default in force.
    def fields(of: str) -> set[str]:
        return set(contract.load(of).text_config) - {"model_type", "initializer_range", "head_dim"}

    kind = type(model(name).config)
    first = next(n for n in NAMES if type(model(n).config) is kind)
    assert fields(name) == fields(first)
    # Qwen3-MoE's class asks for head_dim without naming it among its fields.
    assert set(contract.load(name).text_config) <= set(kind().to_dict()) | {"head_dim"}


# Differences to a real checkpoint


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_as_published_differs_in_nothing(name: str, tmp_path: Path) -> None:
    c = contract.load(name)
    AutoConfig.for_model(**c.config).save_pretrained(tmp_path)
    assert c.differences(AutoConfig.from_pretrained(tmp_path).get_text_config().to_dict()) == []


@pytest.mark.parametrize("name", NAMES)
def test_each_changed_field_of_a_checkpoint_is_one_line(name: str) -> None:
    c = contract.load(name)
    real = AutoConfig.for_model(**c.config).get_text_config().to_dict()
    for key, value in c.text_config.items():
        other = (
            "x"
            if isinstance(value, str)
            else (
                not value
                if isinstance(value, bool)
                else value[1:]
                if isinstance(value, list)
                else (value or 0) + 1
            )
        )
        (line,) = c.differences(real | {key: other})
        assert line.startswith(f"{key}: ")
        assert isinstance(value, list) or line == f"{key}: the contract says {value}, the checkpoint {other}"
        (line,) = c.differences({k: v for k, v in real.items() if k != key})
        assert line == f"{key}: the contract says {value}, the checkpoint has no such key"


def test_several_differences_are_all_listed() -> None:
    c = contract.load("qwen3_4b")
    assert (
        len(c.differences(model("qwen3_8b").config.to_dict())) == 3
    )  # hidden size, MLP width, tied: the rest is the same
    assert len(c.differences({})) == len(c.text_config)


def test_a_difference_in_a_list_names_its_first_place() -> None:
    c = contract.load("tiny_qwen35")
    real = model("tiny_qwen35").config.to_dict()
    types = ["linear_attention", "full_attention"] * 2
    assert c.differences(real | {"layer_types": types}) == [
        "layer_types: from [1] on the contract says linear_attention, the checkpoint full_attention"
    ]
    (line,) = c.differences(real | {"layer_types": types * 2})
    assert line.startswith("layer_types: the contract says [")


def test_of_a_nested_field_only_what_the_contract_states_is_compared(tmp_path: Path) -> None:
    def rope(content: dict[str, Any]) -> None:
        content["config"]["rope_parameters"] = {"rope_theta": 500000.0}

    c = copied("llama32_3b", tmp_path, rope)
    real = AutoConfig.for_model(**contract.load("llama32_3b").config).to_dict()
    real["rope_parameters"] = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500000.0}
    assert c.differences(real) == []
    real["rope_parameters"]["rope_theta"] = 10000.0
    assert c.differences(real) == [
        "rope_parameters.rope_theta: the contract says 500000.0, the checkpoint 10000.0"
    ]


# The files


def faults(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        contract.read(path)
    return str(error.value)


GOOD = "architecture: LlamaForCausalLM\nparameters: 5\nconfig: {model_type: llama}\n"


def test_all_faults_of_a_file_are_said_at_once_with_their_lines(tmp_path: Path) -> None:
    said = faults(tmp_path, "parametres: 5\nconfig: {hidden_size: 4}\n")
    assert "mine.yaml:1 parametres: unknown key\n    -> did you mean parameters?" in said
    assert "mine.yaml:2 config: names no model_type" in said
    assert "'architecture' is missing" in said
    assert "'parameters' is missing" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("shaeps: {a: [1, 2]}", "mine.yaml:4 shaeps: unknown key\n    -> did you mean shapes?"),
        ("tokenizer: words", "mine.yaml:4 tokenizer: 'words' is not a mapping"),
        ("chat_template: [a]", "mine.yaml:4 chat_template: ['a'] is not a text"),
        ("shapes: {q_proj: [1, 2], k_proj: [1]}", "mine.yaml:4 shapes.k_proj: [1] is not [out, in]"),
        ("shapes: {q_proj: 5}", "mine.yaml:4 shapes.q_proj: 5 is not [out, in]"),
        ("shapes: {q_proj: [1, 2.5]}", "mine.yaml:4 shapes.q_proj: [1, 2.5] is not [out, in]"),
    ],
)
def test_a_fault_is_said_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    assert said in faults(tmp_path, GOOD + line + "\n")


@pytest.mark.parametrize("value", ["'5'", "true", "5.5", "[5]"])
def test_parameters_is_a_whole_number(tmp_path: Path, value: str) -> None:
    assert "mine.yaml:2 parameters: " in faults(tmp_path, GOOD.replace("5", value))
    assert "is not a whole number" in faults(tmp_path, GOOD.replace("5", value))


def test_an_unknown_contract_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as error:
        contract.load("qwen35_4B", "x.yaml:3 model.contract")
    said = str(error.value)
    assert said.startswith(
        "x.yaml:3 model.contract: no contract 'qwen35_4B' in configs/models/\n    -> did you mean qwen35_4b?"
    )
    assert "llama2_7b" in said
    with pytest.raises(RecipeError):
        contract.load("../models/qwen35_4b")


def test_contracts_are_read_without_torch() -> None:
    code = (
        "import sys; from lora_recipes.recipe import contract; contract.load('qwen35_4b');"
        " assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Trainable parameters on known models

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def trainable(config: dict[str, Any], r: int, targets: list[str]) -> int:
    lora = LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(built(config), lora, low_cpu_mem_usage=True).get_nb_trainable_parameters()[0]


def test_the_companion_recipe_trains_the_published_count() -> None:
    # SOURCES.md S1: 10,616,832 trainable, 4,216,368,128 with the adapter, 0.2518 %.
    lora = LoraConfig(
        r=8, target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(built(contract.load("qwen35_4b").config), lora, low_cpu_mem_usage=True)
    count, total = peft_model.get_nb_trainable_parameters()
    assert (count, total, f"{100 * count / total:.4f}") == (10_616_832, 4_216_368_128, "0.2518")
    # By hand: 8 x (in + out) for 32 MLPs and for the attention of 8 layers, whose q is 8,192 wide.
    mlp, attention = 3 * (2560 + 9216), (2560 + 8192) + 2 * (2560 + 1024) + (4096 + 2560)
    assert 8 * (32 * mlp + 8 * attention) == count


def test_qwen3_8b_trains_less_than_square_matrices_would() -> None:
    # SOURCES.md S4 says about 9.4 M: r (d + k) with all four matrices 4096 x 4096. But k and v are 1024 x
    # 4096 (8 KV heads of 128).
    assert 36 * 4 * 8 * (4096 + 4096) == 9_437_184
    assert trainable(contract.load("qwen3_8b").config, 8, ATTENTION) == 7_667_712
    assert 36 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024)) == 7_667_712


def test_one_square_matrix_at_rank_8_trains_65536() -> None:
    square = nn.Sequential(nn.Linear(4096, 4096, device="meta"))
    peft_model = get_peft_model(square, LoraConfig(r=8, target_modules=["0"]), low_cpu_mem_usage=True)
    assert peft_model.get_nb_trainable_parameters()[0] == 65_536


def test_the_embedded_model_trains_4096() -> None:
    assert trainable(contract.load("tiny_qwen3").config, 4, ATTENTION) == 4_096


def llama(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


# Published runs: the measurement archive of fitcheck-llm 0.3.1 (MIT), rows trained on a Tesla T4 with LoRA on
# q, k, v, o.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": (llama(576, 1536, 30, 9, 3, 49152, True), 32, 3_686_400),
    "HuggingFaceTB/SmolLM2-360M": (llama(960, 2560, 32, 15, 5, 49152, True), 32, 6_553_600),
    "HuggingFaceTB/SmolLM2-1.7B": (llama(2048, 8192, 24, 32, 32, 49152, True), 32, 12_582_912),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (llama(2048, 5632, 22, 32, 4, 32000, False), 32, 9_011_200),
    "deepseek-ai/deepseek-coder-1.3b-instruct": (llama(2048, 5504, 24, 16, 16, 32256, False), 16, 6_291_456),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        llama(1536, 8960, 28, 12, 2, 151936, True) | {"model_type": "qwen2"},
        32,
        8_716_288,
    ),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (
        llama(1536, 8960, 28, 12, 2, 151936, True) | {"model_type": "qwen2"},
        16,
        4_358_144,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (llama(3072, 8192, 28, 24, 8, 128256, True), 16, 9_175_040),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_trains_its_published_count(name: str) -> None:
    config, r, count = PUBLISHED[name]
    assert trainable(config, r, ATTENTION) == count


def test_the_contract_of_a_published_run_trains_its_count_too() -> None:
    assert (
        trainable(contract.load("llama32_3b").config, 16, ATTENTION)
        == PUBLISHED["meta-llama/Llama-3.2-3B-Instruct"][2]
    )
