"""AdamW over one flat buffer: the whole adapter is two vectors, so a step is a handful of fused operations.

Decoupled weight decay (Loshchilov & Hutter 2019, alg. 2):

    p <- p - lr * wd * p
    p <- p - lr * m_hat / (sqrt(v_hat) + eps)

An adapter has hundreds of small tensors; their parameters become views into one float32 buffer and their gradients
views into another. Clipping is then one norm, the all-reduce of a distributed run one call, and a checkpoint four
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.errors import TrainError
from veneer.files import sha256_json

ALIGNMENT = 16  # elements: every tensor starts on a cache line


class FlatAdamW:
    """AdamW on adapter parameters that live in one float32 buffer.

    Matrices (two dimensions and more) are decayed, vectors are not.

    Args:
        named_parameters: ``(name, parameter)`` in a fixed order; all float32, on one device. Their ``data`` and
            ``grad`` are replaced by views; shapes and values stay.
        betas, eps, weight_decay: Adam's.

    Raises:
        TrainError: no parameters, or a parameter that is not float32.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
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
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        # Decayed tensors first, so that each of the two groups is one contiguous slice.
        order = sorted(range(len(self.parameters)), key=lambda i: self.parameters[i].dim() < 2)
        self._offsets = [0] * len(order)
        end = decayed = 0
        for index in order:
            self._offsets[index] = end
            end += -(-self.parameters[index].numel() // ALIGNMENT) * ALIGNMENT
            if self.parameters[index].dim() >= 2:
                decayed = end
        device = self.parameters[0].device
        self.flat = torch.zeros(end, dtype=torch.float32, device=device)
        self.grad = torch.zeros(end, dtype=torch.float32, device=device)
        self.grad_views: list[Tensor] = []
        for parameter, offset in zip(self.parameters, self._offsets):
            part = slice(offset, offset + parameter.numel())
            view = self.flat[part].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            self.grad_views.append(self.grad[part].view(parameter.shape))
            parameter.grad = self.grad_views[-1]
        groups = []
        for part, decay in ((slice(0, decayed), weight_decay), (slice(decayed, end), 0.0)):
            if part.stop > part.start:
                whole = nn.Parameter(self.flat[part])
                whole.grad = self.grad[part]
                groups.append({"params": [whole], "weight_decay": decay})
        self._adam = torch.optim.AdamW(
            groups, lr=0.0, betas=betas, eps=eps, fused=device.type in ("cpu", "cuda", "mps")
        )

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
        """One AdamW update with the gradient that :meth:`finish_gradient` left."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()

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

    def state(self) -> dict[str, Tensor]:
        """The moments as flat tensors in the buffer's layout: ``exp_avg [n]``, ``exp_avg_sq [n]``, ``steps [1]``."""
        states = [self._adam.state[group["params"][0]] for group in self._adam.param_groups]
        if not states[0]:
            return {
                "exp_avg": torch.zeros_like(self.flat),
                "exp_avg_sq": torch.zeros_like(self.flat),
                "steps": torch.zeros(1),
            }
        return {
            "exp_avg": torch.cat([state["exp_avg"] for state in states]),
            "exp_avg_sq": torch.cat([state["exp_avg_sq"] for state in states]),
            "steps": states[0]["step"].reshape(1).float(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` returned; the parameters themselves are loaded through the adapter.

        Raises:
            TrainError: the state is of another size.
        """
        if state["exp_avg"].numel() != self.flat.numel():
            raise TrainError(
                "the optimizer state does not fit the adapter", fix="resume with the adapter settings of the run"
            )
        start = 0
        for group in self._adam.param_groups:
            whole = group["params"][0]
            part = slice(start, start + whole.numel())
            self._adam.state[whole] = {
                "step": state["steps"].reshape(()).to(whole.device, torch.float32, copy=True),
                "exp_avg": state["exp_avg"][part].to(whole.device, copy=True),
                "exp_avg_sq": state["exp_avg_sq"][part].to(whole.device, copy=True),
            }
            start += whole.numel()

    def _check_views(self) -> None:
        """A gradient that was replaced (``zero_grad(set_to_none=True)``, ``module.to``) would not be trained."""
        for name, parameter, view in zip(self.names, self.parameters, self.grad_views):
            if parameter.grad is None or parameter.grad.data_ptr() != view.data_ptr():
                raise TrainError(
                    "a gradient left the optimizer's buffer",
                    where=name,
                    fix="do not set gradients to None or move the module while it trains",
                )
