"""Errors a user can cause or meet, each with the exit code of the command line.

A message says the value found, the rule it breaks and the remedy, and names the layer or file. Anything else that is
raised is a bug and exits with 1.
"""

from __future__ import annotations


class UserError(Exception):
    """Base of all errors shown without a stack trace."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, a key of it or a command-line value is wrong."""


class ModelError(UserError):
    """A model folder, its configuration or its weights cannot be used."""


class ContractError(UserError):
    """A graph, checkpoint or bundle breaks a rule of its format."""


class EnvironmentLacksError(UserError):
    """A package, runtime or device that the work needs is missing; found before work starts."""

    exit_code = 3


class ParityError(UserError):
    """A parity gate failed; the report says which and by how much."""

    exit_code = 4


class ResourceError(UserError):
    """Memory or disk ran out."""

    exit_code = 5


class RegressionError(UserError):
    """A bundle is worse than its baseline, by more than is tolerated."""

    exit_code = 6


class SweepError(UserError):
    """Some engines of a sweep were not built; the others were, and a table says which."""

    exit_code = 7
