"""Floor 4: text from a base or an adapted model, in batches and in conversation."""

from veneer.generate.chat import Chat, Side
from veneer.generate.decoder import Memory
from veneer.generate.generate import Generation, default_stop_ids, generate

__all__ = ["Chat", "Generation", "Memory", "Side", "default_stop_ids", "generate"]
