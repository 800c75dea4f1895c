"""LoRA+: B is trained at a multiple of A's rate, in PEFT's groups, under every kind of AdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines
from torch import nn

from veneer.errors import RecipeError
from veneer.recipe import recipe_from
from veneer.train.loraplus import multipliers
from veneer.train.optimizer import OPTIMIZERS, FlatAdamW

SHAPES = {
    "q_proj.lora_A.weight": (4, 11),
    "q_proj.lora_B.weight": (7, 4),
    "q_proj.lora_magnitude_vector": (7,),
    "embed.lora_embedding_A": (4, 9),
    "embed.lora_embedding_B": (6, 4),
    "head.weight": (5, 6),
}
RATE, RATIO, EMBEDDING = 1e-2, 16.0, 3e-4
RATES = [RATE, RATE * RATIO, RATE * RATIO, EMBEDDING, EMBEDDING, RATE]
OWN = [name for name, kind in OPTIMIZERS.items() if not kind.bitsandbytes]


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def fill_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, p in named:
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = gradient if p.grad is None else p.grad.copy_(gradient)


def flat_adamw(named: list[tuple[str, nn.Parameter]], optim: str = "adamw", ratio: float | None = RATIO) -> FlatAdamW:
    return FlatAdamW(named, optim=optim, weight_decay=0.1, multipliers=multipliers(named, ratio, RATE, EMBEDDING))


def test_steps_equal_torch_adamw_with_a_group_for_each_rate() -> None:
    ours, theirs = parameters(), parameters()
    flat = flat_adamw(ours)
    groups = [
        {"params": [p], "lr": rate, "weight_decay": 0.1 if p.dim() > 1 else 0.0} for (_, p), rate in zip(theirs, RATES)
    ]
    oracle = torch.optim.AdamW(groups)
    for step in range(6):
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        share = 1 / (step + 1)  # of the schedule: every group follows it
        for group, rate in zip(oracle.param_groups, RATES):
            group["lr"] = rate * share
        oracle.step()
        flat.step(RATE * share)
        for (name, a), (_, b) in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("optim", OWN)
def test_every_kind_of_optimizer_moves_each_tensor_by_its_own_rate(optim: str) -> None:
    named = parameters()
    flat = flat_adamw(named, optim)
    before = [p.detach().clone() for _, p in named]
    fill_gradients(named, 0)
    for _, p in named:
        assert p.grad is not None
        p.grad.fill_(0.5)
    flat.step(RATE)
    # The first step of Adam is lr * sign(g), after a decay of lr * 0.1 * p; 8 bits round the moments, not this step.
    for (name, p), old, rate in zip(named, before, RATES):
        decay = 0.1 if p.dim() > 1 else 0.0
        torch.testing.assert_close(p.detach(), old * (1 - rate * decay) - rate, rtol=1e-5, atol=1e-6, msg=name)


def test_bitsandbytes_gets_a_group_for_each_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from veneer.train import optimizer_bnb
    from veneer.train.optimizer_memory import Part

    class Recorded:
        def __init__(self, groups: list[dict[str, Any]], **_: Any) -> None:
            self.param_groups = groups
            self.state: dict[Any, Any] = {group["params"][0]: {} for group in groups}

        def init_state(self, *_: Any) -> None: ...

        def step(self) -> None: ...

    module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Recorded, PagedAdamW8bit=Recorded))
    monkeypatch.setattr(optimizer_bnb, "import_bitsandbytes", lambda: module)
    groups = [Part(0, 256, 0.1), Part(256, 512, 0.1, RATIO), Part(512, 768, 0.0, RATIO)]
    adam = optimizer_bnb.BitsandbytesAdamW(
        torch.zeros(768), torch.zeros(768), groups, betas=(0.9, 0.999), eps=1e-8, paged=False
    )
    adam.step(RATE)
    assert [group["lr"] for group in adam._adam.param_groups] == [RATE, RATE * RATIO, RATE * RATIO]


def test_the_groups_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    loraplus = pytest.importorskip("peft.optimizers")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"])
    model = peft.get_peft_model(LlamaForCausalLM(config), settings)
    theirs = loraplus.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=EMBEDDING
    )
    rates = {p: group["lr"] for group in theirs.param_groups for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ours = multipliers(named, RATIO, RATE, EMBEDDING)
    assert ours is not None
    assert {name: m * RATE for (name, _), m in zip(named, ours)} == pytest.approx({n: rates[p] for n, p in named})
    assert len(set(ours)) == 3


def test_without_a_ratio_nothing_changes_and_the_buffer_lies_as_before() -> None:
    named = parameters()
    assert multipliers(named, None, RATE, EMBEDDING) is None
    plain = FlatAdamW(parameters(), weight_decay=0.1)
    assert flat_adamw(parameters(), ratio=None).layout == plain.layout
    assert flat_adamw(parameters()).layout != plain.layout


def test_a_run_trains_b_faster_and_logs_the_base_rate(small_run: Callable[..., Any], tmp_path: Path) -> None:
    """A's first step is zero under any rate, since B is: after one step only B has moved, and by the ratio."""
    settings = {"max_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0}
    plain, _ = small_run("plain", train=settings)
    plus, _ = small_run("plus", train={**settings, "loraplus_lr_ratio": 8.0})
    for (name, a), (_, b) in zip(plain.model.named_parameters(), plus.model.named_parameters()):
        if "lora_B" in name:
            torch.testing.assert_close(8 * a, b, rtol=1e-5, atol=1e-7, msg=name)
            assert a.any()
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    assert [line["learning_rate"] for line in lines(tmp_path / "plus") if "loss" in line] == [1e-2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"use_lora_fa": True}, "train": {"loraplus_lr_ratio": 16.0}}, "A is not trained"),
        ({"train": {"loraplus_lr_embedding": 1e-4}}, "does nothing without train.loraplus_lr_ratio"),
        ({"train": {"loraplus_lr_ratio": 0.5}}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_from({"base": "tiny", "data": {"train": "rows.jsonl"}, **changes})
