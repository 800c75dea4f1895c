"""The variants that a config asks for, in the order in which they change what acts."""

from __future__ import annotations

from veneer.adapters.adalora import AdaLora
from veneer.adapters.config import LoraConfig
from veneer.adapters.dora import Dora
from veneer.adapters.frozen_a import FrozenA
from veneer.adapters.own_codes import OwnCodes
from veneer.adapters.residual import Residual
from veneer.adapters.settings import LoftqConfig
from veneer.adapters.variant import Variant


def variants_of(config: LoraConfig) -> tuple[Variant, ...]:
    """What acts at a linear beside plain LoRA; empty for plain LoRA."""
    found: list[Variant] = []
    if str(config.init_lora_weights).startswith(("pissa", "olora", "lora_ga")):
        found.append(Residual())
    if config.adalora_config is not None:
        found.append(AdaLora())
    if isinstance(config.loftq_config, LoftqConfig) and config.loftq_config.loftq_iter > 1:
        found.append(OwnCodes())
    if config.use_lora_fa:
        found.append(FrozenA())
    if config.use_dora:
        found.append(Dora())
    return tuple(found)
