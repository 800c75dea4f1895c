"""Which weights of a model are quantised, and why the others are not: seen from its structure, without its weights.

Every linear is, and every stack of experts that transformers' experts interface describes. Embeddings, norms, heads,
tied weights and routers keep 16 bits: they are small or sensitive, or read by more than the layer that owns them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from veneer.adapters.fused_experts import EXPERT_WEIGHTS, is_recognised
from veneer.adapters.targets import output_heads
from veneer.errors import UsageError, did_you_mean

Kind = Literal["linear", "conv1d", "experts"]

# Why a weight that could be quantised is not.
HEAD, TIED, ROUTER = "output head", "tied to another weight", "router"
READ = "its module reads the weight without calling the layer"
OTHER = "a linear with a forward of its own"
SKIPPED = "on the skip list"
UNKNOWN_EXPERTS = "experts of a form that is not known here"

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # what linears that choose experts are called, or lie in


@dataclass(frozen=True)
class Weight:
    """A weight that is quantised: how its module uses it, and its shape in the model."""

    kind: Kind
    shape: tuple[int, ...]
    transposed: bool  # the model has it as [in, out]: the codes are those of [out, in]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """``[out, in]`` or ``[E, out, in]``."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


@dataclass(frozen=True)
class QuantPlan:
    """By parameter name: what is quantised, and for what reason others of that kind are not."""

    weights: dict[str, Weight]
    kept: dict[str, str] = field(default_factory=dict)
    known: dict[str, Weight] = field(default_factory=dict)  # those kept that are linears or known experts

    @property
    def has_experts(self) -> bool:
        return any(weight.kind == "experts" for weight in self.weights.values())


def plan_quantisation(model: nn.Module, skip: Sequence[str] = ()) -> QuantPlan:
    """Looks at every module once.

    Args:
        model: a causal language model of transformers; its weights may be on the meta device.
        skip: what keeps 16 bits: names of modules (``down_proj``, ``layers.0``, whole paths) or regular expressions for
            whole paths.

    Raises:
        UsageError: an entry of ``skip`` matches no weight, or nothing is left to quantise.
    """
    modules = dict(model.named_modules())
    heads, tied = output_heads(modules), _tied(model)
    in_attention = [path for path, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    weights: dict[str, Weight] = {}
    kept: dict[str, str] = {}
    for path, module in modules.items():
        found = _weights_of(module)
        for name, weight in found.items():
            parameter = f"{path}.{name}" if path else name
            parent, _, attribute = path.rpartition(".")
            weights[parameter] = weight
            if path in heads:
                kept[parameter] = HEAD
            elif parameter in tied:
                kept[parameter] = TIED
            elif weight.kind == "experts":
                continue
            elif _ROUTERS & set(path.split(".")):
                kept[parameter] = ROUTER
            elif parent in in_attention or _reads_weight(type(modules[parent]), attribute):  # type: ignore[arg-type]  # a class is hashable
                kept[parameter] = READ
            elif isinstance(module, nn.Linear) and not _acts_as_linear(module):
                kept[parameter] = OTHER
        if not found and "expert" in f"{path} {type(module).__name__}".lower():
            stacks = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            kept |= {f"{path}.{name}": UNKNOWN_EXPERTS for name in stacks}
    skipped = _skipped(list(weights), skip)
    kept |= {name: SKIPPED for name in skipped if name not in kept}
    chosen = {name: weight for name, weight in weights.items() if name not in kept}
    if not chosen:
        raise UsageError(
            "there is no weight to quantise in this model",
            where=type(model).__name__,
            fix="load it without quantize, or shorten the skip list",
        )
    return QuantPlan(chosen, kept, {name: weight for name, weight in weights.items() if name in kept})


def module_path(parameter: str) -> str:
    """What a skip list calls a weight: the path of its linear, or of the stack itself."""
    return parameter.removesuffix(".weight")


def _weights_of(module: nn.Module) -> dict[str, Weight]:
    """The quantisable parameters that this module itself holds."""
    parameter: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and parameter is not None:
        return {"weight": Weight("linear", tuple(parameter.shape), False)}
    # GPT-2's linear, with a weight [in, out]. Its codes are those of the transpose, as in bitsandbytes.
    if type(module).__name__ == "Conv1D" and parameter is not None and getattr(module, "nf", 0) == parameter.shape[1]:
        return {"weight": Weight("conv1d", tuple(parameter.shape), True)}
    if is_recognised(module):
        stacks = {name: module._parameters.get(name) for name in EXPERT_WEIGHTS}
        transposed = bool(module.is_transposed)
        return {n: Weight("experts", tuple(p.shape), transposed) for n, p in stacks.items() if p is not None}
    return {}


def _tied(model: nn.Module) -> set[str]:
    """The names of parameters that stand for one another."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*pairs.keys(), *pairs.values()}


@torch.no_grad()
def _acts_as_linear(module: nn.Linear) -> bool:
    """Whether a subclass with a forward of its own still gives ``x W^T + b``: tried on a small copy."""
    if type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 32), (16, 32), (16,)))
    small: Any = copy.copy(module)  # shares its table of parameters: it is replaced, not changed
    small.in_features, small.out_features = 32, 16
    small._parameters = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    try:
        got = small(x)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False
    expected = nn.functional.linear(x, weight, small.bias)
    return isinstance(got, torch.Tensor) and got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)


@functools.cache
def _reads_weight(owner: type, attribute: str) -> bool:
    """Whether the code of a class takes the weight out of this child: a weight in codes would not be a tensor there.

    So do state-space mixers, whose kernels take the weights of several projections at once.
    """
    pattern = re.compile(rf"self\.{re.escape(attribute)}\.weight\b(?!\.(dtype|device|shape)\b)")
    for base in owner.__mro__:
        if base in (nn.Module, nn.ModuleList, nn.Sequential, object):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # made in a session, or by a decorator: there is no file to read
            continue
        if pattern.search(source):
            return True
    return False


def _skipped(names: list[str], skip: Sequence[str]) -> set[str]:
    """The parameters that the entries of a skip list name."""
    paths = {name: module_path(name) for name in names}
    found: set[str] = set()
    for entry in skip:
        inner = f".{entry.strip('.')}."
        matches = {name for name, path in paths.items() if inner in f".{path}." or _matches_whole(entry, path)}
        if not matches:
            last = dict.fromkeys(path.rpartition(".")[2] for path in paths.values())
            raise UsageError(
                f"skip list: '{entry}' matches no weight of the model",
                where="skip",
                fix=did_you_mean(entry, [*last, *paths.values()]) or f"the layers are called {', '.join(last)}",
            )
        found |= matches
    return found


def _matches_whole(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise UsageError(
            f"skip list: '{pattern}' is no regular expression: {error}", where="skip", fix="mend the expression"
        ) from error
