"""AdamW with its moments in 8 bits: the steps are bitsandbytes', without its huge ones."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from veneer.quant.blockwise import quantize_blockwise
from veneer.train import optimizer, optimizer_update
from veneer.train.optimizer import FlatAdamW
from veneer.train.optimizer_update import BLOCK

SHAPES = [(100, 33), (5,), (31, 110), (1,), (2, 3, 4), (1000,)]
STEPS, RATE, DECAY = 20, 0.01, 0.1


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]


def trained(optim: str) -> tuple[FlatAdamW, list[nn.Parameter]]:
    """The optimizer and the parameters after all steps."""
    named = parameters()
    flat = FlatAdamW(named, optim=optim, weight_decay=DECAY)
    for step in range(STEPS):
        for view, gradient in zip(flat.grad_views, gradients(step)):
            view.copy_(gradient)
        flat.step(RATE)
    return flat, [p for _, p in named]


def trained_by_bitsandbytes() -> list[nn.Parameter]:
    optim = pytest.importorskip("bitsandbytes").optim
    tensors = [p for _, p in parameters()]
    groups = [
        {"params": [p for p in tensors if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in tensors if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = optim.AdamW8bit(groups, lr=RATE, min_8bit_size=0)
    for step in range(STEPS):
        for p, gradient in zip(tensors, gradients(step)):
            p.grad = gradient
        theirs.step()
    return tensors


def joined(tensors: list[nn.Parameter]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def test_steps_are_those_of_bitsandbytes_to_the_bit_where_the_codes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it looks codes up on a coarse grid, and it rounds small variances to zero: so do we, for this test."""
    monkeypatch.setattr(optimizer_update, "quantize_blockwise", functools.partial(quantize_blockwise, grid=True))
    monkeypatch.setattr(optimizer_update, "at_least_one", lambda codes, variance: codes)
    ours, theirs = joined(trained("adamw_8bit")[1]), joined(trained_by_bitsandbytes())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_steps_are_those_of_bitsandbytes_to_half_a_percent_with_its_own_codes() -> None:
    ours, start = joined(trained("adamw_8bit")[1]), joined([p for _, p in parameters()])
    theirs = joined(trained_by_bitsandbytes())
    assert rms(ours - theirs) < 0.005 * rms(theirs - start)


def test_eight_bits_cost_two_percent_of_the_way() -> None:
    start = joined([p for _, p in parameters()])
    whole, small = (joined(trained(optim)[1]) for optim in ("adamw", "adamw_8bit"))
    assert 0 < rms(small - whole) < 0.02 * rms(whole - start)
    assert float((small - whole).abs().max()) < RATE, "less than one step, after twenty"


def test_a_variance_far_below_its_blocks_largest_makes_no_huge_step() -> None:
    """Within a block the gradients' sizes differ by up to 10^5, and each element's varies from step to step."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(2 * torch.randn(64, 256, generator=generator))
    flat = FlatAdamW([("p", nn.Parameter(torch.zeros(64, 256)))], optim="adamw_8bit")
    for _ in range(50):
        before = flat.flat.clone()
        flat.grad_views[0].copy_(0.01 * sizes * torch.randn(64, 256, generator=generator))
        flat.step(RATE)
        assert float((flat.flat - before).abs().max()) < 3 * RATE


def test_the_state_takes_two_bytes_a_parameter_and_eight_a_block() -> None:
    named = [("p", nn.Parameter(torch.zeros(64, 256)))]
    state = FlatAdamW(named, optim="adamw_8bit").state()
    size = sum(tensor.nbytes for name, tensor in state.items() if name != "steps")
    assert size == 64 * 256 * (2 + 8 / BLOCK)
    assert (
        FlatAdamW(named, optim="adamw_8bit").description == "train.optim adamw_8bit: 0.0 MB of optimizer state on cpu"
    )


def test_the_size_of_the_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = trained("adamw_8bit")
    monkeypatch.setattr(optimizer, "PART", 2 * BLOCK)
    parts, _ = trained("adamw_8bit")
    assert torch.equal(whole.flat, parts.flat)
    assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), parts.state().values()))


def test_a_tensor_shares_no_block_with_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside gradients 10^6 times larger, in one block, a tensor's variance would be rounded to zero."""

    def run(others: float) -> Tensor:
        named = [("large", nn.Parameter(torch.ones(3, 5))), ("small", nn.Parameter(torch.ones(3, 5)))]
        flat = FlatAdamW(named, optim="adamw_8bit")
        for _ in range(5):
            flat.grad_views[0].fill_(others)
            flat.grad_views[1].copy_(torch.linspace(1e-6, 2e-6, 15).view(3, 5))
            flat.step(0.01)
        return named[1][1].detach().clone()

    assert torch.equal(run(1.0), run(1e-6))
