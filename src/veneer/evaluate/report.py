"""``write_report``: one HTML file that tells a whole run, readable anywhere: no script, no font, no network."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from veneer.evaluate.evaluation import without_surrogates
from veneer.evaluate.markup import esc, join
from veneer.evaluate.record import read_run
from veneer.evaluate.sections import all_sections, verdict
from veneer.files import write_text

_PAGE = Path(__file__).with_name("report.html")


def write_report(run_folder: str | PathLike[str], path: str | PathLike[str] | None = None) -> Path:
    """Writes ``report.html`` of a run from what its folder holds; parts that are missing are left out of the page.

    The same folder gives the same bytes.

    Args:
        run_folder: with ``run.json``, ``metrics.jsonl``, ``recipe.yaml`` and ``eval/*.json``, as far as they exist.
        path: where to write; ``report.html`` in the run folder by default.

    Returns:
        The path of the page.

    Raises:
        UsageError: not a run folder.
        DataError: one of its files is damaged.
        StorageError: the page cannot be written.
    """
    record = read_run(run_folder)
    target = Path(path) if path is not None else record.folder / "report.html"
    page = _PAGE.read_text(encoding="utf-8")
    head, _, tail = page.partition("<!-- body -->")
    head = head.replace("<!-- title -->", esc(record.folder.resolve().name))
    head = head.replace("<!-- description -->", esc(verdict(record)))
    text = head + join(all_sections(record), "\n") + tail
    write_text(target, without_surrogates(text))
    return target
