"""LoRA on fused experts: what it computes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from tiny_models import DENSE, HYBRID, MOE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, merge
from veneer.adapters.activation import choose_experts, count_activations
from veneer.adapters.experts import LoraExperts
from veneer.adapters.save import read_training_state
from veneer.errors import AdapterError

MODELS = MOE | {name: HYBRID[name] for name in ("jamba", "nemotron-h")}
# float32, the same formula summed in another order
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def adapt(module: nn.Module, seed: int = 0, **config: Any) -> AdaptedModel:
    """An adapter with random factors, so that every part of it shows."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [], "experts": "all", **config}
    adapted = attach(module, LoraConfig(**settings), seed=seed)
    randomise(adapted)
    return adapted


@torch.no_grad()
def randomise(adapted: AdaptedModel) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in adapted.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def slots_of(adapted: AdaptedModel) -> dict[str, LoraExperts]:
    return {path: m for path, m in adapted.module.named_modules() if isinstance(m, LoraExperts)}


@torch.no_grad()
def dense(adapted: AdaptedModel, module: nn.Module, scaling: float = 2.0) -> nn.Module:
    """``module``, the same base, with ``W_e + s B_e A_e`` written into its stacks one expert at a time."""
    for path, slot in slots_of(adapted).items():
        experts: Any = module.get_submodule(path)
        for stack, adapter in slot.stacks("default").items():
            for expert, at in adapter.chosen():
                delta = scaling * adapter.B[at] @ adapter.A[at]
                getattr(experts, stack)[expert] += delta.t() if experts.is_transposed else delta
    return module


@pytest.mark.parametrize("experts", ["all", [0, 1]])
@pytest.mark.parametrize("name", MODELS)
def test_every_expert_computes_with_its_own_update(name: str, experts: Any, ids: Tensor, run: Any) -> None:
    adapted = adapt(MODELS[name](), experts=experts)
    got = run(adapted.module, ids)
    torch.testing.assert_close(got, run(dense(adapted, MODELS[name]()), ids), **TOLERANCE)
    with adapted.disabled():
        assert (got - run(adapted.module, ids)).abs().max() > 0.1


@pytest.mark.parametrize("name", MOE)
def test_gradients_are_those_of_the_dense_update(name: str, ids: Tensor) -> None:
    """``dA_e = s B_e^T dW_e`` and ``dB_e = s dW_e A_e^T``, with ``dW`` by torch's own differentiation."""
    adapted = adapt(MOE[name]())
    plain = dense(adapted, MOE[name]())
    for module in (adapted.module, plain):
        module(ids).logits.square().mean().backward()
    for path, slot in slots_of(adapted).items():
        experts: Any = plain.get_submodule(path)
        for stack, adapter in slot.stacks("default").items():
            dw = getattr(experts, stack).grad
            dw = dw.mT if experts.is_transposed else dw
            torch.testing.assert_close(adapter.A.grad, 2.0 * adapter.B.mT @ dw, **TOLERANCE)
            torch.testing.assert_close(adapter.B.grad, 2.0 * dw @ adapter.A.mT, **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MOE)
def test_adapter_off_is_the_base_bit_for_bit_whatever_computes_its_experts(
    name: str, implementation: str, ids: Tensor, run: Any, train: Any
) -> None:
    base: Any = MOE[name]()
    base.set_experts_implementation(implementation)
    before, weights = run(base, ids), {key: value.clone() for key, value in base.state_dict().items()}
    adapted = attach(base, LoraConfig(r=4, experts="all"), seed=0)
    torch.testing.assert_close(run(adapted.module, ids), before, **TOLERANCE)  # a fresh adapter changes nothing
    train(adapted, ids)
    assert not torch.equal(run(adapted.module, ids), before)
    with adapted.disabled():
        assert torch.equal(run(adapted.module, ids), before)
    base = adapted.detach()
    assert torch.equal(run(base, ids), before)
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())


def test_every_factor_gets_a_gradient_within_two_steps_and_no_router_does(ids: Tensor, train: Any) -> None:
    adapted = attach(MOE["mixtral"](), LoraConfig(r=4, experts="all"), seed=0)
    first, second = train(adapted, ids.repeat(1, 4), steps=2)
    assert all(first[key].any() for key in first if "lora_B" in key)
    assert all(grad.flatten(1).any(1).all() for key, grad in second.items() if "experts" in key)
    assert not any(p.requires_grad for n, p in adapted.module.named_parameters() if n.endswith("gate.weight"))


def test_a_subset_has_factors_for_its_experts_alone(ids: Tensor, run: Any) -> None:
    adapted = adapt(MOE["qwen3-moe"](), experts=[3, 1])
    assert {tuple(p.shape) for key, p in adapted.named_parameters()} == {(2, 4, 32), (2, 32, 4), (2, 4, 16)}
    base, merged = MOE["qwen3-moe"](), merge(adapted)
    for path in slots_of(adapted):
        for stack in ("gate_up_proj", "down_proj"):
            old, new = (getattr(module.get_submodule(path), stack) for module in (base, merged))
            assert [bool((old[e] != new[e]).any()) for e in range(4)] == [False, True, False, True]


def test_an_expert_starts_the_same_whichever_others_are_chosen() -> None:
    every = attach(MOE["mixtral"](), LoraConfig(r=4, target_modules=[], experts="all"), seed=5).state()
    some = attach(MOE["mixtral"](), LoraConfig(r=4, target_modules=[], experts=[2]), seed=5).state()
    assert all(torch.equal(every[key][2:3], some[key]) for key in every)
    assert not torch.equal(*(every[next(iter(every))][e] for e in (1, 2)))


def test_adapters_on_the_same_experts_add_up(ids: Tensor, run: Any) -> None:
    adapted = adapt(MOE["mixtral"](), experts=[0, 1])
    adapted.add(LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["experts.down_proj"]), "b", seed=1)
    adapted.use("b")
    randomise(adapted)
    adapted.use("default", "b")
    plain = dense(adapted, MOE["mixtral"]())
    with torch.no_grad():
        for path, slot in slots_of(adapted).items():
            other = slot.stacks("b")["down_proj"]
            plain.get_submodule(path).down_proj += other.B @ other.A  # type: ignore[operator]  # untyped attributes
    torch.testing.assert_close(run(adapted.module, ids), run(plain, ids), **TOLERANCE)
    torch.testing.assert_close(run(merge(adapted), ids), run(plain, ids), **TOLERANCE)


def test_gradient_checkpointing_changes_no_gradient(ids: Tensor) -> None:
    found = []
    for checkpointing in (False, True):
        adapted = adapt(MOE["qwen3-moe"]())
        module: Any = adapted.module.train()
        if checkpointing:
            with warnings.catch_warnings():  # its name changes between versions of transformers
                warnings.simplefilter("ignore", FutureWarning)
                module.gradient_checkpointing_enable({"use_reentrant": False})
        module(ids).logits.square().mean().backward()
        found.append([p.grad for p in adapted.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes, views of others apart."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in [out] if isinstance(out, Tensor) else []:
            if tensor.untyped_storage().data_ptr() not in held:
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_nothing_of_the_size_of_a_stack_is_made_forward_or_backward(ids: Tensor) -> None:
    base: Any = MOE["mixtral"]()
    experts = adapt(base).module.model.layers[0].mlp.experts  # type: ignore[union-attr]  # untyped attributes
    x, index, shares = torch.randn(6, 32, requires_grad=True), torch.tensor([[0, 1], [2, 3]] * 3), torch.rand(6, 2)
    with Largest() as largest:
        experts(x, index, shares).sum().backward()
    one = experts.base_layer.down_proj[0].numel()
    assert largest.numbers < 2 * one  # 12 rows of 96 columns; a stack would be 4 times one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_merging_sums_in_float32_and_rounds_once(name: str, dtype: torch.dtype, ids: Tensor, run: Any) -> None:
    adapted = adapt(MOE[name]().to(dtype), experts=[0, 2])
    merged = merge(adapted)
    wide = dense(adapted, MOE[name]().to(dtype).float())
    for key, value in merged.state_dict().items():
        if "experts" in key:
            torch.testing.assert_close(value, wide.state_dict()[key].to(dtype), rtol=0, atol=0)
    limit = TOLERANCE if dtype == torch.float32 else {"rtol": 0, "atol": 0.3}  # of logits up to 10 in 8 bits
    torch.testing.assert_close(run(merged, ids), run(adapted.module, ids), **limit)


def test_a_checkpoint_goes_on_with_the_same_factors(tmp_path: Any) -> None:
    adapted = adapt(MOE["mixtral"](), experts=[1, 2])
    expected = adapted.state()
    adapted.save(tmp_path / "a", training_state=True)
    for read in (read_training_state(tmp_path / "a"), load_adapter(MOE["mixtral"](), tmp_path / "a").state()):
        randomise(adapted)
        adapted.load_state(read)
        assert all(torch.equal(value, expected[key]) for key, value in adapted.state().items())


def test_the_table_counts_experts() -> None:
    text = str(attach(MOE["mixtral"](), LoraConfig(r=4, experts=[0, 3])).coverage)
    assert re.search(r"experts\.gate_up_proj +MixtralExperts +2/2 +lora r=4 on 2 of 4 +2,048\n", text)
    assert re.search(r"experts\.down_proj +MixtralExperts +2/2 +lora r=4 on 2 of 4 +1,280\n", text)
    assert "stacked experts" not in text


def test_by_default_no_routed_expert_is_adapted() -> None:
    adapted = {name: attach(make(), LoraConfig(r=1)) for name, make in MODELS.items()}
    assert not any(slots_of(one) for one in adapted.values())
    assert any("shared_expert.up_proj" in key for key in adapted["qwen2-moe"].state())


def test_layers_and_exclusions_choose_among_the_experts() -> None:
    adapted = adapt(MOE["mixtral"](), layers_to_transform=[1])
    assert list(slots_of(adapted)) == ["model.layers.1.mlp.experts"]
    adapted = adapt(MOE["mixtral"](), exclude_modules=["1.mlp.experts"])
    assert list(slots_of(adapted)) == ["model.layers.0.mlp.experts"]


def test_a_pattern_gives_a_stack_its_rank() -> None:
    adapted = adapt(MOE["mixtral"](), rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.1.*gate_up_proj": 1})
    held = {
        f"{p[13]}.{s}": (a.r, a.scaling)
        for p, slot in slots_of(adapted).items()
        for s, a in slot.stacks("default").items()
    }
    assert held == {
        "0.gate_up_proj": (4, 2.0),
        "0.down_proj": (2, 4.0),
        "1.gate_up_proj": (4, 0.25),
        "1.down_proj": (2, 4.0),
    }


# --- counting activations


def routed(module: Any, ids: Tensor, mask: Tensor | None = None) -> list[list[int]]:
    """The choices of each Mixtral router, by its own output."""
    chosen: list[Tensor] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda *a: chosen.append(a[2][2])) for layer in module.model.layers]
    with torch.no_grad():
        module(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    rows = slice(None) if mask is None else mask.flatten().bool()
    return [torch.bincount(index[rows].flatten(), minlength=4).tolist() for index in chosen]


def test_activations_are_counted_on_the_tokens_of_the_sample(ids: Tensor) -> None:
    module = MOE["mixtral"]()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    table = count_activations(module, [{"input_ids": ids, "attention_mask": mask}])
    assert [list(counts) for counts in table.counts.values()] == routed(module, ids, mask)
    twice = count_activations(module, [ids, ids], lambda batch: module(batch))
    assert [sum(counts) for counts in twice.counts.values()] == [2 * 2 * ids.numel()] * 2
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_the_most_activated_experts_of_every_layer_get_factors(ids: Tensor) -> None:
    module = MOE["mixtral"]()
    config, table = choose_experts(module, LoraConfig(r=4, target_modules=[], experts="top-2"), [ids])
    adapted = attach(module, config)
    for (path, slot), counts in zip(slots_of(adapted).items(), routed(MOE["mixtral"](), ids)):
        expected = tuple(sorted(sorted(range(4), key=lambda e: -counts[e])[:2]))
        assert {a.experts for a in slot.stacks("default").values()} == {expected}
        assert table.share(path, expected) == sum(counts[e] for e in expected) / sum(counts)
    assert len({table.most(path, 2) for path in table.counts}) > 1  # the layers differ, or this shows nothing
    first = next(iter(table.counts.values()))
    assert f"mlp.experts: {max(range(4), key=first.__getitem__)}: {100 * max(first) / sum(first):.1f} %, " in str(table)


def test_counting_sees_through_an_adapter_that_is_there(ids: Tensor) -> None:
    adapted = attach(MOE["mixtral"](), LoraConfig(r=4, experts="all"))  # fresh: it changes no choice
    assert count_activations(adapted.module, [ids]).counts == count_activations(MOE["mixtral"](), [ids]).counts


# --- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"experts": "top-500"}, "experts: top-500 of 4"),
        ({"experts": "top-0"}, "experts: top-0 of 4"),
        ({"experts": "top-2"}, "that was not counted"),
        ({"experts": [0, 4]}, "there is no expert 4 at 'model.layers.0.mlp.experts'"),
        ({"experts": {"model.layers.7.mlp.experts": [0]}}, "no experts at 'model.layers.7.mlp.experts'"),
        ({"experts": []}, r"experts cannot be \(\)"),
        ({"experts": "al"}, "Did you mean 'all'"),
        ({"experts": [0.5]}, "experts cannot be"),
        ({"target_parameters": ["experts.gate_up"]}, "Did you mean 'experts.gate_up_proj'"),
        ({"target_parameters": ["experts.down_proj", "norm.weight"]}, "is the 'weight' of a MixtralRMSNorm: it is no"),
        ({"target_parameters": ["embed_tokens.weight"]}, r"target_modules: \[embed_tokens\]"),
        ({"target_parameters": "experts.down_proj"}, r"give a list: \['experts.down_proj'\]"),
        ({"lora_dropout": 0.1}, "lora_dropout does not act on experts"),
        ({"use_dora": True}, "use_dora does not act on experts"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights does not act on experts"),
        ({"r": 40}, "rank 40 is larger than an expert's matrix, 96 x 32"),
        ({"layers_to_transform": [5]}, "exclude_modules or layers_to_transform take all of them"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(config: dict[str, Any], message: str) -> None:
    module = MOE["mixtral"]()
    with pytest.raises(AdapterError, match=message):
        attach(module, LoraConfig(**{"r": 4, "experts": "all", **config}))
    assert not any(isinstance(part, LoraExperts) for part in module.modules())


def test_more_experts_than_there_are_is_refused_before_anything_is_run() -> None:
    def run(_: object) -> None:
        raise AssertionError("the model was run")

    with pytest.raises(AdapterError, match="experts: top-500 of 4: a layer has 4 experts"):
        choose_experts(MOE["mixtral"](), LoraConfig(experts="top-500"), [torch.zeros(1, 1)], run)


def test_a_base_without_experts_is_told_so() -> None:
    with pytest.raises(AdapterError, match="experts: all, but the base has no fused experts"):
        attach(DENSE["llama"](), LoraConfig(r=4, experts="all"))
    with pytest.raises(AdapterError, match="the base has no fused experts"):
        count_activations(DENSE["llama"](), [torch.zeros(1, 2, dtype=torch.int64)])


def test_experts_of_an_unknown_form_are_refused_by_name() -> None:
    """Llama 4 multiplies all experts at once, outside of transformers' interface."""
    import transformers

    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    module = transformers.Llama4ForCausalLM(config)
    with pytest.raises(AdapterError, match=r"these experts \(Llama4TextExperts\) are of a form that is not known here"):
        attach(module, LoraConfig(r=4, experts="all"))
    with pytest.raises(AdapterError, match="of a form that is not known here"):
        attach(module, LoraConfig(r=4, target_parameters=["experts.down_proj"]))
