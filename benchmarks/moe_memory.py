"""What adapters on all experts of one MoE layer cost in memory: grouped low-rank products against a dense update.

    python -m benchmarks.moe_memory [--tokens 256] [--rank 16] [--dtype bfloat16]

The layer is shaped as those of Qwen3-30B-A3B (128 experts, width 2048, inner width 768, 8 experts for each token), the
factors of both stacks are float32. One forward and backward over each:

- grouped: Veneer, a pair of small products for every expert's rows;
- dense delta: ``s B A`` of all experts, added to a copy of the stack, as PEFT did for ``target_parameters`` to 0.20 and
  does with several adapters. The limit is a share of this one;
- PEFT, as it is installed: from 0.21 on it makes the sum in one operation, in the layer's dtype.

Counted are the bytes that torch allocates: the factors, and the most at a time during the step, the layer's activations
among them, its weights not. What a library keeps for itself (oneDNN its compiled products) is not torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

EXPERTS, WIDTH, INNER, CHOICES = 128, 2048, 768, 8
LIMIT = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the layer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype, rank = getattr(torch, arguments.dtype), arguments.rank
    numbers = EXPERTS * rank * ((WIDTH + 2 * INNER) + (INNER + WIDTH))
    print(f"{EXPERTS} experts of {WIDTH} x {INNER} in {arguments.dtype}, top {CHOICES}, {arguments.tokens} tokens")
    print(f"rank {rank}: {numbers / 1e6:.1f} M numbers; they and their gradients are {8 * numbers / 1e6:.0f} MB")
    total = {}
    for name, adapt in (("grouped", grouped), ("dense delta", dense_delta), ("PEFT", peft_parameters)):
        total[name] = measure(adapt, rank, arguments.tokens, dtype)
        print(f"{name}: {total[name] / 1e6:.0f} MB")
    print(f"grouped / PEFT: {100 * total['grouped'] / total['PEFT']:.1f} %")
    ratio = total["grouped"] / total["dense delta"]
    print(f"grouped / dense delta: {100 * ratio:.1f} % (limit {100 * LIMIT:.0f} %)")
    if ratio >= LIMIT:
        raise SystemExit(1)


def measure(adapt: Callable[[nn.Module, int], nn.Module], rank: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the factors and of one step."""
    layer, step = make_layer(dtype), make_step(tokens, dtype)
    adapted: list[nn.Module] = []
    _, held = allocated(lambda: adapted.append(adapt(layer, rank)))
    peak, _ = allocated(lambda: step(adapted[0]))
    return held + peak


def make_layer(dtype: torch.dtype) -> nn.Module:
    """A module whose ``experts`` are the layer's; what the weights are does not matter here."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config: Any = Qwen3MoeConfig(
        num_experts=EXPERTS, hidden_size=WIDTH, moe_intermediate_size=INNER, num_experts_per_tok=CHOICES
    )
    config._experts_implementation = "grouped_mm"  # transformers' default
    layer = nn.Module()
    with torch.device("meta"):
        layer.experts = Qwen3MoeExperts(config)
    layer.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for parameter in layer.parameters():
        parameter.fill_(0.01)
    return layer


def make_step(tokens: int, dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """One forward and backward over random routes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    index = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOICES).indices
    shares = torch.full((tokens, CHOICES), 1 / CHOICES, dtype=dtype)

    def step(layer: Any) -> None:
        out: Tensor = layer.experts(x.clone().requires_grad_(), index, shares)
        torch.autograd.backward(out.sum())

    return step


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch held beyond those before the call: the most at a time, and what is left after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where memory is given back
            peak = max(peak, held)
    return peak, held


def grouped(layer: nn.Module, rank: int) -> nn.Module:
    """Our adapter on both stacks."""
    from veneer.adapters import LoraConfig, attach

    return attach(layer, LoraConfig(r=rank, target_modules=[], experts="all", init_lora_weights=False), seed=0).module


def dense_delta(layer: nn.Module, rank: int) -> nn.Module:
    """Both stacks as ``W + s B A``."""
    result = nn.Module()
    result.experts = DenseDelta(layer.experts, rank)  # type: ignore[arg-type]  # an attribute of a module is untyped
    return result


class DenseDelta(nn.Module):
    """Experts whose stacks ``[E, out, in]`` are made anew in every forward."""

    def __init__(self, experts: nn.Module, rank: int) -> None:
        super().__init__()
        self.experts = experts
        shapes = {name: stack.shape for name, stack in experts.named_parameters()}
        self.A = nn.ParameterDict({name: torch.zeros(e, rank, i) for name, (e, _, i) in shapes.items()})
        self.B = nn.ParameterDict({name: torch.zeros(o, rank, e) for name, (e, o, _) in shapes.items()})

    def forward(self, *arguments: Tensor) -> Any:
        stacks = {
            name: stack + (2.0 * torch.einsum("ore,eri->eoi", self.B[name], self.A[name])).to(stack.dtype)
            for name, stack in self.experts.named_parameters()
        }
        return torch.func.functional_call(self.experts, stacks, arguments)


def peft_parameters(layer: nn.Module, rank: int) -> nn.Module:
    """PEFT's adapter on both stacks."""
    import peft

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=rank, target_modules=[], target_parameters=names, init_lora_weights=False)
    result: nn.Module = peft.get_peft_model(layer, config).base_model.model
    return result


if __name__ == "__main__":
    main()
