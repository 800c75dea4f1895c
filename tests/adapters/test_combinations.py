"""Settings of an adapter together: the product of those that are used most, and any two of all that there are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import IDS, NF4, base, frozen, in_codes, logits, loss_of, start
from torch import nn

from pairs import Choice, covering, pairs
from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter, merge
from veneer.adapters.settings import AdaLoraConfig
from veneer.errors import AdapterError
from veneer.train.loraplus import multipliers
from veneer.train.optimizer import FlatAdamW

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

RATE = 3e-3


def model(stored: str, dtype: torch.dtype, name: str = "lora") -> nn.Module:
    """The tiny base of a kind, in 16 or 32 bits or in codes that compute in them."""
    module = base(name).to(dtype)
    return in_codes(module) if stored == NF4 else module


def attached(config: LoraConfig, stored: str, dtype: torch.dtype, name: str = "lora") -> AdaptedModel:
    plain = base(name)
    adapted = attach(
        model(stored, dtype, name),
        config,
        seed=0,
        originals=lambda paths, visit: [visit(path, plain.get_submodule(path).weight) for path in paths] and None,  # type: ignore[func-returns-value, arg-type]
    )
    start(adapted)
    return adapted


def trained(adapted: AdaptedModel, optim: str = "adamw", steps: int = 3) -> list[float]:
    """The losses before each of ``steps`` steps and after the last one; every trained tensor has had a gradient."""
    named = adapted.named_parameters()
    optimizer = FlatAdamW(
        named,
        optim="adamw" if optim == "LoRA+" else optim,
        multipliers=multipliers(named, 4.0 if optim == "LoRA+" else None, RATE, RATE),
    )
    losses, without = [], set(optimizer.names)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(adapted.module)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        without -= {name for name, hit in zip(optimizer.names, optimizer.nonzero_gradients()) if hit}
        assert step == 0 or not without, f"no gradient within two steps: {sorted(without)[:3]}"
        optimizer.finish_gradient(1.0, None)
        optimizer.step(RATE)
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return [*losses, float(loss_of(adapted.module))]


OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, True),
    "use_rslora": (False, True),
    "stored": ("16 bits", NF4),
    "init": (True, "pissa", "loftq"),
    "optim": ("adamw", "LoRA+", "adamw_8bit", "paged_adamw"),
}


def is_sound(choice: Choice) -> bool:
    return choice[2:4] != ("16 bits", "loftq")  # which starts from what codes lose


PRODUCT = [choice for choice in itertools.product(*OPTIONS.values()) if is_sound(choice)]
USUAL = covering(OPTIONS, is_sound)


def test_any_two_values_meet_in_the_usual_combinations() -> None:
    assert set().union(*map(pairs, USUAL)) == set().union(*map(pairs, PRODUCT))
    assert len(USUAL) < len(PRODUCT) / 4
    assert set().union(*map(pairs, USUAL[1:])) != set().union(*map(pairs, PRODUCT)), "the first is needed"


@pytest.mark.parametrize(
    tuple(OPTIONS),
    [pytest.param(*choice, marks=[pytest.mark.slow] * (choice not in USUAL)) for choice in PRODUCT],
)
def test_every_combination_trains_is_saved_and_leaves_its_base_alone(
    use_dora: bool, use_rslora: bool, stored: str, init: Any, optim: str, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_dora=use_dora, use_rslora=use_rslora, init_lora_weights=init)
    before = logits(model(stored, torch.bfloat16))
    adapted = attached(config, stored, torch.bfloat16)
    weights, began = frozen(adapted), adapted.state()
    adapted.module.train()
    losses = trained(adapted, optim)
    adapted.module.eval()
    assert losses[-1] < losses[0] - 0.01
    state = adapted.state()
    assert all(not torch.equal(state[key], began[key]) for key, _ in adapted.named_parameters())
    own = frozen(adapted)
    assert all(torch.equal(own[key], weights[key]) for key in weights)
    after = logits(adapted.module)
    # The file holds what acts, in float32: the same products of the same numbers.
    again = load_adapter(model(stored, torch.bfloat16), adapted.save(tmp_path / "a"))
    assert torch.equal(logits(again.module), after)
    assert not torch.equal(after, before)
    with adapted.disabled():
        assert torch.equal(logits(adapted.module), before)


# Any two settings

ONE: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "lora_fa": {"use_lora_fa": True},
    "adalora": {"adalora_config": {"target_r": 2}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq"},
    "loftq, 2 rounds": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
    "eva": {"init_lora_weights": "eva"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "patterns": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"1\..*v_proj": 3}},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "embedding": {"target_modules": r".*(q_proj|v_proj|o_proj|embed_tokens)"},
    "head": {"target_modules": r".*(q_proj|v_proj|o_proj)|lm_head"},
    "tokens": {"trainable_token_indices": [3, 1, 5]},
    "saved": {"modules_to_save": ["model.norm"]},
    "experts": {"experts": [0, 2]},
    "codes": {},  # NF4 instead of 32 bits
}
ALONE = {"loftq", "loftq, 2 rounds"}  # only over codes
STARTS = ("pissa", "pissa_niter", "olora", "loftq", "loftq, 2 rounds", "eva", "lora_ga")
# The pairs that make no sense, and why.
REFUSED = {
    frozenset(pair): why
    for why, every in {
        "do not go together": [
            ("dora", "adalora"),
            ("dora", "loftq, 2 rounds"),
            ("lora_fa", "adalora"),
            ("lora_fa", "lora_ga"),
            *(("adalora", other) for other in ("orthogonal", *STARTS)),
        ],
        "embedding": [("embedding", other) for other in ("dora", "lora_fa", "adalora")],
        "LoRA factors or trained token rows, not both": [("tokens", "embedding"), ("tokens", "head")],
        "does not act on experts": [("experts", other) for other in ("dropout", "dora", "lora_fa", "adalora", *STARTS)],
    }.items()
    for pair in every
}


def settle(one: str, other: str) -> tuple[dict[str, Any], str, str] | None:
    """Both settings as one config, how the base is stored, and of which kind it is; None where they are one option."""
    mine, its = ONE[one], ONE[other]
    if mine.keys() & its.keys():
        return None
    stored = NF4 if {one, other} & {"codes", *ALONE} else "plain"
    return mine | its, stored, "experts" if "experts" in (one, other) else "head"


PAIRS = [(one, other) for one, other in itertools.combinations(ONE, 2) if settle(one, other)]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[" + ".join(pair) for pair in PAIRS])
def test_any_two_settings_work_together_or_are_refused_by_their_reason(one: str, other: str, tmp_path: Path) -> None:
    found = settle(one, other)
    assert found is not None
    settings, stored, kind = found
    why = REFUSED.get(frozenset((one, other)))
    if why is not None:
        with pytest.raises(AdapterError, match=why) as caught:
            attached(LoraConfig(r=4, lora_alpha=6, **settings), stored, torch.float32, kind)
        assert caught.value.fix
        return
    before = logits(model(stored, torch.float32, kind))
    adapted = attached(LoraConfig(r=4, lora_alpha=6, **settings), stored, torch.float32, kind)
    weights = frozen(adapted)
    adapted.module.train()
    losses = trained(adapted)
    adapted.module.eval()
    assert losses[-1] < losses[0]
    after = logits(adapted.module)
    assert not torch.equal(after, before)
    if "loftq, 2 rounds" not in (one, other):  # that file is for the weights in 16 bits
        again = load_adapter(model(stored, torch.float32, kind), adapted.save(tmp_path / "a"))
        torch.testing.assert_close(logits(again.module), after, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merge(adapted)), after, rtol=1e-4, atol=5e-5)
    with adapted.disabled():
        assert torch.equal(logits(adapted.module), before)
    assert torch.equal(logits(adapted.detach()), before)
    own = adapted.module.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in own)


def test_the_tokens_that_are_trained_occur() -> None:
    assert {1, 3, 5} <= set(IDS.flatten().tolist())


def test_an_empty_adalora_config_is_adalora_with_its_defaults() -> None:
    adapted = attach(base("lora"), LoraConfig(r=12, adalora_config={}))
    assert adapted.configs["default"].adalora_config == AdaLoraConfig()
    assert all(adapter.E is not None for adapter in adapted.linears().values())
    with pytest.raises(AdapterError, match="adalora_config and use_dora do not go together"):
        LoraConfig(adalora_config={}, use_dora=True)
    assert LoraConfig(loftq_config={}).loftq_config is None, "PEFT writes it where there is nothing"
