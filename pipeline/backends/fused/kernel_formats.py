"""Recipes that no GPU engine can compute, refused before any work: number formats, and scales of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.methods import activation_scalings
from plugins.gpu.spec import format_problems

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


def recipe_problems(recipe: Recipe, remedy: str) -> list[str]:
    """One message for each number format of the recipe that no kernel takes."""
    chosen = recipe.formats
    problems = format_problems((chosen.weight, *chosen.weight_of.values()), chosen.activation)
    return [f"{problem}; {remedy}" for problem in problems]


def scaling_problems(recipe: Recipe, refused: Mapping[str, str]) -> list[str]:
    """One message for each scaling of activations that the method gives and a target refuses. refused: why, by the
    scaling's name."""
    calibrate = recipe.calibrate
    scalings = activation_scalings(calibrate.method, calibrate.preset, calibrate.options)
    words = f"calibrate.method {calibrate.method} scales activations"
    return [f"{words} {scaling}: {refused[scaling]}" for scaling in scalings if scaling in refused]
