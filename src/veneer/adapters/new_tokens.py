"""The tokens that were added to a base, kept with an adapter: names, ids, and the tokenizer that knows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError

# What a tokenizer of any kind is saved as.
TOKENIZER_FILES = {
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def added_to(base: object) -> dict[str, int]:
    """The tokens that were added to a base, with their ids; none where it knows nothing of tokens."""
    return dict(getattr(base, "added_tokens", None) or {})


def write_tokenizer(base: Any, folder: Path) -> None:
    """Writes the tokenizer of a base that tokens were added to; of any other base there is nothing to keep."""
    if added_to(base):
        base.tokenizer.save_pretrained(str(folder))


def add_recorded(base: Any, recorded: Mapping[str, int], *, is_adapted: bool, where: str) -> None:
    """Adds the tokens that an adapter was trained with to its base, where they are not there yet.

    Args:
        recorded: the names of the tokens with their ids.
        is_adapted: the base has adapters already.

    Raises:
        AdapterError: this base gives them other ids, or has adapters on it.
    """
    if not recorded or base is None:
        return
    known = base.tokenizer.get_vocab()
    # In the order of their ids: the file's keys are sorted by name.
    missing = sorted((token for token in recorded if token not in known), key=lambda token: recorded[token])
    if missing and is_adapted:
        raise AdapterError(
            f"the adapter brings {len(missing)} new tokens, and the base has adapters already",
            where=where,
            fix="load this adapter first",
        )
    if missing:
        base.add_tokens(missing)
    for token, number in recorded.items():
        found = base.tokenizer.convert_tokens_to_ids(token)
        if found != number:
            raise AdapterError(
                f"the adapter was trained with '{token}' as token {number}, and here it is {found}",
                where=where,
                fix="load the base without other added tokens",
            )
