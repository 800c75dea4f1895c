"""What a part of a model is, told from its structure and names."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from veneer.adapters import LoraConfig, attach
from veneer.adapters.slots import base_modules
from veneer.adapters.structure import carries_state, kind_of, language_tower, left_out, output_heads, recurrent_parts


def modules_of(name):
    return base_modules(tiny_models.ALL[name]())


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("llama", "model"),
        ("gpt2", "transformer"),
        ("mamba", "backbone"),
        ("bert, classes", "bert"),
        ("llava", "model.language_model"),
        ("qwen2-vl", "model.language_model"),
        ("smolvlm", "model.text_model"),
    ],
)
def test_the_language_model_is_what_holds_the_token_embedding_and_the_layers(name, tower):
    assert language_tower(modules_of(name)) == tower


def test_an_encoder_decoder_is_one_language_model():
    from transformers import T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

    small = {"d_model": 16, "decoder_start_token_id": 0, "vocab_size": 32, "pad_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(d_ff=16, d_kv=8, num_layers=1, num_heads=2, **small))
    assert language_tower(base_modules(t5)) == ""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    whisper = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **small))
    assert language_tower(base_modules(whisper)) == "model"
    assert set(left_out(base_modules(whisper))) == {"model.encoder.conv1", "model.encoder.conv2", "proj_out"}


def test_a_small_layer_in_the_embeddings_does_not_make_them_the_language_model():
    class Embeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.widen = nn.Embedding(8, 2), nn.Linear(2, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings, self.layers = Embeddings(), nn.ModuleList([nn.Linear(4, 4)])

        def get_input_embeddings(self):
            return self.embeddings.tokens

    assert language_tower(base_modules(Model())) == ""
    assert left_out(base_modules(Model())) == {}


def test_a_module_that_says_nothing_of_itself_is_taken_whole():
    module = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    assert language_tower(base_modules(module)) == ""
    assert left_out(base_modules(module)) == {}


@pytest.mark.parametrize("name", tiny_models.HYBRID)
def test_the_recurrent_parts_of_a_hybrid_are_found(name):
    module = tiny_models.HYBRID[name]()
    mixers = [path for path, part in module.named_modules() if hasattr(part, "A_log")]
    assert recurrent_parts(module) == mixers != []


def test_an_adapter_does_not_hide_or_add_recurrent_parts():
    module = tiny_models.HYBRID["bamba"]()
    before = recurrent_parts(module)
    attach(module, LoraConfig(r=4, modules_to_save=["conv1d"]))
    assert recurrent_parts(module) == before


@pytest.mark.parametrize("name", tiny_models.DENSE | tiny_models.MOE)
def test_models_of_attention_alone_have_no_recurrent_part(name):
    assert recurrent_parts((tiny_models.DENSE | tiny_models.MOE)[name]()) == []


def test_a_depthwise_convolution_along_the_tokens_carries_state_and_one_by_one_does_not():
    def holder(convolution):
        return nn.ModuleDict({"conv": convolution})

    assert carries_state(holder(nn.Conv1d(4, 4, 3, groups=4)))
    assert not carries_state(holder(nn.Conv1d(4, 4, 1, groups=4)))
    assert not carries_state(holder(nn.Conv1d(4, 4, 3)))
    assert carries_state(nn.GRU(4, 4))


def test_a_linear_that_reads_the_embeddings_matrix_is_a_head():
    assert output_heads(modules_of("gpt2")) == {"lm_head"}
    assert output_heads(modules_of("llama, tied")) == {"lm_head"}
    assert output_heads(modules_of("bert, classes")) == set()


def test_only_products_with_a_matrix_and_lookups_have_a_kind():
    assert kind_of(nn.Linear(4, 2)) == "linear"
    assert kind_of(nn.Embedding(4, 2)) == "embedding"
    assert kind_of(nn.Conv1d(4, 2, 1)) is None
    assert kind_of(nn.LayerNorm(4)) is None
    assert kind_of(modules_of("gpt2")["transformer.h.0.attn.c_attn"]) == "conv1d"
    broken = nn.Linear(4, 2)
    broken.weight = nn.Parameter(torch.zeros(3, 3))
    assert kind_of(broken) is None
