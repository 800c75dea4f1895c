"""AdaLoRA while it is trained: the budget's course, importance, which triplets are kept, and what a run leaves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import lines
from safetensors.torch import load_file
from test_resume import stop_after
from torch import Tensor, nn

from veneer.adapters import AdaptedModel, LoraConfig, attach, load_adapter
from veneer.adapters.settings import AdaLoraConfig
from veneer.errors import TrainError
from veneer.train.optimizer import FlatAdamW
from veneer.train.rank_budget import RankBudget, choose
from veneer.train.rank_schedule import schedule_of

# PEFT talks on its own account.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

STEPS, MODULES = 24, 14
ADALORA = {"target_r": 2, "tinit": 4, "tfinal": 6, "deltaT": 3}
LAST = STEPS - ADALORA["tfinal"]
SETTINGS: dict[str, Any] = {
    "adapter": {"r": 4, "adalora_config": ADALORA},
    "train": {"max_steps": STEPS, "learning_rate": 3e-2, "max_length": 64, "save_steps": 7, "eval_steps": 5},
}
START, TARGET = 4 * MODULES, 2 * MODULES


def peft_allocator(**settings: Any) -> Any:
    """PEFT's allocator without a model: 14 modules of rank 4."""
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    values = {"beta1": 0.85, "beta2": 0.85, "total_step": STEPS, **ADALORA, **settings}
    names = [(f"{i}.lora_A.default", torch.zeros(4, 3)) for i in range(MODULES)]
    return layer.RankAllocator(SimpleNamespace(named_parameters=lambda: names), SimpleNamespace(**values), "default")


@pytest.mark.parametrize(
    "settings",
    [
        ADALORA,
        {"target_r": 1, "tinit": 1, "tfinal": 0, "deltaT": 1},
        {"target_r": 3, "tinit": 0, "tfinal": 10, "deltaT": 4},
        {"target_r": 4, "tinit": 4, "tfinal": 6, "deltaT": 3},
    ],
)
def test_the_budget_falls_from_all_ranks_to_the_target_as_pefts_does(settings: dict[str, int]) -> None:
    schedule = schedule_of(AdaLoraConfig(**settings), [4] * MODULES, STEPS)
    theirs = peft_allocator(**settings)
    budgets = [schedule.budget(step) for step in range(1, STEPS + 1)]
    assert budgets == [theirs.budget_schedule(step)[0] for step in range(1, STEPS + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0] <= START, budgets[-1]) == (True, settings["target_r"] * MODULES)
    between = [step for step in range(1, schedule.last) if theirs.budget_schedule(step)[1]]
    assert [step for step in range(1, STEPS + 1) if schedule.reallocates(step)] == [*between, schedule.last]


def test_shares_of_the_run_mean_steps() -> None:
    shares = schedule_of(AdaLoraConfig(tinit=0.1, tfinal=0.3, deltaT=10), [16] * 3, 200)
    assert shares == schedule_of(AdaLoraConfig(tinit=20, tfinal=60, deltaT=10), [16] * 3, 200)
    assert (shares.first, shares.last) == (20, 140)


@pytest.mark.parametrize("budget", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("scores", [[3.0, 1, 2, 6, 5, 4], [1.0, 1, 1, 1, 1, 1], [0.0, 2, 0, 2, 0, 2]])
def test_exactly_as_many_triplets_as_the_budget_are_kept_ties_or_not(scores: list[float], budget: int) -> None:
    kept = choose(torch.tensor(scores), budget)
    assert int(kept.sum()) == budget
    left, dropped = torch.tensor(scores)[kept], torch.tensor(scores)[~kept]
    if len(left) and len(dropped):
        assert left.min() >= dropped.max()


def tiny(r: int = 3, seed: int = 0, **adalora: Any) -> tuple[AdaptedModel, FlatAdamW, RankBudget]:
    """Two linears under AdaLoRA, with an optimizer and the rank budget; E away from zero."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    settings = {"target_r": 1, "tinit": 1, "tfinal": 3, "deltaT": 2, **adalora}
    adapted = attach(module, LoraConfig(r=r, adalora_config=settings, exclude_modules=[]), seed=seed)
    for adapter in adapted.linears().values():
        assert adapter.E is not None
        nn.init.normal_(adapter.E)
    optimizer = FlatAdamW(adapted.named_parameters())
    config = adapted.configs["default"].adalora_config
    assert isinstance(config, AdaLoraConfig)
    return adapted, optimizer, RankBudget(config, list(adapted.linears().values()), optimizer, 12)


def one_step(
    adapted: AdaptedModel, optimizer: FlatAdamW, hook: RankBudget, step: int, between: Callable[[], None] | None = None
) -> None:
    """As the loop does it; ``between`` the clipping and the update."""
    optimizer.zero_grad()
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(step))
    adapted.module(x).square().sum().backward()
    hook.add_gradient(7.0)
    optimizer.finish_gradient(7.0, 1.0)
    hook.before_step(step)
    if between is not None:
        between()
    optimizer.step(1e-2)
    hook.after_step(step)


def test_the_scores_follow_the_formulas_of_the_paper() -> None:
    adapted, optimizer, hook = tiny(beta1=0.7, beta2=0.6)
    mean: dict[str, Tensor] = {}
    uncertain: dict[str, Tensor] = {}

    def by_hand() -> None:
        for key, p in adapted.named_parameters():
            assert p.grad is not None
            sensitivity = (p * p.grad).abs().detach().double()
            mean[key] = 0.7 * mean.get(key, torch.zeros(())) + 0.3 * sensitivity
            uncertain[key] = 0.6 * uncertain.get(key, torch.zeros(())) + 0.4 * (sensitivity - mean[key]).abs()

    for step in range(1, 6):
        one_step(adapted, optimizer, hook, step, by_hand)
        expected = []
        for path in adapted.linears():
            E, A, B = (
                mean[key] * uncertain[key]
                for key in (f"base_model.model.{path}.{end}" for end in ("lora_E", "lora_A.weight", "lora_B.weight"))
            )
            expected += [E[k, 0] + sum(A[k]) / len(A[k]) + sum(B[:, k]) / len(B) for k in range(len(E))]
        torch.testing.assert_close(hook.scores().double(), torch.stack(expected), rtol=1e-4, atol=1e-12)


def test_the_scores_and_the_choice_are_pefts() -> None:
    adapted, optimizer, hook = tiny()
    allocator = pytest.importorskip("peft.tuners.adalora.layer").RankAllocator
    names = {"lora_E": "lora_E.default", "lora_A.weight": "lora_A.default", "lora_B.weight": "lora_B.default"}

    def named() -> list[tuple[str, nn.Parameter]]:
        found = []
        for key, p in adapted.named_parameters():
            end = next(end for end in names if key.endswith(end))
            found.append((key.removesuffix(end) + names[end], p))
        return found

    model = SimpleNamespace(named_parameters=named)
    settings = {"tinit": 1, "tfinal": 3, "total_step": 12, "deltaT": 2, "beta1": 0.85, "beta2": 0.85, "target_r": 1}
    theirs = allocator(model, SimpleNamespace(**settings), "default")
    for step in range(1, 9):
        one_step(adapted, optimizer, hook, step, lambda: theirs.update_ipt(model))
        if hook.schedule.reallocates(step):
            mask = theirs.mask_to_budget(model, hook.schedule.budget(step))
            assert [kept for kepts in mask.values() for kept in kepts] == hook.kept.tolist()
    assert hook.schedule.budget(8) < 6


def test_every_step_holds_its_budget_and_dropped_triplets_stay_dropped_at_the_end() -> None:
    adapted, optimizer, hook = tiny(r=4)
    budget = 8
    for step in range(1, 13):
        one_step(adapted, optimizer, hook, step)
        if hook.schedule.reallocates(step):
            budget = hook.schedule.budget(step)
        assert int(hook.kept.sum()) == budget, step
        in_use = sum(int(a.E.count_nonzero()) for a in adapted.linears().values() if a.E is not None)
        if hook.schedule.reallocates(step) or step > hook.schedule.last:
            assert in_use == budget, step
    assert budget == 2
    assert sum(a.r for a in adapted.linears().values()) == 8, "nothing is removed while it trains"
    adapted.trim()
    assert sum(a.r for a in adapted.linears().values()) in (2, 3), "a module without any keeps one of zeros"


def test_a_dropped_triplet_may_come_back_before_the_last_reallocation() -> None:
    adapted, optimizer, hook = tiny(r=4)
    kept = []
    for step in range(1, 10):
        one_step(adapted, optimizer, hook, step)
        kept.append(hook.kept.clone())
        if step == 2:
            # Whatever was dropped becomes what matters most.
            hook._importance.zero_()
            for adapter, part in zip(adapted.linears().values(), hook.kept.split(4)):
                assert adapter.E is not None
                with torch.no_grad():
                    adapter.E[~part] = 30.0
    assert (kept[3] & ~kept[1]).any()


def test_a_target_of_all_ranks_drops_none() -> None:
    adapted, optimizer, hook = tiny(r=3, target_r=3)
    for step in range(1, 13):
        one_step(adapted, optimizer, hook, step)
        assert hook.kept.all()
    assert all(a.E is not None and a.E.all() for a in adapted.linears().values())


def test_the_regulariser_pulls_the_directions_apart() -> None:
    def after(weight: float) -> float:
        adapted, optimizer, hook = tiny(orth_reg_weight=weight)
        for step in range(1, 13):
            one_step(adapted, optimizer, hook, step)
        return hook.add_gradient(1.0)["orthogonality"]

    assert after(2.0) < after(0.0)


@pytest.mark.parametrize(
    ("adalora", "total", "said"),
    [
        ({"tinit": 10, "tfinal": 14}, 24, "of its 24 steps tinit takes 10 and tfinal 14, and no reallocation"),
        ({"tinit": 30, "tfinal": 0}, 24, "cannot move ranks"),
        ({"tinit": 0.5, "tfinal": 0.5}, 100, "tinit takes 50 and tfinal 50"),
        ({"tinit": 4, "tfinal": 6, "deltaT": 50}, 24, r"one every 50 steps\) falls between them"),
        ({"total_step": 100}, 24, "total_step is 100, and this run has 24 steps"),
    ],
)
def test_a_run_too_short_for_the_schedule_is_refused(adalora: dict[str, Any], total: int, said: str) -> None:
    with pytest.raises(TrainError, match=said) as caught:
        schedule_of(AdaLoraConfig(**adalora), [16] * 3, total)
    assert "adalora_config" in str(caught.value.where)
    assert caught.value.fix


def test_ranks_below_the_target_are_refused() -> None:
    with pytest.raises(TrainError, match="start with 12 ranks together, and target_r 8 means 16"):
        schedule_of(AdaLoraConfig(target_r=8), [8, 4], 100)


def test_too_few_steps_are_told_before_anything_is_written(small_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="cannot move ranks in this run"):
        small_run(**{**SETTINGS, "train": {**SETTINGS["train"], "max_steps": 6}})
    assert not (tmp_path / "run").exists()


def test_a_run_ends_with_the_target_in_the_file_in_memory_and_in_peft(
    small_run: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    result, _ = small_run(**SETTINGS)
    file = load_file(result.adapter / "adapter_model.safetensors")
    ranks = {key: len(value) for key, value in file.items() if key.endswith("lora_A.weight")}
    left = sum(rank for key, rank in ranks.items() if file[key].any())
    assert (len(ranks), left) == (MODULES, TARGET)
    assert len(set(ranks.values())) > 1, "the modules must differ"
    assert {f"base_model.model.{p}.lora_A.weight": a.r for p, a in result.model.linears().items()} == ranks
    assert result.model.trainable_count() == sum(value.numel() for value in file.values())
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["ranks"] for line in steps][:5] == [START] * 5
    assert steps[-1]["ranks"] == TARGET
    assert all(line["orthogonality"] > 0 for line in steps)
    assert result.best_step >= LAST, "before the last reallocation there are more ranks than were asked for"

    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = result.model.module(ids).logits
        with result.model.disabled():
            assert (result.model.module(ids).logits - expected).abs().max() > 1e-3
        reopened = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base).eval(), result.adapter)
        torch.testing.assert_close(reopened.module(ids).logits, expected, rtol=1e-4, atol=1e-4)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            base = AutoModelForCausalLM.from_pretrained(tiny_base)
            theirs = peft.PeftModel.from_pretrained(base, str(result.adapter)).eval()
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [2, 7, 11, LAST, 22])
def test_a_stop_at_any_step_resumes_bit_for_bit(
    at: int, small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first reallocation, at one, between two, at the last one, and after it."""
    small_run("whole", **SETTINGS)
    stop_after(at, monkeypatch)
    stopped, _ = small_run("stopped", **SETTINGS)
    assert (stopped.interrupted, stopped.steps) == (True, at)
    monkeypatch.undo()
    small_run("stopped", resume=True, **SETTINGS)
    one, two = tmp_path / "stopped", tmp_path / "whole"
    assert lines(one) == lines(two)
    last = f"step-{STEPS:06d}"
    for file in ("adapter/training_state.safetensors", "optimizer.safetensors", "hook.safetensors"):
        assert (one / "checkpoints" / last / file).read_bytes() == (two / "checkpoints" / last / file).read_bytes()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / file).read_bytes() == (two / "adapter" / file).read_bytes()


def test_the_adapter_of_an_interrupted_run_is_whole_and_the_model_keeps_training(
    small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(6, monkeypatch)
    stopped, _ = small_run(**SETTINGS)
    assert all(adapter.E is not None for adapter in stopped.model.linears().values())
    file = load_file(stopped.adapter / "adapter_model.safetensors")
    assert not any("lora_E" in key for key in file)
