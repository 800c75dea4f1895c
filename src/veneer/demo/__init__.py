"""The demo: a small base model learns to turn an online shop's inbox into strict JSON."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "demo_table": "veneer.demo.table",
    "generate_rows": "veneer.demo.generator",
    "run_demo": "veneer.demo.run",
}

__all__ = ["demo_table", "generate_rows", "run_demo"]

if TYPE_CHECKING:
    from veneer.demo.generator import generate_rows
    from veneer.demo.run import run_demo
    from veneer.demo.table import demo_table


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'veneer.demo' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
