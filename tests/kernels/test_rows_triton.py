"""The Triton kernels of what lies between products: under Triton's interpreter everywhere, and on a GPU.

The interpreter must be wanted before triton is imported: ``make test-kernels``, a part of ``make test``.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from native_pairs import assert_near, both
from torch import Tensor, nn

from veneer.kernels import native
from veneer.kernels.dropout import Dropout
from veneer.kernels.gated_mlp import _gated, _gated_grads
from veneer.kernels.linear_cross_entropy import linear_cross_entropy
from veneer.kernels.qkv_rope import _turn
from veneer.kernels.rms_norm import add_rms_norm, rms_norm

BF16, FLOAT = torch.bfloat16, torch.float32
ROUNDING = {BF16: 1e-2, FLOAT: 2e-6}


def same_bits(dtype: torch.dtype, device: str) -> float:
    """The tolerance where a GPU gives PyTorch's bits: the interpreter cuts bfloat16 off where a GPU rounds."""
    return 2e-2 if dtype == BF16 and device == "cpu" else 0.0


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """The kernels in small programs."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set: make test-kernels")
    module: Any = importlib.import_module("veneer.kernels.rows_triton")
    module.WORDS, module.FLAT = 64, 32
    return module  # type: ignore[no-any-return]  # Any, so that its sizes can be set


@pytest.fixture(params=["interpreter", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where operations take the Triton code: on the CPU with the interpreter, or on a GPU."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("there is no NVIDIA GPU")
        yield "cuda"
        return
    module = request.getfixturevalue("interpreted")

    def can_take(*tensors: Tensor, function: str = "") -> bool:
        plain = all(type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in tensors)
        return native._wanted and plain and (not function or hasattr(module, function))

    monkeypatch.setattr(native, "can_take", can_take)
    monkeypatch.setattr(native, "call", lambda name, *arguments: getattr(module, name)(*arguments))
    yield "cpu"


def assert_same(compute: Callable[[], list[Tensor]], tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels give is what PyTorch gives, to rounding."""
    for got, want in both(monkeypatch, compute):
        assert_near(got, want, tolerance)


@pytest.mark.parametrize("dtype", [BF16, FLOAT])
class TestTheSameNumbers:
    @pytest.mark.parametrize("shape", [(7, 33), (2, 5, 64), (1, 1)])
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_rms_norm(
        self, shape: tuple[int, ...], offset: float, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        x, dy, residual, dtotal = (torch.randn(shape).to(device, dtype) for _ in range(4))
        weight = torch.rand(shape[-1]).to(device, dtype)

        def compute() -> list[Tensor]:
            leaf, other = x.clone().requires_grad_(), residual.clone().requires_grad_()
            y = rms_norm(leaf, weight, 1e-5, offset)
            total, normed = add_rms_norm(leaf, other, weight, 1e-5, offset)
            grads = torch.autograd.grad((total, normed), (leaf, other), (dtotal, dy))
            return [y.detach(), *torch.autograd.grad(y, leaf, dy), total.detach(), normed.detach(), *grads]

        assert_same(compute, ROUNDING[dtype], monkeypatch)

    @pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
    def test_gated_product(self, act: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        e, g, dm = torch.randn(3, 7, 33).to(device, dtype).unbind()
        e[0, :5] = torch.tensor([0.0, -30.0, 30.0, -1000.0, 1000.0])
        assert_same(lambda: [_gated(act, e, g), *_gated_grads(act, e, g, dm.clone())], ROUNDING[dtype], monkeypatch)

    @pytest.mark.parametrize("scale", [1.0, 0.25])
    @pytest.mark.parametrize("words", [5, 64, 301])  # less than a piece, one whole, and several with a rest
    def test_cross_entropy(
        self, words: int, scale: float, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        hidden, weight = torch.randn(9, 16).to(device, dtype), torch.randn(words, 16).to(device, dtype)
        targets = torch.randint(words, (9,), device=device)
        targets[0] = -100
        targets[1] = int((hidden[1].float() @ weight.float().T).argmax())

        def compute() -> list[Tensor]:
            leaf = hidden.clone().requires_grad_()
            found = linear_cross_entropy(leaf, weight, targets, logit_scale=scale)
            (grad,) = torch.autograd.grad(found.nll @ torch.arange(1.0, 9.0, device=device), leaf)
            return [found.nll.detach(), found.correct.float(), grad]

        assert_same(compute, ROUNDING[dtype], monkeypatch)

    @pytest.mark.parametrize(("heads", "size"), [(3, 10), (9, 64)])
    def test_rotation(
        self, heads: int, size: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        u = torch.randn(11, heads, size).to(device, dtype).transpose(0, 1)
        angle = torch.rand(11, size // 2).repeat(1, 2)
        cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)

        def compute() -> list[Tensor]:
            there = _turn(u, cos, sin, torch.empty(heads, 11, size, dtype=dtype, device=device))
            back = torch.empty(11, heads, size, dtype=dtype, device=device)
            _turn(there, cos, sin, back.transpose(0, 1), back=True)
            return [there, back]

        assert_same(compute, max(same_bits(dtype, device), 1e-6 if dtype == FLOAT else 0.0), monkeypatch)

    @pytest.mark.parametrize("seed", [0, 77 * 2**33 + 5, 2**62 - 1])
    @pytest.mark.parametrize("rows", [0, 3, 2**32 // 17])
    def test_dropout_has_the_same_mask(
        self, seed: int, rows: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        x, total = torch.randn(2, 13, 17).to(device, dtype).unbind()
        drop = Dropout(0.3, seed).after(rows)
        assert_same(lambda: [drop.of(x), drop.add(total.clone(), x)], same_bits(dtype, device), monkeypatch)
        assert torch.equal(drop.of(x) != 0, drop.mask(x.numel(), device, rows * 17).view(x.shape))


def test_logits_far_from_zero_and_what_is_no_number(device: str) -> None:
    hidden = torch.tensor([[300.0], [-300.0], [float("nan")]], device=device)
    weight = torch.linspace(-1, 1, 130, device=device)[:, None]
    targets = torch.tensor([129, 129, 3], device=device)
    found = linear_cross_entropy(hidden, weight, targets)
    wide = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    want = -wide.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.nll[:2].double(), want[:2], rtol=1e-5, atol=1e-5)
    assert bool(found.nll[2].isnan())
    assert found.correct.tolist()[:2] == [True, False]


CONSTANTS: dict[str, dict[str, Any]] = {
    "_rms_norm": {"SIZE": 4096, "PLAIN": False, "MORE": True},
    "_rms_norm_back": {"SIZE": 4096, "MORE": True},
    "_cross_entropy": {"GRAD": True, "WORDS": 8192, "PIECES": 16},
    "_turn": {"HALF": 64, "HEADS": 4},
    "_drop": {"ADD": True, "FLAT": 2048},
    "_gate_kernel": {"ACT": "gelu_tanh", "BACK": True, "FLAT": 2048},
}
POINTERS = {"rstd": "*fp32", "nll": "*fp32", "labels": "*i64", "correct": "*u8"}  # the others have the model's dtype
TENSORS = {"more", "total", "dmore", "e", "g", "m", "dg", "again"}
TENSORS |= {"x", "w", "y", "dy", "dx", "z", "source", "out", "cos", "sin"}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_each_kernel_compiles_for_a_gpu(name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module("veneer.kernels.rows_triton"), name)
    constants = CONSTANTS[name]
    types = {}
    for argument in kernel.arg_names:
        whole = "i64" if argument in ("count", "low", "high", "threshold") else "i32"
        number = "fp32" if argument in ("eps", "scale", "sign", "offset") else whole
        kind = "*bf16" if argument in TENSORS else POINTERS.get(argument, number)
        types[argument] = "constexpr" if argument in constants else kind
    given = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    options = {"num_warps": 8, "enable_fp_fusion": False}
    source = ASTSource(kernel, types, given)
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    assert "fma.rn.f32" not in code or name in ("_cross_entropy", "_gate_kernel")  # whose exponential is made of them
    assert not re.search(r"\bld\.local|\bst\.local", code)  # nothing spills


def test_of_words_that_are_as_likely_the_first_is_the_choice(device: str) -> None:
    hidden, weight = torch.zeros(3, 4, device=device), torch.randn(300, 4, device=device)
    for dtype in (FLOAT, BF16):
        found = linear_cross_entropy(hidden.to(dtype), weight.to(dtype), torch.tensor([0, 1, 299], device=device))
        assert found.correct.tolist() == [True, False, False]
