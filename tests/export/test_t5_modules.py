"""The T5 encoder that is exported computes what transformers' own does, at every length and under every mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from export import to_onnx
from export.errors import ModelError, RecipeError
from export.models import load as loading
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from export.models.t5_modules import RelativeAttention
from pipeline.backends.reference import ReferenceEngine, fake_quant
from tests.support import tiny
from tests.support.tiny_text import change_config, t5, t5_folder

pytestmark = pytest.mark.torch
LONG = 300  # beyond relative_attention_max_distance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_folder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load(str(folder))


def encoded(model: LoadedModel, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    with torch.no_grad():
        output: NDArray[np.float32] = denoiser(model)(**{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()
    return output


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
def test_it_is_transformers_own(tmp_path: Path, kind: str, projection: str) -> None:
    own = t5(kind=kind, feed_forward_proj=projection)
    model = load(str(t5_folder(tmp_path, kind=kind, feed_forward_proj=projection)))
    assert model.family.name == kind.lower()
    for tokens in (1, 2, 7, 120, LONG):
        inputs = sample_inputs(model, 3, 0, tokens=tokens)
        with torch.no_grad():
            expected = own(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state.numpy()
        counted = inputs["attention_mask"].astype(bool)
        np.testing.assert_allclose(encoded(model, inputs)[counted], expected[counted], atol=1e-5)


def test_the_position_bias_is_a_table_by_distance(model: LoadedModel) -> None:
    attention = model.module.get_submodule("encoder.block.0.layer.0.SelfAttention")
    assert isinstance(attention, RelativeAttention)
    bias, own = (part.encoder.block[0].layer[0].SelfAttention for part in (model.module, t5()))
    expected = own.compute_bias(LONG, LONG)
    assert torch.equal(bias.position_bias(LONG, torch.device("cpu")), expected)
    assert not torch.equal(expected[..., 0, 1], expected[..., 1, 0])


def test_padding_is_read_by_no_token(model: LoadedModel) -> None:
    inputs = sample_inputs(model, 4, 0, tokens=20)
    inputs["attention_mask"] = (np.arange(20) < np.array([[8], [20], [1], [12]])).astype(np.int64)
    counted = inputs["attention_mask"].astype(bool)
    other = {**inputs, "input_ids": np.where(counted, inputs["input_ids"], 5)}
    np.testing.assert_array_equal(encoded(model, inputs)[counted], encoded(model, other)[counted])
    first = {name: value[:1, :8] for name, value in inputs.items()}  # the same prompt without any padding
    np.testing.assert_allclose(encoded(model, inputs)[:1, :8], encoded(model, first), atol=1e-5)


@pytest.mark.fast
def test_its_inputs_are_ids_and_their_mask(model: LoadedModel) -> None:
    assert [(row.name, row.dtype) for row in model.inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]
    assert {ref.kind for ref in model.linears()} == {"attn.qkv", "attn.out", "ff.in", "ff.out"}
    assert [path for path, _ in model.kept()] == [
        "shared", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="is a text encoder and makes no picture"):
        model.cells(512, 512)


def test_shards_are_read(tmp_path: Path, model: LoadedModel) -> None:
    sharded = load(str(t5_folder(tmp_path, shard_size="50KB")))
    assert len(sharded.files.names) > 1
    inputs = sample_inputs(model, 2, 0)
    np.testing.assert_array_equal(encoded(sharded, inputs), encoded(model, inputs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration of transformers is not a text"),
        ({"architectures": None}, "no one name in architectures"),
        ({"is_decoder": True}, "is_decoder is True; T5EncoderModel is compiled with False alone"),
        ({"num_experts": 8}, "does not know 'num_experts': 8"),
        ({"dense_act_fn": "mish"}, "feed_forward_proj asks for mish"),
        ({"relative_attention_max_distance": 8}, "the distance must reach beyond them"),
        ({"d_ff": 256}, "config.json and the weights must belong together"),
        ({"num_layers": 1}, "layer beyond config.json's num_layers of 1"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = t5_folder(tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=words):
        load(str(folder))


def test_a_large_table_is_widened_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outputs = t5_folder(tmp_path), []
    for name, least in (("whole", 2**24), ("rows", 128 * 64)):
        monkeypatch.setattr(loading, "LARGE_ELEMENTS", least)
        model = load(str(folder))
        dtype = model.module.get_submodule("shared").weight.dtype
        assert dtype == {"whole": torch.float32, "rows": torch.float16}[name]
        inputs = sample_inputs(model, 2, 0)
        exact = ReferenceEngine(fake_quant(model, tiny.quantized(model), torch.float64), torch.float64)
        outputs += [encoded(model, inputs), exact.run(inputs)["last_hidden_state"]]
        path = tmp_path / name / "model.onnx"
        path.parent.mkdir()
        to_onnx.export_float(model, path)
        to_onnx.export_portable(model, tiny.quantized(model), path)
        session = onnxruntime.InferenceSession(path)
        outputs += session.run(["last_hidden_state"], inputs)
        stored = onnx.load(path, load_external_data=False).graph
        table = next(node for node in stored.node if "shared.weight" in node.input)
        assert table.op_type == {"whole": "Cast", "rows": "Gather"}[name]
        (rows,) = (item for item in stored.initializer if item.name == "shared.weight")
        assert rows.data_type == onnx.TensorProto.FLOAT16
    for whole, by_rows in zip(outputs[:3], outputs[3:], strict=True):
        np.testing.assert_array_equal(whole, by_rows)


def test_a_large_table_keeps_what_fp16_cannot_hold() -> None:
    table = torch.randn(3, 8)
    held = loading.half_weight(table)
    assert held is not None and torch.equal(held, table.half())
    assert loading.half_weight(table * 1e6) is None and loading.half_weight(table.bfloat16() * 1e-9) is None
    half = table.half()
    assert loading.half_weight(half) is half


@pytest.mark.parametrize("keep", [True, False])
def test_the_table_of_tokens_has_two_names(tmp_path: Path, model: LoadedModel, keep: bool) -> None:
    folder = t5_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    if not keep:
        del tensors["shared.weight"]
    save_file(tensors, folder / "model.safetensors")
    inputs, named = sample_inputs(model, 2, 0), load(str(folder))
    np.testing.assert_array_equal(encoded(named, inputs), encoded(model, inputs))
    assert dict(named.ignored) == ({"encoder.embed_tokens.weight": "the same as shared.weight"} if keep else {})
    save_file({**tensors, "shared.weight": -tensors["encoder.embed_tokens.weight"]}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"encoder\.embed_tokens\.weight.*no such tensor"):
        load(str(folder))
