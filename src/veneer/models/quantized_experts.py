"""The experts of a MoE layer over stacks in codes: one after another, each decoded while it is multiplied with.

transformers keeps the experts of a layer in parameters ``[E, out, in]`` and computes them through an interface that
others can register with, as attention is. The modules stay what they are; their stacks are replaced, and the function
registered here is told to them. What the module says of itself (gate, biases, transposed weights) is checked by numbers
before its weights are read.
Names: ``T`` tokens, ``k`` experts of each, ``E`` experts, ``H`` width, ``I`` inner width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from veneer.kernels.frozen import frozen_linear
from veneer.quant import QuantConfig, QuantizedTensor, quantize, state_dict

NAME = "veneer"
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")

_SAYS = ("has_gate", "has_bias", "is_transposed")  # of itself, each a bool


class QuantizedStack(nn.Module):
    """A stack of experts ``[E, out, in]`` in codes, in the place of the parameter that it was.

    Codes and scales move with the module; a cast changes what they are computed in, never their bits. They are no
    buffers, so that nothing casts or broadcasts them unasked.
    """

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, scheme={self.weight.config.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedStack:
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        self.weight = self.weight.to(probe.device, probe.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(state_dict(self.weight, prefix))


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts interface. Nothing decoded is kept for the backward.

    Args:
        module: the experts; each of its stacks is a :class:`QuantizedStack`, or the parameter that it was.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, k]`` int64; ``E`` and above is no expert.
        top_k_weights: ``[T, k]``.

    Returns:
        ``[T, H]``.
    """
    out = torch.zeros_like(hidden_states)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    up_bias, down_bias = _bias(module, "gate_up_proj" if module.has_gate else "up_proj"), _bias(module, "down_proj")
    experts = len(up) if isinstance(up, Tensor) else up.weight.shape[0]
    for expert in sorted(set(top_k_index.flatten().tolist())):
        if expert >= experts:
            continue
        token, choice = torch.where(top_k_index == expert)
        hidden = _linear(hidden_states[token], up, up_bias, expert, module.is_transposed)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        result = _linear(hidden, module.down_proj, down_bias, expert, module.is_transposed)
        result = result * top_k_weights[token, choice, None]
        out.index_add_(0, token, result.to(out.dtype))
    return out


def _bias(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(f"{name}_bias")


def _linear(x: Tensor, stack: QuantizedStack | Tensor, bias: Tensor | None, expert: int, transposed: bool) -> Tensor:
    """One expert's product; a stack that kept its 16 bits is still ``[in, out]`` where the model has it so."""
    own = None if bias is None else bias[expert]
    if isinstance(stack, QuantizedStack):
        weight = stack.weight.index(expert)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, own = x.to(dtype), weight.to(dtype=dtype), None if own is None else own.to(dtype)
        return frozen_linear(x, weight, own)
    plain = stack[expert]
    return nn.functional.linear(x, plain.t() if transposed else plain, own)


def register() -> None:
    """Makes ``experts_implementation="veneer"`` known to transformers (its documented extension point)."""
    ExpertsInterface.register(NAME, experts_forward)


def is_recognised(module: nn.Module) -> bool:
    """Whether this module's experts are computed here as it computes them itself."""
    stacks = [module._parameters.get(name) for name in EXPERT_WEIGHTS]
    if sum(stack is not None and stack.ndim == 3 for stack in stacks) != 2 or module._modules.keys() - {"act_fn"}:
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
    try:
        expected = small(x, index, shares)
        for name, weight in codes.items():
            del small._parameters[name]
            small._modules = {**small._modules, name: QuantizedStack(weight)}
        got = experts_forward(small, x, index, shares)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False  # a form that is not the one known here
    return bool((got - expected).norm() <= 1e-5 * expected.norm())
