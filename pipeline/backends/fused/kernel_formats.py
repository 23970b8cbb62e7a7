"""Recipes whose number formats no GPU kernel of ours takes, refused before any work."""

from __future__ import annotations

from pipeline.recipe import Recipe
from plugins.gpu.spec import format_problems


def recipe_problems(recipe: Recipe, remedy: str) -> list[str]:
    """One message for each number format of the recipe that no kernel takes."""
    chosen = recipe.formats
    problems = format_problems((chosen.weight, *chosen.weight_of.values()), chosen.activation)
    return [f"{problem}; {remedy}" for problem in problems]
