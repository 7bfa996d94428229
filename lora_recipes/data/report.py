"""What a person reads of checked rows as a whole: which source gives how much, how long the rows are, what
another train.max_length would keep.
"""

import numpy as np

from lora_recipes.data.rows import Rows
from lora_recipes.recipe.recipe import Recipe

PERCENT = (50, 90, 99)


def sources(rows: Rows) -> str:
    """A table of the sources, with what one epoch takes of each; empty for a single one that is taken once
    and whole.
    """
    told, lines = rows.told, ["rows of the source    x  tokens      lost  of the loss"]
    if len(told.entries) < 2 and all(entry.get("weight", 1) == 1 for entry in told.entries):
        return ""
    source, lengths, whole, supervised = rows.source, rows.lengths, rows.length, rows.supervised
    for number, (entry, has) in enumerate(zip(told.entries, told.rows, strict=True)):
        own = source == number
        taken = int(own.sum())
        line = f"{taken:>8,} of {has:<9,} {taken / max(has, 1):>5.2f}"
        if told.counted:
            tokens, before = int(lengths[own].sum()), int(whole[own].sum())
            of_loss = int(supervised[own].sum()) / max(int(supervised.sum()), 1)
            line += f" {tokens:>11,} {100 * (1 - tokens / max(before, 1)):>5.1f} % {100 * of_loss:>8.1f} %"
        lines.append(f"{line}  {entry['path']}")
    return "\n".join(lines)


def lengths(rows: Rows, recipe: Recipe) -> str:
    """How long the rows are before they are cut, and what other values of train.max_length would keep of
    them, at which width of the largest batch; empty where tokens are not counted.
    """
    if not rows.told.counted or not len(rows):
        return ""
    whole, limit = np.sort(rows.length), recipe.train.max_length
    total, longest = int(whole.sum()), int(whole[-1])
    up_to = [f"{p} % up to {np.percentile(whole, p, method='higher'):,.0f}" for p in PERCENT]
    lines = [f"{', '.join(up_to)}, longest {longest:,} tokens"]
    size = recipe.train.per_device_train_batch_size
    reaching = next(2**k for k in range(1, 40) if 2**k >= longest)
    for value in sorted(
        {limit // 2, limit, limit * 2, reaching // 2, reaching} if limit else {reaching // 2}
    ):
        cut, kept = int((whole > value).sum()), int(np.minimum(whole, value).sum())
        keeps_more = limit is not None and limit < longest and limit < value <= reaching
        if value != limit and (value < 2 or not (cut or keeps_more)):
            continue
        now = " (now)" if value == limit else ""
        lost = (
            f"cuts {cut:,} rows, {total - kept:,} tokens ({100 * (1 - kept / total):.1f} %)"
            if cut
            else "cuts none"
        )
        lines.append(f"max_length {value:,}{now} {lost}; largest batch {size} x {min(value, longest):,}")
    return "\n".join(lines)
