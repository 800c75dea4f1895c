"""The measurements of ``benchmarks.quantisation``: errors of weights and outputs, and perplexities.

Names: ``N`` held-out rows, ``P`` positions whose layer inputs are kept.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import LORA
from benchmarks.storages import PLAIN, Storage
from veneer.models import Base
from veneer.quant import QuantConfig, QuantizedLinear, quantize


def load(job: dict[str, Any]) -> Base:
    """The plain base."""
    from veneer.models import load_base

    return load_base(job["base"], dtype=job["dtype"], device="cpu")


def stored_as(base: str) -> str | None:
    """What most weights of a GGUF file are stored in; None where the base is no GGUF file."""
    from gguf import GGUFReader

    from veneer.models.bundled import ALIASES, find_bundled

    path = find_bundled(base) if base in ALIASES else Path(base)
    if path is None or path.suffix != ".gguf":
        return None
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in GGUFReader(str(path)).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return sizes.most_common(1)[0][0]


def config_of(storage: Storage) -> QuantConfig:
    return QuantConfig(storage.scheme, storage.block_size, storage.double_quant)


def linears(base: Base) -> dict[str, nn.Linear]:
    """Every linear but the output head, by its path."""
    module: Any = base.module
    head = module.get_output_embeddings()
    return {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear) and m is not head}


def put_into_codes(base: Base, storage: Storage) -> None:
    """Swaps every linear but the head; the benchmark's yardstick INT4 goes the same way as the others."""
    for path, linear in linears(base).items():
        base.module.set_submodule(path, QuantizedLinear.from_linear(linear, config_of(storage), path))


def gaussian_errors(storages: Sequence[Storage], shape: tuple[int, int], seed: int) -> list[float]:
    """The relative error of a weight drawn from a normal distribution, for each storage."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return [relative(quantize(weight, config_of(s)).dequantize() - weight, weight) for s in storages]


def relative(error: Tensor, value: Tensor) -> float:
    """The root mean square of ``error`` over that of ``value``."""
    return float(torch.linalg.vector_norm(error.float()) / torch.linalg.vector_norm(value.float()))


@torch.no_grad()
def layer_inputs(base: Base, rows: str, positions: int, max_length: int) -> dict[str, Tensor]:
    """What each linear reads while the base reads rows of text.

    Args:
        rows: a file of rows; as many of its first ones are read as give enough positions.
        positions: ``P``, spread evenly over those rows.

    Returns:
        ``[P, in]`` float32 by path; layers that read the same have the same tensor.
    """
    from veneer.data.pack import collate_packed
    from veneer.data.read import read
    from veneer.data.render import render
    from veneer.models.head import hidden_states

    dataset = render(read(rows, limit=max(1, positions // 16)), base.tokenizer, max_length=max_length)
    examples = [dataset.row(index) for index in range(len(dataset))]
    total = sum(len(example) for example in examples)
    places = torch.linspace(0, total - 1, min(positions, total)).long()
    found: dict[str, Tensor] = {}
    last: list[Tensor] = []  # the input of the layer before, and what was kept of it

    def hook(path: str) -> Any:
        def keep(_module: nn.Module, inputs: Any) -> None:
            x: Tensor = inputs[0]
            if not last or x is not last[0]:
                last[:] = [x, x.reshape(-1, x.shape[-1])[places].float()]
            found[path] = last[1]

        return keep

    handles = [linear.register_forward_pre_hook(hook(path)) for path, linear in linears(base).items()]
    try:
        hidden_states(base.module, collate_packed(examples))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def layer_errors(base: Base, inputs: dict[str, Tensor], storage: Storage) -> dict[str, float]:
    """The errors of all linears of a base.

    Returns:
        ``weight_error``, of all weights together; ``output_error``, the root mean square over the layers of each
        layer's own relative error; ``bits``, of a parameter.
    """
    sums = [0.0, 0.0]
    outputs = []
    stored = weights = 0
    for path, linear in linears(base).items():
        weight = linear.weight.float()
        coded = quantize(linear.weight, config_of(storage), path, dtype=torch.float32)
        error = coded.dequantize() - weight
        sums[0] += float(error.square().sum())
        sums[1] += float(weight.square().sum())
        outputs.append(relative(inputs[path] @ error.t(), inputs[path] @ weight.t()))
        stored += coded.nbytes
        weights += weight.numel()
    return {
        "weight_error": math.sqrt(sums[0] / sums[1]),
        "output_error": math.sqrt(sum(error**2 for error in outputs) / len(outputs)),
        "bits": 8 * stored / weights,
    }


def perplexities(job: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """Trains an adapter over the base, and measures held-out answers with the adapter off and on.

    Returns:
        ``nll_before``, ``nll_after`` (``[N]`` nats) and ``tokens`` (``[N]``) of the held-out answers, the perplexities
        ``before`` and ``after``, the last training loss and the number of rows trained on.
    """
    from veneer.adapters import LoraConfig, attach
    from veneer.evaluate import evaluate
    from veneer.train import train

    base = load(job)
    bits = {}
    if storage == PLAIN:
        bits["bits"] = 8.0 * base.dtype.itemsize
    else:
        put_into_codes(base, storage)
    adapted = attach(base, LoraConfig(**LORA), seed=job["seed"])
    loss = math.nan
    if job["steps"]:
        result = train(
            adapted,
            job["rows"],
            eval_data=None,
            output_dir=Path(job["folder"]) / storage.name.replace(" ", "-").replace(",", ""),
            learning_rate=job["learning_rate"],
            max_steps=job["steps"],
            per_device_train_batch_size=job["batch"],
            max_length=job["max_length"],
            seed=job["seed"],
        )
        loss = result.metrics["train_loss"]
    answers = evaluate(adapted, job["held_out"], metrics=["perplexity"], resamples=1).rows
    fitting = [row for row in answers if row.answer_nll is not None]
    after, before = [row.answer_nll for row in fitting], [row.base_answer_nll for row in fitting]
    tokens = [row.answer_tokens for row in fitting]
    return {
        **bits,
        "nll_before": before,
        "nll_after": after,
        "tokens": tokens,
        "before": _perplexity(before, tokens),
        "after": _perplexity(after, tokens),
        "train_loss": loss,
        "rows": job["steps"] * job["batch"],
    }


def _perplexity(nll: Sequence[float | None], tokens: Sequence[int | None]) -> float:
    return math.exp(math.fsum(n for n in nll if n is not None) / sum(t for t in tokens if t is not None))


def gaps(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """How much higher the perplexity is than the plain base's, before and after: ``[gap, low, high]`` each."""
    from veneer.evaluate.bootstrap import bootstrap_perplexity

    found: dict[str, Any] = {}
    for when in ("before", "after"):
        estimate = bootstrap_perplexity(row[f"nll_{when}"], row["tokens"], plain[f"nll_{when}"]).difference
        assert estimate is not None
        found[f"gap_{when}"] = [estimate.value, estimate.low, estimate.high]
    return found
