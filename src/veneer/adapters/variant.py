"""What a variant of LoRA says of a layer: a few hooks, each doing nothing here. Plain LoRA is what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from veneer.adapters.layers import LoraAdapter, LoraLinear


class Variant:
    """A stateless rule for how an adapter's tensors act on a linear: ``y = g (W x + s B' A' x) + b``.

    Whatever it trains or keeps beside A and B is a parameter or a buffer of the :class:`LoraAdapter`.
    """

    def start(self, adapter: LoraAdapter, layer: LoraLinear) -> None:
        """Gives a new adapter, its A and B filled, what the variant needs beside them."""

    def factors(self, adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors that act, ``A' [k, in]`` and ``B' [out, k]``, from those before; differentiable."""
        return A, B

    def row_scale(self, adapter: LoraAdapter, layer: LoraLinear) -> Tensor | None:
        """``g [out]`` float32, differentiable; None for ones."""
        return None

    def portable(self, adapter: LoraAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Of the factors that act, those that a file needs."""
        return A, B

    def tensors(self, adapter: LoraAdapter) -> dict[str, Tensor]:
        """What :meth:`start` added, by the end of its key."""
        return {}
