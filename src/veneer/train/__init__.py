"""Training: the loop, its objectives, checkpoints and guards. Imports no torch by itself.

Read ``loop`` first; ``session`` is what lies around it, ``api`` the two ways in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import lazy_names

_WHERE = {
    "Progress": "veneer.train.progress",
    "Silent": "veneer.train.progress",
    "TrainResult": "veneer.train.result",
    "initialise": "veneer.train.api",
    "train": "veneer.train.api",
    "train_recipe": "veneer.train.api",
}

__all__ = ["Progress", "Silent", "TrainResult", "initialise", "train", "train_recipe"]

if TYPE_CHECKING:
    from veneer.train.api import initialise, train, train_recipe
    from veneer.train.progress import Progress, Silent
    from veneer.train.result import TrainResult

lazy_names(__name__, _WHERE)
