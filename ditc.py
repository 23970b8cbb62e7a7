"""What users of the compiler's bundles need, under one name.

from ditc import Pipeline
Pipeline.load("engines/pixart_w4a6")("a red circle left of a blue ring on white").images[0].save("out.png")
"""

from __future__ import annotations

from export.errors import UserError
from pipeline import load
from pipeline.text_to_image import Pipeline, PipelineOutput

__all__ = ["Pipeline", "PipelineOutput", "UserError", "load"]
