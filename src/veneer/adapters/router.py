"""Adapters on the router of a MoE layer: a module that multiplies with its matrix itself and gives more than a product.

    scores = f(x, W + s B A)

What ``f`` is (a softmax, groups, a bias of the choice, the chosen experts) is the router's own code, which therefore
runs with the adapted matrix in the place of its own. The matrix has a row for each expert, so that the dense sum costs
little. In PEFT's file it is one of the ``target_parameters``. Dropout on the input of A has no place there, as in PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.adapters.layers import LoraAdapter, LoraLinear
from veneer.adapters.read_weight import adapted_weight
from veneer.adapters.variant import Variant


class LoraRouter(LoraLinear):
    """A frozen router with adapters.

    Args:
        base_layer: holds its matrix ``[experts, in]`` as the parameter ``weight``; whatever else it holds stays.
    """

    def add(self, name: str, r: int, scaling: float, dropout: float, variants: tuple[Variant, ...] = ()) -> LoraAdapter:
        """A new adapter with zero factors; not active yet. ``dropout`` does nothing."""
        return super().add(name, r, scaling, 0.0, variants)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the router gives, of the adapted matrix, rounded to the base's dtype once; the base's own when off."""
        if not self.active:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, {"weight": adapted_weight(self)}, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # The layer around it may read what the router knows: how many experts a token gets, a bias of the choice.
        try:
            return super().__getattr__(name)
        except AttributeError:
            base: nn.Module | None = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)
