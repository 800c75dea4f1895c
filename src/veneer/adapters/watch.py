"""Hooks on adapted layers that see what the base layer reads, or the gradient of its weight, while the model runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from veneer.adapters.layers import LoraLinear

Layers: TypeAlias = Mapping[str, list[LoraLinear]]  # all places of one set of factors, by the path of the first


@contextlib.contextmanager
def inputs_watched(layers: Layers, watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within it ``watch`` gets what each layer reads."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, inputs: watch(path, inputs[0].detach())

    handles = [
        layer.base_layer.register_forward_pre_hook(hook(path)) for path, places in layers.items() for layer in places
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def gradients_watched(layers: Layers, gradients: dict[str, Tensor]) -> Iterator[None]:
    """Within it every backward adds ``dL/dW [out, in]`` of these layers to ``gradients``, in float32."""

    def hook(path: str) -> Callable[..., Tensor]:
        def called(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
            x = inputs[0].detach()

            def add(dy: Tensor) -> None:
                rows, grads = (t.reshape(-1, t.shape[-1]) for t in (x, dy))
                dtype = torch.promote_types(rows.dtype, torch.float32)
                part = grads.to(dtype).t() @ rows.to(dtype)
                gradients[path] = part if path not in gradients else gradients[path].add_(part)

            # With the base frozen and the adapters off nothing needs a gradient before the first of these layers. No
            # leaf, nor a view of one: OLMo cuts off what is too large in place. The hook sees it as it was before.
            y = y if y.requires_grad else y.detach().requires_grad_().clone()
            y.register_hook(add)  # type: ignore[no-untyped-call]  # torch's own
            return y

        return called

    handles = [
        layer.base_layer.register_forward_hook(hook(path)) for path, places in layers.items() for layer in places
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shared_inputs(layers: Layers, run: Callable[[], Tensor]) -> dict[str, str]:
    """For each layer that is called the first one that reads the very same tensor (q for k and v; gate for up)."""
    living: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # a tensor that is gone may leave its id to another
    leaders: dict[str, str] = {}

    def watch(path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        known, leader = living.get(id(x), (None, path))
        if known is None or known() is not x:
            living[id(x)], leader = (weakref.ref(x), path), path
        leaders.setdefault(path, leader)

    def hook(path: str) -> Callable[..., None]:
        return lambda module, inputs: watch(path, module, inputs)

    alone = {path: places[0] for path, places in layers.items()}
    handles = [layer.base_layer.register_forward_pre_hook(hook(path)) for path, layer in alone.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    # What several places share is summed over all of them: it follows nobody, and nobody follows it.
    many = {path for path, places in layers.items() if len(places) > 1}
    return {path: path if path in many or leader in many else leader for path, leader in leaders.items()}
