"""The recipe: one nested YAML of about fifty documented keys that says everything about a run. Imports no torch.

``schema`` says which keys there are, ``checks`` what must hold between them, ``load`` reads files and overrides,
``problems`` and ``hints`` word what is wrong, ``reference`` writes recipes and the table of keys.
"""

from __future__ import annotations

from veneer.recipe.load import load_recipe, recipe_from
from veneer.recipe.problems import Problem, RecipeProblems, all_keys
from veneer.recipe.reference import recipe_reference
from veneer.recipe.schema import (
    LOSS,
    METRICS,
    REGEX_METRIC,
    AdapterRecipe,
    DataRecipe,
    EvalRecipe,
    QuantizeRecipe,
    Recipe,
    TrainRecipe,
)

__all__ = [
    "LOSS",
    "METRICS",
    "REGEX_METRIC",
    "AdapterRecipe",
    "DataRecipe",
    "EvalRecipe",
    "Problem",
    "QuantizeRecipe",
    "Recipe",
    "RecipeProblems",
    "TrainRecipe",
    "all_keys",
    "load_recipe",
    "recipe_from",
    "recipe_reference",
]
