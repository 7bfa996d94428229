"""What an adapter needs of a server. Imports no torch."""

from typing import Any

# The values vLLM 0.32 takes for --max-lora-rank (vllm/config/lora.py, MaxLoRARanks).
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def rank(config: dict[str, Any]) -> int:
    """The largest rank in an adapter_config.json (or a recipe's `lora:` section): r, or a larger value of rank_pattern."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def max_lora_rank(needed: int) -> int | None:
    """The smallest `--max-lora-rank` that serves rank `needed`; None when vLLM has none."""
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= needed), None)
