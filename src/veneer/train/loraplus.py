"""LoRA+ (Hayou et al. 2024): B, which starts at zero, is trained faster than A.

    lr_B = ratio * lr_A

With one rate for both, a wide model learns hardly anything through A: both contribute when B's rate is larger, and the
authors' usual ratio is 16. The groups are PEFT's: vectors, such as DoRA's magnitude, go with B, and the factors of an
embedding have a rate of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def multipliers(
    named: Sequence[tuple[str, Tensor]], ratio: float | None, learning_rate: float, embedding_rate: float
) -> list[float] | None:
    """What the learning rate of each parameter is times; None where all are alike.

    Args:
        named: the trained parameters by their keys in PEFT's file.
        ratio: ``lr_B / lr_A``; None is plain LoRA.
        learning_rate: the peak rate, which is A's.
        embedding_rate: the peak rate of an embedding's factors; it follows the schedule as the others do.
    """
    if ratio is None:
        return None

    def of(key: str, parameter: Tensor) -> float:
        if "lora_embedding_" in key:
            return embedding_rate / learning_rate
        return ratio if "lora_B" in key or parameter.dim() == 1 else 1.0

    return [of(key, parameter) for key, parameter in named]
