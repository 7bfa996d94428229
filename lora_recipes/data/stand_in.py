"""A stand-in for a tokenizer that is not at hand, so that a plan without a network can still compare
renderings.
"""

import re
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

PIECE = re.compile(r"\n+|[^\n]")
BREAKS = 0x110000  # above the last code point: a run of n line breaks is the token BREAKS + n
SPECIAL = {
    name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")
}  # some templates write them


class Characters:
    """Stands in for a tokenizer that is not at hand: a token a character, or a run of line breaks.

    Enough to compare renderings, not to count tokens. Runs, because the published tokenizers have them as one
    token: a prompt that ends in `<think>` and one line break is no prefix of a row with two.
    """

    eos_token_id = None

    def __init__(self, chat_template: str | None, named: str = ""):
        self.chat_template = chat_template
        self.named = named  # where the template is from, to be read by people

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """The characters of `text` as `input_ids`; it has no special tokens to add."""
        return {
            "input_ids": [
                ord(piece) if len(piece) == 1 else BREAKS + len(piece) for piece in PIECE.findall(text)
            ]
        }

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return "".join(chr(i) if i < BREAKS else "\n" * (i - BREAKS) for i in ids)

    def apply_chat_template(
        self,
        messages: list[dict],
        *,
        chat_template: str | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As PreTrainedTokenizerBase.apply_chat_template, in characters."""
        options = SPECIAL | kwargs | {"return_assistant_tokens_mask": return_assistant_tokens_mask}
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        rendered: Any = render_jinja_template(
            conversations=[plain], chat_template=chat_template or self.chat_template, **options
        )
        text, output = rendered[0][0], self(rendered[0][0])
        if not (tokenize and return_dict):
            return output["input_ids"] if tokenize else text
        if return_assistant_tokens_mask:
            output["assistant_masks"] = self._mask(text, rendered[1][0])
        return output

    @staticmethod
    def _mask(text: str, spans: list[tuple[int, int]]) -> list[int]:
        pieces = [piece.span() for piece in PIECE.finditer(text)]
        return [int(any(start < b and a < end for start, end in spans)) for a, b in pieces]
