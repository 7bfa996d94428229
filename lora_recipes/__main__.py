"""The command `lora-recipes`: every verb with its options, which stand here once. scripts/*.py and make
call it.

A verb is parsed and its recipe checked before anything slow is imported: those imports stand in the actions.
"""

import contextlib
import json
import re
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import lora_recipes
from lora_recipes.ablation.cluster import ENGINES
from lora_recipes.core import cli, shipped
from lora_recipes.core.errors import Problem, RecipeError, nearest
from lora_recipes.core.files import HOME, OUTPUTS

DEFAULT = "tiny_facts"
DATA = "Make a data set: convert, clean, compare, mix, split and synthesise files of rows."
Action = Callable[[Namespace], int | None]


def main(words: Sequence[str] | None = None) -> int:
    """Parse the verb and its words (default: the command line's), act, and return the exit code."""
    verb, *rest = words if words is not None else sys.argv[1:] or ["--help"]
    if verb == "data":
        from lora_recipes.curate import cli as curate

        return curate.main(rest)
    top, verbs = _tree()
    if verb not in verbs:
        if not verb.startswith("-"):
            top.error(
                f"there is no {verb!r}: did you mean {nearest(verb, verbs)}? They are {', '.join(verbs)}"
            )
        top.parse_args([verb, *rest])  # --help and --version end here
    extra: list[str] = []
    if verb == "serve" and "--" in rest:
        rest, extra = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    # Overrides may stand anywhere among the options.
    given = verbs[verb].parse_intermixed_args(_apart(verbs[verb], rest))
    given.extra = extra
    return cli.run(lambda: given.action(given), given.traceback, getattr(given, "outputs", None))


def _apart(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """`words` with the overrides before an option that takes as many words as follow: it would take them
    too.
    """
    greedy = {name for action in parser._actions for name in action.option_strings if action.nargs == "+"}
    moved: list[str] = []
    kept: list[str] = []
    inside = False
    for word in words:
        inside = word in greedy if word.startswith("--") else inside
        override = inside and re.fullmatch(r"[a-z_]+\.\w+=.*", word, re.DOTALL)
        (moved if override else kept).append(word)
    first = next((i for i, word in enumerate(kept) if word.startswith("-")), len(kept))
    return [*kept[:first], *moved, *kept[first:]]


def _tree() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    top = ArgumentParser(
        prog="lora-recipes",
        description="One YAML recipe in; a checked plan, a trained adapter, a verified merge and server out.",
        epilog="lora-recipes VERB --help tells the options of a verb.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {lora_recipes.__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (options, action, told) in VERBS.items():
        parser = verbs.add_parser(name, help=told[0].lower() + told[1:].rstrip("."), description=told)
        options(parser)
        parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
        parser.set_defaults(action=action)
    return top, verbs.choices


def _recipe(parser: ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        default=DEFAULT,
        help=f"a shipped recipe's name, or a .yaml file (default: {DEFAULT})",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. lora.r=16")
    _outputs(parser)


def _outputs(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--outputs",
        type=Path,
        default=OUTPUTS,
        metavar="DIR",
        help="where the run folders are (default: outputs/)",
    )


def _base(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="folder of the base (default: the one that the adapter names)",
    )


def _unproven(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--unproven",
        action="store_true",
        help="take an adapter without provenance.json, or a combination of such: that it is what was trained"
        " is then not proven",
    )


def _accelerate(parser: ArgumentParser, told: str) -> None:
    parser.add_argument(
        "--accelerate", metavar="NAME", help=f"{told}: configs/accelerate/NAME.yaml, or a path"
    )


def _plan(parser: ArgumentParser) -> None:
    _recipe(parser)
    _accelerate(parser, "plan for this layout of processes")
    parser.add_argument(
        "--devices",
        type=int,
        choices=range(1, 4097),
        metavar="N",
        help="number of processes to plan for (default: 1, or as --accelerate says)",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--fit",
        type=float,
        metavar="GB",
        help="which settings fit a card of GB x 10^9 bytes, fastest first, instead",
    )
    parser.add_argument(
        "--compare", action="store_true", help="the memory of full fine-tuning, LoRA and QLoRA, instead"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="look at the first N rows of each source alone: all counts are of those (training reads all)",
    )


def plan(given: Namespace) -> None:
    """Check the recipe, plan, print."""
    from lora_recipes.core import record
    from lora_recipes.recipe import layout, load
    from lora_recipes.recipe.base import resolve

    resolved = resolve(load.load(given.recipe, given.overrides), given.outputs)
    with cli.importing():
        from lora_recipes.memory import choices, fits
        from lora_recipes.planning import plan
        from lora_recipes.training import launch

    chosen = layout.of(given.devices or 1)
    if given.accelerate:
        words = [*launch.words(given.accelerate, given.devices), "--module", "lora_recipes"]
        chosen = launch.wanted(words)
        launch.contradicts(resolved.recipe, words, environment=False)
    if given.sample is not None and given.sample < 1:
        raise RecipeError(Problem(cli.option("sample", str(given.sample)), "no rows", "1 or more"))
    made = plan.make(resolved, chosen, sample=given.sample)
    if chosen == layout.SINGLE:
        made.warnings += launch.would_refuse(resolved.recipe)
    if given.compare and resolved.recipe.classify:
        do = "leave it out: a head is trained with lora: alone"
        raise RecipeError(Problem("--compare", "full fine-tuning of a classifier is not offered", do))
    if given.compare:
        print("\n".join(fits.comparison(choices.compare(resolved, made.gate))))
    if given.fit:
        print("\n".join(fits.table(choices.fit(resolved, given.fit, made.gate), given.fit)))
    if given.compare or given.fit:
        return
    plan.beside_lora(made, resolved, plan.add_memory(made, resolved))
    print(
        json.dumps(record.plain(made.facts) | {"warnings": made.warnings}, indent=2, ensure_ascii=False)
        if given.json
        else made.text()
    )


def _train(parser: ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    parser.add_argument("--force", action="store_true", help="replace a run that is already there")
    parser.add_argument(
        "--oversized",
        action="store_true",
        help="train what is planned to need more memory than the device has",
    )
    _accelerate(parser, "start several processes")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="how many (default: as the file says, else one for each GPU)",
    )
    parser.add_argument("--launch", default="", metavar="OPTIONS", help="more options of `accelerate launch`")


def train(given: Namespace) -> int | None:
    """Check the recipe, train it here, or start the processes that do."""
    from lora_recipes.recipe import load
    from lora_recipes.recipe.base import resolve

    resolved = resolve(load.load(given.recipe, given.overrides), given.outputs)
    if given.accelerate:
        with cli.importing():
            from lora_recipes.training import launch

        switches = ("resume", "force", "oversized", "traceback")
        flags = [f"--{name}" for name in switches if getattr(given, name)]
        again = ["train", given.recipe, *given.overrides, "--outputs", str(given.outputs), *flags]
        options = launch.words(given.accelerate, given.processes, given.launch)
        return launch.start(options, again, resolved)
    with cli.importing():
        from lora_recipes.training.train import train

    train(resolved, given.resume, given.force, oversized=given.oversized)
    return None


def _ablate(parser: ArgumentParser) -> None:
    parser.add_argument(
        "name", help="a shipped ablation's name, or a .yaml file; with values to try: a recipe"
    )
    parser.add_argument("over", nargs="*", metavar="section.key=value,value", help="e.g. lora.r=2,4,8")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[], help="of the quick case (default: the recipe's own, once)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        choices=range(1, 65),
        metavar="N",
        help="processes at once (default: one for each GPU, or 1)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ARM[/sSEED]", help="these runs alone, without a report"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--on", choices=ENGINES, help="write files that train each run as a job of its own, and start none"
    )
    either.add_argument("--dry-run", action="store_true", help="plan every arm, train none")
    either.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--force", action="store_true", help="train finished runs anew too")
    _outputs(parser)


def ablate(given: Namespace) -> int:
    """Check every arm, then run, report, or write the files for a cluster."""
    from lora_recipes.ablation import spec

    if given.seeds and not given.over:
        do = f"its own are in its file; some of its runs: {cli.command(ONLY='arm/s1')}"
        raise RecipeError(Problem("SEEDS", "an ablation has its own seeds, and would not use these", do))
    checked = spec.quick(given.name, given.over, given.seeds) if given.over else spec.load(given.name)
    if given.report:
        from lora_recipes.ablation import report

        print(report.write(checked.folder(given.outputs)))
        return 0
    with cli.importing():
        from lora_recipes.ablation.ablate import ablate, spread

    if given.on:
        seeds = ["--seeds", *map(str, given.seeds)] if given.seeds else []
        print(spread(checked, given.outputs, given.on, [given.name, *given.over, *seeds], given.only))
        return 0
    return int(ablate(checked, given.outputs, given.jobs, given.only, given.dry_run, given.force) > 0)


def _merge(parser: ArgumentParser) -> None:
    parser.add_argument(
        "adapter",
        nargs="?",
        default=DEFAULT,
        help=f"a recipe (name or file), or an adapter folder (default: {DEFAULT})",
    )
    _outputs(parser)
    _base(parser)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="dtype to merge and save in (default: the base's)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the merged model (default: merged/ beside adapter/, else NAME.merged)",
    )
    parser.add_argument("--force", action="store_true", help="replace a merged model that is already there")
    parser.add_argument(
        "--unasked",
        action="store_true",
        help="never load the model: shard by shard, its tensors verified, its answers not",
    )
    _unproven(parser)


def merge(given: Namespace) -> None:
    """Merge, print the figures."""
    from lora_recipes.core import locate
    from lora_recipes.recipe import load

    folder = locate.adapter(load.run_of(given.adapter, given.outputs), given.outputs)
    with cli.importing():
        from lora_recipes.model import merge

    beside = folder.with_name("merged" if folder.name == "adapter" else f"{folder.name}.merged")
    output = given.output or beside
    record = merge.merge(folder, output, given.base, given.dtype, given.force, given.unproven, given.unasked)
    print(merge.report(record, output))


def _export(parser: ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--format", required=True, metavar="NAME", help="w8a8 or w4a16")
    parser.add_argument("--force", action="store_true", help="replace an export that is already there")


def export(given: Namespace) -> int:
    """Write, load, measure, print."""
    with cli.importing():
        from lora_recipes.evaluation import export

    found, said = export.export(given.recipe, given.outputs, given.format, given.overrides, given.force)
    print(said)
    return export.NOT_LOADED if found.not_loaded else 0


def _evaluate(parser: ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="another adapter for the same base, asked on this run's data (e.g. a combination)",
    )
    _base(parser)


def evaluate(given: Namespace) -> None:
    """Evaluate, print."""
    with cli.importing():
        from lora_recipes.evaluation import evaluate

    print(evaluate.answered(given.recipe, given.outputs, given.overrides, given.adapter, given.base))


def _passk(parser: ArgumentParser) -> None:
    _recipe(parser)
    _url(parser)
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="a model of the server, may be given more than once; the first is the reference (default: the"
        " base and the recipe's adapter)",
    )
    parser.add_argument(
        "--canonical", action="store_true", help="judge the tasks' own solutions; no server is asked"
    )
    _unsafe(parser)


def _style(parser: ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", default=DEFAULT, help=f"a recipe (name or file), trained (default: {DEFAULT})"
    )
    _outputs(parser)
    _url(parser)
    parser.add_argument(
        "--prompts", type=int, default=50, metavar="N", help="held-out functions to ask for (default: 50)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer (default: 512)"
    )


def style(given: Namespace) -> None:
    """Ask, judge, print."""
    for name in ("prompts", "max_tokens"):
        if (count := getattr(given, name)) < 1:
            raise RecipeError(Problem(cli.option(name, str(count)), "asks for nothing", "1 or more"))
    from lora_recipes.evaluation import style

    print(style.style(given.recipe, given.outputs, given.url, given.prompts, given.max_tokens))


def _tasks(parser: ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="IN",
        help="a repository's folder, a .py file, or the name of an installed package (default: stdlib)",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="x.jsonl, x.jsonl.gz or x.parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--longest",
        type=int,
        default=4000,
        metavar="N",
        help="leave out functions that need more characters of their module (default: 4000)",
    )
    _unsafe(parser)


def tasks(given: Namespace) -> None:
    """Find, judge, write."""
    from lora_recipes.evaluation import doctests

    unsafe = given.confirm_run_unsafe_code
    print(doctests.write(given.sources, given.out, given.longest, unsafe, given.overwrite))


def _unsafe(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run generated code also where no sandbox holds: it can do all that you can",
    )


def _url(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)"
    )


def passk(given: Namespace) -> int:
    """Ask, judge, print."""
    from lora_recipes.recipe import load

    recipe = load.load(given.recipe, given.overrides)
    if other := [key for key in recipe.overrides if not key.startswith("evaluate.")]:
        do = "passk takes evaluate.; what was trained stays as it is"
        raise RecipeError(Problem(f"override of {other[0]}", "would change nothing", do))
    from lora_recipes.evaluation import pass_at_k

    if given.canonical:
        said, passed = pass_at_k.canonical(recipe, given.confirm_run_unsafe_code)
        print(said)
        return int(not passed)
    unsafe = given.confirm_run_unsafe_code
    print(pass_at_k.passk(recipe, given.outputs, given.url, given.model, unsafe))
    return 0


def _ab(parser: ArgumentParser) -> None:
    _recipe(parser)
    _url(parser)
    parser.add_argument(
        "--models",
        nargs=2,
        metavar=("A", "B"),
        help="their names on the server (default: base and the recipe's)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of left and right, and of requests (default: 0)")
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--rule",
        metavar="NAME[=VALUE]",
        help="the better answer is the one for which it holds; an unknown one lists all",
    )
    who.add_argument("--judge", metavar="URL", help="an endpoint judges, in both orders")
    who.add_argument("--marks", type=Path, metavar="FILE", help="what a person marked on the page")
    parser.add_argument(
        "--judge-model", metavar="NAME", help="(default: the one that the judge's server has)"
    )
    parser.add_argument("--judge-key", metavar="VARIABLE", help="the environment variable with its API key")
    parser.add_argument("--force", action="store_true", help="replace a page with other answers")


def ab(given: Namespace) -> None:
    """Ask, have judged, print."""
    from lora_recipes.recipe import load

    name = load.run_of(given.recipe, given.outputs)
    with cli.importing():
        from lora_recipes.evaluation import ab

    fields = ("url", "max_tokens", "seed", "rule", "judge", "judge_model", "judge_key", "marks", "force")
    asked = ab.Asked(given.models or (), **{field: getattr(given, field) for field in fields})
    print(ab.compare(name, given.outputs, given.overrides, asked))


def _predict(parser: ArgumentParser) -> None:
    parser.add_argument(
        "classifier",
        nargs="?",
        default="tiny_classify",
        help="a recipe (name or file), or the folder of an adapter or a merged model"
        " (default: tiny_classify)",
    )
    parser.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="the texts: a line each, or .jsonl with a text in each object (default: standard input, a line"
        " each)",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="a label file that must agree with the head's classes"
    )
    _outputs(parser)
    _base(parser)


def predict(given: Namespace) -> None:
    """Answer each text with a line of JSON."""
    from lora_recipes.core import locate
    from lora_recipes.recipe import load

    word = load.run_of(given.classifier, given.outputs)
    folder = next(iter(locate.named([word], given.outputs).values()))
    if given.file and not given.file.is_file():
        raise RecipeError(Problem("--file", f"{given.file} is no file", "texts, a line each, or .jsonl"))
    with cli.importing():
        from lora_recipes.evaluation import classify

    with given.file.open(encoding="utf-8") if given.file else contextlib.nullcontext(sys.stdin) as lines:
        json_lines = bool(given.file) and given.file.suffix == ".jsonl"
        for line in classify.predict(folder, lines, json_lines, given.base, given.labels):
            print(line, flush=True)


def _combine(parser: ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", help="a recipe (name or file), an adapter folder, or name=folder"
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, required=True, help="one for each adapter, in the same order"
    )
    parser.add_argument(
        "--method",
        default="cat",
        help="combination_type of PEFT's add_weighted_adapter (default: cat, which is exact)",
    )
    parser.add_argument("--name", required=True, help="the result stands in outputs/NAME/adapter")
    parser.add_argument(
        "--density", type=float, help="share of values that ties, dare and magnitude_prune keep"
    )
    parser.add_argument(
        "--svd-rank", type=int, metavar="R", help="rank of the svd methods (default: the adapters' largest)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the dare methods, which drop at random (default: 0)"
    )
    _outputs(parser)
    _base(parser)
    parser.add_argument("--force", action="store_true", help="replace a combination of that name")
    _unproven(parser)


def combine(given: Namespace) -> None:
    """Combine, print the figures."""
    from lora_recipes.recipe import load

    with cli.importing():
        from lora_recipes.model import combine

    asked = combine.Combination(given.weights, given.method, given.density, given.svd_rank, given.seed)
    record = combine.combine(
        load.runs_of(given.adapters, given.outputs),
        asked,
        given.name,
        given.outputs,
        given.base,
        given.force,
        given.unproven,
    )
    print(combine.report(record, given.outputs / given.name / "adapter"))


def _push(parser: ArgumentParser) -> None:
    parser.add_argument(
        "adapter",
        nargs="?",
        default=DEFAULT,
        help=f"a recipe (name or file), or an adapter folder (default: {DEFAULT})",
    )
    parser.add_argument("--tag", metavar="TAG", help="a release, in place of what a run left")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the repository; made if it is not there")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    parser.add_argument("--force", action="store_true", help="replace another model that is there")
    parser.add_argument(
        "--dry-run", action="store_true", help="list files and sizes; the hub is not asked, no token needed"
    )
    parser.add_argument("--token", nargs="?", const="", help=SUPPRESS)  # refused, without repeating it
    _outputs(parser)
    _unproven(parser)
    parser.epilog = "The token is that of the environment variable HF_TOKEN, and of nothing else."


def push(given: Namespace) -> None:
    """Publish."""
    if given.token is not None:
        do = "set HF_TOKEN in the environment; make a new token if this one was real"
        raise RecipeError(Problem("--token", "a secret is not an option: others see a command's words", do))
    from lora_recipes.recipe import load
    from lora_recipes.serving.push import push

    push(
        str(_released(given)) if given.tag else load.run_of(given.adapter, given.outputs),
        given.outputs,
        given.repo,
        given.public,
        given.force,
        given.unproven,
        given.dry_run,
    )


def _released(given: Namespace) -> Path:
    """The folder of a release."""
    from lora_recipes.core import release_folder

    folder = release_folder.place(given.outputs, given.tag)
    if not (folder / release_folder.MANIFEST).is_file():
        do = cli.command("release", RECIPE="x", TAG=given.tag)
        raise RecipeError(Problem(given.tag, f"there is no release in {folder}", do))
    return folder


def _source(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        type=Path,
        default=HOME,
        metavar="DIR",
        help="the git repository that is released: where the rows come from (default: this one)",
    )


def _release(parser: ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", default=DEFAULT, help=f"a recipe, by name or file (default: {DEFAULT})"
    )
    parser.add_argument(
        "--tag", required=True, help="name of the annotated tag and of the folder, e.g. lora-v1.2.3"
    )
    _source(parser)
    parser.add_argument("--dry-run", action="store_true", help="look, and write nothing")
    _outputs(parser)
    _unproven(parser)


def release(given: Namespace) -> None:
    """Check, write the folder, tag."""
    from lora_recipes.core import git

    git.repository(given.source)
    with cli.importing():
        from lora_recipes.release.release import release

    print(release(given.recipe, given.outputs, given.tag, given.source, given.unproven, given.dry_run))


def _retrain(parser: ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        default=DEFAULT,
        help=f"a recipe of which a release is deployed (default: {DEFAULT})",
    )
    parser.add_argument(
        "--tag", help="of the release that it is promoted as (default: the last one's number and one more)"
    )
    _source(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what is new, and train nothing")
    _outputs(parser)
    _unproven(parser)
    parser.epilog = "The exit code says what came of it: docs/release.md."


def retrain(given: Namespace) -> int:
    """Train what is new, compare, promote."""
    from lora_recipes.core import git

    git.repository(given.source)
    with cli.importing():
        from lora_recipes.release.retrain import retrain

    return retrain(given.recipe, given.outputs, given.source, given.tag, given.unproven, given.dry_run)


def _monitor(parser: ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        default=DEFAULT,
        help=f"a recipe of which a release is deployed (default: {DEFAULT})",
    )
    parser.add_argument(
        "--log", type=Path, required=True, metavar="FILE", help="the answers that are kept: x.jsonl"
    )
    parser.add_argument(
        "--url", help="a server to pass requests on to, keeping its answers; else they are looked at"
    )
    parser.add_argument(
        "--consent",
        metavar="HOW",
        help="header: keep the answers to requests that say X-Log-Consent: yes; everyone: all, as everyone"
        " who asks has agreed. Without it nothing is kept",
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the proxy (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8001, help="of the proxy (default: 8001)")
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the answers to look at (default: 0.1; often 0.05 to 0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that sample (default: 0)")
    parser.add_argument("--model", help="whose answers, where several answered")
    parser.add_argument(
        "--force", action="store_true", help="replace the sample and the page of another look"
    )
    _outputs(parser)


def monitor(given: Namespace) -> int:
    """Keep answers, or look at those that were kept."""
    if given.url:
        from lora_recipes.release.answers import keep

        return keep(given.url, given.host, given.port, given.log, given.consent)
    if given.consent:
        raise RecipeError(
            Problem("--consent", "is of a proxy", f"name the server: {cli.command(URL='http://...')}")
        )
    with cli.importing():
        from lora_recipes.release.monitor import monitor

    return monitor(given.recipe, given.outputs, given.log, given.share, given.seed, given.model, given.force)


def _repo_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="?",
        default="stdlib",
        help="a repository's folder, or an installed package (default: stdlib, Python's own library)",
    )
    parser.add_argument(
        "--recipe", default="smollm2_repo", help="what is trained, name or file (default: smollm2_repo)"
    )
    parser.add_argument(
        "--rows", type=int, default=160, metavar="N", help="rows to train on, at most (default: 160)"
    )
    parser.add_argument("--from", dest="first", metavar="STAGE", help="do this stage and all after it anew")
    parser.add_argument("--only", metavar="STAGE", help="do this stage alone, anew")
    parser.add_argument("--tag", metavar="TAG", help="release it under this tag, at the end")
    _outputs(parser)


def repo_model(given: Namespace) -> int:
    """Do its stages, each a verb."""
    from lora_recipes.release.repo_model import repo_model

    asked = (given.source, given.recipe, given.outputs, given.rows, given.first, given.only, given.tag)
    return repo_model(main, *asked)


def _serve(parser: ArgumentParser) -> None:
    parser.epilog = "What stands after -- goes to vLLM."
    parser.add_argument(
        "what",
        nargs="*",
        help="a recipe (name or file), a folder (adapter or whole model), or name=folder"
        f" (default: {DEFAULT})",
    )
    _outputs(parser)
    _base(parser)
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--max-lora-rank", type=int, metavar="R", help="(default: the smallest that fits)")
    parser.add_argument("--dtype", help="(default: the base's)")
    parser.add_argument(
        "--dynamic", action="store_true", help="let adapters be added and removed while it runs"
    )
    _unproven(parser)
    deeds = parser.add_mutually_exclusive_group()
    deeds.add_argument(
        "--dry-run",
        action="store_true",
        help="the checks, the exported adapter and the vLLM command; nothing is started",
    )
    deeds.add_argument(
        "--check", metavar="URL", help="prove the adapters on a server that runs (default: all that it has)"
    )
    deeds.add_argument(
        "--add", metavar="URL", help="add the adapters to a server that runs with --dynamic, proven"
    )
    deeds.add_argument("--remove", metavar="URL", help="remove the adapters (names) from it")


def serve(given: Namespace) -> int:
    """Serve, check, add or remove."""
    from lora_recipes.recipe import load

    with cli.importing():
        from lora_recipes.serving import serve
        from lora_recipes.serving.command import Options

    given.what = load.runs_of(given.what, given.outputs)
    if given.check:
        return serve.check(given.check, given.what, given.outputs)
    if given.add:
        return serve.add(given.add, given.what or [DEFAULT], given.outputs, given.unproven)
    if given.remove:
        return serve.remove(given.remove, given.what)
    options = Options(
        given.host,
        given.port,
        given.max_lora_rank,
        given.dtype,
        given.dynamic,
        given.extra,
        given.outputs,
        given.unproven,
    )
    return serve.serve(given.what or [DEFAULT], given.outputs, given.base, options, given.dry_run)


def _chat(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT,
        help=f"the adapter's name on the server, or the recipe's file (default: {DEFAULT})",
    )
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="QUESTION",
        help="may be given more than once (default: its probes)",
    )
    _url(parser)


def chat(given: Namespace) -> None:
    """Ask, print."""
    from lora_recipes.recipe import load
    from lora_recipes.serving.chat import chat

    file = given.model.endswith((".yaml", ".yml"))
    print(chat(given.url, load.find(given.model).stem if file else given.model, given.ask))


def _contract(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="FOLDER_OR_HUB_ID",
        help="a checkpoint's folder (config.json is enough), or its hub id",
    )
    parser.add_argument(
        "--name",
        help="the contract's name, or a .yaml file of your own (default: the source's last part, in"
        " configs/models/)",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--print", action="store_true", help="show it, write nothing")
    either.add_argument("--force", action="store_true", help="replace a contract of that name")


def contract(given: Namespace) -> None:
    """Make it, write it, say how a recipe names it."""
    with cli.importing():
        from lora_recipes.model import write_contract

    made = write_contract.make(given.source, given.name)
    if given.print:
        print(made.text, end="")
        return
    write_contract.write(made, given.force)
    print(write_contract.report(made))


def _ls(parser: ArgumentParser) -> None:
    """No options."""


def ls(given: Namespace) -> None:
    """Print what there is."""
    print(shipped.listing())


def _cp(parser: ArgumentParser) -> None:
    parser.add_argument("name", help="as lora-recipes ls lists it (folder/name where two folders have it)")
    parser.add_argument("file", type=Path, help="where the copy goes: my.yaml, or a folder")


def cp(given: Namespace) -> None:
    """Copy, say how to go on."""
    print(f"{given.name} -> {shipped.copy(given.name, given.file)}")


def _data(parser: ArgumentParser) -> None:
    """Has verbs of its own, with their own options: curate/cli.py."""


def data(given: Namespace) -> None:
    """Never called: main hands its words on."""


def _cache(parser: ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove them all")


def cached(given: Namespace) -> None:
    """List or remove the rows and steps that are kept."""
    with cli.importing():
        from lora_recipes.data import cache
    print(cache.clear() if given.clear else "\n".join(cache.lines()))


# verb -> its options, its action, what it does
VERBS: dict[str, tuple[Callable[[ArgumentParser], None], Action, str]] = {
    "ls": (_ls, ls, "List the shipped recipes, ablations, accelerate files and contracts."),
    "cp": (_cp, cp, "Copy a shipped file, to begin one's own."),
    "data": (_data, data, DATA),
    "contract": (
        _contract,
        contract,
        "Write a contract from a checkpoint's config.json, so that plans need neither hub nor weights.",
    ),
    "plan": (_plan, plan, "Show what a recipe would train, without weights or GPU."),
    "cache": (
        _cache,
        cached,
        "List the checked rows and rehearsed steps that plans and runs have kept, or remove them.",
    ),
    "train": (_train, train, "Train a recipe into outputs/<name>/."),
    "ablate": (_ablate, ablate, "Train every arm of an ablation, and report."),
    "merge": (_merge, merge, "Merge an adapter into its base and verify the result."),
    "export": (
        _export,
        export,
        "Write a run's merged model in fewer bits, load it in vLLM, and measure what it lost.",
    ),
    "eval": (
        _evaluate,
        evaluate,
        "Ask base and trained model the same: held-out loss, probes, what was forgotten, generations.",
    ),
    "passk": (
        _passk,
        passk,
        "Ask base and adapter on a running server for code, and judge it by tests in a sandbox: pass@k.",
    ),
    "style": (
        _style,
        style,
        "Ask base and adapter on a running server for held-out functions, and hold them against the style of"
        " the repository.",
    ),
    "tasks": (
        _tasks,
        tasks,
        "Write a repository's own tasks for pass@k: functions whose docstrings have examples.",
    ),
    "ab": (_ab, ab, "Compare two models on a server, blind: by a page, a rule, or an endpoint that judges."),
    "predict": (_predict, predict, "Label texts with a classifier: a class and probabilities for each."),
    "combine": (
        _combine,
        combine,
        "Combine adapters of one base into one that merges and serves like a trained one.",
    ),
    "push": (_push, push, "Publish an adapter on the Hugging Face Hub: private, in one commit."),
    "release": (
        _release,
        release,
        "Tie an adapter to its recipe, rows, evaluation and commit: a folder, a manifest, a tag.",
    ),
    "retrain": (
        _retrain,
        retrain,
        "Go on from the deployed adapter with the rows that are new; deploy what is better by its interval.",
    ),
    "monitor": (
        _monitor,
        monitor,
        "Keep what a server answers, with consent; sample it, and compare its loss with the release's.",
    ),
    "repo-model": (
        _repo_model,
        repo_model,
        "Make the code model of one repository: from its source to a release, stage by stage.",
    ),
    "serve": (_serve, serve, "Check adapters, start vLLM, prove that they are live, stay up."),
    "chat": (_chat, chat, "Ask base and adapter on a running server side by side."),
}

if __name__ == "__main__":
    sys.exit(main())
