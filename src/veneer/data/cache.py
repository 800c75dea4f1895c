"""Rendered rows kept on disk, under a hash of everything that shapes them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.data.conversation import Conversation, Rows
from veneer.data.dataset import RenderStats, TokenDataset
from veneer.data.render import Overlong, check_options, render
from veneer.data.spans import TrainOn
from veneer.data.templates import TEMPLATE_DATE, resolve_template
from veneer.errors import StorageError
from veneer.files import atomic_folder, cache_dir, sha256_file, sha256_json, write_json

_ARRAYS = ("input_ids", "trained", "offsets")


def prepare(
    rows: Rows | Sequence[Conversation],
    tokenizer: Any,
    *,
    max_length: int | None,
    train_on: TrainOn = "all",
    overlong: Overlong = "truncate",
    chat_template: str | Path | None = None,
    folder: Path | None = None,
) -> TokenDataset:
    """:func:`veneer.data.render`, remembered: the same rows, tokenizer, template and options are rendered once.

    A cache entry that is damaged is rendered again; a cache that cannot be written costs a warning in ``stats``, not
    the run.

    Args:
        folder: where entries are kept; None for "rendered" in the user's cache folder.
    Raises:
        UsageError, DataError: as :func:`veneer.data.render`.
    """
    check_options(max_length, train_on, overlong)
    if not isinstance(rows, Rows):
        rows = Rows(list(rows), "mixed", "rows", "rows")
    key = cache_key(
        rows, tokenizer, max_length=max_length, train_on=train_on, overlong=overlong, chat_template=chat_template
    )
    path = (folder or cache_dir() / "rendered") / key
    found = _load(path)
    if found is not None:
        return found
    dataset = render(
        rows, tokenizer, max_length=max_length, train_on=train_on, overlong=overlong, chat_template=chat_template
    )
    try:
        _save(dataset, path)
    except (StorageError, OSError) as error:
        reason = error.what if isinstance(error, StorageError) else str(error)
        dataset.stats.warnings.append(f"the rendered rows were not kept for the next run ({path.parent}: {reason})")
    return dataset


def cache_key(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int | None,
    train_on: TrainOn,
    overlong: Overlong,
    chat_template: str | Path | None,
) -> str:
    """Hex SHA-256 over the rows, the tokenizer, the template, the options, and the code that renders."""
    has_template = chat_template is not None or bool(tokenizer.chat_template)
    return sha256_json(
        {
            "rows": rows.content_hash,
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
            if getattr(tokenizer, "is_fast", False)
            else None,
            "special_tokens": {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()},
            "template": resolve_template(tokenizer, chat_template) if has_template else None,
            "date": TEMPLATE_DATE.isoformat(),
            "max_length": max_length,
            "train_on": train_on,
            "overlong": overlong,
            "code": _code_hash(),
        }
    )


@functools.cache
def _code_hash() -> str:
    """Over this package's own source: so no version number, and no module, can be forgotten."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("jinja2", "tokenizers"):
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


def _save(dataset: TokenDataset, path: Path) -> None:
    with atomic_folder(path) as temporary:
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(dataset, name), allow_pickle=False)
        hashes = {name: sha256_file(temporary / f"{name}.npy") for name in _ARRAYS}
        meta = {"row_ids": dataset.row_ids, "stats": dataset.stats.to_dict(), "sha256": hashes}
        # The account has its own hash: a half-written or edited one must not pass for what was rendered.
        write_json(temporary / "meta.json", {**meta, "meta_sha256": sha256_json(meta)})


def _load(path: Path) -> TokenDataset | None:
    """The entry at ``path``, or None where there is none that can be trusted."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("meta_sha256", None) != sha256_json(meta):
            return None
        if any(sha256_file(path / f"{name}.npy") != meta["sha256"][name] for name in _ARRAYS):
            return None
        arrays = {name: np.load(path / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
        return TokenDataset(**arrays, row_ids=meta["row_ids"], stats=RenderStats.from_dict(meta["stats"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
