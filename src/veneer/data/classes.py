"""The classes of labelled rows: their names in order, how many rows each has, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.data.conversation import Rows, normalise
from veneer.data.labelled import class_id, labelled
from veneer.data.render import named
from veneer.errors import DataError, did_you_mean

UNEVEN = 10  # the largest class has so many times the rows of the smallest: then accuracy alone says little


@dataclass(frozen=True)
class Classes:
    """What a classifier tells apart.

    Attributes:
        names: in the order of the ids.
        counts: training rows of each.
        held_out: held-out rows of each; all 0 without any.
        warnings: sentences to say aloud.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    held_out: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def majority(self) -> str:
        """The class of the most training rows, the first of equals."""
        return self.names[self.counts.index(max(self.counts))]

    @property
    def majority_accuracy(self) -> float | None:
        """The share of the held-out rows that always saying :attr:`majority` gets right; None without any."""
        total = sum(self.held_out)
        return self.held_out[self.names.index(self.majority)] / total if total else None

    def __str__(self) -> str:
        share, right = max(self.counts) / sum(self.counts), self.majority_accuracy
        text = f"{len(self.names)} classes: {named(self.names, 12)}; '{self.majority}', the most frequent one, has "
        text += f"{share:.1%} of the training rows"
        return text if right is None else f"{text} and {right:.1%} of the held-out ones (the baseline of the accuracy)"


def find_classes(rows: Rows, held_out: Rows | None, given: Sequence[str] | None = None) -> Classes:
    """The classes of the training rows, or the ones that are given.

    Without names given, numbers stand in their order and names in the alphabet's.

    Args:
        given: the names in the order of the ids; a label that is a number may then count them from 0.

    Raises:
        DataError: a row without a label or with an unknown one, fewer than two classes, or a class that only held-out
            rows have.
    """
    train, other = _labels(rows), {} if held_out is None else _labels(held_out)
    if given is None:
        names = sorted(train, key=(lambda n: (int(n), n)) if all(map(_is_number, train)) else None)
        for name, ids in other.items():
            if name not in train:
                raise DataError(
                    f"the label '{name}' occurs only in the held-out rows, so it cannot be learnt",
                    where=named(ids),
                    fix=did_you_mean(name, names)
                    or "add training rows with it or take these out; data.labels can name all classes",
                )
    else:
        names = list(given)
        for name, ids in [*train.items(), *other.items()]:
            if class_id(name, names) is None:
                raise DataError(
                    f"the label '{name}' is none of data.labels ({named(names, 12)})",
                    where=named(ids),
                    fix=did_you_mean(name, names) or "add it to data.labels, or mend the rows",
                )
    counts, held = _counts(train, names), _counts(other, names)
    if sum(count > 0 for count in counts) < 2:
        raise DataError(
            f"all {len(rows):,} training rows have the label '{names[counts.index(max(counts))]}': there is nothing to "
            "tell apart",
            where=rows.source,
            fix="give rows of at least two classes, or name another column: columns: {label: NAME}",
        )
    return Classes(tuple(names), counts, held, tuple(_warnings(names, counts, held)))


def _labels(rows: Rows) -> dict[str, list[str]]:
    """The ids of the rows of each label."""
    found: dict[str, list[str]] = {}
    missing = []
    for row in labelled(rows):
        if row.label is None:
            missing.append(row.row_id)
        else:
            found.setdefault(row.label, []).append(row.row_id)
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(rows):,} rows have no label",
            where=named(missing),
            fix="label them or take them out; columns: {label: NAME} says which column holds the labels",
        )
    return found


def _counts(ids: dict[str, list[str]], names: Sequence[str]) -> tuple[int, ...]:
    counter: Counter[int | None] = Counter()
    for label, rows in ids.items():
        counter[class_id(label, names)] += len(rows)
    return tuple(counter[index] for index in range(len(names)))


def _warnings(names: Sequence[str], counts: Sequence[int], held_out: Sequence[int]) -> list[str]:
    said = []
    if unseen := [name for name, count in zip(names, counts) if not count]:
        said.append(f"no training row has the label {_quoted(unseen)}: it will hardly ever be predicted")
    folded = Counter(map(normalise, names))
    if alike := [name for name in names if folded[normalise(name)] > 1]:
        said.append(f"labels that differ in case or white space alone count as classes of their own: {named(alike)}")
    some = [count for count in counts if count]
    if max(some) >= UNEVEN * min(some):
        rare, common = (names[counts.index(pick(some))] for pick in (min, max))
        said.append(
            f"the classes are uneven: {max(some):,} training rows of '{common}' and {min(some):,} of '{rare}'; "
            "look at macro F1 and the table of classes beside the accuracy"
        )
    if sum(held_out) and (absent := [n for n, a, b in zip(names, counts, held_out) if a and not b]):
        said.append(f"no held-out row has the label {_quoted(absent)}: nothing is measured of it")
    return said


def _quoted(names: Sequence[str]) -> str:
    return named([f"'{name}'" for name in names])


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
