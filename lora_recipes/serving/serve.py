"""Serve adapters in vLLM and prove that what answers is what was trained: `make serve RECIPE=x`. Imports no
torch.
"""

import json
import os
import shlex
import time
from pathlib import Path

from lora_recipes.core import adapter_folder as adapters
from lora_recipes.core import cli, files, head, locate, lock, provenance
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.record import Served
from lora_recipes.core.run_folder import noted
from lora_recipes.core.yamlfile import shown
from lora_recipes.serving import command, live, rules
from lora_recipes.serving import server as process
from lora_recipes.serving.command import Options, Server
from lora_recipes.serving.endpoint import Endpoint
from lora_recipes.serving.live import Proof

NOT_LIVE = 1  # exit code


def serve(words: list[str], outputs: Path, base: Path | None, options: Options, dry_run: bool = False) -> int:
    """Check, export, start vLLM, prove, and stay up until Ctrl-C. Returns the exit code: NOT_LIVE when the
    proof fails.
    """
    installed = command.vllm()
    if not installed and not dry_run:
        raise RecipeError(Problem(shown(command.ENVIRONMENT), "vLLM is not installed", command.setup()))
    chosen = locate.named(words, outputs)
    server = command.prepare(chosen, base, options, installed or ("vllm", rules.VLLM))
    notes = server.notes if installed else [*server.notes, f"vLLM is not installed here: {command.setup()}"]
    print("\n".join([*(f"note        {note}" for note in notes), f"command     {server}"]), flush=True)
    if dry_run or not installed:
        return 0
    log = outputs.absolute() / "_serve" / f"{options.port}.log"
    print(f"\nstarting vLLM {installed[1]}; what it says goes to {shown(log)}", flush=True)
    began = time.monotonic()
    with lock.served(s.folder for s in server.served), process.running(server, options, log) as child:
        print(f"up after {time.monotonic() - began:.0f} s\n", flush=True)
        # As patient as the start was: on a machine at a load of 17 the first answer took more than 120 s.
        first = Endpoint(options.url, timeout=process.START)
        known = server.served[0].provenance
        if known and head.read(server.served[0].folder):
            proofs = [live.classified(first, server.base_name, known)]
        else:
            asked = {s.name: s.provenance for s in server.served}
            proofs = live.prove(first, server.base_name, asked)
        proven = not _report(proofs)
        _record(proofs, chosen, installed[1])  # of a classifier its adapter, which is served merged
        if not proven:
            return NOT_LIVE
        print(f"\n{_ready(server, options)}\nCtrl-C ends it", flush=True)
        if code := child.wait():
            raise RecipeError(
                Problem("vLLM", f"ended (exit {code}): {process.last_error(log)}", f"all of it: {shown(log)}")
            )
    return 0


def _report(proofs: list[Proof]) -> int:
    print(
        live.table(proofs) if proofs else "a whole model that brings no answers of PEFT: nothing to compare",
        flush=True,
    )
    return NOT_LIVE if any(p.fault for p in proofs) else 0


def _record(proofs: list[Proof], folders: dict[str, Path], version: str) -> None:
    """Write what was proven into run.json of each adapter's run."""
    for proof in proofs:
        folder = folders[proof.name]
        if proof.fault or proof.apart is None or not (folder / "adapter_config.json").is_file():
            continue
        sha256 = files.sha256(adapters.read(folder, anything=True).file)
        apart, allowed = proof.apart, proof.limit
        found = Served(at=files.now(), adapter_sha256=sha256, vllm=version, apart=apart, allowed=allowed)
        try:
            with lock.runs([folder], "records a proof"):
                noted(folder, served=found)
        except RecipeError as error:
            print(f"NOTE        the proof is not recorded: {error.problems[0].found}", flush=True)


def _ready(server: Server, options: Options) -> str:
    name, key = (
        server.served[0].name,
        ' -H "Authorization: Bearer $VLLM_API_KEY"' if os.environ.get("VLLM_API_KEY") else "",
    )
    ask = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    route = "chat/completions"
    if (known := server.served[0].provenance) and known.called:
        ask = json.dumps({"model": name, "input": known.called[0].text})
        sent = f"-H 'Content-Type: application/json'{key} -d {shlex.quote(ask)}"
        return f"serving on {options.url}\n  curl {options.url}/classify {sent}"
    if not any(
        (folder / "chat_template.jinja").is_file() for folder in (server.base, server.served[0].folder)
    ):
        ask, route = f'{{"model": "{name}", "prompt": "Hello"}}', "completions"
    return (
        f"serving on {options.url}\n  curl {options.url}/v1/{route} -H 'Content-Type: application/json'{key}"
        f" -d '{ask}'"
    )


def check(url: str, words: list[str], outputs: Path) -> int:
    """Prove adapters on a server that runs: those named, or all that it has."""
    endpoint = Endpoint(url)
    models = endpoint.models()
    base = next(iter(models))
    if words:
        known = {name: provenance.read(folder) for name, folder in locate.named(words, outputs).items()}
    else:
        known = {
            name: provenance.read(Path(root))
            for name, root in models.items()
            if name != base or _is_whole(root)
        }
    for name in known:
        if name not in models:
            raise RecipeError(Problem(url, f"serves no {name}", f"it has {', '.join(models)}"))
    if not known:
        raise RecipeError(
            Problem(
                url, f"has no adapter, only {base}", cli.command("serve", ADD="URL", ADAPTERS="name=folder")
            )
        )
    return _report(live.prove(endpoint, base, known))


def _is_whole(root: str) -> bool:
    """Is what answers as the base a merged model, with something to prove?"""
    return (Path(root) / provenance.FILE).is_file()


def add(url: str, words: list[str], outputs: Path, unproven: bool = False) -> int:
    """Check adapters against the base that the server at `url` has, add them and prove them; one that is not
    live is removed again.

    The rules are held before the server hears of an adapter: vLLM itself takes many broken ones, and one with
    NaN spoils the others.
    """
    endpoint = Endpoint(url)
    models = endpoint.models()
    base, root = next(iter(models.items()))
    read = {name: adapters.read(folder) for name, folder in locate.named(words, outputs).items()}
    for name in read:
        if name in models:
            raise RecipeError(
                Problem(
                    url,
                    f"already serves a model named {name}",
                    f"{cli.command('serve', REMOVE=url, ADAPTERS=name)} first",
                )
            )
    folder = locate.base_of(read, locate.local(root))
    proofs: list[Proof] = []
    loaded: list[str] = []
    try:
        for served in command.export(read, folder, outputs, unproven):
            endpoint.load(served.name, str(served.path))
            loaded.append(served.name)
            proofs += live.prove(endpoint, base, {served.name: served.provenance})
    except BaseException:  # all or none; what was not proven does not stay
        for name in loaded:
            endpoint.unload(name)
        raise
    for proof in proofs:
        if proof.fault:
            endpoint.unload(proof.name)
    return _report(proofs)


def remove(url: str, names: list[str]) -> int:
    """Take adapters off the server at `url`."""
    endpoint = Endpoint(url)
    models = endpoint.models()
    if not names:
        raise RecipeError(
            Problem(url, "no adapter is named", f"{cli.command(ADAPTERS='one')} of {', '.join(models)}")
        )
    for name in names:
        if name not in models:
            raise RecipeError(Problem(url, f"serves no {name}", f"it has {', '.join(models)}"))
        endpoint.unload(name)
        print(f"removed {name}")
    return 0
