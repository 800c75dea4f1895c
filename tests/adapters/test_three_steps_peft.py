"""Three optimizer steps beside PEFT's, from the same start, on the same rows: the same losses, factors and logits.

DoRA, AdaLoRA, LoRA-FA and experts have theirs beside their own tests. What PEFT computes by another rule is given to it
here as it is meant, so that the steps can be compared:

- LoftQ: PEFT's start does not know the scaling (its issue 1982) and is right for ``alpha = r`` only: it gets ours.
- EVA and LoRA-GA: PEFT looks at data in another order and with other random numbers (that both find the same directions
  is in test_init_data.py): it gets ours, EVA with the ranks that were found.
- OLoRA, PiSSA and LoRA-GA: PEFT writes ``W - s B0 A0`` into its base, which rounds it; ours leaves the base alone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kinds import NF4, PLAIN, adapt, base, config_of, decoded, logits, loss_of
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.train.loraplus import multipliers
from veneer.train.optimizer import FlatAdamW

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CASES = [
    ("lora", PLAIN),
    ("lora", NF4),
    ("rslora", PLAIN),
    ("patterns", PLAIN),
    ("orthogonal", PLAIN),
    ("conv1d", PLAIN),
    ("pissa", PLAIN),
    ("pissa_niter", PLAIN),
    ("olora", PLAIN),
    ("lora_ga", PLAIN),
    ("eva", PLAIN),
    ("loftq", NF4),
]
STEPS, RATE = 3, 1e-2


@torch.no_grad()
def twin(adapted: AdaptedModel, module: nn.Module, rslora: bool) -> Any:
    """PEFT's model with the same factors over ``module``, from whose weights it takes what they start at."""
    linears = adapted.linears()
    root = {path: math.sqrt(a.r) if rslora else a.r for path, a in linears.items()}
    for path, adapter in linears.items():
        if hasattr(adapter, "A0"):
            weight: Any = module.get_submodule(path).weight
            weight -= adapter.scaling * adapter.B @ adapter.A
    theirs = peft.get_peft_model(
        module,
        peft.LoraConfig(
            target_modules=list(linears),
            use_rslora=rslora,
            rank_pattern={path: a.r for path, a in linears.items()},
            alpha_pattern={path: a.scaling * root[path] for path, a in linears.items()},
            fan_in_fan_out=any(type(module.get_submodule(path)).__name__ == "Conv1D" for path in linears),
        ),
    )
    for path, adapter in linears.items():
        layer = theirs.base_model.model.get_submodule(path)
        assert layer.scaling["default"] == pytest.approx(adapter.scaling, rel=1e-12)
        layer.lora_A["default"].weight.copy_(adapter.A)
        layer.lora_B["default"].weight.copy_(adapter.B)
    return theirs.eval()


def losses(module: nn.Module, parameters: Any, step: Any) -> list[float]:
    found = []
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad.zero_()
        loss = loss_of(module)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        step()
        found.append(float(loss.detach()))
    return found


def compare(adapted: AdaptedModel, theirs: Any, start: Tensor) -> None:
    torch.testing.assert_close(logits(adapted.module), logits(theirs), rtol=1e-3, atol=1e-3)
    assert (logits(adapted.module) - start).abs().max() > 0.1, "the steps must show"
    for path, adapter in adapted.linears().items():
        layer = theirs.base_model.model.get_submodule(path)
        for own, other in ((adapter.A, layer.lora_A), (adapter.B, layer.lora_B)):
            # AdamW gives a gradient that is all rounding a whole step: a few numbers may be apart by that.
            difference = (own - other["default"].weight).abs()
            assert difference.max() <= 2 * STEPS * RATE
            assert difference.mean() < 1e-3 * RATE, path


@pytest.mark.parametrize(("name", "stored"), CASES)
def test_three_steps_are_pefts(name: str, stored: str) -> None:
    adapted = adapt(name, stored)
    plain = base(name, stored)
    theirs = twin(adapted, decoded(plain) if stored == NF4 else plain, bool(config_of(name).use_rslora))
    start = logits(adapted.module)
    torch.testing.assert_close(start, logits(theirs), rtol=1e-4, atol=1e-4)
    ours = adapted.parameters()
    others = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in others)
    own = losses(adapted.module, ours, torch.optim.AdamW(ours, lr=RATE).step)
    expected = losses(theirs, others, torch.optim.AdamW(others, lr=RATE).step)
    assert own == pytest.approx(expected, rel=1e-5)
    assert own[-1] < own[0] - 1e-2
    compare(adapted, theirs, start)


def test_three_steps_of_pefts_own_olora_are_ours() -> None:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    adapted = attach(base("olora"), LoraConfig(**settings, init_lora_weights="olora"), seed=0)
    theirs = peft.get_peft_model(base("olora"), peft.LoraConfig(**settings, init_lora_weights="olora")).eval()
    ours, others = adapted.parameters(), [p for p in theirs.parameters() if p.requires_grad]
    # The signs of Q's columns may differ: neither the product nor AdamW sees them.
    own = losses(adapted.module, ours, torch.optim.AdamW(ours, lr=RATE).step)
    assert own == pytest.approx(losses(theirs, others, torch.optim.AdamW(others, lr=RATE).step), rel=1e-5)
    assert own[-1] < own[0] - 1e-2


def test_three_steps_of_lora_plus_are_pefts() -> None:
    from peft.optimizers import create_loraplus_optimizer

    adapted = adapt("lora")
    theirs = twin(adapted, base("lora"), rslora=False)
    start, ratio = logits(adapted.module), 8.0
    named = adapted.named_parameters()
    rates = multipliers(named, ratio, RATE / ratio, 1e-6) or []
    assert set(rates) == {1.0, ratio}
    flat = FlatAdamW(named, weight_decay=0.0, multipliers=rates)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE / ratio, loraplus_lr_ratio=ratio, weight_decay=0.0
    )
    own = losses(adapted.module, adapted.parameters(), lambda: flat.step(RATE / ratio))
    assert own == pytest.approx(losses(theirs, list(theirs.parameters()), optimizer.step), rel=1e-5)
    compare(adapted, theirs, start)
    plain = adapt("lora")
    without = FlatAdamW(plain.named_parameters(), weight_decay=0.0)
    other = losses(plain.module, plain.parameters(), lambda: without.step(RATE / ratio))
    assert other[-1] != pytest.approx(own[-1], rel=1e-3), "the ratio must show"
    assert own[-1] < own[0] - 1e-2
