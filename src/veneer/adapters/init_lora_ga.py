"""LoRA-GA: the first step of the factors goes where that of the full weight would go (Wang et al. 2024, alg. 1).

    dL/dW ~ U diag(S) V^T, 2 r triplets     A0 = c V[:, :r]^T     B0 = c U[:, r:2r]     c = out^(1/4) / sqrt(gamma)

Other choices of the vectors (``direction``) and of ``c`` (``scale``) have PEFT's names. PEFT multiplies B0 with S and
leaves A0 unscaled under "stable", so that the start depends on the unit of the loss; here both have the paper's scale.
As with PiSSA the base is not changed: :mod:`veneer.adapters.residual`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from veneer.adapters.init import stream
from veneer.adapters.init_svd import exact_triplets
from veneer.adapters.model import KEY_PREFIX
from veneer.adapters.sample import Sample
from veneer.adapters.settings import LoraGaConfig
from veneer.adapters.watch import gradients_watched

Batch = TypeVar("Batch")


def start(sample: Sample[Batch]) -> str:
    """Starts the factors, and says how."""
    layers, seed = sample.layers, sample.adapted.waiting[sample.name]
    settings = sample.config.lora_ga_config or LoraGaConfig()
    assert isinstance(settings, LoraGaConfig)
    started: set[str] = set()
    groups = list(sample.groups({path: 4 * layer[0].weight.shape.numel() for path, layer in layers.items()}))
    for group in groups:
        gradients: dict[str, Tensor] = {}
        with torch.enable_grad(), gradients_watched({path: layers[path] for path in group}, gradients):
            for batch in sample.batches:
                value = sample.loss(batch)
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]  # torch's own
        for path, gradient in gradients.items():
            adapter, layer = sample.factors(path), layers[path][0]
            key = f"{KEY_PREFIX}{path}.A"
            A, B = gradient_factors(gradient, layer.rows(), adapter.r, adapter.scaling, settings, stream(seed, key))
            with torch.no_grad():
                adapter.A.copy_(A)
                adapter.B.copy_(B)
        started |= gradients.keys()
    rest = sample.rest(started)
    passes = f"{len(groups)} passes" if len(groups) > 1 else "one pass"
    rank = f"its file is a plain LoRA of up to rank {2 * sample.config.r} for the untouched base"
    return f"lora_ga: {len(started)} layers start along their gradients, in {passes}; {rank}{rest}"


def gradient_factors(
    gradient: Tensor, weight: Tensor, r: int, scaling: float, settings: LoraGaConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``A0 [r, in]`` and ``B0 [out, r]`` of a layer.

    Args:
        gradient: ``[out, in]`` of the weight; its size does not matter.
        weight: ``[out, in]``; only "weight_svd" looks at it.
        generator: of the direction "random"; on the CPU.
    """
    # A matrix with less than 2 r triplets gives its last r to B, and some of them to both.
    count = min(2 * r, *gradient.shape)
    U, _, V = exact_triplets(gradient, count)
    first, last = list(range(r)), list(range(count - r, count))
    if settings.direction == "ArB2r":
        for_A, for_B = first, last
    elif settings.direction == "A2rBr":
        for_A, for_B = last, first
    elif settings.direction == "ArBr":
        for_A, for_B = [min(2 * i + 1, count - 1) for i in first], [min(2 * i, count - 1) for i in first]
    else:
        for_A = for_B = torch.randperm(count, generator=generator)[:r].tolist()
    c = _scale(weight, r, scaling, settings)
    return c * V[:, for_A].t(), c * U[:, for_B]


def _scale(weight: Tensor, r: int, scaling: float, settings: LoraGaConfig) -> float:
    """What both factors are multiplied with."""
    if settings.scale == "stable":
        return float(weight.shape[0] ** 0.25 / settings.stable_gamma**0.5)
    if settings.scale == "gd_scale":
        return 1 / scaling
    if settings.scale == "weight_svd":
        return float((exact_triplets(weight, r)[1] / scaling).sqrt().mean())
    return 1.0
