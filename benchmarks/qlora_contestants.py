"""What runs in a process of its own for ``benchmarks.qlora``; see ``benchmarks.contestants`` for what they share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import contestants
from benchmarks.contestants import LORA, TRAIN, Curve
from benchmarks.memory import SHAPES, Shape
from benchmarks.processes import Job, Result, peak_rss_gb, serve


def veneer(job: Job, quantize: str | None) -> Result:
    """Veneer over a base in NF4 or over a plain one, loaded as ``load_base`` loads it."""
    import torch

    from veneer.adapters import attach
    from veneer.adapters.config import LoraConfig
    from veneer.models import load_base
    from veneer.train import train

    curve = Curve()
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # what the library sets up at its first product
    interpreter = peak_rss_gb()
    base = load_base(job["base"], dtype=job["dtype"], device="cpu", quantize=quantize)
    memory = {"interpreter_gb": interpreter, "loading_peak_gb": peak_rss_gb(), **_weights(base.module)}
    train(
        attach(base, LoraConfig(**LORA), seed=job["seed"]),
        job["rows"],
        eval_data=None,
        output_dir=Path(job["folder"]) / f"run-{quantize}",
        progress=curve,
        warmup_ratio=0.0,
        learning_rate=job["learning_rate"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        max_length=job["max_length"],
        micro_batch_tokens=job.get("micro_batch_tokens"),
        gradient_checkpointing=job["checkpointing"],
        seed=job["seed"],
        **TRAIN,
    )
    return {**curve.figures(), **memory}


def _weights(module: Any) -> dict[str, float]:
    """The bytes of all weights as they lie, and of the largest one in the dtype that it is read in."""
    from veneer.quant import QuantizedLinear

    held = {t.data_ptr(): t.nbytes for t in [*module.parameters(), *module.buffers()] if t is not None}
    sizes = [parameter.nbytes for parameter in module.parameters()]
    coded = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    sizes += [layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in coded]
    total = sum(held.values()) / 1e9
    return {"weights_gb": total, "quantised_gb": total, "largest_tensor_gb": max(sizes) / 1e9}


def bnb(job: Job) -> Result:
    """bitsandbytes' Linear4bit under PEFT's layers, in the loop that a person writes by hand."""
    memory: dict[str, float] = {}

    def measured(model: Any) -> Any:
        model = contestants.in_4_bits(job)(model)
        held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        memory["loading_peak_gb"] = peak_rss_gb()
        memory["weights_gb"] = (sum(held.values()) + _scales(model)) / 1e9
        return model

    return {**contestants.peft_loop(job, measured), **memory}


def _scales(model: Any) -> int:
    """Bytes of the scales, which bitsandbytes keeps beside its parameters."""
    states = [m.weight.quant_state for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    return sum(state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes for state in states)


def random_model(job: Job) -> Result:
    """Writes a random bfloat16 Llama of the job's shape, layer by layer, with the tokenizer of another model, and rows
    of text that are longer than the job's ``max_length``."""
    from veneer.models import load_tokenizer

    folder = Path(job["base"])
    write_random_llama(SHAPES[job["shape"]], folder, job["seed"])
    tokenizer = load_tokenizer(job["tokenizer"])
    tokenizer.save_pretrained(str(folder))
    Path(job["rows"]).write_text("".join(_long_rows(job["steps"], job["max_length"], tokenizer)), encoding="utf-8")
    return {}


def write_random_llama(shape: Shape, folder: Path, seed: int) -> None:
    """A Hugging Face folder of that shape, without a tokenizer: one safetensors file for each layer."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.memory_check import llama_config

    folder.mkdir(parents=True)
    config = llama_config(shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    placed: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        placed.update(dict.fromkeys(tensors, file))

    names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    for number in range(shape.layers):
        prefix = f"model.layers.{number}."
        layer = {f"{prefix}{name}.weight": random(*size) for name, size in zip(names, shape.linears, strict=True)}
        layer |= {f"{prefix}{name}_layernorm.weight": ones() for name in ("input", "post_attention")}
        write(f"layer-{number:03d}.safetensors", layer)
    write("embeddings.safetensors", {"model.embed_tokens.weight": random(shape.vocab, shape.hidden)})
    write("norm.safetensors", {"model.norm.weight": ones()})
    if not shape.tied:
        write("head.safetensors", {"lm_head.weight": random(shape.vocab, shape.hidden)})
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _long_rows(count: int, tokens: int, tokenizer: Any) -> list[str]:
    """``count`` JSON lines of plain text, each longer than ``tokens``, made of the demo's messages."""
    from veneer.demo import generate_rows

    lines: list[str] = []
    text = ""
    seed = 0
    while len(lines) < count:
        for row in generate_rows(50, seed=seed):
            text += "\n\n".join(message["content"] for message in row["messages"][1:]) + "\n\n"
            if len(text) > 2 * tokens and len(tokenizer(text)["input_ids"]) > tokens:
                lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                text = ""
        seed += 1
    return lines[:count]


def prepare(job: Job) -> Result:
    """As ``contestants.prepare``; a random model's rows are rendered without reading its weights."""
    if "shape" not in job:
        return contestants.prepare(job)
    from veneer.data.read import read
    from veneer.data.render import render
    from veneer.kernels.precision import resolve_dtype
    from veneer.models import load_tokenizer

    dataset = render(read(job["rows"]), load_tokenizer(job["base"]), max_length=job["max_length"])
    examples = [{"input_ids": [int(token) for token in dataset.row(i).input_ids]} for i in range(len(dataset))]
    (Path(job["folder"]) / "examples.json").write_text(json.dumps(examples))
    dtype = str(resolve_dtype(job["dtype"], "cpu")).removeprefix("torch.")
    return {"dtype": dtype, "rows": len(dataset), "batch": job["batch"]}


CONTESTANTS: dict[str, Callable[[Job], Result]] = {
    "prepare": prepare,
    "model": random_model,
    "qlora": functools.partial(veneer, quantize="nf4"),
    "lora16": functools.partial(veneer, quantize=None),
    "bnb": bnb,
}

if __name__ == "__main__":
    serve(CONTESTANTS)
