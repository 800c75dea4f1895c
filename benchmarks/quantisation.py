"""What each way of storing a weight costs: the error table of docs/quantisation.md.

    python -m benchmarks.quantisation [--write docs/quantisation.md] [--rows 240] [--held-out 64] [--steps 30] [--json]

Weights are Gaussian ones and those of SmolLM2. Errors are relative root mean squares: of the weights, and of what the
layers give for their own inputs over rows of text. Bits per parameter are counted from the stored bytes. The perplexity
is that of held-out answers, before and after a short LoRA run over that base: the same rows, order, start and steps for
every storage. Gaps to the plain base are paired over the held-out rows, with 95 % bootstrap intervals.

Texts are rows of the demo's task; ``--data FILE`` takes rows of another file instead and holds its last ones out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.storages import PLAIN, STORAGES

GAUSSIAN = (2048, 2048)  # of the Gaussian weight
POSITIONS = 256  # inputs of each layer that output errors are measured on


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measures everything; says how far it is on the way."""
    import torch

    from benchmarks import quantisation_measure as measure
    from benchmarks.quantisation_claims import claims

    rows: dict[str, dict[str, Any]] = {storage.name: asdict(storage) for storage in STORAGES}
    coded = [storage for storage in STORAGES if storage is not PLAIN]
    say("errors on Gaussian weights")
    for storage, error in zip(coded, measure.gaussian_errors(coded, GAUSSIAN, job["seed"]), strict=True):
        rows[storage.name]["gaussian_error"] = error
    base = measure.load(job)
    settings = {
        **{key: job[key] for key in ("base", "steps", "batch", "learning_rate", "seed", "label")},
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "stored_as": measure.stored_as(job["base"]),
        "gaussian": list(GAUSSIAN),
        "positions": POSITIONS,
    }
    say("inputs of the layers")
    inputs = measure.layer_inputs(base, job["rows"], POSITIONS, job["max_length"])
    for storage in coded:
        say(f"errors of {storage.name}")
        rows[storage.name] |= measure.layer_errors(base, inputs, storage)
    del base, inputs
    for storage in STORAGES:
        say(f"perplexity of {storage.name}, before and after {job['steps']} steps")
        rows[storage.name] |= measure.perplexities(job, storage)
    plain = rows[PLAIN.name]
    for storage in coded:
        rows[storage.name] |= measure.gaps(rows[storage.name], plain)
    settings |= {"rows": plain["rows"], "held_out": len(plain["tokens"]), "held_out_tokens": sum(plain["tokens"])}
    for row in rows.values():
        for key in ("nll_before", "nll_after", "tokens", "rows"):
            row.pop(key)
    packages = ("veneer", "torch", "transformers")
    return {
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "command": job["command"],
        "storages": rows,
        "claims": claims(rows, trained=job["steps"] > 0),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare_rows(options: argparse.Namespace, folder: Path) -> tuple[Path, Path, str]:
    """Writes the rows to train on and those held out; returns both files and what they are called."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if options.data is None:
        from veneer.demo import generate_rows

        pairs = ((train, "train", options.rows), (held_out, "heldout", options.held_out))
        for path, split, count in pairs:
            rows = generate_rows(count, split=split)  # type: ignore[arg-type]  # one of its two names
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return train, held_out, "the demo's task"
    wanted = options.rows + options.held_out
    lines = [line for line in options.data.read_text(encoding="utf-8").splitlines(keepends=True) if line.strip()]
    if len(lines) < wanted:
        raise SystemExit(
            f"{options.data} has only {len(lines)} rows, and {wanted} are needed: lower --rows, --held-out"
        )
    train.write_text("".join(lines[: options.rows]), encoding="utf-8")
    held_out.write_text("".join(lines[-options.held_out :]), encoding="utf-8")
    return train, held_out, options.data.name


def command_of(arguments: list[str]) -> str:
    """The command as a reader can repeat it: a path without its folder."""
    shown = [Path(word).name if word.endswith(".jsonl") else word for word in arguments]
    return shlex.join(["python", "-m", "benchmarks.quantisation", *shown])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantisation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there (docs/quantisation.md)")
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")
    parser.add_argument("--rows", type=int, default=240, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=64, help="rows to measure the perplexity on")
    parser.add_argument("--steps", type=int, default=30, help="steps of each LoRA run; 0 trains nothing")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--data", type=Path, help="JSONL with prompt and answer; default: rows of the demo's task")
    parser.add_argument("--base", default="smollm2-135m", help="the bundled model, or a folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps * options.batch > options.rows:
        parser.error(f"--rows must be at least {options.steps * options.batch}: --steps times --batch")
    if options.held_out < 1:
        parser.error("--held-out must be at least 1")
    with tempfile.TemporaryDirectory(prefix="veneer-benchmark-") as folder:
        train, held_out, label = prepare_rows(options, Path(folder))
        keys = ("base", "dtype", "steps", "batch", "learning_rate", "max_length", "seed")
        job = {key: getattr(options, key) for key in keys}
        job |= {"rows": str(train), "held_out": str(held_out), "label": label, "folder": folder}
        job["command"] = command_of(sys.argv[1:])
        report = run(job)
    from benchmarks.quantisation_page import page

    text = page(report)
    if options.write is not None:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text, encoding="utf-8")
        say(f"wrote {options.write}")
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.write is None:
        print(text)


if __name__ == "__main__":
    main()
