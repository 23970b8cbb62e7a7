"""A bundle behind Triton Inference Server's Python backend; the bundle lies beside the folder of this file.

Not run in a Triton server by those who wrote it: tested with a stand-in of triton_python_backend_utils.

Each request has PROMPT [n] BYTES, and may have NEGATIVE_PROMPT [n] BYTES, SEED [1] INT64, STEPS [1] INT32 and
GUIDANCE [1] FP32; it gets IMAGES [n, height, width, channels] UINT8, of prompt i with the seed SEED + i, and WARNINGS
[m] BYTES, a sentence on each prompt that was too long. One negative prompt is for all.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # the server's own

from ditc import Pipeline, UserError

logger = logging.getLogger(__name__)

# Of a request, so that a slip of the finger is refused.
MOST_PROMPTS = 64


class TritonPythonModel:
    """One engine, loaded once for each instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle. args: as the server gives them, model_config as JSON."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        threads = parameters.get("threads", {}).get("string_value")
        bundle = Path(args["model_repository"]) / "bundle"
        self.pipeline = Pipeline.load(bundle, threads=int(threads) if threads else None, keep_loaded=None)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; one that cannot be drawn gets an error of one sentence."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            images, warnings = self._draw(request)
        except UserError as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        except Exception as error:  # a bug of one request is no reason to end the server's others
            logger.exception("a request failed")
            message = f"internal error, {type(error).__name__}; see the server's log"
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
        sentences = np.array([warning.encode() for warning in warnings], object)
        tensors = [pb_utils.Tensor("IMAGES", images), pb_utils.Tensor("WARNINGS", sentences)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _draw(self, request: Any) -> tuple[Any, list[str]]:
        """Pictures [n, H, W, C] uint8, and what of the prompts is left out. Raises UserError for what cannot be
        drawn."""
        prompts = _texts(request, "PROMPT") or []
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise UserError(f"{len(prompts)} prompts in one request; give 1 to {MOST_PROMPTS}")
        seed = int(_number(request, "SEED", 0))
        steps, guidance = _number(request, "STEPS", None), _number(request, "GUIDANCE", None)
        negative = _texts(request, "NEGATIVE_PROMPT")
        if negative is not None and len(negative) not in (1, len(prompts)):
            raise UserError(f"{len(negative)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        pictures, warnings = [], dict[str, None]()
        for i, prompt in enumerate(prompts):
            output = self.pipeline(
                prompt,
                seed=seed + i,
                num_inference_steps=None if steps is None else int(steps),
                guidance_scale=None if guidance is None else float(guidance),
                negative_prompt=None if negative is None else negative[i % len(negative)],
            )
            warnings |= dict.fromkeys(output.warnings)
            pictures.append(np.atleast_3d(np.asarray(output.images[0])))
        return np.stack(pictures), list(warnings)

    def finalize(self) -> None:
        """Free the engine."""
        self.pipeline.close()


def _texts(request: Any, name: str) -> list[str] | None:
    """The texts of an input, None where it is not there. Raises UserError for bytes that are no UTF-8."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().ravel().tolist()
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values] or None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text in UTF-8 ({error.reason})") from error


def _number(request: Any, name: str, absent: int | None) -> Any:
    """The one number of an input, `absent` where it is not there. Raises UserError for several."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return absent
    values = tensor.as_numpy().ravel()
    if len(values) != 1:
        raise UserError(f"{name} has {len(values)} numbers; give one")
    return values[0].item()
