"""Speed and memory on the CPU, and how both grow: the page docs/performance.md.

    python -m benchmarks.performance --results performance.jsonl [--data rows.jsonl] [--write docs/performance.md]
    python -m benchmarks.performance --results performance.jsonl --only peers,ratios
    python -m benchmarks.performance --results performance.jsonl --page-only --write docs/performance.md

``peers`` trains against TRL and PEFT, in 16 and in 4 bits (``benchmarks.sft``), ``generation`` writes against
transformers, ``ratios`` compares settings of Veneer in turn, block by block (``benchmarks.variants_cost``), and
``growth`` measures Veneer alone over the length of rows, the rank, the rows of a step, the share of trained tokens and
the size of the model. Each result goes into the file at once; what it holds is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import generation, sft
from benchmarks.contestants import LORA
from benchmarks.processes import Job, Result, commit, in_process

PARTS = ("peers", "generation", "ratios", "growth")
RATIO_TOKENS = 4096  # of a step in the comparisons of lengths
LENGTHS = (256, 512, 1024, 2048, 4096)
RANKS = (4, 8, 16, 32, 64)
BATCHES = (1, 2, 4, 8, 16)
TRAINED = (0.1, 0.5, 1.0)
SHAPES = ("SmolLM2-135M", "Llama-3.2-1B")
STEPS = 5  # of a point of growth; from the third on they are timed


class File:
    """Results by name, a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records: dict[str, dict[str, Any]] = {record["name"]: record for record in map(json.loads, lines)}

    def measure(self, name: str, part: str, how: Callable[[], dict[str, Any]]) -> None:
        """Adds what ``how`` measures, unless there is a result of this name; a failure is tried again the next time."""
        if name in self.records:
            return
        print(f"{part}: {name}", flush=True)
        try:
            record = {"name": name, "part": part, "commit": commit(), **how()}
        except SystemExit as failure:
            print(f"  failed: {str(failure).strip().splitlines()[-1]}", flush=True)
            return
        self.records[name] = record
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "processor": platform.machine(),
        "features": named,
        "threads": threads,
        "memory_gb": round(memory, 1),
        "torch": torch.__version__,
    }


def peers(options: argparse.Namespace, file: File, folder: Path) -> None:
    """Against TRL and PEFT, and those that ``--python`` names an interpreter of."""
    for quantize in ("none", "nf4"):
        rows = folder / "rows.jsonl"
        if options.data is None:
            sft.demo_rows(160, rows)
        else:
            sft.first_rows(options.data, 160, rows)
        job = {
            **_common(options, folder),
            "quantize": quantize,
            "steps": 10,
            "batch": 8,
            "max_length": 1024,
            "rows": str(rows),
            "python": options.python,
            "label": "the demo's task" if options.data is None else options.data.name,
        }
        names = ["trl", "trl-nockpt", "peft", *options.python] if quantize == "none" else ["trl", "peft"]
        file.measure(
            f"peers, quantize {quantize}", "peers", lambda job=job, names=names: sft.run(job, names, options.runs)
        )


def generations(options: argparse.Namespace, file: File, folder: Path) -> None:
    """Against transformers."""
    job = {**_common(options, folder), "tokens": 64, "rows": [1, 16]}
    file.measure("generation", "generation", lambda: generation.run(job, options.runs))


def ratios(options: argparse.Namespace, file: File, folder: Path) -> None:
    """Settings of Veneer against each other, with the limit that each is held to."""
    from benchmarks.variants_cost import compare

    short, long = folder / "short.jsonl", folder / "long.jsonl"
    sft.demo_rows(800, short) if options.data is None else sft.first_rows(options.data, 800, short)
    in_process(
        __spec__.name if __spec__ else "benchmarks.performance", "rows", {**_common(options, folder), "rows": str(long)}
    )
    plain = {
        **_common(options, folder),
        "device": "cpu",
        "quantize": "none",
        "adapter": LORA,
        "train": {},
        "batch": 8,
        "max_length": 512,
        "block": 2,
        "rows": str(short),
    }

    def changed(**changes: Any) -> Job:
        return {**plain, "adapter": {**LORA, **changes}}

    def of_length(length: int) -> Job:
        step = {"batch": RATIO_TOKENS // length, "max_length": length, "block": 1}
        return {**plain, **step, "rows": str(long), "train": {"micro_batch_tokens": max(2048, length)}}

    wanted: list[tuple[str, Job, Job, float]] = [
        ("DoRA to LoRA", changed(use_dora=True), plain, 1.15),
        ("rsLoRA to LoRA", changed(use_rslora=True), plain, 1.0),
        ("dropout 0.05 to none", changed(lora_dropout=0.05), plain, 1.10),
        ("rank 64 to rank 8", changed(r=64), changed(r=8), 1.25),
        *((f"rows of {2 * n} to {n} tokens", of_length(2 * n), of_length(n), 1.25) for n in LENGTHS[1:-1]),
    ]
    for name, one, other, limit in wanted:

        def how(one: Job = one, other: Job = other, limit: float = limit) -> Result:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                return {**compare({**one, "folder": place}, other, options.rounds), "limit": limit}

        file.measure(name, "ratios", how)


def growth(options: argparse.Namespace, file: File, folder: Path) -> None:
    """Veneer alone, one thing changing at a time."""
    for axis, value, job in points(_common(options, folder)):
        file.measure(f"{axis}: {value}", "growth", functools.partial(_point, job, axis, value))


def points(common: Job) -> Iterator[tuple[str, Any, Job]]:
    """What changes, its value, and the job."""
    plain = {
        **common,
        "adapter": LORA,
        "quantize": "none",
        "steps": STEPS,
        "batch": 4,
        "max_length": 512,
        "trained": 1.0,
    }
    for length in LENGTHS:
        yield "length", length, {**plain, "batch": RATIO_TOKENS // length, "max_length": length}
    for rank in RANKS:
        yield "rank", rank, {**plain, "adapter": {**LORA, "r": rank}}
    for batch in BATCHES:
        yield "rows of a step", batch, {**plain, "batch": batch}
    for share in TRAINED:
        yield "share of trained tokens", share, {**plain, "trained": share}
    for shape in SHAPES:
        yield "model", shape, {**plain, "shape": shape, "batch": 1}


def _point(job: Job, axis: str, value: Any) -> Result:
    with tempfile.TemporaryDirectory(dir=job["folder"]) as place:
        job = {**job, "folder": place, "rows": str(Path(place) / "rows.jsonl"), "run": 0}
        if "shape" in job:
            job["base"], job["tokenizer"] = str(Path(place) / "model"), job["base"]
        made = in_process("benchmarks.performance", "rows", job)
        result = in_process("benchmarks.contestants", "veneer", job)
    seconds = result["seconds"][sft.WARM_UP :]
    return {
        "axis": axis,
        "value": value,
        "tokens": made["tokens"],
        "trained": made["trained"],
        "tokens_per_second": made["tokens"] * len(seconds) / sum(seconds),
        "peak_rss_gb": result["peak_rss_gb"],
    }


def make_rows(job: Job) -> Result:
    """Rows of ``max_length`` tokens, of which a share is trained; and a random model, if the job names a shape.

    Returns:
        the tokens of a step, and those of them that are trained.
    """
    from benchmarks.memory import SHAPES as ALL
    from benchmarks.qlora_contestants import _long_rows, write_random_llama
    from veneer.data.read import read
    from veneer.data.render import render
    from veneer.models import load_tokenizer

    name = job["base"]
    if "shape" in job:
        write_random_llama(ALL[job["shape"]], Path(name), 0)
        load_tokenizer(job["tokenizer"]).save_pretrained(name)
    tokenizer = load_tokenizer(name)
    length, batch = job.get("max_length", max(LENGTHS)), job.get("batch", 1)
    texts = [json.loads(line)["text"] for line in _long_rows(job.get("steps", 64) * batch, length, tokenizer)]
    rows: list[dict[str, str]] = [{"text": text} for text in texts]
    if job.get("trained", 1.0) < 1:
        rows = []
        for text in texts:
            ids = tokenizer(text)["input_ids"][: length - 40]  # room for the template
            cut = round(len(ids) * (1 - job["trained"]))
            rows.append({"prompt": tokenizer.decode(ids[:cut]), "completion": tokenizer.decode(ids[cut:])})
    Path(job["rows"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stats = render(read(job["rows"]), tokenizer, max_length=length).stats
    return {"tokens": stats.tokens / len(rows) * batch, "trained": stats.trained_tokens / stats.tokens}


def _common(options: argparse.Namespace, folder: Path) -> Job:
    keys = ("base", "dtype", "threads")
    return {**{key: getattr(options, key) for key in keys}, "learning_rate": 2e-4, "seed": 0, "folder": str(folder)}


MEASURES = {"peers": peers, "generation": generations, "ratios": ratios, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; what it holds is not measured again")
    parser.add_argument("--write", type=Path, help="write the page there (docs/performance.md)")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--data", type=Path, help="JSONL with prompt and answer; default: rows of the demo's task")
    parser.add_argument("--runs", type=int, default=3, help="of each program against its peers, in turn")
    parser.add_argument("--rounds", type=int, default=6, help="of ratios: pairs of blocks")
    parser.add_argument("--base", default="smollm2-135m", help="the bundled model, or a folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    sft.add_python(parser)
    options = parser.parse_args()
    options.python = sft.interpreters(parser, options.python)
    wanted = options.only.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"unknown part '{unknown[0]}'; use some of {', '.join(PARTS)}")
    file = File(options.results)
    if not options.page_only:
        file.measure("machine", "machine", lambda: machine(options.threads))
        for part in wanted:
            with tempfile.TemporaryDirectory(prefix="veneer-benchmark-") as folder:
                MEASURES[part](options, file, Path(folder))
    if options.write is not None:
        from benchmarks.performance_page import write_page

        write_page(file.records, options.write)
        print(f"wrote {options.write}")


if __name__ == "__main__":
    import sys

    if len(sys.argv) == 4 and sys.argv[1] == "rows":
        from benchmarks.processes import serve

        serve({"rows": make_rows})
    else:
        main()
