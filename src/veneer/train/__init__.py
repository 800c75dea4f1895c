"""Training: the loop, its objectives, checkpoints and guards. Imports no torch by itself.

Read ``loop`` first; ``session`` is what lies around it, ``api`` the two ways in.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Progress": "veneer.train.progress",
    "Silent": "veneer.train.progress",
    "TrainResult": "veneer.train.session",
    "train": "veneer.train.api",
    "train_recipe": "veneer.train.api",
}

__all__ = ["Progress", "Silent", "TrainResult", "train", "train_recipe"]

if TYPE_CHECKING:
    from veneer.train.api import train, train_recipe
    from veneer.train.progress import Progress, Silent
    from veneer.train.session import TrainResult


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'veneer.train' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(types.ModuleType):
    """Importing this package binds ``veneer.train`` to it, so the package has to answer as the function would."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
