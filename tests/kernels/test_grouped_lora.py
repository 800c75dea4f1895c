"""The experts' products in groups: exact derivatives, the oracle's numbers, and nothing of the size of a stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.kernels import grouped_lora
from veneer.kernels.grouped_lora import Update, group_by_expert, grouped_linear, grouped_linear_reference
from veneer.quant import QuantConfig, quantize

E, IN, OUT, R = 5, 7, 6, 3  # odd sizes; experts 1 and 4 are never chosen in INDEX
INDEX = torch.tensor([[0, 2], [3, 0], [2, 3], [0, 0]])  # the last token has one expert twice
SUBSET = (1, -1, 0, -1, 2)  # experts 2, 0 and 4 have factors, in this order


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(dtype: torch.dtype = torch.float64, tokens: int = 4, k: int = E) -> tuple[Tensor, ...]:
    """``x, weight, bias, A, B`` with E experts, k of which have factors."""
    shapes = ((tokens, IN), (E, OUT, IN), (E, OUT), (k, R, IN), (k, OUT, R))
    x, weight, bias, A, B = (randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    return x, weight, bias, A, B


def layer(
    x: Tensor, A: Tensor, B: Tensor, shares: Tensor, index: Tensor, weight: Any, bias: Any, positions: Any
) -> Tensor:
    """Two stacks with one set of factors each way: gathered rows in the first, sorted rows in the second."""
    groups = group_by_expert(index, E)
    y = grouped_linear(x, groups, weight, bias, (Update(A, B, 0.5, positions),), gather=True).tanh()
    z = grouped_linear(y, groups, weight.mT, None, (Update(B.mT, A.mT, 0.5, positions),), gather=False)
    return groups.summed(z * shares.reshape(-1)[groups.order, None])


@pytest.mark.parametrize("index", [INDEX, INDEX[:1], torch.tensor([[1, 5], [4, 1], [5, 5], [2, 2]])])
@pytest.mark.parametrize("positions", [None, SUBSET])
def test_derivatives_are_exact_for_input_factors_and_gate_weights(index: Tensor, positions: Any) -> None:
    """Also with empty experts, one token, an expert twice, and 5, which is no expert."""
    x, weight, bias, A, B = operands(tokens=len(index), k=E if positions is None else 3)
    shares = randn(*index.shape, seed=9)
    trained = [tensor.clone().requires_grad_() for tensor in (x, A, B, shares)]
    assert torch.autograd.gradcheck(lambda *t: layer(*t, index, weight, bias, positions), trained)


@pytest.mark.parametrize("positions", [None, SUBSET])
def test_it_gives_the_oracles_output_and_gradients(positions: Any) -> None:
    """With two updates, of other experts each."""
    x, weight, bias, A, B = operands(k=E if positions is None else 3)
    groups = group_by_expert(INDEX, E)
    found = []
    for function in (grouped_linear, grouped_linear_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B, A[:1], B[:1])]
        mine, a, b, *more = leaves
        updates = Update(a, b, 1.5, positions), Update(*more, 0.5, (-1, -1, 0, -1, -1))
        y = function(mine, groups, weight, bias, updates, gather=True)
        y.square().sum().backward()
        found.append((y, *(leaf.grad for leaf in leaves)))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_bias_and_a_stack_that_are_trained_get_their_gradients() -> None:
    """As in an own copy of experts (modules_to_save) beside others in codes."""
    x, weight, bias, _, _ = operands()
    groups = group_by_expert(INDEX, E)
    trained = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda a, w, b: grouped_linear(a, groups, w, b, gather=True), trained)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, groups, weight, b, gather=True), trained[::2])


def test_rows_come_back_to_their_tokens() -> None:
    groups = group_by_expert(torch.tensor([[3, 1], [9, 0], [1, 1]]), 4)
    assert groups.counts == (1, 3, 0, 1)
    assert groups.order.tolist() == [3, 1, 4, 5, 0]
    assert groups.experts.tolist() == [0, 1, 1, 1, 3]
    assert groups.ends.tolist() == [1, 4, 4, 5]
    values = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    assert groups.summed(values).flatten().tolist() == [18.0, 1.0, 12.0]


def test_no_routed_pair_gives_no_rows_and_zero_gradients() -> None:
    x, weight, bias, A, B = operands(tokens=2)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    index = torch.full((2, 2), E)
    out = layer(x, A, B, torch.ones(2, 2, dtype=torch.float64), index, weight, bias, None)
    assert torch.equal(out, torch.zeros(2, IN, dtype=torch.float64))
    out.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (x, A, B))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_over_codes_it_is_what_it_is_over_the_decoded_stack(scheme: Any) -> None:
    stack = quantize(randn(E, 16, 64, dtype=torch.float32), QuantConfig(scheme))
    x, A, B = (randn(*s, seed=n, dtype=torch.float32) for n, s in enumerate(((4, 64), (E, R, 64), (E, 16, R))))
    groups = group_by_expert(INDEX, E)
    found = []
    for weight in (stack, stack.dequantize()):
        leaf = x.clone().requires_grad_()
        grouped_linear(leaf, groups, weight, None, (Update(A, B, 1.0),), gather=True).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_factors_keep_their_float32_under_bfloat16_activations_and_so_do_their_gradients() -> None:
    x, weight, bias, _, _ = operands(torch.bfloat16)
    _, _, _, A, B = operands(torch.float32)
    wide = [tensor.float() for tensor in (x, weight, bias)]
    groups = group_by_expert(INDEX, E)
    found = []
    for flat, w, b in ((x, weight, bias), wide):
        factors = [A.clone().requires_grad_(), B.clone().requires_grad_()]
        y = grouped_linear(flat, groups, w, b, (Update(*factors, 1.0),), gather=True)
        assert y.dtype == flat.dtype
        y.sum().backward()
        found.append([factor.grad for factor in factors])
    for got, expected in zip(*found):
        assert got is not None
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.01 * expected.norm()  # bfloat16 has 8 bits


@pytest.mark.parametrize("positions", [None, SUBSET])
def test_one_kernel_over_all_groups_gives_what_the_loop_gives(positions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on NVIDIA GPUs, on the CPU's implementation of the same operation."""
    k = E if positions is None else 3
    shapes = ((4, 16), (E, 8, 16), (E, 8), (k, 8, 16), (k, 8, 8))
    x, weight, bias, A, B = (randn(*s, seed=n, dtype=torch.float32) for n, s in enumerate(shapes))
    groups = group_by_expert(INDEX, E)
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(grouped_lora, "has_kernel", lambda *_, kernel=kernel: kernel)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        update = Update(leaves[1], leaves[2], 0.5, positions)
        y = grouped_linear(leaves[0], groups, weight, bias, (update,), gather=True)
        y.square().sum().backward()
        found.append((y, *(leaf.grad for leaf in leaves)))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_nothing_but_the_input_and_the_rank_sized_product_is_kept_for_the_backward() -> None:
    x, weight, bias, A, B = operands()
    A.requires_grad_()
    groups = group_by_expert(INDEX, E)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        grouped_linear(x, groups, weight, bias, (Update(A, B, 1.0),), gather=True)
    own = {tensor.data_ptr() for tensor in (x, A, B)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(8, R)]


def test_in_bfloat16_an_update_smaller_than_the_products_rounding_is_not_lost() -> None:
    """Added to a product that is rounded already, most of it would be."""
    shapes = ((64, 64), (E, 48, 64), (E, 8, 64), (E, 48, 8))
    x, weight, A, B = (randn(*shape, seed=seed, dtype=torch.bfloat16) for seed, shape in enumerate(shapes))
    index = torch.randint(E, (64, 2), generator=torch.Generator().manual_seed(0))
    groups = group_by_expert(index, E)
    small = Update(A.float(), 1e-4 * B.float(), 1.0)  # a thirtieth of the product's rounding
    base, got = (grouped_linear(x, groups, weight, None, u, gather=True).float() for u in ((), (small,)))
    none = torch.zeros_like(weight, dtype=torch.float32)
    exact = grouped_linear(x.float(), groups, none, None, (small,), gather=True)
    # No element can show it, but all of them together do: how much of it is there, along itself.
    share = float(((got - base) * exact).sum() / exact.square().sum())
    rounded_before = base.bfloat16().add(exact.bfloat16()).float()
    lost = float(((rounded_before - base) * exact).sum() / exact.square().sum())
    assert share == pytest.approx(1.0, abs=0.15), lost
    assert lost < 0.5
