"""The layout of a step's rows in memory and over processes changes neither its loss nor its gradient."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import lines

# Float32 sums in another order differ in the last bits; a mean of means, a padded token in the loss, a row that sees
# its neighbour or a lost row differ in the second digit.
LARGEST, BIAS = 2e-5, 2e-6

# Noise on the embeddings is part of it: it must not depend on the layout either. The 20 rows make a last step of 4. The
# large epsilon keeps Adam from blowing up the rounding of gradients that are almost zero to whole steps.
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 4,
    "neftune_noise_alpha": 5.0,
    "adam_epsilon": 1e-4,
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "packed in one": {},
    "packed in several": {"micro_batch_tokens": 64},
    "padded": {"packing": False},
    "padded 1 x 8": {"packing": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "checkpointed": {"gradient_checkpointing": True, "packing": False},
    "two processes": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def finished(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_every_layout_gives_the_same_series_through_the_command_line(
    write_recipe: Callable[..., Path], start_train: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    for name in LAYOUTS:
        through_the_command_line(name, write_recipe, start_train)
    reference = lines(tmp_path / slug("packed in one"))
    for name in LAYOUTS:
        compare(reference, lines(tmp_path / slug(name)), name)


def test_two_processes_and_accumulation_equal_one_packed_batch_through_the_command_line(
    small_run: Callable[..., Any],
    write_recipe: Callable[..., Path],
    start_train: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    small_run("reference", train=COMMON)
    reference = lines(tmp_path / "reference")
    assert [line["step"] for line in reference if "loss" in line] == list(range(1, 13))
    assert [line["rows"] for line in reference if "loss" in line] == [8, 8, 4] * 4
    for name in ("padded 1 x 8", "two processes"):
        through_the_command_line(name, write_recipe, start_train)
        compare(reference, lines(tmp_path / slug(name)), name)


def slug(name: str) -> str:
    return name.replace(" ", "-")


def through_the_command_line(
    name: str, write_recipe: Callable[..., Path], start_train: Callable[..., subprocess.Popen[str]]
) -> None:
    recipe = write_recipe(slug(name), train={**COMMON, **LAYOUTS[name]})
    finished(start_train(recipe, processes=2 if name == "two processes" else 1))


def compare(reference: list[dict[str, Any]], other: list[dict[str, Any]], name: str) -> None:
    assert [line["step"] for line in reference] == [line["step"] for line in other], name
    for key in ("trained_tokens", "tokens", "learning_rate", "epoch"):
        assert [line.get(key) for line in reference] == [line.get(key) for line in other], (name, key)
    for key in ("loss", "grad_norm", "eval_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(reference, other) if key in a]
        differences = [b - a for a, b in pairs]
        assert len(differences) >= 5
        assert max(map(abs, differences)) < LARGEST, (name, key, differences)
        assert abs(sum(differences) / len(differences)) < BIAS, (name, key, differences)
    losses = [line["loss"] for line in reference if "loss" in line]
    assert losses[-1] < losses[0] - 0.5, "the series must move, or it proves nothing"


@pytest.mark.parametrize("name", list(LAYOUTS)[1:-1])
def test_layouts_of_one_process_give_the_same_series(name: str, small_run: Callable[..., Any], tmp_path: Path) -> None:
    small_run("reference", train=COMMON)
    small_run("other", train={**COMMON, **LAYOUTS[name]})
    compare(lines(tmp_path / "reference"), lines(tmp_path / "other"), name)


def test_the_comparison_sees_a_mean_of_means(small_run: Callable[..., Any], tmp_path: Path) -> None:
    """What peers get wrong: each micro-batch's own mean, averaged. It must not pass for the same."""
    small_run("reference", train={"num_train_epochs": 4})
    honest = lines(tmp_path / "reference")
    wrong = [{**line, "loss": line["loss"] * 1.001} if "loss" in line else line for line in honest]
    with pytest.raises(AssertionError):
        compare(honest, wrong, "wrong")


def test_a_step_equals_plain_pytorch_on_the_same_rows(
    small_run: Callable[..., Any], tiny_base: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Loss and gradient norm of the first step against transformers' own logits, one row at a time, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from veneer.adapters import LoraConfig, attach
    from veneer.data import read, render
    from veneer.models import load_tokenizer
    from veneer.train.sampler import step_rows

    small_run("run", data={"eval": None}, train={"max_steps": 1, "max_grad_norm": None})
    dataset = render(read(tiny_rows), load_tokenizer(tiny_base), max_length=64)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    adapted = attach(model, LoraConfig(r=4), seed=0)
    indices, _ = step_rows(0, len(dataset), 8, 0)
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for index in indices:
        row = dataset.row(int(index))
        ids, trained = torch.tensor(row.input_ids).long(), torch.tensor(row.trained)
        logp = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
        nll = -logp.gather(1, ids[1:, None])[:, 0]
        loss = loss + nll[trained[1:]].sum()
        count += int(trained[1:].sum())
    (loss / count).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    norm = torch.cat([p.grad.double().flatten() for p in adapted.parameters() if p.grad is not None]).norm()
    (line,) = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert line["trained_tokens"] == count
    assert line["loss"] == pytest.approx(loss.item() / count, rel=1e-6)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
