"""Every operation of the package on a device against its reference in float64 on the CPU, for ``benchmarks.gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
SIZES = [(1, 64, 64), (37, 72, 200), (130, 256, 1000), (1000, 1024, 2816)]  # rows, width, wide


class Check(NamedTuple):
    """An operation, its reference and their inputs; gradients are of the first ``trained`` ones."""

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    trained: int


def checks(device: str, sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The worst relative error of each operation's output and gradients, over all sizes."""
    found: dict[tuple[str, torch.dtype], float] = {}
    for dtype in LIMITS:
        for size in sizes:
            for check in _operations(*size):
                key = check.name, dtype
                found[key] = max(found.get(key, 0.0), _error(check, device, dtype))
    return [
        {
            "operation": name,
            "dtype": str(dtype),
            "error": error,
            "limit": LIMITS[dtype],
            "right": error <= LIMITS[dtype],
        }
        for (name, dtype), error in found.items()
    ]


def _error(check: Check, device: str, dtype: torch.dtype) -> float:
    results = []
    for function, place, kind in ((check.ours, device, dtype), (check.plain, "cpu", torch.float64)):
        inputs = [t.to(dtype).to(place, kind) if t.is_floating_point() else t.to(place) for t in check.inputs]
        leaves = [t.requires_grad_() for t in inputs[: check.trained]]
        out = function(*inputs)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(place, out.dtype)
        grads = torch.autograd.grad(out, leaves, slope) if leaves else ()
        results.append([t.detach().double().cpu() for t in (out, *grads)])
    return max(float((got - want).norm() / want.norm().clamp(min=1e-30)) for got, want in zip(*results, strict=True))


def _operations(rows: int, width: int, wide: int) -> Iterator[Check]:
    from veneer.kernels.attention import document_attention, document_attention_reference
    from veneer.kernels.dropout import Dropout
    from veneer.kernels.gated_mlp import LowRankLinear, gated_mlp, gated_mlp_reference
    from veneer.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
    from veneer.kernels.lora_linear import lora_linear, lora_linear_reference
    from veneer.kernels.qkv_rope import _turn
    from veneer.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

    generator = torch.Generator().manual_seed(rows)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) / max(1, size[-1]) ** 0.5

    x = draw(rows, width) * width**0.5
    yield Check(
        "RMSNorm",
        lambda x, w: rms_norm(x, w.detach(), 1e-5),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        (x, draw(width)),
        1,
    )

    yield Check(
        "sum and RMSNorm with an offset",
        lambda x, r, w: torch.cat(add_rms_norm(x, r, w.detach(), 1e-5, 1.0)),
        lambda x, r, w: torch.cat(add_rms_norm_reference(x, r, w, 1e-5, 1.0)),
        (x, draw(rows, width), draw(width)),
        2,
    )

    def linear(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, A, B, W: function(x, W.detach(), None, A, B, 2.0)

    up = draw(8, width), draw(wide, 8), draw(wide, width)
    yield Check("LoRA linear", linear(lora_linear), linear(lora_linear_reference), (x, *up), 3)

    def mlp(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def low_rank(A: Tensor, B: Tensor, W: Tensor) -> LowRankLinear:
            return LowRankLinear(W.detach(), None, A, B, 2.0, drop=Dropout(0.2, 7))

        return lambda x, *t: function(x, low_rank(*t[:3]), low_rank(*t[:3]), low_rank(*t[3:]))

    down = draw(8, wide), draw(width, 8), draw(width, wide)
    yield Check("gated MLP with dropout", mlp(gated_mlp), mlp(gated_mlp_reference), (x, *up, *down), 1)

    targets = torch.randint(wide, (rows,), generator=generator)
    yield Check(
        "head and cross entropy",
        lambda x, w, t: linear_cross_entropy(x, w.detach(), t).nll,
        lambda x, w, t: linear_cross_entropy_reference(x, w, t).nll,
        (x, draw(wide, width), targets),
        1,
    )
    lengths, size = [rows, 1, 2 * rows], 16
    length = sum(lengths)
    q, k, v = (4 * draw(heads, length, size) for heads in (4, 2, 2))
    yield Check(
        "attention",
        lambda *t: document_attention(*t, lengths, 0.25),
        lambda *t: document_attention_reference(*t, lengths, 0.25),
        (q, k, v),
        3,
    )
    angle = draw(length, size // 2).repeat(1, 2)

    def turned(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return u * cos + torch.cat((-u[..., size // 2 :], u[..., : size // 2]), -1) * sin

    turn = (q, angle.cos(), angle.sin())
    yield Check("rotation", lambda u, c, s: _turn(u, c, s, torch.empty_like(u)), turned, turn, 0)
