"""Floor 3: base models, their identity, and the fused blocks swapped into them."""

from veneer.models.bundled import find_bundled
from veneer.models.fused import Fused, fuse
from veneer.models.identity import BaseIdentity
from veneer.models.load import Base, load_base, load_tokenizer

__all__ = ["Base", "BaseIdentity", "Fused", "find_bundled", "fuse", "load_base", "load_tokenizer"]
