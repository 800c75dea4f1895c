"""Shipping: an adapter looked into, cut to fewer ranks, or folded into its base as a plain model."""

from veneer.ship.inspect import Inspection, LayerReport, inspect_adapter
from veneer.ship.merge import MergedModel, merge_model
from veneer.ship.resize import ResizedAdapter, ResizedLayer, resize_adapter

__all__ = [
    "Inspection",
    "LayerReport",
    "MergedModel",
    "ResizedAdapter",
    "ResizedLayer",
    "inspect_adapter",
    "merge_model",
    "resize_adapter",
]
