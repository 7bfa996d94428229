"""What a run leaves stops where it was trained to: adapter, merged model, whole model, evaluation, the vLLM
command.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_recipes.core import provenance, stops
from lora_recipes.evaluation.evaluate import evaluation, report
from lora_recipes.model.combine import Combination, combine
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import command
from lora_recipes.serving.command import Options
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
