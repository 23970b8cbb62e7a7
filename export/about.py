"""What every ONNX file that is written says of itself: who wrote it in which release, what it is, and of the model in
it the recipe, the number formats and the licence. People and tools (Netron, `polygraphy inspect`) show it; nothing here
reads it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever asks for the version runs without these
    import onnx
    import onnx_ir as ir

    from export.checkpoint import QuantizedLinear
    from export.formats.attention import AttentionFormats

# Of the distribution, and of the console script that it installs.
PROGRAM = "ditc"
# Keys of a file's metadata.
RECIPE, FORMATS, LICENSE = "recipe", "formats", "license"


def own_version() -> str:
    """The release of this package; "unknown" for sources that are not installed."""
    try:
        return metadata.version(PROGRAM)
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class About:
    """Of the model: the name of the recipe ("" where none is known, as of a checkpoint), and the licence of its weights
    by its identifier on the hub."""

    recipe: str = ""
    license: str = "unknown"

    def metadata(self, layers: Sequence[QuantizedLinear], attention: AttentionFormats | None) -> dict[str, str]:
        """As a file has it, by key."""
        known = {RECIPE: self.recipe} if self.recipe else {}
        return {**known, FORMATS: formats(layers, attention), LICENSE: self.license}


def formats(layers: Sequence[QuantizedLinear], attention: AttentionFormats | None) -> str:
    """The formats of a model's linears, every one that occurs, and of its attention."""
    weights = {f"{layer.weight_format} {layer.granularity}" for layer in layers}
    activations = {f"{layer.activation_format} {layer.activation_scaling}" for layer in layers}
    named = {"weights": weights, "activations": activations, "attention": {str(attention)} if attention else set()}
    return "; ".join(
        f"{what} {', '.join(sorted(names))}" if names else f"{what} float" for what, names in named.items()
    )


def sign(model: ir.Model | onnx.ModelProto, what: str) -> None:
    """Say in `model` that this release wrote it, and what it is; metadata stays as it is."""
    model.producer_name, model.producer_version, model.doc_string = PROGRAM, own_version(), what
