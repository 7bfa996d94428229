"""A base that was swapped or damaged after training in either format stops merge and eval with names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_recipes.core import provenance, weights
from lora_recipes.core.errors import RecipeError
from lora_recipes.evaluation.evaluate import evaluation
from lora_recipes.model import build, checkpoint
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import Resolved, resolve
from lora_recipes.training.train import train

CASES = Path(__file__).resolve().parents[1] / "cases"
SHARDS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def pickled(folder: Path, shards: bool = False, **options) -> Path:
    """The checkpoint in `folder` as torch.save writes it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not shards:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return folder
    names = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        torch.save({k: v for k, v in tensors.items() if names[k] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def resolved(folder: Path, outputs: Path, *more: str) -> Resolved:
    recipe = recipes.load(str(CASES / "qwen_base_eos.yaml"), [f"model.name_or_path={folder}", *more])
    return resolve(recipe, outputs)


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory) -> Path:
    """The outputs of a run on llama3, which has a base of its own; held-out rows are among its data."""
    outputs = tmp_path_factory.mktemp("swapped")
    folder = Path(shutil.copytree(bases("llama3"), outputs / "base"))
    train(resolved(folder, outputs, f"data.eval={CASES / 'eval.jsonl'}", "train.max_steps=1"))
    return outputs


@pytest.fixture
def copy(bases, tmp_path):
    return lambda name="llama3": Path(shutil.copytree(bases(name), tmp_path / "base"))


SWAPPED = {
    "tied in config.json, not in the file": (
        lambda f: config(f, tie_word_embeddings=True),
        r"ties lm_head\.weight to the embedding",
    ),
    "tied in the file, not in config.json": (lambda f: without(f, "lm_head.weight"), r"lacks 1 .*lm_head"),
    "a smaller vocabulary": (lambda f: config(f, vocab_size=800), r"\[1024, 64\] in .* and \[800, 64\]"),
    "a layer more": (lambda f: config(f, num_hidden_layers=3), r"lacks 9 of .*model\.layers\.2\."),
    "a layer less": (lambda f: config(f, num_hidden_layers=1), r"no place for 9 of .*model\.layers\.1\."),
    "a norm less": (lambda f: without(f, "model.norm.weight"), r"lacks 1 of .*model\.norm\.weight"),
    "a config.json cut short": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
}


@pytest.mark.parametrize("what", SWAPPED)
def test_a_base_swapped_after_training_is_refused_by_plan_merge_and_eval(what, run, copy, tmp_path):
    swap, told = SWAPPED[what]
    swap(folder := copy())
    base = resolved(folder, tmp_path).base
    with pytest.raises(RecipeError, match=told):
        checkpoint.check(base, build.meta_model(base))
    adapter = Path(shutil.copytree(run / "qwen_base_eos" / "adapter", tmp_path / "adapter"))
    (adapter / provenance.FILE).unlink()  # else its fingerprint tells of every file that is another
    with pytest.raises(RecipeError, match=told):
        merge(adapter, tmp_path / "merged", base=folder, unproven=True)
    with pytest.raises(RecipeError, match=told):
        evaluation("qwen_base_eos", run, adapter=adapter, base=folder)
    assert not (tmp_path / "merged").exists()


def test_what_the_cases_are_swapped_from_merges_and_is_evaluated(run, copy, tmp_path):
    """Else the test above would show nothing; and the right base in another format is the right one."""
    folder = pickled(copy(), shards=True)
    adapter = run / "qwen_base_eos" / "adapter"
    assert merge(adapter, tmp_path / "merged", base=folder)["modules"] == 4
    found = evaluation("qwen_base_eos", run, base=folder)
    assert found.base == str(folder) and found.sets["eval"].base.loss > 0


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "an index"])
def test_a_pytorch_base_has_the_fingerprint_of_its_tensors_and_damage_is_seen(shards, run, copy, tmp_path):
    folder = copy()
    known = weights.fingerprint(folder)
    pickled(folder, shards)
    assert weights.fingerprint(folder) == known, "the same tensors in another format"
    assert weights.shapes(folder) == weights.shapes(run / "base")
    base = resolved(folder, tmp_path).base
    assert checkpoint.check(base, build.meta_model(base)) == []
    file = folder / (SHARDS[0] if shards else "pytorch_model.bin")
    whole = file.read_bytes()
    at = whole.index(load_file(run / "base" / "model.safetensors")["lm_head.weight"].numpy().tobytes()[:512])
    file.write_bytes(whole[: at + 100] + bytes([whole[at + 100] ^ 1]) + whole[at + 101 :])
    assert build.model(resolved(folder, tmp_path)).num_parameters() == 213312, "loading tells nothing"
    assert weights.fingerprint(folder) != known
    adapter = run / "qwen_base_eos" / "adapter"
    with pytest.raises(RecipeError, match="was trained on other weights than those in"):
        merge(adapter, tmp_path / "merged", base=folder)
    with pytest.raises(RecipeError, match="was trained on other weights than those in"):
        evaluation("qwen_base_eos", run, base=folder)
    for damaged, told in ((whole[: len(whole) // 2], "torch.load"), (b"", "torch.load")):
        file.write_bytes(damaged)
        for ask in (
            lambda: checkpoint.check(base, build.meta_model(base)),
            lambda: build.model(resolved(folder, tmp_path)),
        ):
            with pytest.raises(RecipeError, match=rf"{file.name} cannot be read by {told}"):
                ask()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_the_plan_holds_a_pytorch_base_against_its_config(old, copy, tmp_path):
    folder = pickled(copy(), _use_new_zipfile_serialization=not old)
    base = resolved(folder, tmp_path).base
    assert checkpoint.check(base, build.meta_model(base)) == []
    config(folder, vocab_size=800, num_hidden_layers=3)
    with pytest.raises(RecipeError, match=r"lacks 9 of[\s\S]*and \[800, 64\] by its config"):
        checkpoint.check(base, build.meta_model(base))


class Other:
    """What weights_only refuses to make."""


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (lambda t: {"epoch": 3, "state_dict": t}, r"holds what is no tensor: epoch, state_dict"),
        (lambda t: list(t.values()), r"holds a list, no tensors by name"),
        (lambda t: t | {"made.by": Other()}, r"cannot be read by torch\.load\(weights_only=True\)"),
    ],
    ids=["a training checkpoint", "a list", "an object"],
)
def test_a_pytorch_file_that_holds_something_else_is_named(held, told, copy, tmp_path):
    folder = pickled(copy())
    file = folder / "pytorch_model.bin"
    torch.save(held(torch.load(file, weights_only=True)), file)
    base = resolved(folder, tmp_path).base
    with pytest.raises(RecipeError, match=rf"pytorch_model\.bin {told}"):
        checkpoint.check(base, build.meta_model(base))


INDEX = {
    "no metadata": (lambda i: {"weight_map": i["weight_map"]}, r'has no "metadata": \{\}'),
    "no weight_map": (lambda i: {"metadata": {}}, r"names no files \(weight_map\)"),
    "an empty weight_map": (lambda i: {"metadata": {}, "weight_map": {}}, r"names no files"),
    "a list": (lambda i: [i], r"names no files"),
    "a file elsewhere": (
        lambda i: i | {"weight_map": i["weight_map"] | {"lm_head.weight": "../other/x.bin"}},
        r"names files outside its folder: \.\./other/x\.bin",
    ),
    "an absolute file": (
        lambda i: i | {"weight_map": i["weight_map"] | {"lm_head.weight": "/other/x.safetensors"}},
        r"names files outside its folder: /other/x\.safetensors",
    ),
    "a file that is not there": (
        lambda i: i | {"weight_map": i["weight_map"] | {"lm_head.weight": "model-00003.bin"}},
        r"model-00003\.bin: not there",
    ),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("what", [*INDEX, "broken JSON"])
def test_an_index_that_is_wrong_is_named_by_the_plan_and_by_loading(what, kind, copy, tmp_path):
    folder = pickled(copy(), shards=True)
    file = folder / "pytorch_model.bin.index.json"
    if kind == "safetensors":
        index = json.loads(
            file.read_text().replace("pytorch_model-", "model-").replace(".bin", ".safetensors")
        )
        for shard in SHARDS:
            tensors = torch.load(folder / shard, weights_only=True)
            name = shard.replace("pytorch_model-", "model-").replace(".bin", ".safetensors")
            save_file(tensors, folder / name, {"format": "pt"})
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps(index))
    base = resolved(folder, tmp_path).base
    assert checkpoint.check(base, build.meta_model(base)) == [], "what it is broken from is right"
    if what == "broken JSON":
        file.write_text(file.read_text()[:-20])
        told = rf"{file.name} is broken JSON"
    else:
        change, told = INDEX[what]
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    for ask in (
        lambda: checkpoint.check(base, build.meta_model(base)),
        lambda: build.model(resolved(folder, tmp_path)),
    ):
        with pytest.raises(RecipeError, match=told) as error:
            ask()
        assert all("name_or_path" in problem.where for problem in error.value.problems)


def test_an_index_without_its_files_is_named_with_what_is_beside_it(copy, tmp_path):
    folder = pickled(copy())
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    base = resolved(folder, tmp_path).base
    with pytest.raises(RecipeError, match=r"00001\.safetensors: not there \(pytorch_model\.bin is read only"):
        checkpoint.check(base, build.meta_model(base))


def numbers(**given: float):
    """The first numbers of the head: those that are `given`."""

    def change(folder: Path, dtype: torch.dtype) -> None:
        tensors = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
        for i, value in enumerate(given.values()):
            tensors["lm_head.weight"][5, i] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_numbers_that_float16_has_not_are_counted(kind, dtype, copy, tmp_path):
    numbers(large=-1234.5, tiny=1e-9, less=-2e-8)(folder := copy(), dtype)
    config(folder, dtype=str(dtype).removeprefix("torch."))
    if kind == "bin":
        pickled(folder)
    base = resolved(folder, tmp_path, "model.dtype=float16").base
    (said,) = checkpoint.check(base, build.meta_model(base))
    half = {k: v.half() for k, v in build.model(resolved(folder, tmp_path)).state_dict().items()}
    full = build.model(resolved(folder, tmp_path)).state_dict()
    zeros = sum(int(((half[k] == 0) & (full[k] != 0)).sum()) for k in full)
    most = max(v.abs().max().item() for v in full.values())
    assert zeros >= 2 and f"of its 213,312 numbers is {most:.4g}, {zeros:,} become zero" in said
    assert (
        checkpoint.check(resolved(folder, tmp_path, "model.dtype=bfloat16").base, build.meta_model(base))
        == []
    )


@pytest.mark.parametrize("value", [1e5, -7e4, float("inf"), float("nan")])
def test_numbers_beyond_float16_are_refused_by_plan_and_loading(value, copy, tmp_path):
    numbers(value=value)(folder := copy(), torch.bfloat16)
    config(folder, dtype="bfloat16")
    half = resolved(folder, tmp_path, "model.dtype=float16")
    with pytest.raises(RecipeError, match=r"dtype: float16 ends at 65,504: 1 of .* in lm_head\.weight"):
        checkpoint.check(half.base, build.meta_model(half.base))
    with pytest.raises(RecipeError, match=r"float16 does not hold 1 of the tensors .*: lm_head\.weight"):
        build.model(half)
