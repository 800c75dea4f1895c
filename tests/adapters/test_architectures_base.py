"""Fused blocks and attention under our name leave every architecture what transformers computes, packed and padded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch

from veneer.adapters.structure import recurrent_parts
from veneer.errors import ModelError
from veneer.models.fused import fuse
from veneer.models.head import check_head, hidden_states
from veneer.models.vocabulary import grow

LANGUAGE = tiny_models.DENSE | tiny_models.MOE | tiny_models.HYBRID | tiny_models.VISION
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums in another order
IDS = torch.arange(8, 40).view(2, 16)


def batch(ids, positions, lengths=None):
    return SimpleNamespace(input_ids=ids, position_ids=positions, document_lengths=lengths, shared_prefix=0)


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_a_base_with_fused_blocks_gives_transformers_own_logits(name):
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    original, module = LANGUAGE[name](), LANGUAGE[name]()
    fuse(module)
    torch.testing.assert_close(module(input_ids=IDS).logits, original(input_ids=IDS).logits, **TOLERANCE)
    got, expected = (m(input_ids=IDS, attention_mask=mask).logits[mask.bool()] for m in (module, original))
    torch.testing.assert_close(got, expected, **TOLERANCE)
    check_head(module)


@pytest.mark.parametrize("name", tiny_models.DENSE | tiny_models.MOE | tiny_models.HYBRID)
@torch.no_grad()
def test_packed_and_padded_rows_are_what_the_rows_are_alone_or_packing_is_refused(name):
    original, module = LANGUAGE[name](), LANGUAGE[name]()
    fuse(module)
    positions = torch.arange(16).expand(2, 16)
    alone = original.get_decoder()(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(hidden_states(module, batch(IDS, positions)), alone, **TOLERANCE)
    packed = batch(IDS.view(1, 32), positions.reshape(1, 32), [16, 16])
    if recurrent_parts(module) or name == "falcon":
        with pytest.raises(ModelError, match="does not let documents be isolated"):
            hidden_states(module, packed)
    else:
        torch.testing.assert_close(hidden_states(module, packed).view(2, 16, -1), alone, **TOLERANCE)


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_the_vocabulary_grows_and_old_tokens_keep_their_logits_bit_for_bit(name):
    module = LANGUAGE[name]()
    before = module(input_ids=IDS).logits
    grow(module, 67)
    after = module(input_ids=IDS).logits
    assert after.shape[-1] == module.config.get_text_config().vocab_size == 67
    assert torch.equal(after[..., :64], before)
    embedding = module.get_input_embeddings().weight
    assert torch.equal(embedding[66], embedding[:64].mean(0))
