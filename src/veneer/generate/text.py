"""From token ids to text while they arrive: characters that span tokens, stop strings that span tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are not a whole character yet


class TextSoFar:
    """The text of one row, decoded as its tokens come.

    Args:
        decode: ids to text.
        stops: strings that end the text; none of them is part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._given = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Takes one more token; True when a stop string is complete, and ``text`` then ends before it."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(_HALF)  # half a character is no stop
        found = [whole.find(stop) for stop in self._stops]
        first = min((place for place in found if place >= 0), default=-1)
        self.stopped = first >= 0
        self.text = text[:first] if self.stopped else text
        return self.stopped

    def fresh(self, *, last: bool = False) -> str:
        """What is certain of the text and was not given yet; with ``last``, all of the rest.

        Half a character is kept back, and so is what may turn out to begin a stop string.
        """
        end = len(self.text)
        if not (last or self.stopped):
            whole = self.text.rstrip(_HALF)
            end = len(whole) - self._may_be_a_stop(whole)
        if not self.text[:end].startswith(self._given):
            return ""  # this tokenizer rewrites its last words; they come when they are settled
        new = self.text[len(self._given) : end]
        self._given += new
        return new

    def _may_be_a_stop(self, text: str) -> int:
        """How many characters at the end of ``text`` are the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
