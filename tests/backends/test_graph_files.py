"""What all targets that lower the portable model do alike."""

from pathlib import Path

import onnx_ir as ir
import pytest

from export.errors import ContractError
from pipeline.backends import BACKENDS, PORTABLE
from pipeline.recipe import Recipe
from tests.support.portable import HEADER


@pytest.mark.parametrize("target", sorted(set(BACKENDS) - {PORTABLE}))
def test_a_model_without_quantized_linears_is_an_error(target: str, tmp_path: Path) -> None:
    model = ir.from_onnx_text(f"{HEADER} g (float[B,4] x) => (float[B,4] y) {{ y = Neg(x) }}")
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ContractError, match=r"model\.onnx has no quantized linear to lower; export the model again"):
        BACKENDS[target].lower(tmp_path / "model.onnx", tmp_path, Recipe("t", "zoo:pixart_mini"))
