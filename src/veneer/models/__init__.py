"""Floor 3: base models, their identity, and the fused blocks swapped into them."""

from veneer.models.bundled import find_bundled
from veneer.models.fused import Fused, fuse
from veneer.models.identity import BaseIdentity
from veneer.models.load import Base, load_base, load_tokenizer
from veneer.models.quantized import Quantized
from veneer.models.quantized_save import save_base
from veneer.models.vocabulary import add_tokens

__all__ = [
    "Base",
    "BaseIdentity",
    "Fused",
    "Quantized",
    "add_tokens",
    "find_bundled",
    "fuse",
    "load_base",
    "load_tokenizer",
    "save_base",
]
