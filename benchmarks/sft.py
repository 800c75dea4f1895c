"""Supervised fine-tuning: Veneer against its peers, in turn, each in a process of its own.

    python -m benchmarks.sft --peers trl,peft [--quantize nf4] [--runs 3] [--json] [--steps 20] [--data rows.jsonl]

Everybody gets the same token ids, trained positions (the answers), order of rows, weights, start of the adapter (rank
16, alpha 32, all linear layers), batch of 8 rows, learning rate, cosine schedule and number of threads, and the dtype
that is named. With ``--dtype auto`` each has the one that is fastest for it here: peers what PyTorch multiplies faster.
``trl`` is TRL's SFTTrainer with its defaults (gradient checkpointing on); ``trl-nockpt`` has checkpointing off;
``peft`` is a loop written by hand over PEFT. With ``--quantize nf4`` the peers train over bitsandbytes' layers.
``litgpt`` is LitGPT's ``finetune lora``, ``llamafactory`` is LLaMA-Factory's ``train`` with its defaults. Both want
other versions of the same libraries: ``--python litgpt=PATH`` names the interpreter of an environment with it.

Speed counts real tokens, not padding, from the third step on: the first two warm up allocators and caches. Memory is
the highest resident size of the whole process. "first s" is from the start of the process to the end of the
first step; "train s" is the wall time of the training call: all steps, with everything that the program does around
them. "of peak" is the share of the machine's products that the step's products make up, without what adapters and
attention add: 4 FLOP a weight of the layers and token, 4 a weight of the head and trained token; a beginning that rows
share counts once for Veneer, which computes it once. With ``--runs`` everybody runs in turn so many times, and figures
are medians.

Two loss curves should be the same but for rounding. Where bfloat16 drives them apart by more, Veneer trains once more
in float32, and the report says how far each of the two is from that curve.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import in_process

MODULE = "benchmarks.contestants"
# Those that want other versions of the same libraries: --python names the interpreter of their own environment.
ELSEWHERE = {"litgpt": "benchmarks.litgpt_contestant", "llamafactory": "benchmarks.llamafactory_contestant"}
PEERS = ("trl", "trl-nockpt", "peft", *ELSEWHERE)
WARM_UP = 2
SAME_CURVE = 0.02  # mean |difference| after the first step, as a share of the mean loss: bfloat16's rounding, not more


def run(job: dict[str, Any], peers: list[str], runs: int = 1) -> dict[str, Any]:
    """Prepares, then runs Veneer and each peer in turn; returns everything that was measured."""
    folder = Path(job["folder"])
    prepared = in_process(MODULE, "prepare", job)
    job = {**job, **{key: prepared[key] for key in ("dtype", "peers_dtype", "model_folder")}}
    theirs = {**job, "dtype": job["peers_dtype"]}
    peak = in_process(MODULE, "peak", job)["flops"]
    examples = json.loads((folder / "examples.json").read_text())
    tokens, trained = (_sums(job["batch"], [count(example) for example in examples]) for count in (_length, _trained))
    python = job.get("python", {})
    for name in set(peers) & set(ELSEWHERE):
        in_process(ELSEWHERE[name], "checkpoint", theirs, python.get(name, sys.executable))
    every: dict[str, list[dict[str, Any]]] = {name: [] for name in ["veneer", *peers]}
    for number in range(runs):
        for name in every:
            module, interpreter = ELSEWHERE.get(name, MODULE), python.get(name, sys.executable)
            who = {**(job if name == "veneer" else theirs), "run": number}
            every[name].append(figures(in_process(module, name, who, interpreter), tokens))
    results = {name: middle(found) for name, found in every.items()}
    for name, result in results.items():
        result["trained_tokens_per_second"] = result["tokens_per_second"] * sum(trained) / sum(tokens)
        multiplied = prepared["computed_tokens"] if name == "veneer" else tokens
        flops = 4 * prepared["linear_weights"] * sum(multiplied[WARM_UP:])
        flops += 4 * prepared["head_weights"] * sum(trained[WARM_UP:])
        result["share_of_peak"] = result["tokens_per_second"] * flops / sum(tokens[WARM_UP:]) / peak
    curves = compare_all(
        job, results["veneer"], {name: results[name] for name in peers}, lambda wide: in_process(MODULE, "veneer", wide)
    )
    for name in peers:
        pairs = list(zip(every["veneer"], every[name]))
        results[name] |= {
            "speed_ratio": median(o["tokens_per_second"] / t["tokens_per_second"] for o, t in pairs),
            "memory_ratio": median(o["peak_rss_gb"] / t["peak_rss_gb"] for o, t in pairs),
            "curve": curves[name],
        }
    settings = {
        key: job[key]
        for key in ("base", "quantize", "steps", "batch", "learning_rate", "seed", "max_length", "threads")
    } | {"dtype": job["dtype"], "peers_dtype": job["peers_dtype"]}
    packages = ["veneer", "torch", "transformers"]
    packages += ["peft", "trl"] if set(peers) - set(ELSEWHERE) else []
    packages += ["bitsandbytes"] if set(peers) - set(ELSEWHERE) and job["quantize"] != "none" else []
    return {
        "settings": {
            **settings,
            "data": job["label"],
            "rows": prepared["rows"],
            "tokens": sum(tokens),
            "computed_tokens": sum(prepared["computed_tokens"]),
            "runs": runs,
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "warm_up_steps": WARM_UP,
        "peak_flops": peak,
        "results": results,
        "ratios": {name: ratios(results[name]) for name in peers},
    }


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Veneer's speed and memory as multiples of a peer's; void where the two did not learn the same."""
    return {"speed": result["speed_ratio"], "memory": result["memory_ratio"], "void": is_void(result["curve"])}


def is_void(curve: dict[str, Any]) -> bool:
    """Whether two loss curves part by more than rounding explains."""
    return not (curve["agrees"] or curve.get("explained", False))


def _length(example: dict[str, Any]) -> int:
    return len(example["input_ids"])


def _trained(example: dict[str, Any]) -> int:
    return sum(label >= 0 for label in example["labels"])


def _sums(batch: int, counts: list[int]) -> list[int]:
    """What the rows of each step add up to."""
    return [sum(counts[at : at + batch]) for at in range(0, len(counts), batch)]


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first run, which has the curves, with the medians of speed, memory and time over all runs."""
    keys = ("tokens_per_second", "peak_rss_gb", "train_seconds", "first_step_seconds")
    return {**runs[0], **{key: median(run[key] for run in runs) for key in keys}}


def compare_curves(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Whether two loss curves are the same but for rounding, and whether the learning rates were the same."""
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))
    after_first = pairs[1:]
    difference = sum(abs(a - b) for a, b in after_first) / len(after_first)
    mean = sum(a for a, _ in after_first) / len(after_first)
    rates = zip(ours["learning_rates"], theirs["learning_rates"], strict=True)
    return {
        "first_difference": abs(pairs[0][0] - pairs[0][1]),
        "mean_difference": difference,
        "relative": difference / mean,
        "agrees": difference <= SAME_CURVE * mean,
        "same_learning_rates": all(abs(a - b) <= 1e-9 for a, b in rates),
    }


def compare_all(
    job: dict[str, Any],
    ours: dict[str, Any],
    peers: dict[str, dict[str, Any]],
    train: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Our curve against each peer's; where one is not the same in bfloat16, ``train`` runs our job in float32 too."""
    curves = {name: compare_curves(ours, theirs) for name, theirs in peers.items()}
    if job["dtype"] != "bfloat16" or all(curve["agrees"] for curve in curves.values()):
        return curves
    wide = train({**job, "dtype": "float32", "run": "float32"})
    return {name: curve | from_float32(wide, ours, peers[name]) for name, curve in curves.items()}


def from_float32(wide: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far two curves are from that of float32, and whether ours is the nearer one and no further than rounding."""
    own, other = (compare_curves(wide, result) for result in (ours, theirs))
    return {
        "ours_from_float32": own["relative"],
        "theirs_from_float32": other["relative"],
        "float32_losses": wide["losses"],
        "explained": own["agrees"] and own["relative"] < other["relative"],
    }


def verdict(curve: dict[str, Any]) -> str:
    """What a comparison of curves says, in words."""
    if curve["agrees"]:
        return "the same within noise"
    if "explained" not in curve:
        return "DIFFERENT"
    ours, theirs = curve["ours_from_float32"], curve["theirs_from_float32"]
    told = f"from float32's curve ours is {ours:.2%} and theirs {theirs:.2%} away"
    return f"apart by the rounding of bfloat16: {told}" if curve["explained"] else f"DIFFERENT: {told}"


def figures(result: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    """The result with its speed: real tokens a second, without the steps that warm up."""
    return {**result, "tokens_per_second": sum(tokens[WARM_UP:]) / sum(result["seconds"][WARM_UP:])}


def dtypes(settings: dict[str, Any]) -> str:
    """What was computed in; without a word of peers they had the same."""
    ours, theirs = settings["dtype"], settings.get("peers_dtype", settings["dtype"])
    return str(ours) if theirs == ours else f"{ours} (peers in {theirs}, which PyTorch multiplies faster here)"


def table(report: dict[str, Any]) -> str:
    """The report as plain text: one line per program, then the loss curves side by side."""
    results, settings = report["results"], report["settings"]
    lines = [
        f"{settings['base']}, {dtypes(settings)}, quantize {settings['quantize']}, {settings['threads']} threads, "
        f"batch {settings['batch']}, {settings['steps']} steps of {settings['data']} ({settings['tokens']} tokens, of "
        f"which Veneer computes {settings['computed_tokens']}: what rows begin with alike it computes once); "
        f"speed from step {report['warm_up_steps'] + 1} on; {settings['runs']} runs",
        "",
        f"{'':12} {'tokens/s':>9} {'trained/s':>9} {'of peak':>8} {'peak GB':>8} {'first s':>8} {'train s':>8}"
        "   Veneer is",
    ]
    for name, result in results.items():
        line = (
            f"{name:12} {result['tokens_per_second']:9.0f} {result['trained_tokens_per_second']:9.0f} "
            f"{result['share_of_peak']:8.0%} {result['peak_rss_gb']:8.2f} "
            f"{result['first_step_seconds']:8.1f} {result['train_seconds']:8.1f}"
        )
        if name != "veneer":
            line += f"   {result['speed_ratio']:.2f} x as fast, with {result['memory_ratio']:.2f} x the memory"
            line += " (VOID: it learned something else)" if is_void(result["curve"]) else ""
        lines.append(line)
    lines += ["", "loss   " + " ".join(f"{name:>10}" for name in results)]
    for step, losses in enumerate(zip(*(result["losses"] for result in results.values()), strict=True), start=1):
        lines.append(f"{step:5}  " + " ".join(f"{loss:10.4f}" for loss in losses))
    lines.append("")
    for name, result in results.items():
        if name != "veneer":
            curve = result["curve"]
            rates = "" if curve["same_learning_rates"] else "; the learning rates DIFFER"
            lines.append(
                f"curve of veneer and {name}: {verdict(curve)} (mean |difference| after step 1: "
                f"{curve['mean_difference']:.4f} "
                f"= {100 * curve['relative']:.2f} % of the loss; at step 1: {curve['first_difference']:.4f}){rates}"
            )
    return "\n".join(lines)


def demo_rows(count: int, path: Path) -> None:
    """Rows of the demo's task, for machines that have no data at hand."""
    from veneer.demo import generate_rows

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generate_rows(count)]
    path.write_text("".join(lines), encoding="utf-8")


def first_rows(source: Path, count: int, path: Path) -> None:
    """The first ``count`` rows of a JSONL file."""
    with open(source, encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(count))]
    if len(lines) < count:
        raise SystemExit(f"{source} has only {len(lines)} rows; choose --rows accordingly")
    path.write_text("".join(lines), encoding="utf-8")


def add_python(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help=f"the interpreter of a peer that has an environment of its own: {', '.join(ELSEWHERE)}",
    )


def interpreters(parser: argparse.ArgumentParser, entries: list[str]) -> dict[str, str]:
    """The interpreter of each peer that has one of its own."""
    python = dict(entry.partition("=")[::2] for entry in entries)
    for peer, path in python.items():
        if peer not in ELSEWHERE:
            parser.error(f"--python: '{peer}' is none of {', '.join(ELSEWHERE)}")
        if not os.access(path, os.X_OK):
            parser.error(f"--python {peer}: there is no program '{path}'")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", help=f"comma-separated: {', '.join(PEERS)}; or none; default: what is installed")
    add_python(parser)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--quantize", default="none", choices=["none", "nf4"])
    parser.add_argument("--runs", type=int, default=1, help="of each, in turn; figures are medians")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=160, help="how many rows of the data to use")
    parser.add_argument("--data", type=Path, help="JSONL with prompt and answer; default: rows of the demo's task")
    parser.add_argument(
        "--base", default="smollm2-135m", help="the bundled model, or a folder of Hugging Face's format"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.peers is None:
        options.peers = ",".join(name for name in ("trl", "peft") if importlib.util.find_spec(name)) or "none"
    peers = [] if options.peers == "none" else options.peers.split(",")
    if unknown := [peer for peer in peers if peer not in PEERS]:
        parser.error(f"unknown peer '{unknown[0]}'; use some of {', '.join(PEERS)}, or none")
    python = interpreters(parser, options.python)
    if options.quantize != "none" and (elsewhere := [peer for peer in peers if peer in ELSEWHERE]):
        parser.error(f"{elsewhere[0]} takes part in 16 bits alone")
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}: the first {WARM_UP} are not timed")
    if options.rows % options.batch:
        parser.error("--rows must be a multiple of --batch, so that every step has a full batch")
    for peer in peers:
        package, interpreter = peer.partition("-")[0], python.get(peer, sys.executable)
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
        if subprocess.run([interpreter, "-c", look], check=False).returncode:
            parser.error(
                f"{package} is not installed for {interpreter}: install it there, leave it out of --peers, or name "
                f"another interpreter with --python {peer}=PATH"
            )
    with tempfile.TemporaryDirectory(prefix="veneer-benchmark-") as folder:
        rows = Path(folder) / "rows.jsonl"
        if options.data is None:
            demo_rows(options.rows, rows)
        else:
            first_rows(options.data, options.rows, rows)
        job = {
            **{key: getattr(options, key) for key in ("steps", "base", "dtype", "batch", "learning_rate", "seed")},
            **{key: getattr(options, key) for key in ("max_length", "threads", "quantize")},
            "rows": str(rows),
            "python": python,
            "label": "the demo's task" if options.data is None else options.data.name,
            "folder": folder,
        }
        report = run(job, peers, options.runs)
    print(json.dumps(report, indent=2) if options.json else table(report))


if __name__ == "__main__":
    main()
