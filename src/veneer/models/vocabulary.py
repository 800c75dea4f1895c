"""New tokens for a base: its tokenizer gets them, its embedding and its head rows for them; nothing old changes a bit.

A new row starts as the mean of the old ones (Hewitt 2021): a new token is then about as likely as others are on
average, and the old ones lose next to nothing. There is no chance in it: whoever adds the same tokens to the same base
has the same rows, so that an adapter needs to keep the trained ones alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.adapters.slots import SLOTS
from veneer.errors import ModelError, UsageError

if TYPE_CHECKING:
    from veneer.models.load import Base

Rows = list[int] | dict[str, list[int]]


def add_tokens(base: Base, tokens: Sequence[str]) -> Rows:
    """Makes each of ``tokens`` one token of ``base``, in place.

    Where the embedding has spare rows already (vocabularies are often padded), they are used as they are; else it and
    the head grow by what is needed. The base's identity stays that of its files.

    Args:
        tokens: texts, each once, none of which is a token yet. They are matched as they stand, and decoded as text.

    Returns:
        What ``LoraConfig(trainable_token_indices=...)`` takes to train the rows of all tokens added so far.

    Raises:
        UsageError: a token is empty, named twice, or known to the tokenizer.
        ModelError: adapters lie on the base; its vocabulary cannot grow; the tokenizer does not take a token.
    """
    from tokenizers import AddedToken

    known = base.tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip() or token in tokens[:number]:
            raise UsageError(f"{token!r} cannot be a new token", where="add_tokens", fix="give texts, each once")
        if token in known:
            raise UsageError(
                f"'{token}' is a token already, with the id {known[token]}",
                where="add_tokens",
                fix=f"leave it out; to train its row, use trainable_token_indices: [{known[token]}]",
            )
    if any(isinstance(module, SLOTS) for module in base.module.modules()):
        raise ModelError(
            "tokens cannot be added under an adapter", where="add_tokens", fix="add them before an adapter is attached"
        )
    added = [AddedToken(token, normalized=False, special=False) for token in tokens]
    base.tokenizer.add_tokens(added)
    ids = {token: int(base.tokenizer.convert_tokens_to_ids(token)) for token in tokens}
    for token, number in ids.items():
        if base.tokenizer.encode(token, add_special_tokens=False) != [number]:
            raise ModelError(
                f"the tokenizer does not take '{token}' as one token", where="add_tokens", fix="choose another text"
            )
    grow(base.module, max(ids.values(), default=-1) + 1)
    base.added_tokens = {**base.added_tokens, **ids}
    return new_rows(base)


def new_rows(base: Base, saved: Collection[str] = ()) -> Rows:
    """The rows of all tokens added to ``base``, as ``LoraConfig.trainable_token_indices`` has them.

    Args:
        saved: names of modules that are trained whole: their rows are trained anyway.

    Returns:
        The ids, where the head is tied to the embedding or there is none; else ``{path: ids}`` of both.
    """
    ids = list(base.added_tokens.values())
    places = {path: ids for path, _ in _matrices(base.module) if not any(f".{path}".endswith(f".{n}") for n in saved)}
    embedding = next(path for path, _ in _matrices(base.module))
    return ids if list(places) == [embedding] else places


def with_new_rows(
    base: Base, asked: Sequence[int] | Mapping[str, Sequence[int]] | None, saved: Collection[str]
) -> Rows | None:
    """``trainable_token_indices`` as they were asked for, and the rows of the tokens added to ``base``."""
    rows = new_rows(base, saved)
    if asked is None:
        return rows or None
    embedding = next(path for path, _ in _matrices(base.module))
    wanted = dict(asked) if isinstance(asked, Mapping) else {embedding: asked}
    found = {path: list(ids) for path, ids in wanted.items()}
    for path, ids in (rows if isinstance(rows, dict) else {embedding: rows}).items():
        name = next((name for name in found if f".{path}".endswith(f".{name}")), path)
        found[name] = list(dict.fromkeys([*found.get(name, []), *ids]))
    return found[embedding] if list(found) == [embedding] else found or None


def _matrices(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """The embedding, and the head where it has a matrix of its own, with their paths."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    paths = {id(part): path for path, part in module.named_modules()}
    yield paths[id(embedding)], embedding
    if head is not None and head.weight is not embedding.weight:
        yield paths[id(head)], head


@torch.no_grad()
def grow(module: Any, rows: int) -> None:
    """Gives embedding and head at least ``rows`` rows; what is new is the mean of what was there."""
    before = module.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    with torch.random.fork_rng():  # transformers draws random rows first: nobody else's numbers may move
        try:
            module.resize_token_embeddings(rows, mean_resizing=False)
        except Exception as error:  # models with several embeddings, or with codes in them: many kinds of error
            raise ModelError(
                f"the vocabulary of {type(module).__name__} cannot grow: {str(error).strip().splitlines()[0]}",
                where="add_tokens",
                fix="use tokens that the model has",
            ) from error
    for _, part in _matrices(module):
        for parameter in part._parameters.values():
            if parameter is not None and len(parameter) == rows:
                mean = parameter[:before].mean(0, dtype=torch.promote_types(parameter.dtype, torch.float32))
                parameter[before:] = mean.to(parameter.dtype)
    module.requires_grad_(False)
