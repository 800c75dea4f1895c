"""Starts that look at data: what the layers read (EVA), or the gradient of their weights (LoRA-GA).

The model runs with its adapters off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from veneer.adapters import init_eva, init_lora_ga
from veneer.adapters.config import DATA_INITS, LoraConfig
from veneer.adapters.model import AdaptedModel
from veneer.adapters.sample import Counted, Sample, layers_of
from veneer.errors import AdapterError

MEMORY_BUDGET = 2 << 30  # bytes of covariances or gradients that are held at a time

Batch = TypeVar("Batch")


def initialise_from(
    adapted: AdaptedModel,
    batches: Sequence[Batch],
    loss: Callable[[Batch], Tensor],
    *,
    counted: Counted[Batch] = lambda batch: None,
    name: str | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> str:
    """Starts an adapter (the active one) whose ``init_lora_weights`` is ``"eva"`` or ``"lora_ga"``. Its parameters are
    new ones afterwards: optimizers come later.

    Args:
        batches: what the model is run on; gone over several times.
        loss: runs the model on a batch, in evaluation mode, and returns what is minimised, a scalar.
        counted: which rows of the inputs EVA looks at, ``[T]`` bool; None: all.
        memory_budget: bytes that may be held for the layers at a time.

    Returns:
        What there is to say of it.

    Raises:
        AdapterError: the adapter does not wait for data, there is none, or no adapted layer took part.
    """
    name, config = check_waits(adapted, name)
    if not batches:
        raise AdapterError(
            f"{config.init_lora_weights} starts from rows of data, and there are none",
            where="initialise",
            fix="give it some training rows",
        )
    sample = Sample(adapted, name, layers_of(adapted, name), batches, loss, counted, memory_budget)
    start = init_eva.start if config.init_lora_weights == "eva" else init_lora_ga.start
    was_training = adapted.module.training
    adapted.module.eval()
    try:
        with adapted.disabled():
            text = start(sample)
    finally:
        adapted.module.train(was_training)
    adapted.started(name)
    return text


def check_waits(adapted: AdaptedModel, name: str | None = None) -> tuple[str, LoraConfig]:
    """The name and the config of an adapter (the active one) that waits for data.

    Raises:
        AdapterError: it does not.
    """
    name = adapted.active if name is None else name
    if name is None or name not in adapted.waiting:
        raise AdapterError(
            "this adapter does not wait for data",
            where=f"adapter {name!r}",
            fix=f"attach one with init_lora_weights: {' or '.join(DATA_INITS)}, and initialise it once",
        )
    return name, adapted.configs[name]
