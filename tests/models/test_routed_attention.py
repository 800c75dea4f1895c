"""Which models' attention runs under our name: not where a block makes the mask that it attends with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_fused import SMALL, packed, tiny
from torch import nn

from veneer.errors import ModelError
from veneer.models.attention import is_routed, makes_its_own_mask
from veneer.models.fused import fuse
from veneer.models.head import hidden_states

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
INDEX = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "num_key_value_heads": 4}
OWN_MASKS: dict[str, dict[str, Any]] = {
    "DeepseekV4": {"head_dim": 8, "num_hidden_layers": 4, "num_key_value_heads": 1, "q_lora_rank": 8, **EXPERTS},
    "DeepseekV32": {**EXPERTS, **LATENT, **INDEX, "n_group": 1, "topk_group": 1},
    "Doge": {"head_dim": 8, "keep_window_size": 4},
}


def sparse(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **OWN_MASKS[family]})
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", OWN_MASKS)
def test_a_block_that_makes_its_own_mask_keeps_the_attention_that_it_was_made_for(family: str) -> None:
    model, ids = sparse(family), packed([12])
    expected = model(input_ids=ids.input_ids, use_cache=False).logits
    states = model.get_decoder()(input_ids=ids.input_ids, use_cache=False).last_hidden_state
    assert not fuse(model).documents
    got = model(input_ids=ids.input_ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden_states(model, ids), states, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="documents be isolated"):
        hidden_states(model, packed([5, 7]))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_a_block_that_hands_its_mask_on_is_routed(family: str) -> None:
    model = tiny(family)
    assert not any(makes_its_own_mask(type(part)) for part in model.modules())
    assert fuse(model).documents
    assert is_routed(model)
