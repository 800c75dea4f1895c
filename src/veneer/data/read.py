"""Reading rows from JSONL, JSON, CSV, text, Parquet, folders of them, lists in memory, hub datasets, and the demo.

Plain files are read with the standard library: the command starts fast, and an error can name the exact line. Parquet
goes through pyarrow and hub datasets through ``datasets``, both imported only when such a source is read.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.conversation import Conversation, Rows
from veneer.data.files_in import READERS, RawRow, without_nulls
from veneer.data.labelled import FORMAT as LABELLED
from veneer.data.labelled import LabelledShape, recognise_labelled
from veneer.data.shapes import Shape, recognise
from veneer.errors import DataError, UsageError, did_you_mean, nearest
from veneer.files import absent_folder, sha256_file, storage_errors
from veneer.inbox.parts import SOURCES as BUILT_IN
from veneer.inbox.parts import as_jsonl, draw_parts

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
# File names that mean a split: a folder of train.jsonl and test.jsonl must not be trained on as a whole.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}

Source = str | Path | Sequence[Mapping[str, Any]] | Sequence[str | Path]


@dataclass(frozen=True)
class _Opened:
    """Raw rows of a source, its short name, a note about how it was opened, and the files read with their hashes."""

    rows: Iterable[RawRow]
    name: str
    note: str
    files: dict[str, str]


def read(
    source: Source,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Rows:
    """Conversations from a source, its shape detected (and said in ``Rows.description``) or given.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md), a folder of them, a hub dataset ("org/name", or
            "org/name:config"), a list of dicts, or a list of files; where there is no file of that name, "demo-train",
            "demo-validation" and "demo-heldout" are the demo's rows.
        format: "auto", "messages", "sharegpt", "alpaca", "prompt-completion" or "text"; "labelled" for texts with a
            class each, which auto never guesses.
        columns: Veneer's field names to the source's columns, such as ``{"prompt": "question", "completion":
            "answer"}``.
        split: which split of a hub dataset, or of a folder with files named after splits.
        limit: at most this many rows, from the start.
    Raises:
        DataError: the source is missing, empty, broken or in no known shape; the message names the line.
        UsageError: an unknown format, field or column, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit of rows is {limit}", where="max_rows", fix="use 1 or more, or leave it out")
    if isinstance(source, Sequence) and not isinstance(source, str) and source and isinstance(source[0], str | Path):
        return _read_several([str(item) for item in source], format, columns, split, limit)
    opened = _open(source, split)  # type: ignore[arg-type]  # the list of paths was handled above
    rows = iter(opened.rows if limit is None else itertools.islice(opened.rows, limit))
    first = next(rows, None)
    if first is None:
        raise DataError("there are no rows", where=opened.name, fix="give a file with at least one row")
    _check_object(first)
    present = [str(key) for key in first.value]
    shape: Shape | LabelledShape
    if format == LABELLED:
        shape = recognise_labelled(present, opened.name, columns)
    else:
        shape = recognise(present, opened.name, format, columns)
    conversations: list[Conversation] = []
    for row in itertools.chain([first], rows):
        _check_object(row)
        conversations.append(shape.convert(row.value, row.row_id, row.where))
    note = f" ({opened.note})" if opened.note else ""
    description = f"{opened.name}: {_count(len(conversations))}{note}, {shape.describe(present)}"
    return Rows(conversations, shape.format, opened.name, description, opened.files)


def _read_several(
    sources: list[str], format: str, columns: Mapping[str, str] | None, split: str, limit: int | None
) -> Rows:
    parts: list[Rows] = []
    left = limit
    for source in sources:
        part = read(source, format=format, columns=columns, split=split, limit=left)
        parts.append(part)
        left = None if left is None else left - len(part)
        if left == 0:
            break
    if len(parts) == 1:
        return parts[0]
    formats = {part.format for part in parts}
    conversations = [row for part in parts for row in part.conversations]
    files = {name: digest for part in parts for name, digest in part.files.items()}
    description = f"{_count(len(conversations))} from {len(parts)} sources: " + "; ".join(p.description for p in parts)
    name = ", ".join(part.source for part in parts)
    return Rows(conversations, formats.pop() if len(formats) == 1 else "mixed", name, description, files)


def _check_object(row: RawRow) -> None:
    if not isinstance(row.value, Mapping):
        raise DataError(
            f"this row is {type(row.value).__name__}, not an object with named fields",
            where=row.where,
            fix='write each row as an object, such as {"prompt": ..., "completion": ...}',
        )


def _open(source: str | Path | Sequence[Mapping[str, Any]], split: str) -> _Opened:
    if not isinstance(source, str | Path):
        rows = (RawRow(value, f"row:{n}", f"row {n} of the list") for n, value in enumerate(source, 1))
        return _Opened(rows, "list of rows", "", {})
    text = str(source)
    if text.startswith("hub:"):
        return _open_hub(text.removeprefix("hub:"), split)
    path = Path(text).expanduser()
    with storage_errors(path):  # the look itself may be refused: a folder that may not be entered
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder:
        return _open_folder(path, split)
    if exists:
        return _open_file(path, path.name)
    if text in BUILT_IN:
        return _open_built_in(text)
    known_suffix = path.suffix.lower() in READERS
    if _HUB_ID.fullmatch(text) and not known_suffix and not path.parent.is_dir():
        return _open_hub(text, split)
    raise _missing(path)


def _open_built_in(name: str) -> _Opened:
    rows = draw_parts()[BUILT_IN[name]]
    digest = hashlib.sha256(as_jsonl(rows).encode()).hexdigest()  # that of the file that `veneer demo` writes
    numbered = (RawRow(row, f"{name}:{n}", f"{name}, row {n}") for n, row in enumerate(rows, 1))
    return _Opened(numbered, name, "the demo's rows, made from a seed", {name: digest})


def _open_file(path: Path, name: str) -> _Opened:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"files of type '{path.suffix or path.name}' cannot be read",
            where=str(path),
            fix=f"use one of {', '.join(sorted(READERS))}",
        )
    try:
        if path.stat().st_size == 0:
            raise DataError("the file is empty", where=str(path), fix="give a file with at least one row")
        digest = sha256_file(path)
        rows, note = reader(path, name)
    except PermissionError as error:
        raise DataError("no permission to read this file", where=str(path), fix="make it readable for you") from error
    return _Opened(rows, name, note, {str(path): digest})


def _open_folder(folder: Path, split: str) -> _Opened:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in READERS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    # A folder's own README is not a text to train on.
    files = [path for path in files if path.stem.lower() not in ("readme", "license", "dataset_info", "dataset_infos")]
    if not files:
        raise DataError(
            "the folder holds no file that can be read",
            where=str(folder),
            fix=f"give a folder with files of type {', '.join(sorted(READERS))}, or the file itself",
        )
    named = {path: _split_of(path, folder) for path in files}
    note = f"{len(files)} files"
    if any(named.values()):
        wanted = next((name for name, words in _SPLIT_NAMES.items() if split in words), split)
        files = [path for path in files if named[path] == wanted]
        if not files:
            there = sorted({name for name in named.values() if name})
            raise DataError(
                f"the folder has no files of the split '{split}' (it has {', '.join(there)})",
                where=str(folder),
                fix=did_you_mean(split, there) or "name one of its splits, or give the file itself",
            )
        note = f"the {wanted} split: {', '.join(str(path.relative_to(folder)) for path in files)}"
    opened = [_open_file(path, str(path.relative_to(folder))) for path in files]
    digests = {name: digest for item in opened for name, digest in item.files.items()}
    return _Opened(
        itertools.chain.from_iterable(item.rows for item in opened), folder.name or str(folder), note, digests
    )


def _split_of(path: Path, folder: Path) -> str | None:
    """The split that a file's name or a folder on the way to it speaks of (``train.jsonl``, ``test-00000.parquet``)."""
    relative = path.relative_to(folder)
    for part in (*relative.parts[:-1], relative.stem):
        word = re.split(r"[-_.]", part.lower())[0]
        for name, words in _SPLIT_NAMES.items():
            if word in words:
                return name
    return None


def _open_hub(spec: str, split: str) -> _Opened:
    name, _, config = spec.partition(":")
    try:
        import datasets
    except ImportError as error:  # pragma: no cover - datasets is a dependency
        raise DataError("hub datasets need the package 'datasets'", where=spec, fix="pip install datasets") from error
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises a dozen types for "not there", "no network", "no such split"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"there is no such file, and the hub dataset could not be loaded: {reason}",
            where=spec,
            fix="check the spelling, the split and the network; for a file, give its path",
        ) from error
    rows = (
        RawRow(
            {key: without_nulls(entry) for key, entry in value.items()},
            f"{name}[{split}]:{n}",
            f"{name}, split {split}, row {n}",
        )
        for n, value in enumerate(table, 1)
    )
    return _Opened(rows, spec, f"hub dataset, split {split}", {})


def _missing(path: Path) -> DataError:
    folder = path.parent
    if folder.is_dir():
        there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        close = nearest(path.name, [*there, *BUILT_IN])
        data = [name for name in there if Path(name).suffix.lower() in READERS]
        if close:
            names = [name if name in BUILT_IN else str(folder / name) for name in close]
            fix = f"Did you mean {' or '.join(map(repr, names))}?"
        elif data:
            fix = f"data files there: {', '.join(data[:5])}{', ...' if len(data) > 5 else ''}"
        else:
            fix = f"the folder '{folder}' holds no data file; check the path"
    else:
        fix = f"{absent_folder(folder)}; give a file that is there, or the demo's rows: {', '.join(BUILT_IN)}"
    return DataError("there is no such file", where=str(path), fix=fix)


def _count(rows: int) -> str:
    return f"{rows:,} row" if rows == 1 else f"{rows:,} rows"
