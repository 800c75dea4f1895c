"""Quantised weights in files: bitsandbytes' keys and layouts, both ways, with everything that is off refused.

Of a 4-bit linear ``p.`` the file holds ``p.weight`` (codes), ``p.weight.absmax``, ``p.weight.quant_map`` (the
codebook), under double quantisation ``p.weight.nested_absmax`` and ``p.weight.nested_quant_map``, and
``p.weight.quant_state.bitsandbytes__nf4``: JSON as bytes. Of an INT8 one: ``p.weight``, ``p.SCB``, ``p.weight_format``.

bitsandbytes has no INT4 and no stacks of experts: those are written in the same way, and only Veneer reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from veneer.errors import ModelError
from veneer.quant.blockwise import NESTED_BLOCK
from veneer.quant.codebooks import codebook, dynamic_map
from veneer.quant.config import BLOCK_SIZES, QuantConfig
from veneer.quant.tensor import QuantizedTensor

_META = "weight.quant_state.bitsandbytes__"
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_INT8_KEYS = ("SCB", "weight_format")
_AGAIN = "the file is damaged, or another program's: fetch it again, or quantise the original weights"


def state_keys(names: Iterable[str], prefix: str = "") -> list[str]:
    """Those of ``names`` that make up the weight of the module ``prefix``, quantised or not, in their order."""
    own = {f"{prefix}weight", *(prefix + key for key in _INT8_KEYS)}
    return [name for name in names if name in own or name.startswith(f"{prefix}weight.")]


def state_dict(weight: QuantizedTensor, prefix: str = "") -> dict[str, Tensor]:
    """The weight under bitsandbytes' keys; codes and scales are the weight's own tensors.

    Args:
        weight: a whole weight.
        prefix: the module's, with its dot: ``model.layers.0.mlp.up_proj.``.

    Raises:
        ModelError: the weight is one expert out of a stack, whose codes cannot be saved apart.
    """
    if not weight.is_whole:
        _refuse(
            "one expert out of a stack cannot be saved apart", prefix + "weight", "save the stack that it is part of"
        )
    config = weight.config
    if config.scheme == "int8":
        row_major = torch.tensor(0, dtype=torch.uint8)
        return {f"{prefix}weight": weight.codes, f"{prefix}SCB": weight.absmax, f"{prefix}weight_format": row_major}
    # The maps are copies: tensors that share memory are refused by safetensors.
    parts = {"": weight.codes, ".absmax": weight.absmax, ".quant_map": codebook(config.scheme, weight.device).clone()}
    meta: dict[str, Any] = {
        "quant_type": config.scheme,
        "blocksize": config.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        parts[".nested_absmax"] = weight.nested_absmax
        parts[".nested_quant_map"] = dynamic_map(True, weight.device).clone()
        meta |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
    state = {f"{prefix}weight{end}": tensor for end, tensor in parts.items()}
    state[prefix + _META + config.scheme] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return state


def from_state_dict(state: Mapping[str, Tensor], prefix: str = "", dtype: torch.dtype | None = None) -> QuantizedTensor:
    """The weight that a state dict holds under bitsandbytes' keys; other modules' keys are passed over.

    Args:
        state: tensors by key.
        prefix: the module's, with its dot.
        dtype: what the weight computes in; None: what the file records, or for INT8, which records none, float32.

    Raises:
        ModelError: a part is missing, cut short, of another size, unknown, or does not fit the others.
    """
    if f"{prefix}SCB" in state:
        return _read_int8(state, prefix, dtype or torch.float32)
    return _read_4bit(state, prefix, dtype)


@dataclass(frozen=True)
class _Meta:
    """The JSON of a 4-bit weight, checked."""

    config: QuantConfig
    dtype: torch.dtype
    shape: torch.Size
    offset: float | None


def _read_4bit(state: Mapping[str, Tensor], prefix: str, dtype: torch.dtype | None) -> QuantizedTensor:
    name = f"{prefix}weight"
    meta = _read_meta(state, prefix)
    scheme, nested = meta.config.scheme, meta.config.double_quant
    ends = ["", ".absmax", ".quant_map", *([".nested_absmax", ".nested_quant_map"] if nested else [])]
    if missing := [name + end for end in ends if name + end not in state]:
        _refuse(f"a part of the 4-bit weight is missing: {', '.join(missing)}", name)
    if unknown := set(state_keys(state, prefix)) - {name + end for end in ends} - {prefix + _META + scheme}:
        _refuse(f"a 4-bit weight has no part {', '.join(sorted(unknown))}", name)
    codes, absmax, book, *rest = (state[name + end] for end in ends)
    count = math.prod(meta.shape)
    blocks = -(-count // meta.config.block_size)
    if codes.dtype != torch.uint8:  # packed into another dtype for FSDP: the bytes are the same
        codes = codes.contiguous().view(torch.uint8)
    _check_size(codes, (count + 1) // 2, "bytes of codes", name, meta)
    _check_size(absmax, blocks, "scales", f"{name}.absmax", meta)
    if nested != (absmax.dtype == torch.uint8):
        _refuse(
            f"the scales are {absmax.dtype}, which does not fit double quantisation or its absence", f"{name}.absmax"
        )
    _check_map(book, codebook(scheme, book.device), f"{name}.quant_map", scheme)
    offset = None
    if nested:
        _check_size(rest[0], -(-blocks // NESTED_BLOCK), "nested scales", f"{name}.nested_absmax", meta)
        _check_map(rest[1], dynamic_map(True, rest[1].device), f"{name}.nested_quant_map", "dynamic")
        offset = torch.tensor(meta.offset, dtype=torch.float32, device=codes.device)
    scales = _finite(rest[0] if nested else absmax, f"{name}.nested_absmax" if nested else f"{name}.absmax")
    return QuantizedTensor(
        codes.reshape(-1, 1),
        absmax.reshape(-1) if nested else scales,
        scales if nested else None,
        offset,
        meta.config,
        meta.shape,
        dtype or meta.dtype,
    )


def _read_meta(state: Mapping[str, Tensor], prefix: str) -> _Meta:
    name = f"{prefix}weight"
    keys = [key for key in state if key.startswith(prefix + _META)]
    if len(keys) != 1:
        what = "the weight is not quantised" if not keys else f"the weight is described {len(keys)} times"
        fix = "quantise it: quantize(weight, QuantConfig())" if not keys else _AGAIN
        _refuse(f"{what}: one key {prefix}{_META}(nf4, fp4 or int4) is needed", name, fix)
    where, scheme = keys[0], keys[0].removeprefix(prefix + _META)
    if scheme not in ("nf4", "fp4", "int4"):
        _refuse(f"unknown 4-bit type '{scheme}'", where, "use NF4 or FP4 weights, or quantise the original ones")
    try:
        found = json.loads(bytes(state[where].flatten().tolist()))
        shape, size = torch.Size(found["shape"]), found["blocksize"]
        dtype = _DTYPES[found["dtype"]]
        nested = "nested_offset" in found
        offset = float(found["nested_offset"]) if nested else None
        nested_size, nested_dtype = (found["nested_blocksize"], found["nested_dtype"]) if nested else (None, None)
        quant_type = found["quant_type"]
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        _refuse(f"the description of the 4-bit weight cannot be read ({type(error).__name__}: {error})", where)
    if quant_type != scheme:
        _refuse(f"the key says '{scheme}', the description '{quant_type}'", where)
    if not isinstance(size, int) or size not in BLOCK_SIZES:
        fix = f"quantise the original weights in blocks of {', '.join(map(str, BLOCK_SIZES))}"
        _refuse(f"a block size of {size!r} does not fit: it must be a power of two from 32 to 4096", where, fix)
    if len(shape) not in (2, 3) or min(shape) < 1:
        _refuse(f"a weight of shape {tuple(shape)} is neither a matrix nor a stack of them", where)
    if nested and (nested_size != NESTED_BLOCK or nested_dtype != "float32" or not math.isfinite(offset or 0.0)):
        what = f"blocks of {nested_size} in {nested_dtype}, offset {offset}"
        _refuse(f"the scales were quantised in a way that is not known here: {what}", where)
    return _Meta(QuantConfig(scheme, size, nested), dtype, shape, offset)


def _read_int8(state: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> QuantizedTensor:
    name = f"{prefix}weight"
    if name not in state:
        _refuse(f"a part of the INT8 weight is missing: {name}", name)
    if unknown := set(state_keys(state, prefix)) - {name, *(prefix + key for key in _INT8_KEYS)}:
        _refuse(f"an INT8 weight has no part {', '.join(sorted(unknown))}", name)
    codes, absmax = state[name], state[f"{prefix}SCB"]
    if codes.dtype != torch.int8 or codes.ndim not in (2, 3):
        _refuse(f"INT8 codes are int8 of 2 or 3 dimensions, not {codes.dtype} {tuple(codes.shape)}", name)
    form = state.get(f"{prefix}weight_format")
    if form is not None and (form.numel() != 1 or int(form) != 0):
        fix = "open the model with bitsandbytes 0.45 or newer and save it again"
        _refuse(f"INT8 codes must be row by row (format 0), not in format {form.tolist()}", name, fix)
    rows = codes.numel() // codes.shape[-1] if codes.numel() else 0
    if not rows or absmax.numel() != rows:
        _refuse(f"{rows} rows of codes have {absmax.numel()} scales", f"{prefix}SCB")
    scales = _finite(absmax, f"{prefix}SCB")
    return QuantizedTensor(codes.contiguous(), scales, None, None, QuantConfig("int8"), codes.shape, dtype)


def _check_size(tensor: Tensor, expected: int, what: str, where: str, meta: _Meta) -> None:
    if tensor.numel() != expected:
        shape = "x".join(map(str, meta.shape))
        why = f"a weight of {shape} in blocks of {meta.config.block_size} has {expected} {what}"
        _refuse(f"{why}, the file {tensor.numel()}", where)


def _check_map(found: Tensor, standard: Tensor, where: str, scheme: str) -> None:
    # Programs compute the maps anew, and differ in the last bit.
    if found.shape != standard.shape or not torch.allclose(found.float(), standard, rtol=0, atol=1e-6):
        _refuse(f"the codebook is not the standard {scheme} one", where)


def _finite(scales: Tensor, where: str) -> Tensor:
    """``scales`` flat in float32."""
    if not scales.is_floating_point() or not bool(scales.isfinite().all()):
        _refuse("the scales hold NaN or infinity, or are no numbers with a point", where)
    return scales.reshape(-1).float()


def _refuse(what: str, where: str, fix: str = _AGAIN) -> NoReturn:
    raise ModelError(what, where=where, fix=fix)
