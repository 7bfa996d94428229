"""Is the adapter that is deployed still at home in what it is asked? `make monitor RECIPE=x LOG=a.jsonl`
takes a sample of the answers that were kept (answers.py), makes a page of it for a person, and compares its
loss with that on the release's held-out rows.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, files, interval, lock, release_folder
from lora_recipes.core.errors import Exit, Problem, RecipeError, raise_if
from lora_recipes.core.interval import Mean
from lora_recipes.core.record import Monitored
from lora_recipes.core.run_folder import RunFolder, noted
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import cli as curate
from lora_recipes.evaluation import evaluate
from lora_recipes.recipe import load as recipes

ENDED = ("stop", "tool_calls")  # the answer ended by itself; others were cut


def monitor(
    word: str, outputs: Path, log: Path, share: float, seed: int, model: str | None, force: bool = False
) -> int:
    """Sample `share` of the answers in `log` (of `model`, where several answered), write the sample and its
    page beside it (`force` replaces them), and say whether the loss has risen.

    Returns DONE, DRIFT where the loss on the sample is higher by its interval than on the release's held-out
    rows, or TOO_FEW where so few rows show nothing. RecipeError where it cannot be said.
    """
    folder = RunFolder(outputs.absolute() / recipes.run_of(word, outputs))
    there = release_folder.deployed(folder.path)
    if there is None:
        do = cli.command("release", RECIPE=folder.path.name, TAG="lora-v1")
        raise RecipeError(Problem(shown(folder.path), "nothing of it is deployed", do))
    place, manifest = there
    held = manifest.losses.get("eval")
    if held is None or held.trained.half is None:
        found = "its release has no loss on held-out rows, or one without an interval"
        do = "evaluate with data.eval of several rows, and release anew"
        raise RecipeError(Problem(shown(place / release_folder.MANIFEST), found, do))
    if not 0 < share <= 1:
        raise RecipeError(Problem("--share", f"{share:g} is no share", "0.05 to 0.1, or more of few answers"))
    sample, page = (log.with_suffix(end) for end in (".sample.jsonl", ".review.html"))
    taken = [file for file in (sample, page) if file.exists() and not force]
    raise_if([Problem(shown(f), "is already there", f"{cli.command(FORCE=True)} replaces it") for f in taken])
    rows, cut = _read(log, model)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), max(1, round(share * len(rows)))))
    files.write(sample, "".join(rows[i] for i in chosen))
    if code := curate.main(["review", str(sample), str(page), "--share", "1", "--overwrite"]):
        return code
    loss = evaluate.loss_of(place, sample, folder.path.name, outputs)
    before = Mean(held.trained.loss, held.trained.half, held.rows)
    change = interval.between(loss, before)
    drift = change.shown and change.value > 0
    found_ = Monitored(
        at=files.now(),
        tag=manifest.tag,
        answers_sha256=files.sha256(sample),
        rows=loss.count,
        loss=loss.value,
        half=loss.half,
        held_out=before.value,
        change=change.value,
        change_half=change.half,
        drift=drift,
    )
    with lock.runs([folder.result("lora")], "records"):
        noted(folder.result("lora"), monitored=found_)
    said = "not shown: one row" if loss.half is None else "higher: drift" if drift else "no rise shown"
    print(
        f"answers     {len(rows):,} that ended by themselves ({cut:,} were cut and are left out),"
        f" {loss.count:,} sampled (share {share:g}, seed {seed})\n"
        f"loss        {loss} on them, {before} on the {held.rows:,} held-out rows of {manifest.tag}\n"
        f"change      {change.signed(unit='row')} nats a token: {said}",
        flush=True,
    )
    return Exit.TOO_FEW if loss.half is None else Exit.DRIFT if drift else Exit.DONE


def _read(log: Path, model: str | None) -> tuple[list[str], int]:
    """The lines of the log whose answers ended by themselves, and how many did not. RecipeError for a file
    that is no such log, and where it is not said which of several models is meant.
    """
    try:
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        do = cli.command("monitor", LOG="x.jsonl", URL="http://127.0.0.1:8000")
        raise RecipeError(Problem(shown(log), f"cannot be read: {error}", do)) from None
    found: list[tuple[dict[str, Any], str]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.append((row | {"model": row["model"], "finish_reason": row["finish_reason"]}, line))
        except (ValueError, TypeError, KeyError):
            do = "name the file that monitor kept, as it is; a last line that was cut off may be removed"
            raise RecipeError(Problem(f"{shown(log)}:{number}", "is no answer that was kept", do)) from None
    models = Counter(row["model"] for row, _ in found)
    if model is None and len(models) > 1:
        said = ", ".join(f"{name} ({count:,})" for name, count in models.most_common())
        raise RecipeError(Problem(shown(log), f"several models answered: {said}", cli.command(MODEL="one")))
    mine = [(row, line) for row, line in found if model in (None, row["model"])]
    whole = [line for row, line in mine if row["finish_reason"] in ENDED]
    if not whole:
        raise RecipeError(Problem(shown(log), "holds no answer that ended by itself", "keep more of them"))
    return whole, len(mine) - len(whole)
