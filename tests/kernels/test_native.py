"""The native code: the same numbers as the PyTorch code beside it, and what happens where it cannot be made."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_pairs import assert_near, both
from torch import Tensor

from veneer.errors import UsageError
from veneer.kernels import native
from veneer.kernels.attention import document_attention, document_attention_reference
from veneer.kernels.gated_mlp import _gated, _gated_grads, _Scaled, activation
from veneer.kernels.linear_cross_entropy import TokenLosses, linear_cross_entropy
from veneer.kernels.lora_linear import row_scale_grads
from veneer.kernels.qkv_rope import _turn
from veneer.kernels.rms_norm import add_rms_norm, rms_norm

BF16, FLOAT = torch.bfloat16, torch.float32
ROUNDING = {BF16: 1e-2, FLOAT: 2e-6}

needs_native = pytest.mark.skipif(native.library() is None, reason=native.description())


def ours() -> Path:
    return native.built(sorted(native.SOURCES.iterdir()), native.FLAGS, native.LINK)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@needs_native
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [BF16, FLOAT])
class TestTheSameNumbers:
    @pytest.mark.parametrize("shape", [(7, 33), (2, 5, 64), (1, 17)])
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_rms_norm(
        self, dtype: torch.dtype, shape: tuple[int, ...], offset: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, dy, residual, dtotal = (torch.randn(shape).to(dtype) for _ in range(4))
        weight = torch.rand(shape[-1]).to(dtype)

        def compute() -> list[Tensor]:
            leaf, other = x.clone().requires_grad_(), residual.clone().requires_grad_()
            y = rms_norm(leaf, weight, 1e-5, offset)
            total, normed = add_rms_norm(leaf, other, weight, 1e-5, offset)
            grads = torch.autograd.grad((total, normed), (leaf, other), (dtotal, dy))
            return [y.detach(), *torch.autograd.grad(y, leaf, dy), total.detach(), normed.detach(), *grads]

        for got, want in both(monkeypatch, compute):
            assert_near(got, want, ROUNDING[dtype])

    @pytest.mark.parametrize(("rows", "width"), [(1, 5), (64, 96), (150, 200)])
    @pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
    @pytest.mark.parametrize("scaled", [(True, True), (True, False), (False, True)])
    def test_gated_product_of_scaled_columns(
        self, dtype: torch.dtype, rows: int, width: int, act: str, scaled: tuple[bool, bool]
    ) -> None:
        e, g, dm = torch.randn(3, rows, width).to(dtype).unbind()
        k = [(0.2 * torch.randn(width)).to(dtype) if has else None for has in scaled]
        for less_one in k:
            if less_one is not None:
                less_one[3] = -1  # a scale of zero
        ours = _Scaled(act, e, *k)
        assert _Scaled.takes(act, e, (k[0], k[1]), (None, None))
        wide = [t.double().requires_grad_() for t in (e, g)]
        scales = [torch.ones(width).double() if t is None else t.double() + 1 for t in k]
        scales = [t.requires_grad_() for t in scales]
        want = activation(act, wide[0] * scales[0]) * (wide[1] * scales[1])
        want.backward(dm.double())
        assert_near(ours.product(e, g).double(), want.detach(), ROUNDING[dtype])
        de, dg, again, *sums = ours.grads(e, g, dm.clone())
        assert torch.equal(again, ours.product(e, g))
        for got, leaf in ((de, wide[0]), (dg, wide[1])):
            assert_near(got.double(), leaf.grad, 2 * ROUNDING[dtype])
        for got, scale, has in zip(sums, scales, scaled):
            assert (got is not None) is has
            if got is not None:
                assert_near(got.double(), scale.grad, 2 * ROUNDING[dtype])

    @pytest.mark.parametrize(("rows", "width"), [(1, 5), (64, 96), (150, 200)])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_gradients_of_a_row_scale(
        self, dtype: torch.dtype, rows: int, width: int, in_place: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dy, z = (torch.randn(rows, width).to(dtype) for _ in range(2))
        less_one = (0.1 * torch.randn(width)).to(dtype)
        less_one[3] = -1  # a scale of zero

        def compute() -> list[Tensor]:
            given = dy.clone()
            scaled, dg = row_scale_grads(given, z, less_one, in_place=in_place)
            assert dg is not None
            assert (scaled is given) == in_place
            assert in_place or torch.equal(given, dy)
            return [scaled, dg]

        for got, want in both(monkeypatch, compute):
            assert_near(got, want, ROUNDING[dtype])

    @pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
    @pytest.mark.parametrize("shape", [(1, 5), (33, 70)])
    def test_gated_product(
        self, dtype: torch.dtype, shape: tuple[int, int], act: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        e, g, dm = (torch.randn(shape).to(dtype) for _ in range(3))
        e[0, :5] = torch.tensor([0.0, -30.0, 30.0, -1000.0, 1000.0])

        def compute() -> list[Tensor]:
            m, found = _gated(act, e, g), _gated_grads(act, e, g, dm.clone())
            assert torch.equal(found[2], m)
            return [m, *found[:2]]

        for got, want in both(monkeypatch, compute):
            assert_near(got, want, ROUNDING[dtype])
            assert_near(got[0, :5], want[0, :5], ROUNDING[dtype])

    @pytest.mark.parametrize("scale", [1.0, 0.25])
    @pytest.mark.parametrize(("rows", "words"), [(5, 301), (70, 4099)])
    def test_cross_entropy(
        self, dtype: torch.dtype, rows: int, words: int, scale: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hidden, weight = torch.randn(rows, 16).to(dtype), torch.randn(words, 16).to(dtype)
        targets = torch.randint(words, (rows,))
        targets[0] = -100
        # A row whose target is its first choice, so that `correct` has both values.
        targets[1] = int((hidden[1].float() @ weight.float().T).argmax())

        def compute() -> list[Tensor]:
            leaf = hidden.clone().requires_grad_()
            found: TokenLosses = linear_cross_entropy(leaf, weight, targets, logit_scale=scale)
            weights = torch.arange(1.0, rows)
            return [found.nll.detach(), found.correct.float(), *torch.autograd.grad(found.nll @ weights, leaf)]

        for got, want in both(monkeypatch, compute):
            assert_near(got, want, ROUNDING[dtype])

    def test_rotation_gives_the_same_bits(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        u = torch.randn(11, 3, 10).to(dtype).transpose(0, 1)
        angle = torch.rand(11, 5).repeat(1, 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

        def compute() -> list[Tensor]:
            there = _turn(u, cos, sin, torch.empty(3, 11, 10, dtype=dtype))
            back = torch.empty(11, 3, 10, dtype=dtype)
            _turn(there, cos, sin, back.transpose(0, 1), back=True)
            return [there, back]

        for got, want in both(monkeypatch, compute):
            assert torch.equal(got, want) if dtype == BF16 else torch.allclose(got, want, atol=1e-6)

    @pytest.mark.parametrize("window", [None, 1, 5, 400])
    @pytest.mark.parametrize("prefix", [0, 9])
    @pytest.mark.parametrize("size", [8, 16, 80])  # the last two are whole vectors, and 80 no whole block of them
    def test_attention(
        self, dtype: torch.dtype, window: int | None, prefix: int, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lengths = (9, 300, 1, 40)  # one longer than a tile
        q, k, v = (torch.randn(heads, sum(lengths), size).to(dtype) for heads in (4, 2, 2))
        dout = torch.randn(4, sum(lengths), size).to(dtype)

        def compute() -> list[Tensor]:
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = document_attention(*leaves, lengths, 0.35, window=window, prefix=prefix)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        found = both(monkeypatch, compute)
        for got, want in found:
            if want.any():
                assert_near(got, want, 2 * ROUNDING[dtype])
            else:  # the weight of a single key is one whatever its score: no gradient but what rounding leaves
                assert window == 1
                assert got.abs().max() <= ROUNDING[dtype] * 1e-2

    @pytest.mark.parametrize("prefix", [0, 100])
    @pytest.mark.parametrize("window", [None, 600])
    def test_attention_of_more_keys_than_are_taken_at_once(
        self, dtype: torch.dtype, window: int | None, prefix: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lengths = (100, 1200, 513)  # the second is split by heads
        q, k, v = (torch.randn(heads, sum(lengths), 32).to(dtype) for heads in (6, 2, 2))
        q[:, 500:] *= 4  # later keys have larger scores
        dout = torch.randn(sum(lengths), 6, 32).to(dtype).transpose(0, 1)

        def compute() -> list[Tensor]:
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = document_attention(*leaves, lengths, 0.2, window=window, prefix=prefix)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        for got, want in both(monkeypatch, compute):
            assert_near(got, want, 2 * ROUNDING[dtype])


@needs_native
def test_attention_gives_the_same_bits_on_any_number_of_threads() -> None:
    lengths = (30, 200, 7, 90, 1100)
    q, k, v = (torch.randn(heads, sum(lengths), 32).to(BF16).requires_grad_() for heads in (6, 2, 2))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = document_attention(q, k, v, lengths, 0.2, prefix=30)
        found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_native
@pytest.mark.skipif(not native.can_take(torch.ones(1, dtype=BF16), function="attention"), reason="no AVX512-BF16")
def test_attention_in_16_bits_is_nearer_to_float32_than_its_pytorch_code() -> None:
    lengths = (40, 300, 120)
    q, k, v = (torch.randn(heads, sum(lengths), 64).to(BF16) for heads in (6, 2, 2))
    wide = document_attention_reference(q.float(), k.float(), v.float(), lengths, 0.125, prefix=40)

    def error() -> float:
        return float((document_attention(q, k, v, lengths, 0.125, prefix=40).float() - wide).norm() / wide.norm())

    ours = error()
    with native.left_out():
        assert ours < 0.8 * error()
    assert ours < 4e-3


@needs_native
def test_what_is_not_a_number_stays_so() -> None:
    for bits in (0x7FC00000, 0x7FFFFFFF, -1):  # the last two would round up into an infinity or a zero
        x = torch.tensor([[bits]], dtype=torch.int32).view(FLOAT).expand(1, 8).contiguous()
        assert rms_norm(x, torch.ones(8), 1e-5).isnan().all()
        assert rms_norm(x.to(BF16), torch.ones(8, dtype=BF16), 1e-5).isnan().all()
    e, g = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan])
    for act in ("silu", "gelu_tanh"):
        assert _gated(act, e, g).isnan().all()
        de, dg, _ = _gated_grads(act, e, g, torch.ones(2))
        assert de.isnan().all()
        assert dg[0].isnan()
    hidden = torch.full((1, 4), math.nan, dtype=BF16, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(50, 4).to(BF16), torch.tensor([3])).nll.sum()
    assert loss.isnan()
    assert torch.autograd.grad(loss, hidden)[0].isnan().all()


@needs_native
def test_scores_and_logits_far_from_zero_do_not_overflow() -> None:
    hidden = torch.tensor([[100.0, 0.0]], dtype=BF16)
    weight = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [2.0, 0.0]], dtype=BF16)
    assert linear_cross_entropy(hidden, weight, torch.tensor([0])).nll.tolist() == [0.0]
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])).nll.tolist() == [600.0]


@needs_native
def test_only_plain_contiguous_tensors_of_one_dtype_are_taken() -> None:
    x = torch.randn(4, 6)
    assert native.can_take(x, torch.nn.Parameter(x), function="drop")
    assert not native.can_take(x.T, function="drop")
    assert not native.can_take(x, x.to(BF16), function="drop")
    assert not native.can_take(x.double(), function="drop")
    assert not native.can_take(x.to("meta"), function="drop")


class TestWithoutTheLibrary:
    @pytest.fixture(autouse=True)
    def _afresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("VENEER_KERNELS", raising=False)
        native._found.cache_clear()
        yield
        native._found.cache_clear()

    def works_without(self) -> str:
        assert native.library() is None
        assert torch.allclose(rms_norm(torch.ones(2, 8), torch.ones(8), 0.0), torch.ones(2, 8))
        return native.description()

    @pytest.mark.parametrize("refused", [False, True])
    def test_a_unit_for_tiles_that_linux_refuses_is_compiled_without(
        self, refused: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags: list[str] = []

        def built(_: object, given: tuple[str, ...], link: object) -> Path:
            flags.extend(given)
            raise native.Missing("not here")

        monkeypatch.setattr(native, "built", built)
        monkeypatch.setattr(native, "_processor", lambda: "flags: avx512f amx_tile amx_bf16")
        monkeypatch.setattr(native, "_ask_linux_for_tiles", lambda: not refused)
        assert self.works_without() == "PyTorch alone: not here"
        assert ("-mno-amx-tile" in flags) == refused

    def test_it_can_be_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VENEER_KERNELS", "torch")
        assert self.works_without() == "PyTorch alone: VENEER_KERNELS=torch"

    @pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
    def test_some_functions_can_be_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(8)

        def calls() -> int:
            before = native.calls
            (grad,) = torch.autograd.grad(rms_norm(x, weight, 0.0), x, torch.ones(2, 8))
            torch.testing.assert_close(grad, torch.zeros(2, 8), rtol=0, atol=1e-6)
            return native.calls - before

        assert calls() == 2
        monkeypatch.setenv("VENEER_KERNELS", "torch:turn")
        assert calls() == 2
        monkeypatch.setenv("VENEER_KERNELS", "torch:turn, rms_norm")
        assert calls() == 0
        assert native.can_take(weight, function="gate_silu")
        assert native.description() == "native code beside PyTorch, but for turn, rms_norm (VENEER_KERNELS)"

    @pytest.mark.parametrize(
        ("setting", "said"),
        [("torhc", "'torhc' is no setting"), ("torch:norm", "no function is called 'norm'"), ("torch:", "called ''")],
    )
    def test_another_setting_is_refused(self, setting: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VENEER_KERNELS", setting)
        with pytest.raises(UsageError, match=said) as failure:
            rms_norm(torch.ones(2, 8), torch.ones(8), 0.0)
        assert "rms_norm" in str(failure.value)

    @pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
    @pytest.mark.skipif(os.environ.get("VENEER_KERNELS") == "torch", reason="VENEER_KERNELS=torch")
    def test_where_there_is_a_compiler_there_is_a_library(self) -> None:
        assert native.library() is not None, native.description()

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setenv("CXX", "")
        assert self.works_without() == "PyTorch alone: no C++ compiler"

    def test_a_compiler_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = tmp_path / "broken-c++"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such flag" >&2; exit 1; }\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        assert self.works_without() == "PyTorch alone: broken-c++ failed: no such flag"
        assert list((tmp_path / "cache" / "kernels").iterdir()) == []

    def test_a_library_that_cannot_be_loaded(self) -> None:
        made = ours()
        made.write_bytes(b"not a library")
        assert "PyTorch alone: " in self.works_without()

    def test_a_cache_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file is in the way")
        assert "PyTorch alone: " in self.works_without()

    @needs_native
    def test_it_is_compiled_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = ours()
        written = first.stat().st_mtime_ns
        ran: list[tuple[str, ...]] = []
        output = native._output
        monkeypatch.setattr(native, "_output", lambda *command: (ran.append(command), output(*command))[1])
        assert ours() == first
        assert first.stat().st_mtime_ns == written
        assert [command[1:] for command in ran] == [("--version",)]
        assert [path.name for path in first.parent.iterdir()] == [first.name]
        assert os.access(first, os.R_OK)


@pytest.mark.parametrize("wrong", [5, 500_000_000, -1])
def test_a_target_beyond_the_head_is_refused(wrong: int) -> None:
    with pytest.raises(IndexError, match="the head has 5 words"):
        linear_cross_entropy(torch.randn(2, 8), torch.randn(5, 8), torch.tensor([wrong, 1]))


def test_of_words_that_are_as_likely_the_first_is_the_choice() -> None:
    hidden, weight = torch.zeros(3, 4), torch.randn(300, 4)
    for dtype in (FLOAT, BF16):
        found = linear_cross_entropy(hidden.to(dtype), weight.to(dtype), torch.tensor([0, 1, 299]))
        assert found.correct.tolist() == [True, False, False]
