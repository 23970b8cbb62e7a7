"""What an engine in a pipeline refuses, on a class made here: the sentence of each table, and who gets it."""

from __future__ import annotations

import pytest

from export.errors import RecipeError
from pipeline.generate.diffusers_refusals import ADAPTERS, CLASS_METHODS, GRAPH, METHODS, lacking, refuse_methods


@refuse_methods
class StandIn:
    """A transformer with one attribute of its own."""

    chunk_size = 1


@pytest.mark.parametrize("name", [*METHODS, *CLASS_METHODS])
def test_methods_of_the_tables_raise_their_sentence(name: str) -> None:
    owner = StandIn if name in CLASS_METHODS else StandIn()
    why = (METHODS | CLASS_METHODS)[name]
    with pytest.raises(RecipeError) as error:
        getattr(owner, name)("anything", of="any kind")
    assert str(error.value) == f"{name}: {why}" and why in getattr(StandIn, name).__doc__


def test_what_is_looked_up_is_lacking_where_the_class_or_an_adapter_library_has_it() -> None:
    for name in ADAPTERS:
        assert str(lacking(name, StandIn)).startswith(
            f"{name}: an engine takes no adapters; build one of the model with them: give"
        )
    assert str(lacking("chunk_size", StandIn)) == f"chunk_size: {GRAPH}"
    assert lacking("nothing_like_it", StandIn) is None and lacking("__deepcopy__", StandIn) is None
