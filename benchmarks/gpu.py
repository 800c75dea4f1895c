"""Training and decoding on an NVIDIA GPU: what the kernels give, what the card can do, and how near we are to it.

    python -m benchmarks.gpu [--json FILE] [--write FILE.md] [--only checks,limits,train,peers,decode] [--dry]

``checks`` compares every kernel with its reference in float64, on random inputs of odd shapes. ``limits`` measures the
card's products and its memory. ``train`` takes random weights of true shapes, made on the card: tokens per second of
whole steps (forward, backward, AdamW) over packed rows of one document, memory at the most, and the share of the card's
products that 4 FLOP a weight and token make up (the head's are counted, the adapter's and attention's are not).
``peers`` does the same with the loop that a person writes over transformers and PEFT, in this same process, in turn.
``decode`` counts new tokens per second, beside how often the weights could be read in that time. ``--dry`` goes through
all of it with toy shapes on the CPU: it shows that the script runs, and measures nothing worth knowing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_checks import SIZES, checks
from benchmarks.memory import SHAPES, Shape
from benchmarks.memory_check import batch_of, llama_config

PARTS = ("checks", "limits", "train", "peers", "decode")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TOY = Shape("toy", 64, 2, 4, 2, 128, 500)
STEPS, WARM_UP = 6, 2
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A training run: a shape, how its base is stored, what its adapter has, tokens of a step."""

    name: str
    shape: Shape
    quantize: str = "none"
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: int = 4096
    level: str = "full"  # what is computed twice: none, mlp, full


def cases(dry: bool) -> list[Case]:
    """What is trained; the first one is what the others are ratios to."""
    eight, seventy = (TOY, TOY) if dry else (SHAPES["Llama-3-8B"], SHAPES["Llama-3-70B"])
    few, many = (64, 128) if dry else (2048, 4096)
    return [
        Case("8B, bf16", eight, tokens=many, level="mlp"),
        Case("8B, bf16, every layer twice", eight, tokens=many),
        Case("8B, bf16, DoRA", eight, adapter={"use_dora": True}, tokens=many, level="mlp"),
        Case("8B, bf16, dropout 0.05", eight, adapter={"lora_dropout": 0.05}, tokens=many, level="mlp"),
        Case("8B, bf16, rank 64", eight, adapter={"r": 64}, tokens=many, level="mlp"),
        Case("8B, NF4", eight, "nf4", tokens=many, level="mlp"),
        Case("8B, NF4, 2,048 tokens, every layer twice", eight, "nf4", tokens=few),
        Case("70B, NF4, 2,048 tokens, every layer twice", seventy, "nf4", tokens=few),
    ]


class Card:
    """The device, its clock and its memory; the CPU in a dry run."""

    def __init__(self, dry: bool) -> None:
        self.device = "cpu" if dry else "cuda"
        self.name = "a dry run on the CPU" if dry else torch.cuda.get_device_name()

    def wait(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, call: Callable[[], object], rounds: int) -> list[float]:
        """Of each call, waited for."""
        found = []
        for _ in range(rounds):
            began = self.wait()
            call()
            found.append(self.wait() - began)
        return found

    def clear(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0.0


# --- limits ----------------------------------------------------------------------------------------------------------


def limits(card: Card, dry: bool) -> Row:
    """The card's products in bfloat16, FLOP a second, and what it copies, bytes read and written a second."""
    size = 256 if dry else 8192
    a, b = (torch.randn(size, size, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    buffer = torch.empty(2, 1 << (20 if dry else 30), dtype=torch.uint8, device=card.device)
    products = min(card.seconds(lambda: a @ b, 12)[2:])
    copied = min(card.seconds(lambda: buffer[0].copy_(buffer[1]), 12)[2:])
    return {"flops": 2 * size**3 / products, "bytes_per_second": buffer.nbytes / copied}


# --- training --------------------------------------------------------------------------------------------------------


def random_model(shape: Shape, quantize: str, device: str) -> Any:
    """A random model of that shape on the card, in bfloat16; its layers are put into codes one by one."""
    from transformers import LlamaForCausalLM

    from veneer.quant import QuantConfig, QuantizedLinear

    config = llama_config(shape, max_position_embeddings=8192)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            made = made.fill_(1.0) if "norm" in name else made.normal_(0, 0.02)
            setattr(module, key, nn.Parameter(made, requires_grad=False))
        if isinstance(module, nn.Linear) and quantize != "none" and name != "lm_head":
            model.set_submodule(name, QuantizedLinear.from_linear(module, QuantConfig(quantize), name))
    if shape.tied:
        model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    model.config.use_cache = False
    return model.train()


def train(card: Card, case: Case, flops: float) -> Row:
    """Whole steps of Veneer: what ``train_step`` does, without the data and the files around it."""
    from veneer.adapters import LoraConfig, attach
    from veneer.models import fuse
    from veneer.train.activations import gradient_checkpointing
    from veneer.train.optimizer import FlatAdamW
    from veneer.train.sft import sft

    model = random_model(case.shape, case.quantize, card.device)
    fuse(model)
    adapted = attach(model, LoraConfig(**{**LORA, **case.adapter}), seed=0)
    optimizer = FlatAdamW(adapted.named_parameters())
    batch = batch_of(case.shape, case.tokens).to(card.device)

    def step() -> None:
        optimizer.zero_grad()
        sft(model, batch).loss_sum.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.finish_gradient(float(case.tokens), 1.0)
        optimizer.step(1e-4)

    with gradient_checkpointing(model, case.level):  # type: ignore[arg-type]  # one of its levels
        return _timed(card, case, step, flops)


def peer(card: Card, case: Case, flops: float) -> Row:
    """The loop that a person writes: transformers' model with flash attention, PEFT's layers, fused AdamW."""
    from peft import LoraConfig, get_peft_model

    model = random_model(case.shape, "none", card.device)
    model.set_attn_implementation("sdpa")
    if case.level != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**LORA, **case.adapter}))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=card.device == "cuda")
    ids = torch.randint(case.shape.vocab, (1, case.tokens), device=card.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(card.device, torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return _timed(card, case, step, flops)


def _timed(card: Card, case: Case, step: Callable[[], None], flops: float) -> Row:
    seconds = statistics.median(card.seconds(step, STEPS)[WARM_UP:])
    speed = case.tokens / seconds
    shape = case.shape
    weights = shape.layers * sum(out * width for out, width in shape.linears) + shape.vocab * shape.hidden
    share = 4 * weights * speed / flops
    return {"case": case.name, "tokens_per_second": speed, "share_of_products": share, "peak_gb": card.peak_gb()}


def decode(card: Card, shape: Shape, rows: int, bytes_per_second: float, new: int) -> Row:
    """New tokens a second of all rows, and the share of the time in which the weights could be read once a token."""
    from veneer.generate.decoder import Decoder, inference
    from veneer.models import fuse

    model = random_model(shape, "none", card.device).eval()
    fuse(model)
    prompts = [torch.randint(shape.vocab, (32,)).tolist() for _ in range(rows)]
    with inference(model):
        decoder = Decoder(model)
        logits = decoder.read(prompts, new + 8)
        tokens = logits.argmax(-1)
        for _ in range(4):
            tokens = decoder.step(tokens).argmax(-1)
        seconds = card.seconds(lambda: [decoder.step(tokens) for _ in range(new)], 1)[0] / new
    held = {p.data_ptr(): p.nbytes for n, p in model.named_parameters() if shape.tied or "embed" not in n}
    reading = sum(held.values()) / bytes_per_second * 2  # a copy moves every byte twice
    return {"rows": rows, "tokens_per_second": rows / seconds, "share_of_bandwidth": reading / seconds}


# --- report ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept_going(found: list[Row], name: str, card: Card) -> Iterator[None]:
    """A case that fails is told with its error, and the next one begins with an empty card."""
    card.clear()
    try:
        yield
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        found.append({"case": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
    card.clear()


def measure(card: Card, parts: list[str], dry: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"card": card.name, "torch": torch.__version__, "limits": limits(card, dry)}
    if "checks" in parts:
        report["checks"] = checks(card.device, SIZES[1:2] if dry else SIZES)
    flops = report["limits"]["flops"]
    plan = cases(dry)
    for part, function, chosen in (("train", train, plan), ("peers", peer, plan[:2])):
        found: list[Row] = []
        for case in chosen if part in parts else []:
            with kept_going(found, case.name, card):
                found.append(function(card, case, flops))
        report[part] = found
    report["decode"] = []
    for rows in (1, 32) if "decode" in parts else ():
        with kept_going(report["decode"], f"{rows} rows", card):
            limit = report["limits"]["bytes_per_second"]
            report["decode"].append(decode(card, plan[0].shape, rows, limit, 4 if dry else 32))
    return report


def markdown(report: dict[str, Any]) -> str:
    limit = report["limits"]
    lines = [
        f"# On {report['card']}",
        "",
        f"torch {report['torch']}. Products in bfloat16: {limit['flops'] / 1e12:.0f} TFLOP/s; a copy moves "
        f"{limit['bytes_per_second'] / 1e9:.0f} GB/s.",
        "",
        "| | tokens/s | share of the limit | peak GB |",
        "|---|---:|---:|---:|",
    ]
    for part, who in (("train", ""), ("peers", ", transformers + PEFT"), ("decode", "")):
        for row in report[part]:
            name = row.get("case") or f"decoding, rows: {row['rows']}"
            if "error" in row:
                lines.append(f"| {name}{who} | {row['error']} | | |")
                continue
            share = row.get("share_of_products", row.get("share_of_bandwidth"))
            peak = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
            lines.append(f"| {name}{who} | {row['tokens_per_second']:,.0f} | {share:.1%} | {peak} |")
    wrong = [f"{row['operation']} in {row['dtype']}" for row in report.get("checks", []) if not row["right"]]
    verdict = f"**Wrong**: {', '.join(wrong)}." if wrong else "Every operation is within its limit of float64."
    return "\n".join([*lines, "", *([verdict] if "checks" in report else [])])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there, in Markdown")
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="toy shapes on the CPU")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown part '{unknown[0]}'; use some of {', '.join(PARTS)}")
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit(
            "no NVIDIA GPU here: this benchmark measures nothing without one\nfix: --dry shows that it runs"
        )
    torch.manual_seed(0)
    report = measure(Card(options.dry), parts, options.dry)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    table = markdown(report)
    if options.write:
        options.write.write_text(table + "\n", encoding="utf-8")
    print(table)
    if any(not row["right"] for row in report.get("checks", [])):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
