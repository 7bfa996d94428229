"""Which names of Python code a model predicts: found in the tokens of real tokenizers, counted against a
second way to the same figures.
"""

import contextlib
import json
import re

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_recipes.core import interval
from lora_recipes.curate import python_files
from lora_recipes.data.render import IGNORED, Example, Turn
from lora_recipes.evaluation import identifiers
from lora_recipes.evaluation.evaluate import evaluation, report
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.training.train import train
from tests.cases import bases

CODE = '''def total_size(rows, gr\u00f6\u00dfe):
    """Sum of rows: each total counts."""
    total_size = sum(len(row) for row in rows)  # total of len
    return total_size * gr\u00f6\u00dfe
'''
ROWS = [
    ("Add `rows` up.", f"Gladly:\n\n```python\n{CODE}```\nThat is it, len aside."),
    ("Close the door of `rows`.", "```\nfor row in rows:\n    row.close(door)\n```"),
    ("What is a door?", "A thing that one may close. `rows` has none."),
]


def byte_level() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=bases.bpe(["<|end|>"]), eos_token="<|end|>")


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces are characters of words, what is unknown is bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    strip = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.decoder = decoders.Sequence(strip)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = CODE.replace("\u00f6\u00df", "o")  # so that those are bytes
    made.train_from_iterator([text] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def example(tokenizer: PreTrainedTokenizerFast, asked: str, said: str) -> Example:
    prompt = tokenizer(asked + "\n", add_special_tokens=False)["input_ids"]
    reply = tokenizer(said, add_special_tokens=False)["input_ids"]
    ids = [*prompt, *reply, tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return Example("x:1", ids, labels, [Turn(len(prompt), len(ids) - 1, True)])


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_each_name_is_found_in_the_tokens_that_hold_it_and_in_no_more(make):
    tokenizer, (asked, said) = make(), ROWS[0]
    whole = example(tokenizer, asked, said)
    found = identifiers.found(whole, tokenizer, range(len(whole.input_ids)))
    names = ["total_size", "rows", "gr\u00f6\u00dfe", "total_size", "sum", "len", "row", "row", "rows"]
    names += ["total_size", "gr\u00f6\u00dfe"]
    assert len(found) == len(names)
    for name, one in zip(names, found, strict=True):
        ids = whole.input_ids
        assert name in tokenizer.decode(ids[one.start : one.end])
        assert name not in tokenizer.decode(ids[one.start + 1 : one.end])
        assert name not in tokenizer.decode(ids[one.start : one.end - 1])
    parts = ["new", "prompt", "new", "said", "new", "new", "new", "said", "prompt", "said", "said"]
    assert [one.part for one in found] == parts


def test_what_was_cut_away_or_is_not_trained_is_not_asked_and_gives_no_name_away():
    tokenizer, (asked, said) = byte_level(), ROWS[0]
    whole = example(tokenizer, asked, said)
    every = identifiers.found(whole, tokenizer, range(len(whole.input_ids)))
    cut = every[4].end - 1  # in the middle of a name
    assert identifiers.found(whole, tokenizer, range(cut)) == every[:4]
    begin = whole.turns[0].start  # train.truncation_mode: keep_end
    kept = identifiers.found(whole, tokenizer, range(begin, len(whole.input_ids)))
    assert kept[0] == identifiers.Identifier(every[0].start - begin, every[0].end - begin, "new")
    assert kept[1].part == "new" != every[1].part, "the prompt is cut away"
    whole.labels[:] = [IGNORED] * len(whole.labels)
    assert identifiers.found(whole, tokenizer, range(len(whole.input_ids))) == []


@pytest.mark.parametrize(
    ("said", "blocks"),
    [
        ("```python\nx = 1\n```\nand\n```\ny\n```\n```\ndel y\n```", ["x = 1\n", "del y\n"]),
        ("```json\n{}\n```\n```py\nx = [", ["x = ["]),
        ("    return x\n", ["    return x\n"]),
        ("import x\n", ["import x\n"]),
        ("sofa", []),
        ("It is on the sofa.", []),
        ("", []),
    ],
)
def test_code_is_what_stands_in_fences_or_what_parses(said, blocks):
    found = list(python_files.in_text(said))
    assert [block for _, block in found] == blocks
    assert all(said[at:].startswith(block) for at, block in found)


def test_without_identifiers_there_is_no_line():
    assert identifiers.accuracy([[], []], [[], []], [[], []]) is None
    assert identifiers.table({"eval": None}, {"eval": "held out"}) == []


def test_an_evaluation_counts_what_the_models_logits_say(case, tmp_path):
    """A tiny model learns three rows by heart; each name is asked once more, by another way to its tokens."""
    rows = tmp_path / "code.jsonl"
    chats = [
        {"prompt": [turn("user", asked)], "completion": [turn("assistant", said)]} for asked, said in ROWS
    ]
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    recipe = case("qwen_base_eos_set", train__max_steps=30, train__learning_rate=2e-2, lora__r=16)
    words = [f"data.train={rows}", "lora.target_modules=all-linear", "lora.modules_to_save=[lm_head]"]
    train(resolve(recipes.load(str(recipe), words), tmp_path))
    found = evaluation("qwen_base_eos_set", tmp_path, [f"data.eval={rows}"])
    counted = found.sets["eval"].identifiers
    assert counted and counted["all"].rows == 2, "the third has no code"
    folder = tmp_path / "qwen_base_eos_set" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(found.base), folder).eval()
    hits: dict[str, list[list[bool]]] = {"base": [], "trained": []}
    for asked, said in ROWS[:2]:
        turns = [turn("user", asked), turn("assistant", said)]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        output = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_offsets_mapping=True)
        ids, offsets = output["input_ids"], output["offset_mapping"][0].tolist()
        blank = re.sub(r'""".*"""|#.*', lambda m: " " * len(m[0]), said)  # no names in there
        code = re.compile(r"[^\W\d]\w*").finditer(
            blank, blank.index("\n", blank.index("```")), blank.rindex("```")
        )
        names = [n.span() for n in code if n[0] not in ("def", "for", "in", "return")]
        for side, context in (("base", model.disable_adapter()), ("trained", contextlib.nullcontext())):
            with context, torch.no_grad():
                hit = (model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()
            at = text.rindex(said)
            held = [[i for i, (a, b) in enumerate(offsets) if a < at + d and b > at + c] for c, d in names]
            hits[side].append([all(hit[i - 1] for i in tokens) for tokens in held])
    count = [len(row) for row in hits["base"]]
    assert counted["all"].count == sum(count) == 11 + 5
    for side, rows_hit in hits.items():
        assert getattr(counted["all"], side) == pytest.approx(sum(map(sum, rows_hit)) / sum(count))
    changes = [sum(a) - sum(b) for a, b in zip(hits["trained"], hits["base"], strict=True)]
    assert counted["all"].half == pytest.approx(interval.per_unit(changes, count).half)
    assert counted["all"].base < 0.2 < counted["all"].trained < 1
    assert (counted["new"].count, counted["prompt"].count) == (5 + 2, 2 + 2)
    assert re.search(r"^held out +all +2 +16 +\d", report(found), re.M)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
