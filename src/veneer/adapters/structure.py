"""What the parts of a model are, told from their structure and names, and so what ``all-linear`` means.

``all-linear`` is every layer that is a product with a matrix and every router, less these:

1. **heads**: the output head, a linear that reads an embedding's matrix, and all that stands outside of the model's
   body (``score``, ``classifier``, ``qa_outputs``);
2. **other towers**: of a model that reads images or sound too, all but the language model;
3. **routed experts**: what stands in a list called ``experts``, as where they are one stacked parameter;
4. **layers of torch's attention**: it reads their weight and never calls them, so that an adapter would do nothing.

What is no layer of its own is never chosen: stacked experts, a convolution, the parameters of a recurrence (``A_log``,
``D``, ``dt_bias``). :func:`left_out` names all of it with the reason. There is no table of architectures here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from veneer.adapters.fused_experts import is_recognised, stack_names
from veneer.adapters.saved_parameters import RATES
from veneer.adapters.slots import SLOTS, base_modules
from veneer.quant import QuantizedLinear
from veneer.quant.stack import QuantizedStack

Kind = Literal["linear", "conv1d", "embedding", "router"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUTER_CLASS = re.compile(r"router|gate(?!d)|gating", re.IGNORECASE)
_ROUTER_PATH = re.compile(r"(^|\.)(gate|router|gating|wg)(\.\w+)?$")
_NAMED = "name it in target_modules"


@dataclass(frozen=True)
class LeftOut:
    """One matrix (or parameter of a recurrence) that ``all-linear`` does not adapt."""

    path: str  # of the layer, or of the parameter where its owner is no layer
    family: str  # what it is one of
    shape: tuple[int, ...]
    why: str
    how: str  # to have it trained all the same; "" where it cannot be


def kind_of(module: nn.Module) -> Kind | None:
    """How ``module`` is adapted, or None where it cannot be."""
    weight: Any = getattr(module, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2 or not weight.dtype.is_floating_point:
        return None
    if isinstance(module, nn.Embedding):
        # A subclass may do more than look up rows; Gemma's factor on the output is known, anything else is not.
        known = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if known else None
    if isinstance(module, nn.Linear | QuantizedLinear):
        is_whole = tuple(weight.shape) == (module.out_features, module.in_features)
        if is_whole and _gives_a_product(module):
            return "linear"
    if _is_router(module):
        return "router"
    # GPT-2's linear with a [in, out] weight is a class of transformers, which this floor does not import.
    is_conv1d = type(module).__name__ == "Conv1D" and getattr(module, "nf", None) == weight.shape[1]
    return "conv1d" if is_conv1d else None


def _is_router(module: nn.Module) -> bool:
    """Whether it chooses experts by multiplying with its own matrix: all of transformers' say so by their class."""
    has_matrix = module._parameters.get("weight") is not None and not isinstance(module, nn.Embedding)
    # Without a forward of its own its owner reads the matrix, and what acts beside it would not be asked.
    is_called = type(module).forward is not nn.Module.forward
    return has_matrix and is_called and _ROUTER_CLASS.search(type(module).__name__) is not None


def has_few_rows(path: str, module: nn.Module) -> bool:
    """Whether it has few rows by its nature, so that a rank is cut to them: a router, or a gate of one row."""
    weight: Any = module.weight
    return kind_of(module) == "router" or weight.shape[0] == 1 or _ROUTER_PATH.search(path) is not None


@torch.no_grad()
def _gives_a_product(linear: nn.Linear | QuantizedLinear) -> bool:
    """Whether calling it gives ``[..., out]``: a subclass may give more (the router of Phi-3.5-MoE does)."""
    if isinstance(linear, QuantizedLinear) or type(linear).forward is nn.Linear.forward:
        return True
    try:
        found: Any = linear(linear.weight.new_zeros(1, linear.in_features))
    except (RuntimeError, TypeError, ValueError):
        return True  # it says nothing about what it gives
    return isinstance(found, torch.Tensor) and tuple(found.shape) == (1, linear.out_features)


def is_product(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input with a matrix: what ``all-linear`` chooses from."""
    return kind_of(module) in ("linear", "conv1d", "router")


def left_out(modules: Mapping[str, nn.Module]) -> dict[str, LeftOut]:
    """What ``all-linear`` leaves alone, by path, in the order of the model; norms, biases and embeddings apart.

    Args:
        modules: a base's modules by path, the root under ``""`` (:func:`veneer.adapters.slots.base_modules`).
    """
    heads, body, tower = output_heads(modules), _body(modules), language_tower(modules)
    found: dict[str, LeftOut] = {}
    for path, module in modules.items():
        owner = modules.get(path.rpartition(".")[0])
        reasons = (
            (path in heads or not _within(path, body), "a head", f"{_NAMED} or in modules_to_save"),
            (not _within(path, tower), f"outside of the language model {tower}", _NAMED),
            (re.search(r"(^|\.)experts\.\d+(\.|$)", path), "a routed expert", _NAMED),
            (isinstance(owner, nn.MultiheadAttention), "read by nn.MultiheadAttention without being called", ""),
        )
        why, how = next(((why, how) for applies, why, how in reasons if applies), ("", ""))
        outside = why == reasons[1][1]
        parts = [_part(path, module.weight, why, how)] if is_product(module) and why else []
        if not is_product(module):
            parts = list(_bare_parts(path, module))
        for part in parts:
            if outside:  # one line for the whole tower
                top = ".".join(path.split(".")[: tower.count(".") + 1])
                part = replace(part, family=top, why=why, how=how)
            found[part.path] = part
    return found


def _part(path: str, weight: Any, why: str, how: str) -> LeftOut:
    parent, _, last = path.rpartition(".")
    family = f"{parent.rpartition('.')[2]}.*".lstrip(".") if last.isdigit() else last
    return LeftOut(path, family, tuple(weight.shape), why, how)


def is_read(owner: nn.Module, name: str) -> bool:
    """Whether ``owner`` takes the weight of its layer ``name`` and multiplies by itself instead of calling the layer.

    The state spaces of the first Mamba do, with the projection of their time step: the scan adds its bias. LongCat's
    router does, which multiplies in float32.
    """
    is_router = name == "classifier" and _ROUTER_CLASS.search(type(owner).__name__) is not None
    return is_router or (name == "dt_proj" and carries_state(owner))


def carries_state(module: nn.Module) -> bool:
    """Whether ``module`` itself hands a state from token to token: a recurrence, or a convolution along the tokens."""
    children = (child.base_layer if isinstance(child, SLOTS) else child for child in module._modules.values())
    along = [child for child in children if isinstance(child, nn.Conv1d)]
    depthwise = any(conv.groups == conv.in_channels > 1 and conv.kernel_size != (1,) for conv in along)
    return isinstance(module, nn.RNNBase) or depthwise or any(name in module._parameters for name in RATES)


def recurrent_parts(root: nn.Module) -> list[str]:
    """Paths of the parts that carry a state from token to token other than by attention.

    Rows that lie one after another are not apart for them: the end of one row would be the past of the next.
    """
    return [path for path, module in base_modules(root).items() if carries_state(module)]


def output_heads(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the output heads: what the model says, and every linear whose weight is an embedding's."""
    heads: set[int] = set()
    for module in modules.values():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module):
            heads.add(id(head.base_layer if isinstance(head, SLOTS) else head))
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    return {
        path
        for path, module in modules.items()
        if id(module) in heads or (isinstance(module, nn.Linear) and id(module.weight) in embeddings)
    }


def language_tower(modules: Mapping[str, nn.Module]) -> str:
    """The part that is the language model: the lowest one with both the token embedding and the stack of layers.

    An encoder-decoder has two stacks. ``""``, the whole model, where there is no token embedding or no stack.
    """
    root = modules[""]
    getter = getattr(root, "get_input_embeddings", None)
    try:
        tokens = getter() if callable(getter) else None
    except NotImplementedError:  # transformers' way to say that there is none
        tokens = None
    tokens = tokens.base_layer if isinstance(tokens, SLOTS) else tokens
    path = next((path for path, module in modules.items() if module is tokens), "")
    wanted = 2 if getattr(getattr(root, "config", None), "is_encoder_decoder", False) else 1
    while path:
        path = path.rpartition(".")[0]
        if _stacks(modules, path) >= wanted:
            break
    return path


def _stacks(modules: Mapping[str, nn.Module], tower: str) -> int:
    """How many lists of layers ``tower`` has; a list within a list is a part of it."""
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList) and _within(p, tower)]
    outermost = [p for p in lists if not any(p != other and _within(p, other) for other in lists)]
    return sum(any(is_product(m) for q, m in modules.items() if _within(q, p)) for p in outermost)


def _body(modules: Mapping[str, nn.Module]) -> str:
    """The model without its heads, by the name that transformers' models give it; ``""`` where there is none."""
    name = getattr(modules[""], "base_model_prefix", "")
    return name if name in modules else ""


def _bare_parts(path: str, module: nn.Module) -> Iterator[LeftOut]:
    """The matrices that ``module`` holds itself, being no layer that can be adapted."""
    own: dict[str, Any] = {name: p for name, p in module._parameters.items() if p is not None}
    if not own and getattr(getattr(module, "weight", None), "ndim", 0) > 2:
        own = {"weight": module.weight}  # a stack of experts in codes
    last = path.rpartition(".")[2]
    for name, parameter in own.items():
        full = path if name == "weight" else f"{path}.{name}".lstrip(".")
        dimensions = len(parameter.shape)
        if isinstance(module, _CONVOLUTIONS):
            if name == "weight":
                yield _part(full, parameter, "a convolution", f"modules_to_save: [{last}]")
        elif carries_state(module):
            yield _part(full, parameter, "a parameter of the recurrence", f"in full by modules_to_save: [{name}]")
        elif dimensions == 3:
            part = _part(full, parameter, *_of_stack(last, module, name))
            yield replace(part, family=f"{last}.{name}" if name != "weight" else ".".join(path.split(".")[-2:]))
        elif name == "weight" and _ROUTER_CLASS.search(type(module).__name__):
            yield _part(full, parameter, f"a {type(module).__name__} whose matrix is read without calling it", "")
        elif dimensions >= 2 and "bias" not in name and "embed" not in type(module).__name__.lower():
            yield _part(full, parameter, f"a parameter of {type(module).__name__}", _whole(last, module))


def _of_stack(last: str, module: nn.Module, name: str) -> tuple[str, str]:
    """What a parameter of three dimensions is, and how to have it trained."""
    kind = type(module).__name__
    if isinstance(module, QuantizedStack) or (name in stack_names(module) and is_recognised(module)):
        return "stacked experts", "experts: all"
    if name in stack_names(module):
        return f"stacked experts of a form that is not known here ({kind})", _whole(last, module)
    return f"a parameter of {kind}", _whole(last, module)


def _whole(last: str, module: nn.Module) -> str:
    if not last:
        return ""  # the model itself has no name
    return f"modules_to_save: [{last}]" + ", all of it" * (len(list(module.parameters())) > 1)


def _within(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}.")
