"""Choices of one value for each of several options, few of them, in which every two values meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Choice = tuple[Any, ...]


def pairs(choice: Choice) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    """Every two of its values, each with the number of its option."""
    return set(itertools.combinations(enumerate(choice), 2))


def covering(options: Mapping[str, Sequence[Any]], is_sound: Callable[[Choice], bool]) -> list[Choice]:
    """Sound choices, the same on every machine, in which any two values that some sound choice has occur together.

    Greedy: always the first of those with the most pairs that are new.
    """
    left = [choice for choice in itertools.product(*options.values()) if is_sound(choice)]
    missing = set().union(*(pairs(choice) for choice in left))
    found: list[Choice] = []
    while missing:
        best = max(left, key=lambda choice: len(pairs(choice) & missing))
        found.append(best)
        missing -= pairs(best)
    return found
