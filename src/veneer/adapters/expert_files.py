"""The factors of experts in PEFT's file (``target_parameters``): how they are laid out, and under which keys.

    lora_A  [E * r, in]    row     e * r + i    the experts one after another
    lora_B  [out, r * E]   column  i * E + e    the experts side by side, each rank's together

Which stack a tensor belongs to is said by depth: PEFT wraps a module once for each of its adapted parameters, in the
order in which the module registers them, so the first one lies deepest: ``experts.base_layer.lora_A.weight`` is that of
``gate_up_proj``, ``experts.lora_A.weight`` that of ``down_proj``.
Names: ``E`` experts, ``K`` experts with factors, ``r`` rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import AdapterError


def nesting(stacks: int) -> list[str]:
    """What stands before ``lora_A.weight`` for each adapted stack of a module, in the order of registration."""
    return ["base_layer." * depth for depth in reversed(range(stacks))]


@torch.no_grad()
def file_factors(A: Tensor, B: Tensor, experts: tuple[int, ...] | None, count: int) -> dict[str, Tensor]:
    """The factors of one stack as they stand in the file.

    Args:
        A: ``[K, r, in]``.
        B: ``[K, out, r]``.
        experts: which experts they belong to; None: all. The others' are zero in the file.
        count: ``E``.
    """
    if experts is not None:
        chosen = list(experts)
        A = A.new_zeros(count, *A.shape[1:]).index_copy_(0, torch.tensor(chosen, device=A.device), A)
        B = B.new_zeros(count, *B.shape[1:]).index_copy_(0, torch.tensor(chosen, device=B.device), B)
    return {
        "lora_A.weight": A.reshape(-1, A.shape[-1]),
        "lora_B.weight": B.permute(1, 2, 0).reshape(B.shape[1], -1),
    }


@torch.no_grad()
def own_factors(tensor: Tensor, shape: torch.Size, experts: tuple[int, ...] | None, count: int, key: str) -> Tensor:
    """A tensor of the file as it is trained.

    Args:
        tensor: ``[E * r, in]`` or ``[out, r * E]``, by the end of ``key``.
        shape: of the trained factor: ``[K, r, in]`` or ``[K, out, r]``. A tensor that does not fit it, or has it
            already, is given back as it is.
        experts: which experts have factors; None: all.
        count: ``E``.

    Raises:
        AdapterError: the file has an update for an expert that has no factors here.
    """
    is_A = key.endswith("lora_A.weight")
    _, rows, columns = shape
    if tensor.shape != ((count * rows, columns) if is_A else (rows, columns * count)):
        return tensor
    full = tensor.view(count, rows, columns) if is_A else tensor.view(rows, columns, count).permute(2, 0, 1)
    if experts is None:
        return full
    left = torch.ones(count, dtype=torch.bool)
    left[list(experts)] = False
    if not is_A and full[left.to(full.device)].any():
        raise AdapterError(
            f"'{key}' has updates for other experts than the {len(experts)} that were chosen",
            where=key,
            fix="veneer.json and these weights are of two adapters: copy the whole folder again, or remove veneer.json",
        )
    return full[list(experts)]
