"""How rows become batches: chosen with a reason, and the loss of a step is what it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import RandomSampler
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder, logged
from lora_recipes.data import labels
from lora_recipes.memory import memory
from lora_recipes.model import batching, build
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.cases.families import FAMILIES
from tests.typed import there

# Rows of very unlike lengths, two of them longer than any window below.
LENGTHS = [5, 60, 9, 3, 41, 7]
DENSE = {
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3": {"sliding_window": 8},
    "olmo3": {"sliding_window": 8},
    "gpt2": {},
    "qwen3_moe": {},
}


def small(name: str, fields: dict[str, Any], attention: str) -> Any:
    """The text model of that family, with random weights that tell texts apart."""
    kind, given = FAMILIES[name]
    config = getattr(transformers, kind).config_class(**given).get_text_config()
    for key, value in fields.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


def texts() -> list[dict[str, list[int]]]:
    """Rows in which a prompt of two tokens is not trained."""
    made = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 300, (n,), generator=made).tolist() for n in LENGTHS]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]


def step(model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor, float]:
    """TRL's loss of a batch, its gradient in the first layer, and the load-balancing loss of experts."""
    model.zero_grad()
    routed = hasattr(model.config, "output_router_logits")
    more = {"output_router_logits": True} if routed else {}
    found = model(**batch, use_cache=False, fused_lm_head=True, **more)
    loss = -found.log_probs.sum() / found.label_mask.sum()
    loss.backward()
    first = next(p for n, p in model.named_parameters() if p.dim() > 1 and ".0." in n and p.grad is not None)
    return loss.item(), first.grad.clone(), found.aux_loss.item() if routed else 0.0


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in DENSE for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")],
)
def test_a_flat_row_has_the_loss_and_the_gradient_of_the_padded_rows(name, attention):
    """Also behind sliding windows shorter than the rows. Without positions rows see each other."""
    model = small(name, DENSE[name], attention)
    add_fused_lm_head(model)
    padded, flat = (
        DataCollatorForLanguageModeling(pad_token_id=0, padding_free=free)(texts()) for free in (False, True)
    )
    wanted, found = step(model, padded), step(model, flat)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert (found[1] - wanted[1]).norm() < 1e-4 * wanted[1].norm()
    assert found[2] == pytest.approx(wanted[2], rel=1e-5)
    without = {key: value for key, value in flat.items() if key != "position_ids"}
    assert abs(step(model, without)[0] - wanted[0]) > 1e-3 * wanted[0]


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> Path:
    """Texts for the tiny models, of which one in four is long."""
    folder = tmp_path_factory.mktemp("unlike")
    short, long = (
        "The cat sleeps on the sofa .",
        "The cat sleeps on the sofa . The dog sleeps in the basket . ",
    )
    lines = [json.dumps({"text": long * 4 if i % 4 == 0 else f"{short}"}) for i in range(32)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def words(rows: Path, *more: str) -> list[str]:
    """The overrides of a short run on them."""
    made = [
        f"data.train={rows}",
        f"data.eval={rows}",
        "data.limits={duplicates: 1, train_in_eval: 1, near_in_eval: 1}",
        "train.max_length=128",
        "train.max_steps=6",
        "train.logging_steps=1",
        "train.eval_strategy=steps",
        "train.eval_steps=3",
        "train.save_strategy=steps",
        "train.save_steps=3",
        "train.per_device_eval_batch_size=5",
        *more,
    ]
    return list({word.split("=")[0]: word for word in made}.values())


def resolved(name: str, rows: Path, outputs: Path, *more: str):
    return resolve(recipes.load(name, words(rows, *more)), outputs)


def choice(name: str, rows: Path, outputs: Path, *more: str) -> batching.Batching:
    made = resolved(name, rows, outputs, *more)
    return batching.chosen(made, labels.gate(made, False))


@pytest.fixture(scope="module")
def runs(trained, unlike, tmp_path_factory) -> dict[str, Path]:
    """The same short run with what the plan chooses, and as given."""
    found = {}
    for kind in ("auto", "as_given"):
        outputs = tmp_path_factory.mktemp(kind)
        (outputs / "tiny_base").symlink_to(trained / "tiny_base")
        train(resolved("tiny_facts", unlike, outputs, f"data.batching={kind}"))
        found[kind] = outputs / "tiny_facts"
    return found


def test_a_flattened_run_is_the_padded_one_but_for_its_padding(runs):
    chosen, given = (json.loads((runs[kind] / "run.json").read_text()) for kind in ("auto", "as_given"))
    facts = chosen["plan"]["batching"]
    assert facts["kind"] == "flattened" == chosen["resume_facts"]["batching"]
    assert "Qwen3ForCausalLM under sdpa keeps rows apart" in facts["why"]
    assert facts["padding"] == 0 and facts["before"] == given["plan"]["batching"]["padding"] > 0.4
    assert given["plan"]["batching"]["kind"] == "as given" and "batching" not in given["resume_facts"]
    assert facts["tokens_per_step"] == given["plan"]["batching"]["tokens_per_step"] > 0
    assert chosen["plan"]["steps"] == given["plan"]["steps"] and chosen["steps"] == given["steps"] == 6
    logs = [logged(runs[kind] / "metrics.jsonl") for kind in ("auto", "as_given")]
    for key, count in (("loss", 6), ("grad_norm", 6), ("eval_loss", 2), ("num_tokens", 6)):
        flat, padded = ([log[key] for log in each if key in log][:count] for each in logs)
        assert len(flat) == count and flat == pytest.approx(padded, rel=1e-4), key


def test_the_plan_says_it(trained, unlike):
    text = plan.make(resolved("tiny_facts", unlike, trained)).text()
    line = text[text.index("\nbatching ") :].split("\nwarm-up")[0]
    assert "flattened (train.padding_free): Qwen3ForCausalLM under sdpa keeps rows apart" in line
    assert (
        "padding 0.0% of what is computed, without that 64.8%" in line
        and " tokens a step in the mean" in line
    )


SAID = [
    ("train.padding_free=true train.max_length=null", "as given", "the recipe says train.padding_free"),
    ("train.packing=true", "as given", "the recipe says train.packing"),
    ("train.train_sampling_strategy=random", "as given", "the recipe says train.train_sampling_strategy"),
    ("data.batching=as_given", "as given", "the recipe says data.batching: as_given"),
    ("train.per_device_train_batch_size=1", "padded", "there is little padding"),
    ("train.neftune_noise_alpha=5", "", "NEFTune's noise"),
    ("train.torch_compile=true", "", "it was not tried with train.torch_compile"),
    ("model.attn_implementation=flex_attention", "", "it was not tried under flex_attention"),
    ("model.attn_implementation=eager", "", "eager holds whole score matrices"),
]


@pytest.mark.parametrize(("overrides", "kind", "why"), SAID)
def test_what_the_recipe_says_is_obeyed_and_what_was_not_tried_is_not_flattened(
    trained, unlike, overrides, kind, why
):
    found = choice("tiny_facts", unlike, trained, *overrides.split())
    assert why in found.why and found.kind in ((kind,) if kind else ("padded", "by length"))


def test_virtual_tokens_are_not_flattened_nor_what_is_not_counted(trained, unlike):
    assert "virtual tokens" in choice("tiny_prompt_tuning", unlike, trained).why
    found = batching.chosen(resolved("tiny_facts", unlike, trained), None)
    assert found.kind == "as given" and not found.fields


def test_rows_whose_scores_cost_more_than_their_padding_stay_padded(trained):
    made = resolve(recipes.load("tiny_facts"), trained)
    found = batching.chosen(made, labels.gate(made, False))
    assert found.kind == "padded" and "cost more than the padding" in found.why


def test_the_rehearsal_is_of_what_will_run(trained, unlike):
    made = resolved("tiny_facts", unlike, trained)
    rows = labels.gate(made, False)
    setup = memory.of_recipe(made, rows, cuda=False)
    arguments: Any = setup.arguments
    assert arguments.padding_free and setup.batch.packed and setup.batch.rows == 1
    lengths = sorted(rows.train.lengths.tolist())[-made.recipe.train.per_device_train_batch_size :]
    assert setup.batch.width == sum(lengths)
    held_out = there(setup.evaluation)
    assert held_out.padded and not held_out.packed and held_out.rows == 5


def built(made, folder: Path, batches: batching.Batching) -> SFTTrainer:
    """The trainer of that recipe, before its first step."""
    rows, arguments = labels.gate(made, False), build.sft_config(made.recipe, RunFolder(folder), batches)
    base = build.model(made)
    return build.trainer(made, arguments, base, rows.tokenizer, rows.train, rows.evaluation, [])[0]


def test_an_evaluation_is_padded_unless_the_recipe_packs_it(trained, unlike, tmp_path):
    packs = "train.packing=true"
    for more, flat in (([], False), ([packs], False), ([packs, "train.eval_packing=true"], True)):
        made = resolved("tiny_facts", unlike, trained, *more)
        chosen = batching.chosen(made, labels.gate(made, False))
        trainer = built(made, tmp_path, chosen)
        assert "position_ids" in next(iter(trainer.get_train_dataloader()))
        batch = next(iter(trainer.get_eval_dataloader()))
        assert ("position_ids" in batch) == flat and (flat or len(batch["input_ids"]) == 5)


def test_a_hybrid_model_is_never_flattened_and_its_order_is_the_same_wherever_it_is_asked(
    trained, unlike, tmp_path
):
    made = resolved("tiny_qwen35_style", unlike, tmp_path, "data.format=text", "train.max_steps=2")
    build.random_base(made)
    chosen = batching.chosen(made, labels.gate(made, False))
    assert chosen.kind == "by length" and "does not keep rows apart" in chosen.why
    assert there(chosen.padding) < there(chosen.before) - batching.GAIN
    orders = []
    for seed, epoch in ((1, 0), (2, 0), (1, 1)):
        trainer = built(made, tmp_path, chosen)
        torch.manual_seed(seed)
        loader: Any = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        orders.append([batch["input_ids"].tolist() for batch in loader])
    assert orders[0] == orders[1] != orders[2]
    assert isinstance(built(made, tmp_path, batching.AS_GIVEN)._get_train_sampler(), RandomSampler)


def test_a_run_goes_on_only_with_the_batches_that_it_began_with(runs, unlike):
    """Chosen otherwise by another library, or on another machine."""
    outputs = runs["auto"].parent
    record = runs["auto"] / "run.json"
    told = json.loads(record.read_text())
    told["status"], told["resume_facts"]["batching"] = "failed", "by length"
    assert (runs["auto"] / "checkpoints").is_dir()
    kept = record.read_text()
    record.write_text(json.dumps(told))
    with pytest.raises(RecipeError, match="batching: the run began with by length, now it is flattened"):
        train(resolved("tiny_facts", unlike, outputs), resume=True)
    record.write_text(kept)
