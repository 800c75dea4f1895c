"""One reader per file type: raw rows with the line they stand on. Standard library only, but for Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from veneer.errors import DataError


class RawRow(NamedTuple):
    """A row as the file has it, its short name ("tickets.jsonl:12"), and where it stands, for errors."""

    value: Any
    row_id: str
    where: str


Reader = Callable[[Path, str], tuple[Iterator[RawRow], str]]


def _text(path: Path) -> str:
    """The file as text; a byte order mark at the start is not part of the first key."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16, not UTF-8", where=str(path), fix=_recode(path, "UTF-16"))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"the file is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            where=f"{path}:{line}",
            fix=_recode(path, "WINDOWS-1252"),
        ) from error


def _recode(path: Path, encoding: str) -> str:
    return f"save it as UTF-8, such as: iconv -f {encoding} -t UTF-8 {path.name} > utf8{path.suffix}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        # A dict would keep the last value and lose the first without a word.
        raise _DuplicateKey(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return result


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def _loads(text: str, where: str, first_line: int = 1, path: Path | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = where if path is None else f"{path}:{error.lineno + first_line - 1}"
        raise DataError(
            f"broken JSON: {error.msg} (column {error.colno})",
            where=place,
            fix="mend or remove this line; each must be one whole JSON value" if path is None else "mend the file here",
        ) from error
    except _DuplicateKey as error:
        raise DataError(
            f"the key '{error.key}' stands twice in one object", where=where, fix="keep one of them"
        ) from error
    except RecursionError as error:
        raise DataError("the JSON is nested too deeply", where=where, fix="flatten the row") from error


def _jsonl(path: Path, name: str) -> tuple[Iterator[RawRow], str]:
    return _json_lines(_text(path), path, name), ""


def _json_lines(text: str, path: Path, name: str) -> Iterator[RawRow]:
    # Not splitlines(): it also breaks at U+2028 and others, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield RawRow(_loads(line, where), f"{name}:{number}", where)


def _json(path: Path, name: str) -> tuple[Iterator[RawRow], str]:
    text = _text(path)
    if not text.strip():
        raise DataError("the file is empty", where=str(path), fix="give a file with at least one row")
    if _looks_like_lines(text):
        return _json_lines(text, path, name), "one JSON object per line"
    value = _loads(text, str(path), path=path)
    note = ""
    if isinstance(value, dict):
        lists = {key: entry for key, entry in value.items() if isinstance(entry, list)}
        # {"data": [...]} and the like: taken when there is one list to take, and said.
        if len(lists) != 1 or "messages" in lists or "conversations" in lists:
            raise DataError(
                "the JSON file is one object, not a list of rows",
                where=str(path),
                fix="write a list of rows: [{...}, {...}], or one object per line",
            )
        key, value = next(iter(lists.items()))
        note = f"the list under '{key}'"
    if not isinstance(value, list):
        raise DataError("the JSON file is not a list of rows", where=str(path), fix="write [{...}, {...}]")
    return (RawRow(row, f"{name}:{n}", f"{path}, row {n}") for n, row in enumerate(value, 1)), note


def _looks_like_lines(text: str) -> bool:
    """Whether a .json file is JSON Lines: its first line is a whole object, and more follow."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _csv(path: Path, name: str) -> tuple[Iterator[RawRow], str]:
    text = _text(path)
    header = text.lstrip("\n").split("\n", 1)[0]
    # Excel writes semicolons where the comma is the decimal sign.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    note = {",": "", ";": "separated by semicolons", "\t": "separated by tabs"}[delimiter]
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
    # StringIO breaks lines at line feeds only; splitlines() would also break a cell at U+2028 and others.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return _csv_rows(reader, path, name), note


def _csv_rows(reader: Any, path: Path, name: str) -> Iterator[RawRow]:
    line = 1
    try:
        columns: list[str] = next(reader, [])
        twice = {column for column in columns if columns.count(column) > 1}
        if twice:
            raise DataError(
                f"the column '{sorted(twice)[0]}' stands twice in the header",
                where=f"{path}:1",
                fix="rename one of them",
            )
        line = reader.line_num + 1
        for cells in reader:
            where, row_id, line = f"{path}:{line}", f"{name}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(columns):
                raise DataError(
                    f"this row has {len(cells)} cells and the header has {len(columns)} columns",
                    where=where,
                    fix="put quotes around cells that hold the separator or line breaks",
                )
            yield RawRow(dict(zip(columns, cells)), row_id, where)
    except csv.Error as error:
        raise DataError(
            f"broken CSV: {error}", where=f"{path}:{line}", fix="check the quotes around this row"
        ) from error


def _plain_text(path: Path, name: str) -> tuple[Iterator[RawRow], str]:
    return _paragraphs(_text(path), path, name), "blank lines separate the texts"


def _paragraphs(text: str, path: Path, name: str) -> Iterator[RawRow]:
    lines: list[str] = []
    start = 1
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield RawRow({"text": "\n".join(lines)}, f"{name}:{start}", f"{path}:{start}")
            lines = []


def _parquet(path: Path, name: str) -> tuple[Iterator[RawRow], str]:
    import pyarrow  # type: ignore[import-untyped]  # it ships no types
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"the file is not Parquet, or it is cut off: {reason}", where=str(path), fix="make it again"
        ) from error
    return _parquet_rows(file, path, name), ""


def _parquet_rows(file: Any, path: Path, name: str) -> Iterator[RawRow]:
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            value = {key: without_nulls(entry) for key, entry in row.items()}
            yield RawRow(value, f"{name}:{number}", f"{path}, row {number}")


def without_nulls(value: Any) -> Any:
    """Arrow gives every struct the keys of all rows: the ones that a row never had come back as null."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _plain_text,
    ".md": _plain_text,
}
