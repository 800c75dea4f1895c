"""The experts of a base in codes: registered with transformers' experts interface, as attention is with its own.

transformers then calls our function for every layer of experts; their modules stay what they are.
"""

from __future__ import annotations

from transformers.integrations.moe import ExpertsInterface

from veneer.adapters.fused_experts import forward_experts

NAME = "veneer"


def register() -> None:
    """Makes ``experts_implementation="veneer"`` known to transformers (its documented extension point)."""
    ExpertsInterface.register(NAME, forward_experts)
