"""The check of operations against float32: right ones pass in every dtype, and each kind of mistake is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.kernels.attention import document_attention
from veneer.kernels.check import Finding, checked, watching
from veneer.kernels.frozen import frozen_linear
from veneer.kernels.gated_mlp import LowRankLinear, gated_mlp
from veneer.kernels.grouped_lora import Update, group_by_expert, grouped_linear
from veneer.kernels.linear_cross_entropy import linear_cross_entropy
from veneer.kernels.lora_linear import lora_linear
from veneer.kernels.qkv_rope import qkv_rope
from veneer.kernels.rms_norm import rms_norm
from veneer.quant import QuantConfig, quantize

BF16, FLOAT = torch.bfloat16, torch.float32
D, T = 64, 24


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def frozen(*shape: int, dtype: torch.dtype = FLOAT) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape).div(math.sqrt(shape[-1])).to(dtype), requires_grad=False)


def factors(outs: int, ins: int, rank: int = 4) -> tuple[nn.Parameter, nn.Parameter]:
    """As a run begins: B is zero."""
    return nn.Parameter(torch.randn(rank, ins) / math.sqrt(ins)), nn.Parameter(torch.zeros(outs, rank))


def low_rank(outs: int, ins: int, dtype: torch.dtype) -> LowRankLinear:
    return LowRankLinear(frozen(outs, ins, dtype=dtype), None, *factors(outs, ins), 2.0, torch.ones(outs) * 1.1)


def every_operation(dtype: torch.dtype) -> None:
    x = torch.randn(T, D, dtype=dtype)
    lora_linear(x, frozen(D, D, dtype=dtype), frozen(D, dtype=dtype), *factors(D, D), 2.0)
    lora_linear(x, quantize(frozen(D, D).data.to(dtype), QuantConfig()), None, *factors(D, D), 2.0)
    frozen_linear(x, frozen(D, D, dtype=dtype))
    gated_mlp(x, low_rank(96, D, dtype), low_rank(96, D, dtype), low_rank(D, 96, dtype))
    rms_norm(x, frozen(D, dtype=dtype), 1e-5)
    cos, sin = torch.randn(2, T, 16, dtype=dtype).unbind()
    cos, sin = (torch.cat((t[:, :8], t[:, :8]), 1) for t in (cos, sin))
    qkv_rope(x, low_rank(D, D, dtype), low_rank(32, D, dtype), low_rank(32, D, dtype), cos, sin)
    q, k, v = torch.randn(4, T, 16, dtype=dtype), *torch.randn(2, 2, T, 16, dtype=dtype).unbind()
    document_attention(q, k, v, [10, 1, 13], 0.25)
    linear_cross_entropy(x, frozen(100, D, dtype=dtype), torch.randint(100, (T,)))
    groups = group_by_expert(torch.randint(4, (T, 2)), 4)
    A, B = (nn.Parameter(torch.stack(t)) for t in zip(*(factors(D, D) for _ in range(4))))
    grouped_linear(x, groups, frozen(4, D, D, dtype=dtype), None, (Update(A, B, 2.0),), gather=True)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_every_operation_passes_forward_and_backward(dtype: torch.dtype) -> None:
    with torch.no_grad(), watching() as watch:
        every_operation(dtype)
    assert len(watch.calls) == 8
    assert {f.operation for f in watch.findings} == set(watch.calls)
    assert not [f for f in watch.findings if f.is_off]
    limit = 1e-5 if dtype == FLOAT else 0.02
    assert max(f.error for f in watch.findings) < limit
    parts = {(f.operation, f.part) for f in watch.findings}
    assert {("LoRA linear", f"gradient of {name}") for name in ("x", "A", "B")} <= parts
    assert ("gated MLP", "gradient of up.row_scale") in parts
    assert ("attention", "gradient of k") in parts


def doubled(x: Tensor, weight: Tensor) -> Tensor:
    return 2 * x * weight


class _Wrong(torch.autograd.Function):
    """Right forward, and a gradient of ``x`` that lacks a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return doubled(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * ctx.saved_tensors[0], None


def findings(own: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> dict[str, Finding]:
    with torch.no_grad(), watching() as watch:
        checked("doubling", doubled, "x")(own)(x, torch.rand(8) + 0.5)
    return {finding.part: finding for finding in watch.findings}


def test_a_wrong_gradient_is_named_and_the_output_is_not() -> None:
    found = findings(lambda x, weight: _Wrong.apply(x, weight), torch.randn(3, 8))
    assert found["gradient of x"].is_off
    assert found["gradient of x"].error == pytest.approx(0.5)
    assert not found["output"].is_off


@pytest.mark.parametrize(
    "own", [lambda x, weight: 2.01 * x * weight, lambda x, weight: x * weight * math.nan], ids=["scale", "nan"]
)
def test_a_wrong_output_is_named(own: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert findings(own, torch.randn(3, 8))["output"].is_off


def test_rows_that_are_not_finite_are_not_the_operations_fault() -> None:
    found = findings(doubled, torch.full((3, 8), math.inf))
    assert not found["output"].is_off


def test_where_rounding_itself_is_coarse_so_may_the_operation_be() -> None:
    def cancelling(x: Tensor, weight: Tensor) -> Tensor:
        return (x + 1000) - 1000

    with torch.no_grad(), watching() as watch:
        checked("cancelling", cancelling, "x")(cancelling)(torch.randn(3, 8, dtype=BF16), torch.ones(8))
    assert max(f.error for f in watch.findings) > 0.5
    assert not [f for f in watch.findings if f.is_off]


def test_only_the_first_call_of_a_shape_is_compared_unless_every_one_is_wanted() -> None:
    counts = {}
    for every in (False, True):
        with torch.no_grad(), watching(every) as watch:
            for rows, width in ((3, 8), (5, 8), (3, 16)):
                rms_norm(torch.randn(rows, width), frozen(width), 1e-5)
        counts[every] = len(watch.findings) // 2
        assert watch.calls["RMSNorm"] == 3
    assert counts == {False: 2, True: 3}


def test_operands_too_large_for_the_check_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.kernels.check.LARGEST", 100)
    with torch.no_grad(), watching() as watch:
        rms_norm(torch.randn(3, 8), frozen(8), 1e-5)
    assert watch.too_large == {"RMSNorm"}
    assert not watch.findings


def test_nothing_is_changed_and_nothing_is_watched_afterwards() -> None:
    x, (A, B), weight = torch.randn(T, D), factors(D, D), frozen(D, D)
    before = [t.clone() for t in (x, A, B)]
    with torch.no_grad(), watching() as watch:
        inside = lora_linear(x, weight, None, A, B, 2.0)
    outside = lora_linear(x, weight, None, A, B, 2.0)
    assert torch.equal(inside, outside)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, A, B)))
    assert A.grad is None
    assert watch.calls["LoRA linear"] == 1
