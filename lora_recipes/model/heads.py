"""`task: classify`: a linear head on the pooled hidden states of a decoder, and the Trainer that trains it.

The decoder is that of the causal language model which everything else here trains, loaded and checked as that
(model/checkpoint.py). transformers' own classes (GenericForSequenceClassification) pool by the last token
that is not the padding's, by its id; here the mask says which tokens are real, and the mean of them is
offered too. The tensors have their names (`model.*`, `score.weight`), so that
AutoModelForSequenceClassification loads what is merged.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import SFTConfig

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.record import HeadFacts
from lora_recipes.data.labels import LabelGate
from lora_recipes.data.render import Example
from lora_recipes.model import build, parts, scores, targets
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import Recipe

SCORE = "score"  # the head's name in transformers' classes, PEFT's SEQ_CLS and vLLM
# What loading a base in 4 bits leaves on the model that it made, and Trainer and PEFT look at.
_AUTO: Any = AutoModelForSequenceClassification
_QUANTISED = ("hf_quantizer", "is_loaded_in_4bit", "quantization_method", "is_4bit_serializable")


class Pooled:
    """What a classifier of any family does; `of` joins it with the family's own PreTrainedModel."""

    score: nn.Linear
    pooling: str
    decoder_name: str

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **ignored: Any,
    ) -> SequenceClassifierOutput:
        """Logits [rows, classes] in float32 of `input_ids` [rows, tokens], whose real tokens are those where
        `attention_mask` is 1; and the mean cross entropy with `labels` [rows], in nats.

        The real tokens of each row are moved to its left end first: no decoder then sees the padding before
        them, nor other positions because of it, on whichever side it was.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        order = mask.argsort(dim=1, descending=True, stable=True)
        ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        hidden = self.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        count = mask.sum(1)
        with torch.autocast(hidden.device.type, enabled=False):
            if self.pooling == "mean":
                pooled = (hidden.float() * mask[:, :, None]).sum(1) / count[:, None]
            else:
                pooled = hidden[torch.arange(len(ids), device=ids.device), count - 1].float()
            logits = self.score(pooled)
        loss = cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def get_decoder(self) -> Any:
        """The text model under the head."""
        return getattr(self, self.decoder_name)


def of(base: PreTrainedModel, labels: list[str], pooling: str) -> PreTrainedModel:
    """A classifier with the decoder of `base`, a causal language model, in the place of its own head one of
    `labels`: float32, at random as the family's weights begin. `base` is of no further use.
    """
    decoder = _body(base)
    family = [k for k in type(decoder).__mro__ if issubclass(k, PreTrainedModel) and k is not PreTrainedModel]
    config = copy.deepcopy(decoder.config)
    name = family[-1].base_model_prefix or "model"
    config._name_or_path = base.name_or_path  # PEFT names it as the base; a text part has none
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    # transformers reads the file of a class for whether its experts and attention can be chosen
    own = {"__module__": family[-1].__module__, "pooling": pooling, "decoder_name": name}
    kind: Any = type(published(base), (Pooled, family[-1]), own)
    device = next(decoder.parameters()).device
    last: Any = base.get_output_embeddings() or base.score  # of a merged classifier
    with no_init_weights():
        made = kind(config)
        setattr(made, name, decoder)
        size = last.weight.shape[-1]  # not always hidden_size: OPT-350m's is projected
        made.score = nn.Linear(size, len(labels), bias=False, dtype=torch.float32, device=device)
        made.post_init()
    if device.type != "meta":
        nn.init.normal_(made.score.weight, std=getattr(config, "initializer_range", None) or 0.02)
    for key in _QUANTISED:
        if getattr(base, key, None) is not None:
            setattr(made, key, getattr(base, key))
    return made.train(base.training)


def _body(base: PreTrainedModel) -> Any:
    """What a classifier of this family holds under its head: all of a language model but its own head, which
    may stand around the decoder (OPT's); of several parts the text model alone.
    """
    if base.config.get_text_config() is not base.config:
        return parts.decoder(base)
    if base.base_model is not base:
        return base.base_model
    # Llama 4's text class has another prefix than the name under which its model stands
    return next(child for child in base.children() if isinstance(child, PreTrainedModel))


def loaded_as(config: PreTrainedConfig) -> str | None:
    """The class with which transformers loads a classifier on the text model of `config`; None where it has
    none.
    """
    kind = _AUTO._model_mapping.get(type(config), None)
    return kind.__name__ if kind else None


def lines(facts: HeadFacts | None) -> list[tuple[str, str]]:
    """The head in words, for a plan; nothing where it has none."""
    if facts is None:
        return []
    what = "the mean of a text's tokens" if facts.pooling == "mean" else "a text's last token"
    count, numbers = len(facts.classes), facts.parameters
    size = f"{numbers // count:,} x {count} = {numbers:,} parameters in float32"
    how = f"pooling {facts.pooling}: {what} in the last hidden states"
    return [("head", f"{how}; linear, {size}, trained and saved whole")]


def published(base: PreTrainedModel) -> str:
    """The name that transformers and vLLM have for a classifier of this family."""
    name = type(_body(base)).__name__
    return f"{name.removesuffix('Model')}ForSequenceClassification"


# Fields of trl.SFTConfig alone that are read here too.
_READ = {"max_length", "truncation_mode", "pad_token", "eos_token"}


def problems(recipe: Recipe) -> list[Problem]:
    """Keys of `train:` that TRL has and transformers' Trainer, which trains a head, does not."""
    trl = {f.name for f in dataclasses.fields(SFTConfig)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    return [
        Problem(
            recipe.at("train", key),
            "is TRL's, for text that is written: a head does not read it",
            "remove it",
        )
        for key in recipe.train.given
        if key in trl - _READ
    ]


def dataset(examples: list[Example]) -> Dataset:
    """`input_ids` and `labels`, the place of the class."""
    return Dataset.from_dict(
        {"input_ids": [e.input_ids for e in examples], "labels": [e.labels[0] for e in examples]}
    )


def loss(weights: list[float], smoothing: float) -> Callable[..., torch.Tensor]:
    """Cross entropy in nats: the sum of each row's own times the weight of its class, over the number of rows
    (of all accumulated batches), so that no batch counts more for what is in it.
    """

    def of_batch(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        logits = outputs["logits"]
        each = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        factors = torch.tensor(weights, device=logits.device)[labels]
        return (each * factors).sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return of_batch


def trainer(
    resolved: Resolved,
    arguments: SFTConfig,
    base: PreTrainedModel,
    gate: LabelGate,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The one Trainer. TRL's SFTTrainer computes a loss over the vocabulary and takes no model without an
    lm_head; transformers' Trainer, whose class SFTTrainer extends, takes any loss, and keeps the rest:
    schedules, checkpoints, resuming, evaluation, several processes.
    """
    recipe, config = resolved.recipe, build.peft_config(resolved.recipe)
    assert recipe.classify and config is not None, "rules.py asks for lora:"
    stopping = [EarlyStoppingCallback(**recipe.early_stopping.given)] if recipe.early_stopping else []
    config = targets.of_text(config, base)
    set_seed(arguments.seed)  # of the head, A and the order of rows
    model = of(base, gate.names, recipe.classify.pooling)
    model.config.pad_token_id = gate.tokenizer.pad_token_id
    peft_model = get_peft_model(model, targets.resolved(model, config))
    if arguments.gradient_checkpointing:
        peft_model.enable_input_require_grads()
    trained(peft_model, getattr(torch, recipe.model.adapter_dtype))
    try:
        return Trainer(
            model=peft_model,
            args=arguments,
            data_collator=DataCollatorWithPadding(gate.tokenizer),
            train_dataset=dataset(gate.train),
            eval_dataset=dataset(gate.evaluation) if gate.evaluation else None,
            processing_class=gate.tokenizer,
            compute_loss_func=loss(gate.weights, arguments.label_smoothing_factor),
            compute_metrics=lambda found: scores.metrics(found.predictions, found.label_ids),
            callbacks=[*callbacks, *stopping],
        )
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        found = f"transformers refuses it: {str(error).splitlines()[0]}"
        raise RecipeError(Problem(recipe.at("train"), found, "--traceback shows where")) from error


def trained(model: Any, dtype: torch.dtype) -> None:
    """A and B train in `dtype`; the head in float32, as vLLM computes it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if f".{SCORE}." in name else dtype)


@contextmanager
def untouched(model: PeftModel) -> Iterator[None]:
    """`model` without LoRA, but with the head that was trained: PEFT's disable_adapter() takes both off."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def logprobs(model: Any, ids: list[int]) -> list[float]:
    """Log-probability (nats) of each class of one text, in the mode that `model` is in."""
    tensor = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.no_grad():
        found = model(input_ids=tensor).logits[0].float().log_softmax(-1)
    return [round(x, 6) for x in found.tolist()]


@torch.no_grad()
def logits(model: Any, tokenizer: Any, rows: list[list[int]], size: int = 16) -> torch.Tensor:
    """Logits [rows, classes] (float32, on the CPU) of rows of tokens, in eval mode; those of like length
    together.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[Any] = [None] * len(rows)
    for first in range(0, len(rows), size):
        chosen = order[first : first + size]
        batch = tokenizer.pad({"input_ids": [rows[i] for i in chosen]}, return_tensors="pt")
        answer = model(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
        )
        for i, row in zip(chosen, answer.logits.float().cpu(), strict=True):
            found[i] = row
    model.train(was_training)
    return torch.stack(found)
