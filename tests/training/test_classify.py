"""task: classify from end to end, as a person runs it: train, resume, evaluate, predict, merge, serve."""

import contextlib
import io
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_recipes.__main__ import main
from lora_recipes.core import adapter_folder, provenance, weights
from lora_recipes.core import head as heads_file
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.record import FinishedRun
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import labels
from lora_recipes.evaluation import classify
from lora_recipes.memory import memory
from lora_recipes.memory.storages import Storages
from lora_recipes.model import attach, build, heads, stored
from lora_recipes.model import merge as merging
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import command, live
from lora_recipes.serving.endpoint import Endpoint
from lora_recipes.training.train import train
from tests.process import together

SHORT = ["train.num_train_epochs=1", "train.eval_strategy=steps", "train.save_strategy=steps"]
SHORT += ["train.eval_steps=20", "train.save_steps=20", "train.save_total_limit=4"]
TEXTS = ["rm -rf build", 'echo "rm -rf build"', "sudo cat notes.md", "curl -s https://example.org/x"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    train(resolve(recipes.load("tiny_classify", SHORT), folder))
    return folder


@pytest.fixture(scope="module")
def run(outputs) -> FinishedRun:
    found = RunFolder(outputs / "tiny_classify").run
    assert isinstance(found, FinishedRun)
    return found


def lines(words: list[str]) -> list[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(words) == 0
    return said.getvalue().splitlines()


def test_it_learns_and_the_record_says_how_well(run, outputs):
    assert run.scores and run.plan.head
    assert run.scores.rows == 245 and run.scores.majority == pytest.approx(1 / 7)
    assert run.scores.macro_f1 > 0.3
    assert run.metrics["eval_macro_f1"] == pytest.approx(run.scores.macro_f1, abs=0.01)
    assert run.metrics["eval_loss"] == pytest.approx(run.scores.loss, abs=0.001)
    assert run.plan.model.trainable == 2 * 2 * 16 * (64 + 64) + 7 * 64  # q and v of two layers, the head
    assert (outputs / "tiny_classify" / "confusion.png").is_file()
    assert [c.name for c in run.plan.head.classes] == [c.name for c in run.scores.classes]


def test_the_head_is_saved_with_the_adapter_and_comes_back(run, outputs):
    folder = outputs / "tiny_classify" / "adapter"
    saved = load_file(folder / "adapter_model.safetensors")
    score = saved["base_model.model.score.weight"]
    assert score.shape == (7, 64)
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    model, tokenizer, head = attach.classifier(folder)
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight.cpu(), score)
    assert head.labels == [c.name for c in run.scores.classes] and head.pooling == "mean"
    again = classify.evaluation(RunFolder(outputs / "tiny_classify"), _asked(outputs), None, None)
    assert again.confusion == run.scores.confusion
    assert again.loss == pytest.approx(run.scores.loss, abs=1e-5)
    untouched, _, _ = attach.classifier(folder)
    untouched.base_model.model.score.modules_to_save["default"].weight.data.normal_()  # as of a fresh head
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert not torch.allclose(heads.logits(untouched, tokenizer, rows), heads.logits(model, tokenizer, rows))


def _asked(outputs: Path):
    return replace(recipes.load(str(outputs / "tiny_classify" / "recipe.yaml")), name="tiny_classify")


def test_the_best_checkpoint_is_what_is_kept(run, outputs):
    logs = [
        json.loads(text) for text in (outputs / "tiny_classify" / "metrics.jsonl").read_text().splitlines()
    ]
    measured = {log["step"]: log["eval_macro_f1"] for log in logs if "eval_macro_f1" in log}
    assert len(measured) == 3
    best = max(measured, key=lambda step: measured[step])
    folder = outputs / "tiny_classify"
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    checkpoint = load_file(folder / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], checkpoint[name]) for name in checkpoint)


def test_a_resumed_run_is_the_same_bit_for_bit_and_other_classes_are_refused(outputs, tmp_path):
    target = tmp_path / "tiny_classify"
    shutil.copytree(outputs / "tiny_classify", target)
    for name in ("checkpoint-40", "checkpoint-46"):
        shutil.rmtree(target / "checkpoints" / name)
    shutil.rmtree(target / "adapter")
    record = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(record | {"status": "running"}))
    other = "classify.labels=[read, nothing, write, process, network, delete, privilege]"
    with pytest.raises(RecipeError, match=r"classify\.labels: the run began with"):
        train(resolve(recipes.load("tiny_classify", [*SHORT, other]), tmp_path), resume=True)
    train(resolve(recipes.load("tiny_classify", SHORT), tmp_path), resume=True)
    once, again = (
        load_file(folder / "tiny_classify" / "adapter" / "adapter_model.safetensors")
        for folder in (outputs, tmp_path)
    )
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_label_file_in_another_order_is_refused(outputs, tmp_path):
    folder = outputs / "tiny_classify" / "adapter"
    file, names = tmp_path / "classes.txt", heads_file.needed(folder).labels
    file.write_text("\n".join([names[1], names[0], *names[2:]]))
    with pytest.raises(
        RecipeError, match=r"in another order than in .*: number 1 is 'read' here, 'nothing' there"
    ):
        list(classify.predict(folder, iter(["ls"]), False, file=file))
    file.write_text("\n".join(names[:-1]))
    with pytest.raises(RecipeError, match=r"6 classes .*, the head in .* has 7"):
        list(classify.predict(folder, iter(["ls"]), False, file=file))


def test_predict_and_the_merged_folder_say_what_the_adapter_says(outputs, tmp_path):
    words = ["--outputs", str(outputs)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    given = ["predict", "tiny_classify", "--file", str(tmp_path / "in.jsonl"), *words]
    found = [json.loads(line) for line in lines(given)]
    assert [row["text"] for row in found] == TEXTS
    for row in found:
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    lines(["merge", "tiny_classify", *words])
    merged = outputs / "tiny_classify" / "merged"
    again = [json.loads(line) for line in lines(["predict", str(merged), *given[2:]])]
    for one, other in zip(found, again, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    theirs = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert theirs.config.id2label[6] == "privilege"
    tokenizer, head = AutoTokenizer.from_pretrained(merged), heads_file.needed(merged)
    last = attach.merged(merged, replace(head, pooling="last"))
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = last(**batch).logits
        torch.testing.assert_close(theirs(**batch).logits, wanted)
    assert "pools the last token" in merging.report(json.loads((merged / "merge.json").read_text()), merged)


def test_a_changed_head_is_not_merged(outputs, tmp_path):
    target = tmp_path / "tiny_classify"
    shutil.copytree(outputs / "tiny_classify", target, ignore=shutil.ignore_patterns("merged"))
    file = target / "adapter" / "labels.json"
    file.write_text(file.read_text().replace('"mean"', '"last"'))
    assert main(["merge", "tiny_classify", "--outputs", str(tmp_path)]) == 2
    assert not (target / "merged").exists()


@pytest.fixture(scope="module", params=["float32", "bfloat16", "nf4"])
def merged(request, outputs, tmp_path_factory) -> Path:
    """A run, merged: in float32, in bfloat16, and trained in 4 bits."""
    if request.param == "float32":
        folder = outputs
    else:
        folder = tmp_path_factory.mktemp(request.param)
        word = "model.quantize=nf4" if request.param == "nf4" else "model.dtype=bfloat16"
        train(resolve(recipes.load("tiny_classify", [*SHORT, word]), folder))
    lines(["merge", "tiny_classify", "--outputs", str(folder), "--force"])
    return folder / "tiny_classify"


def test_a_merged_classifier_is_base_and_adapter_tensor_by_tensor(merged):
    said = json.loads((merged / "merged" / "merge.json").read_text())
    assert (
        said["tensors_computed"] == 5 and said["tensors_not_compared"] == []
    )  # q, v of two layers, the head
    assert said["architecture"] == "Qwen3ForSequenceClassification" and said["greedy_total"] == 0
    assert said["recorded"]["merged"] <= said["recorded"]["allowed"] < said["recorded"]["effect"]
    assert load_file(merged / "merged" / "model.safetensors")["score.weight"].dtype == getattr(
        torch, said["dtype"]
    )


@pytest.mark.parametrize("wrong", ["a module unmerged", "another scaling", "classes in another order"])
def test_a_stored_tensor_that_is_not_base_and_adapter_is_named(merged, wrong, tmp_path):
    adapter, known = adapter_folder.read(merged / "adapter"), provenance.read(merged / "adapter")
    assert known
    job = merging.Job(adapter, known, Path(known.name_or_path), "", head=heads_file.needed(adapter.path))
    packed = stored.dequantised(merging._trained(job)) if known.quantize else {}
    attached = merging._attach(merging._load(job.source, "float32", job), job)
    changes, names = stored.changes(attached, adapter), [f"{name}.weight" for name in adapter.modules]
    base, tensors = weights.tensors(job.source), load_file(merged / "merged" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    was = packed.get(name.removesuffix(".weight"), base[name].tensor()).float()
    changed = {
        "a module unmerged": {name: was},
        "another scaling": {name: was + 0.5 * (tensors[name].float() - was)},
        "classes in another order": {"score.weight": tensors["score.weight"].roll(1, 0)},
    }[wrong]
    save_file(
        tensors | {key: value.to(tensors[key].dtype) for key, value in changed.items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(RecipeError, match=f"is not base .* adapter: {next(iter(changed))} is off by"):
        stored.check(adapter, job.source, tmp_path, changes, [*names, "score.weight"], packed)
    good = stored.check(adapter, job.source, merged / "merged", changes, [*names, "score.weight"], packed)
    assert good["tensors_computed"] == 5


def test_an_adapter_whose_classes_changed_places_answers_otherwise(merged, tmp_path):
    """Also where its hashes do not tell."""
    target = tmp_path / "adapter"
    shutil.copytree(merged / "adapter", target)
    file, known = target / "adapter_model.safetensors", provenance.read(target)
    assert known
    replace(known, files={}).save(target)
    tensors = load_file(file)
    name = "base_model.model.score.weight"
    save_file(tensors | {name: tensors[name].roll(1, 0).contiguous()}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match="the saved adapter answers otherwise than training recorded"):
        merging.merge(target, tmp_path / "merged", unproven=True)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_rounding_of_16_bits_is_no_other_classifier(outputs, tmp_path, dtype):
    said = merging.merge(outputs / "tiny_classify" / "adapter", tmp_path / "merged", dtype=dtype)
    assert 0 < said["lost_in_rounding"] < 0.1 and said["noise"]["logit_max"] > 0
    known = provenance.read(tmp_path / "merged")
    assert known and known.apart > 0


def test_a_server_is_held_against_what_it_computes_in(outputs):
    """Twice what the merged model itself departs by in its dtype is no fault, nor is it one by which another
    pooling, order or base would pass."""

    def proof(apart: float, merged: float = 0.0) -> live.Proof:
        return live.Proof("x", moved=0.5, effect=0.5, noise=0.0, share=0.01, apart=apart, merged=merged)

    assert proof(0.06, 0.03).fault is None
    assert "at most 0.0500 allowed" in str(proof(0.06).fault)
    assert "not what was trained" in str(proof(0.5, 0.03).fault)
    assert "so near the adapter's effect" in live.table([proof(0.4, 0.2)])
    known = provenance.read(outputs / "tiny_classify" / "adapter")
    assert known
    with pytest.raises(RecipeError, match="not proven: training recorded no text"):
        live.classified(Endpoint("http://127.0.0.1:1"), "x", replace(known, called=[]))


def test_a_classifier_is_served_merged_with_its_own_pooling(outputs):
    served = {"tiny": outputs / "tiny_classify" / "adapter"}
    lines(["merge", "tiny_classify", "--outputs", str(outputs), "--force"])
    server = command.prepare(served, None, command.Options(outputs=outputs), ("vllm", "0.32.0"))
    assert server.served[0].path == outputs / "tiny_classify" / "merged"
    at = server.command.index("--pooler-config")
    assert json.loads(server.command[at + 1]) == {"seq_pooling_type": "MEAN", "use_activation": True}
    assert "--enable-lora" not in server.command


def test_an_ablation_compares_classifiers_by_their_scores(outputs, tmp_path, capsys):
    (tmp_path / "_bases").symlink_to(outputs / "_bases") if (outputs / "_bases").is_dir() else None
    few = ["max_steps=8", "eval_strategy=steps", "save_strategy=steps", "eval_steps=4", "save_steps=4"]
    words = ["ablate", "tiny_classify", "lora.r=2,4", *(f"train.{each}" for each in few)]
    assert main([*words, "--seeds", "1", "2", "--outputs", str(tmp_path)]) == 0
    folder = tmp_path / "ablations" / "tiny_classify-r"
    said = json.loads((folder / "report.json").read_text())
    assert said["kind"] == "macro_f1" and set(said["arms"]) == {"r2", "r4"}

    def scored(name: str, seed: int) -> float:
        run = RunFolder(folder / name / f"s{seed}").run
        assert run and run.scores
        return run.scores.macro_f1

    runs = {name: [scored(name, seed) for seed in (1, 2)] for name in said["arms"]}
    for name, arm in said["arms"].items():
        assert arm["scores"] == dict(zip("12", runs[name], strict=True))
        assert arm["score"]["half"] > 0 and arm["accuracy"]["seeds"] == 2
    apart = [b - a for a, b in zip(*runs.values(), strict=True)]
    assert said["arms"]["r4"]["difference"]["mean"] == pytest.approx(sum(apart) / 2)
    best = max(said["arms"], key=lambda name: said["arms"][name]["score"]["mean"])
    assert f"Highest macro F1: {best}, " in capsys.readouterr().out
    assert (folder / "curves.png").is_file()


def test_a_classifier_is_published_with_its_labels(outputs, capsys):
    assert main(["push", "tiny_classify", "--repo", "me/x", "--dry-run", "--outputs", str(outputs)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("labels.json", "adapter_model.safetensors", "recipe.yaml"))
    card = (outputs / "tiny_classify" / "adapter" / "README.md").read_text()
    assert "text-classification" in card and "privilege; pooling mean" in card


@pytest.mark.slow
def test_two_processes_train_bit_for_bit_what_one_trains_with_the_same_rows_a_step(outputs, tmp_path):
    sections = yaml.safe_load(recipes.load("tiny_classify").to_yaml())
    del sections["early_stopping"], sections["train"]["metric_for_best_model"]
    sections["train"] |= {"per_device_train_batch_size": 8, "max_steps": 4}
    sections["train"] |= {"eval_strategy": "no", "save_strategy": "no"}
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(sections))
    for done in together(2, "train", str(path), "--outputs", str(tmp_path / "two")):
        assert done.returncode == 0, done.stderr[-3000:]
    words = ["train.gradient_accumulation_steps=2"]
    one = train(resolve(recipes.load(str(path), words), tmp_path / "one"))
    two = RunFolder(tmp_path / "two" / "pair").run
    file = Path("pair", "adapter", "adapter_model.safetensors")
    mine, theirs = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert two and two.scores == one.scores and two.plan.layout.processes == 2


def test_trls_keys_are_refused_by_the_plan(tmp_path):
    from lora_recipes.planning import plan

    recipe = recipes.load("tiny_classify", ["train.packing=true", "train.assistant_only_loss=true"])
    with pytest.raises(RecipeError) as raised:
        plan.make(resolve(recipe, tmp_path))
    assert "train.packing: is TRL's" in str(raised.value)
    assert "train.assistant_only_loss: is TRL's" in str(raised.value)


@pytest.mark.parametrize(
    "words", [[], ["train.gradient_checkpointing=true"], ["model.quantize=nf4"]], ids=str
)
def test_the_planned_peak_is_that_of_a_real_run(words, outputs):
    recipe = recipes.load("tiny_classify", [*words, "train.max_steps=2"])
    quick = {"eval_strategy": "no", "save_strategy": "no"}
    sections = recipe.sections | {"train": recipe.train.given | quick}
    del sections["early_stopping"]
    recipe = replace(recipe, sections=sections)
    resolved = resolve(recipe, outputs)
    rows = labels.pass_through(resolved, False)
    longest = sorted(rows.train, key=lambda example: -len(example.input_ids))[:16]
    rows.train = labels.Texts(longest, [len(example.input_ids) for example in longest], "")
    planned = memory.rehearsed(memory.of_recipe(resolved, rows, cuda=False))
    arguments = build.sft_config(recipe, RunFolder(outputs / "tracked"))
    trainer, counted = heads.trainer(resolved, arguments, build.model(resolved), rows, []), Storages()
    model = trainer.model
    assert model is not None
    counted.add([*model.parameters(), *model.buffers()], "model")
    for module in model.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            counted.add([state.absmax, state.code, *nested], "model")
    counted.stretch = ("all", 0)
    with counted:
        trainer.train()
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.peak_bytes == pytest.approx(counted.peaks["all", 0].total, rel=0.03)


def test_the_shipped_recipes_reach_both_kinds_of_layer():
    from lora_recipes.planning import plan

    made = plan.make(resolve(recipes.load("qwen35_9b_classify"), Path("nowhere")))
    kinds = {c.kind: c.adapted for c in made.facts.coverage or []}
    assert kinds["full_attention"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert len(kinds["linear_attention"]) == 3
    attention = 8 * 16 * ((4096 + 8192) + (4096 + 1024))  # q, which carries the gate, and v
    linear = 24 * 16 * ((4096 + 8192) + 2 * (4096 + 4096))  # in_proj_qkv, in_proj_z and out_proj
    assert made.facts.model.trainable == attention + linear + 7 * 4096 == 13_266_944


@pytest.mark.vllm
def test_vllms_probabilities_are_ours(outputs, quick_vllm):
    from lora_recipes.serving import server as process

    lines(["merge", "tiny_classify", "--outputs", str(outputs), "--force"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = command.Options(port=port, outputs=outputs)
    built = command.vllm()
    assert built
    server = command.prepare({"tiny": outputs / "tiny_classify" / "adapter"}, None, options, built)
    ours = [
        json.loads(line)
        for line in classify.predict(outputs / "tiny_classify" / "adapter", iter(TEXTS), False)
    ]
    with process.running(server, options, outputs / "vllm.log"):
        endpoint, known = Endpoint(options.url, timeout=process.START), server.served[0].provenance
        served = [endpoint.shares("tiny", text) for text in TEXTS]
        assert known
        proof = live.classified(endpoint, "tiny", known)
    for one, other in zip(ours, served, strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(other, abs=1e-3)
    assert proof.fault is None and proof.share is not None and proof.share < 1e-3
    assert "live; a probability differs by" in live.table([proof])


def test_the_recipe_is_kept_with_its_task(outputs):
    kept = (outputs / "tiny_classify" / "recipe.yaml").read_text()
    assert "task: classify" in kept.splitlines()
