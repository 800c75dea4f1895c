"""Starts an adapter from training rows (EVA, LoRA-GA): before the first step of a run, or of a loop of one's own.

The rows are those that training sees first. One process looks at them; the others get its factors, to the last bit. A
resumed run does not look again: it has the ranks and the factors of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel
from veneer.adapters.init_data import initialise_from
from veneer.adapters.save import read_training_state
from veneer.adapters.settings import EvaConfig, LoraGaConfig
from veneer.data.dataset import TokenDataset
from veneer.data.pack import IGNORE_INDEX, Batch
from veneer.train.distributed import World
from veneer.train.layout import Layout
from veneer.train.sampler import step_rows

_A = ".lora_A.weight"


def start_from_rows(
    adapted: AdaptedModel,
    dataset: TokenDataset,
    layout: Layout,
    micro_batches: Callable[[Sequence[int], TokenDataset, Layout], Iterator[Any]],
    objective: Callable[[nn.Module, Any], Any],
    device: torch.device,
    seed: int,
    world: World,
) -> str:
    """Starts the active adapter, which waits for data, from the first rows of the run; the rest is as in a step.

    Returns:
        What there is to say of it.

    Raises:
        AdapterError: no row reaches a layer of the adapter.
    """
    name = adapted.active
    assert name is not None
    config = adapted.configs[name]
    settings = config.eva_config or config.lora_ga_config
    if not isinstance(settings, EvaConfig | LoraGaConfig):
        settings = EvaConfig() if config.init_lora_weights == "eva" else LoraGaConfig()
    text = ""
    if world.is_main:
        indices, _ = step_rows(0, len(dataset), settings.rows, seed)
        batches = list(micro_batches(indices.tolist(), dataset, layout))

        def loss(batch: Any) -> Tensor:
            value: Tensor = objective(adapted.module, batch.to(device)).loss_sum
            return value

        text = initialise_from(adapted, batches, loss, counted=_counted)
    if world.size > 1:
        _share(adapted, name, world)
    return text


def start_from_checkpoint(adapted: AdaptedModel, checkpoint: Path) -> None:
    """Gives the active adapter, which waits for data, the ranks of a checkpoint; its factors are loaded next."""
    assert adapted.active is not None
    keys = read_training_state(checkpoint / "adapter")
    ranks = {path: len(tensor) for key, tensor in keys.items() for path in [_path(key)] if path is not None}
    _take_ranks(adapted, adapted.active, ranks)
    adapted.started(adapted.active)


def _counted(batch: Batch) -> Tensor | None:
    """Where EVA looks: where the model is trained to answer, as the paper and PEFT do; of a classifier at all tokens.

    Never at padding: how rows are batched would change the start.
    """
    trained = batch.targets.flatten() != IGNORE_INDEX
    mask = batch.attention_mask
    return trained if mask is None or trained.any() else mask.flatten()


def _share(adapted: AdaptedModel, name: str, world: World) -> None:
    """Every process takes over what the first one has: a sum to which the others add zeros."""
    ranks = world.gather({path: adapter.r for path, adapter in adapted.linears(name).items()})[0]
    if not world.is_main:
        _take_ranks(adapted, name, ranks)
    for adapter in adapted.linears(name).values():
        for factor in (adapter.A, adapter.B):
            with torch.no_grad():
                world.sum_(factor if world.is_main else factor.zero_())
    if not world.is_main:
        adapted.started(name)


def _take_ranks(adapted: AdaptedModel, name: str, ranks: dict[str, int]) -> None:
    has = {path: adapter.r for path, adapter in adapted.linears(name).items()}
    if any(ranks.get(path, r) != r for path, r in has.items()):
        settings = adapted.configs[name].eva_config
        adjust = settings.adjust_scaling_factors if isinstance(settings, EvaConfig) else True
        adapted.set_ranks(name, {path: r for path, r in ranks.items() if path in has}, keep_scaling=adjust)


def _path(key: str) -> str | None:
    return key.removeprefix("base_model.model.").removesuffix(_A) if key.endswith(_A) else None
