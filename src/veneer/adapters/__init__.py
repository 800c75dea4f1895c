"""LoRA adapters on any torch module: attach, train, switch, save in PEFT's format, merge. Torch only."""

from veneer.adapters.config import LoraConfig
from veneer.adapters.coverage import Coverage
from veneer.adapters.layers import LoraAdapter, LoraEmbedding, LoraFactors, LoraLinear
from veneer.adapters.merge import MergeReport, merge, merge_report
from veneer.adapters.model import AdaptedModel, BaseLike, attach
from veneer.adapters.save import load_adapter, read_adapter, read_record, save_adapter
from veneer.adapters.saved import SavedModule
from veneer.adapters.slots import base_modules
from veneer.adapters.targets import Plan, resolve
from veneer.adapters.tokens import TokenEmbedding, TokenHead

__all__ = [
    "AdaptedModel",
    "BaseLike",
    "Coverage",
    "LoraAdapter",
    "LoraConfig",
    "LoraEmbedding",
    "LoraFactors",
    "LoraLinear",
    "MergeReport",
    "Plan",
    "SavedModule",
    "TokenEmbedding",
    "TokenHead",
    "attach",
    "base_modules",
    "load_adapter",
    "merge",
    "merge_report",
    "read_adapter",
    "read_record",
    "resolve",
    "save_adapter",
]
