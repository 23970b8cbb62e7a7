"""Export of every family: equal to torch in onnxruntime, layer by layer exact, dynamic where promised, reproducible."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from export import checkpoint, to_onnx
from export.checkpoint import QuantizedLinear
from export.dialect.ops import attributes
from export.dialect.reference import dequantize_activation, quantize_activation
from export.errors import ContractError, ModelError
from export.models.families import FAMILIES, Input
from export.models.load import LoadedModel, denoiser, load, sample_inputs
from export.models.torch_modules import with_modules
from export.portable import read_layers
from export.quantize_graph import multiplier_table, quantize_graph
from export.to_onnx import ExportSummary, export_float, export_portable
from export.trace import trace
from tests.support import hub, tiny

pytestmark = pytest.mark.torch

NAMES = ("pixart", "pixart_sigma", "dit", "hunyuan", "unknown")
# Sigma's own size is 1024 pixels; a small profile keeps the test small and covers a second resolution.
PROFILE = {"pixart_sigma": (64, 96)}
# The float export alone has a second resolution: tracing takes seconds, and the portable model is that of its own size.
FLOAT_PROFILE = PROFILE | {"hunyuan": (48, 96)}
# Two float32 runs of a quantized model differ: a last-place difference flips the rounding of single activations by one
# step of their grid, and later layers amplify it (most in HunyuanDiT, 0.13 here). That layers are right is shown one by
# one and exactly; end to end the two runs must agree four times better than quantization changes the output.
FLIPS = 0.25


@dataclass
class Exported:
    """One tiny model with its float and portable exports."""

    model: LoadedModel
    layers: list[QuantizedLinear]
    float_path: Path
    portable_path: Path
    summary: ExportSummary
    size: tuple[int, int]

    def inputs(self, batch_size: int, tokens: int, seed: int = 1) -> dict[str, Any]:
        return sample_inputs(self.model, batch_size, seed, *self.size, tokens=tokens)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root, exports = tmp_path_factory.mktemp("export"), {}

    def get(name: str) -> Exported:
        if name not in exports:
            model, size = load(str(tiny.folder(name, root))), PROFILE.get(name, (0, 0))
            layers = tiny.quantized(model)
            paths = root / name / "float.onnx", root / name / "model.onnx"
            export_float(model, paths[0], *FLOAT_PROFILE.get(name, size))
            exports[name] = Exported(model, layers, *paths, export_portable(model, layers, paths[1], *size), size)
        return exports[name]

    return get


def session(path: Path, outputs: dict[str, ir.DataType] | None = None) -> ort.InferenceSession:
    """A session; `outputs` (value names) are added to the model's own, through a copy beside it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if outputs:
        model = onnx.load(path, load_external_data=False)
        rows = [onnx.helper.make_tensor_value_info(name, int(kind), None) for name, kind in outputs.items()]
        model.graph.output.extend(rows)
        path = path.with_name("probed.onnx")
        onnx.save(model, path)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def torch_output(model: LoadedModel, inputs: dict[str, Any], replacements: dict | None = None) -> Any:
    with torch.inference_mode():
        return denoiser(model, replacements)(**{key: torch.from_numpy(value) for key, value in inputs.items()}).numpy()


def float_limit(expected: Any, nodes: int) -> float:
    """Each op rounds to half a unit in the last place of float32; errors of all ops at worst add up."""
    return nodes * 2**-24 * float(np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 1), (3, 11)])
def test_float_export_equals_torch_at_any_batch_and_caption_length(exported, name, batch_size, tokens):
    case, size = exported(name), FLOAT_PROFILE.get(name, (0, 0))
    inputs = sample_inputs(case.model, batch_size, 1, *size, tokens=tokens)
    expected = torch_output(case.model, inputs)
    output = session(case.float_path).run(["sample"], inputs)[0]
    nodes = len(onnx.load(case.float_path, load_external_data=False).graph.node)
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() <= float_limit(expected, nodes)


@pytest.mark.parametrize("name", NAMES)
def test_every_quantized_layer_is_what_its_codes_say(exported, name):
    """On the tensor each layer really reads: quantize, dequantize, multiply in float64, against onnxruntime."""
    case = exported(name)
    graph = ir.load(case.portable_path).graph
    read = {node.name: node.inputs[0].name for node in graph if node.op_type == "QuantizeActivation"}
    names = {value for layer in case.layers for value in (read[f"{layer.name}/quantize"], f"{layer.name}/output")}
    own = {value.name for value in graph.inputs}
    inputs = case.inputs(2, 5)
    outputs = sorted(names - own)
    values = session(case.portable_path, dict.fromkeys(outputs, ir.DataType.FLOAT)).run(outputs, inputs)
    tensors = inputs | dict(zip(outputs, values, strict=True))
    for layer in case.layers:
        x, y = tensors[read[f"{layer.name}/quantize"]], tensors[f"{layer.name}/output"]
        fmt = layer.activation_format
        codes, scale = quantize_activation(x, **attributes("QuantizeActivation", format=fmt))
        (value,) = dequantize_activation(codes, scale, **attributes("DequantizeActivation", format=fmt))
        weight = layer.dequantized().T
        expected = value.astype(np.float64) @ weight + (0 if layer.bias is None else layer.bias)
        # A float32 sum of K products and a bias is within K + 1 roundings of the sum of their magnitudes, and each
        # weight is itself rounded twice (value * scale).
        magnitude = np.abs(value.astype(np.float64)) @ np.abs(weight) + (
            0 if layer.bias is None else np.abs(layer.bias)
        )
        limit = (layer.in_features + 4) * 2**-24 * magnitude
        assert (np.abs(y - expected) <= limit).all(), layer.name


class FakeQuantLinear(torch.nn.Module):
    """A quantized layer in torch, by the NumPy reference of the ops."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer, self.weight = layer, torch.from_numpy(layer.dequantized()).float()
        self.bias = None if layer.bias is None else torch.from_numpy(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fmt = self.layer.activation_format
        codes, scale = quantize_activation(x.numpy(), **attributes("QuantizeActivation", format=fmt))
        (value,) = dequantize_activation(codes, scale, **attributes("DequantizeActivation", format=fmt))
        return torch.nn.functional.linear(torch.from_numpy(value), self.weight, self.bias)


@pytest.mark.parametrize("name", NAMES)
def test_portable_model_is_the_fake_quantized_torch_model(exported, name):
    case = exported(name)
    inputs = case.inputs(3, 7)
    plain = torch_output(case.model, inputs)
    expected = torch_output(case.model, inputs, {layer.name: FakeQuantLinear(layer) for layer in case.layers})
    output = session(case.portable_path).run(["sample"], inputs)[0]
    assert np.linalg.norm(output - expected) <= FLIPS * np.linalg.norm(expected - plain)


@pytest.mark.parametrize("name", NAMES)
def test_interface_and_contents_of_the_portable_model(exported, name):
    case = exported(name)
    model = onnx.load(case.portable_path, load_external_data=False)
    onnx.checker.check_model(str(case.portable_path))
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }
    height, width = case.model.cells(*case.size)
    patches = height * width // case.model.config["patch_size"] ** 2
    static = {"height": height, "width": width, "patches": patches}
    assert shapes == {row.name: tuple(static.get(size, size) for size in row.shape) for row in case.model.inputs}
    channels = case.model.config.get("out_channels", 2 * case.model.config["in_channels"])
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert [value.name for value in model.graph.output] == ["sample"]
    assert tuple(d.dim_param or d.dim_value for d in dims) == ("batch", channels, height, width)
    assert {(row.domain, row.version) for row in model.opset_import} == {("", 21), ("fpq", 1)}
    assert model.ir_version == 10
    assert {f.name for f in model.functions} == {"QuantizeActivation", "DequantizeActivation", "DequantizeWeight"}
    assert {node.domain for node in model.graph.node} == {"", "fpq"}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_its_nodes_and_metadata(exported, name):
    case = exported(name)
    model = onnx.load(case.portable_path, load_external_data=False)
    layer_roles: dict[str, set[str]] = {}
    for node in model.graph.node:
        props = {row.key: row.value for row in node.metadata_props}
        if "fpq.layer" in props:
            layer_roles.setdefault(props["fpq.layer"], set()).add(node.name.removeprefix(props["fpq.layer"] + "/"))
            assert props["fpq.kind"] == case.model.family.kind_of(props["fpq.layer"])
    roles = {"quantize", "dequantize", "weight", "matmul", "bias"}
    assert layer_roles == {layer.name: roles for layer in case.layers}


def test_nothing_of_this_machine_is_in_the_file(exported):
    case = exported("pixart")
    data = case.portable_path.read_bytes()
    for hint in (b"site-packages", b".py", b"pkg.torch", b"pytorch", str(case.portable_path.parent).encode()):
        assert hint not in data


@pytest.mark.usefixtures("traced_anew")
def test_same_inputs_give_the_same_bytes(exported, tmp_path):
    """Of the float form; of the portable one the next test says it, too."""
    case = exported("pixart")
    path = tmp_path / case.float_path.name
    export_float(load(str(case.model.folder)), path)
    for name in (path.name, f"{path.name}.data"):
        assert (tmp_path / name).read_bytes() == case.float_path.with_name(name).read_bytes(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.data"]


@pytest.mark.usefixtures("traced_anew")
def test_a_checkpoint_is_exported_without_the_float_weights(exported, tmp_path):
    """The checkpoint, read back, and a model whose quantized linears hold nothing but NaN: the same bytes."""
    case = exported("pixart")
    checkpoint.save(case.layers, tmp_path / "layers")
    model = load(str(case.model.folder))
    with torch.no_grad():
        for ref in model.linears():
            for values in ref.module.parameters():
                values.fill_(torch.nan)
    export_portable(model, checkpoint.load(tmp_path / "layers"), tmp_path / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (case.portable_path.parent / name).read_bytes()


def test_second_resolution_where_it_is_a_condition_too(tmp_path):
    size = (96, 48)
    model = load(str(tiny.folder("pixart_sizes", tmp_path)))
    export_float(model, tmp_path / "model.onnx", *size)
    inputs = sample_inputs(model, 2, 0, *size, tokens=5)
    output = session(tmp_path / "model.onnx").run(["sample"], inputs)[0]
    expected = torch_output(model, inputs)
    nodes = len(onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node)
    assert output.shape[2:] == (size[0] // 8, size[1] // 8)
    assert np.abs(output - expected).max() <= float_limit(expected, nodes)


FORMS = [
    ("E2M1", "per_channel"),
    ("E2M1", "exact_group"),
    ("E1M2", "exact_group"),
    ("E3M0", "group"),
    ("E2M3", "group"),
]


@pytest.mark.parametrize(("weight", "granularity"), [*FORMS, ("INT4", "group"), ("INT8", "per_channel")])
def test_layers_read_back_are_those_that_were_exported(exported, tmp_path, weight, granularity):
    model = exported("dit").model
    layers = tiny.quantized(model, weight, "E3M4", granularity)
    export_portable(model, layers, tmp_path / "model.onnx")
    for before, after in zip(layers, read_layers(tmp_path / "model.onnx"), strict=True):
        for key in before.__dataclass_fields__:
            assert np.array_equal(getattr(before, key), getattr(after, key)), (before.name, key)
    inputs = sample_inputs(model, 1, 0)
    expected = torch_output(model, inputs, {layer.name: FakeQuantLinear(layer) for layer in layers})
    output = session(tmp_path / "model.onnx").run(["sample"], inputs)[0]
    assert np.linalg.norm(output - expected) <= FLIPS * np.linalg.norm(expected - torch_output(model, inputs))


def test_kept_weights_are_stored_in_fp16_unless_they_do_not_fit(exported, tmp_path):
    case = exported("dit")
    kinds = {v.name: v.const_value.dtype for v in ir.load(case.portable_path).graph.initializers.values()}
    assert kinds["proj_out_1.weight"] == ir.DataType.FLOAT16
    assert kinds["proj_out_1.bias"] == ir.DataType.FLOAT  # small: the same values without a Cast
    weight = case.model.module.proj_out_1.weight
    value = float(weight[0, 0])
    try:
        weight[0, 0] = 1e5
        export_portable(case.model, case.layers, tmp_path / "model.onnx")
    finally:
        weight[0, 0] = value
    kinds = {v.name: v.const_value.dtype for v in ir.load(tmp_path / "model.onnx").graph.initializers.values()}
    assert kinds["proj_out_1.weight"] == ir.DataType.FLOAT


def test_multiplier_table_beyond_a_4_bit_index_is_refused(exported):
    layer = tiny.quantized(exported("dit").model, "E1M2", granularity="exact_group", group_size=2)[0]
    many = np.resize(np.arange(1, 19, dtype=np.uint8), layer.multipliers.shape)
    with pytest.raises(ContractError, match=f"{layer.name}: 18 different group multipliers"):
        multiplier_table(replace(layer, multipliers=many))


def test_float_export_has_its_weights_ready_for_matmul(exported):
    """As constant operands, not behind a Transpose: onnxruntime's INT8 tool quantizes only those."""
    case = exported("pixart")
    graph = ir.load(case.float_path).graph
    matmuls = [node for node in graph if node.op_type == "MatMul" and node.inputs[1].is_initializer()]
    assert len(matmuls) == len(case.layers) + 3  # caption projection (2) and output
    assert not [node for node in graph if node.op_type == "Transpose" and node.inputs[0].is_initializer()]


# --- coverage and failures -----------------------------------------------------------------------------------------


def test_summary_says_what_was_quantized_and_kept(exported):
    text = str(exported("pixart").summary)
    assert text.startswith("20 of 27 layers quantized, 7 kept (1 patch embedding; 1 last layers; ")
    assert text.endswith(" fp16")
    assert exported("pixart").summary.weights_bytes > 0


def _flat(layer: QuantizedLinear) -> QuantizedLinear:
    return replace(layer, codes=layer.codes[:-1], scales=layer.scales[:-1], bias=layer.bias[:-1])


FAULTS = [
    (lambda rows: rows[:-1], "ff.net.2: the model has this linear but the checkpoint does not; calibrate again"),
    (lambda rows: [*rows, rows[0]], "13 quantized layers have only 12 names"),
    (lambda rows: [*rows, replace(rows[-1], name="proj_out_2")], "proj_out_2: not a linear that dit quantizes"),
    (lambda rows: [_flat(rows[0]), *rows[1:]], r"codes are for a weight \(63, 64\), the model has \(64, 64\)"),
    (lambda rows: [replace(rows[0], bias=None), *rows[1:]], "disagree on whether it has a bias"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_layers_that_do_not_fit_the_model_are_named(exported, tmp_path, change, message):
    case = exported("dit")
    with pytest.raises(ContractError, match=message):
        export_portable(case.model, change(case.layers), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("portable", [False, True])
def test_a_weight_that_is_not_finite_is_named(exported, tmp_path, portable, value):
    case = exported("dit")
    model = replace(case.model, module=with_modules(case.model.module, {}))
    weight = model.module.proj_out_2.weight.clone()
    weight[3, 5] = value
    model.module.proj_out_2.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ModelError, match=r"proj_out_2\.weight: holds NaN or Inf and would be part of the engine; use"):
        if portable:
            export_portable(model, case.layers, tmp_path / "model.onnx")
        else:
            export_float(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


TEXT = '<ir_version: 10, opset_import: ["" : 21, "fpq" : 1]> g (float[B, 64] x) => (float[B, 64] y) {body}'


def test_a_graph_without_the_layer_and_a_graph_without_any(exported):
    layers = exported("dit").layers[:2]
    one = '{ y = fpq.QuantizedLinear <layer = "%s"> (x) }' % layers[0].name  # noqa: UP031 - braces of the text format
    with pytest.raises(ContractError, match=f"{layers[1].name}: quantized, but no node of the graph uses it"):
        quantize_graph(ir.from_onnx_text(TEXT.replace("{body}", one)), layers)
    with pytest.raises(ContractError, match="the exported graph has no linear to quantize"):
        quantize_graph(ir.from_onnx_text(TEXT.replace("{body}", "{ y = Identity(x) }")), layers)


def test_a_failed_write_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    graph = ir.from_onnx_text(TEXT.replace("{body}", "{ y = Identity(x) }"))
    (tmp_path / "model.onnx").write_bytes(b"old")

    def fail(_graph: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(to_onnx.ir, "save", fail)
    with pytest.raises(OSError, match="no"):
        to_onnx.save_model(graph, tmp_path / "model.onnx")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.onnx", b"old")]


def test_a_model_that_is_not_portable_is_refused_when_read(exported):
    case = exported("dit")
    with pytest.raises(ContractError, match="no quantized linear in it"):
        read_layers(case.float_path)


def test_a_portable_model_in_the_hubs_cache_is_read_through_its_links(exported, tmp_path):
    case = exported("dit")
    folder = hub.snapshot(case.portable_path.parent, tmp_path / "repository")
    assert (folder / f"{case.portable_path.name}.data").is_symlink()
    layers = read_layers(folder / case.portable_path.name)
    assert [layer.name for layer in layers] == [layer.name for layer in read_layers(case.portable_path)]
    by_name = {layer.name: layer for layer in case.layers}
    assert all(np.array_equal(layer.codes, by_name[layer.name].codes) for layer in layers)
    assert all(np.array_equal(layer.scales, by_name[layer.name].scales) for layer in layers)


def test_portable_model_with_a_node_removed_is_refused_when_read(exported, tmp_path):
    case = exported("dit")
    model = onnx.load(case.portable_path)
    kept = [node for node in model.graph.node if node.name != f"{case.layers[3].name}/weight"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ContractError, match=f"{case.layers[3].name} has no node {case.layers[3].name}/weight"):
        read_layers(tmp_path / "model.onnx")


def test_a_tensor_that_is_called_like_an_input_is_refused() -> None:
    class Toned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tone = torch.nn.Parameter(torch.ones(4))

        def forward(self, tone: torch.Tensor) -> torch.Tensor:
            return tone * self.tone

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer, self.family = Toned(), FAMILIES["dit"]

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.transformer(*args)
            return result

    with pytest.raises(ModelError, match="tone: an input and a tensor of the model have this name; rename the tensor"):
        trace(Whole(), (Input("tone", ("batch", 4)),), {"tone": np.ones((2, 4), np.float32)})
