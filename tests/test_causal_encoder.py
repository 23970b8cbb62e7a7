"""Gemma 2 and Qwen encoders go the whole way of T5's: built, proven, read by the pipelines of diffusers; and the gates
see what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from export.errors import ContractError, ModelError, RecipeError
from export.models import causal_modules, text_modules
from export.models.families import FAMILIES, WITHOUT_HEAD
from export.models.load import load as load_model
from export.models.load import sample_inputs
from pipeline import __main__ as cli
from pipeline import load
from pipeline import recipe as recipes
from pipeline.backends.cpu.native_ports import ports_in
from pipeline.backends.cpu.packed_gemm import OP, Out
from pipeline.backends.cpu.token_chain import Activation
from pipeline.calibrate import calibrate
from pipeline.generate.pipeline_classes import ENCODERS_ALONE, find_pipeline_class
from pipeline.parts import TEXT_ENCODERS
from pipeline.verify.study import study
from tests.support.quick_build import measure_little
from tests.support.tiny_text import causal, causal_folder
from tests.test_clip_encoder import Subject
from tests.test_text_encoder import GATES, OF_PICTURES

pytestmark = pytest.mark.torch
WIDTH, LONGEST = 64, 96
OUTPUTS = FAMILIES["gemma2"].outputs


@pytest.fixture(scope="module", params=["Gemma2Model", "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each class, built by the command line for both targets; its model lies beside it."""
    parent = tmp_path_factory.mktemp(kind)
    folder = causal_folder(parent, kind=kind)
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch.setattr)
        flags = ["--engine", TEXT_ENCODERS[kind], "-m", str(folder), "--target", "cpu,onnx"]
        assert cli.main(["build", *flags, "-o", str(parent / "engine")]) == 0
    return parent / "engine"


def test_its_bundle_is_proven(bundle: Path, kind: str) -> None:
    report = json.loads((bundle / "report" / "parity.json").read_text())
    names = {gate["name"] for gate in report["gates"] if gate["passed"]}
    assert names >= {f"cpu/{name}" for name in GATES}
    assert names >= {f"onnx/{name}" for name in GATES - {"gemm_exact"}}  # its products are floats
    assert report["passed"] and "quant_sqnr_db" in names and not names & OF_PICTURES
    manifest = load(bundle).manifest
    assert WITHOUT_HEAD.get(kind, kind) == FAMILIES[manifest["model"]["family"]].class_name
    assert manifest["counts"]["quantized"] == 14
    assert {row["path"] for row in manifest["targets"]["cpu"]["choices"].values()} == {"u8 x packed s4"}
    ends = [row["output"] for row in report["segments"] if row["layer"] is None and row["target"] == "cpu"]
    assert ends == list(OUTPUTS)


def test_its_feed_forward_networks_are_finished_by_their_gemms(bundle: Path, kind: str) -> None:
    nodes = list(ir.load(bundle / "cpu" / "model.onnx").graph)
    gates = [node for node in nodes if node.op_type == OP and "GATE" in ports_in(node)]
    activation = Activation.GELU if kind == "Gemma2Model" else Activation.SILU
    assert [node.attributes["activation"].as_int() for node in gates] == [activation] * 2
    assert all(node.outputs[Out.CODES].name.endswith("down_proj/quantize/codes") for node in gates)
    assert not {"Gelu", "Sigmoid"} & {node.op_type for node in nodes}


def test_its_engines_encode_prompts_of_any_length(bundle: Path) -> None:
    model, opened = load_model(str(bundle.parent / "text_encoder")), load(bundle)
    cpu, portable = opened.engine("cpu"), opened.engine("onnx")
    try:
        for count, tokens in ((1, 1), (2, 9), (3, LONGEST)):
            inputs = sample_inputs(model, count, 1, tokens=tokens)
            counted = inputs["attention_mask"].astype(bool)
            outputs, others = (engine.run(inputs) for engine in (cpu, portable))
            for name in OUTPUTS:
                assert outputs[name].shape == (count, tokens, WIDTH)
                error = np.linalg.norm((outputs[name] - others[name])[counted]) / np.linalg.norm(others[name][counted])
                assert error < 0.05, name  # flipped codes
    finally:
        cpu.close()
        portable.close()


def test_it_is_near_to_transformers_own(bundle: Path, kind: str) -> None:
    """No nearer than its formats: the budget of the recipe for what quantization costs."""
    inputs, engine = sample_inputs(load_model(str(bundle.parent / "text_encoder")), 4, 5), load(bundle).engine("cpu")
    with torch.no_grad():
        own = causal(kind=kind)(**{k: torch.from_numpy(v) for k, v in inputs.items()}, output_hidden_states=True)
    counted, outputs = inputs["attention_mask"].astype(bool), engine.run(inputs)
    engine.close()
    for place, name in FAMILIES["gemma2"].hidden_states.items():
        expected = own.hidden_states[place].numpy()[counted]
        assert np.linalg.norm(outputs[name][counted] - expected) < 10 ** (-10 / 20) * np.linalg.norm(expected), name


def test_what_it_does_not_take_is_refused(bundle: Path) -> None:
    engine, ids = load(bundle).engine("cpu"), np.full((1, LONGEST + 4), 5)
    try:
        with pytest.raises((RecipeError, ContractError), match="no more tokens than"):
            engine.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        with pytest.raises(RecipeError, match="give numbers that the model knows"):
            engine.run({"input_ids": ids[:, :3] + 123, "attention_mask": np.ones((1, 3), np.int64)})
        with pytest.raises((RecipeError, ContractError), match="pixel_values"):
            pictures = np.zeros((1, 3, 8, 8), np.float32)
            engine.run({"input_ids": ids[:, :3], "attention_mask": np.ones((1, 3), np.int64), "pixel_values": pictures})
    finally:
        engine.close()


def test_it_is_verified_again_looked_into_and_measured(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_little(monkeypatch.setattr)
    for verb in ("verify", "inspect", "bench"):
        assert cli.main([verb, str(bundle)]) == 0, capsys.readouterr().out
    assert "picture of" not in capsys.readouterr().out


# --- in the pipelines of diffusers ----------------------------------------------------------------------------------


class Words:
    """A tokenizer of a pipeline: characters are tokens, padded to the length that is asked for."""

    def __call__(self, prompt: Any, max_length: int = 0, **options: object) -> SimpleNamespace:
        texts = [prompt] if isinstance(prompt, str) else prompt
        tokens = min(max(map(len, texts)), max_length) if options.get("padding") != "max_length" else max_length
        ids, mask = (
            torch.zeros(len(texts), tokens, dtype=torch.int64),
            torch.zeros(len(texts), tokens, dtype=torch.int64),
        )
        for row, text in enumerate(texts):
            values = [ord(letter) % 128 for letter in text][:tokens]
            ids[row, : len(values)], mask[row, : len(values)] = torch.tensor(values), 1
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
        return messages[0]["content"]


# Class -> its own function that encodes prompts, called on a pipeline of nothing but an encoder and a tokenizer.
ENCODING: dict[str, Callable[[Any, list[str]], list[Tensor]]] = {
    "SanaPipeline": lambda pipe, texts: _rows(
        *diffusers.SanaPipeline._get_gemma_prompt_embeds(
            pipe, texts, torch.device("cpu"), torch.float32, max_sequence_length=20
        )
    ),
    "Lumina2Pipeline": lambda pipe, texts: _rows(
        *diffusers.Lumina2Pipeline._get_gemma_prompt_embeds(pipe, texts, torch.device("cpu"), 20)
    ),
    "ZImagePipeline": lambda pipe, texts: diffusers.ZImagePipeline._encode_prompt(
        pipe, list(texts), torch.device("cpu"), max_sequence_length=20
    ),
}


def _rows(states: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[counted.bool()] for row, counted in zip(states, mask, strict=True)]


def test_diffusers_reads_the_output_that_the_table_says(bundle: Path, kind: str) -> None:
    texts, encoder, tokenizer = ["a red fox", "two circles on sky"], load(bundle).as_text_encoder("cpu"), Words()
    pipe = SimpleNamespace(
        text_encoder=encoder, tokenizer=tokenizer, transformer=None, _text_preprocessing=lambda prompt, **_: prompt
    )
    given = tokenizer(texts, max_length=20, padding="max_length")
    outputs = encoder.engine.run({key: value.numpy() for key, value in vars(given).items()})
    names = [name for name in ENCODING if ENCODERS_ALONE[name].recipe == TEXT_ENCODERS[kind]]
    for name in names:
        expected = _rows(torch.from_numpy(outputs[ENCODERS_ALONE[name].output]), given.attention_mask)
        for actual, states in zip(ENCODING[name](pipe, texts), expected, strict=True):
            assert torch.equal(actual, states), name
    assert names
    encoder.engine.close()


@pytest.mark.fast
@pytest.mark.parametrize("name", ENCODERS_ALONE)
def test_of_a_pipeline_that_is_not_built_whole_the_encoder_is_named(name: str) -> None:
    row = ENCODERS_ALONE[name]
    words = f"'{name}' is not built whole, as its denoiser is not supported; .*--engine {row.recipe} .* {row.output}"
    with pytest.raises(ModelError, match=words):
        find_pipeline_class(name, "model_index.json")
    assert row.output in OUTPUTS and row.recipe in TEXT_ENCODERS.values() and hasattr(diffusers, name)


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """By class."""
    made = {}
    for kind in ("Gemma2Model", "Qwen3Model"):
        folder = tmp_path_factory.mktemp("faults")
        model, recipe = load_model(str(causal_folder(folder, kind=kind))), recipes.load(TEXT_ENCODERS[kind])
        layers = calibrate(model, recipe, folder / "calibrate")
        made[kind] = Subject(model, recipe, layers, study(model, layers, recipe), folder)
    return made


def one_more_key(tokens: int, like: Tensor, window: int | None = None) -> Tensor:
    return CAUSAL_BIAS(tokens + 1, like, window)[:, :, 1:, :-1] * 1


def one_key_less_in_the_window(tokens: int, like: Tensor, window: int | None = None) -> Tensor:
    return CAUSAL_BIAS(tokens, like, window and window - 1)


def turned_the_other_way(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    return TURNED(heads, (rotary[0], -rotary[1]))


def neighbours_turned(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """In pairs of channels (2 i, 2 i + 1), as other models have them."""
    first, second = heads[..., ::2], heads[..., 1::2]
    cosines, sines = rotary
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def last_for_penultimate(*inputs: Any) -> tuple[Tensor, ...]:
    last, _ = ENCODE(*inputs)
    return last, last + 0


def keys_of_another_head(self: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return MIXED(self, query, key.flip(1), value.flip(1), bias)


def scores_too_large(self: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return MIXED(self, query * 1.01, key, value, bias)


def no_cap(self: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)


def no_norm_of_heads(self: Any, x: Tensor) -> Tensor:
    return x if x.ndim == 4 else NORM(self, x)


CAUSAL_BIAS, TURNED, ENCODE = causal_modules.causal_bias, causal_modules.turned, causal_modules.encode
ATTENTION, MIXED = causal_modules.GroupedAttention, causal_modules.GroupedAttention._mixed
NORM = text_modules.RootMeanSquareNorm.forward
# Of a class: in the place of what, the fault.
FAULTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "a causal mask that lets one more token through": ("Gemma2Model", causal_modules, "causal_bias", one_more_key),
    "a window that is one too short": ("Gemma2Model", causal_modules, "causal_bias", one_key_less_in_the_window),
    "no window": ("Gemma2Model", causal_modules, "windows", lambda config: [None] * config.num_hidden_layers),
    "no mask of padding": (
        "Gemma2Model", causal_modules, "padding_bias", lambda mask, dtype: mask[:, None, None, :].to(dtype) * 0
    ),
    "positions turned the other way": ("Gemma2Model", causal_modules, "turned", turned_the_other_way),
    "a norm by its weight alone": ("Gemma2Model", causal_modules.OffsetNorm, "forward", NORM),
    "scores without their cap": ("Gemma2Model", ATTENTION, "_mixed", no_cap),
    "scores that are too large": ("Gemma2Model", ATTENTION, "_mixed", scores_too_large),
    "keys of another head": ("Qwen3Model", ATTENTION, "_mixed", keys_of_another_head),
    "positions of neighbouring channels": ("Qwen3Model", causal_modules, "turned", neighbours_turned),
    "no norms of queries and keys": ("Qwen3Model", text_modules.RootMeanSquareNorm, "forward", no_norm_of_heads),
    "the last hidden state for the penultimate": ("Qwen3Model", causal_modules, "encode", last_for_penultimate),
}  # fmt: skip
# Seen by the stretches between linears alone: a prompt's tokens never see what stands behind them, and a hundredth of
# a score is less than what codes that flip make.
OF_SEGMENTS = {"no mask of padding", "scores that are too large"}


@pytest.mark.parametrize("kind", ["Gemma2Model", "Qwen3Model"])
def test_a_right_engine_passes(subjects: dict[str, Subject], kind: str) -> None:
    assert not subjects[kind].failures()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(subjects: dict[str, Subject], fault: str) -> None:
    kind, *change = FAULTS[fault]
    assert subjects[kind].failures(*change) >= ({"segments"} if fault in OF_SEGMENTS else {"segments", "calls"})
