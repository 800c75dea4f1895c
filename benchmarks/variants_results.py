"""The file of results of ``benchmarks.variants``: a JSON object a line, added as it is measured. Plain Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[str, str, int, str]  # method, task, seed, hash of the settings


def key_of(record: Record) -> Key:
    return record["method"], record["task"], record["seed"], record["settings_hash"]


class Results:
    """All records of a file. Of one key the last line counts; a run that failed is not there and can be tried again.

    Args:
        path: the file; it need not exist. None keeps the records in memory. A last line without its end is torn (the
            run that wrote it was cut): it is left out, and cut off by the next record.

    Raises:
        SystemExit: a line is no record.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._records: dict[Key, Record] = {}
        content = path.read_bytes() if path is not None and path.exists() else b""
        whole = content.rfind(b"\n") + 1
        self._torn_at = whole if whole < len(content) else None
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records[key_of(record)] = record
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path}:{number} is no result of this benchmark ({type(error).__name__})") from error

    def __iter__(self) -> Iterator[Record]:
        """What was measured; not the failures."""
        return (record for record in self._records.values() if "error" not in record)

    def failures(self) -> list[Record]:
        return [record for record in self._records.values() if "error" in record]

    def get(self, key: Key) -> Record | None:
        """What was measured under this key; None where nothing was, or where it failed."""
        record = self._records.get(key)
        return None if record is None or "error" in record else record

    def add(self, record: Record) -> None:
        """Adds a record, to the file at once: a run that is cut afterwards loses nothing of it."""
        self._records[key_of(record)] = record
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:  # two runs may add to one file
            if self._torn_at is not None:
                file.truncate(self._torn_at)
                self._torn_at = None
            file.write(json.dumps(record).encode() + b"\n")
