"""Gated MLPs that run as one operation, in the place of a model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from veneer.kernels.gated_mlp import LowRankLinear, gated_mlp
from veneer.models.fused_norm import gives_the_same
from veneer.models.low_rank import low_rank_of, split_rows, zero_update
from veneer.quant import QuantizedLinear

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELU": "gelu", "GELUActivation": "gelu"}
_ACTIVATIONS |= {"PytorchGELUTanh": "gelu_tanh", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh"}
# The linears that read the input, and the activation, as models name them.
_LAYOUTS = ((("gate_proj", "up_proj"), "act_fn"), (("gate_up_proj",), "activation_fn"))


class FusedGatedMlp(nn.Module):
    """A gated MLP that runs as one operation where its linears are plain but for adapters; else as its parts.

    Args:
        first: the linears that read the input, by name: gate and up, or one whose output is both, gate first (Phi-3).
        down: the linear ``down_proj``.
        act: the name of the activation's module, the module, and what the operation calls it.
    """

    def __init__(self, first: dict[str, nn.Module], down: nn.Module, act: tuple[str, nn.Module, str]) -> None:
        super().__init__()
        for name, linear in first.items():
            self.add_module(name, linear)
        self.down_proj = down
        self._first, self._act = tuple(first), act[0]
        self.add_module(*act[:2])
        self.activation = act[2]
        self.recompute = False  # in the backward, instead of keeping what lies between

    def forward(self, x: Tensor) -> Tensor:
        first = [getattr(self, name) for name in self._first]
        reading, last = low_rank_of(first, x), low_rank_of([self.down_proj], x)
        if reading is not None and last is not None:
            return gated_mlp(x, *_halves(reading), last[0], self.activation, self.recompute)
        gate, up = (layer(x) for layer in first) if len(first) == 2 else first[0](x).chunk(2, -1)
        out: Tensor = self.down_proj(getattr(self, self._act)(gate) * up)
        return out

    def without_updates(self, x: Tensor) -> Tensor:
        """The operation without adapters."""
        first = [zero_update(getattr(self, name)) for name in self._first]
        return gated_mlp(x, *_halves(first), zero_update(self.down_proj), self.activation)


def _halves(first: list[LowRankLinear]) -> tuple[LowRankLinear, LowRankLinear]:
    gate, up = first if len(first) == 2 else split_rows(first[0], [len(first[0].B) // 2] * 2)
    return gate, up


def fused_mlp(block: nn.Module) -> FusedGatedMlp | None:
    """The same as ``block`` has, where it is made as a gated MLP is; whether it computes the same is not looked at."""
    children = dict(block.named_children())
    if len(inspect.signature(type(block).forward).parameters) != 2:  # self and x
        return None
    if block._parameters or block._buffers:
        return None
    for names, act_name in _LAYOUTS:
        if set(children) == {*names, "down_proj", act_name}:
            act = _ACTIVATIONS.get(type(children[act_name]).__name__)
            kinds = (nn.Linear, QuantizedLinear) if len(names) == 2 else (nn.Linear,)
            if act is not None and all(type(children[name]) in kinds for name in (*names, "down_proj")):
                first = {name: children[name] for name in names}
                return FusedGatedMlp(first, children["down_proj"], (act_name, children[act_name], act))
    return None


def form_of(block: nn.Module) -> Hashable:
    """What decides what the block of :func:`fused_mlp` computes, beside its weights: two of one form compute alike.

    Limits and factors are attributes, of one layer and not of the next in some models. An attribute that is no plain
    value counts by its identity.
    """
    usual = set(nn.Module().__dict__)
    linears = (nn.Linear, QuantizedLinear)
    parts = [(name, child, type(child) in linears) for name, child in (("", block), *block.named_children())]
    attributes = tuple(
        (name, key, value if isinstance(value, bool | int | float | str | None) else id(value))
        for name, part, is_linear in parts
        if not is_linear
        for key, value in sorted(part.__dict__.items())
        if key not in usual
    )
    return tuple((name, type(part)) for name, part, _ in parts), attributes


def computes_the_same(block: nn.Module, fused: FusedGatedMlp) -> bool:
    """Whether the operation gives what ``block`` gives."""
    own: Any = getattr(fused, fused._first[0])
    run: Callable[[Tensor], Tensor] = fused.without_updates
    return gives_the_same(block, run, own.weight)
