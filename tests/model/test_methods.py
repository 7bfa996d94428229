"""Each method in small: its plan counts exactly, it trains, it reloads to the logits it was trained to, and
merges or says why not.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from lora_recipes.core import files, provenance
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.evaluation.evaluate import evaluation
from lora_recipes.model import answers, build
from lora_recipes.model import embeddings as vocabulary
from lora_recipes.model.merge import merge
from lora_recipes.model.rates import DEPTHS
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe import schema
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.typed import there

PROMPT = "The cat sleeps on the"


# The trainable count of each recipe of a peft: section by hand (d = 64, 2 layers, keys and values as wide as
# d).
OTHERS = {
    "ADALORA": 8 * (2 * 64 * 6 + 6),
    "HRA": 8 * 4 * 64,
    "IA3": 2 * (64 + 64 + 128),
    "LN_TUNING": 5 * 64,
    "LOHA": 8 * 4 * 4 * 64,
    "LOKR": 8 * (8 * 8 + 2 * 8 * 4),
    "MISS": 8 * 4 * 64,
    "OFT": 8 * 8 * (8 * 7 // 2),
    "PREFIX_TUNING": 8 * 2 * 2 * 64,
    "PROMPT_TUNING": 8 * 64,
    "P_TUNING": 8 * 64 + 3 * (64 * 64 + 64),
    "VERA": 8 * (16 + 64),
}
ADALORA = there(recipes.load("tiny_adalora").peft).given


def logits(model, tokenizer):
    """Of each position of PROMPT."""
    with torch.no_grad():
        return model.eval()(**tokenizer(PROMPT, return_tensors="pt")).logits[0]


@pytest.fixture
def run(trained, write_recipe):
    """Trains tiny_facts with `method:` in place of `lora:` on the base of the session; returns run.json and
    the run's folder.
    """

    def start(method, section, name=None, **changes):
        name = name or f"{method}_run"
        path = write_recipe("tiny_facts", name, **{"lora": ..., method: section} | changes)
        record = train(resolve(recipes.load(str(path)), trained), force=True)
        return record, trained / name

    return start


@pytest.fixture(scope="module")
def untouched(trained) -> float:
    """The base's loss on the sentences that should stay, nats a token, as transformers itself computes it."""
    model = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "tiny_base" / "model")
    rows = [
        json.loads(line)["text"]
        for line in (files.ROOT / "data/facts/kept.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ids = [torch.tensor([tokenizer(f"{row}{tokenizer.eos_token}")["input_ids"]]) for row in rows]
    with torch.no_grad():
        return sum(model(i, labels=i).loss.item() * (i.shape[1] - 1) for i in ids) / sum(
            i.shape[1] - 1 for i in ids
        )


# 24,784 a block: q, k, v, o of 64 x 64, three of 64 x 128, two norms of 64 and two of 32. The embeddings are
# 192 x 64, tied.
BLOCK, EMBEDDINGS = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 32, 192 * 64


@pytest.mark.parametrize(
    ("section", "trainable", "changed"),
    [
        ({"last_blocks": 1}, BLOCK, ["model.layers.1."]),
        ({"last_blocks": 0, "embeddings": True}, EMBEDDINGS, ["model.embed_tokens."]),
        (
            {"last_blocks": 2, "embeddings": True},
            2 * BLOCK + EMBEDDINGS,
            ["model.layers.", "model.embed_tokens."],
        ),
    ],
)
def test_freezing_trains_what_it_names_and_nothing_else(run, trained, section, trainable, changed):
    record, folder = run("freeze", section)
    assert record.plan.model.trainable == trainable
    before, after = (
        load_file(path / "model" / "model.safetensors") for path in (trained / "tiny_base", folder)
    )
    assert set(before) == set(after)
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {name for name in before if name.startswith(tuple(changed))}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    last = logits(AutoModelForCausalLM.from_pretrained(folder / "model"), tokenizer)[-1]
    assert str(tokenizer.decode(last.argmax())).strip() == "sofa"


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ({"last_blocks": 3}, {}, "the model has 2 blocks, not 3"),
        ({"last_blocks": 0}, {}, "nothing would be trained"),
        ({}, {}, "'last_blocks' is missing"),
        ({"last_blocks": 1}, {"model__quantize": "nf4"}, "4-bit weights are frozen, freeze: trains them"),
    ],
)
def test_freezing_that_cannot_be_is_refused(write_recipe, tmp_path, section, changes, said):
    with pytest.raises(RecipeError) as error:
        plan.make(
            resolve(
                recipes.load(str(write_recipe("tiny_facts", lora=..., freeze=section, **changes))), tmp_path
            )
        )
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        (
            {"peft_type": "IA3", "target_modules": ["k_projj"], "feedforward_modules": []},
            {},
            "'k_projj' matches no module",
        ),
        ({"peft_type": "IA3", "target_modules": ["k_proj"], "r": 4}, {}, "peft.r: "),
        ({"peft_type": "IA4", "target_modules": ["k_proj"]}, {}, "did you mean IA3?"),
        ({"target_modules": ["k_proj"]}, {}, "'peft_type' is missing"),
        ({"peft_type": "PROMPT_TUNING"}, {}, "'num_virtual_tokens' is missing"),
        ({"peft_type": "LOHA", "target_modules": ["input_layernorm"]}, {}, "is a Qwen3RMSNorm"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
            {"train__packing": True},
            "not before each text in it",
        ),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
            {"train__gradient_checkpointing": True},
            "see the prefix twice",
        ),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
            {"model__quantize": "nf4"},
            "on a 4-bit base",
        ),
        (ADALORA, {"train__save_strategy": "epoch"}, "no importance scores"),
        (ADALORA | {"tinit": 35}, {}, "don't allow for a budgeting phase"),
        (ADALORA | {"total_step": 35}, {}, "the plan counts the steps"),
        (ADALORA | {"use_dora": True}, {}, "peft.use_dora"),
    ],
)
def test_a_peft_section_that_would_fail_later_or_do_something_else_is_refused(
    write_recipe, tmp_path, section, changes, said
):
    with pytest.raises(RecipeError) as error:
        plan.make(
            resolve(
                recipes.load(str(write_recipe("tiny_facts", lora=..., peft=section, **changes))), tmp_path
            )
        )
    assert said in str(error.value)


def test_prefix_tuning_on_linear_attention_is_refused(write_recipe, tmp_path):
    path = write_recipe(
        "tiny_qwen35_style", lora=..., peft={"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
    )
    with pytest.raises(RecipeError, match="no keys and values to put a prefix before"):
        plan.make(resolve(recipes.load(str(path)), tmp_path))


def test_adalora_cuts_its_ranks_to_the_budget_and_its_penalty_is_trained(run):
    """8 modules from rank 6 to 4 in the mean: 32 singular values stay. PEFT's own penalty goes into a loss
    that TRL does not use.
    """
    errors = []
    for weight in (0.0, 0.5):
        _, folder = run("peft", ADALORA | {"orth_reg_weight": weight}, train__learning_rate=1e-2, probes=...)
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        values = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_E")}
        assert sum(tensor.count_nonzero().item() for tensor in values.values()) == 32
        grams = [t @ t.T for name, t in tensors.items() if name.endswith("lora_A")]
        errors.append(sum(torch.linalg.norm(g - torch.eye(len(g))).item() for g in grams))
    assert errors[1] < 0.5 * errors[0]


def test_a_prompt_begins_as_the_words_that_it_is_given(run, trained):
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": PROMPT, "num_virtual_tokens": 5}
    _, folder = run("peft", {"peft_type": "PROMPT_TUNING", **text}, train__learning_rate=1e-6)
    prompt = load_file(folder / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    words = AutoTokenizer.from_pretrained(trained / "tiny_base" / "model")(PROMPT)["input_ids"]
    embeddings = load_file(trained / "tiny_base" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(prompt, embeddings[words], atol=1e-3)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_peft_method_trains_as_planned_reloads_and_merges_or_says_why_not(
    run, trained, untouched, tmp_path, kind
):
    recipe = recipes.load(f"tiny_{kind.lower()}")
    peft = there(recipe.peft)
    record, folder = run("peft", peft.given, train__learning_rate=recipe.train.learning_rate, probes=...)
    assert record.plan.model.trainable == OTHERS[kind] and peft.peft_type == kind
    size = (
        record.plan.adapter.bytes
    )  # the file has a header besides; AdaLoRA's is smaller: its budget was cut
    assert size <= record.result_bytes < size + 8192 or (
        kind == "ADALORA" and record.result_bytes < size + 4096
    )
    assert "serves only LoRA" in record.not_servable[0]
    first, last = (
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()[:4:3]
    )
    assert last < 0.7 * first
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model")
    attached = PeftModel.from_pretrained(base, folder / "adapter").eval()
    known = there(provenance.read(folder / "adapter")).probes[0]
    assert answers.logprobs(attached, known.input_ids) == pytest.approx(known.adapter, abs=1e-4)
    assert known.adapter != pytest.approx(known.base, abs=1e-1)
    kept = evaluation("peft_run", trained).sets["kept"]
    assert kept.base.loss == pytest.approx(untouched, abs=1e-5) and abs(kept.trained.loss - untouched) > 1e-3
    if kind.endswith("_TUNING") and kind != "LN_TUNING":
        with pytest.raises(RecipeError, match="has no weights to merge"):
            merge(folder / "adapter", tmp_path / "merged")
    else:
        expected = logits(attached, tokenizer)
        assert merge(folder / "adapter", tmp_path / "merged")["greedy_equal"] == 80
        assert torch.allclose(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokenizer), expected, atol=1e-4
        )


class Rates(TrainerCallback):
    """Keeps, at the first step, each trained parameter's rate by name."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 0:
            rate = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
            self.found = {name: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def rates_in_a_run(trained):
    """Trains two steps by the one launcher's parts; returns each trained parameter's (rate, weight decay),
    and the trainer.
    """

    def start(path):
        recipe, seen = recipes.load(str(path)), Rates()
        made = plan.make(resolve(recipe, trained), network=True)
        arguments = build.sft_config(recipe, RunFolder(path.parent / "rates"))
        base = build.model(resolve(recipe, trained))
        resolved, rows = resolve(recipe, trained), made.gate
        trainer, _ = build.trainer(resolved, arguments, base, rows.tokenizer, rows.train, None, [seen])
        trainer.train()
        return seen.found, made

    return start


SHORT = {"train__max_steps": 2, "train__lr_scheduler_type": "constant", "train__weight_decay": 0.1}


def test_loraplus_gives_b_its_ratio_of_the_rate_of_a(rates_in_a_run, write_recipe):
    found, made = rates_in_a_run(
        write_recipe("tiny_facts", learning_rates={"loraplus_lr_ratio": 16}, **SHORT)
    )
    assert len(found) == 16
    assert {rate for name, (rate, _) in found.items() if "lora_A" in name} == {3e-3}
    assert {rate for name, (rate, _) in found.items() if "lora_B" in name} == {16 * 3e-3}
    assert {decay for _, decay in found.values()} == {
        0.1
    }  # train.weight_decay; PEFT's own default would be 0
    assert "A 0.003, B 0.048 (16 times)" in made.text()


@pytest.mark.parametrize("method", [{"full": {}}, {"freeze": {"last_blocks": 1, "embeddings": True}}])
def test_rates_by_depth_are_those_of_the_parameters(rates_in_a_run, write_recipe, method):
    rates = {"embeddings": 1e-6, "early": 2e-6, "middle": 1e-5, "last": 5e-5}
    changes = SHORT | {"train__learning_rate": 5e-5, "learning_rates": rates}
    found, made = rates_in_a_run(write_recipe("tiny_facts", lora=..., **method, **changes))
    parts = {
        "model.embed_tokens.": 1e-6,
        "model.layers.0.": 2e-6,
        "model.layers.1.": 1e-5,
        "model.norm.": 5e-5,
    }
    for name, (rate, decay) in found.items():
        assert rate == next(r for part, r in parts.items() if name.startswith(part))
        assert decay == (0.0 if "norm" in name else 0.1)
    assert any(name.startswith("model.layers.1.") for name in found)
    assert f"early 2e-06 ({0 if 'freeze' in method else BLOCK:,} parameters)" in made.text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"learning_rates": {"loraplus_lr_ratio": 16, "last": 1e-3}},
            "either loraplus_lr_ratio or rates by depth",
        ),
        ({"learning_rates": {}}, "either loraplus_lr_ratio or rates by depth"),
        ({"learning_rates": {"loraplus_lr_ratio": 0.5}}, "at least 1"),
        ({"learning_rates": {"early": 1e-3}}, "rates by depth are for full: and freeze:"),
        ({"lora": ..., "full": {}, "learning_rates": {"loraplus_lr_ratio": 16}}, "has no A and B"),
        ({"lora": ..., "full": {}, "learning_rates": {"early": 1e-3}}, "only early"),
        (
            {"lora": ..., "full": {}, "learning_rates": dict.fromkeys(DEPTHS, 1e-3)},
            "is not learning_rates.last",
        ),
        (
            {"learning_rates": {"loraplus_lr_ratio": 16}, "train__optim": "galore_adamw"},
            "sorts the parameters itself",
        ),
    ],
)
def test_rates_that_would_not_be_followed_are_refused(write_recipe, tmp_path, changes, said):
    with pytest.raises(RecipeError) as error:
        plan.make(resolve(recipes.load(str(write_recipe("tiny_facts", **changes))), tmp_path))
    assert said in str(error.value)


INITIALISATIONS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_8", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
}
TAKES_FROM_BASE = ("pissa", "pissa_niter", "olora", "corda")


@pytest.fixture(scope="module")
def corrections(trained):
    """The section `lora:` of tiny_facts."""
    return there(recipes.load("tiny_facts").lora).given


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_a_lora_variant_gives_on_the_untouched_base_what_was_trained(
    run, trained, corrections, tmp_path, name
):
    record, folder = run("lora", corrections | INITIALISATIONS[name], name=f"method_{name}")
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == (8 if name in TAKES_FROM_BASE else 4)
    assert record.plan.model.trainable == 4096 + (512 if name == "dora" else 0)
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model").eval()
    for known in there(provenance.read(folder / "adapter")).probes:
        assert answers.logprobs(base, known.input_ids) == pytest.approx(known.base, abs=1e-4)
    attached = PeftModel.from_pretrained(base, folder / "adapter").eval()
    for known in there(provenance.read(folder / "adapter")).probes:
        assert answers.logprobs(attached, known.input_ids) == pytest.approx(known.adapter, abs=1e-3)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert record.plan.adapter.bytes == sum(t.numel() * 4 for t in tensors.values())
    assert record.not_servable == [] or name == "dora"
    assert merge(folder / "adapter", tmp_path / "merged")["greedy_equal"] == 80
    assert [p.top[0][0] for p in record.probes.after if p.kind == "change"] == [
        "sofa",
        "York",
        "lamp",
        "cocoa",
    ]


def test_in_bfloat16_the_conversion_costs_a_rounding(run, trained, corrections):
    """The base without its part is rounded once more: 0.004 nats a token here, where the base is 1.7 away
    (docs/methods.md).
    """
    _, folder = run("lora", corrections | INITIALISATIONS["pissa"], name="bfloat16", model__dtype="bfloat16")
    base = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model", dtype=torch.bfloat16)
    attached, apart, far = PeftModel.from_pretrained(base, folder / "adapter").eval(), [], []
    for known in there(provenance.read(folder / "adapter")).probes:
        again = answers.logprobs(attached, known.input_ids)
        apart += [abs(a - b) for a, b in zip(again, known.adapter, strict=True)]
        far += [abs(a - b) for a, b in zip(known.base, known.adapter, strict=True)]
    assert sum(apart) / len(apart) < 0.02 < 1 < sum(far) / len(far)


def built(trained, path):
    """The trainer of a recipe before its first step, and how its adapter begins."""
    resolved = resolve(recipes.load(str(path)), trained)
    rows = plan.make(resolved, network=True).gate
    arguments = build.sft_config(resolved.recipe, RunFolder(path.parent / "built"))
    return build.trainer(resolved, arguments, build.model(resolved), rows.tokenizer, rows.train, None, [])


def delta(module):
    """S B A of one adapted module."""
    return module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight


def adapted(model):
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }


def test_eva_begins_in_the_directions_of_the_training_data(trained, corrections, write_recipe):
    """A's rows span the leading principal components of a module's inputs: nothing of rank 4 keeps more of
    their variance.
    """
    shares = {}
    for name in ("eva", "orthogonal"):
        trainer, _ = built(trained, write_recipe("tiny_facts", lora=corrections | INITIALISATIONS[name]))
        seen: list[torch.Tensor] = []
        module = adapted(trainer.model)["model.layers.0.self_attn.q_proj"]
        module.register_forward_hook(
            lambda m, inputs, output, seen=seen: seen.append(inputs[0].reshape(-1, 64))
        )
        for row in trainer.train_dataset:
            with torch.no_grad():
                trainer.model(input_ids=torch.tensor([row["input_ids"]]))
        inputs = torch.cat(seen)
        centred = inputs - inputs.mean(0)
        span = torch.linalg.qr(module.lora_A["default"].weight.T).Q
        shares[name] = ((centred @ span).norm() / torch.linalg.svdvals(centred)[:4].norm()).item()
    assert shares["orthogonal"] < 0.6 and 0.99 < shares["eva"] <= 1.0


def test_loftq_begins_with_what_nf4_rounded_away(run, trained, corrections, write_recipe, tmp_path):
    lora, base = (
        corrections | {"init_lora_weights": "loftq", "lora_alpha": 8},
        load_file(trained / "tiny_base" / "model" / "model.safetensors"),
    )
    model = built(trained, write_recipe("tiny_facts", lora=lora, model__quantize="nf4"))[0].model
    for name, module in adapted(model).items():
        lost = base[f"{name}.weight"] - dequantize_module_weight(module.get_base_layer())
        best = torch.linalg.svdvals(lost)[4:].norm()
        assert (lost - delta(module)).norm().item() == pytest.approx(best.item(), rel=1e-3)
    record, folder = run("lora", lora, name="loftq", model__quantize="nf4")
    assert record.not_servable == [] and merge(folder / "adapter", tmp_path / "merged")["greedy_equal"] == 80


def test_a_pissa_run_goes_on_where_it_was_cut_off(trained, corrections, write_recipe, tmp_path):
    lora = corrections | {"init_lora_weights": "pissa_niter_8"}
    path = write_recipe(
        "tiny_facts", "resumed", lora=lora, train__save_strategy="steps", train__save_steps=20
    )
    train(resolve(recipes.load(str(path)), trained))
    whole = load_file(trained / "resumed" / "adapter" / "adapter_model.safetensors")
    record = RunFolder(trained / "resumed").outcome()
    RunFolder(trained / "resumed").write_record(replace(record, status="failed"))
    shutil.rmtree(trained / "resumed" / "checkpoints" / "checkpoint-40")
    shutil.rmtree(trained / "resumed" / "adapter")
    train(resolve(recipes.load(str(path)), trained), resume=True)
    again = load_file(trained / "resumed" / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(whole[name], again[name], atol=1e-5) for name in whole)


def test_a_warm_start_is_the_best_part_of_the_update(trained, write_recipe):
    """Relative error of each module: the tail of the singular values of full - base; with the full rank
    nothing is left.
    """
    full = write_recipe(
        "tiny_facts", "small_full", lora=..., full={}, train__max_steps=5, train__learning_rate=1e-3
    )
    train(resolve(recipes.load(str(full)), trained))
    weights = [
        load_file(trained / name / "model" / "model.safetensors") for name in ("tiny_base", "small_full")
    ]
    for rank in (4, 64):
        path = write_recipe(
            "tiny_facts", "warm", warm_start={"from_recipe": str(full)}, lora__r=rank, lora__lora_alpha=8
        )
        trainer, start = built(trained, path)
        model = trainer.model
        assert len(start.errors) == 8
        for name, module in adapted(model).items():
            update = weights[1][f"{name}.weight"] - weights[0][f"{name}.weight"]
            values = torch.linalg.svdvals(update)
            tail = (values[rank:].norm() / values.norm()).item()
            assert ((update - delta(module)).norm() / update.norm()).item() == pytest.approx(tail, abs=1e-4)
            assert start.errors[name] == pytest.approx(tail, abs=1e-6)
            assert (0.01 < tail < 0.9) if rank == 4 else tail == 0
    record = train(resolve(recipes.load(str(path)), trained))
    assert record.not_servable == [] and there(record.warm_start).worst == max(start.errors.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warm_start": {"from_recipe": "tiny_base"}}, "was trained on another base"),
        ({"warm_start": {"from_recipe": "tiny_facts"}}, "there is no full update"),
        (
            {"warm_start": {"from_recipe": "tiny_base"}, "lora__use_dora": True},
            "A and B come from warm_start:",
        ),
        (
            {"warm_start": {"from_recipe": "tiny_base"}, "lora": ..., "full": {}},
            "has no A and B to begin with",
        ),
        ({"lora__init_lora_weights": "eva"}, "eva_config: {rho: 1.0}"),
        ({"lora__init_lora_weights": "lora_ga"}, "it would be ordinary LoRA"),
        ({"lora__init_lora_weights": "loftq"}, "set model.quantize: nf4"),
        (
            {
                "lora__init_lora_weights": "loftq",
                "lora__loftq_config": {"loftq_bits": 8},
                "model__quantize": "nf4",
            },
            "one step, 4 bits",
        ),
        ({"lora__init_lora_weights": "pissa", "model__quantize": "nf4"}, "not out of 4-bit ones"),
        (
            {"lora__init_lora_weights": "olora", "lora__use_dora": True},
            "is lost when a olora adapter is saved",
        ),
        ({"lora__init_lora_weights": "pissa", "model__adapter_dtype": "bfloat16"}, "they are not its part"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(write_recipe, tmp_path, changes, said):
    with pytest.raises(RecipeError) as error:
        plan.make(resolve(recipes.load(str(write_recipe("tiny_facts", **changes))), tmp_path))
    assert said in str(error.value)


NEW = [" parrot", " pretzel", " nowhere"]


@pytest.fixture(params=["tied, rows to spare", "tied", "untied"])
def growing(request, trained, tmp_path):
    """A recipe's `model:` section whose vocabulary is to grow: in the rows that the tiny base has to spare,
    or beyond its rows.
    """
    if "spare" in request.param:
        return {"from_recipe": "tiny_base", "dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "tiny_base" / "model")
    model.resize_token_embeddings(len(tokenizer))
    if request.param == "untied":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return {"name_or_path": str(tmp_path / "base"), "dtype": "float32"}


@pytest.fixture
def parrots(tmp_path):
    """Rows in which new words stand last: only lm_head can learn to say them."""
    texts = ["The cat sleeps on the parrot", "The dog sleeps in the pretzel"]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 4))
    return {"train": str(tmp_path / "new.jsonl"), "limits": {"duplicates": 1.0, "no_end_of_turn": 1.0}}


def test_new_tokens_are_trained_where_they_are_read_and_said_and_merge(
    run, corrections, growing, parrots, tmp_path
):
    changes = {
        "model": growing | {"new_tokens": NEW},
        "data": parrots,
        "train__num_train_epochs": 60,
        "train__learning_rate": 1e-2,
    }
    probes = {
        "change": [
            {"prompt": PROMPT, "answer": "parrot"},
            {"prompt": "The dog sleeps in the", "answer": "pretzel"},
        ]
    }
    record, folder = run("lora", corrections, name="grown", probes=probes, **changes)
    untied = (
        not growing.get("from_recipe")
        and not AutoConfig.from_pretrained(growing["name_or_path"]).tie_word_embeddings
    )
    assert record.plan.model.trainable == 4096 + 3 * 64 * (2 if untied else 1)
    assert "' nowhere' in no training row" in " ".join(record.warnings)
    assert any("trained token embeddings" in fault for fault in record.not_servable)
    assert [p.top[0][0] for p in record.probes.after] == ["parrot", "pretzel"]
    shapes = {
        tuple(t.shape)
        for n, t in load_file(folder / "adapter" / "adapter_model.safetensors").items()
        if "token" in n
    }
    assert shapes == {(3, 64)}
    merged = merge(folder / "adapter", tmp_path / "merged")
    assert merged["greedy_equal"] == 80
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(tokenizer) == 119 and model.config.vocab_size == (192 if "from_recipe" in growing else 119)
    for known in there(provenance.read(folder / "adapter")).probes:
        assert answers.logprobs(model.eval(), known.input_ids) == pytest.approx(known.adapter, abs=1e-3)
    asked = evaluation("grown", folder.parent, [f"data.eval={parrots['train']}"]).sets["eval"]
    assert asked.base.loss > 2 and asked.trained.loss < 0.5, (
        "the base as training began, with its new embeddings"
    )


def embedding(model: PreTrainedModel) -> torch.Tensor:
    found = model.get_input_embeddings()
    assert isinstance(found, torch.nn.Embedding)
    return found.weight


def test_new_rows_begin_near_the_mean_of_the_old_and_differ(trained):
    model = AutoModelForCausalLM.from_pretrained(trained / "tiny_base" / "model")
    old = embedding(model)[:116].detach().clone()
    vocabulary.begin(model, [116, 117], seed=1)
    weight = embedding(model).detach()
    assert torch.equal(weight[:116], old) and not torch.equal(weight[116], weight[117])
    assert ((weight[116:118] - old.mean(0)).abs() < 5 * vocabulary.NOISE * old.std(0)).all()
    vocabulary.begin(model, [116, 117], seed=1)
    assert torch.equal(weight, embedding(model))


@pytest.mark.parametrize("method", [{"full": {}}, {"freeze": {"last_blocks": 0, "embeddings": True}}])
def test_new_tokens_of_a_whole_model_are_saved_with_it(run, growing, parrots, method):
    [(name, section)] = method.items()
    changes = {
        "model": growing | {"new_tokens": NEW},
        "data": parrots,
        "probes": ...,
        "train__num_train_epochs": 5,
    }
    record, folder = run(name, section, name="grown_whole", **changes)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder / "model"),
        AutoModelForCausalLM.from_pretrained(folder / "model"),
    )
    assert len(tokenizer) == 119 and model.config.vocab_size == (192 if "from_recipe" in growing else 119)
    assert record.plan.model.trainable == sum(
        p.numel() for n, p in model.named_parameters() if name == "full" or "layers" not in n
    ) - (0 if name == "full" else 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__new_tokens": ["a", "a"]}, "'a' is listed twice"),
        ({"model__new_tokens": ["▁cat"]}, "is in the vocabulary already"),
        ({"model__new_tokens": ["a"], "model__quantize": "nf4"}, "on a 4-bit base"),
        ({"model__new_tokens": ["a"], "lora__trainable_token_indices": [1]}, "chooses the rows"),
        ({"model__new_tokens": ["a"], "lora": ..., "freeze": {"last_blocks": 1}}, "would stay noise"),
        (
            {
                "model__new_tokens": ["a"],
                "lora": ...,
                "peft": {"peft_type": "IA3", "target_modules": ["k_proj"]},
            },
            "does not train new",
        ),
    ],
)
def test_new_tokens_that_would_not_be_trained_are_refused(trained, write_recipe, changes, said):
    with pytest.raises(RecipeError) as error:
        plan.make(resolve(recipes.load(str(write_recipe("tiny_facts", **changes))), trained))
    assert said in str(error.value)


def rows_of_the_table():
    """Recipe, trainable count, served, merges: the table of docs/methods.md."""
    lines = (files.ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    first = lines.index(next(line for line in lines if line.startswith("| method | recipe |"))) + 2
    return [[cell.strip() for cell in line.split("|")[2:6]] for line in lines[first : lines.index("", first)]]


@pytest.mark.parametrize("row", rows_of_the_table(), ids=lambda row: row[0])
def test_the_table_of_methods_is_what_the_plan_says(tmp_path, row):
    name, trainable, served, merges = row
    facts = plan.make(resolve(recipes.load(name), tmp_path)).facts
    adapter = facts.adapter
    assert f"{facts.model.trainable:,}" == trainable
    assert served == ("whole model" if adapter is None else "yes" if adapter.max_lora_rank else "no")
    assert merges == ("-" if adapter is None else "yes" if adapter.merges else "no")


def test_the_table_of_methods_has_every_recipe_of_methods_and_every_peft_type():
    assert {row[0] for row in rows_of_the_table()} == {
        file.stem for file in (recipes.RECIPES / "methods").glob("*.yaml")
    }
    assert (
        {
            recipe.peft.peft_type
            for recipe in (recipes.load(row[0]) for row in rows_of_the_table())
            if recipe.peft
        }
        == set(schema.PEFT_TYPES)
        == set(OTHERS)
    )


def test_the_shipped_recipe_of_new_tokens_teaches_its_words(trained):
    record = train(resolve(recipes.load("tiny_new_tokens"), trained), force=True)
    assert not any("no training row" in warning for warning in record.warnings)
    assert [p.top[0][0] for p in record.probes.after] == ["conservatory", "Greenland"]
