"""RMSNorms without a gradient of their frozen weight, in the place of a model's own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.rms_norm import Norm, rms_norm

_OFFSETS = (0.0, 1.0)  # what is added to the weight: Gemma's is stored less one


class FusedRmsNorm(nn.Module):
    """An RMSNorm whose backward skips the frozen weight; shares the original's parameter."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps
        self.offset = offset

    @property
    def norm(self) -> Norm:
        """Its part of another operation."""
        return Norm(self.weight, self.variance_epsilon, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon, self.offset)

    def extra_repr(self) -> str:
        offset = f", offset={self.offset:g}" if self.offset else ""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}{offset}"


def fused_norm(block: nn.Module) -> FusedRmsNorm | None:
    """The same as ``block`` computes, where it is an RMSNorm; else None."""
    parameters = dict(block.named_parameters())
    if set(parameters) != {"weight"} or block._modules or "RMSNorm" not in type(block).__name__:
        return None
    if len(inspect.signature(type(block).forward).parameters) != 2:  # self and x; a state space's norm takes a gate too
        return None
    eps, weight = getattr(block, "variance_epsilon", getattr(block, "eps", None)), parameters["weight"]
    if not isinstance(eps, float) or weight.dim() != 1:
        return None
    fused = (FusedRmsNorm(weight, eps, offset).train(block.training) for offset in _OFFSETS)
    return next((norm for norm in fused if gives_the_same(block, norm, weight)), None)


@torch.no_grad()
def gives_the_same(original: nn.Module, block: Any, weight: Tensor) -> bool:
    """Whether both give the same, to rounding, on random rows that a ``weight`` of ``[..., in]`` takes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    return is_same(block(x), original(x))


def is_same(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    tolerance = 1e-5 if want.dtype == torch.float32 else 2e-2
    return got.shape == want.shape and bool((got - want).float().norm() <= tolerance * want.float().norm() + 1e-12)
