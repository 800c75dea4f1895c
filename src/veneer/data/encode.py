"""From a document to token ids with their mask: one tokenisation with offsets, and a proof that each span fell on
token borders.

A span's border is right when the tokens before it are what the tokenizer makes of the prompt alone: that is what the
model is given when it is asked for this turn. Added tokens (``<|im_start|>``) always cut the text, so only the
stretch since the last one has to be tokenised again, and for most templates that stretch
(``<|im_start|>assistant\\n``) is the same string in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from veneer.data.dataset import Bool, Example
from veneer.data.spans import Document, Span
from veneer.data.templates import RowRefused
from veneer.errors import DataError

_CACHED_PROMPTS = 20_000

# Token ids; the first token and the stop token (inclusive) of each span; how many first tokens are the tokenizer's own.
_Placed = tuple[list[int], list[tuple[int, int]], int]


class Encoder:
    """Tokenises documents in batches.

    Raises:
        DataError: the tokenizer is not a fast one (without character offsets no mask can be exact).
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "this tokenizer gives no character offsets, so it cannot be known which tokens are the answer's",
                where=str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
                fix="use a base with a fast tokenizer (a tokenizer.json)",
            )
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        # A tokenizer may come with truncation or padding switched on in its file: rendering cuts and pads by itself.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.first_ids = self._first_ids()
        self._prompts: dict[str, list[int]] = {}

    def _first_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text (bos, or nothing)."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return list(full[:start])
        return []

    def encode(self, documents: Sequence[Document]) -> list[Example | RowRefused]:
        """One example per document, in order; a refusal where no exact mask exists."""
        encodings = self.backend.encode_batch([d.text for d in documents], add_special_tokens=False)
        results: list[_Placed | RowRefused] = []
        for document, encoding in zip(documents, encodings):
            try:
                results.append(self._framed(document, *self._place(document, encoding)))
            except RowRefused as refusal:
                results.append(refusal)
        self._prove(documents, results)
        return [
            result if isinstance(result, RowRefused) else _example(document, *result)
            for document, result in zip(documents, results)
        ]

    def _framed(self, document: Document, ids: list[int], places: list[tuple[int, int]]) -> _Placed:
        """Adds the tokenizer's own first tokens and an eos to a text that has no chat template around it."""
        if not document.own_specials:
            return ids, places, 0
        if self.eos_id is None:
            raise RowRefused("the tokenizer has no eos token to end the text with", "set one, or use another tokenizer")
        # A text that carries its eos already gets no second one.
        closing = [] if ids and ids[-1] == self.eos_id else [self.eos_id]
        shift = len(self.first_ids)
        framed = [*self.first_ids, *ids, *closing]
        return framed, [(first + shift, len(framed) - 1) for first, _ in places], shift

    def _place(self, document: Document, encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """The document's ids, and for each span its first token and its stop token (inclusive)."""
        ids: list[int] = encoding.ids
        places = []
        for span in document.spans:
            first = _token_at(encoding, span.start, len(ids))
            if first < len(ids) and ids[first] in self.added and encoding.token_to_chars(first)[0] < span.start:
                first += 1  # Phi-3's <|assistant|> takes white space behind it along, the answer's own too
            if not self._border_is_clean(document.text, ids, encoding, first, span.start):
                return self._place_in_pieces(document, ids)
            places.append((first, self._stop(ids, encoding, span, span.stop, document)))
        return ids, places

    def _border_is_clean(self, text: str, ids: list[int], encoding: Any, first: int, start: int) -> bool:
        """Whether the tokens before ``first`` are the tokens of the text before ``start`` on its own."""
        anchor = first - 1
        while anchor >= 0 and ids[anchor] not in self.added:
            anchor -= 1
        from_char = encoding.token_to_chars(anchor)[0] if anchor >= 0 else 0
        return self._prompt_ids(text[from_char:start]) == ids[max(anchor, 0) : first]

    def _prompt_ids(self, text: str) -> list[int]:
        known = self._prompts.get(text)
        if known is None:
            if len(self._prompts) >= _CACHED_PROMPTS:
                self._prompts.clear()
            known = self._prompts[text] = self.backend.encode(text, add_special_tokens=False).ids
        return known

    def _stop(self, ids: list[int], encoding: Any, span: Span, char: int, document: Document) -> int:
        if span.end == span.stop:  # eos is appended by its id
            return len(ids)
        token = _token_at(encoding, char, len(ids))
        if token >= len(ids) or ids[token] != span.stop_id:
            raise RowRefused(
                f"the stop token {document.text[span.stop : span.end]!r} is not one token in this row",
                "use the tokenizer that belongs to the chat template",
            )
        return token

    def _place_in_pieces(self, document: Document, whole: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The same for a text in which a token lies across the start of a span.

        The text is cut at the spans' starts and tokenised piece by piece, as it happens when a model continues its
        prompt. A later piece is tokenised behind a special token, so that tokenizers which mark the beginning of a
        text with a space do not.
        """
        anchor = self._anchor()
        cuts = [span.start for span in document.spans]
        ids = list(self.backend.encode(document.text[: cuts[0]], add_special_tokens=False).ids)
        places = []
        for span, until in zip(document.spans, [*cuts[1:], len(document.text)]):
            piece = self.backend.encode(anchor + document.text[span.start : until], add_special_tokens=False)
            stop = self._stop(piece.ids, piece, span, len(anchor) + span.stop - span.start, document)
            places.append((len(ids), len(ids) + stop - 1))
            ids.extend(piece.ids[1:])
        if self._decode(ids) != self._decode(whole):
            raise RowRefused(
                "a token lies across the start of the answer, and the text cannot be cut there without changing it",
                "put the white space between prompt and answer into the answer, or use another template",
            )
        return ids, places

    def _anchor(self) -> str:
        """A special token that cuts a text without taking white space with it."""
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special and not (token.lstrip or token.rstrip or token.normalized):
                return str(token)
        raise RowRefused(
            "a token lies across the start of the answer, and the tokenizer has no special token to cut the text with",
            "end the prompt where a word ends, or use another tokenizer",
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def _prove(self, documents: Sequence[Document], results: list[_Placed | RowRefused]) -> None:
        """Checks that each trained span holds one stop token, at its end, and decodes to its text; others are refused.

        A tokenizer that folds case or knows few words never gives its text back: there, the offsets alone speak.
        """
        spans: list[tuple[int, list[int], str]] = []
        for index, (document, result) in enumerate(zip(documents, results)):
            if isinstance(result, RowRefused) or document.everything:
                continue
            ids, places, _ = result
            for (first, stop), span in zip(places, document.spans):
                run = ids[first : stop + 1]
                if sum(run.count(stop) for stop in {span.stop_id, self.eos_id} if stop is not None) != 1:
                    results[index] = RowRefused(
                        "a trained turn holds more than one stop token", "remove it from the text"
                    )
                spans.append((index, ids[first:stop], document.text[span.start : span.stop]))
        decoded = self.backend.decode_batch([ids for _, ids, _ in spans], skip_special_tokens=False)
        for (index, _, text), back in zip(spans, decoded):
            result = results[index]
            if back.strip() == text.strip() or isinstance(result, RowRefused):
                continue
            if documents[index].text.strip() in self._decode(result[0]):
                results[index] = RowRefused(
                    f"the trained tokens read {back[:60]!r}, not the answer {text[:60]!r}", "report this row"
                )


def _example(document: Document, ids: list[int], places: list[tuple[int, int]], own: int) -> Example:
    trained: Bool = np.full(len(ids), document.everything, dtype=np.bool_)
    for first, stop in places:
        trained[first : stop + 1] = not document.everything
    # Nothing comes before the first token, so nothing predicts it; a bos is never the model's to write.
    trained[: max(own, 1)] = False
    return Example(np.array(ids, dtype=np.int32), trained, document.row_id)


def _token_at(encoding: Any, char: int, count: int) -> int:
    """The first token that covers ``char`` or comes after it (white space may count to no token)."""
    token = encoding.char_to_token(char)
    if token is not None:
        return int(token)
    return next((index for index, (_, end) in enumerate(encoding.offsets) if end > char), count)
