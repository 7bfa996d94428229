"""Rows of any form and file -> rows as they are trained; what could not be carried over is said."""

from argparse import ArgumentParser, Namespace

from lora_recipes.curate import inputs, work
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.work import Outcome, dropped, kept
from lora_recipes.data.forms import FIELDS_OF, Form, with_system
from lora_recipes.data.row import faults as row_faults
from lora_recipes.data.row import used

TOLD = """Write ShareGPT, Alpaca, OpenAI's rows, Parquet, CSV or JSON arrays as rows that recipes train.

A row becomes messages, prompt and completion, or text (docs/data.md). What has no place in them is counted
in the report, field by field; a row that could not be trained is dropped with the reason."""


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    work.options(parser)
    parser.add_argument(
        "--format", choices=FIELDS_OF, help="the form of all rows (default: by the fields that each has)"
    )


def run(given: Namespace) -> str:
    """Convert each row."""
    read = inputs.of(given)
    columns = read.columns
    form = Form(given.format, columns, columns.get("text", "text"))

    def convert(item: Item) -> Outcome:
        named, found = form.read(item.raw)
        found = found or row_faults(named, form.text_field)
        if not found:
            value, found = with_system(used(named, form.text_field), named.get("system"))
        if found:
            return dropped("could not be trained", "; ".join(what for what, _ in found))
        lost = [k for k, v in named.items() if v is not None and k not in (*value, form.text_field, "system")]
        return kept(value, notes=[f"field {k} is not carried over" for k in lost])

    with work.begun(given, read) as job:
        job.run(read, convert)
        return job.finish()
