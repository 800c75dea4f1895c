"""QLoRA on the CPU: Veneer against bitsandbytes with PEFT, and against its own LoRA over a base in 16 bits.

    python -m benchmarks.qlora [--peers bnb,lora16] [--json] [--steps 8] [--tokens 2000] [--data rows.jsonl]
    python -m benchmarks.qlora --shape 1b [--length 512]

The first form trains SmolLM2, each program in a process of its own: NF4 in blocks of 64 with double quantisation, rank
16 on all linear layers, the same token ids, trained positions, order of rows, start of the adapter, learning rates and
threads, and as many rows a step as make up ``--tokens``. ``bnb`` is a loop written by hand over PEFT with bitsandbytes'
``Linear4bit``: forward, backward, clipping, AdamW, on padded batches. ``lora16`` is Veneer over the plain base, in the
dtype that all of them compute in. The demo's rows begin with one system prompt, which Veneer computes once for a
micro-batch; rows of ``--data`` without one compare the arithmetic alone.

The second form makes a random model of that shape, quantises it while it is read, and trains it on single rows: peak
memory while loading and while training.

Speed counts real tokens, not padding, from the third step on. Memory is the highest resident size of the whole process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory import SHAPES, Settings, Shape, budget
from benchmarks.processes import Job, Result, in_process
from benchmarks.sft import WARM_UP, compare_all, compare_curves, demo_rows, figures, first_rows, verdict

MODULE = "benchmarks.qlora_contestants"
PEERS = ("bnb", "lora16")
SPEED_OVER_BNB = 2.0
SHARE_OF_LORA16 = 0.75
PEAK_GB = 4.0  # of a 1B-shaped model at 512 tokens
LOADING_FACTOR = 1.3  # of the quantised size; the largest tensor and the interpreter come on top
NICKNAMES = {"1b": "Llama-3.2-1B"}


def run(job: Job, peers: list[str]) -> dict[str, Any]:
    """Prepares, then runs Veneer's QLoRA and each peer; returns everything that was measured."""
    prepared = in_process(MODULE, "prepare", job)
    job = {**job, **{key: prepared[key] for key in ("dtype", "peers_dtype", "model_folder", "batch")}}
    tokens = _tokens_of_steps(job)
    theirs = {"bnb": {**job, "dtype": job["peers_dtype"]}}
    results = {name: figures(in_process(MODULE, name, theirs.get(name, job)), tokens) for name in ["qlora", *peers]}
    ours = results["qlora"]
    for name in peers:
        other = results[name]
        other["speed_ratio"] = ours["tokens_per_second"] / other["tokens_per_second"]
        other["memory_ratio"] = ours["peak_rss_gb"] / other["peak_rss_gb"]
        other["curve"] = compare_curves(ours, other)
    if "bnb" in peers:
        bnb = {"bnb": results["bnb"]}
        results["bnb"]["curve"] = compare_all(job, ours, bnb, lambda wide: in_process(MODULE, "qlora", wide))["bnb"]
    return {
        "settings": {**_settings(job), "rows": prepared["rows"], "tokens": sum(tokens), "data": job["label"]},
        "versions": _versions(peers),
        "warm_up_steps": WARM_UP,
        "results": results,
        "targets": targets(results),
    }


def run_shape(job: Job, shape: Shape) -> dict[str, Any]:
    """Makes a random model of a shape and trains it; memory against what was promised and what the formula says."""
    in_process(MODULE, "model", job)
    prepared = in_process(MODULE, "prepare", job)
    job = {**job, **{key: prepared[key] for key in ("dtype", "batch")}}
    tokens = _tokens_of_steps(job)
    result = figures(in_process(MODULE, "qlora", job), tokens)
    compute_bytes = 2 if job["dtype"] == "bfloat16" else 4
    settings = Settings(tokens=job["max_length"], compute_bytes=compute_bytes, checkpointing=job["checkpointing"])
    computed = budget(shape, settings)
    loading = loading_allowance(result)
    return {
        "settings": {**_settings(job), "shape": shape.name, "parameters": shape.parameters, "tokens": sum(tokens)},
        "versions": _versions([]),
        "warm_up_steps": WARM_UP,
        "results": {"qlora": result},
        "computed_gb": computed.peak / 1e9,
        "loading_allowance_gb": loading,
        "targets": [
            target(f"peak memory under {PEAK_GB} GB", result["peak_rss_gb"], result["peak_rss_gb"] < PEAK_GB),
            target(
                f"peak while loading within {loading:.2f} GB ({LOADING_FACTOR} times the quantised size, the largest "
                "tensor, the interpreter)",
                result["loading_peak_gb"],
                result["loading_peak_gb"] <= loading,
            ),
        ],
    }


def loading_allowance(result: Result) -> float:
    """The most that loading may hold: 1.3 times the quantised size, the largest tensor, the interpreter itself."""
    size: float = LOADING_FACTOR * result["quantised_gb"] + result["largest_tensor_gb"]
    return size + float(result["interpreter_gb"])


def targets(results: dict[str, Result]) -> list[dict[str, Any]]:
    """What was promised of the speed, and whether it was reached."""
    found = []
    if "bnb" in results:
        ratio = results["bnb"]["speed_ratio"]
        found.append(target(f"at least {SPEED_OVER_BNB} x as fast as bnb", ratio, ratio >= SPEED_OVER_BNB))
    if "lora16" in results:
        ratio = results["lora16"]["speed_ratio"]
        found.append(target(f"at least {SHARE_OF_LORA16} x as fast as lora16", ratio, ratio >= SHARE_OF_LORA16))
    return found


def target(text: str, value: float, reached: bool) -> dict[str, Any]:
    return {"target": text, "value": value, "reached": reached}


def table(report: dict[str, Any]) -> str:
    """The report as plain text."""
    results, settings = report["results"], report["settings"]
    what = settings.get("shape") or settings["base"]
    lines = [
        f"{what}, {settings['dtype']}, {settings['threads']} threads, {settings['batch']} rows a step, "
        f"{settings['steps']} steps ({settings['tokens']} tokens); speed from step {report['warm_up_steps'] + 1} on",
        "",
        f"{'':8} {'tokens/s':>9} {'peak GB':>8} {'loading':>8} {'at rest':>8}   QLoRA is",
    ]
    for name, result in results.items():
        line = f"{name:8} {result['tokens_per_second']:9.0f} {result['peak_rss_gb']:8.2f} "
        line += f"{result['loading_peak_gb']:8.2f} {result['weights_gb']:8.3f}"
        if "speed_ratio" in result:
            line += f"   {result['speed_ratio']:.2f} x as fast, with {result['memory_ratio']:.2f} x the memory"
        lines.append(line)
    lines += ["", "loading: the peak when the base is loaded; at rest: the base's weights; GB are 10^9 bytes"]
    if "computed_gb" in report:
        lines.append(
            f"the formula's peak is {report['computed_gb']:.2f} GB, and the interpreter before loading had "
            f"{results['qlora']['interpreter_gb']:.2f} GB"
        )
    lines += ["", "loss   " + " ".join(f"{name:>10}" for name in results)]
    for step, losses in enumerate(zip(*(result["losses"] for result in results.values()), strict=True), start=1):
        lines.append(f"{step:5}  " + " ".join(f"{loss:10.4f}" for loss in losses))
    lines.append("")
    lines += [_curve_line(name, result["curve"]) for name, result in results.items() if "curve" in result]
    for entry in report["targets"]:
        verdict = "reached" if entry["reached"] else "MISSED"
        lines.append(f"{entry['target']}: {verdict} ({entry['value']:.2f})")
    return "\n".join(lines)


def _curve_line(name: str, curve: dict[str, Any]) -> str:
    """bitsandbytes has the same codes, so its curve must be ours; the plain base has other weights."""
    difference = f"mean |difference| after step 1: {curve['mean_difference']:.4f} = {100 * curve['relative']:.2f} %"
    rates = "" if curve["same_learning_rates"] else "; the learning rates DIFFER"
    if name == "bnb":
        return f"curve of qlora and bnb: {verdict(curve)} ({difference} of the loss){rates}"
    return f"curve of qlora and {name}: {difference} of the loss, by the quantisation{rates}"


def _tokens_of_steps(job: Job) -> list[int]:
    examples = json.loads((Path(job["folder"]) / "examples.json").read_text())
    lengths = [len(example["input_ids"]) for example in examples]
    return [sum(lengths[at : at + job["batch"]]) for at in range(0, len(lengths), job["batch"])]


def _settings(job: Job) -> dict[str, Any]:
    keys = ("base", "steps", "batch", "learning_rate", "seed", "dtype", "max_length", "threads", "checkpointing")
    return {key: job[key] for key in keys}


def _versions(peers: list[str]) -> dict[str, str]:
    packages = ["veneer", "torch", "transformers", *(["peft", "bitsandbytes"] if "bnb" in peers else [])]
    return {name: importlib.metadata.version(name) for name in packages}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qlora", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", default="bnb,lora16", help=f"comma-separated: {', '.join(PEERS)}; or none")
    parser.add_argument("--shape", help="a random model of this shape instead: 1b, " + ", ".join(SHAPES))
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of a step: as many rows as make up about that")
    parser.add_argument("--length", type=int, default=512, help="with --shape: tokens of the one row of a step")
    parser.add_argument("--data", type=Path, help="JSONL with prompt and answer; default: rows of the demo's task")
    parser.add_argument("--base", default="smollm2-135m", help="the bundled model, or a folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--checkpointing", action="store_true", help="Veneer recomputes activations in the backward")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    peers = [] if options.peers == "none" else options.peers.split(",")
    shape = SHAPES.get(NICKNAMES.get(options.shape, options.shape))
    if unknown := [peer for peer in peers if peer not in PEERS]:
        parser.error(f"unknown peer '{unknown[0]}'; use some of {', '.join(PEERS)}, or none")
    if options.shape and shape is None:
        parser.error(f"unknown shape '{options.shape}'; use 1b or one of {', '.join(SHAPES)}")
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}: the first {WARM_UP} are not timed")
    with tempfile.TemporaryDirectory(prefix="veneer-benchmark-") as folder:
        keys = ("steps", "tokens", "base", "dtype", "learning_rate", "max_length", "seed", "threads", "checkpointing")
        job: Job = {key: getattr(options, key) for key in keys}
        job |= {"folder": folder, "rows": str(Path(folder) / "rows.jsonl"), "label": "the demo's task"}
        if shape is not None:
            # One row a step, all of it learnt.
            model = {"base": str(Path(folder) / "model"), "shape": shape.name, "tokenizer": options.base}
            job |= {**model, "batch": 1, "max_length": options.length, "micro_batch_tokens": options.length}
            report = run_shape(job, shape)
        else:
            _write_rows(options, job)
            report = run(job, peers)
    print(json.dumps(report, indent=2) if options.json else table(report))


def _write_rows(options: argparse.Namespace, job: Job) -> None:
    """Enough rows for all steps, of which the demo's have more than 100 tokens, and those of a file 50 or so."""
    path = Path(job["rows"])
    if options.data is None:
        demo_rows(options.steps * (options.tokens // 100 + 1), path)
        return
    with open(options.data, encoding="utf-8") as file:
        count = sum(1 for _ in file)
    first_rows(options.data, min(count, options.steps * (options.tokens // 50 + 1)), path)
    job["label"] = options.data.name


if __name__ == "__main__":
    main()
