"""What the class of a base does, as a small twin of it shows; no checkpoint, transformers' own classes."""

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeForCausalLM,
)

from lora_recipes.model import freeze, twin
from lora_recipes.recipe.sections import Freeze
from tests.cases.families import FAMILIES, OLDER
from tests.typed import there

# What packed rows of a class with causal convolutions meet without the package for them.
CONVOLUTION = "a row changes" if OLDER else "causal_conv1d"
SMALL: dict[str, dict[str, object]] = {
    "Mpt": {"logit_scale": 0.5},
    "xLSTM": {"hidden_size": 64, "num_heads": 2, "num_hidden_layers": 1},
    "Roberta": {"num_hidden_layers": 2},
    "XLNet": {"n_layer": 2},
}


def model(name, **fields):
    """The text model of a family, or of transformers' own config of that name, on the meta device."""
    kind, given = FAMILIES[name] if name in FAMILIES else ("", SMALL[name])
    made = getattr(transformers, kind).config_class if kind else getattr(transformers, f"{name}Config")
    config = made(**{**given, **fields}).get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def judged(made):
    """What its twin does."""
    return there(twin.judge(made))


@pytest.mark.parametrize("name", ["recurrent_gemma", "xLSTM", "Mpt"])
def test_a_loss_that_leaves_out_what_the_class_does_to_its_logits_is_seen(name):
    found = judged(model(name))
    assert not found.agrees and not found.looks_ahead


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere2", "falcon_h1", "gpt2", "qwen3_moe"])
def test_a_loss_that_is_the_models_own_passes(name):
    found = judged(model(name))
    assert found.agrees and not found.looks_ahead and found.fused == pytest.approx(found.own, rel=1e-6)


class Unbalanced(Qwen3MoeForCausalLM):
    """Tells nothing of its routers, as Granite's experts in older transformers: TRL's loss of them is then 0,
    no tensor."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_hook(lambda *args: args[-1].__setitem__("router_logits", None))


@pytest.mark.parametrize(("kind", "fails"), [(Qwen3MoeForCausalLM, False), (Unbalanced, True)])
def test_a_load_balancing_loss_that_trl_cannot_take_is_seen(kind, fails):
    with torch.device("meta"):
        made = kind(kind.config_class(**FAMILIES["qwen3_moe"][1]))
    assert ("has no attribute 'mean'" in judged(made).auxiliary) == fails


class Louder(LlamaForCausalLM):
    """Does one per cent more to its logits than its head."""

    def forward(self, *args, **kwargs):
        """As Llama's, but for that."""
        found = super().forward(*args, **kwargs)
        found.logits = 1.01 * found.logits
        return found


@pytest.mark.parametrize(("kind", "agrees"), [(LlamaForCausalLM, True), (Louder, False)])
def test_one_per_cent_is_seen_at_the_width_of_an_8b(kind, agrees):
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256)
    with torch.device("meta"):
        made = kind(config)
    assert judged(made).agrees is agrees
    assert there(twin.make(twin.Asked.of(made))).num_parameters() < 3_000_000


PUBLISHED: dict[str, dict[str, object]] = {  # LFM2-1.2B's and Falcon-H1-3B's sizes
    "lfm2": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 4,
    },
    "falcon_h1": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_d_ssm": 4096,
        "mamba_n_heads": 32,
        "mamba_d_head": 128,
        "mamba_d_state": 256,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_judged_too(name):
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **PUBLISHED[name]))
    assert judged(made).agrees and CONVOLUTION in there(twin.packed(made))


@pytest.mark.parametrize("name", ["bert", "Roberta", "XLNet"])
def test_attention_that_looks_ahead_is_an_encoders(name):
    assert judged(model(name)).looks_ahead


def test_llama_told_to_look_both_ways_is_seen_and_a_decoder_of_berts_kind_passes():
    assert judged(model("llama", is_causal=False)).looks_ahead
    assert not judged(model("bert", is_decoder=True)).looks_ahead


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", ""),
        ("gpt2", ""),
        ("falcon_h1", CONVOLUTION),
        ("lfm2", CONVOLUTION),
        ("mamba2", "a row changes"),
        ("opt", "a row changes"),
    ],
)
def test_packed_rows_are_kept_apart_or_the_plan_says_so(name, said):
    found = there(twin.packed(model(name)))
    assert (said in found) if said else not found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", ""),
        ("gpt2", ""),
        ("falcon", "Sizes of tensors"),
        ("mamba2", "do not read it"),
        ("lfm2", "has_previous_state" if OLDER else "conv"),
    ],
)
def test_a_prefix_is_learned_or_the_plan_says_so(name, said):
    found = twin.prefixed(model(name))
    assert (said in found) if said else not found


def test_a_module_that_is_never_called_is_named():
    jamba = model("jamba")
    linear = [n for n, m in jamba.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert twin.idle(jamba, linear) == ["model.layers.*.mamba.dt_proj"]
    assert twin.idle(model("qwen3_moe"), ["model.layers.0.self_attn.q_proj"]) == []


@pytest.mark.parametrize(("name", "last"), [("gpt2", "transformer.h.1"), ("opt", "model.decoder.layers.1")])
def test_the_last_blocks_are_found_whatever_they_are_called(name, last):
    assert freeze.parts(model(name), Freeze(last_blocks=1, given={})) == [last]
