"""A training loop of one's own with what Veneer's adds to a step: as the docstring of veneer.train.hooks shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapters import AdaptedModel, LoraConfig, attach, read_adapter
from veneer.adapters.frozen_a import preconditioner
from veneer.train.hooks import step_hook
from veneer.train.optimizer import FlatAdamW

STEPS = 20


def trained(settings: dict[str, Any], *, hooked: bool) -> AdaptedModel:
    torch.manual_seed(0)
    model = attach(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)), LoraConfig(r=8, **settings), seed=0)
    x, y = torch.randn(32, 16), torch.randn(32, 8)
    optimizer = FlatAdamW(model.named_parameters())
    hook = step_hook(model, optimizer, STEPS) if hooked else None
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        (model.module(x) - y).square().mean().backward()
        if hook is not None:
            hook.add_gradient(1.0)
        optimizer.finish_gradient(1.0, max_norm=1.0)
        if hook is not None:
            hook.before_step(step)
        optimizer.step(0.01)
        if hook is not None:
            hook.after_step(step)
    return model


def test_adalora_moves_its_ranks_and_the_file_has_those_that_are_left(tmp_path: Path) -> None:
    settings = {"adalora_config": {"target_r": 2, "deltaT": 1}}
    ranks = {}
    for hooked in (True, False):
        model = trained(settings, hooked=hooked)
        tensors = read_adapter(model.save(tmp_path / str(hooked)))[1]
        ranks[hooked] = sum(len(tensor) for key, tensor in tensors.items() if "lora_A" in key)
        model.trim()
        assert sum(adapter.r for adapter in model.linears().values()) == ranks[hooked]
    assert ranks == {True: 4, False: 16}


def test_lora_fa_gives_b_the_gradient_of_the_whole_update() -> None:
    model = trained({"use_lora_fa": True}, hooked=True)
    plain = trained({"use_lora_fa": True}, hooked=False)
    for path, adapter in model.linears().items():
        assert torch.equal(adapter.A, plain.linears()[path].A)
        assert (adapter.B - plain.linears()[path].B).abs().max() > 1e-3
    adapter = next(iter(model.linears().values()))
    gradient = torch.randn(adapter.B.shape)
    for other in model.linears().values():
        other.B.grad = torch.zeros_like(other.B)
    adapter.B.grad = gradient.clone()
    step_hook(model, None, STEPS).before_step(1)  # type: ignore[arg-type]  # LoRA-FA's looks at the gradients alone
    torch.testing.assert_close(adapter.B.grad, gradient @ preconditioner(adapter.A, adapter.scaling))


def test_plain_lora_needs_nothing_of_it() -> None:
    hooked, alone = (trained({}, hooked=hooked).state() for hooked in (True, False))
    assert all(torch.equal(hooked[key], alone[key]) for key in alone)


def test_the_loop_of_the_docstring_names_what_there_is() -> None:
    from veneer.train import hooks
    from veneer.train.step_hook import StepHook

    text = hooks.__doc__ or ""
    for owner, name in (("hook", "add_gradient"), ("hook", "before_step"), ("hook", "after_step")):
        assert f"{owner}.{name}(" in text
        assert hasattr(StepHook, name)
    for name in ("zero_grad", "finish_gradient", "step"):
        assert f"optimizer.{name}(" in text
        assert hasattr(FlatAdamW, name)
