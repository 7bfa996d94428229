"""Merged shard by shard: bit for bit what PEFT's merge_and_unload gives, in little memory; and what is not
shown where the model is never loaded is said.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_recipes.core import adapter_folder, provenance, safetensors, weights
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.files import ROOT
from lora_recipes.model import merge as merging
from lora_recipes.model import shards, stored
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.cases import families
from tests.typed import there

SHARD = "20KB"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
METHODS: dict[str, tuple[str, Any]] = {
    "lora": ("qwen2", LoraConfig(target_modules="all-linear")),
    "lora, of an embedding and a head": ("qwen2", LoraConfig(target_modules=["embed_tokens", "lm_head"])),
    "rslora and patterns": (
        "qwen2",
        LoraConfig(
            target_modules=["q_proj", "down_proj"],
            use_rslora=True,
            rank_pattern={Q: 2},
            alpha_pattern={"down_proj": 3},
        ),
    ),
    "dora": ("qwen2", LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True)),
    "lora, transposed": ("gpt2", LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "dora, transposed": ("gpt2", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "ia3": ("qwen2", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "modules_to_save": ("qwen2", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def based(request, tmp_path_factory) -> dict[str, Path]:
    """Bases of several files, stored in that dtype: Qwen2, untied, with biases; and GPT-2, whose matrices
    stand transposed.
    """
    folder = tmp_path_factory.mktemp("based")
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    models: dict[str, Any] = {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(vocab_size=384, **sizes, **heads, **ends)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, **ends)),
    }
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.to(getattr(torch, request.param)).save_pretrained(folder / name, max_shard_size=SHARD)
        families.tokenizer().save_pretrained(folder / name)
        assert len(weights.files(folder / name)) > 2
    return {name: folder / name for name in models}


def adapted(base: Path, folder: Path, config: Any) -> Path:
    """An adapter of random numbers, as PEFT saves it."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        dataclasses.replace(config, task_type="CAUSAL_LM"),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_bit_is_that_of_merge_and_unload_in_float32_rounded_once(based, tmp_path, name, dtype):
    kind, config = METHODS[name]
    base, adapter = based[kind], adapted(based[kind], tmp_path / "adapter", config)
    record = merge(adapter, tmp_path / "merged", base, dtype, unproven=True, unasked=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole: Any = PeftModel.from_pretrained(plain, adapter).merge_and_unload(safe_merge=True)
    expected = {k: t.to(getattr(torch, dtype)) for k, t in whole.state_dict().items()}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(found) is type(whole) and found.dtype is getattr(torch, dtype)
    assert [k for k, t in found.state_dict().items() if not torch.equal(t, expected[k])] == []
    old = AutoModelForCausalLM.from_pretrained(base, dtype=found.dtype).state_dict()
    moved = [k for k, t in found.state_dict().items() if not torch.equal(t, old[k])]
    assert record["tensors_computed"] == len(moved) >= 2 and record["tensors_not_compared"] == []


def test_names_files_and_what_carries_no_adapter_stay(based, tmp_path):
    base = based["qwen2"]
    adapter = adapted(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    merge(adapter, tmp_path / "merged", base, unproven=True, unasked=True)
    old, new = weights.tensors(base), weights.tensors(tmp_path / "merged")
    assert {n: (t.path.name, t.shape, t.dtype) for n, t in old.items()} == {
        n: (t.path.name, t.shape, t.dtype) for n, t in new.items()
    }
    same = [n for n in old if b"".join(old[n].raw(0, old[n].size)) == b"".join(new[n].raw(0, new[n].size))]
    assert {n for n in old if n not in same} == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    one, two = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (base, tmp_path / "merged")
    )
    assert one["weight_map"] == two["weight_map"]
    assert one["metadata"]["total_size"] == two["metadata"]["total_size"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """A llama of several files, and an adapter on it."""
    folder = tmp_path_factory.mktemp("plain")
    base = families.make("llama", folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(base, max_shard_size=SHARD)
    (base / "model.safetensors").unlink()
    return base, adapted(base, folder / "adapter", LoraConfig(r=4, target_modules="all-linear"))


def test_asked_or_not_the_files_are_the_same_and_what_is_not_shown_is_said(plain, tmp_path):
    base, adapter = plain
    asked = merge(adapter, tmp_path / "asked", base, unproven=True)
    unasked = merge(adapter, tmp_path / "unasked", base, unproven=True, unasked=True)
    for file in weights.files(tmp_path / "asked"):
        assert file.read_bytes() == (tmp_path / "unasked" / file.name).read_bytes()
    assert asked["kl_mean"] < 1e-6 and "kl_mean" not in unasked and unasked["arithmetic"] is None
    assert asked["tensors_computed"] == unasked["tensors_computed"] == 14
    said = merging.report(unasked, tmp_path / "unasked")
    assert "written shard by shard" in said and "nats a token" not in said.split("NOT PROVEN")[0]
    assert "NOT PROVEN  the merged model was not asked (by your choice)" in said
    config, other = ((tmp_path / n / "config.json").read_text() for n in ("asked", "unasked"))
    assert config == other and json.loads(config)["architectures"] == ["LlamaForCausalLM"]


def test_where_memory_does_not_suffice_it_merges_and_says_why_it_was_not_asked(plain, tmp_path, monkeypatch):
    class Little:
        available = 10_000

    monkeypatch.setattr(merging.psutil, "virtual_memory", lambda: Little)
    record = merge(plain[1], tmp_path / "merged", plain[0], unproven=True)
    assert "was not asked (float32 needs about 0.0 GiB, 0.0 GiB are free)" in record["not_proven"][-1]


BROKEN = {
    "left as it was": lambda was, right: was,
    "half of the update": lambda was, right: (was + right) / 2,
    "the other sign": lambda was, right: 2 * was - right,
    "a row of another": lambda was, right: torch.cat([right[1:2], right[1:]]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_shard_that_is_written_wrongly_is_named_and_nothing_is_left(plain, tmp_path, monkeypatch, name):
    whole = shards.Shards._merged

    def wrong(self, own, dequantised):
        right = whole(self, own, dequantised)
        return right if own != f"{Q}.weight" else BROKEN[name](self.every[own].tensor(), right)

    monkeypatch.setattr(shards.Shards, "_merged", wrong)
    with pytest.raises(RecipeError, match=rf"is not base \+ adapter: {Q}.weight is off by"):
        merge(plain[1], tmp_path / "merged", plain[0], unproven=True, unasked=True)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_tensor_without_an_adapter_that_changed_is_named(plain, tmp_path, monkeypatch):
    whole = safetensors.write

    def wrong(target, tensors, content):
        def other(name):
            parts = [bytes(part) for part in content(name)]
            return [b"\x01" * len(parts[0])] if name == "model.norm.weight" else parts

        whole(target, tensors, other)

    monkeypatch.setattr(shards.safetensors, "write", wrong)
    with pytest.raises(RecipeError, match=r"model\.norm\.weight is not the base's"):
        merge(plain[1], tmp_path / "merged", plain[0], unproven=True, unasked=True)


def test_what_does_not_merge_by_shards_says_why_and_is_merged_in_the_model(plain, tmp_path):
    base = plain[0]
    adapter = adapted(base, tmp_path / "lokr", LoKrConfig(r=4, target_modules=["q_proj"]))
    record = merge(adapter, tmp_path / "merged", base, unproven=True)
    said = merging.report(record, tmp_path / "merged")
    assert "merged in the whole model: LOKR is merged by PEFT on the whole model" in said
    with pytest.raises(RecipeError, match="does not merge shard by shard: LOKR"):
        merge(adapter, tmp_path / "other", base, unproven=True, unasked=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("qwen3_moe", {"target_parameters": ["experts.down_proj"]}, "routed experts"),
        ("gemma2", {"target_modules": ["embed_tokens"]}, "is tied, and carries the adapter"),
        ("llama", {"target_modules": ["q_proj"], "bias": "all"}, "no formula here"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "rows of the embeddings"),
    ],
)
def test_each_case_that_needs_the_model_is_told(tmp_path, family, options, why):
    base = families.make(family, tmp_path)
    folder = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options)).save_pretrained(str(folder))
    adapter = adapter_folder.read(folder)
    found, said = shards.of(adapter, base, "float32", type(model), None)
    assert found is None and why in said


def test_a_parameter_that_is_converted_while_it_loads_has_no_place_in_the_files(tmp_path):
    """Joined (the experts' own), and beside them one that is not."""
    base = families.make("qwen3_moe", tmp_path)
    model, every = AutoModelForCausalLM.from_pretrained(base), weights.tensors(base)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    joined, own = "model.layers.0.mlp.experts.down_proj", f"{Q}.weight"
    assert shards._place(model, joined, shapes[joined], every) is None
    assert shards._place(model, own, shapes[own], every) == own


def test_an_adapter_of_a_4_bit_base_merges_into_the_weights_that_training_had(trained, tmp_path):
    outputs = tmp_path / "nf4"
    outputs.mkdir()
    (outputs / "tiny_base").symlink_to(trained / "tiny_base")
    train(resolve(recipes.load("tiny_facts", ["model.quantize=nf4", "train.max_steps=5"]), outputs))
    folder = outputs / "tiny_facts" / "adapter"
    for name, unasked in (("unasked", True), ("asked", False)):
        record = merge(folder, tmp_path / name, unasked=unasked)
        run = json.loads((folder.parent / "run.json").read_text())
        assert record["shards"] == 1 and bool(run.get("merged")) is not unasked, "no proof of its answers"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("asked", "unasked")]
    assert files[0] == files[1]
    known = there(provenance.read(folder))
    read = adapter_folder.read(folder)
    job = merging.Job(read, known, trained / "tiny_base" / "model", "float32")
    exact = stored.dequantised(merging._trained(job))
    by_file = there(
        shards.of(read, job.source, "float32", getattr(merging.transformers, job.architecture), known)[0]
    ).rounded
    assert len(exact) > len(read.modules)
    assert all(torch.equal(there(by_file.get(module)), tensor) for module, tensor in exact.items())
    assert by_file.get("lm_head") is None
    tensors = load_file(tmp_path / "unasked" / "model.safetensors")
    bare = next(module for module in exact if module not in read.modules)
    assert torch.equal(tensors[f"{bare}.weight"], exact[bare])


PEAK = """
import sys
from pathlib import Path
from lora_recipes.model.merge import merge
from peft import LoraConfig
import transformers.models.qwen3.modeling_qwen3
# Not ru_maxrss, which a process begins with its parent's.
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
folder, before = Path(sys.argv[1]), peak()
merge(folder / "adapter", folder / "merged", folder / "base", unproven=True, unasked=True)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
def test_the_peak_of_memory_is_less_than_the_largest_shard_and_the_adapter(tmp_path):
    """Above what the interpreter holds with its libraries, in a process of its own: under 1.3 times the
    largest of three shards, and the adapter."""
    config = Qwen3Config(
        vocab_size=4000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    for i, parameter in enumerate(model.parameters()):
        parameter.data.fill_(0.01 * (i % 7 + 1))
    model.tie_weights()
    model.save_pretrained(tmp_path / "base", max_shard_size="80MB")
    families.tokenizer().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [file.stat().st_size for file in weights.files(tmp_path / "base")]
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    peak = int(done.stdout.splitlines()[-1])
    assert len(files) >= 2 and sum(files) > 1.5 * max(files)
    assert 0 < peak < 1.3 * max(files) + adapter, (peak, max(files), adapter)
