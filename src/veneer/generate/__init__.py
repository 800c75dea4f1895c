"""Floor 4: text from a base or an adapted model, in batches."""

from veneer.generate.decoder import Memory
from veneer.generate.generate import Generation, default_stop_ids, generate
from veneer.lazy import lazy_names

__all__ = ["Generation", "Memory", "default_stop_ids", "generate"]

lazy_names(__name__, {})  # nothing is lazy; but veneer.generate(...) is what users call
