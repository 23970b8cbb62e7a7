"""Runs an `ort_cuda` engine in onnxruntime-gpu. Apart from the compiler, so that running needs only NumPy and it.

No GPU was at hand: what needs one is written, not run.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import EnvironmentLacksError
from pipeline import machine
from pipeline.backends import stock_runtime
from pipeline.backends.base import MODEL
from pipeline.backends.sessions import CPU_PROVIDER, SessionEngine, Sessions, opened, session_options

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CUDA_PROVIDER = "CUDAExecutionProvider"
MIN_SM = 75  # the oldest for which onnxruntime-gpu 1.31 has kernels
# By default it rounds operands of float32 GEMMs to 10 bits: the verified graph does not.
CUDA_OPTIONS = {"use_tf32": "0"}


def machine_problem(providers: Collection[str], sm: int) -> str | None:
    """Why an onnxruntime with these execution providers and a GPU of capability `sm` (0: none) cannot run an engine;
    None if they can."""
    if not providers:
        return "target ort_cuda needs onnxruntime-gpu; install with: pip install onnxruntime-gpu"
    if CUDA_PROVIDER not in providers:
        return (
            f"target ort_cuda needs onnxruntime-gpu, this onnxruntime has only {', '.join(providers)}; install with: "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
    if not sm:
        return "running the target ort_cuda needs an NVIDIA GPU, and none is visible here"
    if sm < MIN_SM:
        return f"running the target ort_cuda needs a GPU of SM{MIN_SM} or newer, here is SM{sm}"
    return None


class OrtCudaEngine(SessionEngine):
    """One session on the GPU; what its CUDA execution provider leaves (shapes) is computed on the CPU."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """Raises EnvironmentLacksError before anything is opened where this machine cannot run the engine."""
        machine.require((stock_runtime.PACKAGE,), "running the target ort_cuda")
        if problem := machine_problem(stock_runtime.providers(), machine.cuda_sm()):
            raise EnvironmentLacksError(problem)
        super().__init__(Sessions(open_session(folder / MODEL, threads)))


def open_session(path: Path, threads: int = 0) -> InferenceSession:
    """Session of a lowered graph on the GPU. Raises EnvironmentLacksError where onnxruntime falls back to the CPU,
    which it does without an error where libraries of CUDA are missing."""
    options = session_options(threads)
    # Pairs of QuantizeLinear and DequantizeLinear round to a grid; none may be taken for superfluous.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = opened(path, options, providers=((CUDA_PROVIDER, CUDA_OPTIONS), CPU_PROVIDER))
    if CUDA_PROVIDER not in session.get_providers():
        raise EnvironmentLacksError(
            "onnxruntime does not load its CUDA execution provider here; install the releases of CUDA and cuDNN that "
            "it was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session
