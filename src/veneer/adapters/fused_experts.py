"""The experts of a MoE layer in one module: what is known of its form, and its forward with updates on its stacks.

transformers keeps the experts of a layer in parameters ``[E, out, in]`` (or ``[E, in, out]``), and has them say of
themselves whether they have a gate, biases, transposed weights: its experts interface computes any of them from that.
The forward here does too, over parameters and over codes. What a module says is checked by numbers before it is used.
Names: ``T`` tokens, ``k`` experts of each, ``E`` experts, ``H`` width, ``I`` inner width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.kernels.grouped_lora import Groups, Update, group_by_expert, grouped_linear
from veneer.quant import QuantConfig, QuantizedTensor, quantize
from veneer.quant.stack import QuantizedStack

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")

_SAYS = ("has_gate", "has_bias", "is_transposed")  # of itself, each a bool


class Factors(Protocol):
    """A low-rank update of one stack; see :class:`veneer.kernels.grouped_lora.Update`."""

    @property
    def A(self) -> Tensor: ...  # [K, r, in]
    @property
    def B(self) -> Tensor: ...  # [K, out, r]
    @property
    def scaling(self) -> float: ...
    @property
    def positions(self) -> tuple[int, ...] | None: ...


def stack_names(module: nn.Module) -> list[str]:
    """The names of its two stacks, in the order of the computation; as parameters they are registered in this order."""
    held = {name for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    held |= {name for name, child in module._modules.items() if isinstance(child, QuantizedStack)}
    return [name for name in EXPERT_WEIGHTS if name in held]


def stack_of(module: nn.Module, name: str) -> Tensor | QuantizedTensor:
    """``[E, out, in]``: a view of the parameter, whichever way it lies, or its codes."""
    held: Any = getattr(module, name)
    if isinstance(held, QuantizedStack):
        return held.weight
    stack: Tensor = held.mT if module.is_transposed else held
    return stack


def forward_experts(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    updates: Mapping[str, Iterable[Factors]] | None = None,
) -> Tensor:
    """What the module computes, with ``updates`` (by the name of the stack) added to its stacks.

    Args:
        module: the experts, of a form that :func:`is_recognised`.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, k]`` int64; ``E`` and above is no expert.
        top_k_weights: ``[T, k]``.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.
    """
    updates = updates or {}
    up, down = stack_names(module)
    groups = group_by_expert(top_k_index, stack_of(module, up).shape[0])
    where, x = hidden_states.device.type, hidden_states
    if torch.is_autocast_enabled(where):
        x = x.to(torch.get_autocast_dtype(where))
    with torch.autocast(where, enabled=False):
        hidden = _product(module, up, x, groups, updates, gather=True)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        result = _product(module, down, hidden, groups, updates, gather=False)
        result = result * top_k_weights.reshape(-1)[groups.order, None]
        return groups.summed(result).to(hidden_states.dtype)


def _product(
    module: nn.Module, name: str, x: Tensor, groups: Groups, updates: Mapping[str, Iterable[Factors]], *, gather: bool
) -> Tensor:
    bias = module._parameters.get(f"{name}_bias")
    own = tuple(Update(f.A, f.B, f.scaling, f.positions) for f in updates.get(name, ()))
    return grouped_linear(x, groups, stack_of(module, name), bias, own, gather=gather)


def is_recognised(module: nn.Module) -> bool:
    """Whether this module's experts are computed here as it computes them itself."""
    if len(stack_names(module)) != 2 or module._modules.keys() - {"act_fn", *EXPERT_WEIGHTS}:
        return False
    says = {name: getattr(module, name, None) for name in _SAYS}
    if any(type(value) is not bool for value in says.values()) or getattr(module, "has_post_expert_norm", False):
        return False
    key = (type(module), *says.values())
    if key not in _VERDICTS:
        _VERDICTS[key] = _same_output(module)
    return _VERDICTS[key]


_VERDICTS: dict[tuple[Any, ...], bool] = {}  # by the class and what it says of itself


@torch.no_grad()
def _same_output(module: nn.Module) -> bool:
    """Whether both give the same: the module's own code over decoded weights, and ours over the codes.

    On a small copy with random weights of its own (3 experts, 32 wide), whatever the size of the model.
    """
    small: Any = copy.copy(module)  # shares its tables of parameters and children: they are replaced, not changed
    generator = torch.Generator().manual_seed(0)
    count, width, inner = 3, 32, 64
    up, rows = ("gate_up_proj", 2 * inner) if small.has_gate else ("up_proj", inner)
    shapes = {up: (rows, width), "down_proj": (width, inner)}
    codes = {
        name: quantize(0.2 * torch.randn(count, *shape, generator=generator), QuantConfig("int8"))
        for name, shape in shapes.items()
    }
    plain = {name: weight.dequantize() for name, weight in codes.items()}
    if small.is_transposed:
        plain = {name: weight.transpose(1, 2).contiguous() for name, weight in plain.items()}
    biases = {f"{name}_bias": torch.randn(count, shape[0], generator=generator) for name, shape in shapes.items()}
    x = torch.randn(5, width, generator=generator)
    index = torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [2, 1]])
    shares = torch.rand(5, 2, generator=generator)
    small.num_experts, small.config = count, copy.deepcopy(small.config)
    small.config._experts_implementation = "eager"
    small._parameters = {n: nn.Parameter(t) for n, t in (plain | (biases if small.has_bias else {})).items()}
    small._modules = {n: child for n, child in small._modules.items() if n not in EXPERT_WEIGHTS}
    try:
        expected = small(x, index, shares)
        for name, weight in codes.items():
            del small._parameters[name]
            small._modules = {**small._modules, name: QuantizedStack(weight)}
        got = forward_experts(small, x, index, shares)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False  # a form that is not the one known here
    return bool((got - expected).norm() <= 1e-5 * expected.norm())
