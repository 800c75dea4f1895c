"""What the demo prints at its end. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

ROWS = {
    "json_valid": "valid JSON",
    "json_exact": "exact match (all six fields right)",
    "json_fields": "fields right",
}


def demo_table(result: Mapping[str, Any]) -> RenderableType:
    """The figures of :func:`veneer.demo.run_demo`, before beside after, and what to type next."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    before, after = result["before"], result["after"]
    table = Table(title=f"{result['heldout_rows']} held-out messages -> JSON", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, label in ROWS.items():
        table.add_row(label, _percent(before[name]), Text(_percent(after[name]), style="bold"))
    fields = [name for name in after if name.startswith("json_fields.")]
    for name in fields:
        table.add_row(f"  {name.partition('.')[2]}", _percent(before[name]), _percent(after[name]))

    run = result["run"]
    facts = Text(
        f"{_minutes(result['train_seconds'])} training on {result['train_rows']:,} messages, "
        f"{_minutes(result['total_seconds'])} in all; {result['tokens_per_second']:,.0f} tokens/s; "
        f"adapter {result['adapter_mb']:.1f} MB; peak memory {result['peak_rss_gb']:.1f} GB"
    )
    commands = Table.grid(padding=(0, 2))
    for command, what in (
        (f"veneer chat {run}", "talk to it; /base and /adapter switch"),
        (f"veneer data show {run}", "what was trained, token by token"),
        (f"veneer eval {run} --data {result['heldout']} --metrics json_exact", "measure it again"),
        ("veneer train recipe.yaml data.train=YOUR.jsonl", "your own data"),
    ):
        commands.add_row(Text(f"  {command}", style="cyan"), what)
    return Group(table, facts, "", Text(f"report: {result['report']}"), "", "What to type next:", commands)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02} s"
