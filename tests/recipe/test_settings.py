"""Settings that do nothing, fail late or are far from what is usual: every rule about them is broken by a
recipe, and says where, what and what to do; none is broken by a shipped one.
"""

import re

import pytest

from lora_recipes.recipe import load as recipes
from lora_recipes.recipe import rules

EVALUATES = "data.eval=x.jsonl train.eval_strategy=steps train.save_strategy=steps"
BEST = f"{EVALUATES} train.load_best_model_at_end=true"
# Settings that do nothing, or fail late: the rule, the overrides of tiny_facts, the facts.
SETTINGS: list[tuple[tuple[str, str], str, dict]] = [
    (
        ("train.metric_for_best_model", "what an evaluation does not measure"),
        f"{BEST} train.metric_for_best_model=eval_accuracy",
        {},
    ),
    (
        ("train.greater_is_better", "a metric that is better the other way"),
        f"{BEST} train.greater_is_better=true",
        {},
    ),
    (
        ("train.restore_callback_states_from_checkpoint", "early_stopping:"),
        f"{EVALUATES} train.eval_steps=2 early_stopping.early_stopping_patience=2"
        " train.restore_callback_states_from_checkpoint=false",
        {},
    ),
    (("train.load_best_model_at_end", "eval_strategy: 'no'"), "train.load_best_model_at_end=true", {}),
    (("train.save_strategy", "best with eval_strategy: 'no'"), "train.save_strategy=best", {}),
    (
        ("train.save_strategy", "best without metric_for_best_model"),
        "data.eval=x.jsonl train.eval_strategy=steps train.save_strategy=best",
        {},
    ),
    (("train.eval_on_start", "no data.eval"), "train.eval_on_start=true", {}),
    (("train.padding_free", "max_length without packing"), "train.padding_free=true", {}),
    (
        ("train.gradient_checkpointing_kwargs", "names that torch does not take"),
        "train.gradient_checkpointing=true train.gradient_checkpointing_kwargs={use_reentrantt: false}",
        {},
    ),
    *(
        (
            ("train.use_cpu", "false, with an accelerator that is not CUDA's"),
            "train.use_cpu=false",
            {"foreign": kind},
        )
        for kind in ("mps", "xpu")
    ),
    (("train.torch_compile_mode", "other words"), "train.torch_compile_mode=fast", {}),
    (("train.torch_compile_backend", "other words"), "train.torch_compile_backend=inductorr", {}),
    (("train.include_num_input_tokens_seen", "other words"), "train.include_num_input_tokens_seen=real", {}),
    (
        ("train.label_smoothing_factor", "loss_type: dft"),
        "train.label_smoothing_factor=0.1 train.loss_type=dft",
        {},
    ),
    (("train.activation_offloading", "a CPU"), "train.activation_offloading=true", {"accelerator": False}),
    (("train.fp16", "float16 on a CPU"), "train.fp16=true", {"accelerator": False}),
    (("model.dtype", "float16 on a CPU"), "model.dtype=float16", {"accelerator": False}),
    (
        ("train.dataloader_persistent_workers", "dataloader_num_workers: 0"),
        "train.dataloader_persistent_workers=true",
        {},
    ),
    (
        ("train.dataloader_multiprocessing_context", "dataloader_num_workers: 0"),
        "train.dataloader_multiprocessing_context=spawn",
        {},
    ),
    (("train.optim_args", "no text of pairs"), "train.optim_args=foo", {"optimizer": "not enough values"}),
    (("train.optim_args", "no text of pairs"), "train.optim_args='eps=1e-6,betas'", {}),
    (("train.dataset_num_proc", "below 1"), "train.dataset_num_proc=0", {}),
    (("train.optim", "a package or a key that is missing"), "", {"optimizer": "install galore_torch"}),
    (("train.report_to", "a package that is missing, or another word"), "", {"reporting": "no wandb"}),
    (("train.use_liger_kernel", "a missing package"), "train.use_liger_kernel=true", {"liger": "no package"}),
    (
        ("train.liger_kernel_config", "fused_linear_cross_entropy: true"),
        "train.use_liger_kernel=true train.liger_kernel_config={fused_linear_cross_entropy: true}",
        {},
    ),
    (
        ("train.router_aux_loss_coef", "a model without experts"),
        "train.router_aux_loss_coef=0.01",
        {"router": False},
    ),
    *(
        ((f"train.{name}", "an optimizer that does not read it"), "train.optim=sgd", {"ignored": (name,)})
        for name in rules.OPTIMIZER_KEYS
    ),
    (("train.save_only_model", "RESUME"), "train.save_only_model=true train.save_strategy=epoch", {}),
    (
        ("train.save_steps", "other eval_steps, where the best is kept"),
        f"{BEST} train.eval_steps=2 train.save_steps=4",
        {},
    ),
    (
        ("train.neftune_noise_alpha", "packing and padding_free"),
        "train.neftune_noise_alpha=5 train.packing=true",
        {},
    ),
    (("train.truncation_mode", "packing"), "train.truncation_mode=keep_end train.packing=true", {}),
    (("train.eval_steps", "eval_strategy other than steps"), "train.eval_steps=5", {}),
    (("train.eval_delay", "eval_strategy other than steps or epoch"), "train.eval_delay=5", {}),
    (("train.per_device_eval_batch_size", "no data.eval"), "train.per_device_eval_batch_size=2", {}),
    (("train.eval_packing", "no data.eval"), "train.eval_packing=true", {}),
    (("train.save_steps", "save_strategy other than steps"), "train.save_steps=5", {}),
    (("train.save_total_limit", "save_strategy: 'no'"), "train.save_total_limit=2", {}),
    (("train.save_on_each_node", "save_strategy: 'no'"), "train.save_on_each_node=true", {}),
    (
        ("train.logging_steps", "logging_strategy other than steps"),
        "train.logging_strategy=epoch train.logging_steps=5",
        {},
    ),
    (
        ("train.metric_for_best_model", "nothing that asks for the best"),
        "train.metric_for_best_model=eval_loss",
        {},
    ),
    (("train.greater_is_better", "nothing that asks for the best"), "train.greater_is_better=true", {}),
    (("train.packing_strategy", "packing: false"), "train.packing_strategy=wrapped", {}),
    (
        ("train.gradient_checkpointing_kwargs", "gradient_checkpointing: false"),
        "train.gradient_checkpointing_kwargs={use_reentrant: false}",
        {},
    ),
    (("train.liger_kernel_config", "use_liger_kernel: false"), "train.liger_kernel_config={rope: true}", {}),
    (("train.run_name", "no report_to"), "train.run_name=x", {}),
    *(
        ((f"train.{name}", "report_to without trackio"), f"train.{name}=x train.report_to=wandb", {})
        for name in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    ),
    (("lora.eva_config", "init_lora_weights other than eva"), "lora.eva_config={rho: 1.0}", {}),
    (("lora.corda_config", "init_lora_weights other than corda"), "lora.corda_config={verbose: true}", {}),
    (("lora.loftq_config", "init_lora_weights other than loftq"), "lora.loftq_config={loftq_bits: 4}", {}),
    (("lora.init_lora_weights", "false"), "lora.init_lora_weights=false", {}),
    (("lora.fan_in_fan_out", "a model without Conv1D"), "lora.fan_in_fan_out=true", {"conv1d": False}),
    (
        (
            "train.eval_strategy",
            "one evaluation or none, where the best is kept (load_best_model_at_end, early_stopping:)",
        ),
        f"{BEST} train.eval_steps=500 train.save_steps=500",
        {"steps": 4},
    ),
    (
        ("early_stopping.early_stopping_patience", "too few evaluations"),
        f"{EVALUATES} train.eval_steps=2 early_stopping.early_stopping_patience=5",
        {"steps": 6},
    ),
    (("train.eval_steps", "fewer steps"), f"{EVALUATES} train.eval_steps=500", {"steps": 4}),
    (("train.save_steps", "fewer steps"), "train.save_strategy=steps train.save_steps=600", {"steps": 4}),
    (
        ("train.eval_delay", "fewer steps"),
        f"{EVALUATES} train.eval_steps=2 train.eval_delay=50",
        {"steps": 40},
    ),
    (("train.logging_steps", "fewer steps"), "train.logging_steps=500", {"steps": 40}),
    (("train.warmup_steps", "fewer steps"), "train.warmup_steps=100", {"steps": 40, "warmup": 100}),
    (("lora.lora_alpha", "a scaling outside 1/32 to 32"), "lora.lora_alpha=8000", {}),
    (("data.train", "a weight outside 0.001 to 10"), "data.train=[{path: x.jsonl, weight: 100}]", {}),
]

CASES = {rule: (words, facts) for rule, words, facts in SETTINGS}
FAR = {"lora_dropout": 0.9, "label_smoothing_factor": 0.9, "adam_beta1": 0.1, "adam_beta2": 0.1}


def breaks(rule):
    """A recipe that breaks `rule`, and the facts beside it."""
    name = "tiny_facts"
    facts: dict = {}
    if rule.against.startswith("numbers outside"):  # the highest is said in it
        high = re.search(r"outside \S+ to (\S+)", rule.against)
        assert high
        method = next((m for m in ("full", "peft") if f"{m}:" in rule.against), "lora")
        name = {"full": "tiny_full", "peft": "tiny_ia3", "lora": "tiny_facts"}[method]
        value = FAR.get(rule.key.split(".")[1], 30 * float(high[1]) + 1)
        words = f"{rule.key}={value}"
        if "threshold" in rule.key:
            words += f" {EVALUATES} early_stopping.early_stopping_patience=1"
    else:
        words, facts = CASES[rule.key, rule.against]
    overrides = re.findall(r"\S+=(?:\{[^}]*\}|\[[^\]]*\]|\S+)", words)
    return recipes.load(name, overrides), rules.Facts(**facts)


@pytest.mark.parametrize("rule", rules.SETTINGS, ids=lambda r: f"{r.key} / {r.against}")
def test_every_rule_is_broken_by_a_recipe_and_says_where_what_and_what_to_do(rule):
    recipe, facts = breaks(rule)
    asked = rules.warnings(recipe, facts) if rule.warns else [str(p) for p in rules.problems(recipe, facts)]
    said = re.sub(r"\\{.*?\\}", ".*", re.escape(rule.found))
    told = [text for text in asked if rule.key in text and re.search(said, text)]
    assert told, asked
    names = re.findall(r"\{(\w+)", rule.found + rule.do)
    assert not [name for name in names if any(f"{{{name}" in text for text in told)], "not filled in"
    assert rule.do


def test_no_case_is_left_over():
    assert set(CASES) == {(r.key, r.against) for r in rules.SETTINGS if "numbers outside" not in r.against}


@pytest.mark.parametrize("name", recipes.names())
def test_no_shipped_recipe_breaks_one(name):
    recipe = recipes.load(name)
    for facts in (rules.Facts(), rules.Facts(steps=40, per_epoch=4)):
        assert rules.problems(recipe, facts) == [] and rules.warnings(recipe, facts) == []


@pytest.mark.parametrize(
    "metric, said, found",
    [
        ("eval_loss", "", ""),
        ("eval_loss", "false", ""),
        ("eval_loss", "true", "true with loss: the greatest is the worst"),
        ("mean_token_accuracy", "", ""),
        ("eval_mean_token_accuracy", "false", "false with mean_token_accuracy: the smallest is the worst"),
        ("eval_entropy", "", "not said: true with entropy: the greatest is the worst"),
        ("eval_entropy", "false", ""),
    ],
)
def test_the_best_is_never_the_worst_of_its_metric(metric, said, found):
    words = [*BEST.split(), f"train.metric_for_best_model={metric}"]
    words += [f"train.greater_is_better={said}"] if said else []
    problems = rules.problems(recipes.load("tiny_facts", words), rules.Facts())
    assert [p.found.partition(", and")[0] for p in problems] == ([found] if found else [])
