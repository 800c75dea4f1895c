"""Rows of one batch with different adapters: on every architecture, fused or not, generating, and what is refused.

That each kind of adapter gives each row what it gives it alone is invariant 14, in ``test_invariants_rest.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach
from veneer.adapters.mixed import is_mixed
from veneer.errors import AdapterError, UsageError
from veneer.generate import generate
from veneer.models import load_base
from veneer.models.fused import fuse

IDS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
NAMES = ["b", "__base__", "a", "b"]
NEAR = {"rtol": 1e-8, "atol": 1e-8}  # float64, other sizes of products
# Their all-linear changes weights that another module reads.
READ = {"jamba": "mamba.dt_proj", "mamba": "mixer.dt_proj"}


def two(module: nn.Module, **settings: object) -> AdaptedModel:
    """Adapters "a" and "b" whose updates show."""
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # its grouped products know no float64
    config = LoraConfig(r=2, init_lora_weights=False, **settings)  # type: ignore[arg-type]  # settings of a config
    adapted = attach(module.eval().double(), config, name="a", seed=1)
    adapted.add(config, "b", seed=2)
    return adapted


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor = IDS) -> Tensor:
    found: Tensor = module(input_ids=ids).logits
    return found


def alone(adapted: AdaptedModel, names: list[str], ids: Tensor = IDS) -> Tensor:
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with adapted.disabled():
                rows.append(logits(adapted.module, ids[i : i + 1]))
        else:
            adapted.use(name)
            rows.append(logits(adapted.module, ids[i : i + 1]))
    return torch.cat(rows)


def near(adapted: AdaptedModel) -> dict[str, float]:
    """float64's tolerance; or, where a model's own code rounds to float32 (recurrences, routers), more.

    That is a multiple of what a batch under one adapter already differs by from its rows on this processor.
    """
    own = 0.0
    for name in ("a", "b"):
        rows = alone(adapted, [name] * len(IDS))
        own = max(own, (logits(adapted.module) - rows).abs().max().item())
    return NEAR if own < NEAR["atol"] else {"rtol": 0.0, "atol": 10 * own}


@pytest.mark.parametrize("fused", [False, True], ids=["own code", "fused"])
@pytest.mark.parametrize("name", sorted(set(tiny_models.ALL) - set(READ)))
def test_on_every_architecture_a_row_is_what_it_is_alone(name: str, fused: bool) -> None:
    module = tiny_models.ALL[name]()
    if fused:
        fuse(module.double())
    adapted = two(module)
    tolerance = near(adapted)
    expected = alone(adapted, NAMES)
    assert (expected - logits(module)).abs().amax(dim=tuple(range(1, expected.dim()))).gt(1e-2).tolist() == [
        name != "b" for name in NAMES
    ]  # b is in use, and every other row shows
    with adapted.mixed(NAMES):
        torch.testing.assert_close(logits(module), expected, **tolerance)
    assert torch.equal(logits(module), logits(module))
    assert adapted.active == "b"


@pytest.mark.parametrize("name", sorted(READ))
def test_a_weight_that_another_module_reads_is_refused(name: str) -> None:
    adapted = two(tiny_models.ALL[name]())
    with pytest.raises(AdapterError, match="a weight that another module reads") as caught, adapted.mixed(NAMES):
        pass
    assert READ[name] in str(caught.value)
    with adapted.mixed(["__base__"] * 4):
        got = logits(adapted.module)
    with adapted.disabled():
        torch.testing.assert_close(got, logits(adapted.module), **NEAR)


def test_parameters_that_a_module_reads_itself_are_refused() -> None:
    adapted = two(tiny_models.HYBRID["bamba"](), modules_to_save=["A_log"])
    with pytest.raises(AdapterError, match="trains parameters that this module reads itself"), adapted.mixed(NAMES):
        pass


def test_other_towers_are_refused() -> None:
    adapted = two(tiny_models.VISION["llava"](), target_modules=r".*vision.*q_proj")
    with pytest.raises(AdapterError, match="outside of the language model"), adapted.mixed(NAMES):
        pass


def test_rows_and_names_must_be_as_many() -> None:
    adapted = two(tiny_models.ALL["llama"]())
    with adapted.mixed(NAMES[:3]), pytest.raises(AdapterError, match="4 rows, and 3 adapters are named"):
        logits(adapted.module)
    with adapted.mixed(NAMES), pytest.raises(AdapterError, match="rows cannot be told apart"):
        adapted.module.model(IDS)  # type: ignore[operator]  # not the model itself: nobody knows what its rows are
    with pytest.raises(AdapterError, match="there is no adapter 'c'"), adapted.mixed(["a", "c"]):
        pass
    with (
        adapted.mixed(NAMES),
        pytest.raises(AdapterError, match="takes mixed batches already"),
        adapted.mixed(NAMES),
    ):
        pass


def test_an_error_on_the_way_leaves_all_as_it_was() -> None:
    adapted = two(tiny_models.ALL["llama"]())
    adapted.use("a")
    before = logits(adapted.module)
    with pytest.raises(IndexError), adapted.mixed(NAMES):
        logits(adapted.module, IDS + 60)  # ids that there are not
    assert not is_mixed(adapted.module)
    assert torch.equal(logits(adapted.module), before)
    assert not any("forward" in part.__dict__ for part in adapted.module.modules() if hasattr(part, "adapters"))


def test_what_is_switched_off_or_chosen_within_a_mixed_batch() -> None:
    adapted = two(tiny_models.ALL["llama"]())
    expected = alone(adapted, NAMES)
    with adapted.disabled():
        base = logits(adapted.module)
    with adapted.mixed(NAMES):
        with adapted.disabled():
            torch.testing.assert_close(logits(adapted.module), base, **NEAR)
        adapted.use("a")  # for afterwards
        torch.testing.assert_close(logits(adapted.module), expected, **NEAR)
    torch.testing.assert_close(logits(adapted.module), alone(adapted, ["a"] * 4), **NEAR)


def test_each_row_of_transformers_generate_is_what_it_is_alone(make_tiny_base: Callable[..., Path]) -> None:
    base = load_base(make_tiny_base(initializer_range=0.4, seed=3), dtype="float32", device="cpu")
    adapted = AdaptedModel(base)
    for seed, name in enumerate("ab"):
        adapted.add(LoraConfig(r=2, init_lora_weights=False), name, seed=seed)
    adapted.use("a")
    ids = IDS[:1].repeat(4, 1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with adapted.mixed(NAMES):
        mixed = adapted.module.generate(ids, **options)  # type: ignore[operator]  # transformers has it
        with pytest.raises(UsageError, match="cannot be mixed by their number"):
            generate(adapted, IDS.tolist())
    assert torch.equal(mixed[0], mixed[3])
    assert len({tuple(row) for row in mixed.tolist()}) == 3
    for name, row in zip(NAMES, mixed):
        if name != "__base__":
            adapted.use(name)
            assert torch.equal(adapted.module.generate(ids, **options)[0], row)  # type: ignore[operator]
