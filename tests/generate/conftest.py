"""Tiny random models of the real classes: as a frozen base with our blocks, and untouched as transformers has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from veneer.models import Base, BaseIdentity, fuse, load_base, load_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # logits far apart, so that rounding never decides
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "Phi3": {"sliding_window": 6},
    "GPTNeoX": {},
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}


class Pair(NamedTuple):
    base: Base  # fused, frozen
    plain: nn.Module  # the same weights, transformers' own code


@pytest.fixture(scope="session")
def family(tiny_base: Path) -> Callable[[str], Pair]:
    """``family("Gemma3")``: a random model of that class with the tiny tokenizer, two times."""
    tokenizer = load_tokenizer(tiny_base)
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
            config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
            model_class = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
            config = config_class(**{**SMALL, "vocab_size": len(tokenizer), **special, **FAMILIES[name]})
            with torch.random.fork_rng():
                torch.manual_seed(0)
                plain = model_class(config).eval()
            fused = model_class(config).eval()
            fused.load_state_dict(plain.state_dict())
            fused.requires_grad_(False)
            fuse(fused)
            identity = BaseIdentity(name, None, "w", "t", "c")
            made[name] = Pair(Base(fused, tokenizer, identity, name), plain)
        return made[name]

    return make


@pytest.fixture(scope="session")
def base(make_tiny_base: Callable[..., Path]) -> Base:
    """A tiny Llama as load_base loads it, whose greedy tokens vary. Tests must leave it as it was."""
    return load_base(make_tiny_base(initializer_range=0.4, seed=3), dtype="float32", device="cpu")


@pytest.fixture
def prompts() -> list[list[int]]:
    """Seven prompts of 1 to 19 tokens, in no order of length."""
    generator = torch.Generator().manual_seed(1)
    lengths = [7, 1, 19, 4, 12, 4, 9]
    return [torch.randint(10, 290, (length,), generator=generator).tolist() for length in lengths]
