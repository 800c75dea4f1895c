"""Tiny random models for the adapters' tests, and one way to train an adapter for a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel

VOCAB = 64


def make_llama(*, tied: bool = False, seed: int = 0, **config: Any) -> nn.Module:
    """Two layers, width 32, vocabulary 64; float32, evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).eval()


def make_gpt2(*, seed: int = 0) -> nn.Module:
    """Two layers with transformers' Conv1D and a tied head; float32, evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def logits(module: nn.Module, ids: Tensor) -> Tensor:
    """``[B, T, V]``, without gradient."""
    with torch.no_grad():
        result: Tensor = module(ids).logits
    return result


def train_steps(adapted: AdaptedModel, ids: Tensor, steps: int = 3, lr: float = 1e-2) -> list[dict[str, Tensor]]:
    """Some AdamW steps on next-token prediction; returns each step's gradients by key."""
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=lr)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = adapted.module(ids).logits[:, :-1]
        nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()).backward()
        seen.append({k: p.grad.clone() for k, p in adapted.named_parameters() if p.grad is not None})
        optimizer.step()
    return seen


@pytest.fixture
def llama() -> Callable[..., nn.Module]:
    return make_llama


@pytest.fixture
def gpt2() -> Callable[..., nn.Module]:
    return make_gpt2


@pytest.fixture
def run() -> Callable[[nn.Module, Tensor], Tensor]:
    return logits


@pytest.fixture
def train() -> Callable[..., list[dict[str, Tensor]]]:
    return train_steps


@pytest.fixture
def ids() -> Tensor:
    """``[2, 12]``; holds the tokens 1, 3 and 5 for the tests of trained rows."""
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    tokens[0, :6] = torch.tensor([3, 7, 5, 3, 9, 1])
    return tokens
