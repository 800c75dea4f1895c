"""PiSSA and OLoRA: starts from the weight that leave the base alone, against their formulas and against PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, LoraLinear, attach, load_adapter, merge
from veneer.adapters.init_svd import exact_triplets, random_triplets
from veneer.errors import AdapterError
from veneer.quant import QuantConfig, QuantizedLinear

SETTINGS: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa", "use_rslora": True},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa", "use_dora": True},
    {"init_lora_weights": "pissa", "use_lora_fa": True},
]
Make = Callable[..., nn.Module]
Run = Callable[[nn.Module, Tensor], Tensor]
Train = Callable[..., list[dict[str, Tensor]]]


def linear(adapted: AdaptedModel, path: str) -> LoraLinear:
    layer = adapted.module.get_submodule(path)
    assert isinstance(layer, LoraLinear)
    return layer


def in_codes(module: nn.Module) -> nn.Module:
    """The same model with its linears in NF4."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, QuantizedLinear.from_linear(child, QuantConfig("nf4"), name))
    return module


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_exact_triplets_are_those_of_an_svd_in_double(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, V = exact_triplets(matrix, 6)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(S, s[:6], rtol=1e-12)
    assert torch.allclose((U * S) @ V.t(), (u[:, :6] * s[:6]) @ vh[:6], atol=1e-12)
    assert bool((V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all())


def test_small_singular_values_keep_their_digits() -> None:
    """The Gram matrix squares the condition number: in double a spread of 10^5 leaves the smallest six digits."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 8, generator=generator, dtype=torch.float64))[0] for n in (30, 20))
    S = torch.logspace(0, -5, 8, dtype=torch.float64)
    assert torch.allclose(exact_triplets((U * S) @ V.t(), 8)[1], S, rtol=1e-6)


def test_a_singular_matrix_still_has_orthonormal_vectors() -> None:
    matrix = torch.randn(20, 2) @ torch.randn(2, 12)
    U, S, V = exact_triplets(matrix, 5)
    for vectors in (U, V):
        assert torch.allclose(vectors.t() @ vectors, torch.eye(5, dtype=torch.float64), atol=1e-10)
    assert bool((S[2:] < 1e-5).all())


def test_more_rounds_bring_the_random_projection_nearer_to_the_exact_one() -> None:
    matrix = torch.randn(120, 80, generator=torch.Generator().manual_seed(0))
    best = (matrix.double() - _product(exact_triplets(matrix, 4))).norm()
    errors = [
        float((matrix - _product(random_triplets(matrix, 4, rounds, torch.Generator().manual_seed(1)))).norm() / best)
        for rounds in (0, 2, 16)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(1.0, abs=1e-3)


def _product(triplets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    U, S, V = triplets
    return (U * S) @ V.t()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_invariant_7_the_start_is_the_base_and_the_file_is_the_trained_model_on_the_untouched_base(
    make: str,
    settings: dict[str, Any],
    run: Run,
    train: Train,
    ids: Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    new: Make = request.getfixturevalue(make)
    module = new()
    before = run(module, ids)
    adapted = attach(module, LoraConfig(r=4, lora_alpha=6, **settings), seed=0)
    # DoRA divides by a norm that it computes from other sums; otherwise not a bit is different.
    assert torch.allclose(run(module, ids), before, atol=1e-6 if settings.get("use_dora") else 0.0, rtol=0)
    train(adapted, ids)
    after = run(module, ids)
    assert (after - before).abs().max() > 1e-2
    folder = adapted.save(tmp_path / "adapter")
    assert torch.allclose(run(load_adapter(new(), folder).module, ids), after, atol=1e-6)
    assert torch.allclose(run(merge(adapted), ids), after, atol=1e-5)
    with adapted.disabled():
        assert torch.equal(run(module, ids), before)
    assert torch.equal(run(adapted.detach(), ids), before)


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_peft_opens_the_file_and_gives_the_same_logits(
    settings: dict[str, Any], llama: Make, run: Run, train: Train, ids: Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapted = attach(llama(), LoraConfig(r=4, lora_alpha=6, **settings), seed=0)
    train(adapted, ids)
    folder = adapted.save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(llama(), str(folder)).eval()
    assert theirs.peft_config["default"].r == 8
    assert torch.allclose(run(theirs, ids), run(adapted.module, ids), atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_what_is_taken_off_and_what_acts_add_up_to_the_weight(method: str, rank_stabilised: bool, llama: Make) -> None:
    """``W_res + s B A = W`` to float32's rounding, with ``W_res = W - s B0 A0``."""
    adapted = attach(
        llama(), LoraConfig(r=4, lora_alpha=6, init_lora_weights=method, use_rslora=rank_stabilised), seed=0
    )
    for path, adapter in adapted.linears().items():
        W = linear(adapted, path).rows()
        residual = W - adapter.scaling * adapter.B0 @ adapter.A0
        assert torch.allclose(residual + adapter.scaling * adapter.B @ adapter.A, W, atol=1e-7)
        if method == "pissa":
            singular = torch.linalg.svdvals(W)
            assert torch.allclose(torch.linalg.svdvals(residual)[:4], singular[4:8], rtol=1e-4)
        else:
            assert torch.allclose(adapter.B.t() @ adapter.B, torch.eye(4), atol=1e-5)


# PEFT's OLoRA forgets that a Conv1D holds its weight transposed: its A and B have each other's widths there.
@pytest.mark.parametrize(("make", "method"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
def test_the_factors_are_pefts_up_to_their_signs(make: str, method: str, request: pytest.FixtureRequest) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    new: Make = request.getfixturevalue(make)
    names = ["q_proj", "down_proj"] if make == "llama" else ["c_attn", "c_fc"]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": names, "init_lora_weights": method}
    adapted = attach(new(), LoraConfig(**settings), seed=0)
    theirs = get_peft_model(new(), PeftConfig(**settings, fan_in_fan_out=make == "gpt2"))
    for path, adapter in adapted.linears().items():
        other: Any = theirs.base_model.model.get_submodule(path)
        A, B = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
        assert torch.allclose(adapter.A.abs(), A.abs(), atol=1e-5)
        assert torch.allclose(adapter.B @ adapter.A, B @ A, atol=1e-5)


def test_three_steps_have_the_losses_of_pefts_pissa(llama: Make, ids: Tensor) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    adapted = attach(llama(), LoraConfig(**settings, init_lora_weights="pissa"), seed=0)
    theirs = get_peft_model(llama(), PeftConfig(**settings, init_lora_weights="pissa"))
    ours = _losses(adapted.module, adapted.parameters(), ids)
    # Signs of singular vectors change nothing, neither does AdamW see them. float32 over another base: 1e-5.
    expected = _losses(theirs, [p for p in theirs.parameters() if p.requires_grad], ids)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert ours[-1] < ours[0] - 1e-2


def _losses(module: nn.Module, parameters: list[nn.Parameter], ids: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        out = module(ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_over_codes_the_start_is_that_of_the_decoded_weights(
    method: str, dora: bool, llama: Make, run: Run, train: Train, ids: Tensor, tmp_path: Path
) -> None:
    def new() -> nn.Module:
        return in_codes(llama(hidden_size=64, intermediate_size=64))

    module = new()
    before = run(module, ids)
    adapted = attach(module, LoraConfig(r=4, init_lora_weights=method, use_dora=dora), seed=0)
    layer = linear(adapted, "model.layers.0.mlp.up_proj")
    assert isinstance(layer.base_layer, QuantizedLinear)
    decoded = layer.base_layer.weight.dequantize()
    adapter = adapted.linears()["model.layers.0.mlp.up_proj"]
    if method == "pissa":
        residual = decoded - adapter.scaling * adapter.B @ adapter.A
        assert torch.allclose(torch.linalg.svdvals(residual)[0], torch.linalg.svdvals(decoded)[4], rtol=1e-4)
    assert torch.allclose(run(module, ids), before, atol=1e-6)
    train(adapted, ids)
    after = run(module, ids)
    folder = adapted.save(tmp_path / "adapter")
    assert torch.allclose(run(load_adapter(new(), folder).module, ids), after, atol=1e-5)
    with adapted.disabled():
        assert torch.equal(run(module, ids), before)


def test_a_small_step_survives_16_bits(llama: Make) -> None:
    """What a step changes is far smaller than the rounding of the factors themselves."""
    adapted = attach(llama().to(torch.bfloat16), LoraConfig(r=4, init_lora_weights="pissa"), seed=0)
    layer = linear(adapted, "model.layers.0.mlp.up_proj")
    adapter = adapted.linears()["model.layers.0.mlp.up_proj"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in (adapter.A, adapter.B):
            factor.add_(torch.randn(factor.shape, generator=generator), alpha=1e-5)
    started = adapter.B0.double() @ adapter.A0.double()
    change = adapter.scaling * (adapter.B.detach().double() @ adapter.A.detach().double() - started)
    A, B = (factor.detach().to(torch.bfloat16) for factor in adapter.factors())
    acts = adapter.scaling * (B.double() @ A.double())
    assert float((acts - change).norm() / change.norm()) < 1e-2
    rounded = adapter.B.detach().to(torch.bfloat16).double() @ adapter.A.detach().to(torch.bfloat16).double()
    lost = adapter.scaling * (rounded - started)
    assert float((lost - change).norm() / change.norm()) > 0.5
    assert layer.weight.dtype == torch.bfloat16


def test_a_frozen_a_needs_no_second_half(llama: Make) -> None:
    adapted = attach(llama(), LoraConfig(r=4, init_lora_weights="pissa", use_lora_fa=True), seed=0)
    assert adapted.portable()[0].r == 4


def test_the_randomised_start_is_named_by_the_seed(llama: Make) -> None:
    states = [
        attach(llama(), LoraConfig(r=2, init_lora_weights="pissa_niter_0"), seed=seed).state() for seed in (0, 0, 1)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_the_rank_of_the_file_is_said(llama: Make) -> None:
    adapted = attach(llama(), LoraConfig(r=4, init_lora_weights="pissa"), seed=0)
    assert "rank 8" in adapted.notes["default"]


def test_a_rank_larger_than_every_matrix_is_refused_for_all_linear(llama: Make) -> None:
    module = llama()
    largest = max(min(part.weight.shape) for part in module.model.modules() if isinstance(part, nn.Linear))
    attach(llama(), LoraConfig(r=largest, target_modules="all-linear"))
    with pytest.raises(AdapterError, match=rf"rank {largest + 1} is larger than every matrix of the model"):
        attach(module, LoraConfig(r=largest + 1, target_modules="all-linear"))


def test_a_rank_larger_than_the_matrix_is_refused_before_anything_changes(llama: Make) -> None:
    module = llama()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(AdapterError, match="rank 40 is larger than this matrix, 32 x 32"):
        attach(module, LoraConfig(r=40, target_modules=["q_proj"], init_lora_weights="pissa"))
    assert module.state_dict().keys() == before.keys()


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_from_the_weight_says_what_it_does_not_start(method: str, llama: Make) -> None:
    module = llama()
    with pytest.raises(AdapterError, match="starts from the weight of a linear layer, and this adapter is on none"):
        attach(module, LoraConfig(r=4, init_lora_weights=method, target_modules=["embed_tokens"]))
    assert not any("adapters" in name for name, _ in module.named_modules())
    adapted = attach(
        module, LoraConfig(r=4, init_lora_weights=method, target_modules=["q_proj", "embed_tokens"]), seed=0
    )
    assert "; 1 that are no linear layers start as by default (model.embed_tokens)" in adapted.notes["default"]
    alone = attach(llama(), LoraConfig(r=4, init_lora_weights=method, target_modules=["q_proj"]), seed=0)
    assert "by default" not in alone.notes["default"]
