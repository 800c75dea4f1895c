"""The demo: a small base model learns to turn an online shop's inbox into strict JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import lazy_names

_WHERE = {
    "demo_table": "veneer.demo.table",
    "generate_rows": "veneer.inbox.generator",
    "run_demo": "veneer.demo.run",
    "write_demo_data": "veneer.demo.run",
}

__all__ = ["demo_table", "generate_rows", "run_demo", "write_demo_data"]

if TYPE_CHECKING:
    from veneer.demo.run import run_demo, write_demo_data
    from veneer.demo.table import demo_table
    from veneer.inbox.generator import generate_rows

lazy_names(__name__, _WHERE)
