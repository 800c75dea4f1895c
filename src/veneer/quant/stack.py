"""A stack of experts in codes, as a module in the place of the parameter that it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.quant.state import state_dict
from veneer.quant.tensor import QuantizedTensor


class QuantizedStack(nn.Module):
    """A stack of experts ``[E, out, in]`` in codes, in the place of the parameter that it was.

    Codes and scales move with the module; a cast changes what they are computed in, never their bits. They are no
    buffers, so that nothing casts or broadcasts them unasked.
    """

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, scheme={self.weight.config.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedStack:
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        self.weight = self.weight.to(probe.device, probe.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(state_dict(self.weight, prefix))
