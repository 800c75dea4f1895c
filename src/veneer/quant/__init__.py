"""Frozen weights in 4 and 8 bits: NF4, FP4, INT4, INT8, double quantisation, and a linear over them. Torch only."""

from veneer.quant.config import QuantConfig
from veneer.quant.encode import quantize
from veneer.quant.linear import QuantizedLinear
from veneer.quant.state import from_state_dict, state_dict, state_keys
from veneer.quant.tensor import QuantizedTensor

__all__ = [
    "QuantConfig",
    "QuantizedLinear",
    "QuantizedTensor",
    "from_state_dict",
    "quantize",
    "state_dict",
    "state_keys",
]
