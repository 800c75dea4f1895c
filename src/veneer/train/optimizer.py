"""AdamW over one flat buffer: the whole adapter is two vectors, so a step is a handful of fused operations.

An adapter has hundreds of small tensors; their parameters become views into one float32 buffer and their gradients
views into another. Clipping is then one norm, the all-reduce of a distributed run one call, a checkpoint a few
tensors, and the moments can be kept in 8 bits or paged without a launch for each tensor.

The arithmetic is in :mod:`veneer.train.optimizer_update`, where the moments lie in
:mod:`veneer.train.optimizer_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from veneer.errors import RecipeError, TrainError, did_you_mean
from veneer.files import sha256_json
from veneer.train.optimizer_bnb import BitsandbytesAdamW, import_bitsandbytes
from veneer.train.optimizer_memory import Memory, Paged, Part, Resident, split
from veneer.train.optimizer_update import AdamW, Update, Update8bit, Update32bit

PART = 1 << 20  # elements: what an 8-bit or a paged step has on the device at a time, in float32, is a few times this


@dataclass(frozen=True)
class Kind:
    """What a name of ``train.optim`` stands for."""

    bits: int
    paged: bool = False
    bitsandbytes: bool = False


OPTIMIZERS = {
    "adamw": Kind(32),
    "adamw_8bit": Kind(8),
    "paged_adamw": Kind(32, paged=True),
    "paged_adamw_8bit": Kind(8, paged=True),
    "adamw_bnb_8bit": Kind(8, bitsandbytes=True),
    "paged_adamw_bnb_8bit": Kind(8, paged=True, bitsandbytes=True),
}


def check_optimizer(optim: str, device: torch.device) -> None:
    """Raises what :class:`FlatAdamW` would for a kind that does not run here, before anything long has begun.

    Raises:
        RecipeError: an unknown kind; bitsandbytes' kinds without CUDA or without bitsandbytes.
    """
    kind = OPTIMIZERS.get(optim)
    if kind is None:
        hint = did_you_mean(optim, OPTIMIZERS) or f"use one of {', '.join(OPTIMIZERS)}"
        raise RecipeError(f"unknown optimizer '{optim}'", where="train.optim", fix=hint)
    if kind.bitsandbytes and device.type != "cuda":
        own = optim.replace("_bnb", "")
        raise RecipeError(
            f"'{optim}' is bitsandbytes' optimizer for CUDA, and this run is on {device}",
            where="train.optim",
            fix=f"use {own}, which runs on any device",
        )
    if kind.bitsandbytes:
        import_bitsandbytes()


class Optimizer(Protocol):
    """The steps over the flat buffer, and their state."""

    def step(self, learning_rate: float) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class FlatAdamW:
    """AdamW on adapter parameters that live in one float32 buffer.

    Matrices (two dimensions and more) are decayed; vectors are not, nor what is marked with ``_no_weight_decay``: the
    own parameters of a recurrence (``A_log``), whatever their shape.

    Args:
        named_parameters: ``(name, parameter)`` in a fixed order; all float32, on one device. Their ``data`` and
            ``grad`` are replaced by views; shapes and values stay.
        optim: the moments' format and place, a name in :data:`OPTIMIZERS`. ``adamw`` keeps 8 bytes of moments for each
            parameter, the 8-bit kinds 2 bytes and 8 more for each 256 parameters. Paged moments lie in pinned host
            memory and visit the device part by part; without CUDA nothing is paged, and on the CPU the moments are
            in host memory anyway.
        betas, eps, weight_decay: Adam's.
        multipliers: for each parameter, what its learning rate is times (see :mod:`veneer.train.loraplus`); None for
            ones.

    Raises:
        TrainError: no parameters, or a parameter that is not float32.
        RecipeError: a kind that is unknown, or does not run here.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        optim: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        multipliers: Sequence[float] | None = None,
    ) -> None:
        if not named_parameters:
            raise TrainError("there is nothing to train", fix="attach an adapter whose targets match a layer")
        for name, parameter in named_parameters:
            if parameter.dtype != torch.float32:
                raise TrainError(
                    f"adapter weights must be float32 while training, not {parameter.dtype}",
                    where=name,
                    fix="load the base in bfloat16 if memory is short; the adapter stays in float32",
                )
        device = named_parameters[0][1].device
        check_optimizer(optim, device)
        self.optim = optim
        kind = OPTIMIZERS[optim]
        update: Update = (Update8bit if kind.bits == 8 else Update32bit)(*betas, eps)
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        kinds = [  # (is not decayed, multiplier): what is trained alike
            (parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False), multiplier)
            for parameter, multiplier in zip(self.parameters, multipliers or [1.0] * len(self.parameters), strict=True)
        ]
        # Decayed tensors first, and each group in one piece.
        self._offsets = [0] * len(kinds)
        groups: list[Part] = []
        end = 0
        for is_kept, multiplier in sorted(set(kinds)):
            start = end
            for index, kind_of in enumerate(kinds):
                if kind_of == (is_kept, multiplier):
                    self._offsets[index] = end
                    end += -(-self.parameters[index].numel() // update.alignment) * update.alignment
            groups.append(Part(start, end, 0.0 if is_kept else weight_decay, multiplier))
        self.flat = torch.zeros(end, dtype=torch.float32, device=device)
        self.grad = torch.zeros(end, dtype=torch.float32, device=device)
        self.grad_views = self.views(self.grad)
        for parameter, view, grad_view in zip(self.parameters, self.views(self.flat), self.grad_views):
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = grad_view
        self._optimizer: Optimizer
        if kind.bitsandbytes:
            self._optimizer = BitsandbytesAdamW(self.flat, self.grad, groups, betas=betas, eps=eps, paged=kind.paged)
        else:
            self._optimizer = _own(kind, self.flat, self.grad, groups, update)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """``buffer [n]``, laid out as the flat one, in the shapes of the parameters and in their order."""
        return [
            buffer[offset : offset + parameter.numel()].view(parameter.shape)
            for parameter, offset in zip(self.parameters, self._offsets)
        ]

    def zero_grad(self) -> None:
        """Clears the gradients of the step before, in place: the views stay."""
        self.grad.zero_()

    def finish_gradient(self, divisor: float, max_norm: float | None) -> float:
        """Turns the summed gradients of an optimizer step into its mean gradient, clipped.

        Args:
            divisor: the trained tokens of the whole step, on all processes.
            max_norm: the mean gradient's norm is scaled down to this at most; None does not clip.

        Returns:
            The norm of the mean gradient before clipping; NaN or infinite when a gradient is, and then nothing was
            scaled.
        """
        self._check_views()
        norm = float(torch.linalg.vector_norm(self.grad)) / divisor
        if not norm < float("inf"):  # NaN compares false
            return norm
        scale = 1.0 / divisor
        if max_norm is not None and norm > max_norm:
            scale *= max_norm / norm
        self.grad.mul_(scale)
        return norm

    def step(self, learning_rate: float) -> None:
        """One AdamW update with the gradient that :meth:`finish_gradient` left, at the rate times each multiplier."""
        self._optimizer.step(learning_rate)
        # The parameters are views whose own version counters do not see it; what is cached of them goes by those.
        for parameter in self.parameters:
            torch.autograd.graph.increment_version(parameter)

    def nonzero_gradients(self) -> list[bool]:
        """For each parameter, whether its gradient has a non-zero entry."""
        flags = torch.stack([view.count_nonzero() for view in self.grad_views])
        return [bool(flag) for flag in flags.tolist()]

    def nonfinite_gradients(self) -> list[str]:
        """The names of the parameters whose gradient holds a NaN or an infinity."""
        return [name for name, view in zip(self.names, self.grad_views) if not bool(view.isfinite().all())]

    @property
    def layout(self) -> str:
        """A hash of names, shapes and places: two optimizers with the same layout can exchange their state."""
        return sha256_json([[n, list(p.shape), o] for n, p, o in zip(self.names, self.parameters, self._offsets)])

    @property
    def description(self) -> str:
        """The kind of optimizer, how much memory its state takes, and where, in one line."""
        kind, device = OPTIMIZERS[self.optim], self.flat.device
        size = sum(tensor.nbytes for tensor in self.state().values()) / 1e6
        if not kind.paged:
            place = f"on {device}"
        elif device.type == "cuda":
            place = f"in {'managed' if kind.bitsandbytes else 'pinned host'} memory, visiting {device} at each step"
        elif device.type == "cpu":
            place = "in host memory, where the parameters are too: there is nothing to page"
        else:
            place = f"on {device}: only CUDA is paged for"
        return f"train.optim {self.optim}: {size:.1f} MB of optimizer state {place}"

    def state(self) -> dict[str, Tensor]:
        """The moments as flat tensors in the buffer's layout, and ``steps [1]``; to be read before the next step.

        In 32 bits ``exp_avg [n]`` and ``exp_avg_sq [n]``; in 8 bits their codes, with ``exp_avg_absmax [n / 256]`` and
        ``exp_avg_sq_absmax [n / 256]``.
        """
        return self._optimizer.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` returned; the parameters themselves are loaded through the adapter.

        Raises:
            TrainError: the state is of another kind or size.
        """
        own = self.state()
        if own.keys() != state.keys() or any(own[name].dtype != state[name].dtype for name in own):
            raise TrainError(
                f"the optimizer state is not one of '{self.optim}'", fix="resume with the train.optim of the run"
            )
        if any(own[name].shape != state[name].shape for name in own):
            raise TrainError(
                "the optimizer state does not fit the adapter", fix="resume with the adapter settings of the run"
            )
        self._optimizer.load_state(state)

    def _check_views(self) -> None:
        """A gradient that was replaced (``zero_grad(set_to_none=True)``, ``module.to``) would not be trained."""
        for name, parameter, view in zip(self.names, self.parameters, self.grad_views):
            if parameter.grad is None or parameter.grad.data_ptr() != view.data_ptr():
                raise TrainError(
                    "a gradient left the optimizer's buffer",
                    where=name,
                    fix="do not set gradients to None or move the module while it trains",
                )


def _own(kind: Kind, flat: Tensor, grad: Tensor, groups: Sequence[Part], update: Update) -> AdamW:
    """Ours: in 32 bits on the device a group is one fused operation, else it is updated part by part."""
    paged = kind.paged and flat.device.type == "cuda"
    parts = split(groups, PART) if kind.bits == 8 or paged else groups
    memory: Memory = (
        Paged(update.stored, flat.numel(), flat.device, largest=max(part.stop - part.start for part in parts))
        if paged
        else Resident(update.stored, flat.numel(), flat.device)
    )
    return AdamW(flat, grad, parts, update, memory)
