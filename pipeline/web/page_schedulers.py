"""Which schedulers page/schedulers.js knows, by class and keys, and their settings as it reads them."""

from __future__ import annotations

import math
from dataclasses import asdict, fields

from export.documents import shown
from export.errors import ModelError
from pipeline.generate.schedulers.config import SCHEDULERS, SchedulerConfig

OFF = (False, None)
# THE table of what the page knows: class -> keys for which it has these values alone. All else is computed there.
KNOWN: dict[str, dict[str, tuple[object, ...]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "trained_betas": (None,),
        "thresholding": OFF,
        "rescale_betas_zero_snr": OFF,
        "use_lu_lambdas": OFF,
        "use_exponential_sigmas": OFF,
        "use_beta_sigmas": OFF,
        "use_dynamic_shifting": OFF,
    },
    "DDIMScheduler": {"trained_betas": (None,), "thresholding": OFF, "rescale_betas_zero_snr": OFF},
    "FlowMatchEulerDiscreteScheduler": {
        "use_dynamic_shifting": OFF,
        "invert_sigmas": OFF,
        "shift_terminal": (0, None),
        "use_karras_sigmas": OFF,
        "use_exponential_sigmas": OFF,
        "use_beta_sigmas": OFF,
        "stochastic_sampling": OFF,
    },
}


def scheduler_settings(config: SchedulerConfig, source: str) -> dict[str, object]:
    """As JSON has it, "class_name" among its keys; null stands for a number that is not finite.

    Raises ModelError for a class, or a value of a key, that the page does not know. source: the file, for messages.
    """
    name = next(name for name, schema in SCHEDULERS.items() if isinstance(config, schema))
    if name not in KNOWN:
        raise ModelError(f"{source}: the page does not know {name}; it draws with {', '.join(KNOWN)}")
    assert KNOWN[name].keys() <= {field.name for field in fields(config)}  # type: ignore[arg-type]
    keys = asdict(config)  # type: ignore[call-overload]
    for key, values in KNOWN[name].items():
        if keys[key] not in values:
            raise ModelError(
                f"{source}: the page's {name} has no {key} {shown(keys[key])}; it draws with {shown(values[0])}"
            )
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in keys.items()
    }
    return {"class_name": name, **finite}
