"""The adapted layers alone: values against formulas, gradients in double precision, what is kept, how they start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from veneer.adapters import LoraEmbedding, LoraLinear, SavedModule, TokenEmbedding, TokenHead
from veneer.adapters.init import init_embedding, init_linear
from veneer.adapters.layers import LoraAdapter
from veneer.adapters.tokens import head_with_rows, head_with_rows_reference
from veneer.kernels.dropout import Dropout


class Conv1D(nn.Module):
    """GPT-2's linear, as transformers defines it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class ScaledEmbedding(nn.Embedding):
    """Gemma's embedding: a factor on the output."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def randomise(adapter, std=0.5):
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=std)


def frozen(module, dtype=torch.float32):
    return module.to(dtype).requires_grad_(False)


def linear_layer(kind, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    base = frozen(Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=bias), dtype)
    layer = LoraLinear(base, transposed=kind == "conv1d")
    return layer, (base.weight.t() if kind == "conv1d" else base.weight)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_one_adapter_is_the_papers_formula_and_its_gradients_are_exact(kind):
    layer, weight = linear_layer(kind)
    adapter = layer.add("a", 3, 0.7, 0.0)
    assert adapter.A.dtype == torch.float64
    randomise(adapter)
    layer.active = ("a",)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = x @ (weight + 0.7 * adapter.B @ adapter.A).t() + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

    def call(x, A, B):
        return torch.func.functional_call(layer, {"adapters.a.A": A, "adapters.a.B": B}, (x,))

    A, B = (p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B))
    assert torch.autograd.gradcheck(call, (x, A, B))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_several_adapters_with_dropout_have_exact_gradients_and_add_up(kind):
    layer, weight = linear_layer(kind)
    for name, r, dropout in (("a", 3, 0.5), ("b", 2, 0.0)):
        randomise(layer.add(name, r, 0.7, dropout))
    layer.active = ("a", "b")
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    a, b = layer.adapters["a"], layer.adapters["b"]
    layer.eval()
    delta = 0.7 * (a.B @ a.A + b.B @ b.A)
    torch.testing.assert_close(layer(x), x @ (weight + delta).t() + layer.bias, rtol=1e-12, atol=1e-12)
    layer.train()

    def call(x, *factors):
        torch.manual_seed(3)  # the same dropped elements in every call
        names = ("adapters.a.A", "adapters.a.B", "adapters.b.A", "adapters.b.B")
        return torch.func.functional_call(layer, dict(zip(names, factors)), (x,))

    factors = [p.detach().clone().requires_grad_() for p in layer.adapters.parameters()]
    assert torch.autograd.gradcheck(call, (x, *factors))


def test_dropout_acts_on_the_adapters_input_only_and_in_training_only():
    layer, weight = linear_layer("linear", torch.float32)
    adapter = layer.add("a", 3, 0.7, 0.5)
    randomise(adapter)
    layer.active = ("a",)
    x = torch.randn(50, 5)
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = Dropout.drawn(0.5)(x)
    expected = F.linear(x, weight, layer.bias) + 0.7 * (dropped @ adapter.A.t() @ adapter.B.t())
    torch.testing.assert_close(y, expected)
    assert layer.active_factors()[0].dropout == 0.5
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (weight + 0.7 * adapter.B @ adapter.A).t() + layer.bias)
    assert layer.active_factors()[0].dropout == 0.0


@pytest.mark.parametrize("embedding", [nn.Embedding, ScaledEmbedding])
def test_an_embeddings_adapter_is_the_formula_and_its_gradients_are_exact(embedding):
    torch.manual_seed(0)
    base = frozen(embedding(9, 4), torch.float64)
    layer = LoraEmbedding(base)
    adapter = layer.add("a", 3, 0.7, 0.3)
    randomise(adapter)
    layer.active = ("a",)
    ids = torch.tensor([[1, 2, 2], [8, 0, 1]])
    scale = getattr(base, "embed_scale", torch.tensor(1.0)).double()
    table = (base.weight + 0.7 * (adapter.B @ adapter.A).t()) * scale
    torch.testing.assert_close(layer(ids), table[ids], rtol=1e-12, atol=1e-12)

    def call(A, B):
        return torch.func.functional_call(layer, {"adapters.a.A": A, "adapters.a.B": B}, (ids,))

    assert torch.autograd.gradcheck(call, tuple(p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B)))


@pytest.mark.parametrize("embedding", [nn.Embedding, ScaledEmbedding])
def test_trained_rows_replace_the_embeddings_and_their_gradients_are_exact(embedding):
    torch.manual_seed(0)
    base = frozen(embedding(9, 4), torch.float64)
    layer = TokenEmbedding(base)
    adapter = layer.add("a", (7, 2, 5))
    ids = torch.tensor([[1, 2, 2], [7, 0, 1]])
    layer.active = ("a",)
    assert torch.equal(layer(ids), base(ids))  # rows start as the base's
    randomise(adapter)
    table = base.weight.clone()
    table[[7, 2, 5]] = adapter.rows.detach()
    scale = getattr(base, "embed_scale", torch.tensor(1.0)).double()
    torch.testing.assert_close(layer(ids), table[ids] * scale, rtol=0, atol=0)
    assert torch.equal(layer(ids)[0, 0], base(ids)[0, 0])  # an untouched row, bit for bit

    def call(rows):
        return torch.func.functional_call(layer, {"adapters.a.rows": rows}, (ids,))

    rows = adapter.rows.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (rows,))
    (grad,) = torch.autograd.grad(call(rows).sum(), rows)
    assert torch.equal(grad[2], torch.zeros(4, dtype=torch.float64))  # token 5 does not occur
    assert torch.equal(grad[1], 2 * scale * torch.ones(4, dtype=torch.float64))  # token 2 occurs twice


@pytest.mark.parametrize("bias", [False, True])
def test_a_heads_trained_rows_match_a_full_copy_and_their_gradients_are_exact(bias):
    torch.manual_seed(0)
    head = frozen(nn.Linear(4, 9, bias=bias), torch.float64)
    h = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    rows, ids = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([7, 2, 5])
    args = (h, head.weight, head.bias, rows, ids)
    torch.testing.assert_close(head_with_rows(*args), head_with_rows_reference(*args), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda h, rows: head_with_rows(h, head.weight, head.bias, rows, ids), (h, rows))


def test_a_head_with_trained_rows_copies_no_matrix_of_the_vocabulary():
    """Budget: nothing but the logits has the vocabulary as a side, in either direction."""
    vocabulary, width, tokens = 5000, 8, 3
    head = frozen(nn.Linear(width, vocabulary, bias=False))
    layer = TokenHead(head)
    layer.add("a", (7, 2))
    layer.active = ("a",)
    h = torch.randn(tokens, width, requires_grad=True)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != head.weight.data_ptr():
                    made.append(t.untyped_storage().nbytes() // t.element_size())
            return out

    with Watch():
        layer(h).sum().backward()
    assert made
    assert max(made) <= tokens * vocabulary < width * vocabulary


def test_a_bfloat16_layer_keeps_its_input_once_and_in_its_own_dtype():
    base = frozen(nn.Linear(64, 32, bias=False), torch.bfloat16)
    layer = LoraLinear(base)
    adapter = layer.add("a", 8, 1.0, 0.0)
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    randomise(adapter)
    layer.active = ("a",)
    x = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = (tensor.dtype, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    rows = [(dtype, n) for dtype, n in kept.values() if n >= 100 * 8]
    assert sorted(n for _, n in rows) == sorted([100 * 64, 100 * 8])  # x and h; the base's weight is referred to
    assert all(dtype == torch.bfloat16 for dtype, _ in rows)
    y.sum().backward()
    assert adapter.A.grad.dtype == torch.float32


def test_casting_the_model_leaves_the_trained_tensors_in_float32():
    linear, embedding, rows, saved = (
        LoraLinear(frozen(nn.Linear(4, 4))),
        LoraEmbedding(frozen(nn.Embedding(5, 4))),
        TokenEmbedding(frozen(nn.Embedding(5, 4))),
        SavedModule(frozen(nn.Linear(4, 4))),
    )
    linear.add("a", 2, 1.0, 0.0)
    embedding.add("a", 2, 1.0, 0.0)
    rows.add("a", (1,))
    saved.add("a")
    for layer in (linear, embedding, rows, saved):
        layer.to(torch.bfloat16)
        assert layer.base_layer.weight.dtype == torch.bfloat16
        assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}


def test_a_base_layer_with_a_hook_or_a_forward_of_its_own_is_called():
    layer, _ = linear_layer("linear", torch.float32)
    randomise(layer.add("a", 2, 1.0, 0.0))
    layer.active = ("a",)
    x = torch.randn(3, 5)
    plain = layer(x)
    hook = layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(layer(x), plain + 1)
    hook.remove()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = LoraLinear(frozen(Doubled(5, 7)))
    doubled.add("a", 2, 1.0, 0.0)
    doubled.active = ("a",)
    torch.testing.assert_close(doubled(x), doubled.base_layer(x))


def test_autocast_gives_the_dtype_that_the_base_gives():
    layer, _ = linear_layer("linear", torch.float32)
    randomise(layer.add("a", 2, 1.0, 0.0))
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        base = layer(x)
        layer.active = ("a",)
        adapted = layer(x)
    assert base.dtype == adapted.dtype == torch.bfloat16
    layer.zero_grad()
    adapted.float().sum().backward()
    assert layer.adapters["a"].A.grad.dtype == torch.float32


def test_a_saved_module_answers_with_the_acting_copy():
    base = frozen(nn.Linear(4, 4), torch.bfloat16)
    layer = SavedModule(base)
    trained = layer.add("a").requires_grad_(True)
    with torch.no_grad():
        trained.weight.add_(1)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert torch.equal(layer(x), base(x))
    assert layer.weight is base.weight
    layer.active = ("a",)
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), F.linear(x, trained.weight.bfloat16(), trained.bias.bfloat16()))
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, trained.weight.bfloat16())
    layer(x).sum().backward()
    assert trained.weight.grad.dtype == torch.float32
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


# How adapters start


def start(method, r=6, seed=5, key="k", width_in=40, width_out=30):
    adapter = LoraAdapter(width_in, width_out, r, 1.0, 0.0, torch.empty(0))
    init_linear(adapter.A.data, adapter.B.data, method, seed, key)
    return adapter.A.detach(), adapter.B.detach()


def test_the_default_start_is_kaiming_and_zero():
    A, B = start(True, width_in=400)
    bound = 1 / math.sqrt(400)
    assert not B.any()
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.95 * bound
    assert abs(float(A.std()) - bound / math.sqrt(3)) < 0.05 * bound


def test_the_gaussian_start_has_a_deviation_of_one_over_r():
    A, B = start("gaussian", r=8, width_in=4000)
    assert not B.any()
    assert abs(float(A.std()) - 1 / 8) < 0.003


def test_the_orthogonal_start_has_two_factors_and_no_update():
    A, B = start("orthogonal")
    assert A.abs().min() > 0
    assert B.abs().min() > 0
    assert (B @ A).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3


def test_without_a_start_the_update_is_not_zero():
    A, B = start(False)
    assert (B @ A).abs().max() > 1e-3


def test_an_embedding_starts_with_zero_A_and_normal_B():
    A, B = torch.ones(3, 50), torch.empty(1000, 3)
    init_embedding(A, B, True, 0, "k")
    assert not A.any()
    assert abs(float(B.std()) - 1) < 0.05
    init_embedding(A, B, False, 0, "k")
    assert A.any()


def test_the_start_depends_on_seed_and_key_alone():
    torch.manual_seed(0)
    first = start(True)
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(first[0], start(True)[0])
    assert not torch.equal(first[0], start(True, seed=6)[0])
    assert not torch.equal(first[0], start(True, key="other")[0])
