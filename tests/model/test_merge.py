"""Merged models answer as base + adapter does, or are not left behind."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_recipes.core import adapter_folder, locate, lock, provenance, weights
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.files import ROOT
from lora_recipes.model import attach, build, shards, stored
from lora_recipes.model import merge as merging
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import export
from lora_recipes.training.train import train
from tests.cases.edits import BROKEN, EDITS, config
from tests.typed import there


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """The tiny two-part Qwen3.5 checkpoint."""
    outputs = tmp_path_factory.mktemp("hybrid")
    build.random_base(resolve(recipes.load("tiny_qwen35_style"), outputs))
    return outputs / "_bases" / "tiny_qwen35-float32"


def adapter(base: Path, folder: Path, **options) -> Path:
    """An adapter with random A and B on the text class, as the trainer would save it."""
    torch.manual_seed(0)
    plain = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, dataclasses.replace(plain, **options)).save_pretrained(str(folder))
    return folder


def test_the_default_merges_and_answers_as_before(trained, tmp_path):
    folder = trained / "tiny_facts" / "adapter"
    record = merge(folder, tmp_path / "merged")
    assert record["modules"] == 8 and record["greedy_equal"] == record["greedy_total"] == 80
    assert record["kl_mean"] < 1e-6 and record["max_rss_bytes"] > 0
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == record
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model")
    attached = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("The cat sleeps on the", return_tensors="pt")["input_ids"]
    assert torch.allclose(merged(ids).logits, attached(ids).logits, atol=1e-4)
    assert str(tokenizer.decode(merged(ids).logits[0, -1].argmax())).strip() == "sofa"


@pytest.fixture(scope="module")
def real_base(smollm2):
    """`real_base("nf4")` is a real model as its adapter was trained on it, loaded once."""

    @functools.cache
    def load(kind: str) -> Any:
        return attach.base(smollm2.base(kind), there(provenance.read(smollm2.run(kind) / "adapter")))

    return load


@pytest.mark.real
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_a_real_model_merges_and_answers_as_the_adapter_does(smollm2, real_base, kind):
    """Against PEFT on the base, in float32; in NF4 on that base, not on the one that was never quantised."""
    folder, run = smollm2.merged(kind), smollm2.run(kind)
    record = json.loads((folder / "merge.json").read_text())
    assert record["modules"] == record["tensors_computed"] == 210 and record["not_proven"] == []
    assert record["recorded"]["merged"] < record["recorded"]["allowed"] < record["recorded"]["effect"]
    known = there(provenance.read(run / "adapter"))
    ids = torch.tensor([known.probes[0].input_ids])

    @torch.no_grad()
    def answers(model) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one - other).abs().mean().item()

    told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    merged = answers(told)
    del told
    whole = replace(known, dtype="float32")
    base = real_base(kind) if known == whole else attach.base(smollm2.base(kind), whole)
    untouched = answers(base)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    attached = answers(model)
    model.unload()
    assert apart(merged, attached) < 0.2 * apart(merged, untouched)
    if kind == "nf4":
        assert (
            record["quantize"] == "nf4" and record["kl_mean"] < 0.01 * record["unquantised_base"]["kl_mean"]
        )


def test_tied_embeddings_stay_tied_and_lm_head_is_not_saved_twice(trained, tmp_path):
    merge(trained / "tiny_facts" / "adapter", tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_a_two_part_checkpoint_keeps_its_class_names_and_vision_tower(hybrid, tmp_path):
    folder = adapter(
        hybrid,
        tmp_path / "adapter",
        target_modules=["q_proj", "in_proj_qkv", "in_proj_z", "out_proj", "down_proj"],
    )
    record = merge(folder, tmp_path / "merged", unproven=True)
    assert record["architecture"] == "Qwen3_5ForConditionalGeneration" and record["modules"] == 14
    with (
        safe_open(hybrid / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
        changed = {n for n in list(old.keys()) if not torch.equal(old.get_tensor(n), new.get_tensor(n))}
    assert len(changed) == 14 and all(n.startswith("model.language_model.layers.") for n in changed)
    assert (tmp_path / "merged" / "chat_template.jinja").is_file() and (
        tmp_path / "merged" / "generation_config.json"
    ).is_file()
    text = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hybrid), folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(40).view(1, -1)
    assert torch.allclose(text(ids).logits, merged(ids).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_asked_for_is_the_one_saved(trained, tmp_path, dtype):
    merge(trained / "tiny_facts" / "adapter", tmp_path / "merged", dtype=dtype)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == getattr(torch, dtype)


def test_dora_which_no_server_takes_as_an_adapter_merges(hybrid, tmp_path):
    folder = adapter(hybrid, tmp_path / "adapter", target_modules=["down_proj"], use_dora=True)
    record = merge(folder, tmp_path / "merged", unproven=True)
    assert record["modules"] == record["tensors_computed"] == 4 and record["tensors_not_compared"] == []


def test_a_merge_that_answers_otherwise_fails_and_leaves_nothing(trained, tmp_path):
    """LoRA on tied embeddings: merging changes lm_head too, which PEFT says only as a warning when the
    adapter is made.
    """
    folder = adapter(
        trained / "tiny_base" / "model", tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"]
    )
    with pytest.raises(RecipeError, match="not base \\+ adapter"):
        merge(folder, tmp_path / "merged", unproven=True)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["adapter"]


def test_an_existing_model_is_replaced_only_when_asked(trained, tmp_path):
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    for force in (False, True):
        with pytest.raises(RecipeError, match="is no merged model"):
            merge(trained / "tiny_facts" / "adapter", output, force=force)
    assert (output / "mine.txt").read_text() == "keep"
    shutil.rmtree(output)
    merge(trained / "tiny_facts" / "adapter", output)
    with pytest.raises(RecipeError, match="already there"):
        merge(trained / "tiny_facts" / "adapter", output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"holds what no merge wrote: notes\.txt"):
        merge(trained / "tiny_facts" / "adapter", output, force=True)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    left = tmp_path / f".merged.{2**22 + 1}.tmp"  # no process has so high a number
    left.mkdir()
    record = merge(trained / "tiny_facts" / "adapter", output, force=True)
    assert (output / "merge.json").is_file() and not left.exists()
    assert "was left by a merge that was killed" in merging.report(record, output)


@pytest.mark.parametrize("inside", ["elsewhere/merged", "other_run/merged"])
def test_two_merges_into_one_folder_do_not_meet(copied, tmp_path, inside):
    """The folder itself is locked, or the run that it lies in; the second is told who has it."""
    output = tmp_path / inside
    output.parent.mkdir()
    if "run" in inside:
        (output.parent / "run.json").write_text("{}")
    code = "import sys, pathlib; from lora_recipes.core import lock\n"
    code += "with lock.held(pathlib.Path(sys.argv[1]), 'merges'): print('held', flush=True); input()"
    held = [sys.executable, "-c", code, str(output.parent if "run" in inside else output)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        try:
            with pytest.raises(
                RecipeError, match=f"is in use by process {other.pid} on .*, which merges since"
            ):
                merge(copied, output)
        finally:
            other.kill()
    assert not output.exists()
    merge(copied, output)
    assert (output / "merge.json").is_file() and lock.free(output) and lock.free(output.parent)


def test_a_base_that_is_not_at_hand_or_another_one_is_refused(trained, hybrid, tmp_path):
    folder = Path(shutil.copytree(trained / "tiny_facts" / "adapter", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen3-4B"})
    )
    with pytest.raises(RecipeError, match=r"its base Qwen/Qwen3-4B is not a folder here"):
        merge(folder, tmp_path / "merged")
    with pytest.raises(RecipeError, match="was trained on other weights"):
        merge(folder, tmp_path / "merged", base=hybrid)
    (folder / "provenance.json").unlink()
    with pytest.raises(RecipeError, match="modules are not in"):
        merge(folder, tmp_path / "merged", base=hybrid)


def test_a_base_larger_than_memory_is_refused_before_loading(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**7, 10**6], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    adapter = adapter_folder.Adapter(tmp_path, {"peft_type": "LORA"}, {})
    job = merging.Job(adapter, None, tmp_path, "bfloat16", whole="it is one")
    with pytest.raises(RecipeError, match=r"needs about .* GiB, .* GiB are free, and .*: it is one"):
        merging._in_memory(job, unasked=False)


def test_a_recipe_that_was_not_trained_is_answered(tmp_path):
    with pytest.raises(RecipeError, match="make train RECIPE=tiny_facts"):
        locate.run_folder("tiny_facts", tmp_path)


# names in adapter_config.json, where the class that is written calls its modules otherwise


L3 = "model.layers.3.self_attn"
NAMED: dict[str, dict[str, Any]] = {
    "alpha_pattern, full name": {"alpha_pattern": {f"{L3}.q_proj": 64}},
    "alpha_pattern, regex": {"alpha_pattern": {r"^model\.layers\.3\.self_attn\.v_proj": 64}},
    "rank_pattern, full name": {
        "rank_pattern": {f"{L3}.q_proj": 8},
        "alpha_pattern": {r"layers.\d.*v_proj": 2},
    },
    "target_modules, regex": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "target_modules, full names": {"target_modules": [f"{L3}.q_proj", "model.layers.0.mlp.down_proj"]},
    "exclude_modules": {"exclude_modules": [f"{L3}.v_proj"], "alpha_pattern": {"model.layers.3.*": 32}},
    "exclude_modules, regex": {"exclude_modules": r"model\.layers\.3\..*v_proj"},
    "layers_pattern": {
        "target_modules": ["down_proj", "q_proj"],
        "layers_to_transform": [1, 3],
        "layers_pattern": "layers",
        "rank_pattern": {"model.layers.1": 2, "model.layers.3.mlp.down_proj": 2},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {f"{L3}.q_proj": 16}},
    "modules_to_save": {"modules_to_save": ["model.layers.3.mlp.down_proj"]},
}


@pytest.mark.parametrize("name", NAMED)
def test_names_in_the_config_of_an_adapter_follow_its_tensors(hybrid, tmp_path, name):
    """Merged, and exported for the class that vLLM loads: both answer as PEFT does on the class that
    trained.
    """
    given: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **NAMED[name]}
    folder = adapter(hybrid, tmp_path / "adapter", **given)
    base, ids = AutoModelForCausalLM.from_pretrained(hybrid).eval(), torch.arange(40).view(1, -1)
    untouched = base(ids).logits
    expected = PeftModel.from_pretrained(base, folder).eval()(ids).logits
    assert (expected - untouched).abs().max() > 0.01
    record = merge(folder, tmp_path / "merged", unproven=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
    assert "is not proven" in record["not_proven"][0]
    read = adapter_folder.read(folder)
    if not given.get("modules_to_save"):  # which no server takes
        assert export.export(read, hybrid, tmp_path / "serving") == len(read.modules)
        whole = getattr(merging.transformers, record["architecture"]).from_pretrained(hybrid)
        served = PeftModel.from_pretrained(whole, tmp_path / "serving").eval()
        assert torch.allclose(served(ids).logits, expected, atol=1e-4)


def test_what_was_trained_with_full_names_is_what_is_merged(case, tmp_path):
    run = train(resolve(recipes.load(str(case("alpha_full_name", train__max_steps=3))), tmp_path))
    record = merge(tmp_path / "alpha_full_name" / "adapter", tmp_path / "merged")
    assert run.status == "finished" and record["not_proven"] == []
    known = record["recorded"]
    assert known["merged"] < 1e-4 * known["effect"] < known["allowed"]


# adapters that were changed after training


TENSORS = ["sign of B", "k and v", "A of another layer", "A of another run"]


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the trained default's adapter."""
    return Path(shutil.copytree(trained / "tiny_facts" / "adapter", tmp_path / "adapter"))


@pytest.mark.parametrize("name", EDITS)
def test_an_adapter_that_was_edited_is_refused_and_the_edit_named(copied, tmp_path, name):
    EDITS[name].make(copied)
    with pytest.raises(RecipeError, match=EDITS[name].said):
        merge(copied, tmp_path / "merged")


@pytest.mark.parametrize("name", [name for name, edit in EDITS.items() if edit.moves and "token" not in name])
def test_without_hashes_what_training_recorded_tells_an_edit(copied, tmp_path, name):
    """As an earlier version left it: without `files` in provenance.json."""
    old = json.loads((copied / "provenance.json").read_text())
    (copied / "provenance.json").write_text(
        json.dumps({k: v for k, v in old.items() if k not in ("files", "adapter_config")})
    )
    EDITS[name].make(copied)
    with pytest.raises(RecipeError, match="the saved adapter answers otherwise than training recorded"):
        merge(copied, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["adapter"]


FINE = ["none", "lora_alpha, a little"]  # in float32 the least edit is told; in the others, which round, all


@pytest.mark.real
@pytest.mark.parametrize(
    "kind, name",
    [
        *(("float32", name) for name in FINE),
        *((kind, name) for kind in ("bfloat16", "nf4") for name in (*FINE, "use_rslora", *TENSORS)),
    ],
)
def test_on_a_real_model_what_training_recorded_tells_an_edit(smollm2, real_base, tmp_path, kind, name):
    folder = smollm2.run(kind) / "adapter"
    known = there(provenance.read(folder))
    known = replace(known, probes=known.probes[:1])
    edited = Path(shutil.copytree(folder, tmp_path / "adapter"))
    if name == "lora_alpha, a little":
        config(lora_alpha=18)(edited)
    elif name != "none":
        EDITS[name].make(edited)
    job = merging.Job(adapter_folder.read(edited), known, Path("none"), known.dtype)
    attached = attach.attach(real_base(kind), {"default": job.adapter})
    record = there(merging._against_record(attached, job))
    attached.unload()
    assert record.noise < 1e-3 * record.effect
    if name == "none":
        assert merging._as_recorded(record, job) == []
        return
    with pytest.raises(RecipeError, match="the saved adapter answers otherwise than training recorded"):
        merging._as_recorded(record, job)


def test_without_hashes_an_unchanged_adapter_merges_and_what_is_not_proven_is_said(copied, tmp_path):
    known = provenance.read(copied)
    assert known
    replace(known, files={}, adapter_config={}).save(copied)
    record = merge(copied, tmp_path / "merged")
    assert "without hashes" in merging.report(record, tmp_path / "merged")
    assert record["recorded"]["merged"] < record["recorded"]["allowed"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_without_provenance_too(copied, tmp_path, name):
    (copied / "provenance.json").unlink()
    BROKEN[name].make(copied)
    with pytest.raises(RecipeError, match=BROKEN[name].said):
        merge(copied, tmp_path / "merged", unproven=True)


def test_without_provenance_a_merge_is_asked_for(copied, tmp_path):
    (copied / "provenance.json").unlink()
    with pytest.raises(RecipeError, match=r"(?i)is not proven.*\n    -> .*unproven.* merges it"):
        merge(copied, tmp_path / "merged")


def test_another_base_is_told_by_its_own_answers_where_no_fingerprint_is(copied, trained, tmp_path):
    """A base that came from the hub without ever being a folder here leaves none."""
    other = Path(shutil.copytree(trained / "tiny_base" / "model", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(0)
    save_file({n: torch.randn_like(w) * w.std() for n, w in weights.items()}, other / "model.safetensors")
    known = provenance.read(copied)
    assert known
    replace(known, fingerprint=None).save(copied)
    with pytest.raises(RecipeError, match=r"the base alone is .* from what training recorded"):
        merge(copied, tmp_path / "merged", base=other)


# what is written, broken on purpose


KINDS = ["float32", "bfloat16", "nf4"]
MODELS = [f"tiny {kind}" for kind in KINDS]
MODELS += [pytest.param(f"smollm2 {kind}", marks=pytest.mark.real) for kind in KINDS]  # type: ignore[misc]


def changed_weights(
    name: str, tensor: Callable, base: Callable, pairs: dict[str, torch.Tensor], scaling: float
) -> dict[str, torch.Tensor]:
    """The stored tensors of a merged model that are broken in the way that `name` says. `tensor` and `base`
    read a stored one and the base's, `pairs` are A and B.
    """
    one, two = (f"model.layers.{i}.self_attn.{{}}_proj" for i in (0, 1))
    kind = "q" if "transposed" in name else "v"
    weight, was = f"{one.format(kind)}.weight", base(f"{one.format(kind)}.weight").float()
    a, b, other_a, other_b = (
        pairs[f"base_model.model.{module.format(kind)}.lora_{which}.weight"].float()
        for module in (one, two)
        for which in "AB"
    )
    broken = {
        "one module left unmerged": lambda: was,
        "another scaling": lambda: was + 1.5 * scaling * b @ a,
        "alpha for alpha / r": lambda: was + len(a) * scaling * b @ a,
        "alpha / sqrt(r) for alpha / r": lambda: was + len(a) ** 0.5 * scaling * b @ a,
        "the sign of B": lambda: was - scaling * b @ a,
        "A of another layer": lambda: was + scaling * b @ other_a,
        "B of another layer": lambda: was + scaling * other_b @ a,
        "a transposed delta": lambda: was + scaling * (b @ a).flatten().view(len(was.T), -1).T,
    }
    if name in broken:
        return {weight: broken[name]().to(tensor(weight).dtype).contiguous()}
    if name == "a norm that carries no adapter":
        return {"model.norm.weight": tensor("model.norm.weight") * 1.01}
    head = tensor("model.embed_tokens.weight").clone()
    head[7] += 0.01
    return {"model.embed_tokens.weight": head}


@pytest.fixture(scope="module", params=MODELS)
def written(request, trained, tmp_path_factory):
    """A job and its merged folder, what the merge changes, and the base's weights. The real model's base is
    stored in bfloat16 where its adapter was trained so; the tiny one's is merged into bfloat16.
    """
    made = tmp_path_factory.mktemp("written")
    model, kind = request.param.split()
    if model == "tiny":
        run, base = trained / "tiny_facts", trained / "tiny_base" / "model"
    else:
        real = request.getfixturevalue("smollm2")
        run, base = real.run(kind), real.base(kind)
    known = provenance.read(run / "adapter")
    assert known
    known = replace(known, quantize="nf4" if kind == "nf4" else None)
    job = merging.Job(
        adapter_folder.read(run / "adapter"), known, base, "bfloat16" if kind == "bfloat16" else "float32"
    )
    dequantised = {}
    if known.quantize:
        base4 = request.getfixturevalue("real_base")(kind) if model == "smollm2" else attach.base(base, known)
        quantised = merging._attach(base4, job)
        dequantised = stored.dequantised(quantised)
        quantised.unload()
    attached = merging._attach(merging._load(job.source, "float32", job), job)
    stored.put(dequantised, attached.get_base_model())
    changes = stored.changes(attached, job.adapter)
    names = list(attached.get_base_model().state_dict())
    names = [name.replace(".base_layer", "") for name in names if ".lora_" not in name]
    if model == "tiny":
        kind = type(attached.get_base_model())
        by_file = there(shards.of(job.adapter, base, job.dtype, kind, known)[0])
        by_file.write(made / "merged", dequantised)
    folder = made / "merged" if model == "tiny" else real.merged(kind)
    return job, folder, changes, dequantised, names


@pytest.fixture
def verdict(written, tmp_path):
    """`verdict(tensors)`: what is said of a merged model that holds no other tensors; of those that are
    missing it says how many.
    """
    job, _, changes, dequantised, names = written

    def check(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(RecipeError, match=r"the merged model is not base \+ adapter: ") as error:
            stored.check(job.adapter, job.source, tmp_path, changes, names, dequantised)
        return str(error.value)

    return check


@pytest.mark.parametrize("written", [f"tiny {kind}" for kind in KINDS], indirect=True)
def test_what_a_merge_wrote_is_base_and_adapter(written):
    """Of the real model the merge itself says so: its merge.json counts the tensors that were computed."""
    job, folder, changes, dequantised, names = written
    good = stored.check(job.adapter, job.source, folder, changes, names, dequantised)
    assert good["tensors_computed"] == len(job.adapter.modules)
    assert good["lost_in_rounding"] < 0.05


@pytest.mark.parametrize(
    "name",
    [
        "one module left unmerged",
        "another scaling",
        "alpha for alpha / r",
        "alpha / sqrt(r) for alpha / r",
        "the sign of B",
        "A of another layer",
        "B of another layer",
        "a transposed delta",
        "a norm that carries no adapter",
        "the tied head",
    ],
)
def test_a_stored_tensor_that_is_not_base_and_adapter_is_named(written, verdict, name):
    job, folder, changes, dequantised, _ = written
    base, merged = weights.tensors(job.source), weights.tensors(folder)

    def own(key: str) -> torch.Tensor:
        found = dequantised.get(key.removesuffix(".weight"))
        return base[key].tensor() if found is None else found

    one = next(iter(changes.updates.values()))
    (key, tensor), *_ = changed_weights(
        name, lambda key: merged[key].tensor(), own, load_file(job.adapter.file), one.scaling
    ).items()
    assert key in verdict({key: tensor}) and key not in verdict({key: merged[key].tensor()})


# method -> its config, the weight that is broken, and in which ways
CHANGED: dict[str, tuple[str, LoraConfig | IA3Config, str, tuple[str, ...]]] = {
    "dora": (
        "qwen2",
        LoraConfig(use_dora=True, target_modules=["q_proj", "down_proj"]),
        "model.layers.0.mlp.down_proj.weight",
        (
            "left as it was",
            "by LoRA alone",
            "the base's norms",
            "norms over the outputs",
            "the other layer's",
        ),
    ),
    "dora, transposed": (
        "gpt2",
        LoraConfig(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True),
        "transformer.h.0.attn.c_attn.weight",
        (
            "left as it was",
            "by LoRA alone",
            "the base's norms",
            "norms over the outputs",
            "the other layer's",
        ),
    ),
    "dora, rslora and patterns": (
        "qwen2",
        LoraConfig(
            use_dora=True,
            use_rslora=True,
            target_modules=["v_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"v_proj": 3},
        ),
        "model.layers.0.mlp.down_proj.weight",
        ("by LoRA alone", "the other layer's"),
    ),
    "lora, transposed": (
        "gpt2",
        LoraConfig(target_modules=["c_attn", "wte"], fan_in_fan_out=True),
        "transformer.h.0.attn.c_attn.weight",
        ("left as it was", "the other layer's"),
    ),
    "ia3": (
        "qwen2",
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "model.layers.0.self_attn.k_proj.bias",
        ("left as it was", "the other layer's", "twice"),
    ),
    "ia3, of inputs": (
        "qwen2",
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "model.layers.0.mlp.down_proj.weight",
        ("left as it was", "the other layer's", "twice"),
    ),
    "ia3, transposed": (
        "gpt2",
        IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
        "transformer.h.0.attn.c_attn.weight",
        ("left as it was", "the other layer's", "twice"),
    ),
    "modules_to_save": (
        "qwen2",
        LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]),
        "model.layers.0.mlp.down_proj.weight",
        ("left as it was", "the other layer's"),
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`small("qwen2")`, with biases, or `small("gpt2")`, whose matrices are stored transposed: a base."""

    @functools.cache
    def make(kind: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}
        if kind == "qwen2":
            sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
            model: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **sizes, **heads, **ends))
        else:
            model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **ends))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        return folder

    return make


def broken(way: str, weight: str, weights: dict, base: dict, found: dict) -> torch.Tensor:
    """The stored `weight` of a merged model, broken in that way; `found`: the adapter's tensors."""
    at = f"base_model.model.{weight.rsplit('.', 1)[0]}."
    if way == "left as it was":
        return base[weight]
    if way == "the other layer's":
        return weights[weight.replace(".0.", ".1.")]
    if way == "twice":
        factor = weights[weight] / base[weight]
        return weights[weight] * factor
    transposed = "transformer" in weight
    before = base[weight].T if transposed else base[weight]
    b, a = found[f"{at}lora_B.weight"], found[f"{at}lora_A.weight"]
    plain = before + 2 * b @ a if len(a) == 4 else before + 4 / 2**0.5 * b @ a
    magnitude = found[f"{at}lora_magnitude_vector"][:, None]
    if way == "the base's norms":
        plain = magnitude / before.norm(dim=1, keepdim=True) * plain
    elif way == "norms over the outputs":
        plain = magnitude / plain.norm(dim=0).mean() * plain
    return plain.T if transposed else plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHANGED)
def test_what_another_method_stores_is_computed_too_and_every_other_number_is_named(
    small, tmp_path, name, dtype
):
    kind, config, weight, ways = CHANGED[name]
    config = dataclasses.replace(config, task_type="CAUSAL_LM")
    if isinstance(config, LoraConfig):
        config = dataclasses.replace(
            config, r=4, lora_alpha=4 if config.use_rslora else 8, init_lora_weights=False
        )
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small(kind)), config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # away from where it began: norms, ones, the base's own weights
            parameter.data = parameter.data * (1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "adapter"))
    job = merging.Job(adapter_folder.read(tmp_path / "adapter", anything=True), None, small(kind), dtype)
    attached = merging._attach(merging._load(job.source, "float32", job), job)
    changes = stored.changes(attached, job.adapter)
    merging._write(attached, job, tmp_path / "merged", {})
    names = list(AutoModelForCausalLM.from_pretrained(job.source).state_dict())
    good = stored.check(job.adapter, job.source, tmp_path / "merged", changes, names, {})
    assert good["tensors_not_compared"] == [] and good["tensors_computed"] == len(changes.updates) >= 2
    assert weight in changes.updates and (good["lost_in_rounding"] > 0 or name == "modules_to_save")
    merged = tmp_path / "merged" / "model.safetensors"
    weights, base = load_file(merged), load_file(job.source / "model.safetensors")
    exact, found = weights[weight].clone(), load_file(job.adapter.file)
    for way in ways:
        wrong = broken(way, weight, {n: t.float() for n, t in weights.items()}, base, found)
        assert not torch.equal(wrong.to(exact), exact), way
        weights[weight] = wrong.to(exact).clone().contiguous()
        save_file(weights, merged, {"format": "pt"})
        with pytest.raises(RecipeError, match=rf"is not base \+ adapter: {weight} is off by"):
            stored.check(job.adapter, job.source, tmp_path / "merged", changes, names, {})
        weights[weight] = exact


def test_what_no_formula_here_covers_is_said_to_be_left_to_the_answers(trained, tmp_path):
    config = LoKrConfig(r=4, alpha=8, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    record = merge(tmp_path / "adapter", tmp_path / "merged", unproven=True)
    assert len(record["tensors_not_compared"]) == 2 and record["tensors_computed"] == 0
    said = merging.report(record, tmp_path / "merged")
    assert "as stored, computed anew in float64: 0 tensors; 22 are the base's own" in said
    assert (
        "NOT PROVEN  2 stored tensors were not computed here (LOKR: model.layers.0.self_attn.q_proj" in said
    )


def test_a_head_that_is_tied_no_longer_is_the_one_that_it_was_tied_to(written, verdict):
    head = weights.tensors(written[1])["model.embed_tokens.weight"].tensor()
    assert "lm_head" not in verdict({"lm_head.weight": head})
    head[7] += 0.01
    assert "lm_head.weight is not the base's" in verdict({"lm_head.weight": head})


def test_a_merge_in_bfloat16_rounds_each_tensor_once_and_says_what_that_costs(trained, tmp_path):
    """Of PEFT's own merge in bfloat16 each delta is rounded before it is added."""
    record = merge(trained / "tiny_facts" / "adapter", tmp_path / "merged", dtype="bfloat16")
    assert record["arithmetic"] == "float32" and 0 < record["lost_in_rounding"] < 0.05
    assert record["logit_max"] <= merging.STEPS * record["rounding"]["logit_max"]
    assert record["noise"]["logit_max"] > 0
    said = merging.report(record, tmp_path / "merged")
    assert "computing in bfloat16 moves its answers" in said and "% of the update lost in that" in said


def test_where_memory_does_not_suffice_for_float32_the_merge_is_as_exact(trained, tmp_path):
    job = merging.Job(
        adapter_folder.read(trained / "tiny_facts" / "adapter"),
        provenance.read(trained / "tiny_facts" / "adapter"),
        trained / "tiny_base" / "model",
        "bfloat16",
        "bfloat16",
    )
    record = merging._merge(job, tmp_path / "merged", [])
    assert record["arithmetic"] == "bfloat16" and record["tensors_computed"] == 8
    assert 0 < record["lost_in_rounding"] < 0.05
