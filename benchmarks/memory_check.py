"""Every line of the memory's formula, measured on a small model that trains one step.

What lies there between steps is read off the tensors. What a step needs on top is counted as it is allocated:
:class:`LiveBytes` sees every tensor that an operation returns and when its storage is freed, so buffers inside of one
operation of torch's own are not in it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import Settings, Shape

DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Measured:
    """Bytes, named as in :class:`benchmarks.memory.Budget`."""

    codes: int
    scales: int
    embeddings: int
    norms: int
    adapter: int
    gradient: int
    moments: int
    kept: int  # when the forward is done: kept, tables and final_norm of the budget
    working: int  # the most that was allocated at a time beyond what lies there between steps


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes of all storages that operations make while it is open, and frees them with their owners."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = _storage(leaf)
            key = storage._cdata
            if key in given or key in self._known:  # a view, or written in place
                continue
            self._known.add(key)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def measure(shape: Shape, run: Settings, seed: int = 0) -> Measured:
    """Builds a random model of ``shape`` and trains it for a step, on PyTorch's operations, as a GPU would.

    Args:
        run: 4 bits are NF4.
    """
    from veneer.adapters import LoraConfig, LoraLinear, attach
    from veneer.kernels import attention, native
    from veneer.models import fuse
    from veneer.models.head import hidden_states, settle_documents
    from veneer.train.activations import gradient_checkpointing
    from veneer.train.optimizer import FlatAdamW
    from veneer.train.sft import sft

    torch.manual_seed(seed)
    model = _model(shape, run)
    quantised = _quantise(model, run) if run.bits == 4 else []
    fuse(model)
    adapted = attach(model, LoraConfig(r=run.rank, lora_alpha=2 * run.rank), seed=seed)
    optim = "adamw" if run.moment_bits == 32 else "adamw_8bit"
    optimizer = FlatAdamW(adapted.named_parameters(), optim=optim)
    batch = batch_of(shape, run.tokens, run.trained)
    model.train()

    def loss() -> Tensor:
        return sft(model, batch).loss_sum

    with native.left_out():
        for layer in quantised:
            layer.weight.dequantize()  # a table for decoding is made once, and stays

    with native.left_out(), gradient_checkpointing(model, "full" if run.checkpointing else "none"):
        settle_documents(model)
        attention._mask.cache_clear()  # else the masks of an earlier measurement would not be counted
        with LiveBytes() as forward:
            states = hidden_states(model, batch)
        kept = forward.live - states.nbytes
        del states  # and with it the graph
        attention._mask.cache_clear()
        with LiveBytes() as counted:
            loss().backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.finish_gradient(1.0, 1.0)
    optimizer.step(1e-4)
    embeddings = {p.data_ptr(): p.nbytes for n, p in model.named_parameters() if "embed" in n or "lm_head" in n}
    weights = [layer.weight for layer in quantised]
    codes = sum(weight.codes.nbytes for weight in weights) or sum(
        cast(Tensor, layer.weight).nbytes for layer in model.modules() if isinstance(layer, LoraLinear)
    )
    return Measured(
        codes=codes,
        scales=sum(weight.nbytes - weight.codes.nbytes for weight in weights),
        embeddings=sum(embeddings.values()),
        norms=sum(p.nbytes for n, p in model.named_parameters() if "norm" in n),
        adapter=optimizer.flat.nbytes,
        gradient=optimizer.grad.nbytes,
        moments=sum(tensor.nbytes for name, tensor in optimizer.state().items() if name != "steps"),
        kept=kept,
        working=counted.peak,
    )


def llama_config(shape: Shape, **more: Any) -> Any:
    """transformers' configuration of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        **more,
    )


def _model(shape: Shape, run: Settings) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(shape)).to(DTYPES[run.compute_bytes]).requires_grad_(False)


def _quantise(model: Any, run: Settings) -> list[Any]:
    """Puts every linear but the head into codes; returns them."""
    from veneer.quant import QuantConfig, QuantizedLinear

    config = QuantConfig("nf4", block_size=run.block_size, double_quant=run.double_quant)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    found = []
    for name, linear in linears:
        layer = QuantizedLinear.from_linear(linear, config, name)
        model.set_submodule(name, layer)
        found.append(layer)
    return found


def batch_of(shape: Shape, tokens: int, count: int | None = None) -> Any:
    """One packed row of one document, of which the last ``count`` tokens are trained; None: all."""
    import numpy as np

    from veneer.data.dataset import Example
    from veneer.data.pack import collate_packed

    trained = np.zeros(tokens + 1, dtype=bool)
    trained[-(tokens if count is None else count) :] = True
    ids = np.random.default_rng(0).integers(0, shape.vocab, tokens + 1).astype(np.int32)
    batch = collate_packed([Example(ids, trained, "row")])
    batch.input_ids, batch.position_ids = batch.input_ids[:, :-1], batch.position_ids[:, :-1]
    batch.targets, batch.document_lengths = batch.targets[:, :-1], [tokens]
    return batch
