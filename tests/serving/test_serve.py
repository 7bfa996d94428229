"""A real vLLM server on the CPU: what answers is what was trained, and what is not is caught."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from lora_recipes.__main__ import main
from lora_recipes.core import files, provenance
from lora_recipes.core.errors import RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.model import answers
from lora_recipes.model.merge import merge
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.release.answers import Log, Server
from lora_recipes.serving import command as vllm_command
from lora_recipes.serving import live, serve
from lora_recipes.serving.chat import chat
from lora_recipes.serving.endpoint import Endpoint
from lora_recipes.training.train import train
from tests import process
from tests.process import Forked
from tests.typed import there

pytestmark = pytest.mark.vllm

UNAVAILABLE = vllm_command.ENVIRONMENT / ".unavailable"
READY = vllm_command.ENVIRONMENT / ".ready"
if UNAVAILABLE.exists() or not READY.exists():
    pytest.skip(
        UNAVAILABLE.read_text() if UNAVAILABLE.exists() else "vLLM is not installed: make setup-serve",
        allow_module_level=True,
    )

CASES = Path(__file__).parents[1] / "cases"
SCRIPT = str(files.ROOT / "scripts" / "serve.py")
QUESTIONS = [
    "The cat sleeps on the",
    "The train goes to",
    "The key lies under the",
    "The picture hangs in the",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """`serve` in the background, until it says that Ctrl-C ends it. As a context manager: up in it, and ended
    with its whole process tree.

    In a fork of this process, quick where the test takes `quick_vllm`; or as `new`, as a person starts it:
    scripts/serve.py in an interpreter of its own.
    """

    def __init__(self, folder: Path, *arguments: str, new: bool = False, **environment: str):
        self.port = free_port()
        (log := folder / str(self.port)).mkdir()
        self.logs = [log / "stdout", log / "stderr"]
        words = ["serve", "--port", str(self.port), "--outputs", str(folder), *arguments]
        self.process: subprocess.Popen[bytes] | Forked
        if new:
            with self.logs[0].open("wb") as output, self.logs[1].open("wb") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, SCRIPT, *words[1:]], stdout=output, stderr=errors
                )
        else:
            self.process = Forked(tuple(words), log, **environment)
        self.url = f"http://127.0.0.1:{self.port}"

    def up(self) -> "Running":
        until = time.monotonic() + 900  # a busy machine starts it in minutes
        while "Ctrl-C ends it" not in self.said:
            assert self.process.poll() is None and time.monotonic() < until, self.said
            time.sleep(0.05)
        return self

    def __enter__(self) -> "Running":
        try:
            return self.up()
        except BaseException:
            self.process.send_signal(signal.SIGINT)
            raise

    def __exit__(self, *_: object) -> None:
        assert self.end() == [], "the whole process tree ends with Ctrl-C"

    @property
    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    def end(self) -> list[psutil.Process]:
        """Ctrl-C; returns what is still alive of the tree."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        assert any("vllm" in " ".join(p.cmdline()) for p in family)
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(300) == 130
        return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def work(tmp_path_factory, trained):
    """The trained default with a second adapter on the same base."""
    train(
        resolve(
            recipes.load("tiny_facts", ["train.seed=7", "lora.r=12", "train.max_steps=20"]),
            _beside(trained, tmp_path_factory),
        ),
    )
    return trained


def _beside(trained: Path, tmp_path_factory) -> Path:
    other = trained / "other"
    other.mkdir()
    (other / "tiny_base").symlink_to(trained / "tiny_base")
    return other


@pytest.fixture(scope="module")
def dense(work):
    other = f"other={work / 'other' / 'tiny_facts' / 'adapter'}"
    base = str(work / "tiny_base" / "model")
    with Running(work, "--dynamic", "--base", base, "tiny_facts", other, new=True) as server:
        yield server


def copied(source: Path, folder: Path, change=None, **config) -> Path:
    """A copy of an adapter with other values in its config, or other tensors."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if change:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {name: change(value) for name, value in tensors.items()}, folder / "adapter_model.safetensors"
        )
    return folder


def continuations(model, tokenizer, end: str | None = None) -> list[str]:
    """The greedy continuation of each question, of eight tokens or until `end`, by transformers itself."""
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids(end)} if end else {}
    answers = []
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=8, do_sample=False, **ends)
        answers.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def asked(url: str, model: str) -> list[str]:
    """The greedy continuation of each question, by the server."""
    return [Endpoint(url).write(model, question, {}, 8).text.strip() for question in QUESTIONS]


def test_two_adapters_on_one_server_are_proven_live(dense):
    assert re.search(r"tiny_facts +\d\.\d+ .* live\n", dense.said) and re.search(
        r"other +\d\.\d+ .* live\n", dense.said
    )
    assert "--max-lora-rank 16" in dense.said, "the largest adapter, r 12, counts"


def test_the_proof_is_recorded_in_run_json_of_the_adapter(dense, work):
    run = work / "tiny_facts"
    found = there(there(RunFolder(run).record).served)
    assert found.adapter_sha256 == files.sha256(run / "adapter" / "adapter_model.safetensors")
    assert found.apart < found.allowed


def test_the_proof_is_tight_in_float32(dense, work):
    known = provenance.read(work / "tiny_facts" / "adapter")
    proof = live.prove(Endpoint(dense.url), "base", {"tiny_facts": known})[0]
    assert proof.fault is None and there(proof.apart) < 1e-3 < 0.1 < there(proof.moved)
    assert abs(there(proof.moved) - there(proof.effect)) < 1e-3 and there(proof.noise) < 1e-3


def test_what_passes_a_proxy_is_kept_as_it_was_answered_streamed_or_not(dense, tmp_path):
    log = Log(tmp_path / "answers.jsonl")
    proxy = Server(("127.0.0.1", 0), urlsplit(dense.url), log, True)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{proxy.server_port}"
        said = Endpoint(url).write("tiny_facts", QUESTIONS[0], {}, 8).text
        asked = {"model": "tiny_facts", "prompt": QUESTIONS[0], "max_tokens": 8, "temperature": 0}
        body = json.dumps(asked | {"stream": True}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=900) as answer:
            assert answer.read().rstrip().endswith(b"data: [DONE]")
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
    kept = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert [row["completion"] for row in kept] == [said, said]
    assert all(row["prompt"] == QUESTIONS[0] and row["finish_reason"] == "stop" for row in kept)


def test_the_server_writes_what_peft_writes_for_base_and_adapter(dense, work):
    base = AutoModelForCausalLM.from_pretrained(work / "tiny_base" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "tiny_base" / "model")
    assert asked(dense.url, "base") == continuations(base, tokenizer)
    attached = PeftModel.from_pretrained(base, work / "tiny_facts" / "adapter").eval()
    assert asked(dense.url, "tiny_facts") == continuations(attached, tokenizer)


def test_an_adapter_is_checked_again_on_demand(dense, work, capsys):
    assert serve.check(dense.url, [], work) == 0
    assert capsys.readouterr().out.count("live") == 2
    assert serve.check(dense.url, ["tiny_facts"], work) == 0
    with pytest.raises(RecipeError, match="serves no mine"):
        serve.check(dense.url, [f"mine={work / 'tiny_facts' / 'adapter'}"], work)


def test_an_adapter_of_another_scaling_is_caught(dense, work, tmp_path):
    """lora_alpha doubled in the file: vLLM takes it, no shape tells; only the answers do."""
    broken = copied(work / "tiny_facts" / "adapter", tmp_path / "doubled", lora_alpha=8)
    endpoint = Endpoint(dense.url)
    with pytest.raises(RecipeError):
        endpoint.load("doubled", str(tmp_path / "none"))
    endpoint.load("doubled", str(broken))
    proof = live.prove(endpoint, "base", {"doubled": provenance.read(broken)})[0]
    endpoint.unload("doubled")
    fault = there(proof.fault)
    assert "not what was trained" in fault
    assert f"{proof.apart:.4f}" in fault and f"{proof.limit:.4f}" in fault
    with pytest.raises(RecipeError, match="lora_alpha"):
        serve.add(dense.url, [f"doubled={broken}"], work)
    unsealed = replace(there(provenance.read(broken)), files={}, adapter_config={})
    unsealed.save(broken)  # as a version wrote it that kept no hashes: only the answers tell
    assert serve.add(dense.url, [f"doubled={broken}"], work) == serve.NOT_LIVE
    assert "doubled" not in endpoint.models(), "what fails its proof is taken off again"


def test_bad_adapters_are_refused_without_disturbing_the_rest(dense, work, tmp_path):
    source, endpoint = work / "tiny_facts" / "adapter", Endpoint(dense.url)
    before = endpoint.write("tiny_facts", QUESTIONS[0], {}, 4)
    nan = copied(source, tmp_path / "nan", lambda value: value * float("nan"))
    with pytest.raises(RecipeError, match="NaN or infinity"):
        serve.add(dense.url, [f"nan={nan}"], work)
    wide = copied(source, tmp_path / "wide", use_dora=True)
    with pytest.raises(RecipeError, match="DoRA"):
        serve.add(dense.url, [f"wide={wide}"], work)
    with pytest.raises(RecipeError, match="already serves a model named other"):
        serve.add(dense.url, [f"other={source}"], work)
    assert list(endpoint.models()) == ["base", "tiny_facts", "other"]
    assert endpoint.write("tiny_facts", QUESTIONS[0], {}, 4) == before


def test_adapters_come_and_go(dense, work, capsys):
    assert serve.add(dense.url, [f"again={work / 'tiny_facts' / 'adapter'}"], work) == 0
    assert "again" in Endpoint(dense.url).models()
    assert serve.remove(dense.url, ["again"]) == 0
    assert "again" not in Endpoint(dense.url).models()
    with pytest.raises(RecipeError, match=r"serves no again\n    -> it has base, tiny_facts, other"):
        serve.remove(dense.url, ["again"])


def test_a_rank_above_the_server_s_is_refused_by_it_and_said(dense, work, tmp_path):
    big = train(
        resolve(recipes.load("tiny_facts", ["lora.r=32", "train.max_steps=2"]), _symlinked(work, tmp_path))
    )
    assert big.status == "finished"
    with pytest.raises(RecipeError, match=r"LoRA rank 32 is greater than max_lora_rank 16"):
        serve.add(dense.url, [f"big={tmp_path / 'tiny_facts' / 'adapter'}"], work)


def _symlinked(work: Path, folder: Path) -> Path:
    (folder / "tiny_base").symlink_to(work / "tiny_base")
    return folder


def test_base_and_adapter_answer_side_by_side(dense):
    said = chat(dense.url, "tiny_facts", [QUESTIONS[0]])
    assert said.splitlines()[0] == f"> {QUESTIONS[0]}"
    assert re.search(r"base  table", said) and re.search(r"tiny_facts  sofa", said)
    assert chat(dense.url, "tiny_facts", []).count("> ") == 4, "without a question those of training"
    with pytest.raises(RecipeError, match="MODEL=one of base, tiny_facts, other"):
        chat(dense.url, "nobody", [])


def test_the_code_that_passk_judges_is_what_the_server_writes(dense, work, tmp_path):
    rows = [{"task_id": q, "prompt": q, "entry_point": "f", "test": "assert f() == 1"} for q in QUESTIONS]
    (file := tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["passk", "tiny_facts", f"evaluate.tasks={file}", "evaluate.max_new_tokens=3"]
    assert main([*words, "--url", dense.url, "--outputs", str(work)]) == 0
    found = json.loads((work / "tiny_facts" / "pass_at_k" / "tasks.report.json").read_text())
    for sample in found["samples"]:
        prompt = sample["task_id"]
        wrote = Endpoint(dense.url).write(sample["model"], prompt, {}, 3).text
        assert sample["code"] == prompt + wrote and sample["verdict"] == "not_loaded"
    assert len({sample["code"] for sample in found["samples"]}) > len(QUESTIONS), "base and adapter differ"


def test_a_taken_port_is_said_at_once(dense, work):
    done = process.run("serve", "--port", str(dense.port), "--outputs", str(work))
    assert done.returncode == 2 and "cannot be listened on" in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_dies_at_start_leaves_its_last_error(work, quick_vllm):
    """max_position_embeddings is 128."""
    words = ["--port", str(free_port()), "--outputs", str(work), "--", "--max-model-len", "4096"]
    done = process.run("serve", *words)
    assert done.returncode == 2 and "vLLM: ended at start (exit 1): " in done.stderr
    assert "max_model_len" in done.stderr and "Traceback" not in done.stderr and len(done.stderr) < 1500


def test_a_qwen35_adapter_is_served_under_the_names_of_its_class_and_as_saved_it_is_caught(
    tmp_path, quick_vllm
):
    """To both vLLM says `Loaded new LoRA adapter` and answers 200."""
    train(resolve(recipes.load("tiny_qwen35_style", ["train.max_steps=8"]), tmp_path))
    with Running(tmp_path, "--dynamic", "tiny_qwen35_style", "--", "--max-model-len", "512") as server:
        # of eight steps: it answers as trained, and has not learned to stop, which is said
        assert re.search(r"tiny_qwen35_style +\d\.\d+ .* live; BUT .* did not end", server.said)
        saved = tmp_path / "tiny_qwen35_style" / "adapter"
        endpoint = Endpoint(server.url)
        endpoint.load("as_saved", str(saved))
        proof = live.prove(endpoint, "base", {"as_saved": provenance.read(saved)})[0]
        assert proof.moved == 0 and "not live" in there(proof.fault) and proof.rendered
        assert proof.ended, "of what fails already the long answer, without an end here, is not waited for"
        unknown = live.prove(endpoint, "base", {"as_saved": None, "tiny_qwen35_style": None})
        assert "not live" in there(unknown[0].fault) and unknown[1].fault is None, (
            "seen without PEFT's answers as well"
        )
        assert serve.check(server.url, [], tmp_path) == serve.NOT_LIVE
        assert '"enable_thinking": false' in server.said, (
            "the server renders as training did, without being told by each request"
        )
        ids = endpoint.tokens("base", [{"role": "user", "content": "Hello"}], {})
        tokenizer = AutoTokenizer.from_pretrained(saved)
        messages = [{"role": "user", "content": "Hello"}]
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=True
        )
        assert isinstance(rendered, BatchEncoding) and ids == rendered["input_ids"]


def test_a_reply_ends_where_it_was_trained_to_by_adapter_and_by_merged_model(
    bases, tmp_path, capsys, quick_vllm
):
    """A base whose eos is no end of the template's. An adapter with another end is refused by that server.
    The merged model answers as the adapter does; its server has an API key: another one, or none, is told so.
    """
    folder, words = tmp_path / "outputs", [f"model.name_or_path={bases('qwen_base')}", "train.eos_token=null"]
    shutil.copy(CASES / "rows.jsonl", tmp_path)
    shutil.copy(CASES / "eos_proof.yaml", tmp_path)
    recipe = recipes.load(str(tmp_path / "eos_proof.yaml"), [*words, "train.max_steps=60"])
    train(resolve(recipe, folder))
    adapter, merged = folder / "eos_proof" / "adapter", folder / "eos_proof" / "merged"
    merge(adapter, merged)
    tokenizer = AutoTokenizer.from_pretrained(bases("qwen_base"))
    end = "('<|im_end|>' if m['role'] == 'user' else '<|im_start|>')"
    (tmp_path / "own.jinja").write_text(tokenizer.chat_template.replace("'<|im_end|>'", end))
    shutil.copy(tmp_path / "eos_proof.yaml", tmp_path / "other.yaml")
    words += ["train.max_steps=2", "model.chat_template=own.jinja"]
    train(resolve(recipes.load(str(tmp_path / "other.yaml"), words), folder))

    with Running(folder, "--dynamic", "eos_proof") as server:
        assert re.search(r"eos_proof +\d\.\d+ .* live; ended its answer\n", server.said)
        ends = [ended(server.url, "eos_proof"), ended(server.url, "base")]
        said = chat(server.url, "eos_proof", ["Where is the cat?"])
        by_adapter = asked(server.url, "eos_proof")
        capsys.readouterr()
        assert serve.add(server.url, ["other"], folder) == serve.NOT_LIVE
        assert "never stops: training ended a reply with <|im_start|>" in capsys.readouterr().out
        assert "other" not in Endpoint(server.url).models()
    assert ends == [True, False]
    assert "eos_proof  It sleeps on the sofa." in said and "[no end within 128 tokens]" in said
    attached = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases("qwen_base")), adapter
    ).eval()
    assert by_adapter == continuations(attached, tokenizer, "<|im_end|>")

    with (
        Running(folder, str(merged), VLLM_API_KEY="secret") as server,
        pytest.MonkeyPatch.context() as own,
    ):
        assert re.search(r"eos_proof +\d\.\d+ .* live; ended its answer\n", server.said)
        for key in None, "wrong":
            own.setenv("VLLM_API_KEY", key) if key else own.delenv("VLLM_API_KEY", raising=False)
            with pytest.raises(RecipeError, match=r"another API key\n    -> set VLLM_API_KEY"):
                Endpoint(server.url).models()
        own.setenv("VLLM_API_KEY", "secret")
        assert ended(server.url, "eos_proof")
        assert asked(server.url, "eos_proof") == by_adapter


@pytest.mark.real
def test_two_adapters_of_a_real_model_are_live_and_one_is_removed_under_load(smollm2, tmp_path, quick_vllm):
    runs = {"one": smollm2.run("float32"), "two": smollm2.run("narrow")}
    words = [f"{name}={run / 'adapter'}" for name, run in runs.items()]
    base = str(smollm2.base("float32"))
    with Running(tmp_path, "--dynamic", "--base", base, *words) as server:
        endpoint = Endpoint(server.url)
        known = {name: unasked(run / "adapter") for name, run in runs.items()}
        assert len(re.findall(r"(?:one|two) +\d\.\d+ .* live", server.said)) == 2
        for proof in live.prove(endpoint, "base", dict(known)):
            assert proof.fault is None and there(proof.apart) < 1e-3 < 0.02 < there(proof.moved), proof
        crossed = live.prove(endpoint, "base", {"one": known["two"]})[0]
        assert there(crossed.apart) > 10 * there(proof.apart), "each has its own answers"
        served = [endpoint.logprobs("one", probe.input_ids) for probe in known["one"].probes]
        assert far(smollm2.merged("float32"), "float32", known["one"], served) < 1e-3
        writes_rows(server.url, "base", tmp_path)

        def write(_: int) -> str:
            return endpoint.write("one", "The capital of France is", {}, 12).text

        before = write(0)
        with ThreadPoolExecutor(4) as pool:
            written = pool.map(write, range(8))
            assert serve.remove(server.url, ["two"]) == 0
            assert set(written) == {before}
        assert list(endpoint.models()) == ["base", "one"]
        with pytest.raises(RecipeError):
            endpoint.write("two", "The", {}, 2)


@pytest.mark.real
def test_an_adapter_of_a_real_bfloat16_model_is_live_and_merged_it_answers_the_same(
    smollm2, tmp_path, quick_vllm
):
    run = smollm2.run("bfloat16")
    words = ["--base", str(smollm2.base("bfloat16")), f"one={run / 'adapter'}"]
    with Running(tmp_path, *words) as server:
        assert "--dtype bfloat16" in server.said
        endpoint, known = Endpoint(server.url), unasked(run / "adapter")
        proof = live.prove(endpoint, "base", {"one": known})[0]
        assert proof.fault is None and there(proof.apart) < there(proof.limit) < there(proof.effect)
        served = [endpoint.logprobs("one", probe.input_ids) for probe in known.probes]
        assert far(smollm2.merged("bfloat16"), "bfloat16", known, served) < there(proof.limit)


def unasked(adapter: Path) -> provenance.Provenance:
    """What training recorded, but for the question, whose long answer the server's own proof waited for."""
    return replace(there(provenance.read(adapter)), question=None)


def far(folder: Path, dtype: str, known: provenance.Provenance, served: list[list[float]]) -> float:
    """How far the merged model in `folder`, asked by transformers, is from what a server answered."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    pairs = zip(known.probes, served, strict=True)
    return max(live.apart(answers.logprobs(model, probe.input_ids), found) for probe, found in pairs)


def writes_rows(url: str, model: str, folder: Path) -> None:
    """As a teacher of `data synthesise`: a row for each prompt, counted as it counts, and asked for once."""
    questions = ["Name a river of France.", "What is a lake?", "Where do penguins live?"]
    seeds, out = folder / "prompts.jsonl", folder / "rows.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    words = ["data", "synthesise", str(seeds), str(out), "--method", "teacher", "--url", url]
    words += ["--model", model, "--min-tokens", "1", "--max-tokens", "32", "--request", 'stop=[".", "?"]']
    assert main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and all(row["provenance"]["teacher"] == model for row in rows)
    answers = [json.loads(line) for line in (folder / "rows.journal.jsonl").read_text().splitlines()]
    counted = [len(Endpoint(url).tokens(model, [{"role": "user", "content": q}], {})) for q in questions]
    assert sorted(answer["read"] for answer in answers) == sorted(counted)
    assert {row["messages"][-1]["content"] for row in rows} <= {answer["text"].strip() for answer in answers}
    assert main([*words, "--overwrite"]) == 0
    report = json.loads((folder / "rows.report.json").read_text())["synthesis"]
    assert (report["requests"], report["from_journal"], report["kept"]) == (0, 3, len(rows))


def ended(url: str, model: str) -> bool:
    """Does the answer to a chat question end by itself?"""
    return Endpoint(url).write(model, [{"role": "user", "content": "Where is the cat?"}], {}, 60).ended
