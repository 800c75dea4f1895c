"""Tiny random models of transformers' own classes, one of each way in which linear layers are laid out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCAB = 64
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide enough that a wrong layer shows in the logits
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _model(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    """Makes a model of transformers' class ``model`` from its class ``config``: always the same one, in float32."""

    def make() -> nn.Module:
        import transformers

        with torch.random.fork_rng():
            torch.manual_seed(0)
            made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return made.eval()

    return make


def _text(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """``_text("Llama")``: a ``LlamaForCausalLM`` from a ``LlamaConfig``."""
    return _model(f"{name}Config", f"{name}ForCausalLM", **(_TEXT | settings))


DENSE = {
    "llama": _text("Llama"),
    "llama, tied": _text("Llama", tie_word_embeddings=True),
    "mistral": _text("Mistral"),
    "qwen2": _text("Qwen2"),
    "qwen3": _text("Qwen3", head_dim=8),
    "gemma2": _text("Gemma2", head_dim=8, tie_word_embeddings=True),
    "gemma3": _model("Gemma3TextConfig", "Gemma3ForCausalLM", **_TEXT | {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": _text("Phi3"),
    "gpt2": _model(
        "GPT2Config", "GPT2LMHeadModel", **_TEXT | {"n_inner": 48, "n_positions": 64, "tie_word_embeddings": True}
    ),
    "gpt-neox": _text("GPTNeoX"),
    "falcon": _text("Falcon", tie_word_embeddings=True),
    "olmo": _text("Olmo"),
    "olmo2": _text("Olmo2"),
}

_FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE = {
    "mixtral": _text("Mixtral", num_local_experts=4),
    "qwen2-moe": _text("Qwen2Moe", shared_expert_intermediate_size=24, **_FEW),
    "qwen3-moe": _text("Qwen3Moe", head_dim=8, **_FEW),
    "deepseek-v3": _text(
        "DeepseekV3",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
    ),
    "phimoe": _text("Phimoe", num_local_experts=4),
    "gpt-oss": _text("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}

_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
HYBRID = {
    "jamba": _text(
        "Jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "zamba2": _text(
        "Zamba2",
        tie_word_embeddings=True,  # its repeated blocks are tied by the same switch
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_mem_blocks=1,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        adapter_rank=4,
        attention_head_dim=16,
        num_key_value_heads=4,
    ),
    "nemotron-h": _text(
        "NemotronH",
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mlp", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "falcon-h1": _text("FalconH1", mamba_d_ssm=64, **_MAMBA2),
    "bamba": _text("Bamba", attn_layer_indices=[1], **_MAMBA2),
    "mamba": _text("Mamba", state_size=4, time_step_rank=4),
}

_TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_TOWER |= {"intermediate_size": 24, "initializer_range": 0.2}
_UNDER = {key: value for key, value in _TEXT.items() if key != "tie_word_embeddings"}


def _image(name: str, text: dict[str, Any], vision: dict[str, Any], **settings: Any) -> Callable[[], nn.Module]:
    """``_image("Llava", ...)``: a model of images and text, with a text configuration and one of a vision tower."""
    config = {"text_config": _UNDER | text, "vision_config": vision, "tie_word_embeddings": False, **settings}
    return _model(f"{name}Config", f"{name}ForConditionalGeneration", **config)


_IMAGE_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_BLOCKS = {"depth": 1, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
VISION = {
    "llava": _image("Llava", {"model_type": "llama"}, _TOWER | {"model_type": "clip_vision_model"}, image_token_id=60),
    "qwen2-vl": _image(
        "Qwen2VL", _MROPE, _BLOCKS | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, **_IMAGE_TOKENS
    ),
    "qwen2.5-vl": _image(
        "Qwen2_5_VL",
        _MROPE,
        _BLOCKS | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24},
        **_IMAGE_TOKENS,
    ),
    "gemma3-vision": _image("Gemma3", {"head_dim": 8}, _TOWER, mm_tokens_per_image=4, image_token_index=60),
    "smolvlm": _image("SmolVLM", {"model_type": "llama"}, _TOWER, image_token_id=60, scale_factor=2),
}

CLASSIFIER = {
    "llama, classes": _model("LlamaConfig", "LlamaForSequenceClassification", **_TEXT | {"num_labels": 3}),
    "bert, classes": _model("BertConfig", "BertForSequenceClassification", **_TEXT | {"num_labels": 3}),
    "roberta, classes": _model("RobertaConfig", "RobertaForSequenceClassification", **_TEXT | {"num_labels": 3}),
}

ALL = DENSE | MOE | HYBRID | VISION | CLASSIFIER
