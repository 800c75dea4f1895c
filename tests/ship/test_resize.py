"""A smaller adapter: the best one of its rank, read by PEFT as by us, with what it costs."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.adapters import LoraConfig, attach, load_adapter, read_adapter
from veneer.adapters.spectrum import updates
from veneer.errors import AdapterError, DataError, UsageError
from veneer.evaluate import evaluate
from veneer.models import load_base
from veneer.ship import resize_adapter

QV = ["q_proj", "v_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": QV, "use_rslora": True},
    "patterns": {
        "target_modules": [*QV, "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 6},
        "alpha_pattern": {"q_proj": 3, r"layers\.1.*v_proj": 20},
    },
    "rslora with patterns": {"target_modules": QV, "use_rslora": True, "alpha_pattern": {"v_proj": 20}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved modules": {"target_modules": QV, "modules_to_save": ["model.norm"]},
    "token rows": {"target_modules": QV, "trainable_token_indices": [5, 1, 3]},
    "dora": {"target_modules": QV, "use_dora": True},
    "orthogonal": {"target_modules": QV, "init_lora_weights": "orthogonal"},
}


def written(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter whose tensors have all moved."""
    options: dict[str, Any] = {"r": 8, "lora_alpha": 12} | settings
    adapted = attach(load_base(base, dtype="float32", device="cpu"), LoraConfig(**options), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.save(folder)


def dense(folder: Path) -> dict[str, Tensor]:
    """Each layer's update in float64."""
    found = updates(*read_adapter(folder), where="")
    return {update.path: update.scaling * update.B.double() @ update.A.double() for update in found}


def ids() -> Tensor:
    return torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(base: Path, folder: Path) -> Tensor:
    adapted = load_adapter(load_base(base, dtype="float32", device="cpu"), folder)
    result: Tensor = adapted.module(ids()).logits
    return result


@pytest.mark.parametrize("case", CASES)
def test_each_layer_is_the_best_of_its_rank_and_its_error_is_told(case: str, wide_base: Path, tmp_path: Path) -> None:
    old = written(wide_base, tmp_path / "old", **CASES[case])
    result = resize_adapter(old, tmp_path / "new", rank=3)
    before, after = dense(old), dense(tmp_path / "new")
    assert before.keys() == after.keys()
    for layer in result.layers:
        U, S, Vh = torch.linalg.svd(before[layer.path], full_matrices=False)
        assert layer.rank == 3
        best = U[:, :3] * S[:3] @ Vh[:3]
        torch.testing.assert_close(after[layer.path], best, rtol=1e-4, atol=1e-5)
        assert layer.error == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-4, abs=1e-6)
    total = math.sqrt(sum(float((before[p] - after[p]).square().sum()) for p in before))
    assert result.error == pytest.approx(
        total / math.sqrt(sum(float(d.square().sum()) for d in before.values())), rel=1e-4
    )


@pytest.mark.parametrize("energy", [None, 0.8])
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_it_with_the_same_logits(case: str, energy: float | None, wide_base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    old = written(wide_base, tmp_path / "old", **CASES[case])
    result = resize_adapter(old, tmp_path / "new", rank=None if energy else 3, energy=energy)
    ours = logits(wide_base, tmp_path / "new")
    base = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "new")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, ours, rtol=1e-4, atol=5e-5)
    assert (ours - logits(wide_base, old)).abs().max() > 1e-3
    assert result.parameters < result.parameters_before
    if energy and case == "plain":
        assert len({layer.rank for layer in result.layers}) > 1  # the patterns say something


@pytest.mark.parametrize("case", CASES)
def test_at_full_rank_nothing_changes_and_what_is_no_update_never_does(
    case: str, wide_base: Path, tmp_path: Path
) -> None:
    old = written(wide_base, tmp_path / "old", **CASES[case])
    result = resize_adapter(old, tmp_path / "new", rank=8)
    assert result.error < 1e-6
    torch.testing.assert_close(logits(wide_base, tmp_path / "new"), logits(wide_base, old), rtol=1e-4, atol=1e-5)
    resize_adapter(old, tmp_path / "small", rank=2)
    resize_adapter(tmp_path / "small", tmp_path / "again", rank=2)
    small, again = (read_adapter(tmp_path / name) for name in ("small", "again"))
    assert small[0] == again[0]
    original = read_adapter(old)[1]
    for key, tensor in small[1].items():
        torch.testing.assert_close(again[1][key], tensor, rtol=1e-4, atol=1e-6)
        if "lora_A" not in key and "lora_B" not in key and "lora_embedding" not in key:
            assert torch.equal(tensor, original[key])


def test_energy_gives_each_layer_the_fewest_directions_that_hold_it(wide_base: Path, tmp_path: Path) -> None:
    old = written(wide_base, tmp_path / "old", target_modules="all-linear")
    result = resize_adapter(old, tmp_path / "new", energy=0.9)
    before = dense(old)
    for layer in result.layers:
        held = torch.linalg.svdvals(before[layer.path]).square().cumsum(0)
        share = held / held[-1]
        assert share[layer.rank - 1] >= 0.9
        assert layer.rank == 1 or share[layer.rank - 2] < 0.9
        assert layer.error <= math.sqrt(0.1)
    assert resize_adapter(old, tmp_path / "all", energy=1.0).error < 1e-6


def test_a_layer_without_an_update_keeps_one_rank(wide_base: Path, tmp_path: Path) -> None:
    old = written(wide_base, tmp_path / "old", target_modules=["q_proj"])
    tensors = load_file(old / "adapter_model.safetensors")
    still = next(key for key in tensors if "layers.0" in key and "lora_B" in key)
    tensors[still].zero_()
    save_file(tensors, old / "adapter_model.safetensors", metadata={"format": "pt"})
    result = resize_adapter(old, tmp_path / "new", energy=0.99)
    assert result.layers[0].rank == 1
    assert result.layers[0].error == 0
    after = dense(tmp_path / "new")
    assert [bool(update.any()) for update in after.values()] == [False, True]
    assert load_file(tmp_path / "new" / "adapter_model.safetensors")[still.replace("_B", "_A")].any()  # it can learn
    assert logits(wide_base, tmp_path / "new").isfinite().all()


def test_the_factors_are_balanced_and_each_layer_keeps_its_scaling(wide_base: Path, tmp_path: Path) -> None:
    old = written(wide_base, tmp_path / "old", **CASES["patterns"])
    resize_adapter(old, tmp_path / "new", energy=0.8)
    before, after = (
        {update.path: update for update in updates(*read_adapter(folder), where="")}
        for folder in (old, tmp_path / "new")
    )
    for path, update in after.items():
        assert update.scaling == pytest.approx(before[path].scaling, rel=1e-12)
        torch.testing.assert_close(update.A.norm(dim=1), update.B.norm(dim=0), rtol=1e-5, atol=1e-6)
    assert len({update.scaling for update in after.values()}) > 1


def test_the_dtype_and_the_notes_of_another_program_stay(wide_base: Path, tmp_path: Path) -> None:
    old = written(wide_base, tmp_path / "old", target_modules=QV)
    tensors = load_file(old / "adapter_model.safetensors")
    save_file(
        {k: v.bfloat16() for k, v in tensors.items()}, old / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    path = old / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.21.2", "runtime_config": None}))
    (old / "veneer.json").unlink()
    result = resize_adapter(old, tmp_path / "new", rank=8)
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    assert 1e-4 < result.error < 1e-2  # measured on what was written: bfloat16 rounds
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["peft_version"] == "0.21.2"
    assert "base" not in json.loads((tmp_path / "new" / "veneer.json").read_text())


def test_experts_are_cut_one_by_one_and_written_in_pefts_layout(tmp_path: Path) -> None:
    E, out, width, r = 3, 10, 14, 4
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(E * r, width, generator=generator), torch.randn(out, r * E, generator=generator)
    old = tmp_path / "old"
    old.mkdir()
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 8,
        "target_modules": [],
        "target_parameters": ["experts.down_proj"],
    }
    (old / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.layers.0.experts."
    save_file({f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B}, old / "adapter_model.safetensors")
    result = resize_adapter(old, tmp_path / "new", rank=2)
    assert [layer.path for layer in result.layers] == [f"layers.0.experts.down_proj[{e}]" for e in range(E)]
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    a, b = new[f"{prefix}lora_A.weight"].view(E, 2, width), new[f"{prefix}lora_B.weight"].view(out, 2, E)
    for e in range(E):
        U, S, Vh = torch.linalg.svd(2.0 * B.view(out, r, E)[:, :, e] @ A.view(E, r, width)[e])
        best = U[:, :2] * S[:2] @ Vh[:2]
        torch.testing.assert_close(2.0 * b[:, :, e] @ a[e], best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("energy", [None, 0.6])
@pytest.mark.parametrize("experts", ["all", [1]])
def test_default_adapters_with_experts_are_cut_and_read_by_peft(
    experts: Any, energy: float | None, moe_base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    old = written(moe_base, tmp_path / "old", r=4, experts=experts)
    assert json.loads((old / "adapter_config.json").read_text())["rank_pattern"]  # the shared expert's gate has rank 1
    result = resize_adapter(old, tmp_path / "new", rank=None if energy else 2, energy=energy)
    before, after = by_name(old), by_name(tmp_path / "new")
    for layer in result.layers:
        S = torch.linalg.svdvals(before[layer.path])
        assert layer.error == pytest.approx(
            float(S[layer.rank :].norm() / S.norm().clamp(min=1e-9)), rel=1e-4, abs=1e-6
        )
        assert layer.error <= (1 if energy is None else math.sqrt(1 - energy))
        torch.testing.assert_close(
            (before[layer.path] - after[layer.path]).norm(), S[layer.rank :].norm(), rtol=1e-4, atol=1e-5
        )
    stack = [layer.rank for layer in result.layers if layer.path.startswith("model.layers.0.mlp.experts.gate_up")]
    assert len(stack) == 4
    assert len(set(stack)) == 1
    base = AutoModelForCausalLM.from_pretrained(moe_base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "new")).eval()
    ours = logits(moe_base, tmp_path / "new")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, ours, rtol=1e-4, atol=2e-4)


def by_name(folder: Path) -> dict[str, Tensor]:
    found = updates(*read_adapter(folder), where="")
    return {update.name: update.scaling * update.B.double() @ update.A.double() for update in found}


def test_pefts_adalora_becomes_a_plain_lora_that_both_read(wide_base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
    config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, lora_alpha=12, target_modules=QV)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name and parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        theirs.save_pretrained(str(tmp_path / "old"))
        resize_adapter(tmp_path / "old", tmp_path / "new", rank=2)
        data = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
        assert (data["peft_type"], "init_r" in data) == ("LORA", False)
        assert set(data["target_modules"]) == set(QV)  # PEFT writes a set, in any order
        base = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "new")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, logits(wide_base, tmp_path / "new"), rtol=1e-4, atol=5e-5)
    assert resize_adapter(tmp_path / "old", tmp_path / "all", rank=6).error < 1e-6


def test_what_would_be_read_as_another_adapter_is_not_written(
    wide_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = written(wide_base, tmp_path / "old", target_modules=QV)
    kept = json.loads((old / "adapter_config.json").read_text())  # with the ranks that were
    monkeypatch.setattr("veneer.ship.resize._file_config", lambda *_: kept | {"lora_alpha": 3})
    with pytest.raises(AdapterError, match="would be read as another one"):
        resize_adapter(old, tmp_path / "new", rank=8)
    assert not (tmp_path / "new").exists()


def test_tokens_that_were_added_keep_their_tokenizer(wide_base: Path, tmp_path: Path) -> None:
    loaded = load_base(wide_base, dtype="float32", device="cpu")
    loaded.add_tokens(["<item>", "<order>"])
    config = LoraConfig(r=8, init_lora_weights=False, target_modules=QV, trainable_token_indices=[300, 301])
    old = attach(loaded, config, seed=0).save(tmp_path / "old")
    resize_adapter(old, tmp_path / "new", rank=2)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in old.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "new" / name).read_bytes() == (old / name).read_bytes()
    adapted = load_adapter(load_base(wide_base, dtype="float32", device="cpu"), tmp_path / "new")
    assert adapted.base.tokenizer.encode("<order>") == [301]  # type: ignore[union-attr]
    resize_adapter(old, tmp_path / "new", rank=3, overwrite=True)


def test_other_rows_are_read_under_the_columns_of_the_run(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["columns"] = {"prompt": "frage", "completion": "antwort"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"frage": f"spell {n}", "antwort": str(n)} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = resize_adapter(run, tmp_path / "new", rank=2, data=str(tmp_path / "rows.jsonl"))
    assert result.before is not None
    assert len(result.before.rows) == 3


def test_a_classifier_is_measured_by_its_accuracy(wide_base: Path, tmp_path: Path) -> None:
    loaded = load_base(wide_base, dtype="float32", device="cpu", labels=["no", "yes"])
    config = LoraConfig(r=8, init_lora_weights=False, target_modules=QV, modules_to_save=["score"], task_type="SEQ_CLS")
    old = attach(loaded, config, seed=0).save(tmp_path / "old", extra={"labels": ["no", "yes"], "majority": "no"})
    rows = [{"text": f"is {n} even?", "label": ("yes", "no")[n % 2]} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = resize_adapter(old, tmp_path / "new", rank=2, data=str(tmp_path / "rows.jsonl"))
    assert {"accuracy", "macro_f1"} <= result.metrics().keys()
    with pytest.raises(UsageError, match="'perplexity' is no metric of a classifier"):
        resize_adapter(old, tmp_path / "other", rank=2, metrics=["perplexity"])


def test_without_rows_it_is_said_that_nothing_was_measured(lora_run: Path, tmp_path: Path) -> None:
    assert resize_adapter(lora_run / "adapter", tmp_path / "new", rank=2).notes == [
        "not measured: no held-out rows are named (--data FILE)"
    ]
    assert resize_adapter(lora_run / "adapter", tmp_path / "quiet", rank=2, measure=False).notes == []


def test_the_held_out_metric_is_that_of_both_adapters(lora_run: Path, tmp_path: Path) -> None:
    result = resize_adapter(lora_run, tmp_path / "new", rank=1, device="cpu")
    metrics = result.metrics()["perplexity"]
    assert result.before is not None
    assert len(result.before.rows) == 6
    expected = evaluate(lora_run, result_rows(lora_run), metrics=["perplexity"], compare=False)
    assert metrics["before"] == pytest.approx(expected.metrics["perplexity"].value, rel=1e-6)
    again = load_adapter(load_base(base_of(lora_run), dtype="float32", device="cpu"), tmp_path / "new")
    alone = evaluate(again, result_rows(lora_run), metrics=["perplexity"], compare=False)
    assert metrics["after"] == pytest.approx(alone.metrics["perplexity"].value, rel=1e-5)
    assert metrics["after"] != pytest.approx(metrics["before"], rel=1e-3)
    record = json.loads((tmp_path / "new" / "veneer.json").read_text())
    assert record["resized"]["metrics"] == result.metrics()
    assert record["resized"]["rank"] == 1
    assert record["base"] == json.loads((lora_run / "adapter" / "veneer.json").read_text())["base"]
    assert record["quantization"] is None

    unmeasured = resize_adapter(lora_run, tmp_path / "fast", rank=1, measure=False)
    assert unmeasured.metrics() == {}
    assert logits(base_of(lora_run), tmp_path / "fast").equal(logits(base_of(lora_run), tmp_path / "new"))


def result_rows(run: Path) -> Any:
    from veneer.run import held_out_rows, open_run

    return held_out_rows(open_run(run).recipe.data)


def base_of(run: Path) -> Path:
    return Path(json.loads((run / "adapter" / "veneer.json").read_text())["base"]["name"])


def test_a_run_over_codes_keeps_the_record_of_them_and_is_measured_over_them(qlora_run: Path, tmp_path: Path) -> None:
    result = resize_adapter(qlora_run, tmp_path / "new", energy=0.9, device="cpu")
    record = json.loads((tmp_path / "new" / "veneer.json").read_text())
    assert record["quantization"]["scheme"] == "nf4"
    metrics = result.metrics()["perplexity"]
    assert metrics["after"] == pytest.approx(metrics["before"], rel=0.2)


def test_a_run_whose_rows_are_gone_is_resized_and_says_so(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    source = result_rows(lora_run).source
    (run / "recipe.yaml").write_text(recipe.replace(source, str(tmp_path / "gone.jsonl")))
    result = resize_adapter(run, tmp_path / "new", rank=2)
    assert result.metrics() == {}
    assert "the run's held-out rows cannot be used" in result.notes[0]
    with pytest.raises(DataError):
        resize_adapter(run, tmp_path / "other", rank=2, data=str(tmp_path / "gone.jsonl"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, "rank 9 is above the adapter's own 8"),
        ({"rank": 0}, "the rank cannot be 0"),
        ({"energy": 0.0}, "the energy cannot be 0.0"),
        ({"energy": 99.0}, "the energy cannot be 99.0"),
        ({}, "either a rank or a share of energy"),
        ({"rank": 2, "energy": 0.9}, "either a rank or a share of energy"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    options: dict[str, Any], message: str, lora_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        resize_adapter(lora_run, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_taken_output_is_replaced_only_when_asked_and_only_an_adapter(lora_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    resize_adapter(lora_run, target, rank=2, measure=False)
    with pytest.raises(UsageError, match="the output is taken"):
        resize_adapter(lora_run, target, rank=3, measure=False)
    resize_adapter(lora_run, target, rank=3, measure=False, overwrite=True)
    assert read_adapter(target)[0].r == 3
    (target / "thesis.txt").write_text("all I have")
    with pytest.raises(UsageError, match=r"holds other files than an adapter's \(thesis.txt\)"):
        resize_adapter(lora_run, target, rank=2, measure=False, overwrite=True)
    assert (target / "thesis.txt").read_text() == "all I have"


def test_broken_tensors_and_another_base_are_refused(
    lora_run: Path, tmp_path: Path, tiny_rows: Path, make_tiny_base: Callable[..., Path]
) -> None:
    broken = shutil.copytree(lora_run / "adapter", tmp_path / "a")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.inf
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="NaN or Inf"):
        resize_adapter(broken, tmp_path / "new", rank=2)
    other = make_tiny_base(hidden_size=64, intermediate_size=128, seed=1)
    with pytest.raises(AdapterError, match="was trained on"):
        resize_adapter(lora_run / "adapter", tmp_path / "new", rank=2, data=tiny_rows, base=str(other))
    assert not (tmp_path / "new").exists()
