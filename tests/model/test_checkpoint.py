"""A base that is not what it says stops the plan, with names; and one that is right is never refused."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from lora_recipes.core import weights
from lora_recipes.core.errors import RecipeError
from lora_recipes.data import gate
from lora_recipes.model import build, checkpoint
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.recipe.other_tools import OWNED

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "cases"


def config(folder, **changes):
    file = folder / "config.json"
    kept = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not ...}
    file.write_text(json.dumps(kept))


def changed(folder, change):
    """`change` takes the tensors by name and gives them back."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def only(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def recast(dtype, part=""):
    return lambda tensors: {k: v.to(dtype) if part in k else v for k, v in tensors.items()}


def shards(folder, kept=2):
    """Two files and their index, of which `kept` are there."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {k: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, k in enumerate(sorted(tensors))}
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in sorted(set(names.values()))[:kept]:
        save_file({k: v for k, v in tensors.items() if names[k] == name}, folder / name, {"format": "pt"})


def old_gpt2(tensors):
    """GPT-2 as it was published: no prefix, and the mask of each layer."""
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    return bare | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def resolved(folder, tmp_path, *more):
    recipe = CASES / "qwen_base_eos.yaml"
    return resolve(recipes.load(str(recipe), [f"model.name_or_path={folder}", *more]), tmp_path)


def planned(folder, tmp_path, *more):
    """What the plan asks of a base: its warnings."""
    base = resolved(folder, tmp_path, *more).base
    return checkpoint.check(base, build.meta_model(base))


@pytest.fixture
def copy(bases, tmp_path):
    def make(name):
        return Path(shutil.copytree(bases(name), tmp_path / "base"))

    return make


BROKEN = {
    "a layer more than the weights": (
        lambda f: config(f, num_hidden_layers=3),
        r"lacks 9 of the tensors of LlamaForCausalLM: model\.layers\.2\.",
    ),
    "a tensor less": (
        lambda f: changed(f, only("layers.1.mlp.up_proj")),
        r"lacks 1 of .*: model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "a layer less than the weights": (
        lambda f: config(f, num_hidden_layers=1),
        r"no place for 9 of .*: model\.layers\.1\.",
    ),
    "a head of values": (
        lambda f: changed(f, lambda t: t | {"v_head.weight": torch.zeros(1, 64)}),
        r"no place for 1 of .*: v_head\.weight",
    ),
    "a smaller vocabulary": (
        lambda f: config(f, vocab_size=800),
        r"embed_tokens\.weight is \[1024, 64\] in .* and \[800, 64\] by its config",
    ),
    "a wider layer": (
        lambda f: config(f, intermediate_size=96),
        r"mlp\.down_proj\.weight is \[64, 128\] in .* and \[64, 96\]",
    ),
    "no head": (lambda f: changed(f, only("lm_head")), r"lacks 1 .*lm_head.*\n.*tie_word_embeddings: true"),
    "tied to another head": (
        lambda f: config(f, tie_word_embeddings=True),
        r"ties lm_head\.weight to the embedding.*\n.*tie_word_embeddings: false",
    ),
    "a file cut short": (cut, "truncated|not fully covered"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated, empty|too small"),
    "a shard less": (lambda f: shards(f, 1), "model-00002-of-00002.safetensors"),
    "weights as bytes": (
        lambda f: changed(f, recast(torch.uint8, "q_proj")),
        r"quantised already: it stores .*q_proj\.weight.* as U8",
    ),
    "weights in 8 bits": (
        lambda f: changed(f, recast(torch.float8_e4m3fn, "v_proj")),
        r"quantised already: it stores .*v_proj\.weight.* as F8_E4M3",
    ),
    "GPTQ beside it": (
        lambda f: (f / "quantize_config.json").write_text('{"bits": 4}'),
        r"quantised already \(quantize_config\.json",
    ),
    "compressed": (
        lambda f: config(f, quantization_config={"quant_method": "compressed-tensors", "format": "x"}),
        r"quantised already \(compressed-tensors",
    ),
    "another type": (lambda f: config(f, hidden_size="64"), "hidden_size.*int"),
    "no class": (lambda f: config(f, model_type=..., architectures=...), "model_type"),
    "half a config": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "another kind of model": (lambda f: config(f, model_type="t5"), "T5|t5|no causal|cannot be loaded"),
    "code of its own": (
        lambda f: config(f, model_type="mine", auto_map={"AutoConfig": "configuration_mine.C"}),
        r"code of its own .*\n.*remove auto_map",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_base_that_is_not_what_it_says_is_refused_by_the_plan_and_by_loading(what, copy, tmp_path):
    breaks, told = BROKEN[what]
    breaks(folder := copy("llama3"))
    for ask in (planned, lambda *where: build.model(resolved(*where))):
        with pytest.raises(RecipeError, match=told) as error:
            ask(folder, tmp_path)
        assert all("name_or_path" in problem.where for problem in error.value.problems)
        assert "->" in str(error.value)


def test_a_folder_without_weights_is_planned_by_its_config_alone_and_not_trained(copy, tmp_path):
    (folder := copy("llama3")).joinpath("model.safetensors").unlink()
    assert "the plan is of its config.json alone" in planned(folder, tmp_path)[0]
    with pytest.raises(RecipeError, match=r"model\.safetensors: not there, nor pytorch_model\.bin"):
        build.model(resolved(folder, tmp_path))


def test_what_the_cases_are_broken_from_is_right(copy, tmp_path):
    """Else the test above would show nothing."""
    folder = copy("llama3")
    assert planned(folder, tmp_path) == []
    assert build.model(resolved(folder, tmp_path)).num_parameters() == 213312


@pytest.mark.parametrize("kind", ["llama3_bnb4", "llama3_gptq", "llama3_awq", "llama3_fp8"])
@pytest.mark.parametrize("more", [(), ("model.quantize=nf4",)], ids=["whole", "nf4"])
def test_a_quantised_base_is_refused_whatever_the_recipe_asks(kind, more, bases, tmp_path):
    for ask in (planned, lambda *where: build.model(resolved(*where))):
        with pytest.raises(RecipeError, match=r"quantised already .*by its config\.json") as error:
            ask(bases(kind), tmp_path, *more)
        assert "name the checkpoint that it was made from" in str(error.value)


GOOD = {
    "gpt2": lambda f: None,
    "gemma": lambda f: None,
    "qwen_base": lambda f: None,
    "qwen2_moe": lambda f: None,
    "qwen3_moe": lambda f: None,
    "llama3": shards,
}


@pytest.mark.parametrize("name", GOOD)
def test_a_right_base_is_never_refused(name, copy, tmp_path):
    GOOD[name](folder := copy(name))
    assert planned(folder, tmp_path) == []


def test_gpt2_as_it_was_published_is_right(copy, tmp_path):
    changed(folder := copy("gpt2"), old_gpt2)
    assert planned(folder, tmp_path) == []
    assert build.model(resolved(folder, tmp_path)).num_parameters() > 0
    changed(folder, only("h.1.mlp.c_fc.weight"))
    with pytest.raises(RecipeError, match=r"lacks 1 .*h\.1\.mlp\.c_fc\.weight"):
        planned(folder, tmp_path)


def test_experts_as_single_tensors_are_right_and_one_less_is_not(copy, tmp_path):
    """Transformers joins them while loading; the file holds each."""
    folder = copy("qwen3_moe")
    names = weights.shapes(folder)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names
    changed(folder, only("layers.0.mlp.experts"))
    with pytest.raises(RecipeError, match=r"lacks 2 .*layers\.0\.mlp\.experts\.down_proj.*gate_up_proj"):
        planned(folder, tmp_path)


def test_a_head_stored_beside_the_embedding_that_it_equals_is_right(copy, tmp_path):
    folder = copy("qwen_base")
    changed(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert planned(folder, tmp_path) == []


def test_what_was_learned_of_the_headers_is_what_loading_reports(copy, tmp_path):
    """Transformers' own report, with weights, against the one from shapes alone."""
    folder = copy("llama3")
    config(folder, num_hidden_layers=3, vocab_size=900)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    report = loaded[1]
    with pytest.raises(RecipeError) as error:
        planned(folder, tmp_path)
    assert f"lacks {len(report['missing_keys'])} of" in str(error.value)
    assert len(report["mismatched_keys"]) == len(re.findall(r"\[900, 64\] by its config", str(error.value)))


@pytest.mark.parametrize(
    ("stored", "asked", "told"),
    [
        (torch.bfloat16, "float32", ["stores bfloat16 weights, its config.json says float32"]),
        (torch.float16, "float32", ["stores float16 weights, its config.json says float32"]),
        (torch.bfloat16, "float16", ["its config.json says float32", "which ends at 65,504"]),
        (torch.float32, "bfloat16", []),
    ],
)
def test_a_dtype_that_the_config_does_not_name_is_told(stored, asked, told, copy, tmp_path):
    changed(folder := copy("llama3"), recast(stored))
    found = planned(folder, tmp_path, f"model.dtype={asked}")
    assert len(found) == len(told)
    assert all(text in warning for text, warning in zip(told, found, strict=True))


def at_a_terminal(words):
    """What a command says to a person at a terminal, who answers nothing; and its exit code."""
    person, program = os.openpty()
    command = [sys.executable, "-m", "lora_recipes", *map(str, words)]
    with subprocess.Popen(command, stdin=program, stdout=program, stderr=program, cwd=ROOT) as process:
        os.close(program)
        said = b""
        while True:
            try:
                more = os.read(person, 4096)
            except OSError:  # Linux says so where the other end is closed
                break
            if not more:
                break
            said += more
        code = process.wait(timeout=600)
    os.close(person)
    return code, said.decode()


def test_code_of_a_checkpoint_is_refused_and_never_asked_about(case, tmp_path):
    """Transformers would ask, and wait 15 seconds for the answer."""
    code, said = at_a_terminal(["plan", case("remote_code"), "--outputs", tmp_path])
    assert code == 2 and "code of its own" in said and "remove auto_map" in said
    assert "[y/N]" not in said and "trust_remote_code=True" not in said


def test_code_of_a_tokenizer_is_refused(copy, tmp_path):
    folder = copy("llama3")
    file = folder / "tokenizer_config.json"
    changed = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    ran = tmp_path / "ran"
    (folder / "tokenization_mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(RecipeError, match=r"the tokenizer of .* code of its own"):
        gate.pass_through(resolved(folder, tmp_path), True)
    assert not ran.exists()


def test_code_beside_a_class_that_transformers_has_is_left_alone(copy, tmp_path):
    """Many checkpoints carry their old modeling file: transformers' own class is what is trained."""
    config(folder := copy("llama3"), auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    assert planned(folder, tmp_path) == []
    assert type(build.model(resolved(folder, tmp_path))).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "text",
    [
        "model.trust_remote_code=true",
        "train.trust_remote_code=false",
        "lora.trust_remote_code=true",
        "data.trust_remote_code=true",
        "train.model_init_kwargs={trust_remote_code: true}",
        "train.dataset_kwargs={skip_prepare_dataset: true, trust_remote_code: true}",
        "train.lr_scheduler_kwargs={trust_remote_code: true}",
        "data.chat_template_kwargs={enable_thinking: false, trust_remote_code: true}",
        "data.train=[{path: rows.jsonl, trust_remote_code: true}]",
    ],
)
def test_who_asks_for_code_is_told_once_that_none_is_run(text):
    with pytest.raises(RecipeError) as error:
        recipes.load(str(CASES / "qwen_base_eos.yaml"), [text])
    assert str(error.value).count("no code out of a checkpoint is run") == 1
    assert "trust_remote_code: cannot be set in a recipe" in str(error.value)


def test_every_field_of_the_libraries_that_runs_code_is_refused():
    """A new one (processor_kwargs, ...) is seen here first."""
    known = {f"train.{f.name}" for f in dataclasses.fields(SFTConfig) if "remote_code" in f.name}
    known |= {f"train.{name}" for name in ("model_init_kwargs", "dataset_kwargs")}
    assert known <= set(OWNED)
    handed_on = {f.name for f in dataclasses.fields(SFTConfig) if f.name.endswith("_kwargs")}
    taken = {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "lr_scheduler_kwargs"}
    assert handed_on - taken == {"model_init_kwargs", "dataset_kwargs"}


NO_CODE = ("PeftModel", "PeftConfig", "GenerationConfig", "text_class")  # run none


def test_every_loading_by_name_says_that_no_code_is_run_and_one_function_loads_a_base():
    """Left out, transformers asks at a terminal."""
    seen, bases = 0, set()
    for path in (ROOT / "lora_recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("from_pretrained", "from_config")
                and (by := ast.unparse(node.func.value)) not in NO_CODE
            ):
                seen += 1
                assert any(word.arg == "trust_remote_code" for word in node.keywords), f"{path}:{node.lineno}"
                if node.func.attr == "from_pretrained" and by not in ("AutoConfig", "AutoTokenizer"):
                    bases.add(path.stem)
    assert seen > 6
    # attach: what was merged of a classifier; compress: run by another Python, without this package;
    # package: makes a base, of a GGUF file
    assert bases == {"attach", "checkpoint", "compress", "package"}
