"""Lowers packed GEMMs and quantizers to standard ONNX that TensorRT-RTX runs on tensor cores."""

from __future__ import annotations

from typing import ClassVar

from pipeline.backends.qdq.lower import LowerQdq

GROUPS_REFUSED = (
    "target rtx runs one GEMM for each linear and has no scale per token and group of input channels; build it with "
    "--target cpu, or calibrate with one scale per token"
)


class LowerRtx(LowerQdq):
    """In the ops of `qdq` as they are, which TensorRT-RTX fuses."""

    groups_refused: ClassVar[str] = GROUPS_REFUSED
