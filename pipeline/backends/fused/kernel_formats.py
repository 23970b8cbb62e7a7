"""Recipes whose number formats no GPU kernel of ours takes, refused before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plugins.gpu.specs import format_problems

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


def recipe_problems(recipe: Recipe, remedy: str) -> list[str]:
    """One message for each number format of the recipe that no kernel takes."""
    chosen = recipe.formats
    problems = format_problems((chosen.weight, *chosen.weight_of.values()), chosen.activation)
    return [f"{problem}; {remedy}" for problem in problems]
