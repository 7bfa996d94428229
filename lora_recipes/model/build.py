"""From a recipe to library objects: the only file that knows both a recipe and the classes of transformers,
peft and trl.
"""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import EvaConfig, LoraConfig, PeftConfig, PromptTuningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import CordaConfig
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.files import ROOT, replace_folder, sha256
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.data import new_tokens
from lora_recipes.data import tokenizer as tokenizing
from lora_recipes.data.render import Example
from lora_recipes.data.rows import Rows
from lora_recipes.model import (
    batching,
    checkpoint,
    embeddings,
    freeze,
    initialise,
    lm_head,
    parts,
    peft_callbacks,
    rates,
    router,
    targets,
)
from lora_recipes.model.batching import AS_GIVEN, Batching
from lora_recipes.model.initialise import Start
from lora_recipes.recipe.base import Base, Resolved, unread
from lora_recipes.recipe.contract import Contract
from lora_recipes.recipe.recipe import Recipe, initialisation


def meta_model(base: Base) -> PreTrainedModel:
    """The model that trains on the meta device, as `model` will load it. Takes no memory."""
    config, dtype = checkpoint.planned(base).config, getattr(torch, base.recipe.model.dtype)
    try:
        model: PreTrainedModel = parts.build(config, dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        do = "name a checkpoint that continues text (its class ends in ForCausalLM)"
        raise RecipeError(Problem(base.at, *unread(error, base.name, do))) from None
    if contract := base.contract:
        found = contract.departures({name: parameter.shape for name, parameter in model.named_parameters()})
        where, do = base.recipe.at("model", "contract"), f"correct {contract.file}"
        built = f"transformers {transformers.__version__} builds"
        raise_if([Problem(where, f"{built} {departure}", do) for departure in found])
    return model


def attention(model: PreTrainedModel, asked: str | None) -> tuple[str, str]:
    """The attention that `model` trains with where the recipe says `asked`, and why, as transformers chooses
    for its class; `none` for a model that has no attention.
    """
    own, kind = str(parts.decoder(model).config._attn_implementation), type(model).__name__
    if not any("attention" in type(m).__name__.lower() for m in model.modules()):
        return "none", f"{kind} has none"
    holds = "; it holds whole score matrices"
    if asked:
        return asked, "as model.attn_implementation says" + holds * (asked == "eager")
    if own == "eager":
        return own, f"{kind} has no sdpa in transformers{holds}"
    return own, f"transformers' choice for {kind}"


def attention_refused(model: PreTrainedModel, asked: str | None) -> tuple[str, str]:
    """What transformers says against the attention `asked` on this class, and what it says because of a
    package that this machine has not; "" where it says nothing. A kernel of the hub is not looked for.
    """
    if asked is None or "/" in asked:
        return "", ""
    try:
        model.get_correct_attn_implementation(asked, is_init_check=True)
    except ValueError as error:
        return str(error).partition(" Please ")[0].rstrip("."), ""
    except ImportError as error:
        return "", str(error).partition(" Please ")[0].rstrip(".")
    return "", ""


def peft_config(
    recipe: Recipe, total_step: int | None = None, tokenizer: str = "none yet"
) -> PeftConfig | None:
    """PEFT's config of the recipe's `lora:` or `peft:` section, its keys handed over as they are; None where
    no adapter is trained.

    `total_step`: the run's optimizer steps, which AdaLoRA's schedule needs. None: a config to count
    parameters with, without that schedule. `tokenizer`: where prompt tuning finds the one for its
    prompt_tuning_init_text."""
    if recipe.whole:
        return None
    fields = {"task_type": "SEQ_CLS" if recipe.classify else "CAUSAL_LM", **recipe.settings}
    kind = fields.pop("peft_type", "LORA")
    if kind == "ADALORA" and total_step is None:  # PEFT makes none without a step
        fields = {k: v for k, v in fields.items() if k not in ("tinit", "tfinal", "deltaT")} | {
            "total_step": 1
        }
    elif kind == "ADALORA":
        fields |= {"total_step": total_step}
    fields |= {"tokenizer_name_or_path": tokenizer} if kind == "PROMPT_TUNING" else {}
    if initialisation(recipe.lora) == "loftq":
        # initialise.py then replaces A and B; PEFT itself would quantise a second time.
        fields["init_lora_weights"] = True
    for field, cls in (("eva_config", EvaConfig), ("corda_config", CordaConfig)):
        if isinstance(fields.get(field), dict):
            fields[field] = cls(**fields[field])
    made: type[PeftConfig] = LoraConfig if kind == "LORA" else PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        return made(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(Problem(recipe.at(recipe.method), f"PEFT refuses it: {error}")) from None


def shapes(config: PeftConfig) -> PeftConfig:
    """`config` for a model without weights: an initialisation that reads weights or words changes values, not
    shapes.
    """
    if isinstance(config, PromptTuningConfig):
        return dataclasses.replace(config, prompt_tuning_init="RANDOM")
    if isinstance(config, LoraConfig):
        return dataclasses.replace(config, init_lora_weights=True)
    return config


def precision(recipe: Recipe) -> tuple[dict[str, bool], str]:
    """`bf16` and `fp16` for SFTConfig, and the reason. TRL's own default is bf16 everywhere, the CPU
    included.
    """
    asked = {k: recipe.train.given[k] for k in ("bf16", "fp16") if k in recipe.train.given}
    dtype = recipe.model.dtype
    where = (
        "this CPU" if not torch.cuda.is_available() or recipe.train.use_cpu else torch.cuda.get_device_name()
    )
    wants_bf16 = dtype == "bfloat16" or asked.get("bf16")
    if (
        wants_bf16
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        do = "set model.dtype=float16 train.fp16=true, or model.dtype=float32"
        raise RecipeError(Problem(recipe.at("model", "dtype"), f"{where} has no bfloat16", do))
    if asked:
        return {"bf16": False, "fp16": False} | asked, "as the recipe says"
    return {
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }, f"follows model.dtype: {dtype} on {where}"


def sft_config(recipe: Recipe, folder: RunFolder, batches: Batching = AS_GIVEN) -> SFTConfig:
    """`trl.SFTConfig` of the recipe's `train:` section, its keys handed over as they are, and what the
    launcher owns. `batches`: what the plan chose where the recipe does not say it.
    """
    # Which way a metric is better, TrainingArguments knows from its name.
    stopping = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    # Else a resumed run counts its patience from nothing again.
    stopping["restore_callback_states_from_checkpoint"] = True
    # The labels already leave out what train.assistant_only_loss leaves out; TRL accepts the flag only with
    # raw conversations.
    owned = {
        "output_dir": str(folder.checkpoints),
        "assistant_only_loss": False,
        "logging_nan_inf_filter": False,
        **precision(recipe)[0],
    }
    fields: dict[str, Any] = {
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        # A packed evaluation is another mean: over packs, whatever is in each.
        "eval_packing": False,
    }
    if recipe.method == "lora":
        # Every A and B has a gradient in every step; looking for those without costs a pass over the graph.
        fields["ddp_find_unused_parameters"] = False
    fields |= (stopping if recipe.early_stopping else {}) | recipe.train.given | owned
    fields |= batches.fields
    if fields.get("router_aux_loss_coef") is not None:
        # TRL hands it on to the model's config, which takes a float alone: 0 ended in a traceback there.
        fields["router_aux_loss_coef"] = float(fields["router_aux_loss_coef"])
    if not (fields.get("packing") or fields.get("eval_packing")):
        # They are cut and counted already: TRL would write all of them once more to find that out.
        fields["dataset_kwargs"] = {"skip_prepare_dataset": True}
    try:
        made = SFTConfig(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(_refused(recipe, fields, str(error).splitlines()[0])) from None
    # Under ZeRO-3 transformers would divide every model from here on while it is made, also those that only
    # count.
    unset_hf_deepspeed_config()
    return made


def _refused(recipe: Recipe, fields: dict[str, Any], said: str) -> Problem:
    """The key that SFTConfig refuses with the words `said`: one without which it is made; of several the one
    that it names, and the others beside it.
    """
    keys = sorted((k for k in recipe.train.given if _made_without(k, fields)), key=lambda k: k not in said)
    where = [recipe.at("train", key) for key in keys]
    do = "change or remove it" + "".join(f", or {other}" for other in where[1:])
    return Problem(where[0] if where else recipe.at("train"), f"TRL refuses it: {said}", do if where else "")


def _made_without(key: str, fields: dict[str, Any]) -> bool:
    try:
        SFTConfig(**{name: value for name, value in fields.items() if name != key})
    except (TypeError, ValueError, ImportError):
        return False
    return True


def random_base(resolved: Resolved) -> bool:
    """Write the contract's model with random weights (seed 0) and its tokenizer as a checkpoint folder,
    unless it is there already.

    The folder has the published checkpoint's class and tensor names, so that all later steps load it as they
    load a real one.
    """
    contract, folder = resolved.base.contract, Path(resolved.base.weights)
    assert contract is not None
    files = {name: sha256(ROOT / name) for name in (contract.tokenizer or {}).get("files", [])}
    mark = {
        "config": contract.config,
        "tokenizer": contract.tokenizer,
        "files": files,
        "transformers": transformers.__version__,
    }
    if (folder / "contract.json").is_file() and json.loads((folder / "contract.json").read_text()) == mark:
        return False
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = AutoConfig.for_model(**contract.config)
    set_seed(0)
    dtype = getattr(torch, resolved.recipe.model.dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = published_class(contract)._from_config(config, dtype=dtype)
    # Of another contract or other files; its tokenizer must not be read back.
    shutil.rmtree(folder, ignore_errors=True)
    processing_class = tokenizing.load(resolved)
    for holder in (model.config.get_text_config(), model.generation_config):
        holder.eos_token_id, holder.pad_token_id = (
            processing_class.eos_token_id,
            processing_class.pad_token_id,
        )
    model.save_pretrained(temporary)
    processing_class.save_pretrained(temporary)
    (temporary / "contract.json").write_text(json.dumps(mark))
    replace_folder(temporary, folder)
    return True


def published_class(contract: Contract) -> type[PreTrainedModel]:
    """The class of the published checkpoint; or the text model's, where the contract states only that part of
    a two-part one.
    """
    config = AutoConfig.for_model(**contract.config)
    published = getattr(transformers, contract.architecture)
    found: Any = (
        published
        if published.config_class is type(config)
        else AutoModelForCausalLM._model_mapping[type(config)]
    )
    return found


def nf4(dtype: str) -> BitsAndBytesConfig:
    """NF4 with double quantisation, computed in `dtype` (QLoRA, arXiv 2305.14314). RecipeError without
    bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        found = "a base in NF4 needs the package bitsandbytes, which is not installed"
        raise RecipeError(Problem("model.quantize", found, cli.extra("bitsandbytes")))
    compute = getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def model(resolved: Resolved) -> PreTrainedModel:
    """The base model with its weights, frozen or not as the trainer will have it, in the recipe's dtype or in
    NF4.
    """
    recipe, base, path = resolved.recipe, resolved.base, resolved.base.weights
    given = recipe.model.given
    options: dict[str, Any] = {k: given[k] for k in ("revision", "attn_implementation") if k in given}
    if recipe.model.quantize == "nf4":
        options["quantization_config"] = nf4(recipe.model.dtype)
    attn_at, dtype = recipe.at("model", "attn_implementation"), getattr(torch, recipe.model.dtype)
    loaded: PreTrainedModel = checkpoint.load(base, attn_at=attn_at, dtype=dtype, **options)
    if getattr(loaded, "_hf_peft_config_loaded", False) or hasattr(loaded, "peft_config"):
        do = "TRL would reset that adapter in silence. Name the base it was trained on, or merge it first"
        raise RecipeError(Problem(recipe.at("model", "name_or_path"), f"{path} carries an adapter", do))
    router.name_experts(loaded)
    return trainable_4bit(_savable(loaded))


def _savable(model: PreTrainedModel) -> PreTrainedModel:
    """Leave of a generation config that contradicts itself only the tokens.

    Published ones do (Llama 2: a temperature beside do_sample: false). transformers 5 refuses to save a model
    with one that was changed, as TRL changes its eos and pad: after the last step, and the trained weights
    with it. What a run leaves has the base's own file again (training/finish.py).
    """
    own: Any = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError:
        tokens = {k: getattr(own, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)
    return model


def trainable_4bit(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16; other models stay as they are.

    It does so at the first forward pass in eval mode (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward),
    for a kernel that has no backward: from then on no gradient passes through these layers, and training goes
    on in silence.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _prepared_rows(rows: Rows, arguments: SFTConfig) -> Dataset:
    """As SFTTrainer takes them: to be packed, or (`skip_prepare_dataset`) ready, shuffled as it would."""
    shuffled = arguments.dataset_kwargs and arguments.shuffle_dataset
    return rows.dataset.shuffle(seed=arguments.seed) if shuffled else rows.dataset


class OneTrainer(SFTTrainer):
    """TRL's, but for three things. An evaluation is padded and in the order of its rows, whatever training
    does: the trainer's mean is over batches, and those would be others. An order by length is the same in a
    resumed run and in each process (batching.ByLength). On a CPU the loss takes the logits of the positions
    that have a label, as on a GPU (lm_head).
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's."""
        with lm_head.of_labels(self.args.torch_compile):
            return super().compute_loss(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As TRL's, padded; rows that the recipe has packed stay so."""
        trains: Any = self.data_collator
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if "seq_lengths" not in rows.column_names:
            self.data_collator = dataclasses.replace(trains, padding_free=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = trains

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return batching.sampler(batching.row_lengths(train_dataset or self.train_dataset), self.args)


def trainer(
    resolved: Resolved,
    arguments: SFTConfig,
    base: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    train: Rows,
    evaluation: Rows | None,
    callbacks: list[TrainerCallback],
    total_step: int | None = None,
) -> tuple[SFTTrainer, Start]:
    """The one SFTTrainer, and how its adapter began. It receives the PeftConfig and makes the adapter itself;
    nothing has put one on `base` before, which is trained from here on.

    `total_step` is for AdaLoRA's schedule, which fails without it.
    """
    recipe = resolved.recipe
    stopping = [EarlyStoppingCallback(**recipe.early_stopping.given)] if recipe.early_stopping else []
    config = peft_config(recipe, total_step, recipe.model.tokenizer or str(base.name_or_path))
    try:
        config = _prepared(recipe, base, config, new_tokens.ids(processing_class, recipe, 0), train)
        made = OneTrainer(
            model=base,
            args=arguments,
            train_dataset=_prepared_rows(train, arguments),
            eval_dataset=_prepared_rows(evaluation, arguments) if evaluation else None,
            processing_class=processing_class,
            peft_config=config,
            optimizer_cls_and_kwargs=rates.factory(recipe, arguments),
            callbacks=[*callbacks, *stopping, *peft_callbacks.callbacks(recipe)],
        )
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        found = f"TRL refuses it: {str(error).splitlines()[0]}"
        raise RecipeError(Problem(recipe.at("train"), found, "--traceback shows where")) from error
    if recipe.whole:
        return made, Start()
    assert made.model is not None, "it was just made with one"
    embeddings.readable_head(made.model)
    errors = initialise.begin(made.model, resolved, train)
    # TRL 1.16 makes the adapter of a 4-bit base bfloat16 (sft_trainer.py), where small updates round away:
    # docs/memory.md has the figures.
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, recipe.model.adapter_dtype))
    return made, Start(initialise.first(made.model, recipe), errors)


def _prepared(
    recipe: Recipe,
    base: PreTrainedModel,
    config: PeftConfig | None,
    new: list[int],
    rows: Sequence[Example],
) -> PeftConfig | None:
    """`config` as the trainer gets it; and what is done to `base` before: freezing, the `new` tokens' rows,
    CorDA's look at the data.
    """
    if new:
        embeddings.grow(base, new)
        embeddings.begin(base, new, recipe.train.seed)
    if recipe.freeze:
        freeze.apply(base, recipe.freeze)
    config = targets.of_text(config, base) if config else None
    config = config and targets.resolved(base, embeddings.training(config, base, new))
    initialise.before(base, config, recipe, rows)
    return config
