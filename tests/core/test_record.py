"""run.json: written and read by one class, strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.core import record
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder

BEFORE = Path(__file__).with_name("run_before_schema.json").read_text(encoding="utf-8")


def changed(edit):
    """A run.json of schema 1 as `edit` leaves it."""
    content = json.loads(record.dumps(record.loads(BEFORE, "run.json")))
    edit(content)
    return json.dumps(content)


def problems_of(text):
    with pytest.raises(RecipeError) as error:
        record.loads(text, "run.json")
    return error.value.problems


def test_a_run_json_of_the_form_before_the_schema_is_read_and_written_in_the_new_form():
    run: Any = record.loads(BEFORE, "run.json")
    assert isinstance(run, record.FinishedRun) and run.schema == 1
    assert run.plan.model.trainable == 4096 and run.plan.model.class_ == "Qwen3ForCausalLM"
    assert run.probes.after[0].first and not run.probes.before[0].first
    old, new = json.loads(BEFORE), json.loads(record.dumps(run))
    assert run.resume_facts.base_weights == old["resume_facts"]["base weights"]
    assert new.pop("schema") == 1
    assert list(new.pop("resume_facts").values()) == list(old.pop("resume_facts").values())
    assert new == old, "all else has its old keys and values"


def test_one_of_the_form_before_whose_fields_do_not_fit_is_an_error_that_names_them():
    content = json.loads(BEFORE)
    del content["plan"]["model"], content["resume_facts"]["base weights"]
    found = problems_of(json.dumps(content))
    assert [str(p.where) for p in found] == ["run.json: plan.model", "run.json: resume_facts.base_weights"]
    assert all(p.found == "is missing" for p in found) and not found[0].do
    assert "form before schema 1" in found[1].do and "FORCE=1" in found[1].do, "said once, at the end"


def test_a_record_reads_back_as_it_was_written():
    run: Any = record.loads(BEFORE, "run.json")
    grown = dataclasses.replace(
        run,
        resumed=[record.Resumed(from_="checkpoint-10", at="2026-01-01T00:00:00+00:00")],
        warm_start=record.WarmStart(mean=0.1, worst=0.2, module="q_proj"),
    )
    assert record.loads(record.dumps(grown), "run.json") == grown
    assert '"from": "checkpoint-10"' in record.dumps(grown)


@pytest.mark.parametrize(
    ("edit", "where", "found"),
    [
        (lambda r: r.update(stpes=1), "stpes", "unknown, did you mean steps?"),
        (lambda r: r.pop("seconds"), "seconds", "is missing"),
        (lambda r: r.update(steps="40"), "steps", "is '40', must be whole number"),
        (lambda r: r.update(steps=True), "steps", "is True, must be whole number"),
        (
            lambda r: r.update(status="done"),
            "status",
            "is 'done', must be `running` or `failed` or `finished`",
        ),
        (
            lambda r: r["plan"]["model"].update(total=None),
            "plan.model.total",
            "is None, must be whole number",
        ),
        (lambda r: r["metrics"].update(train_loss="x"), "metrics.train_loss", "is 'x', must be number"),
        (lambda r: r["probes"]["after"][0].pop("top"), "probes.after[0].top", "is missing"),
        (
            lambda r: r["probes"]["after"][0]["top"][1].append(1),
            "probes.after[0].top[1]",
            "must be [text, ",
        ),
        (lambda r: r.update(git=[]), "git", "is [], must be mapping (Git)"),
    ],
)
def test_what_does_not_fit_is_named_by_file_and_key(edit, where, found):
    (problem,) = problems_of(changed(edit))
    assert problem.where == f"run.json: {where}" and found in problem.found
    assert "FORCE=1 trains anew" in problem.do


def test_every_fault_is_named_at_once():
    assert len(problems_of(changed(lambda r: (r.pop("base"), r.update(steps="x", x=1))))) == 3


@pytest.mark.parametrize("schema", [2, "1", None, True])
def test_another_schema_is_not_guessed_at(schema):
    (problem,) = problems_of(changed(lambda r: r.update(schema=schema)))
    assert problem.where == "run.json: schema" and "FORCE=1" in problem.do


def test_a_run_that_failed_keeps_what_was_known_and_needs_no_outcome():
    def edit(content):
        content["status"] = "failed"
        del content["result_bytes"], content["memory"]

    run = record.loads(changed(edit), "run.json")
    assert type(run) is record.Run and run.steps == 40 and run.memory is None


def test_only_a_whole_outcome_finishes_a_run():
    run: Any = record.loads(changed(lambda r: r.update(status="running")), "run.json")
    done = record.finished(run, "2026-01-01T00:00:00+00:00", 7, ["a"], [])
    assert (done.status, done.result_bytes, done.steps) == ("finished", 7, 40)
    with pytest.raises(AssertionError, match="seconds"):
        record.finished(dataclasses.replace(run, seconds=None), "2026-01-01T00:00:00+00:00", 7, ["a"], [])


def test_a_combination_is_no_run(tmp_path):
    run: Any = record.loads(BEFORE, "run.json")
    combined = record.Combined(
        adapters={"one": "a"},
        weights=[1.0],
        combination_type="linear",
        density=None,
        svd_rank=None,
        seed=0,
        rank=4,
        ranks=[4],
        max_lora_rank=8,
        bytes=1,
        from_sum=0.0,
        reloaded_logits=0.0,
    )
    common = {f.name: getattr(run, f.name) for f in dataclasses.fields(record.Record)}
    made = record.CombinedRecord(**common, combined=combined)
    folder = RunFolder(tmp_path)
    folder.write_record(made)
    assert folder.record == made and folder.finished
    with pytest.raises(RecipeError, match="holds a combination"):
        _ = folder.run


def test_every_field_says_what_it_is():
    assert not [line for line in record.page().splitlines() if line.endswith("|  |")]
