"""Weights in codes on an NVIDIA GPU: the kernel's bits, how fast it decodes, and what the products cost over bfloat16.

    python -m benchmarks.gpu_quant [--json] [--schemes nf4 int8] [--rounds 20]

First the kernel's result is compared, bit by bit, with the plain decoding on the CPU. Then, in bfloat16:

- ``decode_gbps``: bytes of codes, scales and decoded weights over the time; ``plain_gbps``: decoded by torch alone;
  ``copy_gbps``: the card's own speed, for a copy of half a GB (read and written).
- ``linear``, ``grad_input`` at so many tokens: the time of the product with codes over that with a bfloat16 weight.

Every call takes another copy of the weight, so that no cache holds it: layers of a model take turns likewise. Times are
the median of the rounds, between CUDA events, and hold what Python takes to launch where the GPU waits for it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from veneer.quant import QuantConfig, quantize, tensor

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (512, 2048, 4096)
COLD = 1 << 29  # bytes that the copies of a weight fill together: several times any cache
ODD_SHAPES = ((1, 1), (7, 9), (33, 130), (5, 576), (129, 1000), (3, 20, 72), (3, 7, 9), (300, 4104))


def milliseconds(call: Callable[[int], Any], copies: int, rounds: int) -> float:
    """The time of one ``call(i)``, when they are made for all copies in turn: the median of the rounds."""
    for i in range(min(3, copies)):  # compiles, and fills the allocator
        call(i)
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(copies):
            call(i)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / copies)
    return statistics.median(times)


def wrong_bits(schemes: list[str]) -> list[str]:
    """The cases in which the GPU's numbers are not those of the CPU: none, if all is well."""
    wrong = []
    for scheme, shape, size, twice in itertools.product(schemes, ODD_SHAPES, (32, 64, 4096), (True, False)):
        stored = quantize(torch.randn(shape), QuantConfig(scheme, size, twice))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            want, moved = stored.to(dtype=dtype).dequantize(), stored.to("cuda", dtype)
            pairs = [(moved.dequantize(), want), (moved.dequantize(slice(1, None)), want.view(-1, shape[-1])[1:])]
            if len(shape) == 3:
                pairs.append((moved.index(1).dequantize(), want[1]))
            if not all(torch.equal(got.cpu(), expected) for got, expected in pairs):
                wrong.append(f"{scheme} {shape} blocks of {size}, double_quant={twice}, {dtype}")
    return wrong


def measure(scheme: str, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    plain = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    one = quantize(plain, QuantConfig(scheme))
    copies = max(2, -(-COLD // plain.nbytes))
    codes, dense = [copy.deepcopy(one) for _ in range(copies)], [plain.clone() for _ in range(copies)]

    def gbps() -> float:
        time = milliseconds(lambda i: codes[i].dequantize(out=dense[i]), copies, rounds)
        return (one.nbytes + plain.nbytes) / time / 1e6

    def ratio(call: Callable[[int], torch.Tensor], reference: Callable[[int], torch.Tensor]) -> dict[str, float]:
        ours, theirs = milliseconds(call, copies, rounds), milliseconds(reference, copies, rounds)
        return {"ms": ours, "bf16_ms": theirs, "ratio": ours / theirs}

    result: dict[str, Any] = {"scheme": scheme, "shape": shape, "decode_gbps": gbps()}
    kernels, tensor.triton_kernels = tensor.triton_kernels, lambda device_type: None
    result["plain_gbps"] = gbps()
    tensor.triton_kernels = kernels
    for tokens in TOKENS:
        dy, x = (torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda") for width in shape)
        result[f"linear {tokens}"] = ratio(lambda i: codes[i].linear(x), lambda i: linear(x, dense[i]))  # noqa: B023 - called at once
        result[f"grad_input {tokens}"] = ratio(lambda i: codes[i].grad_input(dy), lambda i: dy @ dense[i])  # noqa: B023 - called at once
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--schemes", nargs="+", default=["nf4", "int8"], choices=["nf4", "fp4", "int4", "int8"])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU here: this benchmark measures nothing without one")
    if tensor.triton_kernels("cuda") is None:
        raise SystemExit("triton is not installed: there is no kernel to measure\nfix: pip install triton")
    if wrong := wrong_bits(options.schemes):
        raise SystemExit("the kernel's bits are wrong:\n" + "\n".join(wrong))
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    buffer = torch.empty(2, 1 << 29, dtype=torch.uint8, device="cuda")
    report["copy_gbps"] = buffer.nbytes / milliseconds(lambda i: buffer[0].copy_(buffer[1]), 4, options.rounds) / 1e6
    report["results"] = [measure(scheme, shape, options.rounds) for scheme in options.schemes for shape in SHAPES]
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['gpu']}, torch {report['torch']}: all bits right; a copy moves {report['copy_gbps']:.0f} GB/s")
    for row in report["results"]:
        print(f"\n{row['scheme']} {row['shape']}: {row['decode_gbps']:.0f} GB/s, torch alone {row['plain_gbps']:.0f}")
        for name, value in ((k, v) for k, v in row.items() if isinstance(v, dict)):
            print(f"  {name:15} {value['ms']:8.3f} ms, bfloat16 {value['bf16_ms']:8.3f}: {value['ratio']:.2f} times")


if __name__ == "__main__":
    main()
