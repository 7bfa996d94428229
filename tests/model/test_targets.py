"""Targets on models without weights: what PEFT skips in silence or refuses late is an error here, and the
rest is exactly PEFT's.
"""

import copy
import string
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
)

from lora_recipes.core.errors import Problem
from lora_recipes.model import targets
from lora_recipes.recipe import contract
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.recipe import Recipe
from tests.cases import families
from tests.typed import there

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAR = ["in_proj_qkv", "in_proj_z", "out_proj"]
EVERYTHING = [*LINEAR, "in_proj_a", "in_proj_b", *ATTENTION, *MLP]


def fresh(name: str, **changes: Any) -> PreTrainedModel:
    """The text model of the contract `name` without weights."""
    config = AutoConfig.for_model(**contract.load(name).config).get_text_config()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@cache
def model(name: str) -> PreTrainedModel:
    return fresh(name)


def written(folder: Path, lora: dict[str, Any]) -> Recipe:
    sections = {
        "model": {"contract": "tiny_qwen35", "weights": "random", "dtype": "float32"},
        "data": {"train": "data/companion/train.jsonl"},
        "lora": {"r": 8, "lora_alpha": 16, **lora},
        "train": {"learning_rate": 2e-4},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return recipes.load(str(path))


def config(r: Recipe) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **there(r.lora).given)


def problems(folder: Path, of: PreTrainedModel | str = "tiny_qwen35", /, **lora: Any) -> list[Problem]:
    r = written(folder, lora)
    return targets.problems(model(of) if isinstance(of, str) else of, config(r), r)


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


# Names in target_modules


@pytest.mark.parametrize("name", ["tiny_qwen35", "qwen35_4b"])
def test_good_names_are_no_problem(tmp_path: Path, name: str) -> None:
    assert problems(tmp_path, name, target_modules=EVERYTHING) == []


def test_one_typo_among_good_names_is_found_with_its_place_and_the_nearest_name(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, "tiny_qwen3", target_modules=["q_proj", "k_projj", "v_proj"]))
    assert "mine.yaml:12 lora.target_modules[1]" in problem.where
    assert (problem.found, problem.do) == (
        "'k_projj' matches no module of this model",
        "did you mean k_proj?",
    )


def test_peft_itself_skips_a_typo_among_good_names(recwarn: pytest.WarningsRecorder) -> None:
    # The reason for this module: when PEFT says something here, part of it can go.
    config = LoraConfig(target_modules=["q_proj", "k_projj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(fresh("tiny_qwen3"), config, low_cpu_mem_usage=True)
    assert {n.rsplit(".", 1)[-1] for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)} == {
        "q_proj"
    }
    assert not [w for w in recwarn if "k_projj" in str(w.message)]


def test_a_typo_alone_and_several_typos_are_found(tmp_path: Path) -> None:
    assert only(problems(tmp_path, "tiny_qwen3", target_modules=["gate_prj"])).do == "did you mean gate_proj?"
    found = problems(tmp_path, target_modules=["in_proj_qvk", "q_proj", "uq_proj"])
    assert [p.do for p in found] == ["did you mean in_proj_qkv?", "did you mean q_proj?"]


def test_a_name_of_another_architecture_is_found(tmp_path: Path) -> None:
    assert only(problems(tmp_path, "tiny_qwen3", target_modules=[*ATTENTION, "in_proj_qkv"])).where.endswith(
        "lora.target_modules[4]"
    )


@pytest.mark.parametrize("entry", ["c_attn", "qkv_proj", "query_key_value", "attn.c_attn"])
def test_what_is_one_module_elsewhere_is_answered_with_those_it_is_here(tmp_path: Path, entry: str) -> None:
    apart = only(problems(tmp_path, "tiny_qwen3", target_modules=[entry])).do
    assert all(name in apart for name in ("q_proj", "k_proj", "v_proj")) and "o_proj" not in apart
    one = only(problems(tmp_path, "tiny_qwen3", target_modules=["gate_up_proj"])).do
    assert "gate_proj" in one and "up_proj" in one and "down_proj" not in one


def test_a_longer_name_is_answered_with_a_name_as_long(tmp_path: Path) -> None:
    assert (
        only(problems(tmp_path, target_modules=["self_attn.q_projj"])).do == "did you mean self_attn.q_proj?"
    )
    assert only(problems(tmp_path, target_modules=["layers.3.mlp.q_proj"])).do.startswith(
        "did you mean layers.3.mlp."
    )
    assert problems(tmp_path, target_modules=["self_attn.q_proj", "model.layers.0.mlp.up_proj"]) == []


def variants(name: str) -> set[str]:
    """`name` with one character left out, doubled, exchanged with the next, or replaced."""
    result = set()
    for i, character in enumerate(name):
        result |= {
            name[:i] + name[i + 1 :],
            name[: i + 1] + name[i:],
            name[:i] + "x" + name[i + 1 :],
            name[:i] + character.upper() + name[i + 1 :],
        }
        result |= {name[:i] + name[i + 1 : i + 2] + character + name[i + 2 :]}
    return result - {name}


def based_on(r: Recipe) -> str:
    """The contract that the recipe trains, or that the recipe of its base does."""
    return r.model.contract or based_on(recipes.load(there(r.model.from_recipe)))


@cache
def shallow(name: str) -> PreTrainedModel:
    """The same with eight layers, which have all of its names."""
    cut: Any = fresh(name)
    cut.model.layers = cut.model.layers[:8]
    assert leaves(cut) == leaves(model(name))
    return cut


def leaves(of: PreTrainedModel) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in targets.modules(of) if not name.rsplit(".", 1)[-1].isdigit()}


@cache
def wrongly_accepted(of: PreTrainedModel, entry: str, good: str) -> list[str]:
    """The typos of `entry` which are no problem beside a good name, or whose suggestion is no module's
    name.
    """
    names = leaves(of)
    typos = sorted(variants(entry) - names)
    assert len(typos) > 2 * len(entry)
    result, right = [], 0
    for typo in typos:
        lora = {"r": 8, "lora_alpha": 16, "target_modules": [good, typo]}
        r = Recipe("mine", Path("mine.yaml"), {"lora": lora})
        found = targets.problems(of, config(r), r)
        suggestion = found[0].do.removeprefix("did you mean ").removesuffix("?") if found else ""
        if (
            len(found) != 1
            or found[0].found != f"{typo!r} matches no module of this model"
            or suggestion not in names
        ):
            result.append(typo)
        right += suggestion == entry
    assert right > 0.7 * len(
        typos
    )  # not all: of `q_proj` without its q nobody can say whether it was q, k or v
    return result


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_has_no_problem_and_no_typo_of_one_character_in_it_is_accepted(name: str) -> None:
    r = recipes.load(name)
    if r.method != "lora":
        return
    lora = there(r.lora)
    given = {key: value for key, value in lora.given.items() if key != "init_lora_weights"}
    base = based_on(r)
    assert targets.problems(model(base), LoraConfig(task_type="CAUSAL_LM", **given), r) == []
    entries = lora.target_modules if isinstance(lora.target_modules, list) else []
    for i, entry in enumerate(entries):
        assert wrongly_accepted(shallow(base), entry, entries[i - 1]) == []


def test_a_typo_anywhere_in_a_long_list_is_found_at_its_place(tmp_path: Path) -> None:
    for i, entry in enumerate(EVERYTHING):
        typo = f"{entry}s"
        problem = only(
            problems(tmp_path, "qwen35_4b", target_modules=[*EVERYTHING[:i], typo, *EVERYTHING[i + 1 :]])
        )
        assert problem.where.endswith(f"lora.target_modules[{i}]")
        assert problem.do == f"did you mean {entry}?"


def test_no_typo_of_all_linear_is_accepted(tmp_path: Path) -> None:
    for typo in sorted(variants("all-linear")):
        if typo.lower() != "all-linear":  # which PEFT takes for it
            assert only(problems(tmp_path, "tiny_qwen3", target_modules=typo)).do.startswith(
                "did you mean all-linear?"
            )


def test_a_letter_that_makes_another_real_name_is_that_name(tmp_path: Path) -> None:
    # The check knows names, not intentions: every other letter before _proj that is a module is one.
    accepted = [c for c in string.ascii_lowercase if not problems(tmp_path, target_modules=[f"{c}_proj"])]
    assert accepted == ["k", "o", "q", "v"]


# Strings


@pytest.mark.parametrize("name", ["tiny_qwen3", "qwen35_4b"])
@pytest.mark.parametrize(
    "pattern", ["all-linear", r".*\.self_attn\.(q|v)_proj", r"model\.layers\.[13]\.mlp\.up_proj"]
)
def test_all_linear_and_patterns_that_match_are_no_problem(tmp_path: Path, name: str, pattern: str) -> None:
    assert problems(tmp_path, name, target_modules=pattern) == []


def test_a_name_as_a_string_is_answered_with_a_list(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, "tiny_qwen3", target_modules="q_proj"))
    assert problem.where.endswith("lora.target_modules")
    assert problem.found == "the pattern 'q_proj' matches no module"
    assert (
        problem.do
        == "a string is a regular expression for the whole module name; for modules by name write a list:"
        " [q_proj]"
    )


def test_a_pattern_that_matches_nothing_or_is_none_is_found(tmp_path: Path) -> None:
    assert only(problems(tmp_path, target_modules=r".*\.self_attn\.(w|x)_proj")).found.endswith(
        "matches no module"
    )
    problem = only(problems(tmp_path, target_modules=r".*\.(q|v_proj"))
    assert problem.found.startswith(r"'.*\\.(q|v_proj' is not a regular expression: missing )")


@pytest.mark.parametrize("value", ["all_linear", "all-liner", "linear-all"])
def test_a_misspelt_all_linear_is_answered(tmp_path: Path, value: str) -> None:
    assert only(problems(tmp_path, target_modules=value)).do.startswith("did you mean all-linear?")


def test_all_linear_in_a_list_is_found(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, target_modules=["all-linear"]))
    assert problem.where.endswith("lora.target_modules[0]")
    assert problem.do == "write target_modules: all-linear, without the list"


def test_null_and_an_empty_list_are_found(tmp_path: Path) -> None:
    # PEFT adapts q_proj and v_proj for null on Qwen3, silently, and refuses Qwen3.5.
    for name in ("tiny_qwen3", "tiny_qwen35"):
        assert only(problems(tmp_path, name, target_modules=None)).found.startswith(
            "is null: PEFT would choose"
        )
        assert only(problems(tmp_path, name, target_modules=[])).found == "names no module"
    # Neither the embeddings nor the head are offered as an example.
    assert (
        only(problems(tmp_path, "tiny_qwen3", target_modules=[])).do
        == f"e.g. {', '.join([*ATTENTION, *MLP])}, or all-linear"
    )


def test_an_entry_listed_twice_is_found(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, target_modules=["q_proj", "k_proj", "q_proj"]))
    assert problem.where.endswith("lora.target_modules[2]")
    assert problem.found == "'q_proj' is listed twice"


# Modules that cannot carry an adapter


@pytest.mark.parametrize("name", ["tiny_qwen3", "qwen35_9b"])
def test_lm_head_is_refused_tied_or_not(tmp_path: Path, name: str) -> None:
    problem = only(problems(tmp_path, name, target_modules=["q_proj", "lm_head"]))
    assert problem.found == "'lm_head' cannot carry an adapter"
    assert "would never be trained" in problem.do


def test_tied_embeddings_are_refused_and_untied_ones_are_not(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, "tiny_qwen3", target_modules=["q_proj", "embed_tokens"]))
    assert problem.found == "LoRA on 'embed_tokens' of a model with tied embeddings"
    assert "modules_to_save: [embed_tokens]" in problem.do
    assert problems(tmp_path, "qwen3_8b", target_modules=["q_proj", "embed_tokens"]) == []


def test_the_convolution_of_linear_attention_is_refused(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, "tiny_qwen35", target_modules=["q_proj", "conv1d"]))
    assert problem.found == "'conv1d' is a convolution"
    assert "512 groups" in problem.do


@pytest.mark.parametrize("name", ["norm", "q_norm", "input_layernorm"])
def test_norms_are_refused(tmp_path: Path, name: str) -> None:
    problem = only(problems(tmp_path, target_modules=["q_proj", name]))
    assert problem.found.startswith(f"{name!r} is a Qwen3_5RMSNorm")
    assert problem.do == "adapt the linear projections instead"


@pytest.mark.parametrize(
    ("name", "children"),
    [
        ("mlp", MLP),
        ("self_attn", ATTENTION),
        ("linear_attn", ["out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]),
    ],
)
def test_a_container_is_refused_with_the_names_of_its_projections(
    tmp_path: Path, name: str, children: list[str]
) -> None:
    problem = only(problems(tmp_path, target_modules=[name]))
    assert problem.found.startswith(f"{name!r} is a Qwen3_5")
    assert problem.do == f"name its projections: {', '.join(children)}"


def test_a_pattern_that_takes_containers_along_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, "tiny_qwen3", target_modules=r".*\.self_attn.*")
    assert [p.found.split(" is ")[0] for p in found] == ["'self_attn'", "'q_norm'", "'k_norm'"]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        target_modules=["q_projj", "lm_head"],
        modules_to_save=["lm_haed"],
        trainable_token_indices=[-1],
    )
    assert [p.where.split()[-1] for p in found] == [
        "lora.target_modules[0]",
        "lora.target_modules",
        "lora.modules_to_save[0]",
        "lora.trainable_token_indices",
    ]


# exclude_modules


def test_an_exclusion_that_excludes_nothing_is_found(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, target_modules="all-linear", exclude_modules=["up_proj", "donw_proj"]))
    assert problem.where.endswith("lora.exclude_modules[1]")
    assert (problem.found, problem.do) == (
        "'donw_proj' excludes none of the targeted modules",
        "did you mean down_proj?",
    )
    assert (
        only(problems(tmp_path, target_modules=["q_proj"], exclude_modules=["k_proj"])).do
        == "did you mean q_proj?"
    )
    # A container stands for itself only, not for what is in it: PEFT adapts the whole MLP here.
    assert only(problems(tmp_path, target_modules=MLP, exclude_modules=["mlp"])).found.startswith(
        "'mlp' excludes none"
    )
    assert only(problems(tmp_path, target_modules=MLP, exclude_modules=r".*\.layer\.0\..*")).where.endswith(
        "lora.exclude_modules"
    )


def test_an_exclusion_that_excludes_something_is_no_problem(tmp_path: Path) -> None:
    assert (
        problems(
            tmp_path, target_modules="all-linear", exclude_modules=["up_proj", "layers.3.self_attn.q_proj"]
        )
        == []
    )
    assert problems(tmp_path, target_modules=MLP, exclude_modules=r".*\.layers\.0\..*") == []


def test_an_exclusion_that_is_no_pattern_is_found(tmp_path: Path) -> None:
    assert (
        "is not a regular expression"
        in only(problems(tmp_path, target_modules=MLP, exclude_modules="*.mlp")).found
    )


def test_an_exclusion_of_everything_or_of_a_whole_target_is_found(tmp_path: Path) -> None:
    found = problems(tmp_path, target_modules=["q_proj", "k_proj"], exclude_modules=["q_proj", "k_proj"])
    assert [p.found for p in found] == [
        f"'{n}' adapts nothing: exclude_modules leaves none of its modules" for n in ("q_proj", "k_proj")
    ]
    assert only(
        problems(tmp_path, target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"])
    ).where.endswith("target_modules[1]")
    assert only(problems(tmp_path, target_modules="all-linear", exclude_modules=".*")).found.startswith(
        "'all-linear' adapts nothing"
    )


# Layers


def test_layers_that_exist_and_have_the_targets_are_no_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, "qwen35_4b", target_modules=["q_proj"], layers_to_transform=[3, 31]) == []
    assert (
        problems(
            tmp_path, "tiny_qwen3", target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"
        )
        == []
    )


@pytest.mark.parametrize("layers", [32, [3, 32], [-1], [3, 99]])
def test_a_layer_out_of_range_is_found(tmp_path: Path, layers: int | list[int]) -> None:
    found = problems(tmp_path, "qwen35_4b", target_modules=MLP, layers_to_transform=layers)
    assert only(found).do == "the layers are 0 to 31"
    assert only(found).found == f"there is no layer {layers if isinstance(layers, int) else layers[-1]}"


def test_a_layer_without_the_targets_is_found(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, "qwen35_4b", target_modules=ATTENTION, layers_to_transform=[3, 4, 7]))
    assert problem.where.endswith("lora.layers_to_transform[1]")
    assert problem.found == "layer 4 has none of the target modules"


def test_a_target_in_none_of_the_layers_is_found(tmp_path: Path) -> None:
    problem = only(
        problems(tmp_path, "qwen35_4b", target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1])
    )
    assert problem.where.endswith("lora.target_modules[0]")
    assert problem.found == "'q_proj' adapts nothing: layers_to_transform leaves none of its modules"


def test_an_empty_list_of_layers_which_peft_takes_for_all_is_found(tmp_path: Path) -> None:
    assert (
        only(problems(tmp_path, target_modules=MLP, layers_to_transform=[])).found
        == "an empty list means every layer to PEFT"
    )


def test_a_wrong_layers_pattern_is_found(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, target_modules=MLP, layers_to_transform=[0], layers_pattern="layer"))
    assert (problem.found, problem.do) == ("'layer' is no list of layers", "did you mean layers?")


# rank_pattern, alpha_pattern


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_without_an_adapted_module_is_found(tmp_path: Path, key: str) -> None:
    assert (
        problems(
            tmp_path, target_modules=ATTENTION, **{key: {"q_proj": 4, r"layers\.3\.self_attn\.v_proj": 16}}
        )
        == []
    )
    problem = only(problems(tmp_path, target_modules=ATTENTION, **{key: {"k_proj": 4, "q_projj": 4}}))
    assert problem.where.endswith(f"lora.{key}.q_projj")
    assert (problem.found, problem.do) == ("'q_projj' matches no adapted module", "did you mean q_proj?")
    # up_proj is a module of the model, but not one that gets an adapter.
    assert (
        only(problems(tmp_path, target_modules=ATTENTION, **{key: {"up_proj": 4}})).found
        == "'up_proj' matches no adapted module"
    )
    excluded = {"exclude_modules": ["layers.0.mlp.up_proj"], key: {r"layers\.0\.mlp\.up_proj": 4}}
    assert (
        only(problems(tmp_path, target_modules=MLP, **excluded)).found
        == r"'layers\\.0\\.mlp\\.up_proj' matches no adapted module"
    )
    assert (
        "is not a regular expression"
        in only(problems(tmp_path, target_modules=MLP, **{key: {"(up_proj": 4}})).found
    )


def test_a_pattern_after_a_wider_one_is_found(tmp_path: Path) -> None:
    # PEFT takes the first pattern that fits: the second rank would never be used.
    problem = only(problems(tmp_path, target_modules=ATTENTION, rank_pattern={".*_proj": 4, "q_proj": 16}))
    assert problem.found == "'q_proj' comes after a pattern that fits all its modules"
    assert problems(tmp_path, target_modules=ATTENTION, rank_pattern={"q_proj": 16, ".*_proj": 4}) == []


# What is trained beside the targets


def test_modules_to_save_must_exist(tmp_path: Path) -> None:
    assert problems(tmp_path, target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"]) == []
    problem = only(problems(tmp_path, target_modules=ATTENTION, modules_to_save=["lm_head", "embed_token"]))
    assert problem.where.endswith("lora.modules_to_save[1]")
    assert problem.do == "did you mean embed_tokens?"


def test_a_module_to_save_whose_name_ends_others_is_found(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, "tiny_qwen3", target_modules=ATTENTION, modules_to_save=["norm"]))
    assert (
        problem.found
        == "'norm' would train q_norm, k_norm, input_layernorm, post_attention_layernorm as well"
    )
    assert problem.do == "write more of the name, e.g. model.norm"
    assert problems(tmp_path, "tiny_qwen3", target_modules=ATTENTION, modules_to_save=["model.norm"]) == []
    # It is so: PEFT trains them all.
    config = LoraConfig(target_modules=ATTENTION, modules_to_save=["norm"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(fresh("tiny_qwen3"), config, low_cpu_mem_usage=True)
    assert any("q_norm" in n for n, p in peft_model.named_parameters() if p.requires_grad)


def test_a_target_inside_a_module_to_save_is_found(tmp_path: Path) -> None:
    found = problems(tmp_path, "tiny_qwen3", target_modules=["q_proj", "up_proj"], modules_to_save=["mlp"])
    assert only(found).found == "'up_proj' adapts nothing: modules_to_save leaves none of its modules"


def test_a_rank_pattern_may_mean_a_target_parameter(tmp_path: Path) -> None:
    lora = {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}
    assert problems(tmp_path, **lora, rank_pattern={r"mlp\.up_proj\.weight": 4}) == []
    assert only(problems(tmp_path, **lora, rank_pattern={r"mlp\.down_proj\.weight": 4})).found.endswith(
        "matches no adapted module"
    )


def test_target_parameters_must_exist(tmp_path: Path) -> None:
    assert problems(tmp_path, target_modules=[], target_parameters=["mlp.up_proj.weight"]) == []
    problem = only(problems(tmp_path, target_modules=["q_proj"], target_parameters=["mlp.up_prj.weight"]))
    assert problem.where.endswith("lora.target_parameters[0]")
    assert (problem.found, problem.do) == (
        "'mlp.up_prj.weight' matches no parameter",
        "did you mean mlp.up_proj.weight?",
    )


def test_token_indices_must_be_of_the_vocabulary(tmp_path: Path) -> None:
    assert problems(tmp_path, "tiny_qwen3", target_modules=["q_proj"], trainable_token_indices=[0, 191]) == []
    assert (
        problems(
            tmp_path, "tiny_qwen3", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [191]}
        )
        == []
    )
    found = problems(tmp_path, "tiny_qwen3", target_modules=["q_proj"], trainable_token_indices=[5, 192, -1])
    assert [p.found for p in found] == [f"{i} is no token of a vocabulary of 192" for i in (192, -1)]
    assert found[0].do == "0 to 191"
    problem = only(
        problems(
            tmp_path, "tiny_qwen3", target_modules=["q_proj"], trainable_token_indices={"embed_token": [1]}
        )
    )
    assert problem.do == "did you mean embed_tokens?"


# Exactly PEFT's modules


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_qwen35"])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": [*ATTENTION, *MLP]},
        {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": r".*\.self_attn\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.[01]\.mlp\.\w+_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear"},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.0.mlp.down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.layers\.1\..*"},
        {"target_modules": "all-linear", "modules_to_save": ["self_attn"]},
        {"target_modules": MLP, "exclude_modules": ["gate_proj"]},
        {"target_modules": MLP, "layers_to_transform": [1]},
        {"target_modules": MLP, "layers_to_transform": 0},
        {
            "target_modules": MLP,
            "layers_to_transform": [0, 1],
            "layers_pattern": "layers",
            "exclude_modules": ["layers.0.mlp.up_proj"],
        },
        {"target_modules": MLP, "layers_to_transform": []},
    ],
    ids=lambda lora: " ".join(map(str, lora.values())),
)
def test_matched_is_exactly_what_peft_adapts(name: str, lora: dict[str, Any]) -> None:
    expected = targets.matched(model(name), LoraConfig(task_type="CAUSAL_LM", **lora))
    peft_model = get_peft_model(
        fresh(name), LoraConfig(task_type="CAUSAL_LM", **lora), low_cpu_mem_usage=True
    )
    adapted = {
        n.removeprefix("base_model.model.") for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)
    }
    assert set(expected) == adapted
    assert len(expected) == len(adapted) > 0


def test_a_model_of_other_names_and_classes_is_matched_too(tmp_path: Path) -> None:
    gpt2_config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=2, vocab_size=128)
    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(gpt2_config)  # its layers are `h`, its projections Conv1D
    lora = {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [1], "fan_in_fan_out": True}
    assert problems(tmp_path, gpt2, **lora) == []
    assert only(problems(tmp_path, gpt2, **lora | {"layers_to_transform": [2]})).do == "the layers are 0 to 1"
    found = targets.matched(gpt2, config(written(tmp_path, lora)))
    assert found == ["transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj"]
    assert list(map(str, targets.coverage(gpt2, found))) == [
        "full_attention 2 layers: c_attn (1 of 2), c_proj (1 of 2) (not: c_proj)"
    ]
    everything = targets.matched(gpt2, LoraConfig(target_modules="all-linear"))
    peft_model = get_peft_model(
        gpt2, LoraConfig(target_modules="all-linear", fan_in_fan_out=True), low_cpu_mem_usage=True
    )
    assert {
        n.removeprefix("base_model.model.") for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)
    } == set(everything)


def test_matching_leaves_the_config_as_it_was(tmp_path: Path) -> None:
    r = written(
        tmp_path,
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"], "rank_pattern": {"q_proj": 4}},
    )
    made = config(r)
    before = made.to_dict()
    targets.problems(model("tiny_qwen35"), made, r)
    targets.matched(model("tiny_qwen35"), made)
    assert made.to_dict() == before


# Coverage


def covered(name: str, **lora: Any) -> list[str]:
    found = targets.matched(model(name), LoraConfig(task_type="CAUSAL_LM", **lora))
    return [str(c) for c in targets.coverage(model(name), found)]


def test_coverage_says_that_24_of_32_layers_have_no_adapted_token_mixer() -> None:
    assert covered("qwen35_4b", target_modules=[*ATTENTION, *MLP]) == [
        (
            "linear_attention 24 layers: mlp only - no token mixer adapted (in_proj_qkv, in_proj_z,"
            " in_proj_b, in_proj_a, out_proj exist)"
        ),
        "full_attention 8 layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    ]


def test_coverage_of_attention_alone_and_of_everything() -> None:
    assert covered("qwen35_4b", target_modules=["v_proj"])[0].startswith(
        "linear_attention 24 layers: nothing - no token mixer adapted ("
    )
    assert (
        covered("qwen35_4b", target_modules=["v_proj"])[1]
        == "full_attention 8 layers: v_proj (not: q_proj, k_proj, o_proj)"
    )
    assert covered("qwen35_4b", target_modules="all-linear") == [
        (
            "linear_attention 24 layers: in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj, gate_proj,"
            " up_proj, down_proj"
        ),
        "full_attention 8 layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    ]
    assert (
        covered("qwen35_4b", target_modules=LINEAR)[0]
        == "linear_attention 24 layers: in_proj_qkv, in_proj_z, out_proj (not: in_proj_b, in_proj_a)"
    )


def test_coverage_counts_a_module_adapted_in_some_layers_only() -> None:
    first, second = covered("qwen35_4b", target_modules=["q_proj", "up_proj"], layers_to_transform=[3, 4, 7])
    assert first.startswith("linear_attention 24 layers: up_proj (1 of 24) - no token mixer adapted (")
    assert (
        second == "full_attention 8 layers: q_proj (2 of 8), up_proj (2 of 8) (not: k_proj, v_proj, o_proj)"
    )


def test_coverage_of_a_dense_model_is_one_line_also_without_layer_types() -> None:
    for name, layers in (("qwen3_4b", 36), ("llama2_7b", 32)):
        assert covered(name, target_modules=ATTENTION) == [
            f"full_attention {layers} layers: q_proj, k_proj, v_proj, o_proj"
        ]


def test_coverage_adds_up_to_the_matched_modules() -> None:
    real = model("tiny_qwen35")
    found = targets.matched(real, LoraConfig(target_modules="all-linear"))
    assert sum(c.layers * len(c.adapted) for c in targets.coverage(real, found)) == len(found) == 31
    assert sum(c.layers * len(c.left) for c in targets.coverage(real, [])) == 31


# ---- mixtures of experts


def mixture(name: str, bases) -> PreTrainedModel:
    """A tiny one of tests/cases, or one made from a config, without weights."""
    made = {"mixtral": MixtralConfig, "glm4_moe": Glm4MoeConfig, "gpt_oss": GptOssConfig}
    config = made[name](**EXPERTS[name]) if name in made else AutoConfig.from_pretrained(bases(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24, "n_group": 1}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": TINY | {"num_local_experts": 4},
    "gpt_oss": TINY | {"num_local_experts": 4},
    "glm4_moe": TINY | GROUPS | {"topk_group": 1, "first_k_dense_replace": 1},
}


def trained_by_peft(of: PreTrainedModel, **lora: Any) -> tuple[set[str], int]:
    """Where PEFT really puts A and B, cut to what follows the layer's number, and how many numbers it
    trains."""
    config = targets.resolved(of, LoraConfig(task_type="CAUSAL_LM", r=4, **lora))
    peft_model = get_peft_model(of, config, low_cpu_mem_usage=True)
    names = (n for n, p in peft_model.named_parameters() if p.requires_grad and ".lora_A." in n)
    found = {n.split(".layers.")[1].split(".", 1)[1].split(".lora_A")[0] for n in names}
    return found, peft_model.get_nb_trainable_parameters()[0]


def test_a_shared_expert_is_named_as_one_and_the_routed_ones_are_said_to_be_frozen(bases, tmp_path):
    of, wanted = mixture("qwen2_moe", bases), ["q_proj", *MLP]
    assert problems(tmp_path, of, target_modules=wanted) == []
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=wanted)
    (covered,) = targets.coverage(of, targets.matched(of, lora))
    shared = "shared_expert.gate_proj, shared_expert.up_proj, shared_expert.down_proj"
    assert str(covered) == (
        f"full_attention 2 layers: q_proj, {shared} (not: k_proj, v_proj, o_proj);"
        " routed experts frozen: experts.gate_up_proj, experts.down_proj"
    )
    assert trained_by_peft(of, target_modules=wanted)[0] == {
        "self_attn.q_proj",
        *(f"mlp.shared_expert.{name}" for name in MLP),
    }


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("entry", "parameter"), [("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"), ("down_proj",) * 2]
)
def test_a_name_that_only_an_expert_has_is_answered_by_target_parameters(
    name, entry, parameter, bases, tmp_path
):
    of = mixture(name, bases)
    (found,) = problems(tmp_path, of, target_modules=["q_proj", entry])
    assert found.where.endswith("lora.target_modules[1]") and f"{entry!r} matches no module" in found.found
    assert f"lora.target_parameters: [mlp.experts.{parameter}]" in found.do


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_that_are_trained_stand_in_the_coverage(name, bases, tmp_path):
    of, entries = mixture(name, bases), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": entries}
    assert problems(tmp_path, of, **lora) == []
    config = LoraConfig(task_type="CAUSAL_LM", **lora)
    adapted = [*targets.matched(of, config), *targets.matched_parameters(of, config)]
    for covered in targets.coverage(of, adapted):
        assert set(covered.adapted) == {"self_attn.q_proj", *entries} and "frozen" not in str(covered)
    assert {n.partition(".experts")[0] for n in trained_by_peft(of, **lora)[0]} == {"self_attn.q_proj", "mlp"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("glm4_moe", ["q_proj", *MLP]),
        ("glm4_moe", ["q_proj", "shared_experts.gate_proj", "shared_experts.up_proj"]),
        ("glm4_moe", r".*\.(gate_proj|up_proj)"),
        ("glm4_moe", ["q_proj", "gate_proj"]),
        ("glm4_moe", ["q_proj", "gate"]),
        ("gpt_oss", ["q_proj", "router"]),
    ],
)
def test_names_of_modules_mean_modules_also_where_peft_takes_them_for_experts(name, wanted, bases, tmp_path):
    """PEFT rewrites such names for adapters of transformers 4, or cannot adapt a router that is no linear
    module: they go to it by their weight."""
    of: Any = mixture(name, bases)
    assert problems(tmp_path, of, target_modules=wanted) == []
    meant = targets.matched(of, LoraConfig(task_type="CAUSAL_LM", target_modules=wanted))
    shapes = [of.get_submodule(n).weight.shape for n in meant]
    named = {n.split(".layers.")[1].split(".", 1)[1] for n in meant}
    assert trained_by_peft(of, target_modules=wanted) == (named, sum(4 * sum(shape) for shape in shapes))


def test_an_expert_by_its_name_is_answered_with_the_parameters_of_all(bases, tmp_path):
    (found,) = problems(tmp_path, mixture("mixtral", bases), target_modules=["q_proj", "experts.3.w1"])
    reached = "mlp.experts.gate_up_proj, mlp.experts.down_proj"
    assert found.do == f"the routed experts are parameters here: lora.target_parameters: [{reached}]"


def test_a_module_that_a_kernel_reads_past_its_adapter_is_named_with_the_way_to_leave_it_out(tmp_path):
    of = of_family("nemotron_h")
    (found,) = problems(tmp_path, of, target_modules="all-linear")
    assert "'out_proj' of a nemotron_h" in found.found and found.do == "exclude_modules: [out_proj]"
    assert problems(tmp_path, of, target_modules="all-linear", exclude_modules=["out_proj"]) == []


def test_what_is_adapted_by_its_weight_keeps_its_rank_and_refuses_what_only_modules_have(bases, tmp_path):
    of = mixture("glm4_moe", bases)
    lora: dict[str, Any] = {"target_modules": "all-linear"}
    ranked = LoraConfig(task_type="CAUSAL_LM", r=4, rank_pattern={"down_proj": 2}, **lora)
    peft_model = get_peft_model(of, targets.resolved(of, ranked), low_cpu_mem_usage=True)
    ranks = {n.split(".")[-4]: p.shape[0] for n, p in peft_model.named_parameters() if ".lora_A." in n}
    assert ranks["down_proj"] == 2 and {*ranks.values()} == {2, 4}
    problem = only(problems(tmp_path, mixture("glm4_moe", bases), **lora, lora_dropout=0.1))
    assert problem.where.endswith("lora.lora_dropout") and "gate_proj" in problem.found
    assert problem.do.endswith("lora.target_modules: [q_proj, k_proj, v_proj, o_proj]")


@cache
def of_family(name: str) -> Any:
    """The text model of tests/cases/families.py, without weights."""
    kind, fields = families.FAMILIES[name]
    config = getattr(transformers, kind).config_class(**fields).get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


MIXTURES = ["deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "jamba", "llama4"]
MIXTURES += ["mixtral", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"]


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_is_the_linear_modules_without_routers_and_routed_experts(name: str) -> None:
    of = of_family(name)
    meant = targets.matched(of, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    count = sum(4 * sum(of.get_submodule(n).weight.shape) for n in meant)
    assert meant and not [n for n in meant if {"router", "gate", "experts"} & set(n.split("."))]
    covered = targets.coverage(of, meant)
    assert any("routed experts frozen: experts." in str(c) for c in covered)
    model_ = copy.deepcopy(of)
    named = {n.split(".layers.")[1].split(".", 1)[1] for n in meant}
    assert trained_by_peft(model_, target_modules="all-linear") == (named, count)
