"""Tiny random models of images and text, each with a tokenizer and a processor's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_TOWER |= {"intermediate_size": 24, "initializer_range": 0.2}
_BLOCKS = {"depth": 1, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
IMAGE = 290  # the id that stands for a part of an image
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}

# By the name of their class: the settings of the language model, of the vision tower, and of both together.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Llava": ({"model_type": "llama"}, _TOWER | {"model_type": "clip_vision_model"}, {"image_token_id": IMAGE}),
    "Qwen2VL": (_MROPE, _BLOCKS | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, _TOKENS),
    "Qwen2_5_VL": (_MROPE, _BLOCKS | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}, _TOKENS),
    "SmolVLM": ({"model_type": "llama"}, _TOWER, {"image_token_id": IMAGE, "scale_factor": 2}),
    "Idefics3": ({"model_type": "llama"}, _TOWER, {"image_token_id": IMAGE, "scale_factor": 2}),
    "Gemma3": ({"head_dim": 8}, _TOWER, {"mm_tokens_per_image": 4, "image_token_id": IMAGE}),
}
CROSS_ATTENTION = {  # Llama 3.2's: its second layer reads images alone, and rows of text pass it by
    "Mllama": (
        {"cross_attention_layers": [1]},
        {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 8}
        | {"patch_size": 4, "intermediate_size": 24, "vision_output_dim": 32, "intermediate_layers_indices": [0]}
        | {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
        {"image_token_index": IMAGE},
    )
}
PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "processor_class": "TinyProcessor"}


def write_vision(name: str, folder: Path, tokenizer: Any) -> Path:
    """Writes a random float32 ``NameForConditionalGeneration`` with a tokenizer and ``preprocessor_config.json``."""
    text, tower, both = (MODELS | CROSS_ATTENTION)[name]
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    text = {**_TEXT, "vocab_size": len(tokenizer), **special, **text}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=tower, tie_word_embeddings=False, **both
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    return folder


def opened(folder: Path) -> Any:
    """The model as transformers opens it, in float32."""
    model_class = transformers.AutoModelForImageTextToText
    return model_class.from_pretrained(str(folder), dtype=torch.float32).eval()
