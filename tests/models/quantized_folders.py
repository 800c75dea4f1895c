"""Tiny random models of real classes in folders, and what their codes stand for as plain models again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from veneer.models import Base, load_base, load_tokenizer
from veneer.quant import QuantizedLinear, QuantizedTensor
from veneer.quant.stack import QuantizedStack

# Widths that bitsandbytes takes too: rows of whole blocks, a multiple of 32 of them.
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"head_dim": 16},
    "Phi3": {"pad_token_id": 0},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {**EXPERTS, "head_dim": 16},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "GptOss": {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2},
}
FAMILIES["GPT2"]["attn_pdrop"] = 0


def write_model(folder: Path, family: str, tokenizer_of: Path, **config: Any) -> Path:
    """A random bfloat16 model of ``family`` with the tokenizer of another folder."""
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**{**SMALL, **FAMILIES[family], **config}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)  # zeros would hide a lost bias
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(tokenizer_of).save_pretrained(str(folder))
    return folder


def codes_of(base: Base) -> dict[str, QuantizedTensor]:
    """What is in codes, by parameter name."""
    linears = {f"{p}.weight": m.weight for p, m in base.module.named_modules() if isinstance(m, QuantizedLinear)}
    return linears | {p: m.weight for p, m in base.module.named_modules() if isinstance(m, QuantizedStack)}


@torch.no_grad()
def decoded(base: Base, folder: Path) -> Base:
    """The plain model of a folder with what ``base``'s codes stand for in the place of its weights."""
    plain = load_base(folder, dtype=base.dtype, device="cpu")
    for name, codes in codes_of(base).items():
        parameter = plain.module.get_parameter(name)
        weight = codes.dequantize()
        parameter.copy_(weight if weight.shape == parameter.shape and not is_transposed(plain, name) else weight.mT)
    return plain


def is_transposed(base: Base, name: str) -> bool:
    """Whether the model has this weight as ``[in, out]``."""
    owner = base.module.get_submodule(name.rpartition(".")[0])
    return type(owner).__name__ == "Conv1D" or bool(getattr(owner, "is_transposed", False))


def some_ids(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0))
