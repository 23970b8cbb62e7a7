"""The table of calibration methods: what a row says of its layers' activations is what the layers have."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import recipe as recipes
from pipeline.backends.cuda import CudaBackend
from pipeline.backends.rtx import RtxOptions
from pipeline.backends.rtx import build as rtx_build
from pipeline.backends.trt import build as trt_build
from pipeline.methods import AUTO, COMPUTED, METHODS, activation_scalings
from tests.support import observed

QUICK = {"iterations": 2, "step_iterations": 2, "group_sizes": "", "use_lora": False, "rows": 8}
# Options that say how activations are scaled, and those that make a method's other kind of layer appear.
ASKED: dict[str, tuple[dict[str, Any], ...]] = {
    "qdit": ({"activations": "token_group"}, {"activations": "per_token"}, {"activations": "per_tensor"}),
    "msfp": (
        {"activations": "per_tensor"},
        {"activations": "per_tensor", "mixed_sign": False},
        {"activations": "per_token", "kinds": "all"},
        {"activations": "per_token", "mixed_sign": False},
    ),
    "g4w_p4a": ({"granularity": "recipe"},),  # groups of 128 do not fit the small block
}
CASES = [(name, options) for name in COMPUTED for options in ASKED.get(name, ({},))]


@pytest.mark.fast
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{list(of.values())}" for name, of in CASES])
def test_layers_scale_activations_as_their_row_says(name: str, options: dict[str, Any]) -> None:
    """And everything that it says occurs, so that no target refuses a method for nothing."""
    method_options = {key: value for key, value in QUICK.items() if key in METHODS[name].options} | options
    formats = ("formats.weight=E2M1", "formats.activation=E2M3", "weights.granularity=group")
    settings = [f"calibrate.options={toml(method_options)}"]
    method, unit = observed.make(name, *formats, *settings, adaln=name == "tfmq_dm")
    scalings = {layer.activation_scaling for layer in method.quantize(unit)}
    assert scalings - {"per_token"} == set(activation_scalings(name, "fast", method_options))


def toml(options: dict[str, Any]) -> str:
    values = {key: str(value).lower() if isinstance(value, bool) else repr(value) for key, value in options.items()}
    return "{" + ", ".join(f"{key} = {value}" for key, value in values.items()) + "}"


@pytest.mark.parametrize(
    ("name", "label"), [("adaround", "blocks.0.to_q"), ("qdit", "blocks.0"), ("g4w_p4a", "blocks.0")]
)
def test_progress_is_shown_before_a_block_is_done(name: str, label: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    options = {"adaround": {"iterations": 2}, "g4w_p4a": {"granularity": "recipe"}}.get(name, {})
    method, unit = observed.make(name, f"calibrate.options={toml(options)}")
    method.quantize(unit)
    assert f"{label}: 1 of {2 if name == 'adaround' else len(unit.plans)}" in caplog.text


@pytest.mark.parametrize("name", [AUTO, *METHODS])
def test_targets_refuse_before_any_work_what_they_cannot_run(name: str) -> None:
    recipe = recipes.from_dict({"name": "t", "model": "zoo:dit_mini", "calibrate": {"method": name}}, "test")
    scalings = set(activation_scalings(name, "fast", {}))
    of_rtx = rtx_build.problems(recipe, RtxOptions(), [])
    assert len(of_rtx) == len(CudaBackend().problems(recipe)) == len(scalings & {"token_group"})
    refused = trt_build.problems(recipe)
    assert len(refused) == len(scalings)
    starts = tuple(f"calibrate.method {name} scales activations {scaling}: " for scaling in scalings)
    assert all(problem.startswith(starts) for problem in refused)
