"""The invariants of an adapter, the first ten, for every kind that there is: what it computes, and what its file says.

The others are in ``test_invariants_rest.py``. What a single kind promises beyond them is in that kind's own tests.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import (
    IDS,
    KINDS,
    NF4,
    adapt,
    base,
    cases,
    config_of,
    decoded,
    dense,
    frozen,
    gradients,
    has_linears,
    linears,
    logits,
    loss_of,
    stir,
    stirred,
    train,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.adapters import attach, load_adapter, merge
from veneer.adapters.config import PLAIN_INITS
from veneer.adapters.row_norm import row_norm
from veneer.data.pack import Batch
from veneer.kernels.dropout import Dropout
from veneer.models import fused, fused_attention, fused_layer, fused_mlp
from veneer.models.head import answer_loss, hidden_states

# PEFT and transformers talk about names and tied weights on their own account.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

# float32, the same formula summed in another order; the logits are up to 5
NEAR = {"rtol": 1e-4, "atol": 2e-5}
SHOWS = 0.1  # what a change of the adapter is to move the logits by at least


# 1. A fresh adapter is an exact no-op


@cases(lambda kind: kind.at_base)
def test_01_a_fresh_adapter_is_an_exact_no_op(name: str, stored: str) -> None:
    before = logits(base(name, stored))
    adapted = adapt(name, stored)
    torch.testing.assert_close(logits(adapted.module), before, rtol=0, atol=KINDS[name].rounding)
    stir(adapted)
    assert (logits(adapted.module) - before).abs().max() > SHOWS


@cases(lambda kind: kind.at_base and kind.settings.get("init_lora_weights", True) in PLAIN_INITS)
def test_01_without_a_start_it_is_none(name: str, stored: str) -> None:
    if config_of(name).adalora_config is not None:
        return  # it has no other start: all singular values are zero
    before = logits(base(name, stored))
    attach(module := base(name, stored), config_of(name, init_lora_weights=False), seed=0)
    assert (logits(module) - before).abs().max() > 1e-2


# 2. Adapter off is the base bit for bit, and on again it is what it was


@cases()
def test_02_off_is_the_base_and_on_again_it_is_itself_also_after_a_merge(name: str, stored: str) -> None:
    before = logits(base(name, stored))
    adapted = stirred(name, stored)
    weights, after = frozen(adapted), logits(adapted.module)
    assert (after - before).abs().max() > SHOWS
    for _ in range(2):
        with adapted.disabled():
            assert torch.equal(logits(adapted.module), before)
        assert torch.equal(logits(adapted.module), after)
        merge(adapted)
    assert torch.equal(logits(adapted.detach()), before)
    own = adapted.module.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[key], weights[key]) for key in own)


# 3. Merged is unmerged


@cases()
def test_03_merged_is_unmerged_and_stays_so_through_a_file(name: str, stored: str, tmp_path: Path) -> None:
    adapted = stirred(name, stored)
    merged: Any = merge(adapted)
    expected = logits(adapted.module)
    torch.testing.assert_close(logits(merged), expected, **NEAR)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))
    stir(adapted)
    assert (logits(merge(adapted)) - expected).abs().max() > SHOWS


# 4. The file: the same logits, the keys and shapes that belong there, the same bytes every time

LINEAR = {"lora_A.weight": [4, 32], "lora_B.weight": [32, 4]}
TWICE = {"lora_A.weight": [8, 32], "lora_B.weight": [32, 8]}
Q = "base_model.model.model.layers.0.self_attn.q_proj."
# What the file holds for the first q_proj, or for what is named by its whole key.
GOLDEN: dict[str, dict[str, list[int]]] = {
    "lora": LINEAR,
    "rslora": LINEAR,
    "patterns": {},  # of the second layer alone
    "orthogonal": LINEAR,
    "dora": LINEAR | {"lora_magnitude_vector": [32]},
    "dora with rslora and patterns": {
        "lora_A.weight": [2, 32],
        "lora_B.weight": [32, 2],
        "lora_magnitude_vector": [32],
    },
    "pissa": TWICE,
    "pissa_niter": TWICE,
    "olora": TWICE,
    "pissa with dora": TWICE | {"lora_magnitude_vector": [32]},
    "lora_ga": TWICE,
    "loftq": LINEAR,
    "loftq, 3 rounds": TWICE,
    "loftq with dora": LINEAR | {"lora_magnitude_vector": [32]},
    "adalora": LINEAR,
    "lora_fa": LINEAR,
    "embedding": LINEAR
    | {
        "base_model.model.model.embed_tokens.lora_embedding_A": [4, 64],
        "base_model.model.model.embed_tokens.lora_embedding_B": [32, 4],
    },
    "head": LINEAR | {f"base_model.model.lm_head.lora_{x}.weight": s for x, s in (("A", [4, 32]), ("B", [64, 4]))},
    "saved": LINEAR | {"base_model.model.model.norm.weight": [32], "base_model.model.lm_head.weight": [64, 32]},
    "tokens": LINEAR | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": [3, 32]},
    "experts": LINEAR
    | {
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight": [16, 32],
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight": [96, 16],
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight": [16, 48],
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight": [32, 16],
    },
}


@cases()
def test_04_saved_and_loaded_it_has_the_same_logits_and_bytes(name: str, stored: str, tmp_path: Path) -> None:
    adapted = stirred(name, stored)
    expected = logits(adapted.module)
    folder = adapted.save(tmp_path / "a")
    for _ in range(2):
        adapted.save(tmp_path / "b")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "b" / file).read_bytes() == (folder / file).read_bytes()
        adapted = load_adapter(base(name, stored), folder)
        if "3 rounds" not in name:  # its codes are nobody else's: the file is for the weights in 16 bits
            torch.testing.assert_close(logits(adapted.module), expected, rtol=0, atol=1e-6)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_lora_weights"] in PLAIN_INITS) == ("LORA", True)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors.values())
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)


@pytest.mark.parametrize("name", GOLDEN)
def test_04_the_keys_and_shapes_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    folder = stirred(name, KINDS[name].stored[0]).save(tmp_path / "a")
    found = {key: list(t.shape) for key, t in load_file(folder / "adapter_model.safetensors").items()}
    golden = {key if key.startswith("base_model") else Q + key: shape for key, shape in GOLDEN[name].items()}
    plain = {key for key in found if key.endswith(("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))}
    assert {key: found.get(key) for key in golden} == golden
    assert found.keys() - golden.keys() <= plain, "and nothing but other linears"
    assert (Q + "lora_A.weight" in found) == bool(golden)


# 5. PEFT computes the same from the file, and what PEFT writes is read with the same logits


@cases(lambda kind: kind.stored != (NF4,) or not kind.settings.get("loftq_config"))
def test_05_peft_reads_the_file_and_writes_one_that_is_read_with_the_same_logits(
    name: str, stored: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    adapted = stirred(name, stored)
    expected = logits(adapted.module)
    with warnings.catch_warnings():
        # PEFT does not stop at a missing key, it warns: here that is a failure.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(decoded(base(name, stored)), str(adapted.save(tmp_path / "ours")))
    torch.testing.assert_close(logits(theirs.eval()), expected, **NEAR)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(logits(load_adapter(base(name, stored), tmp_path / "theirs").module), expected, **NEAR)
    with adapted.disabled():
        assert (logits(adapted.module) - expected).abs().max() > SHOWS


# 6. The scaling is alpha / r, or alpha / sqrt(r), of each module's own rank and alpha, also after the tensors changed


@cases(has_linears)
def test_06_the_scaling_follows_rank_and_alpha_and_survives_a_file_and_other_tensors(
    name: str, stored: str, tmp_path: Path
) -> None:
    adapted = stirred(name, stored)
    config, plan = adapted.configs["default"], adapted.plans["default"]
    for target in plan.lora:
        adapter = adapted.linears()[target.path]
        root = target.r**0.5 if config.use_rslora else target.r
        assert adapter.scaling == pytest.approx(target.lora_alpha / root)
        assert adapter.r == target.r
    if "rank_pattern" in KINDS[name].settings:
        assert {(t.r, t.lora_alpha) for t in plan.lora} == {(2, 6), (4, 3), (4, 6)}
    deltas = {path: adapter.delta() for path, adapter in adapted.linears().items()}
    folder = adapted.save(tmp_path / "a")
    loaded = load_adapter(base(name, stored), folder)
    swapped = load_adapter(base(name, stored), folder)
    stir(swapped)
    changed = {path: adapter.delta() for path, adapter in swapped.linears().items()}
    swapped.load_state(loaded.state())
    for path, delta in deltas.items():
        if adapted.linears()[path].own is not None:
            continue  # the file's update is against the weights in 16 bits
        torch.testing.assert_close(loaded.linears()[path].delta(), delta, rtol=1e-5, atol=1e-6)
        assert torch.equal(swapped.linears()[path].delta(), loaded.linears()[path].delta())
        assert not torch.allclose(changed[path], delta, atol=1e-2)
    for adapter in loaded.linears().values():
        before, adapter.scaling = adapter.delta(), 2 * adapter.scaling
        torch.testing.assert_close(adapter.delta(), 2 * before)


# 7. What a start takes from the weight is put back, and the file holds it against the untouched base


@cases(lambda kind: str(kind.settings.get("init_lora_weights")).startswith(("pissa", "olora", "lora_ga")))
def test_07_residual_and_start_add_up_to_the_weight(name: str, stored: str, tmp_path: Path) -> None:
    adapted = adapt(name, stored)
    for layer in linears(adapted):
        adapter: Any = layer.adapters["default"]
        W, start = layer.rows(), adapter.scaling * adapter.B0 @ adapter.A0
        torch.testing.assert_close((W - start) + adapter.scaling * adapter.B @ adapter.A, W, rtol=0, atol=1e-6)
        assert start.norm() > 0.1 * W.norm() or "ga" in name, "nothing was taken from the weight"
    train(adapted)
    plain = load_adapter(base(name, stored), adapted.save(tmp_path / "a"))
    assert not any(hasattr(adapter, "A0") for adapter in plain.linears().values())
    for layer, loaded in zip(linears(adapted), linears(plain)):
        delta = loaded.adapters["default"].delta()  # type: ignore[operator]  # untyped attributes
        torch.testing.assert_close(delta, (dense(layer)[0] - layer.rows()).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(plain.module), logits(adapted.module), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1, 4, 24])
@cases(lambda kind: kind.settings.get("init_lora_weights") == "loftq" and not kind.settings.get("use_dora"))
def test_07_loftq_lowers_the_error_of_the_codes_whatever_alpha_is(name: str, stored: str, alpha: int) -> None:
    """PEFT leaves the scaling out (its issue 1982): with ``alpha != r`` its start makes the error larger."""
    plain, module = base(name), base(name, stored)
    attach(module, config_of(name, lora_alpha=alpha), seed=0, originals=lambda paths, visit: [
        visit(path, plain.get_submodule(path).weight) for path in paths  # type: ignore[func-returns-value, arg-type]
    ])  # fmt: skip
    layers = {path: layer for path, layer in module.named_modules() if layer in linears_of(module)}
    assert layers
    for path, layer in layers.items():
        W: Any = plain.get_submodule(path).weight
        adapter: Any = layer.adapters["default"]  # type: ignore[index]  # untyped attributes
        lost = (W - layer.base_layer.weight.dequantize()).norm()  # type: ignore[union-attr, operator]
        left = (W - dense(layer)[0]).norm()  # type: ignore[arg-type]
        assert left < 0.95 * lost
        if adapter.own is None:
            without_scaling = W - layer.base_layer.weight.dequantize() - alpha / 4 * adapter.delta()  # type: ignore[union-attr, operator]
            assert alpha == 4 or without_scaling.norm() > left


def linears_of(module: nn.Module) -> list[nn.Module]:
    from veneer.adapters import LoraLinear

    return [layer for layer in module.modules() if isinstance(layer, LoraLinear)]


# 8. DoRA: the norm and the gradients are the paper's, whatever the factors are


@cases(lambda kind: kind.settings.get("use_dora", False))
def test_08_doras_norm_is_that_of_the_dense_rows_and_the_magnitude_decides_it(name: str, stored: str) -> None:
    adapted = stirred(name, stored)
    for layer in linears(adapted):
        adapter: Any = layer.adapters["default"]
        whole = dense(layer)[0].detach()
        torch.testing.assert_close(row_norm(adapter, layer), whole.norm(dim=1), rtol=1e-5, atol=0)
        rows = layer.rows()
        assert not torch.allclose(whole.norm(dim=1), rows.norm(dim=1), rtol=1e-2)
        merged = layer.merged(["default"])["weight"]
        merged = merged.t() if layer.transposed else merged
        torch.testing.assert_close(merged.norm(dim=1), adapter.magnitude.detach().abs(), rtol=1e-4, atol=1e-5)


@cases(lambda kind: kind.settings.get("use_dora", False))
def test_08_under_dropout_the_magnitude_scales_all_of_the_bases_answer(name: str, stored: str) -> None:
    adapted = stirred(name, stored)
    layer = linears(adapted)[0].train()
    adapter: Any = layer.adapters["default"]
    adapter.dropout = 0.5
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    dropped = Dropout.drawn(0.5)(x)
    whole, g = dense(layer)
    plain = x @ layer.rows().t() + dropped @ (whole - layer.rows()).t()
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(got, g * plain + bias, **NEAR)
    assert not torch.allclose(got, g * (x @ whole.t()) + bias, atol=1e-2)


# 9. Gradients: ours against autograd in double precision, in 16 bits, checkpointed, accumulated, in fused blocks


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@cases(has_linears)
def test_09_gradients_are_autograds_in_double_precision(name: str, stored: str, dropout: float) -> None:
    adapted = stirred(name, stored, module=base(name, stored).double())
    for layer in linears(adapted)[:3]:
        adapter: Any = layer.train().adapters["default"]
        adapter.dropout = dropout
        x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(5, layer.out_features, dtype=torch.float64)
        trained = [x, *(p for p in adapter.parameters() if p.requires_grad)]
        torch.manual_seed(7)
        y = layer(x)
        ours = torch.autograd.grad(y, trained, upstream)
        torch.manual_seed(7)
        whole, g = dense(layer)
        rows = layer._weight_of(["default"])
        rows = rows if isinstance(rows, Tensor) else rows.dequantize()
        rows = rows.t() if layer.transposed else rows
        change = (Dropout.drawn(dropout)(x) if dropout else x) @ (whole - rows).t()
        expected = g * (x @ rows.t() + change)
        expected = expected if layer.bias is None else expected + layer.bias
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
        for own, other in zip(ours, torch.autograd.grad(expected, trained, upstream)):
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9)
            assert own.abs().max() > 1e-3


@cases()
def test_09_gradients_in_bfloat16_are_those_of_float32_up_to_its_rounding(name: str, stored: str) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        adapted = stirred(name, stored)
        adapted.module.to(dtype)
        found.append(gradients(adapted))
        assert all(p.dtype == torch.float32 for p in adapted.parameters())
    wide, narrow = (torch.cat([g.flatten() for g in every.values()]) for every in found)
    # bfloat16 has 8 bits, and errors of two layers add up; a missing factor would be an error of about 1.
    assert (wide - narrow).norm() < 0.1 * wide.norm()
    assert torch.nn.functional.cosine_similarity(wide, narrow, dim=0) > 0.995


@cases(lambda kind: kind.model != "gpt-oss")
def test_09_checkpointing_and_accumulation_change_no_gradient(name: str, stored: str) -> None:
    adapted = stirred(name, stored)
    module: Any = adapted.module.train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    whole = gradients(adapted)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(adapted)
    assert all(torch.equal(checkpointed[key], whole[key]) for key in whole)
    module.gradient_checkpointing_disable()
    for parameter in adapted.parameters():
        parameter.grad = None
    half = []
    for row in (0, 1):
        out = module(IDS[row : row + 1]).logits
        targets = torch.tensor([row]) if out.dim() == 2 else IDS[row, 1:]
        out = out if out.dim() == 2 else out[0, :-1]
        (nn.functional.cross_entropy(out, targets) / 2).backward()
        half.append(adapted.parameters()[-1].grad.clone())  # type: ignore[union-attr]
    for key, parameter in adapted.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[key], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(half[0], half[1])


@cases(lambda kind: kind.model.startswith("llama") and "classes" not in kind.model)
def test_09_fused_blocks_give_the_loss_and_gradients_of_the_models_own_code(
    name: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()
    for home, operation in ((fused_mlp, "gated_mlp"), (fused_attention, "qkv_rope"), (fused_layer, "add_rms_norm")):
        own = getattr(home, operation)
        monkeypatch.setattr(home, operation, lambda *a, own=own, name=operation: (called.add(name), own(*a))[1])
    ids = IDS[:1]
    targets = torch.cat((ids[:, 1:], torch.full((1, 1), -100)), dim=1)
    packed = Batch(ids, torch.arange(12)[None], targets, [12], None, ["row"], 12, 11)
    found = []
    for is_fused in (False, True):
        module = base(name, stored)
        if is_fused:
            fused.fuse(module)
        adapted = stirred(name, stored, module=module)
        if is_fused:
            loss = answer_loss(module, hidden_states(module, packed), targets).loss_sum
        else:
            loss = 11 * loss_of(module, ids)
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in adapted.named_parameters()}))
        if not is_fused:
            assert not called
    (plain, expected), (got, theirs) = found
    torch.testing.assert_close(got, plain, **NEAR)
    for key, gradient in expected.items():
        torch.testing.assert_close(theirs[key], gradient, rtol=1e-3, atol=5e-5, msg=key)
        assert gradient is None or gradient.abs().max() > 5e-3
    assert called == {"gated_mlp", "qkv_rope", "add_rms_norm"}


# 10. All that is trained gets a gradient, and nothing else moves


@cases()
def test_10_everything_trained_gets_a_gradient_within_two_steps_and_nothing_else_moves(name: str, stored: str) -> None:
    adapted = adapt(name, stored)
    weights, start = frozen(adapted), copy.deepcopy(adapted.state())
    adapted.module.train()
    steps = train(adapted)
    trained = [key for key, _ in adapted.named_parameters()]
    for key in trained:
        assert any(step[key].abs().max() > 0 for step in steps[:2]), f"{key} has no gradient within two steps"
        assert not torch.equal(adapted.state()[key], start[key])
    for key in start.keys() - set(trained):
        assert torch.equal(adapted.state()[key], start[key]), f"{key} is kept, not trained"
    assert (adapted.configs["default"].use_lora_fa) == (not any("lora_A" in key for key in trained))
    own, parameters = frozen(adapted), set(adapted.parameters())
    assert all(torch.equal(own[key], weights[key]) for key in weights)
    assert all(p in parameters or (p.grad is None and not p.requires_grad) for p in adapted.module.parameters())
    with torch.no_grad():
        assert loss_of(adapted.module.eval()) < loss_of(base(name, stored))
