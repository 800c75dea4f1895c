"""Every kind of adapter that there is, over plain weights and over codes: what the invariants are asked of."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ALL, VOCAB
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, LoraLinear, attach
from veneer.adapters.init_data import initialise_from
from veneer.quant import QuantConfig, QuantizedLinear

PLAIN, NF4 = "plain", "nf4"
IDS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
IDS[0, :6] = torch.tensor([3, 7, 5, 3, 9, 1])  # the tokens 1, 3 and 5 are trained


@dataclass(frozen=True)
class Kind:
    """One way to adapt a model.

    Attributes:
        settings: of :class:`LoraConfig`, beside ``r: 4`` and ``lora_alpha: 6``.
        model: of :data:`tiny_models.ALL`.
        stored: how the linears of the base may be stored.
        at_base: a fresh adapter is the base.
        rounding: by how much the logits of a fresh one may differ from the base's.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    stored: tuple[str, ...] = (PLAIN, NF4)
    at_base: bool = True
    rounding: float = 0.0


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
SUMMED_APART = 1e-5  # the same formula in another order
KINDS = {
    "lora": Kind(),
    "rslora": Kind({"use_rslora": True}),
    "patterns": Kind(PATTERNS | {"layers_to_transform": [1]}),
    "orthogonal": Kind({"init_lora_weights": "orthogonal"}, rounding=SUMMED_APART),
    "dora": Kind({"use_dora": True}),
    "dora with rslora and patterns": Kind({"use_dora": True, "use_rslora": True, **PATTERNS}),
    "pissa": Kind({"init_lora_weights": "pissa"}),
    "pissa_niter": Kind({"init_lora_weights": "pissa_niter_4", "use_rslora": True}),
    "olora": Kind({"init_lora_weights": "olora"}),
    "pissa with dora": Kind({"init_lora_weights": "pissa", "use_dora": True}),
    "eva": Kind({"init_lora_weights": "eva"}),
    "lora_ga": Kind({"init_lora_weights": "lora_ga"}),
    # LoftQ starts at what the codes lose: fresh, it is nearer to the weights that they were made from.
    "loftq": Kind({"init_lora_weights": "loftq"}, stored=(NF4,), at_base=False),
    "loftq, 3 rounds": Kind(
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}}, stored=(NF4,), at_base=False
    ),
    "loftq with dora": Kind({"init_lora_weights": "loftq", "use_dora": True}, stored=(NF4,), at_base=False),
    "adalora": Kind({"adalora_config": {"target_r": 2}}),
    "lora_fa": Kind({"use_lora_fa": True}),
    "conv1d": Kind(model="gpt2", stored=(PLAIN,)),
    "conv1d with dora": Kind({"use_dora": True}, model="gpt2", stored=(PLAIN,)),
    "embedding": Kind({"target_modules": ["q_proj", "embed_tokens"]}, model="llama, tied"),
    "head": Kind({"target_modules": ["q_proj", "lm_head"]}, model="llama, tied"),
    "saved": Kind({"modules_to_save": ["model.norm", "lm_head"]}),
    "tokens": Kind({"trainable_token_indices": [3, 1, 5]}, model="llama, tied", rounding=SUMMED_APART),
    "experts": Kind({"experts": "all"}, model="mixtral", stored=(PLAIN,), rounding=SUMMED_APART),
    "some experts": Kind({"experts": [2, 0]}, model="gpt-oss", stored=(PLAIN,), rounding=SUMMED_APART),
    "classifier": Kind({"modules_to_save": ["classifier"]}, model="bert, classes", stored=(PLAIN,)),
    "classifier with dora": Kind(
        {"modules_to_save": ["score"], "use_dora": True}, model="llama, classes", stored=(PLAIN,)
    ),
}


# Over plain weights they differ from their like; over codes that is asked by make test-all alone.
SLOW_OVER_CODES = {"rslora", "patterns", "orthogonal", "dora with rslora and patterns", "pissa_niter", "olora"}
SLOW_OVER_CODES |= {"pissa with dora", "eva", "embedding", "head"}


def cases(choose: Callable[[Kind], bool] = lambda kind: True, *, only: str | None = None) -> Any:
    """A parametrisation over the kinds that ``choose`` takes, over everything that they can be stored in (``only``)."""
    pairs = [(name, stored) for name, kind in KINDS.items() if choose(kind) for stored in kind.stored]
    chosen = [
        pytest.param(
            *pair, id="-".join(pair), marks=[pytest.mark.slow] * (pair[1] == NF4 and pair[0] in SLOW_OVER_CODES)
        )
        for pair in pairs
        if only in (None, pair[1])
    ]
    return pytest.mark.parametrize(("name", "stored"), chosen)


def has_linears(kind: Kind) -> bool:
    """Whether it is of a form in which every factor belongs to a linear (any kind but one of its own layers)."""
    return not {"experts", "trainable_token_indices", "modules_to_save"} & kind.settings.keys() and (
        "embed_tokens" not in kind.settings.get("target_modules", ())
    )


def config_of(name: str, **more: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 6} | KINDS[name].settings | more))


def base(name: str, stored: str = PLAIN) -> nn.Module:
    """The base of a kind: always the same weights, in float32."""
    module = ALL[KINDS[name].model]()
    return in_codes(module) if stored == NF4 else module


def in_codes(module: nn.Module) -> nn.Module:
    """The linears but the head in NF4 with double quantisation, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(
                    parent, name, QuantizedLinear.from_linear(child, QuantConfig("nf4"), name).train(child.training)
                )
    return module


def decoded(module: nn.Module) -> nn.Module:
    """Plain linears in the place of codes, of the numbers that they stand for, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(parent, name, child.dequantized())
    return module


def adapt(name: str, stored: str = PLAIN, *, module: nn.Module | None = None, seed: int = 0) -> AdaptedModel:
    """A fresh adapter of the kind ``name``, which has seen data where it starts from some; on ``module``, if given."""

    def originals(paths: Collection[str], visit: Callable[[str, Tensor], None]) -> None:
        plain = base(name)
        for path in paths:
            visit(path, plain.get_submodule(path).weight)  # type: ignore[arg-type]  # untyped attributes

    module = base(name, stored) if module is None else module
    adapted = attach(module, config_of(name), seed=seed, originals=originals)
    start(adapted)
    return adapted


def start(adapted: AdaptedModel) -> None:
    """Lets an adapter that waits for data see some."""
    if adapted.waiting:
        rows = torch.randint(VOCAB, (4, 1, 16), generator=torch.Generator().manual_seed(3))
        initialise_from(adapted, list(rows), lambda ids: loss_of(adapted.module, ids))


def stirred(name: str, stored: str = PLAIN, **options: Any) -> AdaptedModel:
    """An adapter away from its start, so that every part of it shows in the logits."""
    adapted = adapt(name, stored, **options)
    stir(adapted)
    return adapted


@torch.no_grad()
def stir(adapted: AdaptedModel, size: float = 0.1, seed: int = 9) -> None:
    """Adds noise to everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor = IDS) -> Tensor:
    """``[B, T, V]``, or ``[B, classes]``."""
    found: Tensor = module(ids).logits
    return found


def loss_of(module: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Of the next tokens, or of two classes."""
    found = module(ids).logits
    if found.dim() == 2:
        return F.cross_entropy(found.float(), torch.arange(len(found)) % 2)
    return F.cross_entropy(found[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(adapted: AdaptedModel, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Of the loss, in everything that is trained, by key."""
    for parameter in adapted.parameters():
        parameter.grad = None
    loss_of(adapted.module, ids).backward()  # type: ignore[no-untyped-call]  # torch's own
    return {key: p.grad.clone() for key, p in adapted.named_parameters() if p.grad is not None}


def train(adapted: AdaptedModel, steps: int = 3, lr: float = 1e-2) -> list[dict[str, Tensor]]:
    """Some AdamW steps; the gradients of each."""
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=lr)
    seen = []
    for _ in range(steps):
        seen.append(gradients(adapted))
        optimizer.step()
    return seen


def frozen(adapted: AdaptedModel) -> dict[str, Tensor]:
    """A copy of everything that the base consists of, codes too, by the names that it has without adapters."""
    return {
        key.replace(".base_layer", ""): value.detach().clone()
        for key, value in adapted.module.state_dict().items()
        if ".adapters." not in key
    }


def linears(adapted: AdaptedModel) -> list[LoraLinear]:
    return [layer for layer in adapted.module.modules() if isinstance(layer, LoraLinear)]


def dense(layer: LoraLinear, name: str = "default") -> tuple[Tensor, Tensor]:
    """``(W + s (B E A - B0 A0), g)`` of a layer as the papers have it, differentiable in what is trained; g of DoRA."""
    adapter: Any = layer.adapters[name]
    A = adapter.A if adapter.E is None else adapter.E * adapter.A
    update = adapter.B @ A
    if hasattr(adapter, "A0") and adapter.own is None:
        update = update - adapter.B0.to(A.dtype) @ adapter.A0.to(A.dtype)
    weight: Any = adapter.own.weight if adapter.own is not None else layer.base_layer.weight
    rows = weight if isinstance(weight, Tensor) else weight.dequantize()
    rows = (rows.t() if layer.transposed else rows).detach().to(A.dtype)
    whole = rows + adapter.scaling * update
    if adapter.magnitude is None:
        return whole, torch.ones(len(rows), dtype=A.dtype)
    return whole, adapter.magnitude / whole.norm(dim=1).detach()
