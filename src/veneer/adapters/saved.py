"""``modules_to_save``: a module that gets a trained copy of its own, whole, per adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers import keep_dtype, master_dtype
from veneer.adapters.saved_parameters import leave_undecayed


class SavedModule(nn.Module):
    """A frozen module with trained copies, at most one of which acts.

    The copies' parameters are float32; they are cast to the base's dtype where they are used, so that activations stay
    in the base's dtype and small updates are not rounded away.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def add(self, name: str) -> nn.Module:
        """A new copy, equal to the base; not active yet."""
        trained = copy.deepcopy(self.base_layer)
        for parameter in trained.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(master_dtype(parameter))
        for part in trained.modules():
            leave_undecayed(part, part._parameters.values())
        self.adapters[name] = trained
        return trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active copy's output; the base's where none is active."""
        if not self.active:
            return self.base_layer(*args, **kwargs)
        trained = self.adapters[self.active[0]]
        cast = self._cast(self.active[0])
        return torch.func.functional_call(trained, cast, args, kwargs) if cast else trained(*args, **kwargs)

    def _cast(self, name: str) -> dict[str, Tensor]:
        """The copy's parameters in the base's dtypes; only those that differ."""
        dtypes = {key: parameter.dtype for key, parameter in self.base_layer.named_parameters()}
        trained = self.adapters[name].named_parameters()
        return {key: parameter.to(dtypes[key]) for key, parameter in trained if parameter.dtype != dtypes[key]}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The copy's parameters and buffers, by their names in the module."""
        return dict(self.adapters[name].state_dict(keep_vars=True)) if name in self.adapters else {}

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """A copy of the adapter's tensors in the base's dtypes."""
        for name in names:
            if name in self.adapters:
                base = self.base_layer.state_dict()
                return {key: value.detach().to(base[key].dtype, copy=True) for key, value in self.tensors(name).items()}
        return {}

    def __getattr__(self, name: str) -> Any:
        # Others read attributes of a module that they know (a norm's epsilon, a head's weight): the acting module's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            children = self.__dict__.get("_modules", {})
            if "base_layer" not in children:
                raise
        base, active = children["base_layer"], self.__dict__.get("active", ())
        value = getattr(children["adapters"][active[0]] if active else base, name)
        if isinstance(value, Tensor) and active:
            value = value.to(getattr(base, name).dtype)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SavedModule:
        self.base_layer._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self.adapters._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self
