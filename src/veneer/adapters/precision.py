"""In what precision a base's weights are stored: recorded beside an adapter, and compared when it is loaded again.

An adapter trained over codes has learnt to make up for their rounding; over other weights it still acts, a little off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from veneer.errors import AdapterError, UsageError
from veneer.quant import QuantConfig

_KEYS = {"scheme", "block_size", "double_quant"}


@dataclass(frozen=True)
class Precision:
    """How a base's weights are stored. The fields are what ``load_base`` takes as ``quantize`` and ``skip``."""

    config: QuantConfig | None = None  # None: plain tensors
    skip: tuple[str, ...] = ()  # what was asked to be left out of the codes

    def __str__(self) -> str:
        config = self.config
        if config is None:
            return "weights that are not quantised"
        twice = "with" if config.double_quant else "without"
        blocks = "" if config.scheme == "int8" else f" (blocks of {config.block_size}, {twice} double quantisation)"
        return f"weights in {config.scheme}{blocks}" + (f" but for {', '.join(self.skip)}" if self.skip else "")

    @property
    def how_to_load(self) -> str:
        """What to say to ``load_base``."""
        if self.config is None:
            return "without quantize"
        is_plain = self.config.scheme == "int8" or self.config == QuantConfig(self.config.scheme)
        skip = f", skip={list(self.skip)}" if self.skip else ""
        return f"with quantize={(self.config.scheme if is_plain else self.config)!r}{skip}"

    def is_same(self, other: Precision) -> bool:
        """Whether both give the same weights. INT8 knows neither blocks nor double quantisation."""
        mine, its = self.config, other.config
        both_int8 = mine is not None and its is not None and mine.scheme == its.scheme == "int8"
        return (mine == its or both_int8) and set(self.skip) == set(other.skip)

    def to_dict(self) -> dict[str, Any] | None:
        """JSON-able; None for plain tensors."""
        return None if self.config is None else {**asdict(self.config), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, where: str = "") -> Precision:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            AdapterError: it was written by a later version or by hand; ``where`` is the file.
        """
        if values is None:
            return cls()
        try:
            entries = dict(values)
            skip = entries.pop("skip", [])
            if odd := sorted(entries.keys() ^ _KEYS):
                raise ValueError(f"{', '.join(odd)} missing or unknown")
            if not isinstance(skip, list) or not all(isinstance(entry, str) for entry in skip):
                raise ValueError("skip is no list of names")
            return cls(QuantConfig(**entries), tuple(skip))
        except (TypeError, ValueError, UsageError) as error:
            raise AdapterError(
                f"the record of how the base was quantised cannot be read: {getattr(error, 'what', error)}",
                where=where,
                fix="the file was written by a later version or edited by hand: copy it again",
            ) from error


def precision_of(base: object) -> Precision:
    """How a base's weights are stored, by what its ``quantization`` says; plain where it says nothing."""
    config: QuantConfig | None = getattr(base, "quantization", None)
    return Precision(config, tuple(getattr(getattr(base, "quantized", None), "skip", ())))
