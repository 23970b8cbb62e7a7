"""A pipeline of true form with random weights: its tokenizer, its index, and what is measured of a bundle of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import record, whole_pipeline
from benchmarks.zoo.make_pipeline import INDEX, RESULT, parameters, pieces
from pipeline.parts import AUTOENCODERS, TEXT_ENCODERS

pytestmark = pytest.mark.torch


def test_its_pieces_are_distinct_and_every_letter_is_one() -> None:
    texts = [text for text, _ in pieces(500)]
    assert len(set(texts)) == len(texts) == 500 and set("azAZ09▁") < set(texts)
    assert texts == [text for text, _ in pieces(500)]


def test_its_index_is_that_of_a_pipeline_which_can_be_built() -> None:
    assert INDEX["vae"][1] in AUTOENCODERS and INDEX["text_encoder"][1] in TEXT_ENCODERS


def test_the_summary_has_a_column_for_each_part() -> None:
    row = {"picture_s": 2.5, "parts_s": {"text_encoder": 1.0, "vae_decoder": 1.5}, "peak_memory_bytes": 2_000_000}
    table = whole_pipeline.summary({"ways": {"in turn": row, "kept loaded": row}})
    assert "| in turn | 2.5 | 1.0 | 1.5 | 2 |" in table


def test_parameters_that_the_docs_name_are_those_of_the_classes() -> None:
    """T5-XXL's encoder has 4.7 B of them, of which the float32 weights alone are 19 GB."""
    counts = parameters()
    assert counts == record.read(record.RESULTS / f"{RESULT}.json")["parameters"]
    assert 4 * sum(counts.values()) > 20e9 and counts["text_encoder"] > 4.7e9


@pytest.mark.slow
def test_a_small_one_is_written_in_diffusers_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import PixArtAlphaPipeline

    from benchmarks.zoo import make_pipeline, make_t5_xxl

    monkeypatch.setattr(make_pipeline, "PIECES", 300)
    small = make_t5_xxl.config_of(1, 64, 128, 1)
    monkeypatch.setattr(make_t5_xxl, "config_of", lambda layers: small)
    make_pipeline.write(tmp_path, layers=1, text_layers=1)
    pipe = PixArtAlphaPipeline.from_pretrained(tmp_path)
    ids = pipe.tokenizer("a fox", padding="max_length", max_length=8).input_ids
    assert max(ids) < small.vocab_size and pipe.transformer.config.sample_size == 64
