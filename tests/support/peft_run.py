"""`python -m tests.support.peft_run OUT CLASS=FOLDER ...`: adapters that PEFT and diffusers write, and what they merge.

For each model: OUT/CLASS/adapter_model.safetensors or pytorch_lora_weights.safetensors, with all that says its scale,
and OUT/CLASS/merged.safetensors, the model's own tensors after a merge at SCALE.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SCALE = 0.7
MERGED = "merged.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj"]


def write(module: Any, folder: Path) -> None:
    """module: a transformer of diffusers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    torch.manual_seed(3)
    patterns = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 3}}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, **patterns)
    if hasattr(module, "save_lora_adapter"):
        module.add_adapter(config)
        module.save_lora_adapter(folder)
        module.fuse_lora(lora_scale=SCALE)
        module.unload_lora()
    else:  # a class that diffusers does not load adapters into
        peft = get_peft_model(module, config)
        peft.save_pretrained(folder)
        for part in peft.modules():
            if isinstance(part, LoraLayer):
                part.scale_layer(SCALE)
        module = peft.merge_and_unload()
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / MERGED)


def main(out: str, *models: str) -> None:
    """models: CLASS=FOLDER."""
    import diffusers

    for model in models:
        name, _, folder = model.partition("=")
        write(getattr(diffusers, name).from_pretrained(folder), Path(out) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
