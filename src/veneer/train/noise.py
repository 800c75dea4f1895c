"""Randomness that a resumed run repeats: every draw is seeded by what it is for, never by what was drawn before."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.pack import Batch
from veneer.train.layout import document_lengths


@contextlib.contextmanager
def as_in_training(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Train mode, for a trial: afterwards the mode and torch's generators are as if nothing had happened."""
    training = module.training
    module.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        module.train(training)


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed for the random stream that ``parts`` names, e.g. ``("dropout", seed, step, rank, micro_batch)``."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def embedding_noise(batch: Batch, width: int, alpha: float, seed: int, epoch: int) -> Tensor:
    """NEFTune's noise for one micro-batch (Jain et al. 2023, alg. 1): uniform in +-1, times ``alpha / sqrt(T d)``.

    ``T`` is the length of the document that a token belongs to, so that packing and padding change nothing; and each
    document's noise is drawn from a stream of its own, named by seed, epoch and row, so that neither do the layout and
    the number of processes.

    Returns:
        ``[B, T, d]`` float32 on the CPU, zero on padding.
    """
    rows, columns = batch.input_ids.shape
    noise = torch.zeros(rows, columns, width)
    start = 0
    for place, (length, row_id) in enumerate(zip(document_lengths(batch), batch.row_ids)):
        generator = torch.Generator().manual_seed(stream_seed("neftune", seed, epoch, row_id))
        drawn = torch.rand(length, width, generator=generator).mul_(2).sub_(1).mul_(alpha / (length * width) ** 0.5)
        if batch.document_lengths is None:
            noise[place, :length] = drawn
        else:
            noise[0, start : start + length] = drawn
            start += length
    return noise


@contextlib.contextmanager
def neftune(module: nn.Module, alpha: float | None, seed: int) -> Iterator[Callable[[Batch, int], None]]:
    """While it is open, the input embeddings of ``module`` carry noise in training mode; evaluation sees none.

    Yields:
        ``prepare(batch, epoch)``, to be called before each training forward; does nothing when ``alpha`` is None.
    """
    if alpha is None:
        yield lambda batch, epoch: None
        return
    embeddings: nn.Module = module.get_input_embeddings()  # type: ignore[operator]  # a transformers model's own method
    pending: list[tuple[Batch, int]] = []

    def add_noise(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if not layer.training or not pending:
            return None
        batch, epoch = pending[0]
        noise = embedding_noise(batch, output.shape[-1], alpha, seed, epoch)
        return output + noise.to(output.device, output.dtype)

    def prepare(batch: Batch, epoch: int) -> None:
        pending[:] = [(batch, epoch)]

    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield prepare
    finally:
        handle.remove()
