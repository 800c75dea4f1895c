"""AdaLoRA as an adapter: B (E * A). Its file is plain LoRA, and PEFT's own files are read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, merge
from veneer.adapters.adalora import orthogonality
from veneer.adapters.settings import AdaLoraConfig
from veneer.errors import AdapterError

# PEFT talks about tied weights, embeddings and base model names on its own account.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

# float32, the same formula summed in another order
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
TARGETS = ["q_proj", "v_proj", "down_proj"]
R = 6
PEFT_EPSILON = 1e-5  # PEFT divides lora_alpha by r + 1e-5
ALPHA = 12.0

Llama = Callable[..., nn.Module]
Run = Callable[[nn.Module, Tensor], Tensor]


def config(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": TARGETS,
        "adalora_config": {"target_r": 2},
    }
    return LoraConfig(**(settings | changes))


def randomise(adapted: AdaptedModel, scale: float = 0.3) -> None:
    """Values that make every tensor show in the logits; E no longer zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def drop(adapted: AdaptedModel, kept: dict[str, int]) -> None:
    """Leaves ``kept`` triplets, the last ones, of the modules whose path ends so."""
    with torch.no_grad():
        for path, adapter in adapted.linears().items():
            for end, count in kept.items():
                if path.endswith(end) and adapter.E is not None:
                    adapter.E[: adapter.r - count] = 0.0


KEPT = {"layers.0.self_attn.q_proj": 0, "layers.1.self_attn.q_proj": 1, "v_proj": 4}


def test_a_fresh_adapter_is_the_base_bit_for_bit_and_starts_as_in_the_paper(
    llama: Llama, ids: Tensor, run: Run
) -> None:
    base = llama(hidden_size=256, intermediate_size=256)
    before = run(base, ids)
    adapted = attach(base, config(r=16), seed=3)
    assert torch.equal(run(adapted.module, ids), before)
    for adapter in adapted.linears().values():
        assert adapter.E is not None
        assert not adapter.E.any()
        for factor in (adapter.A, adapter.B):
            assert abs(float(factor.detach().std()) - 0.02) < 0.002
    again = attach(llama(hidden_size=256, intermediate_size=256), config(r=16), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), again.parameters()))


def peft_twin(base: nn.Module, adapted: AdaptedModel, **settings: Any) -> Any:
    """PEFT's AdaLoRA with the same tensors."""
    peft = pytest.importorskip("peft")
    made = {"init_r": R, "target_r": 2, "lora_alpha": ALPHA, "target_modules": TARGETS, "total_step": 100}
    model = peft.get_peft_model(base, peft.AdaLoraConfig(**(made | settings), task_type="CAUSAL_LM"))
    state = {key.removesuffix(".weight"): value for key, value in adapted.state().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name and "ranknum" not in name:
                parameter.copy_(state.pop(name.replace(".default", "")))
    assert not state
    return model


def ours(base: nn.Module) -> AdaptedModel:
    """With PEFT's epsilon in lora_alpha, so that the scaling is the same number."""
    adapted = attach(base, config(lora_alpha=ALPHA * R / (R + PEFT_EPSILON)), seed=0)
    randomise(adapted, 0.1)
    return adapted


def test_logits_gradients_and_three_steps_equal_pefts(llama: Llama, ids: Tensor, run: Run) -> None:
    adapted = ours(llama())
    theirs = peft_twin(llama(), adapted)
    with adapted.disabled():
        assert (run(adapted.module, ids) - run(theirs, ids)).abs().max() > 1e-2, "the adapter must show"
    torch.testing.assert_close(run(adapted.module, ids), run(theirs, ids), **TOLERANCE)
    pairs = dict(adapted.named_parameters())
    others = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad and ".lora_" in name
    }
    assert {key.removesuffix(".weight") for key in pairs} == set(others)
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-2) for p in (pairs, others)]
    for _ in range(3):
        for model, optimizer in zip((adapted.module, theirs), optimizers):
            optimizer.zero_grad()
            out = model(ids).logits[:, :-1]
            nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for key, parameter in pairs.items():
            other = others[key.removesuffix(".weight")]
            assert parameter.grad is not None
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, other.grad, **TOLERANCE, msg=key)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(run(adapted.module, ids), run(theirs, ids), rtol=1e-3, atol=1e-4)


def test_pefts_scaling_is_smaller_by_its_epsilon_and_ours_is_alpha_over_r(llama: Llama) -> None:
    adapted = attach(llama(), config(), seed=0)
    assert {adapter.scaling for adapter in adapted.linears().values()} == {ALPHA / R}
    theirs = peft_twin(llama(), adapted)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    assert float(layer.scaling["default"] / (layer.ranknum["default"] + PEFT_EPSILON)) == pytest.approx(
        ALPHA / R / (1 + PEFT_EPSILON / R), rel=1e-7
    )


def test_the_gradient_of_the_orthogonality_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 8), (5, 4), (3, 8), (2, 9)]
    factors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    total = torch.stack([torch.linalg.norm(P @ P.t() - torch.eye(len(P), dtype=P.dtype)) for P in factors]).mean()
    expected = torch.autograd.grad(0.7 * total, factors)
    gradients = [torch.ones(shape, dtype=torch.float64) for shape in shapes]
    # Views of what is wider, as B's columns are.
    gradients[1] = torch.ones(4, 5, dtype=torch.float64).t()
    value = orthogonality([P.detach() for P in factors], gradients, 0.7)
    torch.testing.assert_close(value, total.detach())
    for found, wanted in zip(gradients, expected):
        torch.testing.assert_close(found, 1 + wanted)


def test_orthonormal_directions_have_no_gradient_and_no_nan() -> None:
    gradient = torch.zeros(3, 3)
    assert orthogonality([torch.eye(3)], [gradient], 1.0) == 0
    assert not gradient.any()


def test_the_orthogonality_is_pefts(llama: Llama, ids: Tensor) -> None:
    adapted = ours(llama())
    theirs = peft_twin(llama(), adapted, orth_reg_weight=0.5)
    plain = theirs.base_model.model(input_ids=ids, labels=ids).loss
    wanted = theirs(input_ids=ids, labels=ids).loss - plain
    factors = [P.detach() for adapter in adapted.linears().values() for P in (adapter.A, adapter.B.t())]
    value = orthogonality(factors, [torch.zeros_like(P) for P in factors], 0.5)
    torch.testing.assert_close(0.5 * value, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kept", [KEPT, {}, {"proj": 0}])
def test_the_file_is_plain_lora_of_the_ranks_that_are_left_and_peft_computes_the_same(
    kept: dict[str, int], use_rslora: bool, llama: Llama, ids: Tensor, run: Run, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    adapted = attach(llama(), config(use_rslora=use_rslora), seed=0)
    randomise(adapted)
    drop(adapted, kept)
    expected = run(adapted.module, ids)
    adapted.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in file)
    for path in adapted.linears():
        wanted = next((count for end, count in kept.items() if path.endswith(end)), R)
        A, B = (file[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
        assert (A.shape[0], B.shape[1]) == (max(wanted, 1),) * 2, path
        if not wanted:
            assert not A.any()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "a")).eval()
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(run(theirs, ids), expected, **TOLERANCE)
    torch.testing.assert_close(run(load_adapter(llama(), tmp_path / "a").module, ids), expected, **TOLERANCE)


def test_trimming_leaves_plain_lora_that_computes_the_same_and_can_be_trained(
    llama: Llama, ids: Tensor, run: Run, train: Callable[..., list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    adapted = attach(llama(), config(), seed=0)
    randomise(adapted)
    drop(adapted, KEPT)
    before, count = run(adapted.module, ids), adapted.trainable_count()
    adapted.save(tmp_path / "before")
    adapted.trim()
    adapted.save(tmp_path / "after")
    torch.testing.assert_close(run(adapted.module, ids), before, **TOLERANCE)
    assert adapted.trainable_count() < count
    assert adapted.configs["default"].adalora_config is None
    assert {path.split("layers.")[1]: adapter.r for path, adapter in adapted.linears().items()} == {
        "0.self_attn.q_proj": 1,
        "0.self_attn.v_proj": 4,
        "0.mlp.down_proj": 6,
        "1.self_attn.q_proj": 1,
        "1.self_attn.v_proj": 4,
        "1.mlp.down_proj": 6,
    }
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    adapted.trim()  # there is nothing left to trim
    gradients = train(adapted, ids, steps=1)[0]
    for path in adapted.linears():  # A's alone, where both E and so A' are zero
        assert gradients[f"base_model.model.{path}.lora_A.weight"].any(), path
    base = adapted.detach()
    assert torch.equal(run(base, ids), run(llama(), ids))


def test_training_goes_on_from_all_triplets(llama: Llama, ids: Tensor, run: Run, tmp_path: Path) -> None:
    """The checkpoint's adapter is plain; what training goes on from lies beside it."""
    from veneer.adapters.save import read_training_state

    adapted = attach(llama(), config(), seed=0)
    randomise(adapted)
    drop(adapted, KEPT)
    adapted.save(tmp_path / "a", training_state=True)
    other = attach(llama(), config(), seed=1)
    other.load_state(read_training_state(tmp_path / "a"))
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), other.parameters()))


def test_merged_is_unmerged(llama: Llama, ids: Tensor, run: Run) -> None:
    adapted = attach(llama(), config(), seed=0)
    randomise(adapted)
    drop(adapted, KEPT)
    expected = run(adapted.module, ids)
    merged = merge(adapted)
    torch.testing.assert_close(run(merged, ids), expected, **TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
def test_pefts_adalora_file_is_read_as_plain_lora_with_the_same_logits(
    masked: bool, llama: Llama, ids: Tensor, run: Run, tmp_path: Path
) -> None:
    adapted = ours(llama())
    drop(adapted, KEPT if masked else {})
    theirs = peft_twin(llama(), adapted).eval()
    if masked:  # as its allocator leaves it: a list of booleans for each module
        theirs.peft_config["default"].rank_pattern = {
            name.removeprefix("base_model.model."): (p != 0).view(-1).tolist()
            for name, p in theirs.named_parameters()
            if "lora_E" in name
        }
    expected = run(theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    opened = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(run(opened.module, ids), expected, **TOLERANCE)
    if masked:
        assert [a.r for a in opened.linears().values()] == [1, 4, 6, 1, 4, 6]
    opened.save(tmp_path / "ours")
    again = load_adapter(llama(), tmp_path / "ours")
    torch.testing.assert_close(run(again.module, ids), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_lora_fa": True}, "A would be frozen"),
        ({"init_lora_weights": "pissa"}, "starts all of them at zero"),
        ({"init_lora_weights": "gaussian"}, "starts all of them at zero"),
        ({"r": 1}, "from rank 1 up to 2"),
        ({"adalora_config": {"init_r": 12}}, "unknown key 'init_r'"),
    ],
)
def test_what_does_not_go_with_adalora_is_refused_by_its_reason(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        config(**changes)


def test_an_embedding_is_refused(llama: Llama) -> None:
    with pytest.raises(AdapterError, match="AdaLoRA has no form for embeddings") as caught:
        attach(llama(), config(target_modules=["q_proj", "embed_tokens"]))
    assert caught.value.where == "model.embed_tokens"


@pytest.mark.parametrize("name", ["tinit", "tfinal"])
def test_a_share_of_the_run_is_below_one_and_more_are_whole_steps(name: str) -> None:
    for fits in (0, 0.99, 1, 1.0, 20, 20.0):
        assert getattr(AdaLoraConfig(**{name: fits}), name) == fits
    for value in (1.5, 20.25):
        with pytest.raises(AdapterError, match=f"{name} cannot be {value}") as refused:
            config(adalora_config={"target_r": 2, name: value})
        assert "a share of the run, below 1, or a whole number of steps" in str(refused.value.fix)
