"""The methods that ``benchmarks.variants`` compares: one table from a name to settings of the recipe. Plain Python.

``lora_alpha`` is 32 at every rank, so that plain LoRA's scaling is ``32 / r``: the claims about ranks (rsLoRA, and the
learning rate that does not depend on the rank) are claims about this scaling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

REFERENCE = "lora"
ALPHA = 32
EQUAL_QV_RANK = 85  # q and v alone with as many parameters as rank 16 on all linears of SmolLM2-135M
LORAPLUS_RATIO = 16.0
RANKS = {"lora-r4": 4, "lora": 16, "lora-r64": 64}
LENGTHS = {"lora-half": 0.5, "lora": 1.0, "lora-double": 2.0}  # of the run, in steps of the others
QUICK = ("lora", "rslora", "dora", "pissa", "lora+", "loftq")


@dataclass(frozen=True)
class Method:
    """A way of training an adapter.

    Attributes:
        adapter, train: what it adds to the recipe's sections.
        quantize: how the base is stored.
        reference: the method that it is held against; None for the one that all are held against.
        rate_of: the method whose learning rate it takes; None searches its own.
        steps: of the run, as a factor.
    """

    name: str
    label: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    quantize: str = "none"
    reference: str | None = REFERENCE
    rate_of: str | None = None
    steps: float = 1.0

    @property
    def recipe(self) -> dict[str, Any]:
        """The sections of a recipe that make the method."""
        adapter = {"r": 16, "lora_alpha": ALPHA, "target_modules": "all-linear", **self.adapter}
        return {"adapter": adapter, "train": dict(self.train), "quantize": self.quantize}


METHODS = {
    method.name: method
    for method in (
        Method("lora", "LoRA, r 16", reference=None),
        Method("lora-r4", "LoRA, r 4", {"r": 4}),
        Method("lora-r64", "LoRA, r 64", {"r": 64}),
        Method("rslora", "rsLoRA, r 16", {"use_rslora": True}),
        Method("rslora-r64", "rsLoRA, r 64", {"r": 64, "use_rslora": True}, reference="lora-r64"),
        Method("dora", "DoRA", {"use_dora": True}),
        Method("lora+", "LoRA+", train={"loraplus_lr_ratio": LORAPLUS_RATIO}),
        Method("pissa", "PiSSA", {"init_lora_weights": "pissa"}),
        Method("olora", "OLoRA", {"init_lora_weights": "olora"}),
        Method("qlora", "LoRA over NF4", quantize="nf4"),
        Method("loftq", "LoftQ over NF4", {"init_lora_weights": "loftq"}, quantize="nf4", reference="qlora"),
        Method("adalora", "AdaLoRA, r 24 to 16", {"r": 24, "adalora_config": {"target_r": 16, "deltaT": 2}}),
        Method("lora-fa", "LoRA-FA", {"use_lora_fa": True}),
        Method("eva", "EVA", {"init_lora_weights": "eva"}),
        Method("lora-ga", "LoRA-GA", {"init_lora_weights": "lora_ga"}),
        Method("lora-qv", "LoRA, q and v, r 85", {"r": EQUAL_QV_RANK, "target_modules": ["q_proj", "v_proj"]}),
        Method("lora-half", "LoRA, half the steps", rate_of="lora", steps=0.5),
        Method("lora-double", "LoRA, twice the steps", rate_of="lora", steps=2.0),
    )
}


def chosen(names: Iterable[str]) -> list[Method]:
    """The methods of those names and those that they are held against, in the table's order.

    Raises:
        KeyError: an unknown name.
    """
    wanted: set[str] = set()
    waiting = [REFERENCE, *names]
    while waiting:
        method = METHODS[waiting.pop()]
        wanted.add(method.name)
        waiting += [name for name in (method.reference, method.rate_of) if name and name not in wanted]
    return [method for name, method in METHODS.items() if name in wanted]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that change with any setting, and not with the order of keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
