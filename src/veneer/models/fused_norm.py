"""RMSNorms without a gradient of their frozen weight, in the place of a model's own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.rms_norm import Norm, rms_norm

_OFFSETS = (0.0, 1.0)  # what is added to the weight: Gemma's is stored less one
_SIZES = (1.0, 30.0, 1000.0)  # of the random input: clamps and soft caps show at large ones alone
_ROWS = 3  # of each size


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


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether another operation may compute it: it is one of ours, not wrapped, and nobody listens to it."""
    return type(norm) is FusedRmsNorm and not (norm._forward_hooks or norm._forward_pre_hooks)


@torch.no_grad()
def gives_the_same(original: nn.Module, block: Any, weight: Tensor) -> bool:
    """Whether both give the same, to rounding, on random rows that a ``weight`` of ``[..., in]`` takes."""
    x = rows_of_each_size(weight)
    return is_same_at_each_size(block(x), original(x))


def rows_of_each_size(weight: Tensor) -> Tensor:
    """``[sizes, rows, in]`` random input for a ``weight`` of ``[..., in]``."""
    sizes = [size for size in _SIZES if size < 100 or weight.dtype != torch.float16]  # float16 ends at 65504
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(sizes), _ROWS, weight.shape[-1], generator=generator)
    return (torch.tensor(sizes)[:, None, None] * x).to(weight.device, weight.dtype)


def is_same_at_each_size(got: Tensor, want: Tensor) -> bool:
    """:func:`is_same` for every size by itself, since large rows would hide small ones.

    What overflows in the original says nothing.
    """
    if got.shape != want.shape:
        return False
    return all(is_same(ours, own) for ours, own in zip(got, want, strict=True) if bool(own.isfinite().all()))


def is_same(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    tolerance = 1e-5 if want.dtype == torch.float32 else 2e-2
    return got.shape == want.shape and bool((got - want).float().norm() <= tolerance * want.float().norm() + 1e-12)
