"""train, eval and generate on a classifier, from the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

from classifiers import write_classifier_base


def test_a_classifier_is_trained_measured_and_asked(
    veneer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    write_classifier_base("bert", tmp_path / "base")
    words = {"warm": "sun fire", "cold": "ice snow"}
    rows = [{"text": f"{words[label]} {n}", "label": label} for n in range(12) for label in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "task": "classification",
        "base": "base",
        "dtype": "float32",
        "device": "cpu",
        "adapter": {"r": 4},
        "data": {"train": "rows.jsonl", "eval": 6},
        "train": {"num_train_epochs": 5, "learning_rate": 2e-2},
        "output_dir": "run",
    }
    recipe["base"] = str(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    trained = veneer("train", "recipe.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "accuracy:" in trained.stdout
    assert "the baseline of the accuracy" in trained.stderr

    measured = veneer("eval", "run")
    assert measured.returncode == 0, measured.stderr
    for part in ("accuracy", "macro F1", "baseline", "precision", "Accuracy on 6 held-out rows"):
        assert part in measured.stdout
    document = json.loads(veneer("eval", "run", "--json", "--quiet").stdout)
    assert document["confusion"]["labels"] == ["cold", "warm"]
    assert sum(map(sum, document["confusion"]["matrix"])) == 6
    assert document["metrics"]["accuracy"]["value"] == 1.0
    assert (tmp_path / "run" / "eval" / "rows.json").is_file()
    refused = veneer("eval", "run", "--metrics", "rouge_l")
    assert "'rouge_l' is no metric of a classifier" in refused.stderr

    asked = veneer("generate", "run", "sun fire 77")
    assert asked.returncode == 0, asked.stderr
    label, probability = asked.stdout.split()
    assert label == "warm"
    assert 50 < float(probability.removesuffix("%")) <= 100
    (tmp_path / "new.jsonl").write_text('{"text": "ice snow"}\n{"text": "sun fire"}\n')
    several = veneer("generate", "run", "--data", "new.jsonl", "--json")
    assert [answer["label"] for answer in json.loads(several.stdout)["answers"]] == ["cold", "warm"]
    assert "a classifier writes no text" in veneer("generate", "run", "hello", "--system", "be kind").stderr
    assert "it names classes and writes no text" in veneer("chat", "run").stderr

    merged = veneer("merge", "run", "--output", "merged")
    assert merged.returncode == 0, merged.stderr
    assert "measured on the run's 6 held-out rows\n" in merged.stdout
    assert "next:  veneer generate merged" in merged.stdout
    assert veneer("generate", "merged", "sun fire 77").stdout.split()[0] == "warm"
    again = json.loads(veneer("eval", "merged", "--data", "rows.jsonl", "--json", "--quiet").stdout)
    assert again["metrics"]["accuracy"]["value"] == 1.0

    assert "veneer generate run" in trained.stdout  # what to do next: a classifier does not chat
    shown = json.loads(veneer("data", "show", "recipe.yaml", "-n", "1", "--json").stdout)
    assert shown[0]["label"] in words
    assert shown[0]["text"].startswith(words[shown[0]["label"]])
    assert "  label: " in veneer("data", "show", "recipe.yaml", "-n", "1").stdout
    checked = veneer("data", "check", "recipe.yaml")
    assert checked.returncode == 0
    assert "2 classes: cold, warm" in checked.stdout
