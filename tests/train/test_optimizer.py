"""The flat AdamW is AdamW, and its views stay where they are, however its moments are kept."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.errors import RecipeError, TrainError
from veneer.train.optimizer import OPTIMIZERS, FlatAdamW

OWN = [name for name, kind in OPTIMIZERS.items() if not kind.bitsandbytes]


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.B": (7, 3), "a.bias": (5,), "b.A": (3, 11), "scale": (1,), "embed": (2, 3, 4)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def add_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    """Through autograd, as in training: the gradients are accumulated into what is there."""
    generator = torch.Generator().manual_seed(100 + step)
    for _, p in named:
        (p * torch.randn(p.shape, generator=generator)).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_torch_adamw_with_decay_on_matrices_only(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    groups = [
        {"params": [p for _, p in theirs if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in theirs if p.dim() < 2], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False)
    for step in range(8):
        rate = 0.1 / (step + 1)
        flat.zero_grad()
        oracle.zero_grad()
        for _ in range(3):  # accumulation
            add_gradients(ours, step)
            add_gradients(theirs, step)
        norm = flat.finish_gradient(3.0, 2.0)
        for _, p in theirs:
            assert p.grad is not None
            p.grad.div_(3.0)
        expected = nn.utils.clip_grad_norm_([p for _, p in theirs], 2.0)
        assert norm == pytest.approx(float(expected), rel=1e-6)
        assert norm > 2.0, "the clipping must be in play"
        flat.step(rate)
        for group in oracle.param_groups:
            group["lr"] = rate
        oracle.step()
        for (name, a), (_, b) in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7, msg=name)


def test_one_step_follows_the_formula() -> None:
    p = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    flat = FlatAdamW([("p", p)], betas=(0.9, 0.99), eps=0.0, weight_decay=0.5)
    p.grad.copy_(torch.tensor([[0.3, -4.0]]))  # type: ignore[union-attr]
    flat.finish_gradient(1.0, None)
    flat.step(0.1)
    # The first step of Adam is lr * sign(g); the decay comes first and is lr * wd * p.
    torch.testing.assert_close(p.detach(), torch.tensor([[1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]]))


@pytest.mark.parametrize("optim", OWN)
def test_parameters_and_gradients_are_views_and_shapes_and_values_stay(optim: str) -> None:
    named = parameters()
    before = [p.detach().clone() for _, p in named]
    flat = FlatAdamW(named, optim=optim)
    for (_, p), old in zip(named, before):
        assert torch.equal(p, old)
        assert p.untyped_storage().data_ptr() == flat.flat.untyped_storage().data_ptr()
    add_gradients(named, 0)
    assert flat.grad.count_nonzero() == sum(p.numel() for _, p in named)
    flat.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for _, p in named)


def test_a_gradient_that_left_the_buffer_is_an_error_and_not_silence() -> None:
    named = parameters()
    flat = FlatAdamW(named)
    named[2][1].grad = None
    with pytest.raises(TrainError) as caught:
        flat.finish_gradient(1.0, None)
    assert caught.value.where == "b.A"


@pytest.mark.parametrize("optim", OWN)
def test_state_moves_to_another_optimizer_bit_for_bit(optim: str, tmp_path: Path) -> None:
    def steps(flat: FlatAdamW, named: list[tuple[str, nn.Parameter]], numbers: range) -> None:
        for step in numbers:
            flat.zero_grad()
            add_gradients(named, step)
            flat.finish_gradient(1.0, 1.0)
            flat.step(0.01)

    whole = parameters()
    one = FlatAdamW(whole, optim=optim)
    steps(one, whole, range(6))

    first = parameters()
    two = FlatAdamW(first, optim=optim)
    steps(two, first, range(3))
    second = [(name, nn.Parameter(p.detach().clone())) for name, p in first]
    three = FlatAdamW(second, optim=optim)
    assert three.layout == two.layout
    save_file(two.state(), tmp_path / "optimizer.safetensors")
    three.load_state(load_file(tmp_path / "optimizer.safetensors"))
    steps(three, second, range(3, 6))
    for (_, a), (_, b) in zip(whole, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optim", OWN)
def test_the_state_before_the_first_step_can_be_saved_and_loaded(optim: str) -> None:
    def one_step(load: bool) -> list[Tensor]:
        named = parameters()
        flat = FlatAdamW(named, optim=optim)
        if load:
            flat.load_state(FlatAdamW(parameters(), optim=optim).state())
        add_gradients(named, 0)
        flat.finish_gradient(1.0, None)
        flat.step(0.01)
        return [p.detach().clone() for _, p in named]

    assert all(torch.equal(a, b) for a, b in zip(one_step(False), one_step(True)))


def test_the_layout_changes_with_names_and_shapes() -> None:
    named = parameters()
    layout = FlatAdamW(named).layout
    assert FlatAdamW(parameters(1)).layout == layout, "values do not matter"
    assert FlatAdamW([("x" + name, p) for name, p in parameters()]).layout != layout
    assert FlatAdamW(parameters()[:-1]).layout != layout


@pytest.mark.parametrize("optim", OWN)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_is_named(bad: float, optim: str) -> None:
    named = parameters()
    flat = FlatAdamW(named, optim=optim)
    add_gradients(named, 0)
    named[3][1].grad.fill_(bad)  # type: ignore[union-attr]
    assert not math.isfinite(flat.finish_gradient(1.0, 1.0))
    assert flat.nonfinite_gradients() == ["scale"]


def test_nothing_to_train_and_half_precision_are_refused() -> None:
    with pytest.raises(TrainError, match="nothing to train"):
        FlatAdamW([])
    with pytest.raises(TrainError, match="must be float32"):
        FlatAdamW([("p", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))])


def test_a_state_of_another_kind_or_size_is_refused() -> None:
    flat = FlatAdamW(parameters())
    with pytest.raises(TrainError, match="not one of 'adamw'") as caught:
        flat.load_state(FlatAdamW(parameters(), optim="adamw_8bit").state())
    assert "train.optim" in str(caught.value.fix)
    with pytest.raises(TrainError, match="does not fit the adapter"):
        flat.load_state(FlatAdamW(parameters()[:-1]).state())


def test_an_unknown_optimizer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="unknown optimizer 'adamw8bit'") as caught:
        FlatAdamW(parameters(), optim="adamw8bit")
    assert "'adamw_8bit'" in str(caught.value.fix)
