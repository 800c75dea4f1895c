"""The comparison of variants: its table of methods, its file of results, what it concludes from figures, its page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import variants
from benchmarks.variants import Bench, Task, parse, planned, prepare_task
from benchmarks.variants_advice import advice
from benchmarks.variants_claims import HELD, NOT_HELD, UNTESTED, against_reference, verdicts
from benchmarks.variants_cost import ratios, within_limits
from benchmarks.variants_figures import chosen_rate, exact_match, findings, perplexity, speed_up, trailing
from benchmarks.variants_methods import METHODS, RANKS, chosen, settings_hash
from benchmarks.variants_page import cost_table, page, picture, write_page
from benchmarks.variants_results import Record, Results, key_of

ROOT = Path(__file__).parents[1]
TASK = "some rows"
# Nats of 16 held-out answers of ten tokens; what a method changes is the same for every row, and so is no chance.
NLL = [8.0 + 0.25 * row for row in range(16)]


def record(method: str = "lora", seed: int = 0, rate: float = 1e-3, **changes: Any) -> Record:
    """A run with plausible figures. ``change`` nats are added to every row, ``speed`` is of the training loss."""
    change, speed = changes.pop("change", 0.0), changes.pop("speed", 1.0)
    common = {"base": "a-model", "steps": 40, "batch": 8}
    figures = {
        "losses": [2.0 * 0.95 ** (speed * step) for step in range(40)],
        "nll": [nats + change for nats in NLL],
        "correct": [8] * 16,
        "tokens": [10] * 16,
        "exact": [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
        "drift": [0.10, 0.12, 0.14],
        "tokens_per_second": 500.0,
        "init_seconds": 1.0,
        "peak_gb": 2.0,
        "adapter_mb": 19.5,
        "trained_parameters": 4_884_480,
        "machine": {
            "dtype": "bfloat16",
            "processor": "AVX512",
            "device": "cpu",
            "threads": 2,
            "workers": 1,
            "versions": {"v": "1"},
        },
    }
    settings = {"method": method, "task": TASK, "seed": seed, "learning_rate": rate, "common": common, **changes}
    return {**figures, "settings_hash": settings_hash({"rate": rate, "method": method}), **settings}


def runs(method: str, **changes: Any) -> list[Record]:
    """Three seeds."""
    return [record(method, seed, **changes) for seed in range(3)]


def answer(claim: str, *records: Iterable[Record]) -> tuple[str, str]:
    """The verdict on the claim that begins so, and the figures."""
    found = verdicts(findings([*runs("lora"), *(one for each in records for one in each)]).tasks)
    matching = [(v.verdict, v.measured) for v in found if v.claim.startswith(claim)]
    assert len(matching) == 1
    return matching[0]


# --- the table of methods --------------------------------------------------------------------------------------------


def test_every_method_is_a_recipe_and_has_its_reference_in_the_table() -> None:
    from veneer.adapters import LoraConfig

    for method in METHODS.values():
        LoraConfig(**method.recipe["adapter"])
        assert method.reference is None or method.reference in METHODS
        assert method.rate_of is None or METHODS[method.rate_of].rate_of is None


def test_the_keys_of_the_table_are_keys_of_the_recipe() -> None:
    from veneer.recipe import AdapterRecipe, TrainRecipe

    for method in METHODS.values():
        assert method.recipe["adapter"].keys() <= AdapterRecipe.model_fields.keys()
        assert method.train.keys() <= TrainRecipe.model_fields.keys()


def test_q_and_v_alone_have_as_many_parameters_as_all_linears_of_smollm2() -> None:
    hidden, kv, mlp = 576, 192, 1536
    qv = (hidden + hidden) + (hidden + kv)
    every = qv + (hidden + kv) + (hidden + hidden) + 3 * (hidden + mlp)
    assert METHODS["lora-qv"].adapter["r"] * qv == pytest.approx(16 * every, rel=0.01)


def test_a_choice_of_methods_brings_what_they_are_held_against() -> None:
    assert [m.name for m in chosen(["loftq"])] == ["lora", "qlora", "loftq"]
    assert [m.name for m in chosen(["rslora-r64"])] == ["lora", "lora-r64", "rslora-r64"]
    with pytest.raises(KeyError):
        chosen(["lorra"])


def test_the_hash_changes_with_any_setting_and_not_with_their_order() -> None:
    one = {"adapter": {"r": 16, "lora_alpha": 32}, "steps": 60}
    assert settings_hash(one) == settings_hash({"steps": 60, "adapter": {"lora_alpha": 32, "r": 16}})
    others = [{**one, "steps": 61}, {**one, "adapter": {"r": 8, "lora_alpha": 32}}, {**one, "quantize": "nf4"}]
    assert len({settings_hash(each) for each in [one, *others]}) == 4


# --- the file of results ---------------------------------------------------------------------------------------------


def test_results_come_back_and_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    results = Results(path)
    first = record()
    results.add(first)
    results.add({**first, "peak_gb": 3.0})
    results.add(record(seed=1))
    again = Results(path)
    assert [r["peak_gb"] for r in again] == [3.0, 2.0]
    assert again.get(key_of(first)) == {**first, "peak_gb": 3.0}


def test_a_failure_is_kept_and_counts_as_lacking(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    failed = {**record(), "error": "no such method"}
    results.add(failed)
    again = Results(results.path)
    assert again.get(key_of(failed)) is None
    assert list(again) == []
    assert [r["error"] for r in again.failures()] == ["no such method"]
    again.add(record())
    assert Results(results.path).failures() == []


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    whole = json.dumps(record()) + "\n"
    path.write_text(whole + '{"method": "lora", "ta')
    results = Results(path)
    assert len(list(results)) == 1
    results.add(record(seed=1))
    assert path.read_text() == whole + json.dumps(record(seed=1)) + "\n"


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record()) + '\n{"other": 1}\n')
    with pytest.raises(SystemExit, match=r"results\.jsonl:2 is no result"):
        Results(path)


def bench_of(results: Results, folder: Path, **changes: Any) -> Bench:
    common = {"base": "a-model", "dtype": "auto", "device": "cpu", "steps": 40, "batch": 8, "max_length": 64}
    return Bench(
        **{"common": common, "threads": 1, "seeds": 3, "rates": [1e-4, 1e-3], "folder": folder} | changes,
        results=results,
    )


FIGURES = ["losses", "nll", "correct", "tokens", "drift", "tokens_per_second", "init_seconds", "peak_gb", "adapter_mb"]
FIGURES.append("trained_parameters")


def fake(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> list[tuple[int, float]]:
    """Runs that take no time: the smaller rate is the better one; an adapter with the setting ``failing`` fails."""
    made: list[tuple[int, float]] = []

    def in_process(module: str, name: str, job: dict[str, Any]) -> dict[str, Any]:
        made.append((job["seed"], job["learning_rate"]))
        if failing and job.get("adapter", {}).get(failing):
            raise SystemExit(
                "run failed:\nTraceback ...\n  File x\nveneer.errors.AdapterError: no such thing\n  fix: another\n"
            )
        figures = record(change=1000 * job["learning_rate"])
        return {key: figures[key] for key in FIGURES}

    monkeypatch.setattr(variants, "in_process", in_process)
    return made


def test_a_run_searches_the_rate_then_runs_the_seeds_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake(monkeypatch)
    tasks = [Task(TASK, tmp_path / "rows", tmp_path / "held", "", "digest")]
    methods = chosen(["lora"])
    bench = bench_of(Results(tmp_path / "results.jsonl"), tmp_path)
    assert planned(bench, tasks, 0, methods) == 1 + 2 + 2
    for wanted in next(bench.phases(tasks, methods)):
        bench.results.add(bench.measure(tasks, wanted, {}))
    assert made == [(0, 0.0), (0, 1e-4), (0, 1e-3)]
    made.clear()
    resumed = bench_of(Results(bench.results.path), tmp_path)
    assert planned(resumed, tasks, 0, methods) == 2
    assert resumed.measure_all(tasks, methods, {})
    assert made == [(1, 1e-4), (2, 1e-4)]
    assert planned(resumed, tasks, 0, methods) == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_the_second_task_takes_the_rates_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    made = fake(monkeypatch)
    tasks = [Task(label, tmp_path / "rows", tmp_path / "held", "", label) for label in (TASK, "other rows")]
    bench = bench_of(Results(tmp_path / "results.jsonl"), tmp_path, workers=workers)
    methods = chosen(["dora"])
    assert [planned(bench, tasks, place, methods) for place in range(2)] == [1 + 2 * (2 + 2), 1 + 2 * 3]
    assert bench.measure_all(tasks, methods, record()["machine"])
    assert len(made) == 9 + 7
    other = [(r["method"], r["seed"], r["learning_rate"]) for r in bench.results if r["task"] == "other rows"]
    assert sorted(other) == [("base", 0, 0.0), *((m, s, 1e-4) for m in ("dora", "lora") for s in range(3))]
    assert [planned(bench, tasks, place, methods) for place in range(2)] == [0, 0]
    told = page(findings(bench.results))
    assert "chose each method's learning rate" in told
    assert "The learning rates were not searched here" in told


def test_larger_rates_are_tried_where_the_largest_was_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, float]] = []
    best = {"use_dora": 1e-4, "use_rslora": 1.5e-2}  # LoRA's is 5.5e-3

    def in_process(module: str, name: str, job: dict[str, Any]) -> dict[str, Any]:
        if name == "base":
            return {key: value for key, value in record().items() if key in FIGURES}
        setting = next((key for key in best if job["adapter"].get(key)), "")
        made.append((setting, job["learning_rate"]))
        distance = abs(math.log(job["learning_rate"] / best.get(setting, 5.5e-3)))
        return {key: value for key, value in record(change=distance).items() if key in FIGURES}

    monkeypatch.setattr(variants, "in_process", in_process)
    tasks = [Task(TASK, tmp_path / "rows", tmp_path / "held", "", "digest")]
    bench = bench_of(Results(None), tmp_path, seeds=2)
    assert bench.measure_all(tasks, chosen(["dora", "rslora"]), record()["machine"])
    at = {setting: [rate for name, rate in made if name == setting] for setting in ("", *best)}
    assert at["use_dora"] == [1e-4, 1e-3, 1e-4]
    assert at[""] == [1e-4, 1e-3, 5.5e-3, 1.5e-2, 5.5e-3]
    assert at["use_rslora"] == [1e-4, 1e-3, 5.5e-3, 1.5e-2, 1.5e-2]
    told = page(findings(bench.results))
    assert "| DoRA | 0.0001 (edge) | 2 |" in told
    assert "| LoRA, r 16 | 0.0055 | 2 |" in told


def test_the_second_task_tries_the_rate_of_the_first_and_the_one_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task(label, tmp_path / label, tmp_path / "held", "", label) for label in (TASK, "other rows")]

    def in_process(module: str, name: str, job: dict[str, Any]) -> dict[str, Any]:
        best = 1e-3 if job["rows"] == str(tasks[0].rows) else 3e-4  # the lower one is better on the other rows
        figures = record(change=1000 * abs(job["learning_rate"] - best))
        return {key: figures[key] for key in FIGURES}

    monkeypatch.setattr(variants, "in_process", in_process)
    bench = bench_of(Results(tmp_path / "results.jsonl"), tmp_path, rates=[1e-4, 3e-4, 1e-3, 3e-3])
    assert bench.measure_all(tasks, chosen(["lora"]), record()["machine"])
    other = [(r["seed"], r["learning_rate"]) for r in bench.results if r["task"] == "other rows"]
    assert sorted(other) == [(0, 0.0), (0, 3e-4), (0, 1e-3), (1, 3e-4), (2, 3e-4)]


def test_when_the_minutes_are_over_no_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake(monkeypatch)
    tasks = [Task(TASK, tmp_path / "rows", tmp_path / "held", "", "digest")]
    assert not bench_of(Results(None), tmp_path).measure_all(tasks, chosen(["lora"]), {}, minutes=-1)
    assert made == []


def test_a_longer_run_takes_the_rate_of_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    bench = bench_of(Results(None), tmp_path)
    bench.measure_all([Task(TASK, tmp_path / "rows", tmp_path / "held", "", "digest")], chosen(["lora-double"]), {})
    longer = [r for r in bench.results if r["method"] == "lora-double"]
    assert [(r["seed"], r["learning_rate"], r["steps"]) for r in longer] == [(s, 1e-4, 80) for s in range(3)]


def test_a_method_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, failing="use_dora")
    bench = bench_of(Results(tmp_path / "results.jsonl"), tmp_path, seeds=1)
    task = Task(TASK, tmp_path / "rows", tmp_path / "held", "", "digest")
    bench.measure_all([task], chosen(["dora", "pissa"]), {})
    assert {r["method"] for r in bench.results} == {"base", "lora", "pissa"}
    assert {(r["method"], r["error"]) for r in bench.results.failures()} == {
        ("dora", "veneer.errors.AdapterError: no such thing / fix: another")
    }


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    task = Task(TASK, tmp_path / "rows", tmp_path / "held", "", "digest")
    bench = bench_of(Results(None), tmp_path)
    one = bench.record_of(task, METHODS["lora"], 0, 1e-3)
    more = bench_of(Results(None), tmp_path, common={**bench.common, "steps": 41})
    hashes = {
        one["settings_hash"],
        bench.record_of(task, METHODS["lora"], 0, 2e-3)["settings_hash"],
        bench.record_of(task, METHODS["dora"], 0, 1e-3)["settings_hash"],
        more.record_of(task, METHODS["lora"], 0, 1e-3)["settings_hash"],
        bench.record_of(Task(TASK, task.rows, task.held_out, "", "other rows"), METHODS["lora"], 0, 1e-3)[
            "settings_hash"
        ],
    }
    assert len(hashes) == 5


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_rate_is_chosen_by_rows_that_are_not_reported() -> None:
    def with_halves(rate: float, choosing: float, reporting: float) -> Record:
        return record(rate=rate) | {"nll": [choosing] * 8 + [reporting] * 8}

    records = [with_halves(1e-4, 9.0, 5.0), with_halves(1e-3, 8.0, 6.0)]
    outcome = findings(records).tasks[TASK]["lora"]
    assert chosen_rate("lora", records) == outcome.rate == 1e-3
    assert perplexity(outcome.records).value.value == pytest.approx(2.718281828**0.6)
    assert outcome.at_the_edge


def test_only_runs_with_the_settings_of_the_last_one_count() -> None:
    quick = record() | {"common": {"steps": 3}}
    assert findings([quick, record(seed=1)]).runs[TASK] == [record(seed=1)]


def test_a_difference_counts_where_rows_and_seeds_agree() -> None:
    found = findings([*runs("lora"), *runs("dora", change=-0.5)]).tasks[TASK]
    delta = against_reference(found, "dora")
    assert delta is not None
    assert delta.sign == -1
    one_seed_worse = [record("dora", seed, change=0.1 if seed == 2 else -0.5) for seed in range(3)]
    delta = against_reference(findings([*runs("lora"), *one_seed_worse]).tasks[TASK], "dora")
    assert delta is not None
    assert delta.high < 0
    assert delta.sign == 0


def test_runs_without_a_common_seed_are_not_compared() -> None:
    found = findings([record("lora", 0), record("dora", 1)]).tasks
    assert against_reference(found[TASK], "dora") is None
    assert next(v.verdict for v in verdicts(found) if v.claim.startswith("DoRA")) == UNTESTED


def test_the_speed_up_counts_steps_to_the_references_last_loss() -> None:
    assert speed_up(runs("pissa", speed=2.0), runs("lora")) == pytest.approx(2.0, rel=0.1)
    assert speed_up(runs("lora"), runs("lora")) == 1.0
    assert speed_up(runs("pissa", speed=0.5), runs("lora")) is None


def test_a_trailing_mean_begins_where_it_is_whole() -> None:
    assert trailing([1.0, 2.0, 3.0, 4.0], 3) == pytest.approx([2.0, 3.0])


# --- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "said"), [(-0.5, HELD), (0.5, NOT_HELD), (0.0, NOT_HELD)])
def test_rslora_is_judged_at_a_high_rank_alone(change: float, said: str) -> None:
    assert answer("rsLoRA wins", runs("lora-r64"), runs("rslora-r64", change=change))[0] == said
    assert answer("rsLoRA wins", runs("rslora", change=-1.0))[0] == UNTESTED


@pytest.mark.parametrize(("speed", "said"), [(2.3, HELD), (1.5, NOT_HELD), (0.5, NOT_HELD)])
def test_pissa_has_to_be_twice_as_fast(speed: float, said: str) -> None:
    assert answer("PiSSA converges", runs("pissa", speed=speed))[0] == said


@pytest.mark.parametrize(("speed", "said"), [(1.3, HELD), (1.0, NOT_HELD), (0.8, NOT_HELD)])
def test_loraplus_has_to_be_faster(speed: float, said: str) -> None:
    assert answer("LoRA+", runs("lora+", speed=speed))[0] == said


def test_one_seed_that_is_not_faster_is_enough_against_a_speed_up() -> None:
    mixed = [record("pissa", seed, speed=3.0 if seed else 0.5) for seed in range(3)]
    assert answer("PiSSA converges", mixed)[0] == NOT_HELD


def answered(better: int, worse: int) -> list[float]:
    """100 answers, half of them right: of LoRA's wrong ones some become right, of its right ones some wrong."""
    return [1.0 - (row >= 50 - worse) if row < 50 else float(row < 50 + better) for row in range(100)]


@pytest.mark.parametrize(
    ("better", "worse", "correct", "said"),
    [
        (8, 0, [8] * 16, HELD),
        (0, 0, [9] * 16, NOT_HELD),  # exact match decides
        (4, 4, [8] * 16, NOT_HELD),  # exact match leaves it open, the tokens decide
        (4, 4, [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 9, 7, 9, 7, 9, 8], UNTESTED),
    ],
)
def test_dora_is_judged_by_points(better: int, worse: int, correct: list[int], said: str) -> None:
    lora = runs("lora", exact=answered(0, 0))
    found = verdicts(findings([*lora, *runs("dora", exact=answered(better, worse), correct=correct)]).tasks)
    verdict = next(v for v in found if v.claim.startswith("DoRA adds"))
    assert "exact match" in verdict.measured
    assert verdict.verdict == said


def test_where_answers_leave_no_room_dora_is_judged_by_tokens() -> None:
    full = {"exact": [0.0] * 8}
    records = [*runs("lora", **full), *runs("dora", correct=[9] * 16, **full)]
    found = next(v for v in verdicts(findings(records).tasks) if v.claim.startswith("DoRA"))
    assert found.verdict == HELD
    assert "exact match" not in found.measured
    assert "+10.00" in found.measured


@pytest.mark.parametrize(("change", "said"), [(-0.5, HELD), (0.5, NOT_HELD)])
def test_adalora_is_judged_against_the_fixed_rank(change: float, said: str) -> None:
    assert answer("AdaLoRA beats", runs("adalora", change=change))[0] == said


@pytest.mark.parametrize(("change", "said"), [(0.5, HELD), (-0.5, NOT_HELD), (0.0, NOT_HELD)])
def test_all_linear_beats_q_and_v_where_these_are_worse(change: float, said: str) -> None:
    assert answer("all-linear beats", runs("lora-qv", change=change))[0] == said


def grid(best: dict[str, float]) -> list[Record]:
    """One seed of every rank at four rates; each loses two nats a row for each rate between it and its best."""
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    return [
        record(name, rate=rate, change=2.0 * abs(rates.index(rate) - rates.index(best[name])))
        for name in RANKS
        for rate in rates
    ]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [((1e-3, 1e-3, 1e-3), HELD), ((1e-2, 1e-3, 1e-3), NOT_HELD), ((1e-4, 1e-4, 1e-4), UNTESTED)],
)
def test_the_rate_is_the_same_at_every_rank_or_not_or_outside(ranks: tuple[float, ...], said: str) -> None:
    found = verdicts(findings(grid(dict(zip(RANKS, ranks, strict=True)))).tasks)
    assert next(v.verdict for v in found if v.claim.startswith("the optimal learning rate")) == said


@pytest.mark.parametrize(("scale", "said"), [(2.0, HELD), (1.0, NOT_HELD), (0.5, NOT_HELD)])
def test_forgetting_grows_where_the_drift_does(scale: float, said: str) -> None:
    def drifting(factor: float) -> list[float]:
        return [factor * kl for kl in (0.10, 0.12, 0.14)]

    ranks = [*runs("lora-r4", drift=drifting(1 / scale)), *runs("lora-r64", drift=drifting(scale))]
    assert answer("forgetting grows with rank", ranks)[0] == said
    lengths = [*runs("lora-half", drift=drifting(1 / scale)), *runs("lora-double", drift=drifting(scale))]
    assert answer("forgetting grows with steps", lengths)[0] == said


def test_forgetting_is_compared_at_one_learning_rate() -> None:
    assert answer("forgetting grows with rank", runs("lora-r4", rate=1e-2), runs("lora-r64"))[0] == UNTESTED


# --- advice ----------------------------------------------------------------------------------------------------------


def advised(*records: Iterable[Record]) -> str:
    return "\n".join(advice(findings([*runs("lora"), *(one for each in records for one in each)])))


def test_the_first_choice_is_what_was_better_by_more_than_chance() -> None:
    text = advised(runs("dora", change=-0.2), runs("pissa", change=-0.5), runs("olora", change=0.5), runs("eva"))
    assert text.startswith("**Start with PiSSA.**")
    assert "Better than LoRA too: DoRA" in text
    assert "**No difference beyond chance** was measured for EVA." in text
    assert "and on none better: OLoRA (" in text


def test_without_a_better_one_it_is_plain_lora() -> None:
    assert advised(runs("dora"), runs("pissa", change=0.5)).startswith("**Start with LoRA.** None of DoRA, PiSSA")


def test_better_on_one_task_alone_is_no_first_choice() -> None:
    second = [each | {"task": "other rows"} for each in [*runs("lora"), *runs("dora", change=0.5)]]
    text = advised(runs("dora", change=-0.5), second)
    assert text.startswith("**Start with LoRA.**")
    assert "**Try on your own data**" in text


def test_the_smallest_rank_that_is_not_worse_is_enough() -> None:
    assert "**Rank**: r 4 is enough" in advised(runs("lora-r4"), runs("lora-r64", change=0.1))
    assert "**Rank**: r 64 is enough" in advised(runs("lora-r4", change=0.3), runs("lora-r64", change=-0.3))


@pytest.mark.parametrize(("change", "said"), [(-0.5, "pays"), (0.5, "costs"), (0.0, "gained nothing certain")])
def test_loftq_is_advised_against_lora_over_nf4(change: float, said: str) -> None:
    text = advised(runs("qlora", change=3.0), runs("loftq", change=3.0 + change))
    assert f"**Over a base in 4 bits**, LoftQ's start {said}" in text


def test_a_method_whose_loss_still_fell_at_the_largest_rate_is_named() -> None:
    tried = [record("adalora", 0, rate, change=change) for rate, change in ((1e-4, 3.0), (1e-3, 0.0))]
    flat = [record("dora", 0, rate, change=change) for rate, change in ((1e-4, 0.01), (1e-3, 0.0))]
    text = advised(tried, runs("adalora")[1:], flat, runs("dora")[1:])
    (told,) = (line for line in text.splitlines() if line.startswith("**Not searched far enough**"))
    assert "the loss still fell for AdaLoRA, r 24 to 16 (2" in told
    assert "DoRA" not in told
    assert "Not searched far enough" not in advised(flat, runs("dora")[1:])


def test_nothing_measured_advises_nothing() -> None:
    assert advice(findings([])) == ["Nothing was measured beside LoRA: there is nothing to advise."]


# --- cost ------------------------------------------------------------------------------------------------------------


def block(seconds: float, training: float = 1.0, whole: float = 2.0) -> dict[str, float]:
    return {"seconds": seconds, "training_gb": training, "whole_gb": whole}


def test_a_ratio_of_step_times_is_the_median_of_pairs_and_a_slow_minute_hits_both() -> None:
    pairs = [(block(1.1), block(1.0)), (block(5.5), block(5.0)), (block(9.0), block(1.0))]
    found = ratios([[*pairs, (block(1.2, 1.5, 2.2), block(1.0))]])
    assert found["step_ratio"] == pytest.approx(1.15)
    assert found["memory_ratio"] == 1.5
    assert found["whole_ratio"] == pytest.approx(1.1)


def test_a_ratio_of_memories_is_the_median_of_starts() -> None:
    starts = [[(block(1.0), block(1.0)), (block(1.0, memory), block(1.0))] for memory in (1.02, 1.3, 1.05)]
    found = ratios(starts)
    assert found["memory_ratio"] == 1.05
    assert found["memories"] == [1.02, 1.3, 1.05]
    assert len(found["steps"]) == 6


@pytest.mark.parametrize(
    ("name", "step", "memory", "within"),
    [("dora", 1.15, 1.10, True), ("dora", 1.16, 1.0, False), ("pissa", 1.12, 1.0, False), ("pissa", 1.0, 1.11, False)],
)
def test_dora_may_cost_more_time_than_the_others(name: str, step: float, memory: float, within: bool) -> None:
    assert within_limits(name, {"step_ratio": step, "memory_ratio": memory}) is within


def cost(method: str, **changes: Any) -> Record:
    figures = {"step_ratio": 1.02, "step_low": 1.0, "step_high": 1.04, "memory_ratio": 0.9, "whole_ratio": 1.0}
    figures |= {"steps": [1.0, 1.02, 1.04]}
    return {**record(method), "task": "cost", "reference": METHODS[method].reference, **figures, **changes}


def test_costs_stand_beside_the_runs_and_not_among_them() -> None:
    found = findings([*runs("lora"), *runs("dora", change=-0.5), cost("dora"), cost("lora-fa", step_ratio=1.2)])
    assert list(found.tasks) == [TASK]
    assert "| DoRA | LoRA, r 16 | 1.020 (1.000 to 1.040) | 0.900 | 1.000 | reached |" in cost_table(found.costs)
    assert "1.200 (1.000 to 1.040) | 0.900 | 1.000 | not reached |" in cost_table(found.costs)
    assert "A step takes 1.02 times LoRA's time" in "\n".join(advice(found))


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_comes_from_the_records_alone(tmp_path: Path) -> None:
    base = record("base", rate=0.0, change=5.0)
    del base["drift"]
    records = [base, *runs("lora"), *runs("dora", change=-0.5), *grid(dict.fromkeys(RANKS, 1e-3)), cost("dora")]
    found = findings(records, [{**record("eva"), "error": "VeneerError: no such init"}])
    write_page(found, tmp_path / "docs" / "variants.md")
    text = (tmp_path / "docs" / "variants.md").read_text()
    assert text == page(found)
    for part in (
        "## Which one should I use",
        "**Start with DoRA.**",
        "| DoRA adds 1 to 5 points | some rows |",
        "| the base |  |  |",
        "| DoRA | 0.001 | 3 |",
        "| EVA | some rows | VeneerError: no such init |",
        "DoRA: a-model in bfloat16 on cpu (AVX512, 2 threads), 8 rows a step, 3 pairs of blocks.",
        "| r 4 |",
        "8 held-out rows chose",
    ):
        assert part in " ".join(text.split()) or part in text
    for what in ("loss", "drift"):
        name = picture("variants", what, TASK)
        assert f"({name})" in text
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")


def test_a_task_without_short_answers_has_no_column_for_them() -> None:
    records = [*runs("lora"), *runs("dora")]
    assert "exact match" in page(findings(records))
    for each in records:
        del each["exact"]
    assert "exact match |" not in page(findings(records))


def test_exact_match_is_in_per_cent() -> None:
    assert exact_match(runs("lora")).value.value == 50.0


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_demos_answers_are_taken_from_the_rows_that_are_reported(tmp_path: Path) -> None:
    task = prepare_task(
        parse(["--rows", "8", "--held-out", "8", "--answers", "3", "--steps", "3"]), None, tmp_path / "t"
    )
    held_out = task.held_out.read_text().splitlines()
    assert Path(task.answers).read_text().splitlines() == held_out[4:7]
    assert task.label == "the demo's task"


def test_rows_of_a_file_are_not_answered(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}", "completion": "x"}}\n' for n in range(12)))
    options = parse(["--rows", "8", "--held-out", "4", "--answers", "2", "--steps", "3"])
    assert prepare_task(options, data, tmp_path / "t").answers == ""


def test_quick_is_what_it_says_and_can_be_changed() -> None:
    quick = parse(["--quick"])
    assert (quick.seeds, quick.rates, quick.data) == (1, [5e-4], None)
    assert quick.methods == ["lora", "rslora", "dora", "pissa", "lora+", "loftq"]
    assert parse(["--quick", "--methods", "dora", "--steps", "5"]).methods == ["dora"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lorra"], "unknown method 'lorra'"),
        (["--held-out", "2"], "--held-out must be at least 4"),
        (["--held-out", "8", "--answers", "5"], "--answers cannot be more"),
        (["--page-only"], "--page-only needs the file of --results"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.variants", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
