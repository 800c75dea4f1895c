"""What ``quantize`` asks for, and what a folder's config.json says of weights that are in codes already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.errors import ModelError, UsageError
from veneer.quant import QuantConfig

OURS = "veneer"  # the quant_method of folders that bitsandbytes has no form for


def chosen_config(
    quantize: str | QuantConfig | None, device: torch.device, skip: Sequence[str] = ()
) -> QuantConfig | None:
    """The configuration that ``quantize`` stands for; None for plain tensors.

    Raises:
        UsageError: an unknown scheme, a device that codes are not computed on, or a skip list for nothing.
    """
    config = QuantConfig(quantize) if isinstance(quantize, str) and quantize != "none" else quantize
    if not isinstance(config, QuantConfig):
        if skip:
            raise UsageError(
                "a skip list says what is not quantised", where="skip", fix="set quantize, or leave it out"
            )
        return None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"weights in codes are computed on the CPU and on CUDA, not on {device.type}",
            where="quantize",
            fix="use device: cpu, or leave quantize out",
        )
    return config


def declared_config(
    values: Mapping[str, Any], path: Path, wanted: QuantConfig | None = None, skip: Sequence[str] = ()
) -> QuantConfig | None:
    """How the weights beside a config.json are in codes already, or None where they are not.

    bitsandbytes' configuration does not say the block size: the file's own is read with each weight.

    Args:
        values: the content of config.json.
        path: the file, for errors.
        wanted, skip: what was asked for.

    Raises:
        ModelError: they are in codes that are not known here, or in others than those asked for.
    """
    text = values.get("text_config")
    found = values.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not found:
        return None
    method = str(found.get("quant_method", "unknown"))
    if method == OURS:
        return _agreed(
            QuantConfig(str(found.get("scheme")), double_quant=bool(found.get("double_quant"))), path, wanted, skip
        )
    four, eight = bool(found.get("load_in_4bit")), bool(found.get("load_in_8bit"))
    if method not in ("bitsandbytes", "unknown") or not (four or eight):
        raise ModelError(
            f"the weights are quantised already ({method}), in a format that is not read here",
            where=str(path),
            fix="use the 16-bit model, a bitsandbytes one, or a GGUF file",
        )
    scheme = "int8" if eight else str(found.get("bnb_4bit_quant_type", "fp4"))
    twice = four and bool(found.get("bnb_4bit_use_double_quant", False))
    if scheme not in ("nf4", "fp4", "int8"):
        raise ModelError(
            f"the weights are quantised already ({scheme}), in a format that is not read here",
            where=str(path),
            fix="use the 16-bit model",
        )
    return _agreed(QuantConfig(scheme, double_quant=twice or eight), path, wanted, skip)


def _agreed(config: QuantConfig, path: Path, wanted: QuantConfig | None, skip: Sequence[str]) -> QuantConfig:
    """``config``, where it is not at odds with what was asked for."""
    if wanted is not None and config.scheme != wanted.scheme:
        raise ModelError(
            f"the weights are in {config.scheme} already and cannot be put into {wanted.scheme}",
            where=str(path),
            fix=f"leave quantize out or say {config.scheme}, or use the model's 16-bit weights",
        )
    if skip:
        raise ModelError(
            "the weights are in codes already: none of them can keep 16 bits that are gone",
            where=str(path),
            fix="leave the skip list out, or use the model's 16-bit weights",
        )
    return config
