"""Files that peers run, made of a float model: ONNX in float32 and INT8, OpenVINO with weights of 8 or 4 bits, or INT8.

Each is made in a process of its own, so that one that fails, or takes more memory than there is, is said and no more:
`python -m pipeline.bench.convert`, which `prepared` starts.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import TypedDict

from export.documents import read_json
from export.errors import UserError
from export.models.description import sample_inputs
from export.models.families import Half
from pipeline import machine
from pipeline.backends.base import Arrays
from pipeline.files import publish, remove, write_json
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from openvino import Model

    from export.models.load import LoadedModel

logger = logging.getLogger(__name__)
# Written last into a conversion's folder: what it was made of and with.
STAMP = "made.json"
OWN_SIZE = "own"  # names the folder of pictures of the model's own size
ONNX_FP32, ONNX_INT8, OPENVINO_FP32 = "onnx_fp32", "onnx_int8", "openvino_fp32"
GROUP_SIZE = 64  # of OpenVINO's 4-bit weights
# Pictures that NNCF observes are noise, as in the first steps; timesteps run over the whole of an image.
OBSERVED_TIMESTEPS = (999, 700, 400, 50)


class ConversionError(Exception):
    """A peer's tool did not convert the model; the message is its last words."""


@dataclass(frozen=True)
class FloatModel:
    """A float model by name, for processes that load it themselves: what `export.models.load` takes, and the size of
    its pictures in pixels."""

    source: str
    variant: str
    config: str
    height: int
    width: int
    half: Half | None = None
    lora: Sequence[str] = ()

    @staticmethod
    def of_recipe(recipe: Recipe) -> FloatModel:
        """The model and the size of a recipe."""
        size = recipe.sampling
        named = recipe.model, recipe.model_variant, recipe.model_config
        return FloatModel(*named, size.height, size.width, recipe.half, recipe.lora)

    def load(self) -> LoadedModel:
        """Raises ModelError."""
        from export.models.adapters import Adapter
        from export.models.load import load

        adapters = tuple(map(Adapter.parse, self.lora))
        return load(self.source, False, self.variant, self.config, self.half, adapters=adapters)


class Stamp(TypedDict):
    """Of a conversion. tools: versions."""

    model: str
    height: int
    width: int
    tools: dict[str, str]


def place(model: FloatModel, sha256: str, folder: Path) -> Path:
    """Where in `folder` conversions of a model and a size lie."""
    size = f"{model.height}x{model.width}" if model.height or model.width else OWN_SIZE
    return folder / f"{sha256[:12]}_{size}"


def prepared(name: str, model: FloatModel, sha256: str, folder: Path) -> Path:
    """The file of conversion `name`, below `folder`; made there unless it was, of the same model by the same tools.

    sha256: of the model's weights. Raises ConversionError.
    """
    conversion, home = CONVERSIONS[name], place(model, sha256, folder)
    tools = machine.tool_versions(conversion.modules)
    stamp: Stamp = {"model": sha256, "height": model.height, "width": model.width, "tools": tools}
    stamped = home / name / STAMP
    if stamped.is_file() and read_json(stamped, Stamp) == stamp:
        return home / name / conversion.file
    if conversion.source is not None:
        prepared(conversion.source, model, sha256, folder)
    partial = home / f"{name}.part"
    remove(partial)
    partial.mkdir(parents=True)
    logger.info("converting: %s of %s", name, home.name)
    job = Job(name, model, str(home))
    command = [sys.executable, "-m", __name__, json.dumps(asdict(job))]
    log = home / f"{name}.log"
    with log.open("w", encoding="utf-8") as words:
        done = subprocess.run(command, check=False, stdout=words, stderr=words)
    if done.returncode:
        remove(partial)
        raise ConversionError(f"{name} was not made: {how_it_ended(done.returncode, log)}")
    write_json(partial / STAMP, stamp)
    publish(partial, home / name, aside=home / f"{name}.old")
    return home / name / conversion.file


@dataclass(frozen=True)
class Job:
    """What a conversion's process does. folder: of all conversions of this model and size."""

    name: str
    model: FloatModel
    folder: str

    def file(self, conversion: str) -> Path:
        """What another conversion wrote."""
        return Path(self.folder) / conversion / CONVERSIONS[conversion].file


def how_it_ended(code: int, log: Path) -> str:
    """Exit code and last line of a process that failed, in words."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    killed = ", memory may have run out" if code == -signal.SIGKILL else ""
    ending = f"ended by signal {-code}{killed}" if code < 0 else f"exit {code}"
    return f"{lines[-1].strip()[:300] if lines else 'no message'} ({ending}; all of it: {log})"


# --- the conversions ------------------------------------------------------------------------------------------------


def to_onnx(model: LoadedModel, job: Job, path: Path) -> None:
    """The float model as the product exports it."""
    from export.to_onnx import export_float

    export_float(model, path, job.model.height, job.model.width)


def to_onnx_int8(model: LoadedModel, job: Job, path: Path) -> None:
    """The INT8 form that onnxruntime's own tool makes with its defaults, of what `export_float` wrote."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The tool transposes the weights of Gemm nodes but not the shapes noted for them, which it infers again if absent.
    source = job.file(ONNX_FP32)
    plain = source.with_name(f"plain-{source.name}")
    stored = onnx.load(source, load_external_data=False)
    del stored.graph.value_info[:]
    onnx.save(stored, plain)
    # It also logs advice on preprocessing to the root logger for every model.
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(plain, path, weight_type=QuantType.QInt8, use_external_data_format=True)
    finally:
        logging.root.setLevel(level)
        plain.unlink()


def to_openvino(model: LoadedModel, job: Job, path: Path) -> None:
    """OpenVINO's own conversion of the PyTorch module: it knows attention as one operation, which ONNX does not.

    Of torch.export's program, for which the module is not run: at 4096 tokens that would take many gigabytes.
    """
    import openvino

    from export.models.load import denoiser, float_linears
    from export.models.torch_modules import set_resolution
    from export.to_onnx import TRACE_BATCH, TRACE_TOKENS
    from export.trace import exported

    module, (height, width) = denoiser(model, float_linears(model)), (job.model.height, job.model.width)
    set_resolution(module, *model.cells(height, width))
    samples = sample_inputs(model, TRACE_BATCH, 0, height, width, TRACE_TOKENS)
    converted = openvino.convert_model(exported(module, model.inputs, samples))
    for port, row in zip(converted.inputs, model.inputs, strict=True):
        port.get_tensor().set_names({row.name})
    _save(converted, path)


def to_openvino_int8(model: LoadedModel, job: Job, path: Path) -> None:
    """NNCF's static post-training quantization for transformers, which has SmoothQuant.

    It observes pictures of the size that is converted.
    """
    import nncf

    def observed() -> Iterator[Arrays]:
        for seed, timestep in enumerate(OBSERVED_TIMESTEPS):
            inputs = sample_inputs(model, 1, seed, job.model.height, job.model.width)
            yield inputs | {"timestep": np.full_like(inputs["timestep"], timestep)}

    data, kind = nncf.Dataset(list(observed())), nncf.ModelType.TRANSFORMER
    float_model = _read(job.file(OPENVINO_FP32))
    _save(nncf.quantize(float_model, data, model_type=kind, subset_size=len(OBSERVED_TIMESTEPS)), path)


def to_openvino_int8_weights(model: LoadedModel, job: Job, path: Path) -> None:
    """Weights alone, symmetric, a scale for each channel."""
    import nncf

    _save(nncf.compress_weights(_read(job.file(OPENVINO_FP32)), mode=nncf.CompressWeightsMode.INT8_SYM), path)


def to_openvino_int4_weights(model: LoadedModel, job: Job, path: Path) -> None:
    """Weights alone, symmetric, all layers in 4 bits."""
    import nncf

    float_model, mode = _read(job.file(OPENVINO_FP32)), nncf.CompressWeightsMode.INT4_SYM
    _save(nncf.compress_weights(float_model, mode=mode, group_size=GROUP_SIZE, ratio=1.0, all_layers=True), path)


def _read(path: Path) -> Model:
    import openvino

    return openvino.Core().read_model(path)


def _save(model: Model, path: Path) -> None:
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)


@dataclass(frozen=True)
class Conversion:
    """make(model, job, path): writes `path`. source: the conversion of the same size that it reads, None for none.

    modules: tools whose versions may change it, beside those of machine.TOOLS.
    """

    make: Callable[[LoadedModel, Job, Path], None]
    file: str
    source: str | None = None
    modules: tuple[str, ...] = ()


OPENVINO, NNCF = ("openvino",), ("openvino", "nncf")
CONVERSIONS = {
    ONNX_FP32: Conversion(to_onnx, "model.onnx"),
    ONNX_INT8: Conversion(to_onnx_int8, "model.onnx", ONNX_FP32),
    OPENVINO_FP32: Conversion(to_openvino, "model.xml", None, OPENVINO),
    "openvino_int8": Conversion(to_openvino_int8, "model.xml", OPENVINO_FP32, NNCF),
    "openvino_int8_weights": Conversion(to_openvino_int8_weights, "model.xml", OPENVINO_FP32, NNCF),
    "openvino_int4_weights": Conversion(to_openvino_int4_weights, "model.xml", OPENVINO_FP32, NNCF),
}


def main(arguments: list[str]) -> int:
    """The process: a Job as JSON."""
    stated = json.loads(arguments[0])
    job = Job(**{**stated, "model": FloatModel(**stated["model"])})
    conversion = CONVERSIONS[job.name]
    try:
        conversion.make(job.model.load(), job, Path(job.folder) / f"{job.name}.part" / conversion.file)
    except UserError as error:  # the last line is what is said of it
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
