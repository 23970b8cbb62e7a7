"""The pages of docs/: links and paths lead somewhere, and adding something takes the files that adding.md names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import readme
from export.dialect.reference import quantize_activation
from export.formats.format import FORMATS, Format, decode, encode, get_format
from export.formats.operands import embeds
from pipeline import recipe as recipes
from pipeline.backends import BACKENDS
from tests.support.portable import portable, random_linear, run

PAGES = [readme.README, *sorted(readme.DOCS.glob("*.md"))]
ADDING = (readme.DOCS / "adding.md").read_text(encoding="utf-8")
# How many files of the source each thing takes at most.
COUNTS = {
    "A number format": 1,
    "A model family": 2,
    "A calibration method": 2,
    "A pass": 2,
    "A target": 2,  # its folder and its row
    "An op of the dialect": 3,
    "A GPU kernel": 4,
    "An epilogue of the GPU GEMM": 5,
}
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", ADDING, re.MULTILINE))

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@by_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), f"{page.name} links {target}"
        assert not anchor or anchor in anchors(place), f"{page.name} links {target}, {place.name} has no such heading"


@by_page
def test_paths_in_the_text_exist(page: Path) -> None:
    """Names in capitals stand for others, and those that end in "_*" for several."""
    first = "|".join(["tests", ".ci", *readme.PACKAGES])
    for path in re.findall(rf"`((?:{first})/[^`\s]*)`", page.read_text(encoding="utf-8")):
        pattern = re.sub(r"\b[A-Z]{2,}\b|(?<=_)NAME", "*", path).rstrip("/")
        assert list(readme.ROOT.glob(pattern)) or "NAME" in path, f"{page.name} names {path}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_every_module_and_folder_says_what_it_is() -> None:
    paths = [path for package in readme.PACKAGES for path in (readme.ROOT / package).rglob("*.py")]
    assert [str(path) for path in paths if not readme.first_sentence(path)] == []


# --- adding.md ------------------------------------------------------------------------------------------------------


def test_adding_names_every_kind_of_thing() -> None:
    assert list(SECTIONS) == list(COUNTS)


@pytest.mark.parametrize("thing", COUNTS)
def test_adding_takes_no_more_files_than_it_should_and_has_a_test(thing: str) -> None:
    files = re.findall(r"^(\d+)\. ", SECTIONS[thing], re.MULTILINE)
    assert [int(number) for number in files] == list(range(1, COUNTS[thing] + 1))
    assert re.search(r"^Test: .*tests/", SECTIONS[thing], re.MULTILINE)


def test_a_format_is_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A format that nobody has heard of, added to the table alone: codec, embedding, portable graph, CPU engine."""
    monkeypatch.setitem(FORMATS, "E1M4", Format("E1M4", 1, 1, 4))
    fmt = get_format("E1M4")
    np.testing.assert_array_equal(decode(fmt, encode(fmt, fmt.values)), fmt.values)
    assert embeds("E1M4", "INT8") and fmt.kmax == 31
    layer = random_linear(weight="E2M1", activation="E1M4")
    model = portable('y = fpq.QuantizedLinear <layer="a"> (x)', [layer])
    x = np.random.default_rng(0).standard_normal((1, 5, 64)).astype(np.float32)
    codes, scale = quantize_activation(x, format="E1M4")
    weight = decode(get_format("E2M1"), layer.unpacked_codes()) * layer.scales
    exact = (decode(fmt, codes) * scale) @ weight.T + layer.bias
    # Sums of 64 products in float32, and a rounding for each of scale, scale and bias.
    bound = 2.0**-24 * (64 + 3) * (np.abs(decode(fmt, codes) * scale) @ np.abs(weight.T) + np.abs(layer.bias))
    assert (np.abs(run(model, {"x": x})[0] - exact) <= bound).all()
    ir.save(model, tmp_path / "model.onnx")
    recipe = recipes.with_settings(recipes.load("pixart_w4a6"), ["formats.activation=E1M4", "cpu.path=stock"])
    (tmp_path / "cpu").mkdir()
    lowered = BACKENDS["cpu"].lower(tmp_path / "model.onnx", tmp_path / "cpu", recipe)
    assert [choice.path for choice in lowered.choices] == ["u8 x s8"]
    assert (np.abs(run(ir.load(lowered.path), {"x": x})[0] - exact) <= bound).all()
