"""What a base model is: hashes of its weights, tokenizer and chat template, recorded in everything made from it.

The hashes are of the files' bytes, so that they are the same at every path and with every version of the libraries, and
can be checked by hand: for a model of one file ``weight_hash`` is what ``sha256sum`` prints, for several files it is
what ``sha256sum *.safetensors | sha256sum`` prints in their folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import ModelError, StorageError
from veneer.files import cache_dir, sha256_file, sha256_json, write_json

# Every file that a tokenizer is made of. The configuration is hashed apart, because it may hold the chat template.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)

# A file changed within this many nanoseconds of its hash may change again without a new time stamp (the trap that git
# calls "racily clean"), so its hash is not kept.
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model this is. Two identities are equal when their hashes are; where the files lay does not count."""

    name: str = field(compare=False)  # what to load it by: a hub id, the alias, or an absolute path
    revision: str | None = field(compare=False)  # the hub's commit, None for local files
    weight_hash: str  # hex SHA-256 of the weight file, or of the listing of several
    tokenizer_hash: str  # hex SHA-256 of the tokenizer's files, without the chat template
    template_hash: str  # hex SHA-256 of the chat template's text, of the empty string where there is none

    def to_dict(self) -> dict[str, str | None]:
        """The fields as JSON-able values; :meth:`from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaseIdentity:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ModelError: a field is missing or unknown.
        """
        expected = set(cls.__dataclass_fields__)
        if set(values) != expected:
            odd = sorted(expected ^ set(values))
            raise ModelError(
                f"this is not a record of a base model: {', '.join(odd)} missing or unknown",
                fix="the file was written by another version or edited by hand; make it again",
            )
        return cls(**values)


def hash_files(files: Sequence[Path]) -> str:
    """Hex SHA-256 of one file, or of the lines ``<hex digest>  <file name>`` of several in name order."""
    if len(files) == 1:
        return cached_sha256(files[0])
    lines = [f"{cached_sha256(file)}  {file.name}\n" for file in sorted(files, key=lambda file: file.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_tokenizer_files(folder: Path) -> str:
    """Hex SHA-256 over a folder's tokenizer files and its tokenizer configuration without the chat template."""
    parts: dict[str, str] = {}
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            parts[name] = cached_sha256(folder / name)
    configuration = folder / "tokenizer_config.json"
    if configuration.is_file():
        values = json.loads(configuration.read_text(encoding="utf-8"))
        values.pop("chat_template", None)
        parts[configuration.name] = sha256_json(values)
    return sha256_json(parts)


def hash_template(template: str | Mapping[str, str] | None) -> str:
    """Hex SHA-256 of a chat template: its text, or canonical JSON where a tokenizer names several."""
    text = template or ""
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else sha256_json(dict(text))


def cached_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, read from a small index where the file has not changed since it was last hashed.

    Unchanged means the same path, inode, size, modification time and status-change time: the last cannot be set by a
    program, so a file replaced by another of the same size and date is still hashed again.
    """
    real = Path(path).resolve()
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:32]
    entry = cache_dir() / "hashes" / f"{key}.json"
    before = _stamp(real)
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["path"] == str(real) and known["stamp"] == before:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no entry, or one cut short by a full disk: hash the file
    digest = sha256_file(real)
    settled = time.time_ns() - max(before[2:]) > _RACY_NS
    if settled and _stamp(real) == before:
        # The index only saves time: a cache folder that cannot be written to is no reason to fail.
        with contextlib.suppress(OSError, StorageError):
            write_json(entry, {"path": str(real), "stamp": before, "sha256": digest})
    return digest


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
