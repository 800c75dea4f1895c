"""The files in recipes/: each is sound and names only what is there on a fresh clone, wherever it is started from."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.data.read import read
from veneer.inbox.parts import SOURCES
from veneer.models.bundled import ALIASES, RANDOM
from veneer.models.source import find
from veneer.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
OWN = Path(__file__).parents[1] / "recipes" / "data"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_needs_nothing_that_has_to_be_made_first(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.base in [*ALIASES, *RANDOM]
    if recipe.base in RANDOM:
        assert find(recipe.base, None, False).folder
    for source in (recipe.data.train, recipe.data.eval):
        assert source in SOURCES or Path(str(source)).parent == OWN
        assert len(read(str(source), format=recipe.data.format, columns=recipe.data.columns)) >= 40


def test_no_two_recipes_share_a_run_folder_and_none_takes_the_demos() -> None:
    folders = [load_recipe(path).output_dir for path in RECIPES]
    assert len(set(folders)) == len(folders) == 9
    assert not any(Path(folder).name == "demo" for folder in folders)
