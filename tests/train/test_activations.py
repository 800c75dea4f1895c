"""How much is kept for the backward: measured, chosen by what is free, and without a trace in the numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines
from torch import Tensor

from veneer.adapters import LoraConfig, attach
from veneer.data.pack import Batch
from veneer.errors import TrainError
from veneer.models import load_base
from veneer.train import activations
from veneer.train.activations import LEVELS, choose_level, gradient_checkpointing, growth, kept_bytes
from veneer.train.sft import sft


def batch_of(tokens: int) -> Batch:
    ids = (torch.arange(tokens) % 250 + 20)[None]
    return Batch(ids, torch.arange(tokens)[None], ids.roll(-1), [tokens], None, ["row"], tokens, tokens)


@pytest.fixture
def module(tiny_base: Path) -> Any:
    return attach(load_base(tiny_base, dtype="float32", device="cpu"), LoraConfig(r=4), seed=0).module


def gradients(module: Any, batch: Batch) -> list[Tensor]:
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(sft(module, batch).loss_sum, trained))


@pytest.mark.parametrize("level", ["mlp", "full"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_computed_again_gives_the_same_bits(tiny_base: Path, level: Any, dora: bool) -> None:
    base = load_base(tiny_base, dtype="float32", device="cpu")
    module = attach(base, LoraConfig(r=4, use_dora=dora, lora_dropout=0.2), seed=0).module
    found = []
    for chosen in ("none", level, "none"):
        torch.manual_seed(4)
        with gradient_checkpointing(module, chosen):
            found.append(gradients(module, batch_of(23)))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_each_level_keeps_less_and_in_proportion_to_the_tokens(module: Any) -> None:
    kept = {}
    for level in LEVELS:
        with gradient_checkpointing(module, level):
            kept[level] = [kept_bytes(module, sft, batch_of(tokens)) for tokens in (64, 128)]
    assert kept["full"][0] < kept["mlp"][0] < kept["none"][0]
    for few, many in kept.values():
        assert many == pytest.approx(2 * few, rel=0.02)
    # Two layers of width 32 and hidden width 64: e and g are 2 x 2 x 64 numbers a token.
    assert kept["none"][0] - kept["mlp"][0] == 64 * 2 * 2 * 64 * 4


def test_measuring_leaves_nothing_behind(tiny_base: Path) -> None:
    """An operation that keeps its own output (DoRA's projections, a softmax) must not hold its graph for good."""
    module = attach(load_base(tiny_base, dtype="float32", device="cpu"), LoraConfig(r=4, use_dora=True), seed=0).module
    outputs: list[weakref.ref[Tensor]] = []

    def note(_module: object, _inputs: object, output: Tensor) -> Tensor:
        result = torch.softmax(output, -1)
        outputs.append(weakref.ref(result))
        return result

    with module.model.layers[0].mlp.register_forward_hook(note):
        kept_bytes(module, sft, batch_of(64))
    assert len(outputs) == 1
    assert outputs[0]() is None


@pytest.mark.parametrize(
    ("share", "level", "says"),
    [
        (1.5, "none", None),
        (0.8, "mlp", "gated MLPs are"),
        (0.74, "full", "every layer is"),  # one of its two layers is whole again in the backward
        (0.01, "full", "may not fit"),
    ],
)
def test_auto_takes_the_least_that_fits(
    module: Any, monkeypatch: pytest.MonkeyPatch, share: float, level: str, says: str | None
) -> None:
    tokens = 200_000
    need = growth(torch.device("cpu")) * kept_bytes(module, sft, batch_of(64)) / 64 * tokens + activations.WORKING
    monkeypatch.setattr(activations, "free_bytes", lambda device: int(share * need / activations.SPARE))
    found, note = choose_level("auto", module, sft, batch_of(64), tokens)
    assert found == level
    assert (note is None) if says is None else says in str(note)


def test_what_the_recipe_says_is_done_and_an_unknown_amount_refuses_nothing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "free_bytes", lambda device: None)
    for wanted, level in ((True, "full"), (False, "none"), ("mlp", "mlp"), ("auto", "none")):
        assert choose_level(wanted, module, sft, batch_of(8), 10**9) == (level, None)


def test_a_model_without_such_blocks_says_so() -> None:
    with pytest.raises(TrainError, match="no gated MLP"), gradient_checkpointing(torch.nn.Linear(2, 2), "mlp"):
        pass


def test_a_run_that_does_not_fit_says_what_it_does_instead(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"max_steps": 3}
    small_run("plain", train=train)
    monkeypatch.setattr(activations, "free_bytes", lambda device: 1000)
    _, watcher = small_run("short", train=train, explain=True)
    assert any("it may not fit; lower train.micro_batch_tokens" in text for text in watcher.warnings)
    assert any("computed twice; each layer keeps its input" in text for _, text in watcher.messages)
    assert lines(tmp_path / "short") == lines(tmp_path / "plain")
    small_run("mlp", train={**train, "gradient_checkpointing": "mlp"})
    assert lines(tmp_path / "mlp") == lines(tmp_path / "plain")
