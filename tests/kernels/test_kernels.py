"""Every fused operation against its plain reference: double-precision gradients, and tolerance in working precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.kernels import attention
from veneer.kernels.attention import document_attention, document_attention_reference
from veneer.kernels.dropout import Dropout
from veneer.kernels.gated_mlp import ACTIVATIONS, LowRankLinear, gated_mlp, gated_mlp_reference
from veneer.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from veneer.kernels.lora_linear import lora_linear, lora_linear_reference
from veneer.kernels.rms_norm import (
    Kept,
    add_rms_norm,
    add_rms_norm_reference,
    is_kept,
    rms_norm,
    rms_norm_reference,
)

DOUBLE = torch.float64


def randn(*shape: int, grad: bool = False, dtype: torch.dtype = DOUBLE, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=DOUBLE) * scale).to(dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_same_as_reference(fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and all gradients under a random upstream gradient; in bfloat16 against the reference in float32."""
    out = fused(*inputs)
    wide = [t.detach().to(DOUBLE).requires_grad_(t.requires_grad) for t in inputs]
    expected = plain(*wide)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[out.dtype]
    assert_close_relative(out, expected, tolerance)
    upstream = torch.randn(out.shape, dtype=DOUBLE)
    out.backward(upstream.to(out.dtype))
    expected.backward(upstream)
    for got, want in zip(inputs, wide):
        if want.requires_grad:
            assert got.grad is not None
            assert want.grad is not None
            assert_close_relative(got.grad, want.grad, tolerance)


def assert_close_relative(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.to(DOUBLE) - want).norm() / want.norm()
    assert error < tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


class TestLoraLinear:
    def test_gradients_in_double_precision(self) -> None:
        x, A, B = randn(2, 5, 6, grad=True), randn(3, 6, grad=True), randn(7, 3, grad=True)
        weight, bias = randn(7, 6), randn(7)
        assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], weight, bias, t[1], t[2], 0.7), (x, A, B))

    @pytest.mark.parametrize("with_bias", [True, False])
    def test_gradients_with_a_row_scale_in_double_precision(self, with_bias: bool) -> None:
        x, A, B = randn(2, 5, 6, grad=True), randn(3, 6, grad=True), randn(7, 3, grad=True)
        weight, bias, g = randn(7, 6), randn(7) if with_bias else None, randn(7, grad=True)
        assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], weight, bias, t[1], t[2], 0.7, t[3]), (x, A, B, g))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("with_bias", [True, False])
    @pytest.mark.parametrize("scaled", [True, False])
    def test_equals_the_reference(self, dtype: torch.dtype, with_bias: bool, scaled: bool) -> None:
        weight, bias = randn(33, 40, dtype=dtype), randn(33, dtype=dtype) if with_bias else None
        inputs = [randn(3, 17, 40, grad=True, dtype=dtype), randn(5, 40, grad=True), randn(33, 5, grad=True)]
        if scaled:
            inputs.append((1 + randn(33, scale=0.2)).requires_grad_())

        def plain(x: Tensor, A: Tensor, B: Tensor, *g: Tensor) -> Tensor:
            wide_bias = None if bias is None else bias.to(x.dtype)
            return lora_linear_reference(x, weight.to(x.dtype), wide_bias, A, B, 1.5, *g)

        assert_same_as_reference(lambda x, A, B, *g: lora_linear(x, weight, bias, A, B, 1.5, *g), plain, *inputs)

    @pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 24), (torch.float32, 17)])
    def test_in_16_bits_every_product_is_of_a_whole_rank(self, dtype: torch.dtype, width: int) -> None:
        seen: set[int] = set()

        class Shapes(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if "mm" in func.__name__:
                    seen.update(size for t in args if isinstance(t, Tensor) for size in t.shape)
                return func(*args, **(kwargs or {}))

        x, A, B = randn(50, 40, grad=True, dtype=dtype), randn(17, 40, grad=True), randn(33, 17, grad=True)
        with Shapes():
            lora_linear(x, randn(33, 40, dtype=dtype), None, A, B, 1.5).sum().backward()
        assert seen == {50, 40, 33, width}
        for factor in (A, B):
            assert factor.grad is not None
            assert factor.grad.shape == factor.shape

    def test_a_row_scale_near_one_keeps_its_digits_in_bfloat16(self) -> None:
        x, weight = randn(4, 8, dtype=torch.bfloat16), randn(6, 8, dtype=torch.bfloat16)
        zeros, g = (torch.zeros(1, 8), torch.zeros(6, 1)), torch.full((6,), 1.0 + 2**-6 + 2**-9)  # bfloat16: 1 + 2^-6
        got = lora_linear(x, weight, None, *zeros, 1.0, g)
        plain = x @ weight.t()
        assert torch.equal(got, (plain.double() * g.double()).to(torch.bfloat16))

    def test_a_frozen_A_keeps_no_input(self) -> None:
        saved: list[Tensor] = []
        x, weight = randn(64, 128, grad=True), randn(96, 128)
        A, B = randn(4, 128), randn(96, 4, grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            y = lora_linear(x, weight, None, A, B, 1.0)
        assert [tuple(t.shape) for t in saved if t.shape[0] == 64] == [(64, 4)]
        upstream = randn(64, 96)
        y.backward(upstream)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, upstream @ (weight + B.detach() @ A))

    def test_float32_masters_get_float32_gradients_under_a_bfloat16_base(self) -> None:
        A, B = randn(4, 8, grad=True, dtype=torch.float32), randn(6, 4, grad=True, dtype=torch.float32)
        x, weight = randn(3, 8, dtype=torch.bfloat16), randn(6, 8, dtype=torch.bfloat16)
        y = lora_linear(x, weight, None, A, B, 1.0)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert A.grad is not None
        assert A.grad.dtype == torch.float32

    def test_a_trained_base_weight_gets_its_gradient(self) -> None:
        weight = randn(6, 8, grad=True)
        lora_linear(randn(3, 8), weight, None, randn(2, 8), randn(6, 2), 1.0).sum().backward()
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0

    def test_saves_the_input_once_in_its_own_dtype_and_nothing_else_of_its_size(self) -> None:
        saved: list[Tensor] = []
        x, weight = randn(64, 128, grad=True, dtype=torch.bfloat16), randn(96, 128, dtype=torch.bfloat16)
        A, B = randn(8, 128, grad=True, dtype=torch.float32), randn(96, 8, grad=True, dtype=torch.float32)

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lora_linear(x, weight, None, A, B, 1.0)
        rows = [t for t in saved if t.dim() == 2 and t.shape[0] == 64]
        assert sorted(t.shape[1] for t in rows) == [8, 128]
        assert all(t.dtype == torch.bfloat16 for t in rows)


class TestGatedMlp:
    def operands(
        self, dtype: torch.dtype, d: int = 6, f: int = 8, scaled: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        trained, frozen = [], []
        for out, inp, rank in ((f, d, 2), (f, d, 2), (d, f, 3)):
            frozen += [randn(out, inp, dtype=dtype, scale=inp**-0.5), randn(out, dtype=dtype)]
            trained += [randn(rank, inp, grad=True, scale=inp**-0.5), randn(out, rank, grad=True)]
        if scaled:
            trained += [(1 + randn(n, scale=0.2)).requires_grad_() for n in (f, f, d)]
        return trained, frozen

    def run(self, function: Callable[..., Tensor], act: str, frozen: list[Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *t: Tensor) -> Tensor:
            w = [f.to(x.dtype) for f in frozen]
            g = t[6:] or (None, None, None)
            parts = [LowRankLinear(w[2 * i], w[2 * i + 1], t[2 * i], t[2 * i + 1], 0.5 + i, g[i]) for i in range(3)]
            return function(x, *parts, act)

        return call

    @pytest.mark.parametrize("act", ACTIVATIONS)
    @pytest.mark.parametrize("scaled", [True, False])
    def test_gradients_in_double_precision(self, act: str, scaled: bool) -> None:
        trained, frozen = self.operands(DOUBLE, scaled=scaled)
        assert torch.autograd.gradcheck(self.run(gated_mlp, act, frozen), (randn(2, 5, 6, grad=True), *trained))

    def test_frozen_factors_A_get_no_gradient_and_the_others_theirs(self) -> None:
        trained, frozen = self.operands(DOUBLE)
        for A in trained[::2]:
            A.requires_grad_(False)
        fused, plain = self.run(gated_mlp, "silu", frozen), self.run(gated_mlp_reference, "silu", frozen)
        assert_same_as_reference(fused, plain, randn(2, 5, 6, grad=True), *trained)
        assert all(A.grad is None for A in trained[::2])

    @pytest.mark.parametrize("act", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scaled", [True, False])
    def test_equals_the_reference(self, act: str, dtype: torch.dtype, scaled: bool) -> None:
        trained, frozen = self.operands(dtype, d=24, f=40, scaled=scaled)
        x = randn(3, 9, 24, grad=True, dtype=dtype)
        fused, plain = self.run(gated_mlp, act, frozen), self.run(gated_mlp_reference, act, frozen)
        assert_same_as_reference(fused, plain, x, *trained)


class TestRmsNorm:
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_gradients_in_double_precision(self, offset: float) -> None:
        weight, x, residual = randn(6), randn(2, 5, 6, grad=True), randn(2, 5, 6, grad=True)
        assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5, offset), (x,))
        assert torch.autograd.gradcheck(lambda x, r: add_rms_norm(x, r, weight, 1e-5, offset), (x, residual))
        assert torch.autograd.gradcheck(lambda x, r: add_rms_norm(is_kept(x * 1), r, weight, 1e-5), (x, residual))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_equals_the_reference(self, dtype: torch.dtype, offset: float) -> None:
        weight = randn(64, dtype=dtype)
        assert_same_as_reference(
            lambda x: rms_norm(x, weight, 1e-6, offset),
            lambda x: rms_norm_reference(x, weight.to(x.dtype), 1e-6, offset),
            randn(3, 7, 64, grad=True, dtype=dtype),
        )
        for place in (0, 1):  # the sum, its norm
            assert_same_as_reference(
                lambda x, r, place=place: add_rms_norm(x, r, weight, 1e-6, offset)[place],
                lambda x, r, place=place: add_rms_norm_reference(x, r, weight.to(x.dtype), 1e-6, offset)[place],
                *(randn(3, 7, 64, grad=True, dtype=dtype) for _ in range(2)),
            )

    def test_a_row_of_zeros_stays_finite(self) -> None:
        x = torch.zeros(2, 8, requires_grad=True)
        rms_norm(x, torch.ones(8), 1e-5).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


class TestLinearCrossEntropy:
    @pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 0.5)])
    def test_gradients_in_double_precision(self, softcap: float | None, scale: float) -> None:
        weight, targets = randn(11, 6), torch.randint(0, 11, (2, 5))
        targets[0, 2] = targets[1, 4] = -100
        assert torch.autograd.gradcheck(
            lambda h: linear_cross_entropy(h, weight, targets, None, softcap, scale).nll, (randn(2, 5, 6, grad=True),)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_equals_the_reference_over_several_chunks(
        self, dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("veneer.kernels.linear_cross_entropy.CHUNK_BYTES", 0)  # the smallest chunk: 64 rows
        weight, bias = randn(50, 16, dtype=dtype), randn(50, dtype=dtype)
        targets = torch.randint(0, 50, (200,))
        targets[::3] = -100

        def call(function: Callable[..., object]) -> Callable[[Tensor], Tensor]:
            def run(h: Tensor) -> Tensor:
                losses = function(h, weight.to(h.dtype), targets, bias.to(h.dtype), softcap)
                return losses.nll  # type: ignore[attr-defined, no-any-return]

            return run

        h = randn(200, 16, grad=True, dtype=dtype)
        out = call(linear_cross_entropy)(h)
        wide = h.detach().to(DOUBLE).requires_grad_()
        expected = call(linear_cross_entropy_reference)(wide)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert_close_relative(out.detach(), expected, tolerance)
        upstream = torch.randn(len(out), dtype=DOUBLE)
        out.backward(upstream.to(out.dtype))
        expected.backward(upstream)
        assert h.grad is not None
        assert wide.grad is not None
        assert_close_relative(h.grad, wide.grad, tolerance)
        assert (h.grad[::3] == 0).all()

    def test_counts_correct_predictions_and_says_where_they_stand(self) -> None:
        weight = torch.eye(4)
        hidden = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0]])
        losses = linear_cross_entropy(hidden, weight, torch.tensor([0, -100, 3]))
        assert losses.correct.tolist() == [True, False]
        assert losses.positions.tolist() == [0, 2]

    def test_nothing_trained_is_an_empty_loss_not_an_error(self) -> None:
        hidden = randn(3, 4, grad=True)
        losses = linear_cross_entropy(hidden, randn(5, 4), torch.full((3,), -100))
        losses.nll.sum().backward()
        assert len(losses.nll) == 0
        assert (hidden.grad == 0).all()


class TestDocumentAttention:
    @pytest.mark.parametrize("window", [None, 2, 3])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_gradients_and_values_in_double_precision(
        self, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attention, "TILE", 3)  # documents of several tiles
        q, k, v = randn(4, 9, 5, grad=True), randn(2, 9, 5, grad=True), randn(2, 9, 5, grad=True)

        def call(*t: Tensor) -> Tensor:
            return document_attention(*t, [4, 5], 0.3, window, softcap)

        assert torch.autograd.gradcheck(call, (q, k, v))
        assert_close_relative(call(q, k, v), document_attention_reference(q, k, v, [4, 5], 0.3, window, softcap), 1e-12)

    @pytest.mark.parametrize("window", [None, 4])
    def test_documents_may_share_their_beginning(self, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention, "TILE", 2)
        q, k, v = randn(4, 12, 5, grad=True), randn(2, 12, 5, grad=True), randn(2, 12, 5, grad=True)

        def call(*t: Tensor) -> Tensor:
            return document_attention(*t, [4, 5, 3], 0.3, window, None, 4)

        assert torch.autograd.gradcheck(call, (q, k, v))
        shared = call(q, k, v)
        assert_close_relative(shared, document_attention_reference(q, k, v, [4, 5, 3], 0.3, window, None, 4), 1e-12)
        whole = torch.tensor([*range(4), *range(9, 12)])  # the third document with its beginning, alone
        alone = document_attention(q[:, whole], k[:, whole], v[:, whole], [7], 0.3, window)
        assert_close_relative(shared[:, 9:].detach(), alone[:, 4:].detach(), 1e-12)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_sinks_take_their_part_and_values_may_be_narrower(
        self, softcap: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attention, "TILE", 2)
        q, k, v = randn(4, 9, 5, grad=True), randn(2, 9, 5, grad=True), randn(2, 9, 3, grad=True)
        sinks = randn(4, scale=3.0)

        def call(*t: Tensor) -> Tensor:
            return document_attention(*t, [4, 5], 0.3, 4, softcap, sinks=sinks)

        assert torch.autograd.gradcheck(call, (q, k, v))
        expected = document_attention_reference(q, k, v, [4, 5], 0.3, 4, softcap, sinks=sinks)
        assert_close_relative(call(q, k, v), expected, 1e-12)
        # By hand, the first position sees itself and the sink: its value times the sigmoid of their difference.
        score = (q[:, 0] * k.repeat_interleave(2, 0)[:, 0]).sum(-1) * 0.3
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        first = torch.sigmoid(score - sinks)[:, None] * v.repeat_interleave(2, 0)[:, 0]
        assert_close_relative(call(q, k, v)[:, 0], first, 1e-12)

    def test_a_shared_beginning_must_be_the_first_document(self) -> None:
        q = randn(2, 5, 4)
        with pytest.raises(ValueError, match="first document"):
            document_attention(q, q, q, [3, 2], 0.5, prefix=2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_the_reference(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention, "TILE", 32)
        lengths = [1, 70, 33, 32]
        q, k, v = (randn(heads, sum(lengths), 16, grad=True, dtype=dtype) for heads in (6, 2, 2))
        assert_same_as_reference(
            lambda *t: document_attention(*t, lengths, 0.25),
            lambda *t: document_attention_reference(*t, lengths, 0.25),
            q,
            k,
            v,
        )

    def test_a_document_does_not_see_its_neighbours(self) -> None:
        q, k, v = randn(2, 10, 4), randn(2, 10, 4), randn(2, 10, 4)
        alone = document_attention(q[:, 6:], k[:, 6:], v[:, 6:], [4], 0.5)
        packed = document_attention(q, k, v, [6, 4], 0.5)
        assert torch.equal(packed[:, 6:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_norm_gives_is_computed_again_and_not_kept(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64).to(dtype)
    x = torch.randn(2, 40, 64).to(dtype).requires_grad_()
    A, B = torch.randn(8, 64, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    W = torch.randn(96, 64).to(dtype)

    def grads(normed: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        saved: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = lora_linear(normed(x), W, None, A, B, 2.0)
        return list(torch.autograd.grad(y.float().square().sum(), (x, A, B))), saved

    ours, few = grads(lambda x: rms_norm(x, weight, 1e-5))
    plain, more = grads(lambda x: rms_norm(x, weight, 1e-5).clone())
    for got, want in zip(ours, plain, strict=True):
        assert torch.equal(got, want)
    sizes = [
        len({t.data_ptr() for t in saved if t.shape[-1] == 64 and t.numel() == x.numel()}) for saved in (few, more)
    ]
    assert sizes == [1, 2]  # the norm's input alone, or its output as well


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_by_documents_is_the_same(key_heads: int, prefix: int) -> None:
    lengths = [5, 7, 1, 9]
    q = randn(4, sum(lengths), 8, grad=True)
    k, v = (randn(key_heads, sum(lengths), 8, grad=True) for _ in range(2))
    fused = functools.partial(attention.by_documents, lengths=lengths, scaling=0.3, prefix=prefix)
    plain = functools.partial(document_attention_reference, lengths=lengths, scaling=0.3, prefix=prefix)
    assert_same_as_reference(fused, plain, q, k, v)


@pytest.mark.parametrize("drops", [(None, None), (Dropout(0.3, 5), Dropout(0.2, 6))])
def test_a_long_row_goes_through_the_mlp_by_tiles(
    drops: tuple[Dropout | None, Dropout | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def linear(out: int, width: int, drop: Dropout | None) -> LowRankLinear:
        A, B = randn(4, width, grad=True), randn(out, 4, grad=True)
        return LowRankLinear(randn(out, width), None, A, B, 2.0, drop=drop)

    parts = linear(40, 16, drops[0]), linear(40, 16, drops[0]), linear(16, 40, drops[1])
    x = randn(2, 23, 16, grad=True)
    leaves = [x, *(t for p in parts for t in (p.A, p.B))]
    upstream = randn(2, 23, 16)

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (40,) and result.shape[0] != 16:
                self.rows = max(self.rows, len(result))
            return result

    def compute(recompute: bool) -> tuple[list[Tensor], int]:
        with Largest() as largest:
            y = gated_mlp(rms_norm(x, torch.ones(16, dtype=DOUBLE), 1e-6), *parts, recompute=recompute)
            return [y.detach(), *torch.autograd.grad(y, leaves, upstream)], largest.rows

    whole, all_rows = compute(recompute=False)
    monkeypatch.setattr("veneer.kernels.gated_mlp.TILE", 10)
    tiled, few_rows = compute(recompute=True)
    for got, want in zip(tiled, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (all_rows, few_rows) == (46, 10)


@pytest.mark.parametrize("apart", [False, True])
def test_of_a_sum_whose_part_is_kept_anyway_the_parts_are_kept(apart: bool) -> None:
    x, residual, weight = randn(5, 16, grad=True), randn(5, 16, grad=True), randn(16)
    A, B, W = randn(4, 16, grad=True), randn(16, 4, grad=True), randn(16, 16)
    saved: set[int] = set()

    def note(t: Tensor) -> Tensor:
        saved.add(t.data_ptr())
        return t

    part = is_kept(x * 1) if apart else x * 1
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        total, y = add_rms_norm(part, residual, weight, 1e-5)
        out = total + lora_linear(y, W, None, A, B, 2.0)
    assert {t.data_ptr() in saved for t in (part, residual)} == {apart}
    assert (total.data_ptr() in saved) is not apart
    assert y.data_ptr() not in saved
    upstream = randn(5, 16)
    plain = residual + part
    want = plain + lora_linear_reference(rms_norm_reference(plain, weight, 1e-5), W, None, A, B, 2.0)
    leaves = (x, residual, A, B)
    grads = (torch.autograd.grad(t, leaves, upstream, retain_graph=True) for t in (out, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_an_output_of_a_norm_that_was_changed_is_kept_as_it_is() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    y = rms_norm(x * 1, torch.ones(16), 1e-5)
    assert Kept.of(y).rows is not y
    with torch.no_grad():
        y.mul_(2)
    assert Kept.of(y).rows is y
