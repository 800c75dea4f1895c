"""Veneer: fine-tune language models with LoRA, prove that it worked, and ship the result.

Importing this package imports no torch: the public names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import lazy_names

__version__ = "0.1.0"

_WHERE = {
    "LoraConfig": "veneer.adapters",
    "AdaptedModel": "veneer.adapters",
    "attach": "veneer.adapters",
    "Base": "veneer.models",
    "add_tokens": "veneer.models",
    "load_base": "veneer.models",
    "save_base": "veneer.models",
    "generate": "veneer.generate",
    "evaluate": "veneer.evaluate",
    "evaluate_classes": "veneer.evaluate",
    "predict": "veneer.evaluate",
    "load_classifier": "veneer.run",
    "load_model": "veneer.run",
    "train": "veneer.train",
    "initialise": "veneer.train",
    "inspect_adapter": "veneer.ship",
    "resize_adapter": "veneer.ship",
    "VeneerError": "veneer.errors",
}

__all__ = [
    "AdaptedModel",
    "Base",
    "LoraConfig",
    "VeneerError",
    "__version__",
    "add_tokens",
    "attach",
    "evaluate",
    "evaluate_classes",
    "generate",
    "initialise",
    "inspect_adapter",
    "load_base",
    "load_classifier",
    "load_model",
    "predict",
    "resize_adapter",
    "save_base",
    "train",
]

if TYPE_CHECKING:
    from veneer.adapters import AdaptedModel, LoraConfig, attach
    from veneer.errors import VeneerError
    from veneer.evaluate import evaluate, evaluate_classes, predict
    from veneer.generate.generate import generate
    from veneer.models import Base, add_tokens, load_base, save_base
    from veneer.run import load_classifier, load_model
    from veneer.ship import inspect_adapter, resize_adapter
    from veneer.train import initialise, train

lazy_names(__name__, _WHERE)
