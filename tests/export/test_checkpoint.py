"""The calibrated checkpoint: what a layer stands for, round trips, and one message for every broken rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoint import (
    LAYERS_FILE,
    WEIGHTS_FILE,
    QuantizedLinear,
    load,
    save,
)
from export.dialect.ops import OPS, attributes, no_multipliers
from export.errors import ContractError, RecipeError
from export.formats.format import decode, encode, get_format
from export.formats.operands import exact_multipliers
from tests.support import learned
from tests.support.portable import make_linear

N, K, GROUP = 6, 24, 8


def layer(weight_format: str = "E2M1", granularity: str = "exact_group", bias: bool = True, seed: int = 0) -> Any:
    """A small layer with random codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2 ** get_format(weight_format).bits, (N, K)).astype(np.uint8)
    columns = K // GROUP if granularity == "group" else 1
    allowed = exact_multipliers(weight_format, ("INT8",))
    multipliers = rng.choice(allowed, (N, K // GROUP)).astype(np.uint8) if granularity == "exact_group" else None
    return make_linear(
        codes,
        weight_format=weight_format,
        name=f"blocks.{seed}.to_q",
        kind="attn.qkv",
        activation_format="E2M3",
        granularity=granularity,
        group_size=0 if granularity == "per_channel" else GROUP,
        scales=rng.uniform(0.1, 1, (N, columns)).astype(np.float32),
        multipliers=multipliers,
        bias=rng.normal(size=N).astype(np.float32) if bias else None,
    )


CASES = [
    ("E2M1", "exact_group"),
    ("E1M2", "exact_group"),
    ("E3M0", "per_channel"),
    ("E2M1", "group"),
    ("INT6", "exact_group"),
    ("E2M3", "group"),
    ("INT8", "per_channel"),
]


# --- what a layer stands for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight_format", "granularity"), CASES)
def test_dequantized_and_image_follow_the_definition(weight_format: str, granularity: str) -> None:
    """W[n, k] = value(code) * multiplier * scale, and image = value * multiplier * 2^f, element by element."""
    one = layer(weight_format, granularity)
    fmt, codes = get_format(weight_format), one.unpacked_codes()
    image, value = one.integers(), one.dequantized()
    for n in range(N):
        for k in range(K):
            g = k // GROUP
            multiplier = 1 if one.multipliers is None else int(one.multipliers[n, g])
            scale = float(one.scales[n, g if granularity == "group" else 0])
            assert value[n, k] == decode(fmt, codes[n, k]) * multiplier * scale
            assert image[n, k] == decode(fmt, codes[n, k]) * multiplier * 2**fmt.fraction_bits
    assert image.dtype in (np.int8, np.int16) and value.dtype == np.float64
    assert (np.abs(image) == np.abs(image.astype(np.int64))).all(), "magnitudes fit, too"


@pytest.mark.parametrize(("weight_format", "granularity"), CASES)
def test_the_op_gives_the_same_weight(weight_format: str, granularity: str) -> None:
    """DequantizeWeight of the stored arrays is `dequantized()` rounded to float32 once."""
    one = layer(weight_format, granularity)
    table = exact_multipliers(weight_format, ("INT8",))[:16] if granularity == "exact_group" else (1,)
    choices = {"format": weight_format, "in_features": K, "group_size": one.group_size, "multipliers": table}
    indices = no_multipliers(K, one.group_size)
    if one.multipliers is not None:
        keep = np.isin(one.multipliers, table)
        one = replace(one, multipliers=np.where(keep, one.multipliers, 1).astype(np.uint8))
        multiplier_codes = np.searchsorted(table, one.multipliers).astype(np.uint8)
        padded = np.pad(multiplier_codes, [(0, 0), (0, multiplier_codes.shape[1] % 2)])
        indices = padded[:, 0::2] | padded[:, 1::2] << 4
    (w,) = OPS["DequantizeWeight"].numpy(one.codes, one.scales, indices, **attributes("DequantizeWeight", **choices))
    np.testing.assert_array_equal(w.T, one.dequantized().astype(np.float32))


def test_image_of_codes_in_any_memory_order() -> None:
    codes = np.asfortranarray(np.arange(N * K).reshape(N, K) % 100).astype(np.uint8, order="K")
    fields = {"name": "l", "kind": "other", "activation_format": "INT8", "granularity": "exact_group"}
    scales, multipliers = np.full((N, 1), 2, np.float32), np.ones((N, K // GROUP), np.uint8)
    one = make_linear(
        codes, weight_format="INT8", group_size=GROUP, scales=scales, multipliers=multipliers, bias=None, **fields
    )
    assert (one.integers() == codes).all()
    assert (one.dequantized() == 2.0 * codes).all()


def test_the_image_of_a_wide_format_does_not_wrap() -> None:
    fmt = get_format("E5M2")
    largest = encode(fmt, np.array([[fmt.max_value, -fmt.max_value]]))
    choices = {"kind": "ff.in", "activation_format": "E5M2", "granularity": "per_channel", "group_size": 0}
    one = make_linear(largest, name="wide", weight_format="E5M2", scales=np.ones((1, 1), np.float32), **choices)
    assert one.integers().tolist() == [[fmt.kmax, -fmt.kmax]] and fmt.kmax > np.iinfo(np.int32).max


def test_integer_image_stays_within_int8() -> None:
    """Codes that a symmetric quantizer emits, with any allowed multiplier."""
    for weight_format in ("E2M1", "E1M2", "E3M0", "INT4", "INT6", "INT8", "E2M3"):
        one = layer(weight_format)
        kmax = get_format(weight_format).kmax * max(exact_multipliers(weight_format, ("INT8",)))
        within = np.abs(decode(get_format(weight_format), one.unpacked_codes())) <= get_format(weight_format).max_value
        assert np.abs(one.integers()[within]).max() <= kmax <= 127


def test_sizes() -> None:
    one = layer("E2M1", "exact_group")
    assert (one.out_features, one.in_features, one.groups) == (N, K, 3)
    assert one.size_bytes == N * K // 2 + N * 4 + N * 2  # 3 multipliers of 4 bits take 2 bytes
    assert layer("E3M0", "per_channel").size_bytes == N * K // 2 + N * 4
    ones = np.ones(K, np.float32)
    assert replace(one, input_multiplier=ones).size_bytes == one.size_bytes + 4 * K
    assert replace(one, input_multiplier=ones, input_offset=ones).size_bytes == one.size_bytes + 8 * K


# --- round trip ----------------------------------------------------------------------------------------------------


def assert_equal(a: QuantizedLinear, b: QuantizedLinear) -> None:
    for name in a.__dataclass_fields__:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        np.testing.assert_array_equal(left, right, err_msg=name)


def test_round_trip(tmp_path: Path) -> None:
    layers = [layer(*case, bias=i % 2 == 0, seed=i) for i, case in enumerate(CASES)]
    save(layers, tmp_path / "new" / "folder")
    back = load(tmp_path / "new" / "folder")
    assert [one.name for one in back] == [one.name for one in layers]
    for one, other in zip(layers, back, strict=True):
        assert_equal(one, other)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [LAYERS_FILE, WEIGHTS_FILE]


def learned_layers() -> list[QuantizedLinear]:
    """One layer for each thing that a method may learn, and one with everything."""
    of = learned.router()
    balanced = [learned.with_balance(layer(seed=3)), learned.with_balance(layer(seed=4), offset=False)]
    scaled = [learned.with_scaling(layer(seed=i), name) for i, name in enumerate(("per_tensor", "zero", "token_group"))]
    every = learned.with_low_rank(learned.with_balance(learned.with_scaling(layer(seed=6), "zero")), of)
    low_rank = [learned.with_low_rank(layer(seed=5, bias=False), of), learned.with_low_rank(layer(seed=8), None)]
    return [*scaled, *balanced, *low_rank, every, layer(seed=7)]


def test_round_trip_of_what_methods_learn(tmp_path: Path) -> None:
    layers = learned_layers()
    save(layers, tmp_path / "a")
    back = load(tmp_path / "a")
    for one, other in zip(layers, back, strict=True):
        assert_equal(one, other)
    assert len({id(one.router) for one in back}) == 2  # one object for all, and None
    save(back, tmp_path / "b")
    for name in (LAYERS_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_layers_saved_one_by_one_share_a_router_again(tmp_path: Path) -> None:
    """Calibration keeps each finished layer in a folder of its own."""
    for i, one in enumerate(learned_layers()):
        save([one], tmp_path / str(i))
    apart = [one for i in range(len(learned_layers())) for one in load(tmp_path / str(i))]
    save(apart, tmp_path / "joined")
    assert len({id(one.router) for one in load(tmp_path / "joined")} - {id(None)}) == 1


def test_two_routers_are_refused(tmp_path: Path) -> None:
    pair = [learned.with_low_rank(layer(seed=i), learned.router(i)) for i in range(2)]
    with pytest.raises(ContractError, match=r"blocks.0.to_q and blocks.1.to_q have different routers"):
        save(pair, tmp_path)


def test_bytes_of_branches_count_as_they_are_stored() -> None:
    plain, of = layer(), learned.router()
    numbers = learned.BRANCHES * learned.RANK * (N + K)
    assert learned.with_low_rank(plain, of, half=True).size_bytes == plain.size_bytes + 2 * numbers
    assert learned.with_low_rank(plain, of).size_bytes == plain.size_bytes + 4 * numbers


def test_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    layers = [layer(*case, seed=i) for i, case in enumerate(CASES)]
    save(layers, tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    for name in (LAYERS_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saving_again_replaces(tmp_path: Path) -> None:
    save([layer(seed=1), layer(seed=2)], tmp_path)
    save([layer("INT8", "per_channel", seed=3)], tmp_path)
    (one,) = load(tmp_path)
    assert_equal(one, layer("INT8", "per_channel", seed=3))


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old rows with new weights must never be read together."""
    save([layer(seed=1)], tmp_path)
    monkeypatch.setattr("export.checkpoint.json.dumps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save([layer(seed=2)], tmp_path)
    with pytest.raises(ContractError, match=f"{LAYERS_FILE} is missing"):
        load(tmp_path)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# --- broken rules --------------------------------------------------------------------------------------------------

GOOD = layer()
RULES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "granularity": ({"granularity": "per_token"}, ContractError, r"blocks.0.to_q: granularity 'per_token'; use one of"),
    "group does not divide": (
        {"group_size": 7},
        ContractError,
        "K=24 is not a multiple of group_size 7; use a divisor",
    ),
    "no group size": ({"group_size": 0}, ContractError, "K=24 is not a multiple of group_size 0"),
    "flat codes": (
        {"codes": GOOD.codes.ravel()},
        ContractError,
        r"codes have shape \(72,\); expected \[N, packed bytes\]",
    ),
    "wide codes": (
        {"codes": np.zeros((N, 13), np.uint8)},
        ContractError,
        r"codes are uint8 \(6, 13\); E2M1 exact_group with K=24 needs uint8 \(6, 12\)",
    ),
    "other weight format": ({"weight_format": "E2M3"}, ContractError, r"codes are uint8 \(6, 12\); E2M3 .* \(6, 18\)"),
    "signed codes": ({"codes": GOOD.codes.astype(np.int8)}, ContractError, "codes are int8 .* needs uint8"),
    "scales per group": (
        {"scales": np.ones((N, 3), np.float32)},
        ContractError,
        r"scales are float32 \(6, 3\); E2M1 exact_group with K=24 needs float32 \(6, 1\)",
    ),
    "wide scales": ({"scales": GOOD.scales.astype(np.float64)}, ContractError, "scales are float64 .* needs float32"),
    "NaN scale": (
        {"scales": np.full((N, 1), np.nan, np.float32)},
        ContractError,
        "a weight scale is NaN or Inf; the float weight is broken",
    ),
    "Inf scale": ({"scales": np.full((N, 1), np.inf, np.float32)}, ContractError, "a weight scale is NaN or Inf"),
    "zero scale": ({"scales": np.zeros((N, 1), np.float32)}, ContractError, "a weight scale is 0 and must be above 0"),
    "negative scale": (
        {"scales": -GOOD.scales},
        ContractError,
        r"a weight scale is -[\d.]+ and must be above 0; calibrate again",
    ),
    "NaN bias": ({"bias": np.full(N, np.nan, np.float32)}, ContractError, "the bias holds NaN or Inf; the float model"),
    "no multipliers": (
        {"multipliers": None},
        ContractError,
        "exact_group without multipliers; they go with exact_group only",
    ),
    "multipliers elsewhere": (
        {"granularity": "per_channel"},
        ContractError,
        "per_channel with multipliers; they go with",
    ),
    "multipliers of other groups": (
        {"multipliers": np.ones((N, 4), np.uint8)},
        ContractError,
        r"multipliers are uint8 \(6, 4\); .* needs uint8 \(6, 3\)",
    ),
    "inexact multiplier": (
        {"multipliers": np.full((N, 3), 11, np.uint8)},
        ContractError,
        r"multipliers \[11\] would not be exact; E2M1 allows \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10\)",
    ),
    "zero multiplier": (
        {"multipliers": np.zeros((N, 3), np.uint8)},
        ContractError,
        r"multipliers \[0\] would not be exact",
    ),
    "bias of another layer": ({"bias": np.zeros(5, np.float32)}, ContractError, r"bias are float32 \(5,\); .* \(6,\)"),
    "unknown weight format": ({"weight_format": "E9M9"}, RecipeError, "number format 'E9M9' is unknown"),
    "unknown activation format": ({"activation_format": "FP5"}, RecipeError, "number format 'FP5' is unknown"),
}

STATIC = learned.with_scaling(GOOD, "per_tensor")
ZERO = learned.with_scaling(GOOD, "zero")
GROUPED = learned.with_scaling(GOOD, "token_group")
ROUTED = learned.with_low_rank(GOOD, learned.router())
ONE = np.ones(1, np.float32)
LEARNED_RULES: dict[str, tuple[QuantizedLinear, dict[str, Any], str]] = {
    "unknown scaling": (GOOD, {"activation_scaling": "per_row"}, r"blocks.0.to_q: activation_scaling 'per_row'; use"),
    "group of a token": (GOOD, {"activation_group": 8}, "per_token with activation_group 8; it goes with token_group"),
    "group does not divide": (GROUPED, {"activation_group": 5}, "K=24 is not a multiple of activation_group 5; use a"),
    "no group": (GROUPED, {"activation_group": 0}, "K=24 is not a multiple of activation_group 0"),
    "unsigned groups": (GROUPED, {"activation_format": "UE2M2"}, "token_group with the unsigned format UE2M2; a zero"),
    "no scale": (STATIC, {"activation_scale": None}, "per_tensor without activation_scale; per_tensor needs one"),
    "scale elsewhere": (GOOD, {"activation_scale": ONE}, "per_token with activation_scale; per_tensor needs one"),
    "scale of two": (
        STATIC,
        {"activation_scale": np.ones(2, np.float32)},
        r"activation_scale is float32 \(2,\); it mu",
    ),
    "scale of zero": (STATIC, {"activation_scale": 0 * ONE}, "activation_scale 0 is not above 0; calibrate with data"),
    "NaN scale": (STATIC, {"activation_scale": np.nan * ONE}, "activation_scale has NaN or Inf"),
    "signed with zero": (STATIC, {"activation_zero": -ONE}, "per_tensor E2M3 with activation_zero; a zero goes with"),
    "token with zero": (GOOD, {"activation_zero": -ONE}, "per_token E2M3 with activation_zero; a zero goes with"),
    "unsigned without": (ZERO, {"activation_zero": None}, "per_tensor UE2M2 without activation_zero; a zero goes with"),
    "wide zero": (
        ZERO,
        {"activation_zero": np.zeros(1)},
        r"activation_zero is float64 \(1,\); it must be float32 \(1,",
    ),
    "short multiplier": (GOOD, {"input_multiplier": ONE}, r"input_multiplier is float32 \(1,\); it must be .* \(24,\)"),
    "Inf offset": (GOOD, {"input_offset": np.full(K, np.inf, np.float32)}, "input_offset has NaN or Inf; calibrate"),
    "half a branch": (ROUTED, {"lora_up": None}, "lora_up is missing; low-rank branches need lora_down and"),
    "no branch": (ROUTED, {"lora_down": None, "lora_up": None}, "lora_down is missing; low-rank branches need"),
    "no router": (ROUTED, {"router": None}, r"has shape \(3, 2, 24\) and there is no router; only one branch"),
    "other branches": (
        ROUTED,
        {"router": learned.router(branches=2)},
        r"lora_down is float32 \(3, 2, 24\); .* \(2, 2, 24",
    ),
    "flat branch": (ROUTED, {"lora_down": np.zeros((3, 24), np.float32)}, r"lora_down is float32 \(3, 24\)"),
    "other rank": (
        ROUTED,
        {"lora_up": np.zeros((3, N, 4), np.float32)},
        r"lora_up is float32 \(3, 6, 4\); .* \(3, 6, 2\)",
    ),
}


@pytest.mark.parametrize("rule", LEARNED_RULES)
def test_broken_rule_of_what_methods_learn(rule: str) -> None:
    start, changes, message = LEARNED_RULES[rule]
    with pytest.raises(ContractError, match=message):
        replace(start, **changes)


@pytest.mark.parametrize("rule", RULES)
def test_broken_rule(rule: str) -> None:
    changes, error, message = RULES[rule]
    with pytest.raises(error, match=message):
        replace(GOOD, **changes)


@pytest.mark.parametrize(("weight_format", "code"), [("E4M3", 0x7F), ("E5M2", 0xFC)])
def test_special_code_in_a_weight(weight_format: str, code: int) -> None:
    codes = np.zeros((N, K), np.uint8)
    fields = {"name": "l", "kind": "other", "activation_format": "E4M3", "granularity": "per_channel", "group_size": 0}
    scales = np.ones((N, 1), np.float32)
    assert (make_linear(codes, weight_format=weight_format, scales=scales, **fields).dequantized() == 0).all()
    codes[3, 5] = code
    with pytest.raises(ContractError, match=f"l: a {weight_format} code is NaN or Inf; the float weight is broken"):
        make_linear(codes, weight_format=weight_format, scales=scales, **fields)
