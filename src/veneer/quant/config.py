"""How a weight is stored: the scheme, the block size, and whether the scales are quantised again."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.errors import UsageError, did_you_mean

SCHEMES = ("nf4", "fp4", "int4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QuantConfig:
    """How a weight is stored.

    Args:
        scheme: ``nf4`` (quantiles of a normal distribution; Dettmers et al. 2023, "QLoRA", appendix E), ``fp4``,
            ``int4`` (uniform steps: a yardstick for the other two), or ``int8``.
        block_size: weights that share one scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits too (QLoRA, sec. 3): 0.37 bits less per parameter in blocks of 64.

    INT8 has one float32 scale per output row: ``block_size`` and ``double_quant`` do not act on it.

    Raises:
        UsageError: an unknown scheme, or a block size that is not one of the eight.
    """

    scheme: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UsageError(
                f"unknown quantisation '{self.scheme}'",
                where="scheme",
                fix=did_you_mean(str(self.scheme), SCHEMES) or f"use one of {', '.join(SCHEMES)}",
            )
        if not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"a block size of {self.block_size!r} does not fit: it must be a power of two from 32 to 4096",
                where="block_size",
                fix=f"use one of {', '.join(map(str, BLOCK_SIZES))}; 64 is usual",
            )
        if not isinstance(self.double_quant, bool):
            raise UsageError(f"double_quant must be true or false, not {self.double_quant!r}", where="double_quant")
