"""From a file to batches: read, split, check, render (ids and mask in one pass), show, pack.

The road is ``read -> Rows -> render (or prepare, its cached form) -> TokenDataset -> best_fit_decreasing -> collate
-> Batch``. Importing this package imports no torch and no transformers: only :mod:`veneer.data.pack` needs torch, and
is loaded when one of its names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# Not lazy: these functions share their module's name, and an import of the submodule would put the module in the
# name's place.
from veneer.data.cache import prepare
from veneer.data.check import CheckReport, check
from veneer.data.conversation import Conversation, Message, Rows
from veneer.data.dataset import Example, RenderStats, TokenDataset
from veneer.data.prompts import PromptExample, render_prompt, stop_token_ids
from veneer.data.read import read
from veneer.data.render import render
from veneer.data.show import show, show_html
from veneer.data.split import split
from veneer.data.templates import ChatTemplate
from veneer.lazy import lazy_names

if TYPE_CHECKING:
    from veneer.data.pack import Batch, best_fit_decreasing, collate_packed, collate_padded

_WHERE = dict.fromkeys(("Batch", "best_fit_decreasing", "collate_packed", "collate_padded"), "veneer.data.pack")

__all__ = [
    "Batch",
    "ChatTemplate",
    "CheckReport",
    "Conversation",
    "Example",
    "Message",
    "PromptExample",
    "RenderStats",
    "Rows",
    "TokenDataset",
    "best_fit_decreasing",
    "check",
    "collate_packed",
    "collate_padded",
    "prepare",
    "read",
    "render",
    "render_prompt",
    "show",
    "show_html",
    "split",
    "stop_token_ids",
]

lazy_names(__name__, _WHERE)
