"""The ways of storing a weight that ``benchmarks.quantisation`` compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """A row of the table: how weights are stored."""

    scheme: str  # "plain": as they are
    block_size: int = 64
    double_quant: bool = False

    @property
    def name(self) -> str:
        """As the tables call it."""
        if self.scheme == "plain":
            return "not quantised"
        if self.scheme == "int8":
            return "INT8, a scale per row"
        return f"{self.scheme.upper()}, blocks of {self.block_size}" + (", double" if self.double_quant else "")


PLAIN = Storage("plain")
STORAGES = (
    PLAIN,
    Storage("int8"),
    *(Storage("nf4", size, double) for size in (64, 128) for double in (False, True)),
    *(Storage(scheme, 64, double) for scheme in ("fp4", "int4") for double in (False, True)),
)
