"""What runs in a process of its own for ``benchmarks.intrinsic_dimension``: LoRA trained inside a random subspace.

Names: ``D`` numbers that LoRA trains (all factors as one vector), ``d`` dimensions of the subspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.intrinsic_dimension_projection import Fastfood
from benchmarks.processes import Job, Result, serve
from benchmarks.variants_run import measure

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
WARM_UP = 0.05


def run(job: Job) -> Result:
    """Trains ``d = job["dimension"]`` numbers, or all of them where it is 0, and measures the held-out rows."""
    from veneer.adapters import LoraConfig, attach
    from veneer.data import read, render
    from veneer.models import load_base

    base = load_base(job["base"], dtype=job["dtype"], device=job["device"])
    adapted = attach(base, LoraConfig(**LORA), seed=job["seed"])
    dataset = render(read(job["rows"]), base.tokenizer, max_length=job["max_length"])
    parameters = adapted.parameters()
    size = sum(parameter.numel() for parameter in parameters)
    space = Fastfood(job["dimension"], size, job["seed"]) if job["dimension"] else None
    adapted.module.train()
    losses = train(parameters, space, job, len(dataset), lambda rows: backward(adapted.module, dataset, rows, job))
    return {"losses": losses, "size": size, **measure(adapted, job)}


def train(
    parameters: Sequence[nn.Parameter],
    space: Fastfood | None,
    job: Job,
    row_count: int,
    backward_of: Callable[[Sequence[int]], tuple[float, int]],
) -> list[float]:
    """Adam on ``theta [d]``, the parameters being ``theta_0 + P theta`` (Aghajanyan et al. 2020, eq. 1).

    Args:
        parameters: start at ``theta_0`` and are written to.
        space: ``P``; None trains all ``D`` numbers themselves.
        row_count: of the training data.
        backward_of: adds the gradient of a step's rows (their places in the data) to the parameters'; returns the
            summed loss and how many tokens it is of.

    Returns:
        the loss of each step.
    """
    from veneer.train.sampler import step_rows
    from veneer.train.schedule import multiplier, warmup_steps

    start = nn.utils.parameters_to_vector(parameters).detach().cpu()
    theta = torch.zeros(len(start) if space is None else space.dimension)
    optimizer = torch.optim.Adam([theta], lr=job["learning_rate"])
    steps, warm_up = job["steps"], warmup_steps(job["steps"], WARM_UP)
    losses: list[float] = []
    consumed = 0
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = None
        rows, _ = step_rows(consumed, row_count, job["batch"], job["seed"])
        consumed += len(rows)
        loss, tokens = backward_of(rows.tolist())
        gradient = _flat_gradient(parameters) / tokens
        theta.grad = gradient if space is None else space.adjoint(gradient)
        optimizer.param_groups[0]["lr"] = job["learning_rate"] * multiplier("cosine", step, steps, warm_up)
        optimizer.step()
        place(parameters, start + (theta if space is None else space(theta)))
        losses.append(loss / tokens)
    return losses


def _flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """``[D]`` float32 on the CPU; zeros where a parameter has none yet."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.reshape(-1).float().cpu() for part in parts])


@torch.no_grad()
def place(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Writes ``[D]`` numbers into the parameters, one after another."""
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view(parameter.shape))


def backward(module: nn.Module, dataset: Any, rows: Sequence[int], job: Job) -> tuple[float, int]:
    """The backward of a step's rows, laid out as the trainer lays them out."""
    from veneer.train.layout import Layout, default_micro_batch_tokens, micro_batches
    from veneer.train.sft import sft

    device = torch.device(job["device"])
    capacity = default_micro_batch_tokens(job["max_length"], device)
    layout = Layout(packing=True, micro_batch_tokens=capacity, micro_batch_rows=1, pad_id=0, share_prefix=True)
    loss, tokens = 0.0, 0
    for batch in micro_batches(rows, dataset, layout):
        output = sft(module, batch.to(device))
        output.loss_sum.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        loss, tokens = loss + float(output.loss_sum.detach()), tokens + output.trained
    return loss, tokens


CONTESTANTS = {"run": run}

if __name__ == "__main__":
    serve(CONTESTANTS)
