"""DoRA against its definition, and against PEFT where PEFT computes the definition."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.adapters import LoraConfig, attach, load_adapter, merge, row_norm
from veneer.adapters.layers import LoraLinear
from veneer.errors import AdapterError
from veneer.kernels.dropout import Dropout
from veneer.quant import QuantConfig, QuantizedLinear
from veneer.train.optimizer import FlatAdamW

CONFIG = LoraConfig(r=4, lora_alpha=8, use_dora=True)


def dense(layer: LoraLinear, name: str = "default") -> torch.Tensor:
    """``W + s B A`` in float64, the way the paper has it."""
    weight = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.dequantize()
    weight = (weight.t() if layer.transposed else weight).double()
    adapter = layer.adapters[name]
    return weight + adapter.scaling * (adapter.B.double() @ adapter.A.double())


def stir(adapted, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def layers(module: nn.Module) -> list[LoraLinear]:
    return [m for m in module.modules() if isinstance(m, LoraLinear)]


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_a_fresh_adapter_is_the_base(make, request, ids, run):
    module = request.getfixturevalue(make)()
    before = run(module, ids)
    adapted = attach(module, CONFIG, seed=0)
    torch.testing.assert_close(run(adapted.module, ids), before, rtol=0, atol=1e-6)
    stir(adapted)
    assert (run(adapted.module, ids) - before).abs().max() > 1e-2
    with adapted.disabled():
        assert torch.equal(run(adapted.module, ids), before)


@pytest.mark.parametrize("stored", ["plain", "codes", "conv1d"])
def test_the_norm_is_that_of_the_dense_rows(stored, llama, gpt2):
    if stored == "conv1d":
        adapted = attach(gpt2(), CONFIG, seed=0)
    else:
        base = nn.ModuleDict({"a": nn.Linear(64, 96), "b": nn.Linear(96, 64, bias=False)})
        if stored == "codes":
            base = nn.ModuleDict({k: QuantizedLinear.from_linear(m, QuantConfig("nf4")) for k, m in base.items()})
        adapted = attach(base, CONFIG, seed=0)
    stir(adapted)
    for layer in layers(adapted.module):
        norm = row_norm.row_norm(layer.adapters["default"], layer)
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), dense(layer).norm(dim=1), rtol=2e-6, atol=0)


def test_gradients_are_those_of_the_paper_with_the_norm_held_constant():
    torch.manual_seed(0)
    linear = nn.Linear(10, 7)
    adapted = attach(nn.Sequential(copy.deepcopy(linear)), CONFIG, seed=0)
    stir(adapted)
    (layer,) = layers(adapted.module)
    adapter = layer.adapters["default"]
    A, B, m = (t.detach().clone().requires_grad_() for t in (adapter.A, adapter.B, adapter.magnitude))
    x, x2 = (torch.randn(5, 10).requires_grad_() for _ in range(2))
    x2.data.copy_(x)
    whole = linear.weight.detach() + adapter.scaling * (B @ A)
    expected = x2 @ (m / whole.norm(dim=1).detach() * whole.t()) + linear.bias.detach()
    got = adapted.module(x)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(5, 7)
    got.backward(upstream)
    expected.backward(upstream)
    for ours, theirs in ((adapter.A, A), (adapter.B, B), (adapter.magnitude, m), (x, x2)):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("optimizer", ["flat", "torch"])
def test_the_norm_is_computed_once_per_optimizer_step_and_not_in_evaluation(optimizer, llama, ids, monkeypatch):
    adapted = attach(llama(), CONFIG, seed=0)
    calls = counted(monkeypatch)
    count = len(layers(adapted.module))
    flat = FlatAdamW(adapted.named_parameters())
    step = flat if optimizer == "flat" else torch.optim.AdamW(adapted.parameters(), lr=0.01)
    adapted.module(ids)
    calls.clear()
    for expected in (count, 2 * count):
        for _ in range(3):  # micro-batches
            adapted.module(ids).logits.square().mean().backward()
        step.step(0.01) if optimizer == "flat" else step.step()
        adapted.module(ids)
        adapted.module(ids)
        assert len(calls) == expected
    adapted.module.eval()
    adapted.module(ids)
    assert len(calls) == 2 * count
    for layer in layers(adapted.module):
        torch.testing.assert_close(
            row_norm.row_norm(layer.adapters["default"], layer).double(), dense(layer).norm(dim=1), rtol=2e-6, atol=0
        )


def counted(monkeypatch) -> list[int]:
    """Grows by one with every norm that is computed."""
    calls: list[int] = []
    original = row_norm._row_norm
    monkeypatch.setattr(row_norm, "_row_norm", lambda *args: (calls.append(1), original(*args))[1])
    return calls


def data_step(parameters) -> None:
    """An optimizer that nobody knows of: it writes around autograd."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-0.3)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1).step,
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True).step,
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True).step,
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.3, fused=True).step,
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True).step,
    ".data": lambda p: lambda: data_step(p),
}


@pytest.mark.parametrize("read_at_once", [True, False], ids=["cpu", "as on an accelerator"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_a_loop_of_ones_own_the_norm_follows_every_optimizer(optimizer, read_at_once, monkeypatch):
    monkeypatch.setattr(row_norm, "_is_read_at_once", lambda device: read_at_once)
    torch.manual_seed(0)
    adapted = attach(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 7, bias=False)), CONFIG, seed=0)
    x = torch.randn(5, 12)
    step = OPTIMIZERS[optimizer](adapted.parameters())
    stale = [row_norm.row_norm(layer.adapters["default"], layer) for layer in layers(adapted.module)]
    for _ in range(2):
        adapted.module(x).square().sum().backward()
        step()
        out = x
        for layer, old in zip(layers(adapted.module), stale):
            norm = dense(layer).norm(dim=1)
            g = layer.adapters["default"].magnitude.double() / norm
            out = g * (out.double() @ dense(layer).t())
            out = out if layer.bias is None else out + layer.bias
            assert ((old - norm) / norm).abs().max() > 1e-2, "a stale norm would not show"
        torch.testing.assert_close(adapted.module(x).double(), out, rtol=1e-5, atol=1e-5)


def test_writes_between_two_evaluations_are_seen(llama, ids, run, monkeypatch):
    adapted, other = (attach(llama(), CONFIG, seed=seed) for seed in (0, 1))
    stir(other, 0.5)
    expected, calls = run(other.module, ids), counted(monkeypatch)
    start = {key: tensor.clone() for key, tensor in adapted.module.state_dict().items()}
    writes = {
        "data": lambda: [p.data.copy_(q) for p, q in zip(adapted.parameters(), other.parameters())],
        "state dict": lambda: adapted.module.load_state_dict(other.module.state_dict()),
        "assigned": lambda: adapted.module.load_state_dict(copy.deepcopy(other.module.state_dict()), assign=True),
        "load_state": lambda: adapted.load_state(other.state()),
    }
    for name, write in writes.items():
        assert (run(adapted.module, ids) - expected).abs().max() > 1e-2
        write()
        torch.testing.assert_close(run(adapted.module, ids), expected, rtol=0, atol=1e-5, msg=name)
        adapted.module.load_state_dict(start)
        run(adapted.module, ids)
    calls.clear()
    for _ in range(3):
        run(adapted.module, ids)
    assert not calls


def test_one_number_that_changes_its_sign_is_seen():
    adapted = attach(nn.Sequential(nn.Linear(300, 200)), CONFIG, seed=0)
    stir(adapted)
    (layer,) = layers(adapted.module)
    adapter = layer.adapters["default"]
    for write in (
        lambda: adapter.A.data.neg_(),
        lambda: adapter.B.data[3, 1:2].neg_(),
        lambda: adapter.A.data.copy_(adapter.A.data.flip(1)),
        lambda: setattr(adapter.B, "data", adapter.B.data * 1.001),
    ):
        before = row_norm.row_norm(adapter, layer).double()
        write()
        norm = dense(layer).norm(dim=1)
        assert (before - norm).abs().max() > 1e-4
        torch.testing.assert_close(row_norm.row_norm(adapter, layer).double(), norm, rtol=2e-6, atol=0)


@pytest.mark.parametrize("counts", [True, False])
def test_on_an_accelerator_a_backward_costs_a_norm_unless_writes_are_counted(counts, llama, ids, monkeypatch):
    monkeypatch.setattr(row_norm, "_is_read_at_once", lambda device: False)
    adapted, calls = attach(llama(), CONFIG, seed=0), counted(monkeypatch)
    count = len(layers(adapted.module))
    with row_norm.writes_are_counted() if counts else contextlib.nullcontext():
        for _ in range(3):  # micro-batches
            adapted.module(ids).logits.square().mean().backward()
        assert len(calls) == (0 if counts else 2 * count)
    calls.clear()
    adapted.module.train()
    adapted.module(ids)
    adapted.module(ids)
    assert len(calls) == count  # once for the other mode


def test_under_autocast_the_norm_is_that_of_float32():
    torch.manual_seed(0)
    adapted = attach(nn.Sequential(nn.Linear(64, 48)), CONFIG, seed=0)
    stir(adapted)
    (layer,) = layers(adapted.module)
    with torch.autocast("cpu", torch.bfloat16):
        adapted.module(torch.randn(3, 64))
        norm = row_norm.row_norm(layer.adapters["default"], layer)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), dense(layer).norm(dim=1), rtol=2e-6, atol=0)


def test_a_norm_first_computed_in_inference_mode_serves_training():
    adapted = attach(nn.Sequential(nn.Linear(6, 5)), CONFIG, seed=0)
    stir(adapted)
    x = torch.randn(3, 6)
    with torch.inference_mode():
        expected = adapted.module(x)
    got = adapted.module(x)
    torch.testing.assert_close(got, expected.clone())
    got.sum().backward()


def test_under_dropout_the_base_sees_the_whole_input_once(monkeypatch):
    """PEFT multiplies the dropped input with the whole weight a second time, and scales that."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 7)
    adapted = attach(
        nn.Sequential(copy.deepcopy(linear)), LoraConfig(r=4, lora_alpha=8, use_dora=True, lora_dropout=0.5), seed=0
    ).module
    layer = layers(adapted)[0]
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.B.normal_()
        adapter.magnitude.mul_(1.5)
    x = torch.randn(4, 10)
    adapted.train()
    torch.manual_seed(5)
    got = adapted(x)
    torch.manual_seed(5)
    dropped = Dropout.drawn(0.5)(x)
    g = adapter.magnitude / dense(layer).norm(dim=1).float()
    plain = x @ linear.weight.t() + adapter.scaling * dropped @ adapter.A.t() @ adapter.B.t()
    torch.testing.assert_close(got, g * plain + linear.bias)


def test_three_training_steps_are_pefts(llama, ids, run):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings)).eval()
    adapted = attach(llama(), LoraConfig(**settings), seed=0)
    ours = dict(adapted.named_parameters())
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            own = (
                key.replace(".default", "").removesuffix(".weight")
                if "magnitude" in key
                else key.replace(".default", "")
            )
            with torch.no_grad():
                ours[own].copy_(parameter)
    for module in (theirs, adapted.module):
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            out = module(ids).logits[:, :-1]
            nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
    torch.testing.assert_close(run(adapted.module, ids), run(theirs, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_merged_is_unmerged_alone_and_beside_a_second_adapter(make, request, ids, run):
    adapted = attach(request.getfixturevalue(make)(), CONFIG, seed=0)
    stir(adapted)
    torch.testing.assert_close(run(merge(adapted), ids), run(adapted.module, ids), rtol=0, atol=2e-5)
    adapted.add(LoraConfig(r=2, init_lora_weights=False), "more", seed=1)
    alone = run(adapted.module, ids)
    adapted.use("default", "more")
    both = run(adapted.module, ids)
    assert (both - alone).abs().max() > 1e-3
    torch.testing.assert_close(run(merge(adapted), ids), both, rtol=0, atol=2e-5)


def test_saved_and_loaded_it_is_the_same_also_with_the_keys_of_other_programs(llama, ids, run, tmp_path):
    adapted = attach(llama(), CONFIG, seed=0)
    stir(adapted)
    adapted.save(tmp_path / "a")
    expected = run(adapted.module, ids)
    assert torch.equal(run(load_adapter(llama(), tmp_path / "a").module, ids), expected)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {k + (".weight" if "magnitude" in k else ""): v for k, v in load_file(file).items()}
    assert any(key.endswith("lora_magnitude_vector.weight") for key in tensors)
    save_file(tensors, file)
    assert torch.equal(run(load_adapter(llama(), tmp_path / "a").module, ids), expected)


class LargestTensors(TorchDispatchMode):
    """The shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = func.namespace == "aten" and func._schema.name in ("aten::t", "aten::transpose", "aten::detach")
        if isinstance(result, torch.Tensor) and not is_view:
            self.shapes.add(tuple(result.shape))
        return result


def test_nothing_of_the_size_of_the_weight_is_built(llama):
    adapted = attach(nn.Sequential(nn.Linear(40, 30, bias=False)), CONFIG, seed=0)
    stir(adapted)
    layers(adapted.module)[0].square_norm()  # once, of a frozen weight, in pieces
    x = torch.randn(5, 40, requires_grad=True)
    with LargestTensors() as seen:
        adapted.module(x).sum().backward()
    assert (5, 30) in seen.shapes
    assert not {(40, 30), (30, 40), (40, 40), (30, 30)} & seen.shapes


def test_an_embedding_is_refused_before_anything_is_changed(llama, ids, run):
    module = llama()
    with pytest.raises(AdapterError, match="DoRA scales the rows") as caught:
        attach(module, LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "embed_tokens"]))
    assert caught.value.where == "model.embed_tokens"
    assert not layers(module)


def test_a_row_of_zeros_stays_finite():
    linear = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
    adapted = attach(nn.Sequential(linear), LoraConfig(r=2, use_dora=True), seed=0)
    adapted.module(torch.randn(4, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters())
