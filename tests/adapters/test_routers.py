"""LoRA on the routers of MoE models: on by default, exact, and the same in PEFT; linears named by their parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_models import _FEW, HYBRID, MOE, _text
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, merge, resolve
from veneer.adapters.router import LoraRouter
from veneer.adapters.save import warnings_of
from veneer.errors import AdapterError

_GROUPS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
_GROUPS |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
# Shared experts and dense layers with the names that PEFT takes for those of experts.
BESIDE = {
    "qwen2-moe": MOE["qwen2-moe"],
    "deepseek-v3": MOE["deepseek-v3"],
    "glm4-moe": _text("Glm4Moe", head_dim=8, **_GROUPS),
    "ernie": _text("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1),
    "hunyuan": _text("HunYuanMoEV1", num_experts=4, moe_topk=2, head_dim=8),
    "qwen3-next": _text(
        "Qwen3Next",
        head_dim=8,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        **_FEW,
    ),
    "lfm2-moe": _text(
        "Lfm2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_dense_layers=1,
        layer_types=["full_attention", "conv"],
    ),
}
MODELS = MOE | {name: HYBRID[name] for name in ("jamba", "nemotron-h")}
ROUTER = {name: "router" if name in ("phimoe", "gpt-oss", "jamba") else "gate" for name in MODELS}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32, the same formula summed in another order
PEFT_TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")


def adapt(module: nn.Module, **config: Any) -> AdaptedModel:
    """An adapter with random factors, so that every part of it shows."""
    adapted = attach(module, LoraConfig(**({"r": 2, "lora_alpha": 4} | config)), seed=0)
    randomise(adapted.parameters())
    return adapted


@torch.no_grad()
def randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in parameters:
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def routers(adapted: AdaptedModel) -> dict[str, LoraRouter]:
    return {path: m for path, m in adapted.module.named_modules() if isinstance(m, LoraRouter)}


@torch.no_grad()
def dense(adapted: AdaptedModel, module: nn.Module) -> nn.Module:
    """``module``, the same base, with ``W + s B A`` written into the matrices of its routers."""
    for path, slot in routers(adapted).items():
        adapter: Any = slot.adapters["default"]
        module.get_submodule(path).weight.add_(2.0 * adapter.B @ adapter.A)  # type: ignore[operator, union-attr]
    return module


@pytest.mark.parametrize("name", MODELS)
def test_a_router_is_adapted_by_default_and_computes_with_its_update(name: str, ids: Tensor, run: Any) -> None:
    default = resolve(MODELS[name](), LoraConfig(r=3))
    assert ROUTER[name] in {target.path.rpartition(".")[2] for target in default.lora if target.kind == "router"}
    adapted = adapt(MODELS[name](), target_modules=[ROUTER[name]])
    assert set(routers(adapted)) == {target.path for target in default.lora if target.kind == "router"}
    got = run(adapted.module, ids)
    torch.testing.assert_close(got, run(dense(adapted, MODELS[name]()), ids), **TOLERANCE)
    with adapted.disabled():
        off = run(adapted.module, ids)
    assert torch.equal(off, run(MODELS[name](), ids))
    assert (got - off).abs().max() > 1e-2
    torch.testing.assert_close(run(merge(adapted), ids), got, **TOLERANCE)
    assert torch.equal(run(adapted.detach(), ids), off)


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_gradients_are_those_of_the_dense_update(name: str) -> None:
    """``dA = s B^T dW`` and ``dB = s dW A^T``, with ``dW`` by torch's own differentiation."""
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))
    adapted = adapt(MODELS[name](), target_modules=[ROUTER[name]])
    plain = dense(adapted, MODELS[name]())
    for module in (adapted.module, plain):
        module(ids).logits.square().mean().backward()
    for path, slot in routers(adapted).items():
        adapter: Any = slot.adapters["default"]
        dw: Any = plain.get_submodule(path).weight.grad  # type: ignore[union-attr]
        torch.testing.assert_close(adapter.A.grad, 2.0 * adapter.B.mT @ dw, **TOLERANCE)
        torch.testing.assert_close(adapter.B.grad, 2.0 * dw @ adapter.A.mT, **TOLERANCE)
        assert adapter.A.grad.any()


@pytest.mark.parametrize("name", BESIDE)
@QUIET
def test_peft_gives_the_same_logits_for_routers_and_for_the_layers_beside_experts(
    name: str, ids: Tensor, run: Any, tmp_path: Any
) -> None:
    peft = pytest.importorskip("peft")
    adapted = adapt(BESIDE[name]())
    expected = run(adapted.module, ids)
    adapted.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(BESIDE[name](), str(tmp_path / "ours")).eval()
    # The linear attention of Qwen3-Next amplifies the last digits.
    near = {"rtol": 0.0, "atol": 1e-4} if name == "qwen3-next" else PEFT_TOLERANCE
    torch.testing.assert_close(run(theirs, ids), expected, **near)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_adapter(BESIDE[name](), tmp_path / folder)
        torch.testing.assert_close(run(again.module, ids), expected, **PEFT_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("mixtral", ["gate.weight"]),
        ("mixtral", ["o_proj.weight"]),
        ("gpt-oss", ["router.weight", "experts.down_proj"]),
        ("qwen3-moe", ["1.mlp.gate.weight", "self_attn.q_proj.weight"]),
        ("deepseek-v3", ["shared_experts.down_proj.weight", "gate.weight", "experts.gate_up_proj"]),
    ],
)
@QUIET
def test_an_adapter_that_peft_made_on_parameters_is_read(
    name: str, entries: list[str], ids: Tensor, run: Any, tmp_path: Any
) -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["k_proj", "kv_b_proj"], "target_parameters": entries}
    theirs = peft.get_peft_model(MOE[name](), peft.LoraConfig(init_lora_weights=False, **settings)).eval()
    expected = run(theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(MOE[name](), tmp_path / "theirs")
    torch.testing.assert_close(run(again.module, ids), expected, **PEFT_TOLERANCE)
    again.save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(MOE[name](), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(run(back, ids), expected, **PEFT_TOLERANCE)


@QUIET
def test_ranks_that_are_cut_or_given_by_pattern_and_dropout_come_through_the_file(
    ids: Tensor, run: Any, tmp_path: Any
) -> None:
    peft = pytest.importorskip("peft")
    make = BESIDE["glm4-moe"]
    adapted = adapt(
        make(), r=8, lora_alpha=12, lora_dropout=0.1, rank_pattern={"down_proj": 2}, alpha_pattern={"up_proj": 3}
    )
    ranks = {target.path.rpartition(".")[2]: target.r for target in adapted.plans["default"].lora}
    assert (ranks["gate"], ranks["down_proj"], ranks["q_proj"]) == (4, 2, 8)
    expected = run(adapted.module, ids)
    adapted.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_dropout"] == 0
    again = load_adapter(make(), tmp_path / "a")
    assert again.configs["default"].lora_dropout == 0.1
    torch.testing.assert_close(run(again.module, ids), expected, **PEFT_TOLERANCE)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(run(theirs, ids), expected, **PEFT_TOLERANCE)
    again.save(tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors", "veneer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@QUIET
def test_a_regular_expression_beside_experts_means_the_same_in_peft(ids: Tensor, run: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = adapt(MOE["qwen3-moe"](), target_modules=r".*layers\.1.*(q_proj|v_proj)")
    adapted.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(MOE["qwen3-moe"](), str(tmp_path / "a")).eval()
    torch.testing.assert_close(run(theirs, ids), run(adapted.module, ids), **PEFT_TOLERANCE)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "eva"}])
def test_routers_are_left_alone_where_they_cannot_be_adapted_and_that_is_said(settings: dict[str, Any]) -> None:
    adapted = attach(MOE["mixtral"](), LoraConfig(r=3, **settings), seed=0)
    assert not routers(adapted)
    assert "note: the routers (gate) are left as they are: " in str(adapted.coverage)
    with pytest.raises(AdapterError, match="a router cannot be adapted here"):
        attach(MOE["mixtral"](), LoraConfig(r=3, target_modules=["gate"], **settings))


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "pissa"}, {"use_lora_fa": True}, {"adalora_config": {"target_r": 2}}]
)
def test_variants_that_can_act_on_routers_do_and_are_read_again(
    settings: dict[str, Any], ids: Tensor, run: Any, tmp_path: Any
) -> None:
    adapted = adapt(MOE["mixtral"](), **settings)
    assert routers(adapted)
    expected = run(adapted.module, ids)
    torch.testing.assert_close(run(merge(adapted), ids), expected, **TOLERANCE)
    adapted.save(tmp_path / "a")
    torch.testing.assert_close(run(load_adapter(MOE["mixtral"](), tmp_path / "a").module, ids), expected, **TOLERANCE)


def test_excluded_routers_are_counted_and_two_adapters_add_up(ids: Tensor, run: Any) -> None:
    said = str(attach(MOE["mixtral"](), LoraConfig(r=3, exclude_modules=["gate"])).coverage)
    assert "MixtralTopKRouter      0/2" in said
    adapted = adapt(MOE["mixtral"](), target_modules=["gate"])
    first = dense(adapted, MOE["mixtral"]())
    adapted.add(LoraConfig(r=2, lora_alpha=4, target_modules=["gate"], init_lora_weights=False), "b", seed=3)
    adapted.use("default", "b")
    with torch.no_grad():
        for path, slot in routers(adapted).items():
            adapter: Any = slot.adapters["b"]
            first.get_submodule(path).weight.add_(2.0 * adapter.B @ adapter.A)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(run(adapted.module, ids), run(first, ids), **TOLERANCE)


def test_a_router_that_reads_the_weight_of_its_linear_is_adapted_and_said_not_to_be_in_peft(
    ids: Tensor, run: Any
) -> None:
    longcat = _text(
        "LongcatFlash",
        num_layers=1,
        n_routed_experts=4,
        moe_topk=2,
        expert_ffn_hidden_size=16,
        ffn_hidden_size=48,
        zero_expert_num=1,
        head_dim=8,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    adapted = adapt(longcat(), target_modules=["router.classifier"])
    got = run(adapted.module, ids)
    torch.testing.assert_close(run(merge(adapted), ids), got, **TOLERANCE)
    with adapted.disabled():
        assert (run(adapted.module, ids) - got).abs().max() > 1e-2
    assert "never asks their update" in warnings_of(adapted)[0]


def test_a_router_named_by_module_and_by_parameter_has_one_update() -> None:
    both = resolve(MOE["mixtral"](), LoraConfig(r=3, target_parameters=["gate.weight"]))
    assert both == resolve(MOE["mixtral"](), LoraConfig(r=3))
    stacks = resolve(MOE["mixtral"](), LoraConfig(r=3, target_parameters=["gate.weight"], experts="all")).experts
    assert {stack.parameter for stack in stacks} == {"gate_up_proj", "down_proj"}


@QUIET
def test_an_adapter_with_routers_that_was_made_smaller_is_read_here_and_in_peft(
    ids: Tensor, run: Any, tmp_path: Any
) -> None:
    peft = pytest.importorskip("peft")
    from veneer.ship.resize import resize_adapter

    adapt(MOE["qwen2-moe"](), r=6).save(tmp_path / "a")
    resize_adapter(tmp_path / "a", tmp_path / "b", energy=0.8, measure=False)
    expected = run(load_adapter(MOE["qwen2-moe"](), tmp_path / "b").module, ids)
    theirs = peft.PeftModel.from_pretrained(MOE["qwen2-moe"](), str(tmp_path / "b")).eval()
    torch.testing.assert_close(run(theirs, ids), expected, **PEFT_TOLERANCE)
