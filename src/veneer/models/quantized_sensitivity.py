"""Which weights suffer most from being in codes, measured on the user's own tokens: the ones to leave in 16 bits.

    error of a layer = ||X (W - Q(W))^T||^2 / ||X W^T||^2

over the layer's own inputs ``X`` in the 16-bit model. What is gained by keeping a layer is its error, what it costs are
the bytes of 16 bits over those of the codes: the largest error per byte is kept first, until an allowance is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.errors import UsageError
from veneer.models.load import Base, load_base
from veneer.models.quantized_memory import bits_per_weight
from veneer.models.quantized_plan import Weight, module_path, plan_quantisation
from veneer.quant import QuantConfig, QuantizedTensor, quantize


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one layer does to its output, and what leaving it alone costs."""

    path: str
    error: float  # of the output: squared, relative to its own square
    extra_bytes: int  # of the plain weight over its codes

    @property
    def error_per_byte(self) -> float:
        return self.error / self.extra_bytes


@dataclass(frozen=True)
class SensitiveLayers:
    """All layers, the most error per byte first, and the paths of those that the allowance pays for."""

    table: tuple[Sensitivity, ...]
    keep: tuple[str, ...]
    allowance_bytes: int

    def __str__(self) -> str:
        kept = set(self.keep)
        spent = sum(entry.extra_bytes for entry in self.table if entry.path in kept)
        total = sum(entry.error for entry in self.table)
        saved = sum(entry.error for entry in self.table if entry.path in kept)
        share = saved / total if total else 0.0
        return (
            f"{len(self.keep)} of {len(self.table)} layers keep 16 bits: {100 * share:.0f} % of the output error "
            f"for {spent / 1e6:.1f} MB of {self.allowance_bytes / 1e6:.1f} MB allowed"
        )


@torch.no_grad()
def sensitive_layers(
    base: Base | str | Path,
    rows: Sequence[Sequence[int]],
    config: QuantConfig | str = "nf4",
    *,
    allowance_bytes: int | None = None,
    share: float | None = None,
    skip: Sequence[str] = (),
) -> SensitiveLayers:
    """Ranks the linears of a model by what quantisation does to their outputs.

    Stacks of experts are not ranked: they are most of such a model, and no small allowance would keep one.

    Args:
        base: with plain weights; or what to load one by.
        rows: token ids of some typical texts; a few thousand tokens in all are enough.
        config: how the weights would be stored.
        allowance_bytes: what may be spent on layers in 16 bits, beyond the size of the quantised model.
        share: the same as a share of the size of the weights in codes; exactly one of both is given.
        skip: what keeps 16 bits anyway, see :func:`veneer.load_base`.

    Raises:
        UsageError: the base's weights are in codes; no rows; both allowances or none.
    """
    if (allowance_bytes is None) == (share is None) or not any(len(row) for row in rows):
        raise UsageError("sensitive_layers needs rows, and either allowance_bytes or share", where="sensitive_layers")
    config = QuantConfig(config) if isinstance(config, str) else config
    loaded = base if isinstance(base, Base) else load_base(base)
    if loaded.quantized is not None:
        what = "the base's weights are in codes already: what that did cannot be measured any more"
        raise UsageError(what, where="sensitive_layers", fix="load the base without quantize")
    module: Any = loaded.module
    weights = plan_quantisation(module, skip).weights
    size = module.dtype.itemsize
    codes = {name: bits_per_weight(config) / 8 * module.get_parameter(name).numel() for name in weights}
    if share is not None:
        allowance_bytes = round(share * sum(codes.values()))
    assert allowance_bytes is not None
    linears = {name: weight for name, weight in weights.items() if weight.kind != "experts"}
    errors = _output_errors(module, linears, rows, config, loaded.device)
    found = [
        Sensitivity(module_path(name), errors[name], round(size * module.get_parameter(name).numel() - codes[name]))
        for name in linears
    ]
    table = sorted(found, key=lambda entry: entry.error_per_byte, reverse=True)
    return SensitiveLayers(tuple(table), _affordable(table, allowance_bytes), allowance_bytes)


def _affordable(table: Sequence[Sensitivity], allowance: int) -> tuple[str, ...]:
    """Down the table, whatever still fits."""
    keep: list[str] = []
    for entry in table:
        if entry.extra_bytes <= allowance:
            keep.append(entry.path)
            allowance -= entry.extra_bytes
    return tuple(keep)


def _output_errors(
    module: Any, weights: dict[str, Weight], rows: Sequence[Sequence[int]], config: QuantConfig, device: torch.device
) -> dict[str, float]:
    """The relative squared error of each layer's output over all rows."""
    meters = {
        name: _Meter(module.get_parameter(name), weight.transposed, config, name) for name, weight in weights.items()
    }
    hooks: list[RemovableHandle] = []
    try:
        for name, meter in meters.items():
            hooks.append(module.get_submodule(module_path(name)).register_forward_hook(meter))
        for row in rows:
            if len(row):
                ids = torch.tensor([list(row)], device=device)
                module.get_decoder()(input_ids=ids, use_cache=False)  # without the head, which is not quantised
    finally:
        for hook in hooks:
            hook.remove()
    return {name: meter.error for name, meter in meters.items()}


class _Meter:
    """A forward hook that sums up, in float32, what the codes of a weight change in its layer's output."""

    def __init__(self, weight: Tensor, transposed: bool, config: QuantConfig, name: str) -> None:
        self._weight = weight.t() if transposed else weight
        self._config, self._name = config, name
        self._codes: QuantizedTensor | None = None
        self._difference = self._output = 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._codes is None:
            self._codes = quantize(self._weight, self._config, self._name, torch.float32)
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        exact = self._weight.float()
        self._output += float((x @ exact.t()).square().sum())
        self._difference += float((x @ (exact - self._codes.dequantize()).t()).square().sum())

    @property
    def error(self) -> float:
        return self._difference / self._output if self._output else 0.0
