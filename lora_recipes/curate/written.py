"""The files that a data verb leaves: JSONL as it is, packed, or as Parquet. Imports no torch."""

import gzip
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.yamlfile import shown

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
BATCH = 1_000  # rows of a Parquet file's row group


def named(out: Path) -> tuple[Path, str]:
    """`x` and the ending of an output. RecipeError where it is none that is written."""
    ending = next((e for e in ENDINGS if out.name.endswith(e) and out.name != e), "")
    if not ending:
        raise RecipeError(Problem(f"OUT {out}", "is no file that is written here", f"x{', x'.join(ENDINGS)}"))
    if out.is_dir():
        raise RecipeError(Problem(shown(out), "is a folder", "give a file"))
    return out.with_name(out.name.removesuffix(ending)), ending


def pack(rows: Path, ending: str) -> str:
    """The name of the file beside the JSONL file `rows` that is the output: itself, or what is made of it,
    the same bytes each time. RecipeError where Parquet cannot hold the rows.
    """
    out = rows.with_name(f"{rows.name}{ending}")
    if ending == ".jsonl":
        return rows.name
    if ending == ".jsonl.gz":
        with (
            rows.open("rb") as plain,
            out.open("wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        ):
            shutil.copyfileobj(plain, packed)
    else:
        _parquet(rows, out)
    return out.name


def _batches(rows: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of a JSONL file, BATCH at once, each time with the number of the first, from 0."""
    with rows.open("rb") as lines:
        for first in itertools.count(0, BATCH):
            if not (batch := [json.loads(line) for line in itertools.islice(lines, BATCH)]):
                return
            yield first, batch


def _parquet(rows: Path, out: Path) -> None:
    """Twice through the rows: one schema that holds all, then the file; each row is looked at again."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([])
    at = 0
    try:
        for at, batch in _batches(rows):  # noqa: B007
            found = pyarrow.Table.from_pylist(_all_keys(batch)).schema
            schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
        with parquet.ParquetWriter(out, schema) as writer:
            for at, batch in _batches(rows):
                table = pyarrow.Table.from_pylist(batch, schema=schema)
                for number, (row, held) in enumerate(zip(batch, table.to_pylist(), strict=True), at):
                    if _no_nulls(row) != _no_nulls(held):
                        raise _unfit(f"row {number} would not be the same in it")
                writer.write_table(table)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, RecipeError):
            raise
        said = str(error).strip().splitlines()[0]
        raise _unfit(f"rows {at} to {at + BATCH - 1}: {said}") from None


def _no_nulls(value: Any) -> Any:
    """Without nulls, which Parquet has where a row has no such field."""
    if isinstance(value, dict):
        return {k: _no_nulls(v) for k, v in value.items() if v is not None}
    return [_no_nulls(v) for v in value] if isinstance(value, list) else value


def _all_keys(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row with the keys of all: pyarrow takes the columns from it."""
    keys = dict.fromkeys(key for row in batch for key in row)
    return [dict.fromkeys(keys) | batch[0], *batch[1:]]


def _unfit(found: str) -> RecipeError:
    do = "a column of Parquet has one type: write x.jsonl instead, which holds any row"
    return RecipeError(Problem("OUT as Parquet", found, do))
