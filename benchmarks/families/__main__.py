"""Which classes of diffusers go the whole way: `python -m benchmarks.families` writes benchmarks/results/families.json.

Of each class a tiny random model is built by every method, proven by the build's own gates, and drawn with in its
pipeline in the place of the transformer; or the words that refuse it are written down. With --models only these rows
are measured anew; each row says of which commit it is.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import record
from benchmarks.families.models import MODELS, SIZE, draw, save
from benchmarks.record import Json
from export.errors import ModelError
from export.models.load import load
from export.models.recording import Drawing
from export.models.torch_modules import set_resolution
from pipeline import __main__ as cli
from pipeline import load as load_bundle
from pipeline.progress import track

logger = logging.getLogger(__name__)
NAME = "families"
METHODS = ("rtn", "qdit", "fp4dit")
RECIPE, N_STEPS = "pixart_w4a8", 4
GUIDANCE = 2.0
# A tiny model's groups, and as much learning as shows that a method runs.
SETTINGS = ("weights.group_size=32", f"sampling.n_steps={N_STEPS}", "calibrate.size=8")
LEARNING = {"fp4dit": ("calibrate.options.iterations=50",)}


def measured(name: str, methods: Sequence[str], folder: Path) -> Json:
    """The row of one class."""
    source = save(name, folder / "model")
    row: Json = {"class": MODELS[name][0], "refused": None}
    try:
        model = load(str(source))
    except ModelError as error:
        return row | {"refused": str(error).replace(f"{source}/", "")}
    recordings = model.family.recordings
    assert recordings is not None, f"{name} has a row of its own"
    row |= {
        "pipeline": recordings.recorder.pipeline_class.__name__,
        "linears": len(model.linears()),
        "quantized_parameters": sum(part.numel() for ref in model.linears() for part in ref.module.parameters()),
        "parameters": model.parameters,
        "methods": {},
    }
    set_resolution(model.module, *model.cells(*SIZE))
    drawing = Drawing(2, 7, *SIZE, guidance_scale=GUIDANCE)
    expected = draw(recordings.recorder, model.module, drawing)
    for method in methods:
        output = folder / method
        flags = ["--engine", RECIPE, "-m", str(source), "--target", "cpu", "-o", str(output), "-q"]
        flags += ["--height", str(SIZE[0]), "--width", str(SIZE[1]), "--set", f"method={method}"]
        for setting in (*SETTINGS, *LEARNING.get(method, ())):
            flags += ["--set", setting]
        if code := cli.main(["build", *flags]):
            row["methods"][method] = {"exit_code": code}
            continue
        gates = json.loads((output / "report" / "parity.json").read_text(encoding="utf-8"))["gates"]
        drawn = draw(recordings.recorder, load_bundle(output).as_diffusers(), drawing)
        noise_share = float(np.square(drawn - expected).sum() / np.square(expected).sum())
        row["methods"][method] = {
            "exit_code": 0,
            "gates": len(gates),
            "quant_sqnr_db": next(gate["value"] for gate in gates if gate["name"] == "quant_sqnr_db"),
            "drawn_sqnr_db": -10 * float(np.log10(noise_share)),
        }
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = record.parser("benchmarks.families", __doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--output-dir", type=Path, default=record.RESULTS, metavar="DIR", help="of the JSON")
    arguments = record.parsed(parser, argv)
    known = record.read(arguments.output_dir / f"{NAME}.json", {"models": {}})
    rows: Json = {name: {"commit": known.get("commit")} | row for name, row in known["models"].items()}
    for name in track(arguments.models, len(arguments.models), "families"):
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measured(name, arguments.methods, Path(folder)) | {"commit": record.commit()}
    rows = {name: rows[name] for name in MODELS if name in rows}
    document = {"size": list(SIZE), "guidance_scale": GUIDANCE, "n_steps": N_STEPS, "recipe": RECIPE, "models": rows}
    print(record.write(NAME, document, arguments.output_dir))


if __name__ == "__main__":
    main()
