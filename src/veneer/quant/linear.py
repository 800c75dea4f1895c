"""A linear layer over a weight in codes, with bitsandbytes' keys in its state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.kernels.frozen import frozen_linear
from veneer.quant.config import QuantConfig
from veneer.quant.encode import quantize
from veneer.quant.state import from_state_dict, state_dict, state_keys
from veneer.quant.tensor import QuantizedTensor

_BUFFERS = ("codes", "absmax", "nested_absmax", "offset")


class QuantizedLinear(nn.Module):
    """``x W^T + b`` with a frozen weight in codes, differentiable in ``x``; the same in training and evaluation.

    Codes and scales are buffers: they move with the module, and a cast changes what it computes in, never their bits.
    In the state dict they stand under bitsandbytes' keys, not under the buffers' names.

    Args:
        weight: ``[out, in]`` in codes.
        bias: ``[out]``, or None. A parameter stays the parameter that it is; a plain tensor is frozen.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._hold(weight)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig | None = None, name: str = "") -> QuantizedLinear:
        """``linear`` with its weight in codes, its own bias, and in its mode.

        Raises:
            ModelError: the weight holds NaN or infinity; ``name`` says where.
        """
        return cls(quantize(linear.weight, config, name), linear.bias).train(linear.training)

    @property
    def weight(self) -> QuantizedTensor:
        """``[out, in]`` in codes: the buffers, as they lie now."""
        shape = torch.Size((self.out_features, self.in_features))
        held = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return QuantizedTensor(*held, self.config, shape, self.compute_dtype, self._first)

    def dequantized(self, weight: Tensor | None = None) -> nn.Linear:
        """The same layer with its weight as a plain tensor, or with ``weight`` in its place; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize() if weight is None else weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``, in the weight's dtype (under autocast: in autocast's)."""
        weight = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype=dtype), None if bias is None else bias.to(dtype)
        if bias is not None and bias.requires_grad:
            return frozen_linear(x, weight) + bias
        return frozen_linear(x, weight, bias)

    def extra_repr(self) -> str:
        blocks = "" if self.config.scheme == "int8" else f", block_size={self.config.block_size}"
        twice = ", double_quant=True" if self.nested_absmax is not None else ""
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, scheme={self.config.scheme}{blocks}{twice}"

    def _hold(self, weight: QuantizedTensor) -> None:
        for name in _BUFFERS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.config, self.compute_dtype, self._first = weight.config, weight.dtype, weight.first

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        held = [getattr(self, name) for name in _BUFFERS]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.codes.device)).dtype

        def moved(tensor: Tensor) -> Tensor:
            """``fn`` without its casts for codes and scales."""
            result = fn(tensor)
            is_held = any(tensor is buffer for buffer in held)
            return tensor.to(result.device) if is_held and result.dtype != tensor.dtype else result

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(state_dict(self.weight, prefix))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = set(state_keys(state, prefix))
        if own:
            weight = from_state_dict(state, prefix, self.compute_dtype)
            if weight.shape != self.weight.shape:
                raise ModelError(
                    f"the file's weight is {tuple(weight.shape)}, the layer's {tuple(self.weight.shape)}",
                    where=f"{prefix}weight",
                    fix="load it into the model that it was saved from",
                )
            self._hold(weight.to(self.codes.device))
        else:
            missing_keys.append(f"{prefix}weight")
        rest = {key: value for key, value in state.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
