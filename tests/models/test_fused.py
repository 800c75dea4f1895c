"""Fused blocks, routed attention and the output head, on tiny random models of the real classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from veneer.adapters import LoraConfig, attach
from veneer.data.dataset import Example
from veneer.data.pack import collate_packed, shared_beginning
from veneer.errors import ModelError
from veneer.models import fused as fused_module
from veneer.models.fused import FusedGatedMlp, FusedRmsNorm, fuse
from veneer.models.head import answer_logprobs, answer_loss, check_head, hidden_states

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "Phi3": {},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.5},
    "Olmo2": {},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@dataclass
class Packed:
    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    document_lengths: list[int] | None
    shared_prefix: int = 0


def tiny(family: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    settings = {
        k: v for k, v in SMALL.items() if family != "GPT2" or k in ("vocab_size", "bos_token_id", "eos_token_id")
    }
    config = getattr(transformers, f"{name}Config")(**{**settings, **MODELS[family], **more})
    cls = transformers.GPT2LMHeadModel if family == "GPT2" else getattr(transformers, f"{family}ForCausalLM")
    model: nn.Module = cls._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # biases and norms of a fresh model are zeros and ones: they would hide mistakes
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval().requires_grad_(False)


def packed(lengths: list[int]) -> Packed:
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    targets = torch.full_like(ids, -100)
    start = 0
    for n in lengths:
        targets[0, start + 1 : start + n - 1] = ids[0, start + 2 : start + n]
        start += n
    return Packed(ids, positions, targets, lengths)


@pytest.mark.parametrize("family", MODELS)
def test_a_fused_model_gives_the_logits_of_transformers_own_code(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(3, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    fuse(model)
    got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    check_head(model)


@pytest.mark.parametrize("family", MODELS)
def test_packed_documents_give_the_logits_that_each_gives_alone(family: str) -> None:
    model = tiny(family)
    batch = packed([9, 1, 13, 7])
    alone = [
        model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        for ids in batch.input_ids.split(batch.document_lengths, dim=1)
    ]
    assert fuse(model).documents
    torch.testing.assert_close(hidden_states(model, batch), torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def beginnings(lengths: list[int], common: int, trained_from: int) -> list[Example]:
    """Rows that begin with ``common`` same tokens and train from ``trained_from`` on."""
    generator = np.random.default_rng(0)
    start = generator.integers(3, 64, common)
    rows = []
    for number, length in enumerate(lengths):
        own = generator.integers(3, 64, length - common)
        own[0] = 3 + number  # the beginnings end here
        trained = np.arange(length) >= trained_from
        rows.append(Example(np.concatenate([start, own]).astype(np.int32), trained, f"rows:{number}"))
    return rows


@pytest.mark.parametrize("family", MODELS)
def test_a_shared_beginning_is_computed_once_and_changes_nothing(family: str) -> None:
    rows = beginnings([30, 25, 40], common=20, trained_from=23)
    results = []
    for share in (False, True):
        model = tiny(family)
        fuse(model)
        adapted = attach(model, LoraConfig(r=4, init_lora_weights=False), seed=0)
        batch = collate_packed(rows, share_prefix=share)
        assert batch.input_ids.shape[1] == (55 if share else 95)
        assert batch.tokens == 95
        output = answer_loss(model, hidden_states(model, batch), batch.targets)
        output.loss_sum.backward()
        results.append((output, [p.grad for p in adapted.parameters()]))
    (plain, plain_grads), (shared, shared_grads) = results
    assert shared.trained == plain.trained == sum(len(row) - 23 for row in rows)
    torch.testing.assert_close(shared.loss_sum, plain.loss_sum, rtol=1e-5, atol=1e-5)
    for got, want in zip(shared_grads, plain_grads):
        assert want is not None
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("common", "trained_from", "expected"),
    [(20, 23, 20), (20, 20, 19), (20, 21, 20), (20, 12, 0), (20, 0, 0), (9, 20, 0)],
)
def test_a_beginning_is_shared_up_to_what_is_trained_and_when_it_saves_enough(
    common: int, trained_from: int, expected: int
) -> None:
    assert shared_beginning(beginnings([30, 25, 40], common, trained_from)) == expected


def test_rows_that_are_all_the_same_keep_a_token_of_their_own() -> None:
    row = beginnings([30], 20, 28)[0]
    assert shared_beginning([row, row, row]) == 27
    assert shared_beginning([row]) == 0


@pytest.mark.parametrize("family", MODELS)
def test_the_loss_is_the_cross_entropy_of_the_models_own_logits(family: str) -> None:
    model = tiny(family)
    batch = packed([14])
    logits = model(input_ids=batch.input_ids).logits.float()
    expected = nn.functional.cross_entropy(logits[0], batch.targets[0], reduction="sum")
    fuse(model)
    output = answer_loss(model, hidden_states(model, batch), batch.targets)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-4, atol=1e-4)
    assert output.trained == 12
    assert output.correct == int((logits[0].argmax(-1) == batch.targets[0]).sum())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "GPT2"])
def test_adapters_get_the_gradients_of_the_unfused_model(family: str) -> None:
    gradients = []
    for fused in (False, True):
        model = tiny(family)
        if fused:
            fuse(model)
        adapted = attach(model, LoraConfig(r=4, init_lora_weights=False), seed=0)
        model.train()
        ids = packed([11]).input_ids
        model(input_ids=ids).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters()})
    plain, ours = gradients
    assert list(plain) == list(ours)
    for name, gradient in plain.items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_llama_is_recognised_and_keeps_its_parameter_names() -> None:
    model = tiny("Llama")
    before = [name for name, _ in model.named_parameters()]
    fused = fuse(model)
    assert fused.swapped == {"LlamaAttention": 2, "LlamaDecoderLayer": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}
    assert not fused.left
    assert "not fused" not in str(fused)
    assert [name for name, _ in model.named_parameters()] == before
    assert isinstance(model.model.layers[0].mlp, FusedGatedMlp)
    assert isinstance(model.model.norm, FusedRmsNorm)


@pytest.mark.parametrize(
    ("family", "offset"), [("Llama", 0.0), ("Gemma", 1.0), ("Gemma2", 1.0), ("Gemma3", 1.0), ("Olmo2", 0.0)]
)
def test_a_norm_whose_weight_is_an_offset_from_one_is_found_to_be_that(family: str, offset: float) -> None:
    model = tiny(family)
    fuse(model)
    norms = [m for m in model.modules() if isinstance(m, FusedRmsNorm)]
    assert norms
    assert {norm.offset for norm in norms} == {offset}


def test_a_norm_with_another_formula_keeps_its_own_code() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    holder = nn.ModuleDict({"norm": OddRMSNorm()})
    fused = fuse(holder)
    assert isinstance(holder["norm"], OddRMSNorm)
    assert fused.left == {"OddRMSNorm": 1}
    assert "not fused: 1 OddRMSNorm" in str(fused)


class LimitedMLP(nn.Module):
    """A gated MLP that clamps its gate at a limit of its own layer, as Step 3.7 does."""

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj, self.act_fn, self.limit = nn.Linear(48, 32, bias=False), nn.SiLU(), limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        result: Tensor = self.down_proj(self.act_fn(gate) * up)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_clamp_of_an_mlp_is_seen_whatever_the_blocks_before_it_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(LimitedMLP(limit) for limit in (None, 10.0, None, 0.5)).to(dtype).requires_grad_(False)
    x = 50 * torch.randn(6, 32, dtype=dtype)
    expected = [block(x) for block in blocks]
    fused = fuse(blocks)
    assert [type(block) is FusedGatedMlp for block in blocks] == [True, False, True, False]
    assert fused.left == {"LimitedMLP": 2}
    for block, want in zip(blocks, expected, strict=True):
        assert (block(x) - want).float().norm() <= 1e-2 * want.float().norm()


def test_blocks_of_one_form_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []
    original = fused_module.computes_the_same
    monkeypatch.setattr(fused_module, "computes_the_same", lambda *a: (compared.append(a), original(*a))[1])
    fuse(tiny("Llama"))
    assert len(compared) == 1


def test_an_mlp_with_a_parameter_of_its_own_keeps_its_own_code() -> None:
    block = LimitedMLP(None)
    block.scale = nn.Parameter(torch.ones(32))
    fuse(holder := nn.ModuleList([block]))
    assert holder[0] is block


def test_a_padded_batch_gives_the_hidden_states_of_its_rows_alone() -> None:
    model = tiny("Llama")
    fuse(model)
    rows = [torch.randint(3, 64, (1, n)) for n in (9, 5)]
    ids = torch.zeros(2, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : row.shape[1]] = row
    batch = Packed(ids, torch.arange(9).expand(2, -1), torch.full_like(ids, -100), None)
    states = hidden_states(model, batch)
    for i, row in enumerate(rows):
        alone = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state
        torch.testing.assert_close(states[i, : row.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


def test_answer_logprobs_are_summed_per_document() -> None:
    model = tiny("Llama")
    fuse(model)
    both, counts = answer_logprobs(model, packed([9, 6]))
    batch = packed([9, 6])
    first = Packed(batch.input_ids[:, :9], batch.position_ids[:, :9], batch.targets[:, :9], [9])
    alone, _ = answer_logprobs(model, first)
    assert counts.tolist() == [7, 4]
    torch.testing.assert_close(both[:1], alone, rtol=1e-6, atol=1e-6)


def test_an_adapted_head_is_used_with_its_adapter() -> None:
    model = tiny("Llama")
    fuse(model)
    batch = packed([14])
    before = float(answer_loss(model, hidden_states(model, batch), batch.targets).loss_sum)
    attach(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False), seed=0)
    output = answer_loss(model, hidden_states(model, batch), batch.targets)
    logits = model(input_ids=batch.input_ids).logits.float()
    expected = nn.functional.cross_entropy(logits[0], batch.targets[0], reduction="sum")
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-4, atol=1e-4)
    assert abs(float(output.loss_sum.detach()) - before) > 1e-3


def test_a_head_with_unknown_arithmetic_is_refused() -> None:
    model = tiny("Llama")
    fuse(model)
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = out.logits * 2 + 1
        return out

    model.forward = forward
    with pytest.raises(ModelError, match="changes its logits"):
        check_head(model)


@pytest.mark.parametrize("rows", [3, 70])  # too few for products in native code, and enough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_adapter_that_is_fresh_or_off_changes_no_bit(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.normal_()
    fuse(module)
    ids = torch.randint(64, (1, rows))
    base = module(ids, use_cache=False).logits
    adapted = attach(module, LoraConfig(r=8, target_modules="all-linear"), seed=0)
    fresh = module(ids, use_cache=False).logits
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    trained = module(ids, use_cache=False).logits
    with adapted.disabled():
        off = module(ids, use_cache=False).logits
    assert torch.equal(fresh, base)
    assert torch.equal(off, base)
    assert not torch.equal(trained, base)
