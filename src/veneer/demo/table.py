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
    commands = Text("What to type next:")
    for what, command in (
        ("talk to it; /base and /adapter switch", f"veneer chat {run}"),
        ("see what was trained, token by token", f"veneer data show {run}"),
        ("measure it again", f"veneer eval {run} --data {result['heldout']} --metrics json_exact"),
        (
            "train on your own data (prompt and completion, or messages, per line)",
            f"veneer train {run}/recipe.yaml data.train=YOUR.jsonl data.eval=0.1 output_dir=runs/mine",
        ),
    ):
        commands.append(f"\n  # {what}\n", style="dim").append(f"  {command}", style="cyan")
    return Group(table, facts, "", Text(f"report: {result['report']}"), "", commands)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02} s"
