from __future__ import annotations

from pathlib import Path

import pytest

from sparsec.errors import RecipeError
from sparsec.passes import FoldConstants, Prune
from sparsec.rewriting.pass_specs import resolve_passes
from sparsec.rewriting.recipe import RECIPE_BYTES, RECIPES, Recipe, load_recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_recipe_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        version: 1
        passes:
          - fold-constants
          - prune: {sparsity: 0.8, block: 4x1, include: [layer3.*, head], scope: global}
          - prune: {nm: 2:4}
          - prune:
        calibration: data/calibration.npz
        shapes: {input: [1, 3, 224, 224], other: 1x5}
        target: arm
        """,
    )
    recipe = load_recipe(path)
    assert recipe.shapes == {"input": (1, 3, 224, 224), "other": (1, 5)}
    assert recipe.calibration == str(tmp_path / "data" / "calibration.npz")
    assert recipe.target == "arm"
    assert [step.run for step in resolve_passes(recipe=recipe)] == [
        FoldConstants(),
        Prune(sparsity=0.8, block="4x1", include=("layer3.*", "head"), scope="global"),
        Prune(nm="2:4"),
        Prune(),
    ]
    assert str(tmp_path) not in str(recipe.document())


def test_recipe_comes_before_passes() -> None:
    steps = resolve_passes(["prune:sparsity=0.1"], recipe={"version": 1, "passes": ["fold-constants"]})
    assert [step.name for step in steps] == ["fold-constants", "prune"]


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_resolve(name: str) -> None:
    assert len(resolve_passes(recipe=name)) == len(RECIPES[name]["passes"])
    assert load_recipe(load_recipe(name)) == load_recipe(name)


BAD = {
    "no version": ("passes: []", "expected `version: 1`, got None"),
    "version": ("version: 2\npasses: []", "expected `version: 1`, got 2"),
    "true is no version": ("version: true\npasses: []", "expected `version: 1`"),
    "no passes": ("version: 1", "`passes` must be a list"),
    "unknown key": ("version: 1\npasses: []\npases: []", "unknown key 'pases'; did you mean 'passes'?"),
    "list": ("- 1", "expected a mapping"),
    "pass with two names": ("version: 1\npasses: [{a: {}, b: {}}]", r"passes\[0\]: expected NAME or"),
    "options are no mapping": ("version: 1\npasses: [{prune: 0.8}]", r"passes\[0\]: expected NAME or"),
    "number": ("version: 1\npasses: [fold-constants, 7]", r"passes\[1\]: expected NAME or"),
    "yaml": ("version: 1\npasses: [", "not valid YAML at line 2"),
    "tag": ("version: 1\npasses: !!python/object/apply:os.system [id]", "not valid YAML at line 2"),
    "alias": ("version: 1\npasses: &a [prune]\nshapes: *a", "aliases are not allowed"),
    "repeated key": ("version: 1\npasses: []\npasses: [prune]", "key 'passes' is given twice"),
    "repeated option": ("version: 1\npasses: [prune: {nm: '2:4', nm: '1:4'}]", "key 'nm' is given twice"),
    "shapes": ("version: 1\npasses: []\nshapes: [1]", "`shapes` must map"),
    "shape": ("version: 1\npasses: []\nshapes: {x: [a]}", "shapes: x must be like"),
    "zero": ("version: 1\npasses: []\nshapes: {x: [0, 3]}", "positive dimensions"),
    "target": ("version: 1\npasses: []\ntarget: [arm]", "`target` must be a name"),
    "calibration": ("version: 1\npasses: []\ncalibration: 3", "`calibration` must be a path"),
    "deep": ("version: 1\npasses: " + "[" * 3000, "not valid YAML"),
    "binary": ("\0\1\2", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_recipe_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert str(caught.value).startswith("recipe recipe.yaml: ")
    assert "\n" not in str(caught.value)


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe of this name; did you mean '4x1-80'"):
        load_recipe("4x1-8")
    with pytest.raises(RecipeError, match=r"cannot read .*No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="below"):
        load_recipe(write(tmp_path, "#" * (RECIPE_BYTES + 1)))


def test_option_errors_name_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\npasses: [prune: {spasity: 0.8}]")
    with pytest.raises(
        RecipeError, match=r"recipe recipe.yaml: pass 'prune' has no option 'spasity'; did you mean 'sparsity'"
    ):
        resolve_passes(recipe=path)


def test_empty_recipe_is_no_recipe() -> None:
    assert resolve_passes(recipe=Recipe()) == []
