"""Base against trained model: the losses are those of the trainer, the answers go into run.json, and what is
missing is said.
"""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.core import files
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.evaluation import evaluate as evaluations
from lora_recipes.evaluation.evaluate import evaluation, report
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.resume import differences
from lora_recipes.training.train import train
from tests.typed import there

REPHRASED = "data.eval=data/facts/rephrased.jsonl"
CORRECTED = (
    "The cat sleeps on the",
    "The train goes to",
    "The key lies under the",
    "Every morning Grandma drinks",
)


@pytest.fixture
def outputs(trained, tmp_path) -> Path:
    """A copy of the trained default that a test may write into; its base stays where it was trained."""
    shutil.copytree(trained / "tiny_facts", tmp_path / "tiny_facts")
    return tmp_path


@pytest.fixture(scope="module")
def style(tmp_path_factory) -> Path:
    """The tiny Qwen3.5 with held-out conversations, all in one batch: then the trainer's mean of batches is
    the mean of tokens.
    """
    folder = tmp_path_factory.mktemp("style")
    train(
        resolve(
            recipes.load("tiny_qwen35_style", ["train.max_steps=4", "train.per_device_eval_batch_size=64"]),
            folder,
        ),
    )
    return folder


def texts(name: str) -> list[str]:
    return [
        json.loads(line)["text"]
        for line in (files.ROOT / "data" / "facts" / name).read_text(encoding="utf-8").splitlines()
    ]


def test_the_kept_sentences_are_the_base_s_but_for_the_corrected_ones():
    assert texts("kept.jsonl") == [text for text in texts("base.jsonl") if not text.startswith(CORRECTED)]
    assert len(texts("kept.jsonl")) == 32


def test_held_out_loss_is_the_trainer_s_and_the_base_is_the_model_before(style):
    found = evaluation("tiny_qwen35_style", style)
    held_out, record = (
        found.sets["eval"],
        json.loads((style / "tiny_qwen35_style" / "run.json").read_text()),
    )
    assert held_out.trained.loss == pytest.approx(record["metrics"]["eval_loss"], abs=2e-5)
    assert held_out.tokens == record["plan"]["data"]["eval"]["supervised"] and held_out.rows == 20
    assert held_out.trained.perplexity == pytest.approx(math.exp(held_out.trained.loss))
    assert held_out.base.loss == pytest.approx(math.log(2048), abs=0.2), "random weights know nothing"
    assert found.notes == [] and RunFolder(style / "tiny_qwen35_style").outcome().evaluation == found, (
        "the rows are those of the run"
    )


def test_conversations_are_continued_from_the_prompt_that_a_server_renders(style):
    found = evaluation("tiny_qwen35_style", style).generations
    assert len(found) == 3
    assert all(entry.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") for entry in found)


def test_corrected_facts_hold_in_other_words_and_the_kept_sentences_cost_something(outputs):
    found = evaluation("tiny_facts", outputs, [REPHRASED])
    held_out, kept = found.sets["eval"], found.sets["kept"]
    assert held_out.trained.loss < held_out.base.loss - 1 and (
        held_out.rows,
        held_out.tokens,
    ) == (4, 12)
    assert kept.rows == 32 and kept.trained.loss > kept.base.loss, "what is not trained is forgotten a little"
    assert found.notes == ["the eval rows are not those that the training run evaluated"]
    assert found.generations[0].trained == "sofa." != found.generations[0].base


def test_losses_are_weighted_by_tokens_and_made_without_padding(outputs):
    """Against one forward pass over all rows together, padded, as a trainer would make it."""
    found = evaluation("tiny_facts", outputs).sets["kept"]
    folder = outputs / "tiny_facts" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    batch = tokenizer(
        [text + tokenizer.eos_token for text in texts("kept.jsonl")], return_tensors="pt", padding=True
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def nats(model) -> torch.Tensor:
        with torch.no_grad():
            logits = model.eval()(**batch, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(
            1
        )

    before, after, counts = (
        nats(base),
        nats(PeftModel.from_pretrained(base, folder)),
        (labels[:, 1:] >= 0).sum(1),
    )
    change = (after - before).sum() / counts.sum()
    residuals = after - before - change * counts
    half = 2.042 * residuals.std() / len(counts) ** 0.5 / counts.float().mean()  # Student's t of 30, for 31
    before, after = before.sum() / counts.sum(), after.sum() / counts.sum()
    assert found.base.loss == pytest.approx(before.item(), abs=1e-5)
    assert found.trained.loss == pytest.approx(after.item(), abs=1e-5)
    assert found.half == pytest.approx(half.item(), abs=1e-5)


def test_probes_are_those_of_the_training_run_and_the_rest_of_run_json_stays(outputs):
    before = json.loads((outputs / "tiny_facts" / "run.json").read_text())
    found = evaluation("tiny_facts", outputs)
    for mine, theirs in (("base", "before"), ("trained", "after")):
        ours = [answer.probability for answer in getattr(found.probes, mine)]
        assert ours == pytest.approx([answer["probability"] for answer in before["probes"][theirs]], abs=2e-4)
    after = json.loads((outputs / "tiny_facts" / "run.json").read_text())
    assert {key: value for key, value in after.items() if key != "evaluation"} == before
    said = report(found)
    assert (
        "kept           32" in said
        and "4 of 4 that should change have their answer first" in said
        and "trained  sofa." in said
    )
    assert re.search(r"^kept .* \+0\.\d{4} \+- 0\.\d{4} ", said, re.M)
    assert "95 % interval over the rows" in said


def test_a_change_that_the_rows_do_not_show_is_said_to_be_none(outputs):
    found = evaluation("tiny_facts", outputs, [REPHRASED])
    row = found.sets["kept"]
    sets = {
        "eval": replace(row, half=None, rows=1),
        "kept": replace(row, half=row.trained.loss - row.base.loss + 0.01),
    }
    said = report(replace(found, sets=sets))
    assert re.search(r"^held out .* \(one row\) ", said, re.M)
    assert [
        line.endswith("no difference shown") for line in said.splitlines() if line[:4] in ("held", "kept")
    ] == [
        False,
        True,
    ]


def test_generations_are_greedy(outputs):
    found = evaluation("tiny_facts", outputs).generations
    folder = outputs / "tiny_facts" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    for entry in found:
        ids = tokenizer(entry.prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        while ids[0, -1] != tokenizer.eos_token_id and ids.shape[1] < start + evaluations.LONGEST:
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert entry.trained == str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()


def test_a_whole_model_is_held_against_the_one_it_came_from(trained, tmp_path):
    shutil.copytree(trained / "tiny_base", tmp_path / "tiny_base")
    (tmp_path / "_bases").symlink_to(trained / "_bases")
    found = evaluation("tiny_base", tmp_path, ["data.eval=data/facts/kept.jsonl"])
    assert found.sets["eval"].base.loss > 4 > 0.5 > found.sets["eval"].trained.loss


def test_another_adapter_is_asked_on_the_data_of_a_run_and_its_own_run_json_gets_the_answer(outputs):
    shutil.copytree(outputs / "tiny_facts", outputs / "copy")
    before = (outputs / "tiny_facts" / "run.json").read_text()
    found = evaluation("tiny_facts", outputs, adapter=outputs / "copy" / "adapter")
    assert RunFolder(outputs / "copy").outcome().evaluation == found
    assert (outputs / "tiny_facts" / "run.json").read_text() == before
    (outputs / "copy" / "run.json").unlink()
    assert "no run.json" in evaluation("tiny_facts", outputs, adapter=outputs / "copy" / "adapter").notes[0]
    assert not (outputs / "copy" / "run.json").exists()


def test_other_kept_rows_are_no_other_training(outputs):
    folder = RunFolder(outputs / "tiny_facts")
    assert differences(folder, recipes.load("tiny_facts", ["data.kept=data/facts/base.jsonl"]), {}) == []
    assert differences(folder, recipes.load("tiny_facts", ["data.train=data/facts/base.jsonl"]), {}) != []


# what is missing or wrong


def test_a_run_that_did_not_finish_is_not_evaluated(outputs):
    with pytest.raises(RecipeError, match=r"holds no finished run\n    -> make train RECIPE=nothing"):
        evaluation("nothing", outputs)
    folder = RunFolder(outputs / "tiny_facts")
    folder.write_record(replace(there(folder.run), status="failed"))
    with pytest.raises(RecipeError, match="holds no finished run"):
        evaluation("tiny_facts", outputs)


def test_an_adapter_that_is_gone_or_cut_is_said(outputs):
    file = outputs / "tiny_facts" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RecipeError, match="is truncated"):
        evaluation("tiny_facts", outputs)
    shutil.rmtree(outputs / "tiny_facts" / "adapter")
    with pytest.raises(RecipeError, match=r"adapter: is gone: run.json says that it was trained"):
        evaluation("tiny_facts", outputs)


def test_missing_rows_are_said_and_so_are_rows_that_were_trained_on(outputs):
    with pytest.raises(
        RecipeError, match=r"override 'data.eval=nowhere.jsonl' data.eval: nowhere.jsonl cannot be read"
    ):
        evaluation("tiny_facts", outputs, ["data.eval=nowhere.jsonl"])
    with pytest.raises(
        RecipeError, match=r"data.kept: 8 of its rows were trained on, first data/facts/corrections.jsonl:1"
    ):
        evaluation("tiny_facts", outputs, ["data.kept=data/facts/corrections.jsonl"])
    file = outputs / "tiny_facts" / "recipe.yaml"
    sections = file.read_text().split("probes:")[0].replace("  kept: data/facts/kept.jsonl\n", "")
    file.write_text(sections)
    with pytest.raises(
        RecipeError, match=r"there is nothing to evaluate on: no data.eval, data.kept or probes"
    ):
        evaluation("tiny_facts", outputs)


def test_an_override_that_an_evaluation_would_ignore_is_refused(outputs):
    with pytest.raises(RecipeError, match=r"override 'lora.r=16': would change nothing"):
        evaluation("tiny_facts", outputs, ["lora.r=16"])


def test_a_base_that_is_gone_or_another_one_is_refused(outputs, style):
    file = outputs / "tiny_facts" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/model"}))
    with pytest.raises(
        RecipeError,
        match=r"its base /nowhere/model is not on this machine\n    -> give its folder: BASE=path",
    ):
        evaluation("tiny_facts", outputs)
    other = Path(shutil.copytree(config["base_model_name_or_path"], outputs / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.norm.weight.data += 0.1
    model.save_pretrained(other)
    with pytest.raises(RecipeError, match="was trained on other weights than those in"):
        evaluation("tiny_facts", outputs, base=other)
    with pytest.raises(RecipeError, match="was trained on other weights than those in"):
        evaluation("tiny_facts", outputs, base=style / "_bases" / "tiny_qwen35-float32")


def test_a_combination_has_no_data_of_its_own(outputs):
    (outputs / "tiny_facts" / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match="there is no data to ask on"):
        evaluation("tiny_facts", outputs)


def test_an_adapter_under_the_names_of_the_served_class_does_not_go_on_the_text_model_unnoticed(style):
    """PEFT only warns: the modules would keep their random start, and the figures would be the base's."""
    from lora_recipes.core import adapter_folder
    from lora_recipes.serving import export

    folder = style / "tiny_qwen35_style" / "adapter"
    export.export(adapter_folder.read(folder), style / "_bases" / "tiny_qwen35-float32", style / "serving")
    with pytest.raises(RecipeError, match="does not go on its base whole"):
        evaluation("tiny_qwen35_style", style, adapter=style / "serving")
