"""Sources with float8 weights."""

from __future__ import annotations

from pathlib import Path

import torch

from support.hf_files import edit_json, edit_tensors
from support.tiny_models import save_vlm


def fp8_source(path: Path, **kw: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """An Instruct-like source: float8 linears with scales. Returns it and its encoder's dequantised tensors."""
    save_vlm(path, dtype="bfloat16", **kw)
    wanted: dict[str, torch.Tensor] = {}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("language_model.model.layers") and "_proj" in name:
                scale = (tensors[name].float().abs().max() / 448).bfloat16()
                tensors[name] = (tensors[name].float() / scale.float()).to(torch.float8_e4m3fn)
                wanted[name] = (tensors[name].float() * scale.float()).bfloat16()
                tensors[name + "_scale_inv"] = scale
                tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5, dtype=torch.bfloat16)
            elif name.startswith("language_model.model."):
                wanted[name] = tensors[name]

    edit_tensors(path, quantize)
    settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False}
    edit_json(path / "config.json", lambda config: config.update(quantization_config=settings))
    return path, {name.removeprefix("language_model.model."): tensor for name, tensor in wanted.items()}
