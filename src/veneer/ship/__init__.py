"""Shipping: an adapter folded into its base, written as a plain model."""

from veneer.ship.merge import MergedModel, merge_model

__all__ = ["MergedModel", "merge_model"]
