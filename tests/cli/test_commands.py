"""Each verb does its job on a tiny run, and with --json stdout is one document."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def recipe(folder: Path, base: Path, rows: Path, **train: Any) -> Path:
    """A recipe of two steps, beside which the run ``run`` is written."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 64, **train}
    path = folder / "tiny.yaml"
    path.write_text(
        f"base: {base}\ndtype: float32\ndata: {{train: {rows}, eval: 4}}\nadapter: {{r: 2}}\n"
        f"train: {json.dumps(settings)}\neval: {{samples: 0}}\noutput_dir: {folder / 'run'}\n"
    )
    return path


def document(text: str) -> Any:
    """The one JSON document that ``text`` is."""
    return json.loads(text)


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_says_where(cli: Cli, tmp_path: Path, tiny_base: Path, tiny_rows: Path) -> None:
    done = cli("train", recipe(tmp_path, tiny_base, tiny_rows), "train.seed=3")
    assert done.code == 0
    said = {name: text.strip() for name, _, text in (line.partition(":") for line in done.out.splitlines())}
    assert said["adapter"] == str(tmp_path / "run" / "adapter")
    assert said["report"] == str(tmp_path / "run" / "report.html")
    assert re.fullmatch(r"[\d.]+ before, [\d.]+ after", said["loss"])
    assert "step 2/2" in done.err
    run = tmp_path / "run"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert "seed: 3" in (run / "recipe.yaml").read_text()


def test_train_with_json_prints_one_document_and_quiet_nothing_else(
    cli: Cli, tmp_path: Path, tiny_base: Path, tiny_rows: Path
) -> None:
    done = cli("train", recipe(tmp_path, tiny_base, tiny_rows), "--json", "--quiet")
    assert done.code == 0
    result = document(done.out)
    assert result["run"] == str(tmp_path / "run")
    assert result["steps"] == 2
    assert result["interrupted"] is False
    assert result["metrics"]["eval_loss"] > 0
    assert "step" not in done.err


def test_a_run_is_not_trained_over_unless_that_is_said(
    cli: Cli, tmp_path: Path, tiny_base: Path, tiny_rows: Path
) -> None:
    path = recipe(tmp_path, tiny_base, tiny_rows)
    assert cli("train", path, "--quiet").code == 0
    again = cli("train", path)
    assert again.code == 1
    assert "holds a run already" in again.err
    assert "--overwrite" in again.err
    assert cli("train", path, "--overwrite", "--quiet").code == 0


def test_ctrl_c_writes_a_checkpoint_exits_130_and_says_how_to_go_on(
    cli: Cli, tmp_path: Path, tiny_base: Path, tiny_rows: Path
) -> None:
    path = recipe(tmp_path, tiny_base, tiny_rows, max_steps=100_000)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "veneer", "train", str(path)], stderr=log, stdout=log)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"learning_rate"') >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert f"veneer train {path} --resume" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    refused = cli("generate", tmp_path / "run", "x")
    assert refused.code == 2
    assert "was interrupted before its end" in refused.err


# --- eval ------------------------------------------------------------------------------------------------------------


def test_eval_of_a_run_takes_its_own_rows_and_metrics(cli: Cli, run_folder: Path) -> None:
    done = cli("eval", run_folder)
    assert done.code == 0
    assert "exact_match" in done.out
    assert "5 rows" in done.out
    saved = run_folder / "eval" / "tiny.json"
    everything = saved.read_text()
    assert cli("eval", run_folder, "--max-rows", 2).code == 0
    assert saved.read_text() == everything  # a sample has a file of its own
    assert len(json.loads((run_folder / "eval" / "tiny-2-rows.json").read_text())["rows"]) == 2


def test_eval_prints_one_document_with_base_and_adapter(
    cli: Cli, run_folder: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    metrics = ("-m", "exact_match,perplexity", "-m", "regex:[a,b]+|.")
    limits = ("--max-rows", 3, "--max-new-tokens", 2)
    done = cli("eval", run_folder, "--data", tiny_rows, *metrics, *limits, "--output", out, "--json")
    assert done.code == 0
    found = document(done.out)
    assert set(found["metrics"]) == {"exact_match", "perplexity", "regex:[a,b]+|."}
    assert found["metrics"]["perplexity"]["base_value"] > 0
    assert len(found["rows"]) == 3
    assert found["model"] == str(run_folder)
    assert json.loads(out.read_text())["metrics"] == found["metrics"]


def test_eval_of_a_base_needs_data_and_metrics(cli: Cli, tiny_base: Path, tiny_rows: Path) -> None:
    assert "--metrics" in cli("eval", tiny_base, "--data", tiny_rows).err
    assert "--data" in cli("eval", tiny_base, "-m", "exact_match").err
    slip = cli("eval", tiny_base, "--data", tiny_rows, "-m", "exact_mach")
    assert slip.code == 2
    assert "exact_match" in slip.err
    done = cli(
        "eval", tiny_base, "--data", tiny_rows, "-m", "contains", "--max-rows", 2, "--max-new-tokens", 2, "--json"
    )
    assert document(done.out)["metrics"]["contains"]["base_value"] is None


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_answers_as_the_library_does(cli: Cli, run_folder: Path) -> None:
    from veneer.data import Conversation, Message, render_prompt
    from veneer.generate import generate
    from veneer.run import load_model

    done = cli("generate", run_folder, "spell 1", "spell 2", "--max-new-tokens", 5, "--both", "--json")
    answers = document(done.out)["answers"]
    model: Any = load_model(run_folder)
    rows = [Conversation((Message("user", text),), "x") for text in ("spell 1", "spell 2")]
    ids = [render_prompt(row, model.base.tokenizer).prompt_ids for row in rows]
    expected = generate(model, ids, max_new_tokens=5)
    with model.disabled():
        expected_base = generate(model, ids, max_new_tokens=5)
    assert [a["text"] for a in answers] == [g.text for g in expected]
    assert [a["base_text"] for a in answers] == [g.text for g in expected_base]
    assert [a["prompt_tokens"] for a in answers] == [len(i) for i in ids]


def test_generate_reads_lines_of_stdin_and_shows_each_prompt(
    cli: Cli, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("spell 1\n\nspell 2\n"))
    done = cli("generate", tiny_base, "--max-new-tokens", 1)
    assert done.code == 0
    assert [line for line in done.out.splitlines() if line.startswith("> ")] == ["> spell 1", "> spell 2"]


def test_generate_takes_the_prompts_of_rows_with_their_references(cli: Cli, tiny_base: Path, tiny_rows: Path) -> None:
    done = cli("generate", tiny_base, "--data", tiny_rows, "--max-rows", 2, "--max-new-tokens", 1, "--json")
    assert [a["reference"] for a in document(done.out)["answers"]] == ["zero", "one"]


def test_generate_goes_on_with_raw_text(cli: Cli, tiny_base: Path) -> None:
    raw = document(cli("generate", tiny_base, "spell", "--raw", "--max-new-tokens", 1, "--json").out)
    chat = document(cli("generate", tiny_base, "spell", "--max-new-tokens", 1, "--json").out)
    assert raw["answers"][0]["prompt_tokens"] < chat["answers"][0]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "there is no prompt"),
        (["x", "--data", "rows.jsonl"], "--data brings prompts of its own"),
        (["x", "--raw", "--system", "s"], "no place for a system message"),
        (["x", "--both"], "no adapter to turn off"),
    ],
)
def test_generate_refuses_what_excludes_itself(
    cli: Cli, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fragment: str
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = cli("generate", tiny_base, *arguments)
    assert done.code == 2
    assert fragment in done.err


# --- data ------------------------------------------------------------------------------------------------------------


def test_data_check_counts_rows_and_exits_with_0_when_they_are_sound(
    cli: Cli, tiny_base: Path, tiny_rows: Path
) -> None:
    done = cli("data", "check", tiny_rows, "--base", tiny_base, "--max-length", 31, "--json")
    assert done.code == 0
    report = document(done.out)
    assert report["rows"] == 24
    assert report["tokens"]
    assert any("31" in problem["message"] for problem in report["problems"])
    assert "24 rows" in cli("data", "check", tiny_rows).out


def test_data_check_finds_the_overlap_with_held_out_rows(cli: Cli, tiny_rows: Path) -> None:
    report = document(cli("data", "check", tiny_rows, "--eval", tiny_rows, "--json").out)
    assert report["overlap"]["exact"] == 24


def test_data_check_exits_with_1_on_errors(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n')
    done = cli("data", "check", tmp_path / "bad.jsonl")
    assert done.code == 1
    assert "error:" in done.out
    assert "bad.jsonl:1" in done.out


def test_data_show_marks_what_is_trained(cli: Cli, tiny_base: Path, tiny_rows: Path, run_folder: Path) -> None:
    done = cli("data", "show", tiny_rows, "--base", tiny_base, "-n", 2)
    assert done.code == 0
    assert "⟦zero<|im_end|>⟧" in done.out
    assert "⟦two<|im_end|>⟧" not in done.out
    rows = document(cli("data", "show", run_folder, "-n", 1, "--json").out)
    (trained,) = [span["text"] for span in rows[0]["spans"] if span["trained"]]
    assert trained.endswith("<|im_end|>")
    assert sum(rows[0]["trained"]) > 0
    assert "--base" in cli("data", "show", tiny_rows).err


def test_data_show_of_a_recipe_uses_its_settings(cli: Cli, tmp_path: Path, tiny_base: Path, tiny_rows: Path) -> None:
    path = recipe(tmp_path, tiny_base, tiny_rows)
    path.write_text(path.read_text().replace("eval: 4", "eval: 4, train_on: prompt-too"))
    # The first token of a row is never a target: nothing stands before it to predict it from.
    assert "<|im_start|>⟦user\nspell 1<|im_end|>" in cli("data", "show", path, "-n", 1).out
    assert (
        "spell 1<|im_end|>\n<|im_start|>assistant\n⟦one" in cli("data", "show", path, "-n", 1, "--train-on", "last").out
    )


# --- merge -----------------------------------------------------------------------------------------------------------


def test_merge_writes_a_plain_model_that_answers_as_the_run_and_prints_the_drift(
    cli: Cli, run_folder: Path, tmp_path: Path
) -> None:
    done = cli("merge", run_folder, "--output", tmp_path / "merged", "--json")
    assert done.code == 0
    merged = document(done.out)
    assert merged["drift"]["max_abs_logit_difference"] < 1e-4  # float32 throughout: only the order of sums differs
    assert merged["drift"]["top1_agreement"] == 1.0
    ours = cli("generate", tmp_path / "merged", "spell 1", "--max-new-tokens", 5).out
    assert ours == cli("generate", run_folder, "spell 1", "--max-new-tokens", 5).out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert plain.config.model_type == "llama"
    assert tokenizer.chat_template


def test_merge_replaces_nothing_unasked_and_needs_an_adapter(
    cli: Cli, run_folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    refused = cli("merge", run_folder, "--output", tmp_path / "taken")
    assert refused.code == 2
    assert "the output is taken" in refused.err
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    assert cli("merge", run_folder, "--output", tmp_path / "taken", "--overwrite").code == 0
    assert not (tmp_path / "taken" / "file").exists()
    of_a_base = cli("merge", tiny_base, "--output", tmp_path / "other")
    assert of_a_base.code == 2
    assert "no adapter to merge" in of_a_base.err
    assert not (tmp_path / "other").exists()


def test_adapter_folders_are_as_good_as_runs(cli: Cli, run_folder: Path) -> None:
    of_run = cli("generate", run_folder, "spell 1", "--max-new-tokens", 4, "--dtype", "float32").out
    assert cli("generate", run_folder / "adapter", "spell 1", "--max-new-tokens", 4, "--dtype", "float32").out == of_run


@pytest.mark.slow
def test_several_processes_speak_once(tmp_path: Path, tiny_base: Path, tiny_rows: Path) -> None:
    path = recipe(tmp_path, tiny_base, tiny_rows, gradient_accumulation_steps=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "veneer"]
    done = subprocess.run(
        [*torchrun, "train", str(path), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert document(done.stdout)["steps"] == 2
