"""bitsandbytes' own 8-bit AdamW, over the flat buffer as if each group were one large parameter."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import RecipeError
from veneer.train.optimizer_memory import Part

# Our name of a state's tensor -> theirs. The contents mean the same, so a checkpoint is one of ours.
_THEIRS = {
    "exp_avg": "state1",
    "exp_avg_absmax": "absmax1",
    "exp_avg_sq": "state2",
    "exp_avg_sq_absmax": "absmax2",
}


def import_bitsandbytes() -> Any:
    """The module.

    Raises:
        RecipeError: it is not installed, or cannot be loaded here.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        raise RecipeError(
            "bitsandbytes is not installed" if missing else f"bitsandbytes cannot be loaded ({error})",
            where="train.optim",
            fix="pip install bitsandbytes, or use adamw_8bit or paged_adamw_8bit, which need nothing more",
        ) from error


class BitsandbytesAdamW:
    """The interface of :class:`veneer.train.optimizer_update.AdamW` over ``bitsandbytes.optim.AdamW8bit``.

    bitsandbytes launches a kernel and waits for it once for each parameter, and pages no parameter under 100,000
    elements; over a flat buffer it launches twice, and pages.

    Args:
        flat, grad: ``[n]`` float32.
        groups: elements with the same weight decay and learning rate.
        paged: the moments lie in CUDA's managed memory.

    Raises:
        RecipeError: bitsandbytes cannot be imported.
    """

    def __init__(
        self,
        flat: Tensor,
        grad: Tensor,
        groups: Sequence[Part],
        *,
        betas: tuple[float, float],
        eps: float,
        paged: bool,
    ) -> None:
        optim = import_bitsandbytes().optim
        described = []
        for group in groups:
            whole = nn.Parameter(flat[group.start : group.stop])
            whole.grad = grad[group.start : group.stop]
            described.append({"params": [whole], "weight_decay": group.weight_decay})
        self._multipliers = [group.multiplier for group in groups]
        # min_8bit_size=0: by itself it keeps what is small in 32 bits, and a state would have two formats.
        kind = optim.PagedAdamW8bit if paged else optim.AdamW8bit
        self._adam = kind(described, lr=0.0, betas=betas, eps=eps, min_8bit_size=0)
        for index, group in enumerate(self._adam.param_groups):
            self._adam.init_state(group, group["params"][0], index, 0)
        self._states = [self._adam.state[group["params"][0]] for group in self._adam.param_groups]

    def step(self, learning_rate: float) -> None:
        """One update."""
        for group, multiplier in zip(self._adam.param_groups, self._multipliers):
            group["lr"] = learning_rate * multiplier
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """As of :class:`veneer.train.optimizer_update.Update8bit`: codes, absmax and ``steps [1]``; a copy."""
        _finish()
        # Together on the host: of two groups one may be too small to be paged.
        whole = {ours: torch.cat([state[theirs].cpu() for state in self._states]) for ours, theirs in _THEIRS.items()}
        return {**whole, "steps": torch.tensor([float(self._states[0]["step"])])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state` returned."""
        _finish()
        for ours, theirs in _THEIRS.items():
            start = 0
            for own in self._states:
                count = own[theirs].numel()
                own[theirs].copy_(state[ours][start : start + count])
                start += count
        for own in self._states:
            own["step"] = int(state["steps"])


def _finish() -> None:
    """Managed memory is read and written by the host: what the device was given to do must be done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
