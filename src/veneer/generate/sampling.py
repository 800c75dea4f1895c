"""The next token from the logits. A row's draw depends on the seed, the row's number and the step, on nothing else.

Names: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy, and the others then do not count."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0

    def check(self) -> None:
        """Raises UsageError for a value out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature is {self.temperature}", fix="use 0 (greedy) or a positive number such as 0.7"
            )
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}", fix="use 0 (no limit) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", fix="use a share above 0 and up to 1 (no limit)")


def row_noise(seed: int, row: int, steps: int) -> Tensor:
    """``[steps]`` float64 in [0, 1): all the chance that a row gets, from a generator of its own."""
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(steps, generator=generator, dtype=torch.float64)


def choose(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """The next token of each row.

    Args:
        logits: ``[B, V]``, any floating dtype.
        noise: ``[B]`` float64 in [0, 1), or None when greedy.

    Returns:
        ``[B]`` int64 on the logits' device.
    """
    if sampling.temperature == 0 or noise is None:
        return logits.argmax(-1)
    probabilities = truncated_probabilities(logits, sampling)
    # The inverse of the distribution function in vocabulary order: one number per row decides, whatever the others do.
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(
        noise.to(cumulative.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).to(logits.device)


def truncated_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """``[B, V]`` float64: softmax at the temperature, of the ``top_k`` largest, then of the set of mass ``top_p``.

    Not normalised again: the last entry of the cumulative sum is the mass that is left.
    """
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    scaled = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        smallest = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
    probabilities = torch.softmax(scaled, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the mass of everything more likely; 0 for the most likely token
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return probabilities
