"""What a run leaves is what was trained, and stops where it was trained to: adapter, merged model, whole
model, evaluation, the vLLM command.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_recipes.core import provenance, stops
from lora_recipes.core.errors import RecipeError
from lora_recipes.evaluation.evaluate import evaluation, report
from lora_recipes.model.combine import Combination, combine
from lora_recipes.model.initialise import Start
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import command
from lora_recipes.serving.command import Options
from lora_recipes.training import verify
from lora_recipes.training.train import train
from tests.typed import there

QUESTION = [{"role": "user", "content": "Where is the cat?"}]


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory) -> Path:
    """The outputs of eos_proof, with no train.eos_token: the end is the template's; merged."""
    cases, folder = Path(__file__).parents[1] / "cases", tmp_path_factory.mktemp("stops")
    for name in "eos_proof.yaml", "rows.jsonl":
        (folder / name).write_text((cases / name).read_text())
    words = [f"model.name_or_path={bases('qwen_base')}", "train.eos_token=null", "train.max_steps=60"]
    recipe = recipes.load(
        str(folder / "eos_proof.yaml"), [*words, "data.eval=rows.jsonl", "data.limits={train_in_eval: 1}"]
    )
    done = train(resolve(recipe, folder))
    assert there(done.plan.stops).stops == ["<|im_end|>", "<|endoftext|>"]
    merge(folder / "eos_proof" / "adapter", folder / "eos_proof" / "merged")
    return folder / "eos_proof"


def eos(folder: Path):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_adapter_and_merged_model_stop_at_the_same_token(made, bases):
    tokenizer = AutoTokenizer.from_pretrained(made / "adapter")
    ends: Any = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert eos(made / "adapter") == eos(made / "merged") == ends and eos(bases("qwen_base")) == ends[1]
    for folder in made / "adapter", made / "merged":
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    known = there(provenance.read(made / "merged"))
    assert known.stops == {ends[0]: "<|im_end|>"} and there(known.question).ended


def test_the_merged_model_ends_its_answer_by_itself_and_with_the_base_s_file_it_runs_on(made, bases):
    tokenizer = AutoTokenizer.from_pretrained(made / "merged")
    model: Any = AutoModelForCausalLM.from_pretrained(made / "merged")
    ids: Any = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def tokens(**options) -> int:
        with torch.no_grad():
            written = model.generate(**ids, max_new_tokens=60, do_sample=False, **options)
        return written.shape[1] - ids["input_ids"].shape[1]

    assert tokens() < 20
    assert tokens(generation_config=GenerationConfig.from_pretrained(bases("qwen_base"))) == 60


def test_an_evaluation_stops_both_sides_there_and_says_which_ended(made):
    found = evaluation("eos_proof", made.parent)
    assert [g.trained_ended for g in found.generations] == [True] * len(found.generations)
    assert (
        not any(g.base_ended for g in found.generations) and "<|im_end|>" not in found.generations[0].trained
    )
    assert report(found).count("[no end within 64 tokens]") == len(found.generations)


def test_vllm_is_told_where_the_adapter_stops_and_nothing_of_the_merged_model(made):
    def words(name, folder):
        options = Options(outputs=made.parent, port=8123)
        return command.prepare({name: folder}, None, options, ("vllm", "0.32.0"))

    server = words("eos_proof", made / "adapter")
    folder = Path(server.command[server.command.index("--generation-config") + 1])
    assert eos(folder) == eos(made / "adapter")
    assert any("<|im_end|> (902) too, as eos_proof was trained" in note for note in server.notes)
    other = shutil.copytree(made / "adapter", made.parent / "from_elsewhere")
    (other / "generation_config.json").unlink()  # it has a tokenizer only
    assert stops.of_adapter(other, server.base) == eos(folder)[:1]
    assert "--generation-config" not in words("merged", made / "merged").command


def one_byte(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def tensors(change) -> Any:
    def make(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change({n: t.clone() for n, t in load_file(file).items()}), file)

    return make


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def rank(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 5}))


A, B = (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in (0, 1))
WRITES = {
    "one bit": (one_byte, "is another"),
    "two tensors exchanged": (tensors(lambda t: t | {A: t[B], B: t[A]}), f"{A} is another"),
    "another dtype": (tensors(lambda t: t | {A: t[A].bfloat16()}), f"{A} is another"),
    "a tensor missing": (tensors(lambda t: {n: x for n, x in t.items() if n != A}), f"{A} is missing"),
    "a tensor too many": (tensors(lambda t: t | {"more": t[A].clone()}), "more is nothing of the model's"),
    "cut short": (cut, "cannot be read back: SafetensorError"),
    "the config": (rank, "adapter_config.json lora_alpha is 5, was 8"),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], r".*\.(q|v)_proj"])
def test_a_saved_adapter_that_is_not_what_the_model_holds_is_named(bases, tmp_path, name, target_modules):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases("qwen_base")), config)
    model.save_pretrained(str(tmp_path))
    assert verify.written(model, tmp_path, None) == []
    spoil, said = WRITES[name]
    spoil(tmp_path)
    assert any(said in line for line in verify.written(model, tmp_path, None))


@pytest.mark.parametrize("lora", [{}, {"init_lora_weights": "olora"}])
def test_a_run_whose_adapter_was_written_wrongly_ends_without_one(trained, tmp_path, monkeypatch, lora):
    shutil.copytree(trained / "tiny_base", tmp_path / "tiny_base")
    convert = Start.convert

    def spoilt(self, model, folder):
        convert(self, model, folder)
        one_byte(folder)

    monkeypatch.setattr(Start, "convert", spoilt)
    words = ["train.max_steps=2", *(f"lora.{key}={value}" for key, value in lora.items())]
    with pytest.raises(RecipeError, match=r"was not written as it was trained: .* is another"):
        train(resolve(recipes.load("tiny_facts", words), tmp_path))
    assert not (tmp_path / "tiny_facts" / "adapter").exists()
    assert json.loads((tmp_path / "tiny_facts" / "run.json").read_text())["status"] == "failed"


def test_a_combination_stops_where_its_adapters_do(made):
    adapter = made / "adapter"
    combine(["eos_proof"], Combination([0.5], "linear"), "mix", made.parent)
    assert eos(made.parent / "mix" / "adapter") == eos(adapter)


def test_a_whole_model_too_though_its_base_s_file_is_one_that_transformers_does_not_save(
    case, tmp_path, bases
):
    base = shutil.copytree(bases("qwen_base"), tmp_path / "base")
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6, "do_sample": False}))
    path = case("qwen_base_eos", model__name_or_path=str(base), train__max_steps=1)
    sections = yaml.safe_load(path.read_text())
    del sections["lora"]
    path.write_text(yaml.safe_dump(sections | {"full": {}}))
    train(resolve(recipes.load(str(path)), tmp_path))
    said = json.loads((tmp_path / "qwen_base_eos" / "model" / "generation_config.json").read_text())
    assert len(said["eos_token_id"]) == 2 and said["temperature"] == 0.6
