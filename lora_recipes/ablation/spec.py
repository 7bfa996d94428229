"""An ablation: one question, a recipe, named arms of overrides, seeds. Read and checked here; a grid becomes
named arms. Imports no torch.

# Which rank and learning rate correct four facts best?
recipe: tiny_facts
arms:                        # named lists of section.key=value
  lora: []
  rslora: [lora.use_rslora=true]
grid:                        # every arm at every point of it; a key with one value holds for all and is in no
name
  lora.r: [2, 4, 8]
seeds: [1, 2, 3]
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, yamlfile
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.files import ROOT
from lora_recipes.core.yamlfile import Key, dotted, shown
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.recipe import Recipe

FOLDER = ROOT / "configs" / "ablations"
FILE = "ablation.json"  # in outputs/ablations/<name>/: the ablation as resolved, which the report reads
KEYS = ("recipe", "arms", "grid", "seeds")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # an arm's name is a folder's
At = Callable[..., str]  # at("grid", "lora.r", 0): where that was written


@dataclass(frozen=True)
class Arm:
    """One variant of the recipe: its overrides, and the recipe with them applied."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Run:
    """One arm with one seed. `recipe.name` is the run folder below outputs/."""

    arm: str
    seed: int
    recipe: Recipe

    def __str__(self) -> str:
        """As `ONLY=` takes it; nothing in it needs quoting (NAME)."""
        return f"{self.arm}/s{self.seed}"


@dataclass(frozen=True)
class Ablation:
    """A checked ablation."""

    name: str
    question: str
    recipe: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]

    def folder(self, outputs: Path) -> Path:
        """Where its runs and its report are."""
        return outputs / "ablations" / self.name

    def runs(self) -> list[Run]:
        """Every arm with every seed; all arms once before any a second time, so that an early stop still
        compares them.
        """
        return [Run(arm.name, seed, seeded(self.name, arm, seed)) for seed in self.seeds for arm in self.arms]

    def resolved(self) -> dict[str, Any]:
        """What ablation.json holds."""
        arms = {
            arm.name: {"overrides": list(arm.overrides), "sections": arm.recipe.anywhere()}
            for arm in self.arms
        }
        return {
            "name": self.name,
            "question": self.question,
            "recipe": self.recipe,
            "seeds": list(self.seeds),
            "arms": arms,
        }


def seeded(ablation: str, arm: Arm, seed: int) -> Recipe:
    """The recipe of one run. Named so that it lands in outputs/ablations/<ablation>/<arm>/s<seed>/, and
    shares the bases in outputs/.
    """
    text, train = f"train.seed={seed}", arm.recipe.train.given | {"seed": seed}
    return dataclasses.replace(
        arm.recipe,
        name=f"ablations/{ablation}/{arm.name}/s{seed}",
        sections=arm.recipe.sections | {"train": train},
        overrides=arm.recipe.overrides | {"train.seed": text},
    )


def names() -> list[str]:
    """The names of the ablations in configs/ablations/."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load(name: str) -> Ablation:
    """The ablation `name` (a name in configs/ablations/, or a path), with every arm's recipe checked.
    RecipeError lists every problem.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        do = f"did you mean {nearest(path.stem, names())}? The ablations are {listed(names(), 60)}"
        raise RecipeError(Problem(cli.command(ABLATION=name), "no such file", do))
    content, lines, problems = yamlfile.read(path)

    def at(*key: str | int) -> str:
        known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in lines), ())
        return f"{shown(path)}:{lines.get(known, 1)} {dotted(key)}".rstrip()

    first = path.read_text(encoding="utf-8-sig").partition("\n")[0].strip()
    question = first.removeprefix("#").strip()
    if not (first.startswith("#") and question):
        problems.append(
            Problem(
                f"{shown(path)}:1", "no question in the first line", "begin with it: # Which rank is enough?"
            )
        )
    raise_if(problems + list(_shape(content, at)))
    return _ablation(path.stem, question, content, at, path.parent)


def quick(recipe: str, over: Sequence[str], seeds: Sequence[int] = ()) -> Ablation:
    """The ablation of a command line: `lora.r=2,4,8` is a grid. Without `seeds` it runs once, with the
    recipe's own.
    """
    content: dict[str, Any] = {"recipe": recipe, "grid": {}}
    given = {}
    for text in over:
        key, equals, values = text.partition("=")
        try:
            found, _, problems = yamlfile.parse(f"[{values}]", f"{cli.command(OVER='')} {text!r}")
        except RecipeError as error:
            found, problems = [], error.problems
        if not equals or key in content["grid"]:
            problems = [
                Problem(
                    f"{cli.command(OVER='')} {text!r}",
                    "given twice" if equals else "not section.key=value,value",
                    "e.g. lora.r=2,4,8",
                )
            ]
        raise_if(problems)
        content["grid"][key], given[key] = found, text

    def at(*key: str | int) -> str:
        text = given.get(str(key[1])) if len(key) > 1 else None
        return (
            f"{cli.command(OVER='')} {text!r}"
            if text
            else cli.command(**{{"recipe": "RECIPE", "seeds": "SEEDS"}.get(str(key[0]), "OVER"): ""})
        )

    own = recipes.load(recipe).train.seed
    raise_if(list(_shape(content | {"seeds": list(seeds) or [own]}, at)))
    varied = [word for key, word in short(content["grid"]).items() if len(content["grid"][key]) > 1]
    name = "-".join([Path(recipe).stem, *varied])
    return _ablation(
        name, f"{Path(recipe).stem} over {' '.join(over)}", content | {"seeds": list(seeds) or [own]}, at
    )


def _shape(content: dict[str, Any], at: At) -> Iterator[Problem]:
    """What is wrong with the file before any arm is looked at."""
    for key in content:
        if key not in KEYS:
            yield Problem(at(key), "unknown key", f"did you mean {nearest(key, KEYS)}?")
    if not isinstance(content.get("recipe"), str):
        yield Problem(at("recipe"), "no recipe is named", f"recipe: one of {listed(recipes.names(), 60)}")
    if "arms" not in content and "grid" not in content:
        yield Problem(
            at("arms"), "there are no arms", "arms: named lists of overrides, or grid: lists of values"
        )
    yield from _arms_shape(content, at)
    yield from _grid_shape(content, at)
    yield from _seeds_shape(content, at)


def _arms_shape(content: dict[str, Any], at: At) -> Iterator[Problem]:
    arms = content.get("arms", {"": []})
    if not isinstance(arms, dict) or not arms:
        yield Problem(
            at("arms"),
            "no named arms",
            "write name: [section.key=value, ...] lines; [] is the recipe as it is",
        )
        return
    for name, texts in arms.items():
        if name and not NAME.fullmatch(name):
            yield Problem(
                at("arms", name),
                "an arm's name is a folder's",
                "letters, digits and . _ + -, and no mark first",
            )
        if texts is not None and not (isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
            do = "a list with a line for each: - lora.target_modules=[q_proj, v_proj]"
            yield Problem(at("arms", name), "not a list of section.key=value", do)
        elif any(t.partition("=")[0].strip() == "train.seed" for t in texts or []):
            yield Problem(at("arms", name), "sets train.seed", "seeds: lists them, for all arms alike")


def _grid_shape(content: dict[str, Any], at: At) -> Iterator[Problem]:
    axes = content.get("grid", {"": [""]})
    if not isinstance(axes, dict) or not axes:
        yield Problem(at("grid"), "an empty grid", "e.g. lora.r: [2, 4, 8]")
        return
    for key, values in axes.items():
        if key == "train.seed":
            yield Problem(at("grid", key), "sets train.seed", "seeds: lists them, for all arms alike")
        elif not isinstance(values, list):
            yield Problem(at("grid", key), "not a list of values", f"write {key}: [{values}, ...]")
        elif not values:
            yield Problem(
                at("grid", key), "an empty grid: no value to try", "give it values, or remove the key"
            )
        for i, value in enumerate(values if isinstance(values, list) else []):
            if value in values[:i]:
                yield Problem(at("grid", key, i), f"{written(value)} is given twice", "keep one")


def _seeds_shape(content: dict[str, Any], at: At) -> Iterator[Problem]:
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds:
        yield Problem(at("seeds"), "no seeds", "seeds: [1, 2, 3]; with one seed nothing can be told apart")
        return
    for i, seed in enumerate(seeds):
        if type(seed) is not int or not 0 <= seed < 2**32:  # numpy's limit
            yield Problem(
                at("seeds", i), f"{written(seed)} is no seed", "a whole number from 0 to 4294967295"
            )
        elif seed in seeds[:i]:
            yield Problem(
                at("seeds", i), f"the seed {seed} is given twice", "the same run twice says nothing: keep one"
            )


def _ablation(
    name: str, question: str, content: dict[str, Any], at: At, beside: Path | None = None
) -> Ablation:
    """Expand, load every arm's recipe, and say every problem at the place in the ablation that makes it."""
    try:
        recipe = recipes.load(content["recipe"], beside=beside)
    except RecipeError as error:
        raise RecipeError(
            [Problem(f"{at('recipe')}: {p.where}", p.found, p.do) for p in error.problems]
        ) from None
    raise_if(list(_output(recipe.path, at("recipe"))))
    arms: dict[str, Arm] = {}
    problems: list[Problem] = []
    for arm, made in _expanded(content):
        where = at(*(("arms", arm) if arm in content.get("arms", {}) else made[-1][1]))
        if arm in arms:
            do = "name them yourself under arms:"
            problems.append(Problem(where, f"two arms with one name, {arm}", do))
        try:
            loaded = recipes.load(content["recipe"], [text for text, _ in made], beside)
        except RecipeError as error:
            problems += [_moved(p, made, where, at) for p in error.problems]
            continue
        for named in (
            loaded.model.name_or_path,
            loaded.model.from_recipe,
            loaded.warm_start and loaded.warm_start.from_recipe,
        ):
            problems += _output(loaded.file(named), where) if named else []
        if same := next((a.name for a in arms.values() if a.recipe.sections == loaded.sections), None):
            problems.append(Problem(where, f"{arm} is the same run as {same}", "keep one"))
        arms[arm] = Arm(arm, tuple(text for text, _ in made), loaded)
    raise_if(list(dict.fromkeys(problems)))
    return Ablation(name, question, content["recipe"], tuple(arms.values()), tuple(content["seeds"]))


def _moved(problem: Problem, written: list[tuple[str, Key]], where: str, at: At) -> Problem:
    """A problem of an override, told at the line that gave it; another is told with the arm that has it."""
    for text, key in written:
        told = f"override {text!r}"
        if problem.where.startswith(told):
            return Problem(
                f"{at(*key)}: {problem.where.removeprefix(told).strip() or text}", problem.found, problem.do
            )
    return Problem(f"{where}: {problem.where}", problem.found, problem.do)


def _output(path: Path, where: str) -> Iterator[Problem]:
    """A file or folder that an ablation made is no ground for another: the next run of that ablation may
    replace it.
    """
    made = next((p for p in path.resolve().parents if (p / FILE).is_file()), None)
    if made:
        do = f"name the recipe that it was made of; to build on a result, copy it out of {shown(made)}/ first"
        yield Problem(
            where, f"{shown(path)} is the output of the ablation {made.name}, which may replace it", do
        )


def _expanded(content: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, Key]]]]:
    """Each arm's name, and its overrides with where each was written: the named arms at every point of the
    grid.
    """
    grid = content.get("grid", {})
    initials = short(grid)
    varied = [key for key in grid if len(grid[key]) > 1] or ([] if "arms" in content else list(grid))
    points = itertools.product(*([(key, i) for i in range(len(grid[key]))] for key in grid))
    for (name, texts), point in itertools.product(content.get("arms", {"": []}).items(), list(points)):
        words = [f"{initials[key]}{_word(grid[key][i])}" for key, i in point if key in varied]
        overrides: list[tuple[str, Key]] = [(text, ("arms", name, i)) for i, text in enumerate(texts or [])]
        overrides += [(f"{key}={written(grid[key][i])}", ("grid", key, i)) for key, i in point]
        yield "_".join(filter(None, [name, *words])), overrides


def short(keys: Iterable[str]) -> dict[str, str]:
    """The initials of each key's words, r for lora.r and lr for train.learning_rate; the whole key where two
    would have the same.
    """
    found = {key: "".join(word[0] for word in key.rpartition(".")[2].split("_") if word) for key in keys}
    alike = {s for s in found.values() if list(found.values()).count(s) > 1}
    return {key: key if s in alike else s for key, s in found.items()}


def _word(value: Any) -> str:
    """A value as part of a folder's name: 1e-3, 0.05, q_proj+v_proj."""
    if isinstance(value, float):
        small = f"{value:.10e}"
        mantissa, _, exponent = small.partition("e")
        return (
            f"{value:.10g}"
            if 0.01 < abs(value) < 1e4 or not value
            else f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        )
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", value if isinstance(value, str) else json.dumps(value))


def written(value: Any) -> str:
    """A value as an override holds it, which reads back the same: JSON, but a plain word without quotation
    marks.
    """
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z0-9_./-]+", value)
        and yamlfile.parse(value, "")[0] == value
    ):
        return value
    return json.dumps(value, ensure_ascii=False)
