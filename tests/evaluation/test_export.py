"""A merged model in fewer bits: refused early, written to the nearest step, loaded by a real vLLM, asked."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lora_recipes.__main__ import main
from lora_recipes.core import provenance
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.evaluation import export
from lora_recipes.model import quantise
from lora_recipes.model.merge import merge
from lora_recipes.serving import command
from tests.cases import families
from tests.typed import there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(command.vllm() is None, reason="vLLM is not installed: make setup-serve"),
]


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The trained default, in an outputs folder of its own, with its merged model."""
    outputs = tmp_path_factory.mktemp("export")
    for name in ("tiny_facts", "tiny_base"):
        shutil.copytree(trained / name, outputs / name)
    merge(outputs / "tiny_facts" / "adapter", outputs / "tiny_facts" / "merged")
    return RunFolder(outputs / "tiny_facts")


def as_merged(folder, tmp_path, trained):
    """A finished run whose merged model is the checkpoint in `folder`."""
    run = RunFolder(tmp_path / "x")
    run.path.mkdir()
    run.write_record(there(RunFolder(trained / "tiny_facts").record))
    shutil.copytree(folder, run.path / "merged")
    return run


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(trained, run, monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match=r"FORMAT=W4A16: no such format\n    -> did you mean w4a16\?"):
        quantise.job(run, "W4A16", force=False)
    with pytest.raises(RecipeError, match=r"has no merged model to quantise\n    -> first .*merge"):
        quantise.job(RunFolder(trained / "tiny_facts"), "w8a8", force=False)
    with pytest.raises(RecipeError, match="holds no finished run"):
        quantise.job(RunFolder(tmp_path / "none"), "w8a8", force=False)
    there_already = run.path / "exports" / "w4a16"
    there_already.mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"w4a16: is already there\n    -> FORCE=1 replaces it"):
        quantise.job(run, "w4a16", force=False)
    (there_already / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"holds what no export wrote: notes\.txt"):
        quantise.job(run, "w4a16", force=True)
    shutil.rmtree(run.path / "exports")
    (run.path / "merged" / "labels.json").write_text('{"labels": ["a", "b"], "pooling": "mean"}')
    with pytest.raises(RecipeError, match="is a classifier"):
        quantise.job(run, "w8a8", force=False)
    (run.path / "merged" / "labels.json").unlink()
    monkeypatch.setattr(command, "ENVIRONMENT", tmp_path)
    with pytest.raises(RecipeError, match="vLLM is not installed: it brings what writes the format"):
        quantise.job(run, "w8a8", force=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "mamba2", "gpt2"])
def test_weights_outside_linear_layers_are_named_and_refused(family, trained, tmp_path):
    run = as_merged(families.make(family, tmp_path), tmp_path, trained)
    with pytest.raises(RecipeError, match=r"other than linear layers: .* \(\w+\)"):
        quantise.layers(quantise.job(run, "w8a8", force=False))


def test_rows_that_no_group_divides_are_refused_for_4_bits_and_taken_for_8(trained, tmp_path):
    run = as_merged(families.make("llama", tmp_path), tmp_path, trained)  # 48 numbers in down_proj
    with pytest.raises(
        RecipeError, match=r"take 32, 48 numbers: no group of 128, 64, 32 .*\n    -> FORMAT=w8a8"
    ):
        quantise.layers(quantise.job(run, "w4a16", force=False))
    found = quantise.layers(quantise.job(run, "w8a8", force=False))
    assert len(found.quantised) == 14 and found.ignore == ["lm_head"]


def test_of_a_model_with_a_tower_only_the_text_is_quantised(trained, tmp_path):
    run = as_merged(families.make("gemma3", tmp_path), tmp_path, trained)
    found = quantise.layers(quantise.job(run, "w8a8", force=False))
    assert found.kind == "Gemma3ForConditionalGeneration"
    assert found.quantised and all("language_model" in name for name in found.quantised)
    assert any("vision_tower" in name for name in found.ignore)


def test_an_export_of_8_bits_is_loaded_by_vllm_measured_and_recorded(run, quick_vllm, capfd):
    """The weights on file are the nearest steps; the figures printed are those that numpy finds of them."""
    words = ["tiny_facts", "data.eval=data/facts/rephrased.jsonl", "--outputs", str(run.path.parent)]
    assert main(["export", *words, "--format", "w8a8"]) == 0
    said = capfd.readouterr().out
    found = there(there(run.record).exports)["w8a8"]
    lost = there(found.lost)
    assert f"{100 * lost.same:.1f} %" in said and "loaded by   vllm" in said
    assert lost.rows == 4 and 0 < lost.kl < 0.01 and lost.same > 0.9
    assert abs(lost.exported.loss - lost.merged.loss) < 0.1 and lost.merged.loss < 0.2
    assert found.layers == 14 and found.bytes < 0.6 * found.merged_bytes and found.not_loaded is None
    target = run.path / "exports" / "w8a8"
    merged, exported = (load_file(f / "model.safetensors") for f in (run.path / "merged", target))
    assert nearest(merged, exported) == 14
    known = there(provenance.read(target))
    assert 0 < known.apart < 0.1, "what a server later on is held to"
    assert known.probes == there(provenance.read(run.path / "merged")).probes
    assert sorted(p.name for p in target.parent.iterdir()) == ["w8a8"], "nothing unfinished is left"
    with pytest.raises(RecipeError, match="is already there"):
        export.export("tiny_facts", run.path.parent, "w8a8")


def nearest(merged, exported):
    """How many weights are stored in 8 bits, each within half a step of what they were."""
    count = 0
    for name, scale in exported.items():
        if not name.endswith("weight_scale"):
            continue
        own = name.removesuffix("_scale")
        steps = (merged[own].float() / scale.float()).clamp(-128, 127)
        assert (steps - exported[own].float()).abs().max() < 0.5 + 1e-4, own
        assert exported[own].dtype == torch.int8 and exported[own].abs().max() >= 127
        count += 1
    return count


def test_what_the_server_does_not_load_is_kept_and_said_to_be_unverified(run, quick_vllm, monkeypatch, capfd):
    """A server that ends at start, as vLLM does where it has no kernel for the format."""
    real = command.prepare

    def refused(*given):
        server = real(*given)
        server.command = ["/bin/false"]
        return server

    monkeypatch.setattr(command, "prepare", refused)
    words = ["tiny_facts", "data.eval=data/facts/rephrased.jsonl", "--outputs", str(run.path.parent)]
    assert main(["export", *words, "--format", "w4a16"]) == export.NOT_LOADED
    said = capfd.readouterr().out
    found = there(there(run.record).exports)["w4a16"]
    assert found.lost is None and "ended at start" in there(found.not_loaded)
    assert "NOT LOADED  " in said and "nothing of it is verified here" in said and "KL" not in said
    config = json.loads((run.path / "exports" / "w4a16" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64


def test_the_divergence_of_a_few_tokens_is_at_most_the_whole_and_0_of_the_same():
    given, other = torch.tensor([[2.0, 1.0, 0.0, -3.0], [1.0, 1.5, -1.0, 0.0]]).double().log_softmax(-1)
    whole = sum(math.exp(p) * (p - q) for p, q in zip(given.tolist(), other.tolist(), strict=True))
    some = [export._kl(given, {i: other[i].item() for i in range(n)}) for n in (1, 2, 3, 4)]
    assert 0 < some[0] <= some[1] <= some[2] <= some[3] + 1e-9
    assert some[3] == pytest.approx(whole, abs=1e-5)
    assert export._kl(given, {i: given[i].item() for i in (0, 1)}) == pytest.approx(0, abs=1e-6)
