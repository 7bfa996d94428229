"""Everything once more on a real language model (SmolLM2-135M): what was shown on tiny random weights holds
with a real vocabulary, 30 layers and weights that mean something.
"""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lora_recipes.ablation import spec
from lora_recipes.ablation.ablate import ablate
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import gate
from lora_recipes.data.render import IGNORED
from lora_recipes.model import build
from lora_recipes.planning import plan
from lora_recipes.training.train import train
from tests.cases.real import NAME, ROWS, STEPS
from tests.process import Forked, together
from tests.typed import there

pytestmark = pytest.mark.real

ADAPTER = Path("adapter") / "adapter_model.safetensors"


def logs(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_what_was_planned_is_what_the_run_did(smollm2, kind):
    run = smollm2.run(kind)
    facts = plan.make(smollm2.resolved(kind)).facts
    tensors, done = load_file(run / ADAPTER), there(RunFolder(run).run)
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    by_hand = 30 * sum(8 * sum(shape) for shape in shapes.values())
    assert facts.model.trainable == by_hand == sum(t.numel() for t in tensors.values())
    assert there(facts.adapter).bytes == sum(t.nbytes for t in tensors.values())
    assert len(tensors) == 2 * 7 * 30 and all(t.any() and t.isfinite().all() for t in tensors.values())
    trained = [log for log in logs(run) if "loss" in log]
    assert there(facts.steps).total == STEPS == len(trained) and done.status == "finished"
    assert facts.data.train.rows == ROWS and facts.data.train.truncated == 0
    # TRL counts what it was given, batch by batch: one epoch is every token of the rows
    assert facts.data.train.tokens == trained[-1]["num_tokens"]
    assert facts.data.train.faithful == facts.data.train.turns == ROWS
    assert trained[0]["loss"] == pytest.approx(trained[1]["loss"], abs=2.5) and trained[0]["loss"] < 5


@pytest.fixture(scope="module")
def trainer(smollm2, tmp_path_factory) -> SFTTrainer:
    """The trainer of a short run, before its first step."""
    all_at_once = f"train.per_device_train_batch_size={ROWS}"
    return made(smollm2, tmp_path_factory.mktemp("trainer"), all_at_once)


def made(smollm2, folder: Path, *words: str) -> SFTTrainer:
    resolved = smollm2.resolved("float32", *words)
    rows, arguments = gate.pass_through(resolved, False), build.sft_config(resolved.recipe, RunFolder(folder))
    return build.trainer(
        resolved, arguments, build.model(resolved), rows.tokenizer, rows.train, None, [], total_step=STEPS
    )[0]


def test_the_batches_are_those_that_trl_makes_of_the_rows_itself(smollm2, trainer, tmp_path):
    """Tokens, labels and padding, from the conversations on. Which token pads is each trainer's own: of the
    lowest transformers' tokenizer TRL takes another one.
    """
    base = smollm2.base("float32")
    rows = [json.loads(line) for line in (smollm2.folder / "train.jsonl").read_text().splitlines()]
    options: dict[str, Any] = {"max_length": 80, "per_device_train_batch_size": ROWS, "seed": 42}
    theirs = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options),
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    ours, expected = (next(iter(made.get_train_dataloader())) for made in (trainer, theirs))
    assert ours["input_ids"].shape[0] == ROWS and set(ours) == set(expected)
    real = expected["attention_mask"].bool()
    for key, tensor in expected.items():
        same = (ours[key][real], tensor[real]) if key == "input_ids" else (ours[key], tensor)
        assert torch.equal(*same), key
    supervised = ours["labels"] != IGNORED
    assert 0 < supervised.sum() < ours["attention_mask"].sum()


def test_packed_and_flattened_rows_have_the_loss_that_each_has_alone(smollm2, trainer, tmp_path):
    """With sdpa and with eager: both keep the rows of a pack apart by their position_ids. Without those they
    see each other, and that is far more than the noise.
    """
    packing = made(smollm2, tmp_path, "train.packing=true", "train.max_length=160")
    rows = list(there(trainer.train_dataset))
    packs = [packing.data_collator([row]) for row in there(packing.train_dataset)]
    assert len(packs) < len(rows)
    alone = [trainer.data_collator([row]) for row in rows]
    padded, flat = [trainer.data_collator(rows)], [packing.data_collator(rows)]
    assert flat[0]["input_ids"].shape[0] == 1 and "attention_mask" not in flat[0]

    def losses(batches: list[dict], attention: str) -> float:
        """The mean over all trained tokens, by the trainer's own loss."""
        model: Any = there(packing.model).eval()
        model.get_base_model().set_attn_implementation(attention)
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        with torch.no_grad():
            found = [float(packing.compute_loss(model, dict(batch)).double()) for batch in batches]
        return sum(x * n for x, n in zip(found, counts, strict=True)) / sum(counts)

    for attention in ("sdpa", "eager"):
        expected = losses(alone, attention)
        noise = max(abs(losses(padded, attention) - expected), 1e-6)
        for kind in (packs, flat):
            assert abs(losses(kind, attention) - expected) <= 4 * noise < 1e-4, attention
        seen = [{k: v for k, v in pack.items() if k != "position_ids"} for pack in packs]
        assert abs(losses(seen, attention) - expected) > 1e-3, "rows that see each other"


def test_a_run_killed_and_resumed_is_bit_for_bit_the_uninterrupted_one(smollm2, tmp_path):
    whole = smollm2.run("float32")
    resolved = smollm2.resolved("float32", "data.eval=null", outputs=tmp_path / "killed")
    words = (
        "train",
        NAME,
        *smollm2.words("float32", "data.eval=null"),
        "--outputs",
        str(tmp_path / "killed"),
    )
    process = Forked(words, tmp_path)
    run = tmp_path / "killed" / NAME
    until = time.monotonic() + 900
    while not (run / "checkpoints" / "checkpoint-1" / "SHA256SUMS").is_file():
        assert process.poll() is None and time.monotonic() < until, "no checkpoint was seen"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "adapter").exists() and not (run / "checkpoints" / f"checkpoint-{STEPS}").exists()
    train(resolved, resume=True)
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert [log["loss"] for log in logs(run) if "loss" in log] == [
        log["loss"] for log in logs(whole) if "loss" in log
    ]


def test_two_processes_train_what_one_trains_with_the_same_examples_a_step(smollm2, tmp_path):
    smollm2.resolved("float32", outputs=tmp_path)
    words = ["train.gradient_accumulation_steps=1", "train.save_strategy='no'", "data.eval=null"]
    words = smollm2.words("float32", *words)
    for done in together(2, "train", NAME, *words, "--outputs", str(tmp_path)):
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / NAME / "run.json").read_text())["hardware"]["processes"] == 2
    one, two = load_file(smollm2.run("float32") / ADAPTER), load_file(tmp_path / NAME / ADAPTER)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_arms_of_an_ablation_are_the_runs_alone(smollm2, tmp_path):
    """They share rows and base in one process."""
    smollm2.resolved("float32", outputs=tmp_path)
    text = ["# Which rank?", f"recipe: {NAME}", "seeds: [42]", "arms:"]
    for name in ("float32", "narrow"):
        words = [json.dumps(word) for word in smollm2.words(name, "data.eval=null")]
        text.append(f"  {name}: [{', '.join(words)}]")
    (tmp_path / "ranks.yaml").write_text("\n".join(text) + "\n")
    assert ablate(spec.load(str(tmp_path / "ranks.yaml")), tmp_path) == 0
    for name, numbers in (("float32", 2_442_240), ("narrow", 2_442_240 // 2)):
        arm, alone = tmp_path / "ablations" / "ranks" / name / "s42" / ADAPTER, smollm2.run(name) / ADAPTER
        assert sum(t.numel() for t in load_file(arm).values()) == numbers
        assert arm.read_bytes() == alone.read_bytes()
