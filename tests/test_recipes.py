"""Recipes: what is written is what is read, a slip is named, and nothing but RecipeError comes out."""

import contextlib
import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lora_lexicon.errors import ExpertError, PackError, RecipeError
from lora_lexicon.experiments.run import READS, check_experiment
from lora_lexicon.experts.cost import RESERVE, options_of, trained_by, training
from lora_lexicon.experts.pretrain import PretrainRecipe
from lora_lexicon.experts.shape import read_shape
from lora_lexicon.recipe import DomainsRecipe, ExperimentRecipe, RewardRecipe, RouterRecipe, TrainRecipe, load_recipe
from lora_lexicon.resources import find_base, find_recipe, find_system, is_hub_name

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name != "accelerate"
)
# By file name; every other one trains an expert.
KINDS = {"base": PretrainRecipe, "domains": DomainsRecipe, "router": RouterRecipe, "reward": RewardRecipe}
KINDS |= dict.fromkeys(READS, ExperimentRecipe)
RECIPES = (DomainsRecipe, TrainRecipe, RouterRecipe, RewardRecipe, PretrainRecipe, ExperimentRecipe)
FIELDS = [(kind, field.name) for kind in RECIPES for field in dataclasses.fields(kind)]
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(2**31), 2**31),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))),
    tuple[str, ...]: st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")))).map(tuple),
    tuple[int, ...]: st.lists(st.integers(-(2**31), 2**31)).map(tuple),
    dict[str, int]: st.dictionaries(st.from_regex(r"\A[a-z]{1,8}\Z"), st.integers(1, 64)),
}
anywhere = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def value_of(hint: Any) -> st.SearchStrategy[Any]:
    """A strategy for the values that a field of this type may hold."""
    return st.sampled_from(typing.get_args(hint)) if typing.get_origin(hint) is Literal else VALUES[hint]


@st.composite
def recipes(draw: st.DrawFn) -> Any:
    """Any recipe, with any of its fields set to anything of the right type."""
    kind = draw(st.sampled_from(RECIPES))
    hints = typing.get_type_hints(kind)
    names = draw(st.sets(st.sampled_from(list(hints))))
    return kind(**{name: draw(value_of(hints[name])) for name in names})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load(name: str) -> None:
    kind = KINDS.get(Path(name).name, TrainRecipe)
    recipe = load_recipe(kind, find_recipe(name))
    assert isinstance(recipe, kind)
    if isinstance(recipe, ExperimentRecipe):
        assert recipe.experiment == Path(name).name
        check_experiment(recipe)


@pytest.mark.parametrize(
    ("name", "experts", "pass_tokens", "card", "said"),
    [
        ("lora-nf4", 1, 8192, 12, "10.6 GB"),
        ("lora-nf4", 4, 8192, 16, "12.1 GB"),
        ("lora-nf4", 4, 4096, 12, "10.4 GB"),
        ("lora", 1, 8192, 24, "20.6 GB"),
        ("lora", 4, 8192, 24, "22.1 GB"),
        ("ffn", 1, 8192, 80, "73.0 GB"),
    ],
)
def test_a_recipe_takes_what_it_says_and_fits_the_card_it_names(
    name: str, experts: int, pass_tokens: int, card: int, said: str
) -> None:
    file, shape = find_recipe(f"llama-3-8b/{name}"), read_shape("llama-3-8b")
    recipe = load_recipe(TrainRecipe, file, pass_tokens=pass_tokens)
    largest = experts * recipe.batch_size * recipe.gradient_accumulation * recipe.max_length
    tokens = min(largest, pass_tokens)
    options = options_of(recipe, shape, recipe.rank, tokens)
    trained = experts * trained_by(shape, options, recipe.kind)
    states = "8-bit AdamW" if "8bit" in recipe.optimizer else "AdamW"
    told = training("", shape, options, recipe.kind, trained, recipe.quantize, states, passes=largest // tokens)
    assert f"{told.memory / 1e9:.1f} GB" == said
    assert told.memory <= (1 - RESERVE) * card * 1e9
    assert {said, f"{card} GB"} <= set(re.findall(r"[\d.]+ GB", file.read_text(encoding="utf-8")))


@anywhere
@given(recipe=recipes())
def test_what_is_written_is_what_is_read(recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(recipe), allow_unicode=True), encoding="utf-8")
    assert load_recipe(type(recipe), file) == recipe


@settings(max_examples=40, deadline=None)
@given(recipe=recipes())
def test_set_takes_every_field(recipe: Any) -> None:
    values = dataclasses.asdict(recipe).items()
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1e9)}" for key, value in values]
    assert load_recipe(type(recipe), overrides=overrides) == recipe


def test_a_domain_s_own_rank_given_with_a_dot_is_shown_as_it_is_written() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'rank_of\.make-abstract': did you mean '(.+)'") as caught:
        load_recipe(TrainRecipe, overrides=["rank_of.make-abstract=4"])
    override = str(caught.value).split("'")[-2]
    assert load_recipe(TrainRecipe, overrides=[override]).rank_of == {"make-abstract": 4}


def test_the_last_word_wins(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("rank: 4\nepochs: 2\nseed: 7\n", encoding="utf-8")
    recipe = load_recipe(TrainRecipe, file, ["rank=16"], rank=8, epochs=3, kind=None)
    assert (recipe.rank, recipe.epochs, recipe.seed, recipe.kind) == (16, 3.0, 7, "lora")


@settings(deadline=None)
@given(field=st.sampled_from(FIELDS), data=st.data())
def test_a_misspelt_key_names_its_neighbour(field: tuple[Any, str], data: st.DataObject) -> None:
    kind, name = field
    at = data.draw(st.integers(0, len(name) - 1))
    slip = name[:at] + data.draw(st.sampled_from(["", "x", "_"])) + name[at + 1 :]
    assume(slip and slip not in {other for one, other in FIELDS if one is kind} and slip.strip() == slip)
    with pytest.raises(RecipeError, match=f"unknown key .*did you mean '{name}'|known keys: .*{name}") as caught:
        load_recipe(kind, overrides=[f"{slip}=1"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_wrong_value_is_named(kind: Any, name: str) -> None:
    hint = typing.get_type_hints(kind)[name]
    wrong = "7" if hint in (str, tuple[str, ...]) else "[a, b]"
    with pytest.raises(RecipeError, match=f"{name} is "):
        load_recipe(kind, overrides=[f"{name}={wrong}"])


@pytest.mark.parametrize(
    "override", ["rank_of={adjectives: many}", "rank_of={7: 8}", "epochs=.nan", "epochs=1" + "0" * 400]
)
def test_a_value_that_only_looks_right_is_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(TrainRecipe, overrides=[override])


@pytest.mark.parametrize(
    "text", ["", "- rank", "rank", "rank: [", "rank: 2020-99-99", "\x00", "a: &a [*a]", "? [rank]\n: 1"]
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(TrainRecipe, file)
    assert "\n" not in str(caught.value)


@anywhere
@given(content=st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_a_recipe_or_a_recipe_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with contextlib.suppress(RecipeError):
        load_recipe(TrainRecipe, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml does not exist"):
        load_recipe(TrainRecipe, tmp_path / "absent.yaml")


def test_an_unknown_recipe_name_lists_those_that_ship() -> None:
    with pytest.raises(RecipeError, match="no recipe at 'absent'"):
        find_recipe("absent")


def test_a_mistyped_path_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it fails at once, and not after half a minute of asking."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tour").mkdir()
    for name in ("tour/nosuch", "./nosuch", "../nosuch", str(tmp_path / "nosuch"), "a/b/c", "tinny", ".", ""):
        assert not is_hub_name(name)
        if not Path(name).is_dir():
            with pytest.raises(ExpertError, match="no base at"):
                find_base(name)
            with pytest.raises(PackError, match="no model at"):
                find_system(name)
    assert is_hub_name("meta-llama/Meta-Llama-3-8B")
    assert find_system("meta-llama/Meta-Llama-3-8B") is None
    assert find_base("tour") == "tour"
