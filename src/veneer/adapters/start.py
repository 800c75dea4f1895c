"""Fills a new adapter's factors: each from a random stream of its own, or from its layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from veneer.adapters.config import DATA_INITS, PLAIN_INITS, LoraConfig
from veneer.adapters.experts import LoraExperts
from veneer.adapters.init import init_embedding, init_from_weight, init_linear
from veneer.adapters.init_loftq import loftq
from veneer.adapters.layers import LoraAdapter, LoraEmbedding, LoraLinear
from veneer.adapters.own_codes import codes_like
from veneer.adapters.settings import LoftqConfig
from veneer.adapters.slots import Slot
from veneer.adapters.targets import Plan
from veneer.errors import AdapterError
from veneer.quant import QuantizedLinear

# Gives the weights [out, in] at these paths, as they were before they were quantised, one at a time and in any order.
Originals: TypeAlias = Callable[[Collection[str], Callable[[str, Tensor], None]], None]


def fill_factors(
    slots: Mapping[str, Slot],
    name: str,
    config: LoraConfig,
    plan: Plan,
    seed: int,
    prefix: str,
    originals: Originals | None = None,
) -> str:
    """Fills the factors of the adapter ``name``. Those that wait for data start as by default.

    Args:
        slots: by path, the adapter in them.
        prefix: of the keys that random streams are named by.
        originals: the weights before they were quantised; LoftQ needs them.

    Returns:
        What there is to say of the start, or nothing.

    Raises:
        AdapterError: LoftQ without the original weights; a start from a linear's weight where there is no linear.
    """
    method = config.init_lora_weights
    from_weight = method not in (*PLAIN_INITS, *DATA_INITS, "loftq")
    started = [t.path for t in plan.lora if isinstance(slots[t.path], LoraLinear)]
    if from_weight and not started:
        raise AdapterError(
            f"{method} starts from the weight of a linear layer, and this adapter is on none",
            where="LoraConfig.init_lora_weights",
            fix="target linear layers too, or leave init_lora_weights out",
        )
    for target in plan.lora:
        if target.tied_to is not None:
            continue
        slot, key = slots[target.path], prefix + target.path
        adapter = slot.adapters[name]
        assert isinstance(adapter, LoraAdapter)
        if isinstance(slot, LoraLinear) and from_weight:
            init_from_weight(adapter, slot, str(method), seed, key)
        else:
            fill = init_embedding if isinstance(slot, LoraEmbedding) else init_linear
            fill(adapter.A, adapter.B, method if config.adalora_config is None else "adalora", seed, key)
    for stack in plan.experts:
        experts = slots[stack.path]
        assert isinstance(experts, LoraExperts)
        experts.stacks(name)[stack.parameter].fill(method, seed, prefix + stack.name)
    if method == "loftq":
        return _fill_from_errors(slots, name, config, plan, originals)
    if from_weight:
        rank = 2 * max(target.r for target in plan.lora)
        others = [t.path for t in plan.lora if t.path not in started] + [stack.name for stack in plan.experts]
        rest = f"; {len(others)} that are no linear layers start as by default ({others[0]})" if others else ""
        return (
            f"{method}: the base is untouched, and the adapter's file is a plain LoRA of up to rank {rank} for it{rest}"
        )
    return ""


@torch.no_grad()
def _fill_from_errors(
    slots: Mapping[str, Slot], name: str, config: LoraConfig, plan: Plan, originals: Originals | None
) -> str:
    """LoftQ, layer by layer; what is not in codes has lost nothing and keeps its default start."""
    wanted = {t.path: slots[t.path] for t in plan.lora if t.tied_to is None}
    layers = {
        path: slot
        for path, slot in wanted.items()
        if isinstance(slot, LoraLinear) and isinstance(slot.base_layer, QuantizedLinear)
    }
    if originals is None:
        raise AdapterError(
            "LoftQ compares the codes with the weights that they were made from, and these are not known here",
            where="LoraConfig.init_lora_weights",
            fix="attach to what veneer.load_base(..., quantize='nf4') returns, or give attach the original weights",
        )
    settings = config.loftq_config or LoftqConfig()
    assert isinstance(settings, LoftqConfig)  # the config has made a section of it
    size = before = after = 0.0
    own_bytes = 0

    def fill(path: str, original: Tensor) -> None:
        nonlocal size, before, after, own_bytes
        base, adapter = layers[path].base_layer, layers[path].adapters[name]
        assert isinstance(base, QuantizedLinear)
        assert isinstance(adapter, LoraAdapter)
        best = loftq(original, base.weight, adapter.r, adapter.scaling, settings.loftq_iter)
        adapter.A.copy_(best.A)
        adapter.B.copy_(best.B)
        size, before, after = size + best.size, before + best.before, after + best.after
        if settings.loftq_iter > 1:
            adapter.own = codes_like(base, best.codes)
            own_bytes += best.codes.nbytes
        layers.pop(path)

    originals(list(layers), fill)
    if layers:
        what = f"the original weights of {len(layers)} layers were not found, the first of them"
        raise AdapterError(what, where=next(iter(layers)), fix="load the base from its 16-bit files")
    share, rest = (100 * (value / max(size, 1e-300)) ** 0.5 for value in (before, after))
    text = f"loftq: the codes are {share:.2f} % off the original weights, and {rest:.2f} % with the adapter's start"
    if settings.loftq_iter == 1:
        return text
    return (
        f"{text}; the adapter has codes of its own beside the base's ({own_bytes / 1e6:.1f} MB). Nobody else has them: "
        f"it is saved as a plain LoRA of up to rank {2 * config.r} for the base in 16 bits, off by that {rest:.2f} %"
    )
