"""bitsandbytes' optimizer behind our interface: what it computes is its own, what it keeps has our names."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from veneer.errors import RecipeError
from veneer.train.optimizer import FlatAdamW, check_optimizer
from veneer.train.optimizer_bnb import BitsandbytesAdamW
from veneer.train.optimizer_memory import Part

GROUPS = [Part(0, 1024, 0.1), Part(1024, 1280, 0.0)]


def drawn(seed: int) -> Tensor:
    return torch.randn(1280, generator=torch.Generator().manual_seed(seed))


def made(flat: Tensor, grad: Tensor) -> BitsandbytesAdamW:
    pytest.importorskip("bitsandbytes")
    return BitsandbytesAdamW(flat, grad, GROUPS, betas=(0.9, 0.99), eps=1e-8, paged=False)


def steps(adam: BitsandbytesAdamW, grad: Tensor, numbers: range) -> None:
    for number in numbers:
        grad.copy_(drawn(1 + number))
        adam.step(0.01)


def test_its_steps_are_those_of_its_own_class() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    flat, grad = drawn(0), torch.zeros(1280)
    steps(made(flat, grad), grad, range(5))
    parameters = [torch.nn.Parameter(drawn(0)[:1024]), torch.nn.Parameter(drawn(0)[1024:])]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, (0.1, 0.0))]
    theirs = bitsandbytes.optim.AdamW8bit(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8, min_8bit_size=0)
    for number in range(5):
        for p, part in zip(parameters, (slice(0, 1024), slice(1024, 1280))):
            p.grad = drawn(1 + number)[part]
        theirs.step()
    assert torch.equal(flat, torch.cat([p.detach() for p in parameters]))


def test_its_state_moves_to_another_one_bit_for_bit() -> None:
    whole, grad = drawn(0), torch.zeros(1280)
    steps(made(whole, grad), grad, range(6))
    flat, grad = drawn(0), torch.zeros(1280)
    first = made(flat, grad)
    steps(first, grad, range(3))
    second = made(flat, grad)
    second.load_state(first.state())
    steps(second, grad, range(3, 6))
    assert torch.equal(flat, whole)


def test_its_state_has_the_names_and_shapes_of_ours() -> None:
    ours = FlatAdamW([("p", torch.nn.Parameter(torch.zeros(5, 256)))], optim="adamw_8bit").state()
    theirs = made(torch.zeros(1280), torch.zeros(1280)).state()
    assert {name: (t.shape, t.dtype) for name, t in theirs.items()} == {
        name: (t.shape, t.dtype) for name, t in ours.items()
    }


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_bnb_8bit"])
def test_without_cuda_it_is_refused_with_what_to_use_instead(optim: str) -> None:
    with pytest.raises(RecipeError, match="for CUDA, and this run is on cpu") as caught:
        FlatAdamW([("p", torch.nn.Parameter(torch.zeros(2, 2)))], optim=optim)
    assert caught.value.where == "train.optim"
    assert optim.replace("_bnb", "") in str(caught.value.fix)


def test_without_the_package_it_is_refused_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match="bitsandbytes is not installed") as caught:
        check_optimizer("adamw_bnb_8bit", torch.device("cuda"))
    assert "pip install bitsandbytes" in str(caught.value.fix)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' optimizers are offered on CUDA alone")
@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_bnb_8bit"])
def test_on_cuda_its_steps_are_near_ours_and_its_state_moves(optim: str) -> None:
    pytest.importorskip("bitsandbytes")

    def run(name: str, moved: bool) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(0)
        named = [
            ("p", torch.nn.Parameter(torch.zeros(512, 256, device="cuda"))),
            ("q", torch.nn.Parameter(torch.ones(9, device="cuda"))),
        ]
        flat = FlatAdamW(named, optim=name)
        for step in range(10):
            flat.grad.copy_(torch.randn(flat.grad.shape, device="cuda", generator=generator))
            flat.step(0.01)
            if moved and step == 4:
                state = {key: tensor.clone() for key, tensor in flat.state().items()}
                flat = FlatAdamW(named, optim=name)
                flat.load_state(state)
        return flat.flat.clone()

    theirs, ours = run(optim, False), run("adamw_8bit", False)
    assert torch.equal(run(optim, True), theirs)
    assert float((theirs - ours).square().mean().sqrt()) < 0.02 * float(ours.square().mean().sqrt())
