"""EVA and LoRA-GA: starts from rows of data, against their formulas and against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import veneer
from veneer.adapters import AdaptedModel, LoraConfig, LoraLinear, attach, load_adapter
from veneer.adapters.init_data import initialise_from
from veneer.adapters.init_eva import Covariance, share_ranks
from veneer.adapters.sample import layers_of
from veneer.adapters.settings import EvaConfig
from veneer.adapters.watch import gradients_watched
from veneer.errors import AdapterError, UsageError
from veneer.quant import QuantConfig, QuantizedLinear

Make = Callable[..., nn.Module]
Run = Callable[[nn.Module, Tensor], Tensor]
Train = Callable[..., list[dict[str, Tensor]]]


def loss_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        out = module(ids).logits[:, :-1]
        return nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())

    return loss


def rows(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(64, (2, 16), generator=generator) for _ in range(count)]


def started(module: nn.Module, batches: list[Tensor], settings: dict[str, Any], **options: Any) -> AdaptedModel:
    adapted = attach(module, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}), seed=0)
    initialise_from(adapted, batches, loss_of(module), **options)
    return adapted


def inputs_of(module: nn.Module, path: str, batches: list[Tensor]) -> Tensor:
    """``[T, in]``: everything that the layer reads."""
    seen: list[Tensor] = []
    handle = module.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            module(batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_covariance_in_batches_is_that_of_all_rows(shift: float) -> None:
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + shift
    running = Covariance()
    for part in x.split(7):
        running.add(part)
    V, explained = running.directions(5)
    _, S, vh = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    assert torch.allclose((V * vh[:5]).sum(1).abs(), torch.ones(5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(explained, (S**2 / (S**2).sum())[:5], rtol=1e-3)


def test_wide_inputs_take_the_random_way_and_come_near() -> None:
    scale = torch.logspace(0, -3, 1100)
    x = torch.randn(1500, 1100, generator=torch.Generator().manual_seed(0)) * scale
    running = Covariance()
    running.add(x)
    V, _ = running.directions(3)
    _, _, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    # As subspaces: neighbouring directions of random rows are nearly alike.
    assert torch.linalg.svdvals(V @ vh[:3].t()).min() > 0.95


def test_ranks_go_where_a_direction_explains_most_and_every_layer_keeps_one() -> None:
    explained = {"a": torch.tensor([0.9, 0.05]), "b": torch.tensor([0.3, 0.2, 0.2]), "c": torch.tensor([0.1, 0.01])}
    assert share_ranks(explained, 6) == {"a": 2, "b": 3, "c": 1}
    assert share_ranks(explained, 4) == {"a": 1, "b": 2, "c": 1}
    assert sum(share_ranks(explained, 100).values()) == 7


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_eva_starts_along_what_each_layer_reads_and_at_the_base(
    make: str, run: Run, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    new: Make = request.getfixturevalue(make)
    module, batches = new(), rows()
    before = run(module, ids)
    adapted = started(module, batches, {"init_lora_weights": "eva", "eva_config": {"tau": 1.0}})
    assert torch.equal(run(module, ids), before)
    ranks = {path: adapter.r for path, adapter in adapted.linears().items()}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    for path, adapter in adapted.linears().items():
        x = inputs_of(new(), path, batches)
        _, _, vh = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
        assert torch.allclose((adapter.A * vh[: adapter.r]).sum(1).abs().float(), torch.ones(adapter.r), atol=1e-3)
        assert adapter.scaling == 1.5
        assert not adapter.B.any()


def test_pefts_eva_finds_the_same_directions_and_ranks(llama: Make) -> None:
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
    from peft import LoraConfig as PeftConfig

    names, batch = ["q_proj", "o_proj", "down_proj"], torch.cat(rows(8))
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": names, "init_lora_weights": "eva"}
    adapted = started(llama(), [batch], settings)
    theirs = get_peft_model(llama(), PeftConfig(**settings, eva_config=EvaConfig(rho=2.0)))
    data = [{"input_ids": batch}, {"input_ids": batch}]  # twice the same: it stops when nothing turns
    initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    for path, adapter in adapted.linears().items():
        other: Any = theirs.base_model.model.get_submodule(path)
        A = other.lora_A["default"].weight.detach()
        assert len(A) == adapter.r
        # Theirs is a randomised SVD, and it sees the batch once more: the subspace, to a few percent.
        assert torch.linalg.svdvals(adapter.A.detach() @ A.t()).min() > 0.95
        assert other.scaling["default"] == adapter.scaling


def test_layers_that_read_one_tensor_share_the_work_and_the_directions(llama: Make) -> None:
    module = llama()
    adapted = attach(module, LoraConfig(r=4, init_lora_weights="eva", eva_config={"rho": 1.0}), seed=0)
    text = initialise_from(adapted, rows(), loss_of(module))
    assert "14 layers start along 8 different inputs" in text
    q, k, o = (adapted.linears()[f"model.layers.0.self_attn.{name}_proj"].A for name in "qko")
    assert torch.equal(q, k)
    assert not torch.equal(q, o)


class Listed(nn.Module):
    """Experts in a list, each of which gets the rows that chose it; or is not called without any."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skips, self.choices = skips, nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.choices):
            at = chosen == index
            if at.any() or not self.skips:
                y[at] = expert(x[at])
        return y


@pytest.mark.parametrize("skips", [True, False])
def test_an_expert_may_get_its_first_row_in_a_later_batch(skips: bool) -> None:
    torch.manual_seed(0)
    module, x = Listed(skips), torch.randn(2, 20, 8)
    batches = [(x[0], torch.arange(20) % 2), (x[1], torch.full((20,), 2))]
    config = LoraConfig(r=2, target_modules=["0", "1", "2", "3"], init_lora_weights="eva", eva_config={"rho": 1.0})
    adapted = attach(module, config, seed=0)
    text = initialise_from(adapted, batches, lambda batch: module(*batch).sum())
    assert "3 layers start along 3 different inputs" in text
    assert "1 layers that no row reached start as by default (choices.3)" in text
    for index, read in enumerate([x[0][::2], x[0][1::2], x[1]]):
        _, _, vh = torch.linalg.svd(read - read.mean(0), full_matrices=False)
        A = adapted.linears()[f"choices.{index}"].A
        assert torch.allclose((A * vh[:2]).sum(1).abs(), torch.ones(2), atol=1e-4)


def test_a_layer_is_settled_when_more_batches_do_not_turn_it(llama: Make) -> None:
    module, calls = llama(), []
    adapted = attach(module, LoraConfig(r=2, init_lora_weights="eva"), seed=0)
    loss = loss_of(module)

    def counted_loss(batch: Tensor) -> Tensor:
        calls.append(1)
        return loss(batch)

    initialise_from(adapted, rows(1) * 64, counted_loss)
    assert len(calls) == 1 + 2  # one to see who reads what, then the first two of 64 equal batches


def test_only_counted_rows_are_looked_at(llama: Make) -> None:
    batches = rows(1)
    mask = torch.arange(32) % 2 == 0
    settings: dict[str, Any] = {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}, "r": 3}
    adapted = started(llama(), batches, settings, counted=lambda batch: mask)
    path = "model.layers.1.mlp.down_proj"
    x = inputs_of(llama(), path, batches)[mask]
    _, _, vh = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    A = adapted.linears()[path].A
    assert torch.allclose((A * vh[:3]).sum(1).abs().float(), torch.ones(3), atol=1e-4)


def gradients(module: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """``dL/dW [out, in]`` of every linear, by autograd."""
    module.requires_grad_(True)
    for batch in batches:
        loss_of(module)(batch).backward()
    return {
        path: layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.t()  # type: ignore[union-attr, operator, misc]
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    }


@pytest.mark.parametrize("name", ["olmo", "olmoe"])
def test_the_gradients_of_layers_whose_output_is_cut_off_in_place_are_those_of_autograd(name: str) -> None:
    few = {} if name == "olmo" else {"num_experts": 4, "num_experts_per_tok": 2}
    module = tiny_models._text(name.capitalize(), clip_qkv=0.5, **few)
    batches = rows(2)
    expected, own = gradients(module(), batches), module()
    adapted = attach(own, LoraConfig(r=4, init_lora_weights="lora_ga"), seed=0)
    found: dict[str, Tensor] = {}
    with adapted.disabled(), gradients_watched(layers_of(adapted, "default"), found):
        for batch in batches:
            loss_of(own)(batch).backward()
    assert found.keys() == adapted.linears().keys()
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, expected[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_lora_ga_starts_along_the_gradient_of_the_weight_however_little_memory_there_is(
    make: str, budget: int, run: Run, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    new: Make = request.getfixturevalue(make)
    module, batches = new(), rows()
    before = run(module, ids)
    adapted = started(module, batches, {"init_lora_weights": "lora_ga"}, memory_budget=budget)
    assert torch.equal(run(module, ids), before)
    expected = gradients(new(), batches)
    for path, adapter in adapted.linears().items():
        U, _, vh = torch.linalg.svd(expected[path].double())
        c = adapter.B.shape[0] ** 0.25 / 16**0.5  # the paper's, on both; PEFT puts the gradient's size on B alone
        assert torch.allclose((adapter.A * vh[:4]).sum(1).abs().float(), torch.full((4,), c), atol=1e-4)
        assert torch.allclose((adapter.B.t() * U[:, 4:8].t()).sum(1).abs().float(), torch.full((4,), c), atol=1e-4)
        assert torch.allclose(adapter.B0, adapter.B)


def test_pefts_lora_ga_takes_the_same_directions(llama: Make) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from peft.tuners.lora import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    names, batches = ["q_proj", "down_proj"], rows()
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": names, "init_lora_weights": "lora_ga"}
    for direction in ("ArBr", "A2rBr", "ArB2r"):
        adapted = started(llama(), batches, {**settings, "lora_ga_config": {"direction": direction, "scale": "unit"}})
        module = llama()
        wanted = PeftConfig(**settings, lora_ga_config=LoraGAConfig(direction=direction, scale="unit"))
        preprocess_loraga(module, wanted, lambda module=module: [loss_of(module)(b).backward() for b in batches])
        theirs = get_peft_model(module, wanted)
        for path, adapter in adapted.linears().items():
            other: Any = theirs.base_model.model.get_submodule(path)
            A, B = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
            B = B / B.norm(dim=0)  # without the gradient's size
            assert torch.allclose((adapter.A * A).sum(1).abs(), torch.ones(4), atol=1e-3)
            assert torch.allclose((adapter.B * B).sum(0).abs(), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "random"])
def test_the_start_does_not_depend_on_the_unit_of_the_loss(scale: str, direction: str, llama: Make) -> None:
    found = []
    for factor in (1.0, 1000.0):
        module = llama()
        chosen = {"scale": scale, "direction": direction}
        adapted = attach(module, LoraConfig(r=4, init_lora_weights="lora_ga", lora_ga_config=chosen), seed=0)
        loss = loss_of(module)
        initialise_from(adapted, rows(), lambda batch, loss=loss, factor=factor: factor * loss(batch))
        found.append(adapted.linears()["model.layers.0.mlp.up_proj"])
    assert torch.allclose(found[0].A, found[1].A, atol=1e-4)
    assert torch.allclose(found[0].B, found[1].B, atol=1e-4)


def test_the_first_step_of_lora_ga_lowers_the_loss_more_than_the_default_start(llama: Make) -> None:
    """What the start is for (Wang et al. 2024, fig. 1): a plain gradient step goes further."""
    after = []
    for settings in ({"init_lora_weights": "lora_ga"}, {}):
        module = llama()
        adapted = attach(module, LoraConfig(r=4, lora_alpha=8, **settings), seed=0)
        loss, batches = loss_of(module), rows(1)
        if adapted.waiting:
            initialise_from(adapted, batches, loss)
        parameters = adapted.parameters()
        for _ in range(3):
            for parameter, grad in zip(parameters, torch.autograd.grad(loss(batches[0]), parameters), strict=True):
                parameter.data.sub_(0.1 * grad)
        after.append(float(loss(batches[0])))
    assert after[0] < after[1]


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_the_file_is_the_trained_model_on_the_untouched_base(
    method: str, settings: dict[str, Any], llama: Make, run: Run, train: Train, ids: Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapted = started(llama(), rows(), {"init_lora_weights": method, **settings})
    train(adapted, ids)
    folder = adapted.save(tmp_path / "adapter")
    after = run(adapted.module, ids)
    assert torch.allclose(run(load_adapter(llama(), folder).module, ids), after, atol=1e-6)
    assert torch.allclose(run(PeftModel.from_pretrained(llama(), str(folder)).eval(), ids), after, atol=1e-5)


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_over_codes_the_start_is_that_over_the_decoded_weights(method: str, llama: Make) -> None:
    found = []
    for decode in (False, True):
        module = llama(hidden_size=64, intermediate_size=64)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and name != "lm_head":
                    coded = QuantizedLinear.from_linear(child, QuantConfig("nf4"), name)
                    setattr(parent, name, coded.dequantized() if decode else coded)
        found.append(started(module, rows(), {"init_lora_weights": method}).linears())
    for path, adapter in found[0].items():
        assert torch.allclose(adapter.A, found[1][path].A, atol=1e-3)
        assert torch.allclose(adapter.B, found[1][path].B, atol=1e-3)


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_an_adapter_that_waits_for_data_is_neither_trained_nor_saved(method: str, llama: Make, tmp_path: Path) -> None:
    adapted = attach(llama(), LoraConfig(r=4, init_lora_weights=method), seed=0)
    for use in (adapted.parameters, adapted.named_parameters, lambda: adapted.save(tmp_path / "adapter")):
        with pytest.raises(AdapterError, match=f"starts from data \\({method}\\) and has not seen any yet") as caught:
            use()  # type: ignore[operator]
        assert "veneer.initialise" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("value", ["no", "yes", 1, None])
def test_a_switch_is_true_or_false_and_no_text(value: Any) -> None:
    with pytest.raises(AdapterError, match="adjust_scaling_factors cannot be"):
        EvaConfig(adjust_scaling_factors=value)
    with pytest.raises(AdapterError, match="adjust_scaling_factors cannot be"):
        LoraConfig(init_lora_weights="eva", eva_config={"adjust_scaling_factors": value})


def test_bad_calls_are_refused_by_name(llama: Make) -> None:
    module = llama()
    adapted = attach(module, LoraConfig(r=4, init_lora_weights="eva"), seed=0)
    with pytest.raises(AdapterError, match="eva starts from rows of data, and there are none"):
        veneer.initialise(adapted, [], loss=loss_of(module))
    with pytest.raises(AdapterError, match="no row of data reached a layer"):
        veneer.initialise(adapted, rows(), loss=lambda batch: torch.zeros(()))
    with pytest.raises(UsageError, match="no tokenizer"):
        veneer.initialise(adapted, rows())
    assert adapted.waiting
    veneer.initialise(adapted, rows(), loss=loss_of(module))
    with pytest.raises(AdapterError, match="does not wait for data"):
        veneer.initialise(adapted, rows(), loss=loss_of(module))


def test_detaching_after_ranks_moved_gives_the_base_back(llama: Make, run: Run, ids: Tensor) -> None:
    module = llama()
    trained_before = [parameter.requires_grad for parameter in module.parameters()]
    before = run(module, ids)
    adapted = started(module, rows(), {"init_lora_weights": "eva"})
    assert all(isinstance(module.get_submodule(path), LoraLinear) for path in adapted.linears())
    assert torch.equal(run(adapted.detach(), ids), before)
    assert [parameter.requires_grad for parameter in module.parameters()] == trained_before
