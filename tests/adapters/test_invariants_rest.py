"""The invariants of an adapter from the eleventh on: matching, bad files, batches, codes, memory, experts, tokens."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import (
    IDS,
    KINDS,
    NF4,
    PLAIN,
    base,
    cases,
    config_of,
    decoded,
    frozen,
    gradients,
    linears,
    logits,
    stir,
    stirred,
)
from kinds import train as train_steps
from safetensors.torch import load_file, save_file
from tiny_models import MOE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.adapters import LoraConfig, attach, load_adapter, merge
from veneer.adapters.experts import LoraExperts
from veneer.adapters.init_data import initialise_from
from veneer.adapters.slots import SLOTS
from veneer.errors import AdapterError
from veneer.quant import QuantConfig, QuantizedLinear
from veneer.train.optimizer import FlatAdamW
from veneer.train.rank_budget import RankBudget

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

# float32, the same formula summed in another order; the logits are up to 5
NEAR = {"rtol": 1e-4, "atol": 2e-5}
SHOWS = 0.1  # what a change of the adapter is to move the logits by at least


# 11. Exactly what is named is changed; a second adapter does not nest; a name that matches nothing is an error

WAYS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a list": (
        {"target_modules": ["q_proj", "0.mlp.up_proj"]},
        {"0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"},
    ),
    "an expression": ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, {"1.mlp.up_proj", "1.mlp.down_proj"}),
    "all but some": (
        {"target_modules": "all-linear", "exclude_modules": r".*(mlp|k_proj|v_proj|o_proj).*"},
        {"0.self_attn.q_proj", "1.self_attn.q_proj"},
    ),
    "some layers": ({"target_modules": ["v_proj"], "layers_to_transform": [1]}, {"1.self_attn.v_proj"}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "adalora": {"adalora_config": {"target_r": 2}},
    "lora_fa": {"use_lora_fa": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_11_exactly_what_is_named_is_changed(way: str, variant: str, tmp_path: Path) -> None:
    named, expected = WAYS[way]
    adapted = attach(base("lora"), LoraConfig(r=4, **VARIANTS[variant], **named), seed=0)
    assert {path.removeprefix("model.layers.") for path in adapted.linears()} == expected
    train_steps(adapted)
    own, merged = base("lora").state_dict(), merge(adapted).state_dict()
    changed = {key for key in own if not torch.equal(own[key], merged[key])}
    assert changed == {f"model.layers.{path}.weight" for path in expected}


@cases()
def test_11_a_second_adapter_does_not_nest_and_an_entry_for_nothing_is_an_error(name: str, stored: str) -> None:
    adapted = stirred(name, stored)
    first, keys = logits(adapted.module), adapted.state().keys()
    adapted.add(LoraConfig(r=2, init_lora_weights=False), "second", seed=1)
    adapted.use("second")
    assert not torch.equal(logits(adapted.module), first)
    slots = [slot for slot in adapted.module.modules() if isinstance(slot, SLOTS)]
    assert not any(isinstance(inner, SLOTS) for slot in slots for inner in slot.base_layer.modules())
    types = [type(module) for module in adapted.module.modules()]
    with pytest.raises(AdapterError, match="'nothing_proj'"):
        adapted.add(config_of(name, target_modules=["nothing_proj"]), "third")
    assert [type(module) for module in adapted.module.modules()] == types
    assert adapted.state("default").keys() == keys
    adapted.use("default")
    assert torch.equal(logits(adapted.module), first)


# 12. A file with a wrong, a missing or a further key is refused, and nothing is changed

Damage = Callable[[dict[str, Tensor], str], Any]
DAMAGES: dict[str, Damage] = {
    "missing": lambda tensors, key: tensors.pop(key),
    "renamed": lambda tensors, key: tensors.update({key.replace("model.model", "model.modle"): tensors.pop(key)}),
    "wrong prefix": lambda tensors, key: tensors.update({key.removeprefix("base_model."): tensors.pop(key)}),
    "extra": lambda tensors, key: tensors.update({f"{key}s": tensors[key].clone()}),
    "other shape": lambda tensors, key: tensors.update({key: tensors[key][1:].clone()}),
}


@cases(lambda kind: kind.stored != (NF4,), only=PLAIN)  # a file of LoftQ is a plain one
def test_12_no_wrong_key_is_passed_over(name: str, stored: str, tmp_path: Path) -> None:
    folder = stirred(name, stored).save(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    module = base(name, stored)
    before, types = logits(module), [type(part) for part in module.modules()]
    ends: dict[str, str] = {}  # one key of each sort
    for key in whole:
        ends.setdefault(key.rpartition("layers.")[0] + ".".join(key.split(".")[-2:]), key)
    for key in ends.values():
        for damage in DAMAGES.values():
            tensors = dict(whole)
            damage(tensors, key)
            save_file(tensors, file)
            with pytest.raises(AdapterError):
                load_adapter(module, folder)
    assert [type(part) for part in module.modules()] == types
    assert torch.equal(logits(module), before)
    save_file(whole, file)
    assert not torch.equal(logits(load_adapter(module, folder).module), before)


# 13. Weighted merges: adapters in use add up, and one merged by its name is that one alone


@cases()
def test_13_adapters_in_use_are_merged_as_their_sum_and_one_by_its_name(name: str, stored: str) -> None:
    adapted = stirred(name, stored)
    alone = logits(adapted.module)
    adapted.add(LoraConfig(r=2, init_lora_weights=False), "second", seed=1)
    adapted.use("default", "second")
    both = logits(adapted.module)
    assert (both - alone).abs().max() > SHOWS
    near = {"rtol": 1e-4, "atol": 5e-4}  # the two updates are larger than the weights, and so is their rounding
    torch.testing.assert_close(logits(merge(adapted)), both, **near)
    torch.testing.assert_close(logits(merge(adapted, name="default")), alone, **near)
    adapted.use("second")
    torch.testing.assert_close(logits(merge(adapted)), logits(adapted.module), **near)


# 14. A row of a mixed batch is what it is alone with its own adapter, and one without an adapter is the base's


@cases()
def test_14_each_row_of_a_mixed_batch_is_that_of_its_adapter_alone(name: str, stored: str) -> None:
    adapted = stirred(name, stored)
    adapted.add(LoraConfig(r=2, init_lora_weights=False), "second", seed=1)
    names = ["default", "__base__", "second", "second", "default"]
    ids = IDS[[0, 0, 0, 1, 1]]
    with adapted.mixed(names):
        mixed = logits(adapted.module, ids)
        with adapted.disabled():
            off = logits(adapted.module, ids)
    with adapted.disabled():
        alone = {"__base__": logits(adapted.module, ids)}
    torch.testing.assert_close(off, alone["__base__"], **NEAR)
    for one in ("second", "default"):
        adapted.use(one)
        alone[one] = logits(adapted.module, ids)
        assert (alone[one] - alone["__base__"]).abs().max() > SHOWS
    torch.testing.assert_close(mixed, torch.stack([alone[one][i] for i, one in enumerate(names)]), **NEAR)
    assert torch.equal(logits(adapted.module, ids), alone["default"])  # all is as before


# 15. Over codes everything is what it is over the numbers that they stand for, and the codes stay


@pytest.mark.parametrize("training", [False, True])
@cases(lambda kind: NF4 in kind.stored and not kind.settings.get("loftq_config"), only=NF4)
def test_15_over_codes_logits_and_gradients_are_those_over_the_decoded_weights(
    name: str, stored: str, training: bool
) -> None:
    codes = base(name, stored).state_dict()
    adapted = stirred(name, stored)
    adapted.module.train(training)
    got, own, kept = logits(adapted.module), gradients(adapted), frozen(adapted)
    assert any("codes" in key or "absmax" in key for key in codes)
    assert all(torch.equal(kept[key], value) for key, value in codes.items())
    decoded(adapted.module)
    assert not any(isinstance(layer, QuantizedLinear) for layer in adapted.module.modules())
    torch.testing.assert_close(got, logits(adapted.module), **NEAR)
    for key, gradient in gradients(adapted).items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-3, atol=2e-6, msg=key)
    torch.testing.assert_close(logits(base(name, stored)), logits(decoded(base(name, stored))), **NEAR)
    assert (logits(base(name, stored)) - logits(base(name))).abs().max() > SHOWS, "codes that lose nothing"


# 16. Memory: what is kept for the backward, and nothing of the size of the weight

OUT, IN, ROWS, RANK = 37, 53, 200, 2


class Allocations(TorchDispatchMode):
    """The numbers of every tensor that an operation makes, views of others apart."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        made = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        self.numbers += [t.numel() for t in made if t.untyped_storage().data_ptr() not in held]
        return out


def one_linear(name: str, stored: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A linear ``[37, 53]`` with an adapter of the kind, away from its start; and the linear as it was."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, OUT, bias=False)).requires_grad_(False)
    original = plain[0].weight.clone()
    if stored == NF4:
        plain[0] = QuantizedLinear.from_linear(plain[0], QuantConfig("nf4"))  # type: ignore[arg-type]
    plain.to(dtype)
    no_patterns = {"rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "target_modules": ["0"]}
    config = config_of(name, r=RANK, **no_patterns)
    adapted = attach(plain, config, seed=0, originals=lambda paths, visit: visit("0", original))
    if adapted.waiting:
        rows = list(torch.randn(3, 8, IN, generator=torch.Generator().manual_seed(1)).to(dtype))
        initialise_from(adapted, rows, lambda x: adapted.module(x).square().mean())
    stir(adapted)
    layer = linears(adapted)[0]
    return layer, layer.base_layer


@cases(lambda kind: kind.model == "llama" and not kind.settings.get("modules_to_save"))
def test_16_no_more_is_kept_than_the_input_once_and_what_the_kind_needs(name: str, stored: str) -> None:
    layer, _ = one_linear(name, stored, torch.bfloat16)
    adapter: Any = layer.adapters["default"]  # type: ignore[index]  # untyped attributes
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in adapter.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(ROWS, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    k = 8 * math.ceil(len(adapter.factors()[0]) / 8)  # products in 16 bits take ranks in eights
    activations = (
        2 * ROWS * ((0 if adapter_is_frozen(adapter) else IN) + k + (OUT if adapter.magnitude is not None else 0))
    )
    factors = (2 + 2 * 4) * k * (IN + OUT) + 3 * 4 * OUT  # cast, and what the variant made of them; rows' scales
    assert 2 * ROWS * k <= sum(kept.values()) <= activations + factors
    assert factors < 2 * ROWS * IN, "one more copy of the input would show"
    y.sum().backward()


def adapter_is_frozen(adapter: Any) -> bool:
    return not isinstance(adapter.A, nn.Parameter)


@cases(lambda kind: kind.model == "llama" and not kind.settings.get("modules_to_save"))
def test_16_nothing_of_the_size_of_the_weight_is_made(name: str, stored: str) -> None:
    layer, alone = one_linear(name, stored)
    x = torch.randn(5, IN, requires_grad=True)
    found = []
    for module in (layer, alone):
        module(x)  # what is computed once, of the frozen weight
        if module is layer:
            for parameter in layer.adapters.parameters():  # the factors have moved: DoRA's norm is computed again
                torch.autograd.graph.increment_version(parameter)
        with Allocations() as seen:
            module(x).sum().backward()
        found.append([number for number in seen.numbers if number >= OUT * IN // 2])
        assert seen.numbers
    # Codes are decoded to be multiplied with: once forward and once backward, and once more for a norm of DoRA's.
    norm = 1 if KINDS[name].settings.get("use_dora") else 0
    decodings = 0 if stored != NF4 else len(found[1]) // 2
    assert len(found[0]) <= len(found[1]) + norm * decodings
    assert bool(found[0]) == (stored == NF4)
    with Allocations() as dense:
        _ = layer.adapters["default"].delta()  # type: ignore[index, operator]  # untyped attributes
    assert max(dense.numbers) == OUT * IN, "a dense update would show"


@pytest.mark.parametrize("name", MOE)
def test_16_nothing_of_the_size_of_a_stack_of_experts_is_made(name: str) -> None:
    adapted = attach(MOE[name](), LoraConfig(r=2, target_modules=[], experts="all"), seed=0)
    stir(adapted)
    experts = next(module for module in adapted.module.modules() if isinstance(module, LoraExperts))
    x, index, shares = torch.randn(6, 32, requires_grad=True), torch.tensor([[0, 1], [2, 3]] * 3), torch.rand(6, 2)
    with Allocations() as seen:
        experts(x, index, shares).sum().backward()
    stack = min(
        adapter.count * adapter.A.shape[2] * adapter.B.shape[1] for adapter in experts.stacks("default").values()
    )
    assert max(seen.numbers) < stack


# 17. Experts in PEFT's file: lora_A expert-slowest, lora_B expert-fastest, the first stack deepest


@pytest.mark.parametrize("name", MOE)
def test_17_each_experts_part_of_the_file_is_a_linear_of_its_own(name: str, tmp_path: Path) -> None:
    adapted = attach(MOE[name](), LoraConfig(r=2, lora_alpha=6, target_modules=[], experts="all"), seed=0)
    stir(adapted, 0.2)
    expected = logits(adapted.module)
    tensors = load_file(adapted.save(tmp_path / "a") / "adapter_model.safetensors")

    def with_deltas(fastest: bool) -> Tensor:
        module = MOE[name]()
        for path in {key.removeprefix("base_model.model.").partition(".experts.")[0] for key in tensors}:
            experts: Any = module.get_submodule(f"{path}.experts")
            for nested, stack in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
                A, B = (tensors[f"base_model.model.{path}.experts.{nested}lora_{x}.weight"] for x in "AB")
                for expert in range(4):
                    columns = slice(expert, None, 4) if fastest else slice(2 * expert, 2 * expert + 2)
                    delta = 3.0 * B[:, columns] @ A[2 * expert : 2 * expert + 2]
                    with torch.no_grad():
                        getattr(experts, stack)[expert] += delta.t() if experts.is_transposed else delta
        return logits(module)

    torch.testing.assert_close(with_deltas(fastest=True), expected, **NEAR)
    assert (with_deltas(fastest=False) - expected).abs().max() > SHOWS


# 18. AdaLoRA keeps exactly its budget, also where nothing is to be dropped


@pytest.mark.parametrize("target", [1, 3, 4])
@cases(lambda kind: "adalora_config" in kind.settings)
def test_18_exactly_the_budget_is_kept(name: str, stored: str, target: int) -> None:
    settings = {"target_r": target, "tinit": 2, "tfinal": 2, "deltaT": 2}
    adapted = attach(base(name, stored), config_of(name, adalora_config=settings), seed=0)
    optimizer = FlatAdamW(adapted.named_parameters())
    config: Any = adapted.configs["default"].adalora_config
    hook = RankBudget(config, list(adapted.linears().values()), optimizer, 10)
    counts = []
    for step in range(1, 11):
        optimizer.zero_grad()
        out = adapted.module(IDS).logits[:, :-1]
        nn.functional.cross_entropy(out.flatten(0, 1), IDS[:, 1:].flatten()).backward()
        hook.before_step(step)
        optimizer.step(1e-2)
        hook.after_step(step)
        counts.append(sum(int(a.E.count_nonzero()) for a in adapted.linears().values() if a.E is not None))
        if hook.schedule.reallocates(step):
            assert counts[-1] == hook.schedule.budget(step)
    assert (counts[0], counts[-1]) == (4 * 14, target * 14)
    adapted.module.double()  # trimming changes the order of the sums: no rounding of float32 on top
    after = logits(adapted.module)
    adapted.trim()
    assert sum(a.r for a in adapted.linears().values()) >= target * 14
    torch.testing.assert_close(logits(adapted.module), after, rtol=0, atol=1e-6)


# 19. Trained tokens: no other row moves, a tied head reads the same rows, a head keeps its bias


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_19_no_other_row_moves_and_a_tied_head_reads_the_same_rows(variant: str, tied: bool) -> None:
    kind = "tokens" if tied else "lora"
    own: Any = base(kind)
    adapted = attach(base(kind), LoraConfig(r=4, trainable_token_indices=[3, 1, 5], **VARIANTS[variant]), seed=0)
    train_steps(adapted)
    module, merged = adapted.module, merge(adapted)
    rows = dict(adapted.named_parameters())["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    others = [token for token in range(64) if token not in (1, 3, 5)]
    before, h = own.model.embed_tokens.weight, torch.randn(7, 32)
    for embedding in (module.model.embed_tokens, merged.model.embed_tokens):  # type: ignore[union-attr]
        table = embedding(torch.arange(64))  # type: ignore[operator]
        assert torch.equal(table[others], before[others])
        assert torch.equal(table[[3, 1, 5]], rows)
        assert (table[[3, 1, 5]] - before[[3, 1, 5]]).abs().amax(1).gt(1e-3).all()
    for head in (module.lm_head, merged.lm_head):
        expected = h @ own.lm_head.weight.t()
        if tied:
            expected[:, [3, 1, 5]] = h @ rows.t()
        torch.testing.assert_close(head(h), expected, rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied  # type: ignore[union-attr]


def test_19_a_head_with_trained_rows_keeps_its_bias(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    def new() -> Any:
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = PhiForCausalLM(PhiConfig(vocab_size=64, max_position_embeddings=32, **size)).eval()
        with torch.no_grad():
            model.lm_head.bias.normal_()
        return model

    tokens = {"embed_tokens": [5, 1], "lm_head": [1, 3, 7]}
    adapted = attach(new(), LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=tokens), seed=0)
    before = logits(adapted.module)
    train_steps(adapted)
    expected = logits(adapted.module)
    assert (expected - before).abs().max() > 1e-3
    merged: Any = merge(adapted)
    assert torch.equal(merged.lm_head.bias, new().lm_head.bias)
    assert merged.lm_head.bias.abs().max() > 1
    torch.testing.assert_close(logits(merged), expected, **NEAR)
    h, own = torch.randn(5, 32), new().lm_head
    others = [token for token in range(64) if token not in (1, 3, 7)]
    torch.testing.assert_close(adapted.module.lm_head(h)[:, others], own(h)[:, others], rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    assert torch.equal(logits(load_adapter(new(), adapted.save(tmp_path / "a")).module), expected)


# 20. Adapters of this release are read by the next

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAVED = sorted((FIXTURES / "adapters").glob("*/*/adapter_config.json"))


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_adapters", FIXTURES / "make_adapters.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("config", SAVED, ids=lambda config: "-".join(config.parts[-3:-1]))
def test_20_adapters_of_this_release_are_read_by_the_next(config: Path) -> None:
    make, folder = maker(), config.parent
    module = make.base(folder.name)
    before = make.logits(module)
    expected = load_file(folder.parent / make.LOGITS)[folder.name]
    torch.testing.assert_close(make.logits(load_adapter(module, folder).module), expected, rtol=1e-3, atol=1e-4)
    assert (before - expected).abs().max() > 1e-2


def test_20_there_is_one_of_every_kind_of_this_version() -> None:
    from veneer import __version__

    make = maker()
    assert {config.parent.name for config in SAVED if config.parts[-3] == __version__} == set(make.KINDS)
    assert sum(file.stat().st_size for file in (FIXTURES / "adapters" / __version__).rglob("*")) < 300_000
