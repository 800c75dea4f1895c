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
from veneer.models import fuse, load_base
from veneer.models.head import settle_documents
from veneer.train import activations
from veneer.train.activations import (
    LEVELS,
    all_blocks,
    choose_blocks,
    gradient_checkpointing,
    growth,
    kept_bytes,
    said_of,
)
from veneer.train.sft import sft


def batch_of(tokens: int) -> Batch:
    ids = (torch.arange(tokens) % 250 + 20)[None]
    return Batch(ids, torch.arange(tokens)[None], ids.roll(-1), [tokens], None, ["row"], tokens, tokens)


@pytest.fixture
def module(tiny_base: Path) -> Any:
    return attach(load_base(tiny_base, dtype="float32", device="cpu"), LoraConfig(r=4), seed=0).module


@pytest.fixture
def deep() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=6, **size)).requires_grad_(False)
    fuse(module)
    return attach(module, LoraConfig(r=4), seed=0).module


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
    settle_documents(module)  # its first look runs the layers too
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
    ("share", "mlps", "layers", "says"),
    [
        (1.5, 0, 0, None),
        (0.95, 1, 0, "those of 1 of 6 gated MLPs computed twice"),
        (0.8, 4, 0, "those of 4 of 6 gated MLPs"),
        (0.6, 3, 3, "those of 3 of 6 layers and 3 of 6 gated MLPs"),
        (0.4, 1, 5, "those of 5 of 6 layers and 1 of 6 gated MLPs"),
        (0.01, 0, 6, "GB with those of 6 of 6 layers computed twice, and"),
    ],
)
def test_auto_takes_the_fewest_that_fit_and_the_first_of_the_model(
    deep: Any, monkeypatch: pytest.MonkeyPatch, share: float, mlps: int, layers: int, says: str | None
) -> None:
    tokens, batch = 2_000_000, batch_of(64)

    def need(kept: int) -> float:
        return growth(torch.device("cpu")) * kept / 64 * tokens + activations.WORKING

    free = int(share * need(kept_bytes(deep, sft, batch)) / activations.SPARE)
    monkeypatch.setattr(activations, "free_bytes", lambda device: free)
    found, note = choose_blocks("auto", deep, sft, batch, tokens)
    assert (note is None) if says is None else says in str(note)
    every = list(deep.model.layers)
    assert len(found) == layers + mlps
    assert set(found) == {*every[:layers], *(layer.mlp for layer in every[layers : layers + mlps])}
    with gradient_checkpointing(deep, found):
        kept = kept_bytes(deep, sft, batch)
    if share > 0.01:
        assert need(kept) <= activations.SPARE * free
        if layers == 0 and mlps:
            with gradient_checkpointing(deep, found[:-1]):
                assert need(kept_bytes(deep, sft, batch)) > activations.SPARE * free


def test_layers_that_keep_nothing_are_not_computed_twice(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer has no adapter, and nothing before it is trained."""
    base = load_base(tiny_base, dtype="float32", device="cpu")
    module: Any = attach(base, LoraConfig(r=4, layers_to_transform=[1]), seed=0).module
    batch = batch_of(64)
    need = growth(torch.device("cpu")) * kept_bytes(module, sft, batch) / 64 * 10**6 + activations.WORKING
    monkeypatch.setattr(activations, "free_bytes", lambda device: int(0.95 * need / activations.SPARE))
    found, note = choose_blocks("auto", module, sft, batch, 10**6)
    assert found == [module.model.layers[1].mlp]
    assert "1 of 2 gated MLPs" in str(note)
    assert said_of(module, []) == "kept from the forward to the backward"


def test_what_the_recipe_says_is_done_and_an_unknown_amount_refuses_nothing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "free_bytes", lambda device: None)
    for wanted, level in ((True, "full"), (False, "none"), ("mlp", "mlp"), ("auto", "none")):
        every = all_blocks(module, level)  # type: ignore[arg-type]  # they are levels
        assert choose_blocks(wanted, module, sft, batch_of(8), 10**9) == (every, None)


@pytest.mark.parametrize(
    ("wanted", "level", "missing"), [("mlp", "mlp", "no gated MLP"), (True, "full", "no layers that can")]
)
def test_a_model_without_such_blocks_says_so(wanted: Any, level: Any, missing: str) -> None:
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(TrainError, match=missing), gradient_checkpointing(plain, level):
        pass
    with pytest.raises(TrainError, match=missing) as error:
        choose_blocks(wanted, plain, sft, batch_of(8), 8)
    assert error.value.where == "train.gradient_checkpointing"
    assert error.value.fix == "set it to auto or false"


def test_auto_takes_nothing_of_a_model_without_such_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(module: Any, batch: Batch) -> Any:
        return module(torch.ones(8, 2, requires_grad=True)).square().sum()

    monkeypatch.setattr(activations, "free_bytes", lambda device: 0)
    found, note = choose_blocks("auto", torch.nn.Linear(2, 2), objective, batch_of(8), 10**9)
    assert found == []
    assert "computed twice" not in str(note)
    assert "GB of activations, and 0.0 GB are free: it may not fit" in str(note)


def test_a_run_says_that_what_it_is_asked_for_cannot_be_done(
    small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.models.fused.fused_mlp", lambda block: None)
    with pytest.raises(TrainError, match="no gated MLP that runs as one operation"):
        small_run("none", train={"max_steps": 1, "gradient_checkpointing": "mlp"})


def test_a_users_own_checkpointing_is_still_on_afterwards(deep: Any) -> None:
    deep.gradient_checkpointing_enable({"use_reentrant": False})
    switches = [dict(part.__dict__) for part in deep.modules()]
    for level in LEVELS:
        with gradient_checkpointing(deep, level):
            pass
    assert deep.model.layers[0].gradient_checkpointing
    assert [part.__dict__ for part in deep.modules()] == switches


def test_a_run_that_does_not_fit_says_what_it_does_instead(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"max_steps": 3}
    small_run("plain", train=train)
    monkeypatch.setattr(activations, "free_bytes", lambda device: 1000)
    _, watcher = small_run("short", train=train, explain=True)
    assert any("it may not fit; lower train.micro_batch_tokens" in text for text in watcher.warnings)
    assert any("those of 2 of 2 layers computed twice" in text for _, text in watcher.messages)
    assert lines(tmp_path / "short") == lines(tmp_path / "plain")
    small_run("mlp", train={**train, "gradient_checkpointing": "mlp"})
    assert lines(tmp_path / "mlp") == lines(tmp_path / "plain")
