"""Is a text nearly one that came before? For texts that are made one by one; `dedupe` compares whole sets."""

from collections import defaultdict

from lora_recipes.curate import sketch
from lora_recipes.curate.sketch import Grams

WORDS = 3  # of an n-gram, as dedupe has it
LEAST = 8  # of a text's smallest hashes, by which candidates are found: 1 - 0.3^8 = 99.99 % at Jaccard 0.7


class Near:
    """Texts so far, as the hashes of their word n-grams: 8 bytes a word. `share`: the Jaccard similarity from
    which on two texts are nearly the same; it is computed in full for each candidate.
    """

    def __init__(self, share: float):
        self.share = share
        self._texts: list[Grams] = []
        self._holders: dict[int, list[int]] = defaultdict(list)

    def new(self, text: str) -> bool:
        """Is `text` like none before? Then it is added."""
        own = sketch.grams([text], WORDS)
        candidates = {i for least in own[:LEAST].tolist() for i in self._holders.get(least, ())}
        if any(sketch.jaccard(own, self._texts[i]) >= self.share for i in candidates):
            return False
        self._add(own)
        return True

    def add(self, text: str) -> None:
        """Add `text`, like another or not."""
        self._add(sketch.grams([text], WORDS))

    def _add(self, own: Grams) -> None:
        for least in own[:LEAST].tolist():
            self._holders[least].append(len(self._texts))
        self._texts.append(own)
