"""A merged model as its own class has it: nothing left in codes, every weight the right way round.

``merge`` turns codes into plain linears. What it cannot know of is the model's class: GPT-2's linears are stored as
``[in, out]``, and stacks of experts are no linears.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.quant.stack import QuantizedStack


@torch.no_grad()
def make_plain(module: nn.Module) -> None:
    """Changes ``module``, a model of transformers without adapters, in place."""
    for path, stack in list(module.named_modules()):
        if isinstance(stack, QuantizedStack):
            parent, _, name = path.rpartition(".")
            owner: Any = module.get_submodule(parent)
            weight = stack.weight.dequantize()
            weight = weight.transpose(-1, -2).contiguous() if owner.is_transposed else weight
            delattr(owner, name)
            owner.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    with torch.device("meta"):
        as_made = type(module)(module.config)
    for path, conv in as_made.named_modules():
        parent, _, name = path.rpartition(".")
        if type(conv).__name__ != "Conv1D" or not isinstance(linear := module.get_submodule(path), nn.Linear):
            continue
        conv.weight = nn.Parameter(linear.weight.t().contiguous(), requires_grad=False)
        conv.bias = linear.bias
        setattr(module.get_submodule(parent), name, conv.train(linear.training))
