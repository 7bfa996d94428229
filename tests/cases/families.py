"""A tiny random checkpoint of each family of models that people bring: transformers' own class, made from its
own config, and a tokenizer that all of them share.

`make(name, folder)` writes folder/name unless it is there; `rows(folder)` the chats to train on.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

from tests.cases.bases import CHATML

# Is transformers older than those that these expectations are of? Older ones are admitted, and some of their
# classes do other things.
OLDER = Version(transformers.__version__) < Version("5.24")
CHATS = {
    "What colour is the sky?": "It is blue, mostly.",
    "Who keeps the key?": "The old baker keeps it.",
    "Where does the train go?": "It goes to Bremen at noon, and comes back late.",
    "Name a fruit.": "Pear.",
    "How many legs has a spider?": "Eight legs.",
    "Say hello.": "Hello, and good morning to you all.",
    "What is two and two?": "Four.",
    "Tell me a secret.": "The lamp hides the spare key under its foot.",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<boi>", "<eoi>", "<video>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML; replies end with <|im_end|>, its eos."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([*CHATS, *CHATS.values()], trainer)
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


_ID = {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL}
_VOCABULARY = 384
_TOKENS = {
    "pad_token_id": _ID["<|endoftext|>"],
    "bos_token_id": _ID["<|endoftext|>"],
    "eos_token_id": _ID["<|im_end|>"],
}
_SMALL = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    **_TOKENS,
}
_OLD = {"vocab_size": _VOCABULARY, **_TOKENS}  # configs with names of their own
_GPT = {**_OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MIXED: dict[str, Any] = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_HEAD = {"head_dim": 8}
_TIED = {"tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
}
_IMAGES = {"image_token_id": _ID["<image>"]}
_VIDEOS = {
    **_IMAGES,
    "video_token_id": _ID["<video>"],
    "vision_start_token_id": _ID["<boi>"],
    "vision_end_token_id": _ID["<eoi>"],
}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}


def _small(*others: dict[str, Any], **fields: Any) -> dict[str, Any]:
    made = dict(_SMALL)
    for other in (*others, fields):
        made |= other
    return made


# family: the class of its checkpoints, and the fields of its config
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "bloom": ("BloomForCausalLM", {**_OLD, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "cohere2": ("Cohere2ForCausalLM", _small(_MIXED, _TIED)),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _small(
            num_key_value_heads=4,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        ),
    ),
    "exaone4": ("Exaone4ForCausalLM", _small(_MIXED)),
    "falcon": (
        "FalconForCausalLM",
        {
            **_OLD,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "alibi": False,
            "new_decoder_architecture": False,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        _small(
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=16,
            mamba_chunk_size=16,
        ),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        _small(_HEAD, _TIED, query_pre_attn_scalar=8, sliding_window=64),
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _small(_HEAD, _MIXED, _TIED, query_pre_attn_scalar=8),
            "vision_config": _VISION,
            "mm_tokens_per_image": 1,
            "image_token_index": _ID["<image>"],
            "boi_token_index": _ID["<boi>"],
            "eoi_token_index": _ID["<eoi>"],
            **_TIED,
        },
    ),
    "gemma3_text": ("Gemma3ForCausalLM", _small(_HEAD, _MIXED, _TIED, query_pre_attn_scalar=8)),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": _small(_HEAD, _MIXED, _TIED, global_head_dim=8, hidden_size_per_layer_input=0),
            "vision_config": None,
            "audio_config": None,
            "boi_token_id": _ID["<boi>"],
            "eoi_token_id": _ID["<eoi>"],
            **_IMAGES,
        },
    ),
    "glm4": ("Glm4ForCausalLM", _small(_HEAD)),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        _small(
            _HEAD,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=24,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
    ),
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "gpt_oss": ("GptOssForCausalLM", _small(_HEAD, _MIXED, _LOCAL)),
    "gptj": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "granite": (
        "GraniteForCausalLM",
        _small(_TIED, logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    ),
    "granitemoe": ("GraniteMoeForCausalLM", _small(_LOCAL, logits_scaling=2.0)),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        _small(
            _LOCAL,
            layer_types=["mamba", "attention"],
            shared_intermediate_size=48,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=16,
            mamba_n_groups=1,
            mamba_chunk_size=16,
        ),
    ),
    "jamba": (
        "JambaForCausalLM",
        _small(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            use_mamba_kernels=False,
        ),
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        _small(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    ),
    "llama": (
        "LlamaForCausalLM",
        _small(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        ),
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": _small(
                _HEAD,
                num_local_experts=2,
                num_experts_per_tok=1,
                intermediate_size_mlp=48,
                interleave_moe_layer_step=1,
                attention_chunk_size=64,
            ),
            "vision_config": {
                **_VISION,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "image_token_index": _ID["<image>"],
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_small()},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_VISION},
            "image_token_index": _ID["<image>"],
            "image_seq_length": 4,
        },
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            **_OLD,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 16,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 16,
        },
    ),
    "ministral3": ("Ministral3ForCausalLM", _small(_HEAD)),
    "mistral": ("MistralForCausalLM", _small(_HEAD, sliding_window=64)),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **_small(_HEAD)},
            "vision_config": {"model_type": "pixtral", **_VISION},
            "image_token_index": _ID["<image>"],
        },
    ),
    "mixtral": ("MixtralForCausalLM", _small(_LOCAL)),
    "nemotron_h": (
        "NemotronHForCausalLM",
        _small(
            _HEAD,
            hybrid_override_pattern="M*",
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=16,
            n_groups=1,
            chunk_size=16,
        ),
    ),
    "olmo2": ("Olmo2ForCausalLM", _small()),
    "olmo3": ("Olmo3ForCausalLM", _small(_MIXED)),
    "opt": (
        "OPTForCausalLM",
        {
            **_OLD,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
        },
    ),
    "phi": ("PhiForCausalLM", _small()),
    "phi3": ("Phi3ForCausalLM", _small(original_max_position_embeddings=256)),
    "qwen2": ("Qwen2ForCausalLM", _small(_TIED)),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _small(rope_parameters=_MROPE),
            "vision_config": {**_QWEN_VISION, "patch_size": 14, "fullatt_block_indexes": [1]},
            **_VIDEOS,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        _small(_EXPERTS, shared_expert_intermediate_size=48, decoder_sparse_step=1),
    ),
    "qwen3": ("Qwen3ForCausalLM", _small(_HEAD)),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": _small(_EXPERTS, _LINEAR, head_dim=32, shared_expert_intermediate_size=24),
            "vision_config": {**_QWEN_VISION, "depth": 1, "num_position_embeddings": 16},
            **_VIDEOS,
        },
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _small(_HEAD, _EXPERTS)),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _small(_HEAD, _EXPERTS, _LINEAR, shared_expert_intermediate_size=24),
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": _small(_HEAD, rope_parameters={**_MROPE, "mrope_interleaved": True}),
            "vision_config": {
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **_VIDEOS,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        _small(num_hidden_layers=3, lru_width=32, attention_window_size=64),
    ),
    "smollm3": ("SmolLM3ForCausalLM", _small(_TIED)),
    "stablelm": ("StableLmForCausalLM", _small()),
    "starcoder2": ("Starcoder2ForCausalLM", _small(sliding_window=64)),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": _VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": _TOKENS["pad_token_id"],
            "eos_token_id": _TOKENS["eos_token_id"],
            "decoder_start_token_id": _TOKENS["pad_token_id"],
        },
    ),
}


def make(name: str, folder: Path) -> Path:
    """folder/`name`, made unless it is there. Its matrices are three times wider than transformers makes
    them: else logits are nearly uniform, and a wrong one passes for a right one."""
    made = folder / name
    if not made.exists():
        set_seed(0)
        kind: Any = getattr(transformers, FAMILIES[name][0])
        model = kind(kind.config_class(**FAMILIES[name][1]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
        model.save_pretrained(made)
        tokenizer().save_pretrained(made)
    return made


def rows(folder: Path) -> Path:
    """folder/rows.jsonl, one chat a line."""
    file = folder / "rows.jsonl"
    chats = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in CHATS.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return file
