"""`push`: huggingface_hub's own client against a stand-in of the hub. The real hub is never asked."""

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard, constants
from safetensors.numpy import load_file, save_file

from lora_recipes.__main__ import main
from lora_recipes.core import provenance
from lora_recipes.core.files import ROOT
from tests.serving import hub as stand_in
from tests.typed import there

TOKEN = "hf_" + "TokenOfTheTestsThatNobodyMaySee" + "abc"
# What a run of tiny_facts leaves that is published, beside recipe.yaml.
OF_THE_ADAPTER = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "provenance.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, to which huggingface_hub is pointed; `me` may write there. Without xet, whose protocol it
    does not speak, large files go by LFS.
    """
    with stand_in.running() as hub:
        hub.users[TOKEN] = "me"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # HF_ENDPOINT, which was read at the import
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def outputs(trained, tmp_path):
    """The finished run of tiny_facts in an outputs folder of its own."""
    shutil.copytree(trained / "tiny_facts", tmp_path / "outputs" / "tiny_facts")
    return tmp_path / "outputs"


@pytest.fixture
def push(outputs, capsys):
    """`push("me/tiny", "--force")` -> exit code, and what was said."""

    def call(repo, *words, word="tiny_facts"):
        code = main(["push", word, "--outputs", str(outputs), *(["--repo", repo] if repo else []), *words])
        text = "".join(capsys.readouterr())
        assert TOKEN not in text
        return code, text

    return call


def on_disk(outputs):
    """What should arrive: each file's bytes."""
    run = outputs / "tiny_facts"
    files = {name: (run / "adapter" / name).read_bytes() for name in OF_THE_ADAPTER}
    return files | {"recipe.yaml": (run / "recipe.yaml").read_bytes()}


def holds(hub, repo="me/tiny"):
    """What arrived, without what the hub itself put there."""
    return {name: content for name, content in hub.repos[repo].files.items() if name != ".gitattributes"}


def test_what_training_made_arrives_byte_for_byte_in_one_private_commit(hub, push, outputs, tmp_path):
    code, text = push("me/tiny")
    assert code == 0 and holds(hub) == on_disk(outputs)
    repo = hub.repos["me/tiny"]
    assert repo.private and repo.large == {"adapter_model.safetensors"} and len(repo.commits) == 2
    assert hub.objects[(sent := next(iter(hub.objects)))] == on_disk(outputs)["adapter_model.safetensors"]
    assert hub.made("PUT") == [f"PUT /lfs/{sent}"]
    assert f"published   8 files as me: {hub.url}/me/tiny/commit/{repo.commits[-1]}" in text
    assert "to          me/tiny, private" in text and "18,408  adapter_model.safetensors" in text
    # whoever loads it has what was trained, and can prove it
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in holds(hub).items():
        (folder / name).write_bytes(content)
    assert provenance.edited(folder, there(provenance.read(folder))) == []
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    # and can publish it again
    assert push("me/again", word=str(folder))[0] == 0 and holds(hub, "me/again") == holds(hub)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, push, outputs, caplog):
    with caplog.at_level("DEBUG"):
        push("me/tiny")
        hub.users.clear()
        push("me/other")
    assert TOKEN not in caplog.text
    assert not [p for p in outputs.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    for request, headers, body in hub.asked:
        assert TOKEN.encode() not in body and TOKEN not in request
        where = {name for name, value in headers.items() if TOKEN in value}
        assert where == (set() if request.startswith("PUT") else {"authorization"}), request


def test_the_same_content_twice_is_nothing_to_do(hub, push):
    push("me/tiny")
    commits = list(hub.repos["me/tiny"].commits)
    code, text = push("me/tiny")
    assert code == 0 and f"nothing to do: me/tiny holds these files, commit {commits[-1]}" in text
    assert hub.repos["me/tiny"].commits == commits and len(hub.made("POST /api/models/me/tiny/commit")) == 1


def test_what_no_training_of_the_adapter_wrote_is_left_out_and_named(hub, push, outputs):
    adapter = outputs / "tiny_facts" / "adapter"
    for name in ("optimizer.pt", "notes.txt", "training_args.bin", "vocab.json"):
        (adapter / name).write_text("not of the adapter")
    (outputs / "tiny_facts" / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    shutil.copytree(outputs / "tiny_facts" / "checkpoints", adapter / "checkpoints")
    code, text = push("me/tiny")
    assert code == 0 and set(holds(hub)) == OF_THE_ADAPTER | {"recipe.yaml"}
    assert "left out    checkpoints, notes.txt, optimizer.pt, training_args.bin, vocab.json" in text


def test_a_dry_run_lists_and_asks_nobody(hub, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, text = push("me/tiny", "--dry-run", "--public")
    assert code == 0 and "me/tiny, public" in text and hub.asked == []
    assert all(name in text for name in OF_THE_ADAPTER | {"recipe.yaml"})
    assert "provenance.json quotes 4 texts of the rows: they become public" in text
    assert "adapter_config.json, provenance.json: the base is a folder of this machine" in text


# ---- what provenance.json does not vouch for


def changed_alpha(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 64}))


def changed_tensor(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file, {"format": "pt"})


def missing_tokenizer(adapter):
    (adapter / "tokenizer.json").unlink()


def no_hashes(adapter):
    """As earlier versions wrote it."""
    file = adapter / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"files": {}, "adapter_config": {}}))


def another_recipe(adapter):
    file = adapter.parent / "recipe.yaml"
    file.write_text(file.read_text().replace("r: 4", "r: 8"))


CHANGED = {
    changed_alpha: ("lora_alpha: is 64, training wrote 4", False),
    changed_tensor: ("adapter_model.safetensors: was changed after training", False),
    missing_tokenizer: ("tokenizer.json: was saved by training and is missing", False),
    another_recipe: ("recipe.yaml: is not what the run was trained with", False),
    no_hashes: ("is of an earlier version, without hashes", True),
    lambda adapter: (adapter / "provenance.json").unlink(): ("no provenance.json beside it", True),
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda c: c.__name__)
def test_an_adapter_that_is_not_as_trained_is_not_published(hub, push, outputs, change):
    found, may = CHANGED[change]
    adapter = outputs / "tiny_facts" / "adapter"
    change(adapter)
    (adapter / "optimizer.pt").write_text("a checkpoint's")
    code, text = push("me/tiny")
    assert code == 2 and found in text and hub.asked == []
    code, text = push("me/tiny", "--unproven")
    assert (code == 0) is may and found in text
    if may:
        assert set(holds(hub)) >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
        assert set(holds(hub)) <= OF_THE_ADAPTER | {"recipe.yaml"}


def test_an_adapter_that_nobody_vouches_for_must_be_sound_at_least(hub, push, outputs):
    file = outputs / "tiny_facts" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    file.with_name("provenance.json").unlink()
    code, text = push("me/tiny", "--unproven")
    assert code == 2 and "adapter_model.safetensors" in text and hub.asked == []


def test_a_token_in_a_file_is_not_published(hub, push, outputs, monkeypatch):
    card = outputs / "tiny_facts" / "adapter" / "README.md"
    text = card.read_text()
    for secret, mine in (
        (TOKEN, TOKEN),
        ("hf_" + "x" * 34, "another_token"),
        ("another_token", "another_token"),
    ):
        card.write_text(text + f"use {secret}")
        monkeypatch.setenv("HF_TOKEN", mine)
        code, said = push("me/tiny")
        assert code == 2 and "README.md: holds a token of the hub" in said
        assert hub.asked == [] and secret not in said


# ---- what is there already


def test_what_is_there_is_replaced_only_when_asked(hub, push, outputs):
    push("me/tiny")
    theirs = hub.repos["me/tiny"].files
    ours = on_disk(outputs)
    theirs |= {"adapter_model.safetensors": b"other", "chat_template.jinja": b"old", "notes/mine.md": b"kept"}
    before = dict(theirs)
    code, text = push("me/tiny")
    assert code == 2 and theirs == before
    assert "has another adapter_model.safetensors and holds chat_template.jinja, notes/mine.md" in text
    assert "FORCE=1 replaces it (files that are of no model stay)" in text
    code, text = push("me/tiny", "--force")
    assert code == 0 and holds(hub) == ours | {"notes/mine.md": b"kept"}
    assert "removed     chat_template.jinja" in text and "published   1 files" in text
    assert len(hub.repos["me/tiny"].commits) == 3


def test_a_repository_with_other_files_alone_is_not_taken(hub, push):
    hub.repos["me/tiny"] = stand_in.Repo(True, {"notes.md": b"of somebody"})
    assert push("me/tiny")[0] == 2 and holds(hub) == {"notes.md": b"of somebody"}
    assert push("me/tiny", "--force")[0] == 0 and holds(hub)["notes.md"] == b"of somebody"


def test_an_empty_repository_is_filled(hub, push, outputs):
    hub.repos["me/tiny"] = stand_in.Repo(True)
    assert push("me/tiny")[0] == 0 and holds(hub) == on_disk(outputs)


def test_nothing_becomes_public_unasked(hub, push):
    hub.repos["me/tiny"] = stand_in.Repo(False)
    code, text = push("me/tiny")
    assert code == 2 and "me/tiny: is public: everybody would see the adapter" in text and not holds(hub)
    assert push("me/tiny", "--public")[0] == 0
    hub.repos["me/hidden"] = stand_in.Repo(True)
    code, text = push("me/hidden", "--public")
    assert code == 2 and "me/hidden: is private" in text and not holds(hub, "me/hidden")
    assert push("me/new", "--public")[0] == 0 and not hub.repos["me/new"].private
    hub.makes_public = True
    code, text = push("me/made")
    assert code == 2 and "was made public, whatever was asked; it is empty" in text
    assert not holds(hub, "me/made")


def test_a_commit_beside_ours_is_not_overwritten(hub, push):
    def beside(request):
        if request.endswith("/preupload/main"):
            hub.repos["me/tiny"].commits.append("f" * 40)

    hub.fault = beside
    code, text = push("me/tiny")
    assert code == 2 and "was changed by somebody else meanwhile" in text and not holds(hub)


def test_a_file_that_does_not_arrive_is_named(hub, push):
    """The hub leaves out in silence what a .gitignore there names."""
    hub.repos["me/tiny"] = stand_in.Repo(True, {".gitignore": b"tokenizer.json"})
    code, text = push("me/tiny", "--force")
    assert code == 2 and "does not hold what was sent: tokenizer.json" in text and ".gitignore" in text


def test_a_repository_that_has_moved_is_not_written_to(hub, push):
    moved = {"id": "me/newer", "sha": "0" * 40, "private": True, "siblings": []}
    hub.fault = lambda request: stand_in.ok(moved) if "/api/models/" in request else None
    code, text = push("me/tiny")
    assert code == 2 and "is called me/newer now" in text and not hub.made("POST")


# ---- errors: one clear sentence, what to do, exit code 2


@pytest.mark.parametrize(
    "repo",
    ["", "tiny", "me/a--b", "me/tiny/x", "me/ti ny", "https://huggingface.co/me/tiny", "me/" + "x" * 97],
)
def test_a_name_that_the_hub_would_not_take_is_refused_here(hub, push, repo):
    code, text = push(repo)
    assert code == 2 and "owner/name" in text and text.count("error") == 1 and hub.asked == []


ECHO = stand_in.said(403, f"the token {TOKEN} is read-only")
FAULTS = {
    "no right": (ECHO, "/repos/create", "(403: the token (HF_TOKEN) is read-only)", "it belongs to me"),
    "wrong token": (None, "/api/whoami-v2", "the hub does not know HF_TOKEN (401", "/settings/tokens"),
    "a fault": ((500, b"oops"), "/api/whoami-v2", "the hub has a fault of its own (500", "wait a while"),
    "at the end": (
        (502, b"<html>bad gateway"),
        "/commit/main",
        "(502",
        "a commit is whole or not there",
    ),
    "a page": ((200, b"<html>sign in"), "/api/whoami-v2", "is not the hub: no JSON", "HF_ENDPOINT"),
    "another": ((200, b"{}"), "/api/whoami-v2", "was not understood", "HF_ENDPOINT"),
    "often": ((429, b"slow down"), "/api/whoami-v2", "was asked too often", "wait a while"),
    "full": ((413, b'{"error": "storage limit"}'), "/commit/main", "413: storage limit", "do what it says"),
    "a store": ((403, b"expired"), "/lfs/", "(403", "may write there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_hub_refuses_is_one_sentence(hub, push, fault):
    answer, at, found, do = FAULTS[fault]
    answer = answer or stand_in.said(401, f"no such token: {TOKEN}")
    hub.fault = lambda request: answer if at in request else None
    code, text = push("me/tiny")
    told = text[text.index("error: 1 problem") :].splitlines()
    assert code == 2 and len(told) == 3 and found in told[1] and do in told[2]
    assert not any(holds(hub, name) for name in hub.repos)
    hub.fault = lambda _: None
    assert push("me/tiny")[0] == 0, "the same command again goes on"


def test_no_right_to_write_there(hub, push):
    code, text = push("somebody/tiny")
    assert code == 2 and "HF_TOKEN may not write there, or there is no somebody (403" in text
    assert "it belongs to me" in text and not hub.repos


def test_a_card_that_the_hub_refuses(hub, push, outputs):
    card = outputs / "tiny_facts" / "adapter" / "README.md"
    card.write_text("---\nbase_model: /home/me/base\n---\nmine")
    code, text = push("me/tiny")
    assert code == 2 and "Invalid metadata in README.md" in text and '"base_model" is no model id' in text
    card.write_text("no metadata at all")
    code, text = push("me/tiny")
    assert code == 0 and "note        Warnings while validating metadata in README.md" in text


@pytest.mark.parametrize("token", [None, "", " ", "hf_one hf_two", "hf_\u00e9", "hf_a\nhf_b"])
def test_no_token_and_one_that_is_none(hub, push, monkeypatch, token):
    """A login that huggingface_hub has stored is not used."""
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    code, text = push("me/tiny")
    assert code == 2 and "\nHF_TOKEN: " in text and hub.asked == []
    assert not token or not token.strip() or token not in text


def test_the_network_is_gone(hub, push, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, text = push("me/tiny")
    assert code == 2 and "asking http://127.0.0.1:9 failed: " in text and "look at the network" in text
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, text = push("me/tiny")
    assert code == 2 and "HF_HUB_OFFLINE is set" in text and hub.asked == []


def test_a_whole_model_and_an_unfinished_run_are_no_adapters(hub, push, outputs, trained):
    shutil.copytree(trained / "tiny_base", outputs / "tiny_base")
    code, text = push("me/tiny", word="tiny_base")
    assert code == 2 and "holds a whole model, no adapter" in text
    (outputs / "tiny_facts" / "run.json").unlink()
    code, text = push("me/tiny")
    assert code == 2 and "holds no finished run" in text and hub.asked == []


def test_a_token_as_an_option_is_refused_without_repeating_it(hub, push):
    for words in (["--token", TOKEN], [f"--token={TOKEN}"]):
        code, text = push("me/tiny", *words)  # which looks for it
        assert code == 2 and "--token: a secret is not an option" in text and hub.asked == []


def test_the_command_as_make_gives_it(outputs, monkeypatch):
    """HF_ENDPOINT, HF_TOKEN and make's own words, in a process of its own."""
    with stand_in.running() as hub:
        hub.users[TOKEN] = "me"
        asked = f"RECIPE=tiny_facts REPO=me/tiny OUTPUTS={outputs} PY={sys.executable} READY="
        monkeypatch.setenv("PUBLIC", "1")  # of some shell: it publishes nothing
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", "1"), ("HF_TOKEN", TOKEN)):
            monkeypatch.setenv(name, value)
        done = subprocess.run(
            ["make", "push", *asked.split()], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
    assert holds(hub) == on_disk(outputs) and hub.repos["me/tiny"].private
