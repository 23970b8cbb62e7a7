"""Number formats as properties: round trips at odd shapes, and encode is idempotent, monotone and nearest."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.formats.format import (
    FORMATS,
    Format,
    decode,
    encode,
    pack,
    packed_size,
    quantize,
    unpack,
)

formats = st.sampled_from(list(FORMATS.values()))
finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9)
# A busy machine may take long over one example, which says nothing about the property.
without_deadline = settings(deadline=None)


def near_range(fmt: Format) -> st.SearchStrategy[float]:
    """Numbers around the format's range, where rounding has something to decide."""
    return st.floats(-1.5 * fmt.max_value, 1.5 * fmt.max_value)


def representable(fmt: Format) -> np.ndarray:
    values = fmt.values[np.isfinite(fmt.values)]
    return np.unique(values)


@st.composite
def format_and_numbers(draw: st.DrawFn) -> tuple[Format, np.ndarray]:
    fmt = draw(formats)
    elements = st.one_of(near_range(fmt), finite)
    return fmt, draw(hnp.arrays(np.float64, shapes, elements=elements))


@st.composite
def codes_of_width(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.sampled_from([4, 6, 8]))
    return bits, draw(hnp.arrays(np.uint8, shapes, elements=st.integers(0, 2**bits - 1)))


@without_deadline
@given(codes_of_width())
def test_unpack_undoes_pack(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], packed_size(bits, codes.shape[-1]))
    assert (unpack(packed, bits, codes.shape[-1]) == codes).all()


@without_deadline
@given(codes_of_width())
def test_pack_undoes_unpack(case: tuple[int, np.ndarray]) -> None:
    """Packed rows whose spare bits are zero come back byte for byte."""
    bits, codes = case
    packed = pack(codes, bits)
    assert (pack(unpack(packed, bits, codes.shape[-1]), bits) == packed).all()


@without_deadline
@given(format_and_numbers())
def test_encode_is_idempotent(case: tuple[Format, np.ndarray]) -> None:
    fmt, x = case
    codes = encode(fmt, x)
    assert (encode(fmt, decode(fmt, codes)) == codes).all()
    assert codes.shape == x.shape


@without_deadline
@given(format_and_numbers())
def test_encode_is_monotone(case: tuple[Format, np.ndarray]) -> None:
    fmt, x = case
    ascending = np.sort(x, axis=None)
    assert (np.diff(decode(fmt, encode(fmt, ascending))) >= 0).all()


@without_deadline
@given(format_and_numbers())
def test_no_code_is_closer(case: tuple[Format, np.ndarray]) -> None:
    """Within the range the difference of two float64 of like size is exact enough: its rounding is monotone."""
    fmt, x = case
    grid = representable(fmt)
    inside = np.clip(x, grid[0], grid[-1]).reshape(-1, 1)
    chosen = np.abs(inside[:, 0] - decode(fmt, encode(fmt, inside[:, 0])))
    assert (chosen <= np.abs(inside - grid).min(axis=1)).all()


@without_deadline
@given(format_and_numbers())
def test_quantize_is_odd(case: tuple[Format, np.ndarray]) -> None:
    """Signed quantizers treat both signs alike; unsigned ones give zero for one of them."""
    fmt, x = case
    positive, negative = decode(fmt, quantize(fmt, x)), decode(fmt, quantize(fmt, -x))
    if fmt.sign_bits:
        assert (positive == -negative).all()
    else:
        assert (np.minimum(positive, negative) == 0).all()
