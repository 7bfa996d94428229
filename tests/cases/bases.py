"""Tiny random checkpoints that look like published ones in the one respect that a case is about.

`make(name, folder)` writes folder/name, and what it is made from, unless they are there.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

TEXT = Path(__file__).parents[2] / "data" / "companion" / "train.jsonl"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# A turn has no end: the next role's token is it. Calls and what tools say as GLM-4 has them.
ROLES = (
    "<|start|>{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|observation|>\n' + m['content'] }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim }}{% for c in m['tool_calls'] or [] %}"
    "{{ '\n' + c['function']['name'] + '\n' + c['function']['arguments'] | tojson }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
HEADER = ["start_header_id", "end_header_id"]


class Sizes(TypedDict):
    """What the configs of all these models take."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    vocab_size: int


class Experts(TypedDict):
    """What those of mixtures take besides."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int


SMALL: Sizes = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 1024,
}
EXPERTS: Experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def bpe(special: list[str], size: int = 900) -> Tokenizer:
    """A byte-level BPE of `size` tokens trained on the companion's sentences, and `special` after them."""
    rows = [json.loads(line) for line in TEXT.read_text().splitlines()]
    texts = [m["content"] for row in rows for m in row["prompt"] + row["completion"]][:600]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    raw.add_special_tokens(special)
    return raw


def save(folder: Path, model: PreTrainedModel, tokenizer, eos) -> None:
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llama3(folder: Path) -> None:
    """BOS by the tokenizer's post-processor and by the template; eos is eot_id, no pad token."""
    raw = bpe(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    bos = raw.token_to_id("<|begin_of_text|>")
    raw.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                special_tokens=[("<|begin_of_text|>", bos)],
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3
    )
    eos = tokenizer.eos_token_id
    config = LlamaConfig(**SMALL, tie_word_embeddings=False, bos_token_id=bos, eos_token_id=eos)
    stops = [tokenizer.convert_tokens_to_ids("<|end_of_text|>"), eos]
    save(folder, LlamaForCausalLM(config), tokenizer, stops)


def chatml(special_eos: str) -> PreTrainedTokenizerFast:
    raw = bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=special_eos, pad_token="<|endoftext|>", chat_template=CHATML
    )


def qwen_base(folder: Path) -> None:
    """Qwen2.5's base: a ChatML template, while eos is endoftext, the pad token."""
    tokenizer = chatml("<|endoftext|>")
    eos = tokenizer.eos_token_id
    config = Qwen2Config(**SMALL, tie_word_embeddings=True, bos_token_id=eos, eos_token_id=eos)
    save(folder, Qwen2ForCausalLM(config), tokenizer, eos)


def gemma(folder: Path) -> None:
    """Gemma's: eos is <eos>, turns end with <end_of_turn>."""
    raw = bpe(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"])
    bos = raw.token_to_id("<bos>")
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=GEMMA
    )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Gemma2Config(**SMALL, head_dim=32, eos_token_id=eos, bos_token_id=bos, pad_token_id=pad)
    save(
        folder, Gemma2ForCausalLM(config), tokenizer, [eos, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    )


def phi(folder: Path) -> None:
    """Phi-3's and Phi-4-mini's: a turn ends with <|end|>, which takes the line break behind it; eos is
    endoftext, which the template writes after the last turn; generation_config lists both."""
    ends = ["<|endoftext|>", "<|end|>"]
    raw = bpe(ends[:1])
    raw.add_special_tokens(
        [AddedToken(t, rstrip=True) for t in ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=ends[0], pad_token=ends[0], chat_template=PHI
    )
    eos = tokenizer.eos_token_id
    config = LlamaConfig(**SMALL, tie_word_embeddings=False, bos_token_id=eos, eos_token_id=eos)
    save(folder, LlamaForCausalLM(config), tokenizer, tokenizer.convert_tokens_to_ids(ends))


def mistral(folder: Path) -> None:
    """Mistral's first: replies end with </s>, its eos; no system role."""
    raw = bpe(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=MISTRAL
    )
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        **SMALL, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos
    )
    save(folder, LlamaForCausalLM(config), tokenizer, eos)


def bigtok(folder: Path) -> None:
    """The tokenizer of llama3 with 200 tokens more than that model's embedding has rows."""
    tokenizer = AutoTokenizer.from_pretrained(make("llama3", folder.parent))
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(200)])
    tokenizer.save_pretrained(folder)


def roles(folder: Path) -> None:
    """As GLM-4: the next role's token ends a turn, and generation_config lists it; eos is endoftext."""
    others = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    raw = bpe(["<|endoftext|>", "<|start|>", *others])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=ROLES
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", *others]})
    eos = tokenizer.eos_token_id
    config = LlamaConfig(**SMALL, tie_word_embeddings=False, bos_token_id=None, eos_token_id=eos)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    save(folder, LlamaForCausalLM(config), tokenizer, ends)


def gpt2(folder: Path) -> None:
    """Learned positions, 64 of them: a longer row is an error in the embedding, where RoPE goes on."""
    tokenizer = chatml("<|im_end|>")
    eos = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=1024, n_positions=64, n_embd=64, n_layer=2, n_head=2, eos_token_id=eos)
    save(folder, GPT2LMHeadModel(config), tokenizer, eos)


def qwen2_moe(folder: Path) -> None:
    """Routed experts as one parameter each, and a shared expert that has the names of a dense MLP."""
    tokenizer = chatml("<|im_end|>")
    config = Qwen2MoeConfig(
        **SMALL,
        **EXPERTS,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    save(folder, Qwen2MoeForCausalLM(config), tokenizer, tokenizer.eos_token_id)


def qwen3_moe(folder: Path) -> None:
    """Routed experts only: gate_proj, up_proj and down_proj name no module."""
    tokenizer = chatml("<|im_end|>")
    config = Qwen3MoeConfig(**SMALL, **EXPERTS, eos_token_id=tokenizer.eos_token_id)
    save(folder, Qwen3MoeForCausalLM(config), tokenizer, tokenizer.eos_token_id)


def llama3_bnb4(folder: Path) -> None:
    """llama3 as bitsandbytes stores it: NF4 with double quantisation."""
    source = make("llama3", folder.parent)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def claims(**config) -> Callable[[Path], None]:
    """llama3 whose config.json says something else of it."""

    def write(folder: Path) -> None:
        shutil.copytree(make("llama3", folder.parent), folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config, indent=1))

    return write


def remote(folder: Path) -> None:
    """llama3 whose classes are in Python files beside it (`auto_map`)."""
    claims(
        model_type="my_llama",
        architectures=["MyLlamaForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_my.MyConfig",
            "AutoModelForCausalLM": "modeling_my.MyLlamaForCausalLM",
        },
    )(folder)
    (folder / "configuration_my.py").write_text(
        "from transformers import LlamaConfig\nclass MyConfig(LlamaConfig):\n    model_type = 'my_llama'\n"
    )
    (folder / "modeling_my.py").write_text(
        "from transformers import LlamaForCausalLM\nclass MyLlamaForCausalLM(LlamaForCausalLM):\n    pass\n"
    )


QUANTISED: dict[str, dict[str, object]] = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"},
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False},
    "awq": {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
}
BASES: dict[str, Callable[[Path], None]] = {
    "llama3": llama3,
    "qwen_base": qwen_base,
    "gemma": gemma,
    "phi": phi,
    "mistral": mistral,
    "bigtok": bigtok,
    "roles": roles,
    "gpt2": gpt2,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "llama3_bnb4": llama3_bnb4,
    "remote": remote,
} | {
    f"llama3_{method}": claims(quantization_config=dict(values, quant_method=method))
    for method, values in QUANTISED.items()
}


def make(name: str, folder: Path) -> Path:
    """folder/`name`, made unless it is there."""
    made = folder / name
    if not made.exists():
        set_seed(0)
        BASES[name](made)
    return made
