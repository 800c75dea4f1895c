"""What people get wrong, as a table: each input, the command, its exit code and what it has to say.

No case may show a traceback, be called a bug of ours, or leave anything half written behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SOUND_ROW = '{"prompt": "spell 1", "completion": "one"}'


@dataclass
class Bench:
    """A folder with a sound recipe in it, for a case to break.

    Attributes:
        folder: holds ``recipe.yaml``, ``rows.jsonl`` and a copy of the tiny base in ``base``; the run goes to ``run``.
        run_folder: a finished run of another recipe, read only.
        other_base: a base with the same shapes and other weights.
    """

    folder: Path
    run_folder: Path
    other_base: Path
    lines: list[str] = field(default_factory=lambda: [SOUND_ROW] * 12)

    def __post_init__(self) -> None:
        self.write_rows()
        self.recipe()

    def recipe(self, old: str = "", new: str = "") -> None:
        """Writes the recipe, with ``old`` replaced by ``new``."""
        text = (
            "base: base\ndtype: float32\n"
            "data: {train: rows.jsonl, eval: null}\n"
            "adapter: {r: 2}\n"
            "train: {max_steps: 1, per_device_train_batch_size: 2, max_length: 64}\n"
            f"output_dir: {self.folder / 'run'}\n"
        )
        assert old in text
        (self.folder / "recipe.yaml").write_text(text.replace(old, new) if old else text + new)

    def write_rows(self, *changes: tuple[int, str]) -> None:
        """Writes the rows, with the lines of these (1-based) numbers replaced."""
        lines = dict(enumerate(self.lines, start=1)) | dict(changes)
        (self.folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines.values()))

    def train(self, *more: str) -> list[str]:
        return ["train", str(self.folder / "recipe.yaml"), *more]

    def change_weights(self, change: Callable[[dict[str, Any]], None]) -> None:
        from safetensors.torch import load_file, save_file

        path = self.folder / "base" / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})


Setup = Callable[[Bench], list[str]]


@dataclass(frozen=True)
class Case:
    """One bad input: how it is made, and what has to come of it."""

    name: str
    setup: Setup  # breaks something and returns the command
    code: int
    said: tuple[str, ...]  # fragments of the message


def _typo(bench: Bench) -> list[str]:
    bench.recipe("adapter: {r: 2}", "adapter: {lora_alhpa: 2}")
    return bench.train()


def _unknown_target(bench: Bench) -> list[str]:
    bench.recipe("adapter: {r: 2}", "adapter: {target_modules: [q_porj]}")
    return bench.train()


def _empty_file(bench: Bench) -> list[str]:
    (bench.folder / "rows.jsonl").write_text("")
    return bench.train()


def _broken_json(bench: Bench) -> list[str]:
    bench.write_rows((7, '{"prompt": "spell 1", "completion": "one"'))
    return bench.train()


def _wrong_role(bench: Bench) -> list[str]:
    bench.lines = ['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'] * 4
    bench.write_rows((3, '{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}'))
    return bench.train()


def _missing_column(bench: Bench) -> list[str]:
    bench.recipe("eval: null", "eval: null, columns: {prompt: question, completion: answer}")
    return bench.train()


def _missing_column_in_one_row(bench: Bench) -> list[str]:
    bench.write_rows((5, '{"prompt": "spell 1"}'))
    return bench.train()


def _missing_base(bench: Bench) -> list[str]:
    bench.recipe("base: base", "base: ./bsae")
    return bench.train()


def _unknown_hub_base(bench: Bench) -> list[str]:
    bench.recipe("base: base", "base: smolm2-135m")
    return bench.train()


def _truncated_weights(bench: Bench) -> list[str]:
    path = bench.folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return bench.train()


def _missing_weight(bench: Bench) -> list[str]:
    bench.change_weights(lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    return bench.train()


def _nan_weight(bench: Bench) -> list[str]:
    bench.change_weights(lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    return bench.train()


def _pickled_weights(bench: Bench) -> list[str]:
    (bench.folder / "base" / "model.safetensors").rename(bench.folder / "base" / "pytorch_model.bin")
    return bench.train()


def _other_base(bench: Bench) -> list[str]:
    return ["generate", str(bench.run_folder / "adapter"), "hi", "--base", str(bench.other_base)]


def _truncated_adapter(bench: Bench) -> list[str]:
    shutil.copytree(bench.run_folder / "adapter", bench.folder / "adapter")
    path = bench.folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["generate", str(bench.folder / "adapter"), "hi"]


def _all_too_long(bench: Bench) -> list[str]:
    bench.recipe("max_length: 64", "max_length: 4")
    return bench.train("data.overlong=drop")


def _nothing_left_to_train_on(bench: Bench) -> list[str]:
    bench.recipe("max_length: 64", "max_length: 4")
    return bench.train()


def _file_in_the_way(bench: Bench) -> list[str]:
    (bench.folder / "file").write_text("mine")
    return bench.train(f"output_dir={bench.folder / 'file' / 'run'}")


def _output_is_a_file(bench: Bench) -> list[str]:
    (bench.folder / "run").write_text("mine")
    return bench.train()


def _zero_length(bench: Bench) -> list[str]:
    bench.recipe("max_length: 64", "max_length: 0")
    return bench.train()


def _unknown_dtype(bench: Bench) -> list[str]:
    bench.recipe("dtype: float32", "dtype: float23")
    return bench.train()


def _unknown_dtype_of_a_command(bench: Bench) -> list[str]:
    return ["generate", str(bench.folder / "base"), "hi", "--dtype", "float23"]


def _no_cuda(bench: Bench) -> list[str]:
    return bench.train("device=cuda:77")


def _unknown_metric(bench: Bench) -> list[str]:
    bench.recipe("eval: null}", "eval: 2}\neval: {metrics: [exact_mach]}")
    return bench.train()


def _unfit_metric(bench: Bench) -> list[str]:
    return ["eval", str(bench.folder / "base"), "--data", str(bench.folder / "rows.jsonl"), "-m", "json_exact"]


def _output_holds_a_run(bench: Bench) -> list[str]:
    shutil.copytree(bench.run_folder, bench.folder / "run")
    return bench.train()


def _nothing_to_resume(bench: Bench) -> list[str]:
    return bench.train("--resume")


def _resume_of_another_recipe(bench: Bench) -> list[str]:
    shutil.copytree(bench.run_folder, bench.folder / "run")
    return bench.train("--resume")


def _missing_recipe(bench: Bench) -> list[str]:
    return ["train", str(bench.folder / "recip.yaml")]


def _no_yaml(bench: Bench) -> list[str]:
    (bench.folder / "recipe.yaml").write_text("base: base\ndata: {train: rows.jsonl\n")
    return bench.train()


def _wrong_override(bench: Bench) -> list[str]:
    return bench.train("train.lerning_rate=1e-3")


def _missing_data(bench: Bench) -> list[str]:
    bench.recipe("train: rows.jsonl", "train: row.jsonl")
    return bench.train()


def _more_held_out_than_rows(bench: Bench) -> list[str]:
    bench.recipe("eval: null", "eval: 12")
    return bench.train()


def _no_run(bench: Bench) -> list[str]:
    (bench.folder / "empty").mkdir()
    return ["chat", str(bench.folder / "empty")]


def _no_gguf(bench: Bench) -> list[str]:
    (bench.folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    return ["generate", str(bench.folder / "model.gguf"), "hi"]


def _prompt_too_long(bench: Bench) -> list[str]:
    return ["generate", str(bench.folder / "base"), "x " * 2000]


CASES = [
    Case(
        "a typo in a key",
        _typo,
        2,
        ("recipe.yaml:4", "'adapter.lora_alhpa'", "Did you mean 'adapter.lora_alpha' or 'adapter.use_lora_fa'?"),
    ),
    Case("an unknown target module", _unknown_target, 1, ("q_porj", "q_proj")),
    Case("an empty file", _empty_file, 1, ("rows.jsonl", "empty")),
    Case("broken JSON in line 7", _broken_json, 1, ("rows.jsonl:7", "JSON")),
    Case("a wrong role", _wrong_role, 1, ("rows.jsonl:3", "'usr'", "user")),
    Case("a missing column", _missing_column, 2, ("question",)),
    Case("a column missing in one row", _missing_column_in_one_row, 1, ("rows.jsonl:5", "completion")),
    Case("a base folder that is missing", _missing_base, 1, ("bsae",)),
    Case("a base that nobody knows", _unknown_hub_base, 1, ("smolm2-135m", "smollm2-135m")),
    Case("weights cut short", _truncated_weights, 1, ("model.safetensors", "cut short or damaged")),
    Case("a weight missing", _missing_weight, 1, ("model.layers.1.mlp.up_proj.weight",)),
    Case("NaN in the weights", _nan_weight, 1, ("model.layers.1.mlp.up_proj.weight", "NaN")),
    Case("pickled weights", _pickled_weights, 1, ("pytorch_model.bin", "pickle")),
    Case("an adapter of another base", _other_base, 1, ("--allow-base-mismatch",)),
    Case("an adapter cut short", _truncated_adapter, 1, ("adapter_model.safetensors",)),
    Case("all rows too long", _all_too_long, 1, ("12", "max_length")),
    Case("rows cut before their answers", _nothing_left_to_train_on, 1, ("12", "max_length")),
    Case("a file in the way", _file_in_the_way, 1, ("a file is in the way", "output_dir")),
    Case("an output folder that is a file", _output_is_a_file, 1, ("is a file", "output_dir")),
    Case("max_length: 0", _zero_length, 2, ("recipe.yaml:5", "train.max_length is 0", "at least 2")),
    Case("an unknown dtype", _unknown_dtype, 2, ("recipe.yaml:2", "'float23'", "float32")),
    Case("an unknown dtype of a command", _unknown_dtype_of_a_command, 2, ("float23", "float32")),
    Case("a device that is not there", _no_cuda, 2, ("cuda", "cpu")),
    Case("an unknown metric", _unknown_metric, 2, ("'exact_mach'", "'exact_match'")),
    Case("a metric that does not fit the rows", _unfit_metric, 1, ("not JSON", "rows.jsonl:1", "use a metric that")),
    Case("a folder that holds a run", _output_holds_a_run, 1, ("holds a run already", "--resume", "--overwrite")),
    Case("nothing to resume", _nothing_to_resume, 2, ("nothing to resume", "run", "leave --resume out")),
    Case("another recipe's run to resume", _resume_of_another_recipe, 1, ("resume",)),
    Case("a missing recipe", _missing_recipe, 2, ("no recipe", "recip.yaml", "'recipe.yaml'")),
    Case("a recipe that is no YAML", _no_yaml, 2, ("recipe.yaml:3", "not YAML")),
    Case("a wrong override", _wrong_override, 2, ("train.lerning_rate=1e-3", "'train.learning_rate'")),
    Case("missing data", _missing_data, 2, ("recipe.yaml:3", "row.jsonl", "'rows.jsonl'")),
    Case("more held-out rows than there are", _more_held_out_than_rows, 2, ("12 of 12 rows", "data.eval")),
    Case("a folder that is no run", _no_run, 2, ("is not a run folder",)),
    Case("a GGUF file that is none", _no_gguf, 1, ("model.gguf",)),
    Case("a prompt longer than the model's positions", _prompt_too_long, 2, ("512",)),
]


@pytest.fixture(scope="session")
def other_base(make_tiny_base: Callable[..., Path]) -> Path:
    return make_tiny_base(seed=9)


@pytest.fixture
def bench(tmp_path: Path, tiny_base: Path, run_folder: Path, other_base: Path) -> Bench:
    shutil.copytree(tiny_base, tmp_path / "base")
    return Bench(tmp_path, run_folder, other_base)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_bad_input_gets_its_message_and_leaves_nothing_behind(
    bench: Bench, cli: Callable[..., Any], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.folder)
    command = case.setup(bench)
    before = listing(bench.folder)
    done = cli(*command)
    assert done.code == case.code, done.said
    for fragment in case.said:
        assert fragment in done.err
    assert "error:" in done.err
    assert "Traceback" not in done.said
    assert "bug in Veneer" not in done.said
    assert done.out == ""
    assert listing(bench.folder) == before


# --- what needs a process or a mount of its own ----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KB: room for a run's first files, not for its checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def unfinished(folder: Path) -> list[str]:
    """Temporary files, and adapters or checkpoints that lack a part."""
    found = [str(p) for p in folder.rglob("*") if p.name.endswith((".tmp", ".old"))]
    for config in folder.rglob("adapter_config.json"):
        if not (config.parent / "adapter_model.safetensors").is_file():
            found.append(str(config.parent))
    return found


def test_a_full_disk_is_told_and_nothing_half_written_stays(
    bench: Bench, cli: Callable[..., Any], small_disk: Path
) -> None:
    bench.recipe("adapter: {r: 2}", "adapter: {r: 16}")
    done = cli(*bench.train(f"output_dir={small_disk / 'run'}"))
    assert done.code == 1
    assert "the disk is full" in done.err
    assert str(small_disk) in done.err
    assert "Traceback" not in done.said
    assert unfinished(small_disk) == []
    if (small_disk / "run" / "run.json").exists():
        refused = cli("generate", small_disk / "run", "hi")
        assert refused.code == 2, "a run that could not be written must not pass for one"


def test_a_disk_that_is_full_while_merging_leaves_no_model(
    bench: Bench, cli: Callable[..., Any], small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(100_000))
    done = cli("merge", bench.run_folder, "--output", small_disk / "merged")
    assert done.code == 1
    assert "the disk is full" in done.err
    assert str(small_disk) in done.err
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def test_a_limit_on_file_sizes_is_told_and_nothing_half_written_stays(bench: Bench) -> None:
    bench.recipe("adapter: {r: 2}", "adapter: {r: 16}")
    command = ["bash", "-c", 'ulimit -f 60; exec "$@"', "-", sys.executable, "-m", "veneer", *bench.train()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "checkpoints/step-000001" in done.stderr
    assert "a file grew larger than this system allows" in done.stderr
    assert "Traceback" not in done.stderr
    assert unfinished(bench.folder) == []
    info = bench.folder / "run" / "run.json"
    assert not info.exists() or json.loads(info.read_text())["status"] == "failed"


def test_a_folder_without_permission_is_told(bench: Bench, cli: Callable[..., Any], tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    mounted = False
    if os.geteuid() == 0:  # permission bits do not bind root; a read-only file system does
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True
        ).returncode
        if not mounted:
            pytest.skip("root, and not allowed to mount")
    else:
        place.chmod(0o500)
    try:
        done = cli(*bench.train(f"output_dir={place / 'run'}"))
        assert done.code == 1
        assert "no permission" in done.err
        assert str(place) in done.err
        merged = cli("merge", bench.run_folder, "--output", place / "merged")
        assert merged.code == 1
        assert "no permission" in merged.err
        assert list(place.iterdir()) == []
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
