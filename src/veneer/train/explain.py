"""What runs on what: in words for ``veneer train --explain``, and what ``run.json`` says of the machine."""

from __future__ import annotations

from typing import Any

import torch

from veneer.kernels import heap, native
from veneer.kernels.check import Finding, Watch
from veneer.kernels.precision import cpu_bf16_time
from veneer.models import Base
from veneer.runtime import hardware
from veneer.train.layout import Layout
from veneer.train.optimizer import FlatAdamW


def explanation(base: Base, activations: str, layout: Layout, optimizer: FlatAdamW, watch: Watch) -> str:
    """How this run computes: device, dtype, fused blocks, layout, optimizer, and each operation against float32.

    Args:
        activations: what becomes of them.
        watch: what the check before the first step has seen.
    """
    lines = {
        "device": _device(base),
        "dtype": _dtype(base),
        "blocks": str(base.fused),
        "rows": _rows(layout),
        "activations": activations,
        **({"memory": heap.description()} if base.device.type == "cpu" else {}),
        "optimizer": optimizer.description,
    }
    if base.quantization is not None:
        lines["weights"] = f"{base.quantization.scheme}, decoded while they are multiplied with"
    width = max(map(len, lines)) + 2
    text = ["how this run computes", *(f"  {name:<{width}}{value}" for name, value in lines.items())]
    return "\n".join([*text, *_operations(watch)])


def machine(base: Base) -> dict[str, Any]:
    """What a run folder records about the machine, and about our own parts on it."""
    ours = {"kernels": native.description(), "memory": heap.description()} if base.device.type == "cpu" else {}
    device, dtype = str(base.device), str(base.dtype).removeprefix("torch.")
    return {**hardware(), "device": device, "dtype": dtype, **ours}


def _device(base: Base) -> str:
    if base.device.type == "cpu":
        threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
        return f"cpu, {threads} threads, {capability}; {native.description()}"
    return torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else str(base.device)


def _dtype(base: Base) -> str:
    name = str(base.dtype).removeprefix("torch.")
    if base.device.type != "cpu":
        return name
    block = native.block_of_products() or 1
    way = f", by whole numbers of 12 bits, {block} under one exponent" if block > 1 else ""
    return f"{name}; a product in bfloat16 takes {cpu_bf16_time():.2f} of the time that it takes in float32 here{way}"


def _rows(layout: Layout) -> str:
    if not layout.packing:
        return f"{layout.micro_batch_rows} at once, padded to the longest"
    shared = "; a beginning that they share is computed once" if layout.share_prefix else ""
    return f"packed, up to {layout.micro_batch_tokens} tokens at once{shared}"


def _operations(watch: Watch) -> list[str]:
    """A table: each operation, how often a forward pass calls it, what ran, and its worst difference from float32."""
    worst: dict[str, Finding] = {}
    for finding in watch.findings:
        known = worst.get(finding.operation)
        if known is None or finding.error / finding.tolerance > known.error / known.tolerance:
            worst[finding.operation] = finding
    width = max(map(len, watch.calls), default=0) + 2
    lines = [f"  {'operation':<{width}}{'calls':>5}  {'runs on':<19}  furthest from float32"]
    for name, calls in watch.calls.items():
        found = worst.get(name)
        runs_on = "C++ and PyTorch" if found is not None and found.native else "PyTorch"
        how = "not compared: too large"
        if found is not None:
            how = f"{found.error:.2%}, {found.part} (limit {found.tolerance:.1%})"
        lines.append(f"  {name:<{width}}{calls:>5}  {runs_on:<19}  {how}")
    return lines
