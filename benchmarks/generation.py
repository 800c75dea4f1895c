"""Generation: Veneer against transformers' ``generate``, in turn, each in a process of its own.

    python -m benchmarks.generation [--rows 1,16] [--tokens 64] [--runs 3] [--json]

Both get the same prompts, weights, adapter (rank 16 on all linear layers, its factors random), dtype and threads, and
write the same number of tokens, the likeliest ones. transformers runs PEFT's layers where there is an adapter. Speed
counts new tokens over the whole call, the reading of the prompts included; the first call is not timed. Texts part
where two tokens are equally likely but for rounding: "--dtype float32" shows that they are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants import LORA, hugging_face_folder, peers_dtype
from benchmarks.processes import Job, Result, in_process, serve
from benchmarks.sft import dtypes

MODULE = "benchmarks.generation"
TARGET = 2.0
TIMED = 3  # calls, of which the fastest counts


def prepare(job: Job) -> Result:
    """Writes the adapter and the prompts, and converts the base if need be."""
    import torch

    from veneer.adapters import LoraConfig, attach
    from veneer.kernels.precision import resolve_dtype
    from veneer.models import load_base

    base = load_base(job["base"], dtype=job["dtype"], device="cpu")
    adapted = attach(base, LoraConfig(**LORA), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.003)
    adapted.save(Path(job["folder"]) / "adapter")
    texts = [f"Tell me in {n + 2} sentences why the sea is salty, and how we know." for n in range(max(job["rows"]))]
    prompts = [
        base.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    (Path(job["folder"]) / "prompts.json").write_text(json.dumps(prompts))
    dtype = str(resolve_dtype(job["dtype"], "cpu")).removeprefix("torch.")
    peers = peers_dtype(job["dtype"])
    folder = hugging_face_folder(job["base"], peers)
    return {"dtype": dtype, "peers_dtype": peers, "model_folder": str(folder)}


def veneer(job: Job) -> Result:
    from veneer.adapters import load_adapter
    from veneer.generate import generate
    from veneer.models import load_base

    model: Any = load_base(job["base"], dtype=job["dtype"], device="cpu")
    if job["adapter"]:
        model = load_adapter(model, Path(job["folder"]) / "adapter")

    def write(prompts: list[list[int]]) -> list[list[int]]:
        found = generate(model, prompts, max_new_tokens=job["tokens"], stop_token_ids=(), batch_size=len(prompts))
        return [one.token_ids for one in found]

    return _timed(job, write)


def transformers(job: Job) -> Result:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job["model_folder"], dtype=getattr(torch, job["peers_dtype"]))
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, str(Path(job["folder"]) / "adapter"))
    model.eval()
    model.generation_config.eos_token_id = None  # no row ends early

    @torch.no_grad()
    def write(prompts: list[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        found = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=job["tokens"]
        )
        return [row[width:].tolist() for row in found]

    return _timed(job, write)


def _timed(job: Job, write: Any) -> Result:
    prompts = json.loads((Path(job["folder"]) / "prompts.json").read_text())[: job["count"]]
    found = write(prompts)
    seconds = []
    for _ in range(TIMED):
        began = time.perf_counter()
        write(prompts)
        seconds.append(time.perf_counter() - began)
    assert all(len(row) == job["tokens"] for row in found)
    return {"tokens_per_second": len(prompts) * job["tokens"] / min(seconds), "ids": found}


def _common(one: list[int], other: list[int]) -> int:
    """How many first tokens are the same."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def run(job: Job, runs: int) -> dict[str, Any]:
    """Every number of rows with and without the adapter, both programs in turn."""
    job = {**job, **in_process(MODULE, "prepare", job)}
    entries = []
    for adapter in (False, True):
        for count in job["rows"]:
            found: dict[str, list[Result]] = {"veneer": [], "transformers": []}
            for _ in range(runs):
                for name, results in found.items():
                    results.append(in_process(MODULE, name, {**job, "adapter": adapter, "count": count}))
            pairs = list(zip(found["veneer"], found["transformers"]))
            same = [_common(a, b) / job["tokens"] for a, b in zip(pairs[0][0]["ids"], pairs[0][1]["ids"])]
            entries.append(
                {
                    "rows": count,
                    "adapter": adapter,
                    **{n: median(r["tokens_per_second"] for r in results) for n, results in found.items()},
                    "ratio": median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs),
                    "same": sum(same) / len(same),
                    "memory_ratio": median(a["peak_rss_gb"] / b["peak_rss_gb"] for a, b in pairs),
                }
            )
    keys = ("base", "dtype", "peers_dtype", "threads", "tokens")
    return {"settings": {**{key: job[key] for key in keys}, "runs": runs}, "results": entries, "target": TARGET}


def table(report: dict[str, Any]) -> str:
    """The report as plain text."""
    settings = report["settings"]
    lines = [
        f"{settings['base']}, {dtypes(settings)}, {settings['threads']} threads, {settings['tokens']} new tokens",
        "",
        f"{'rows':>4}  {'adapter':7}  {'veneer':>8}  {'transformers':>12}  tokens/s",
    ]
    for entry in report["results"]:
        verdict = "reached" if entry["ratio"] >= report["target"] else "MISSED"
        lines.append(
            f"{entry['rows']:4}  {'yes' if entry['adapter'] else 'no':7}  {entry['veneer']:8.0f}  "
            f"{entry['transformers']:12.0f}  {entry['ratio']:.2f} x as fast (target {report['target']:g}: {verdict}), "
            f"{entry['memory_ratio']:.2f} x the memory; texts part after {entry['same']:.0%} of their length"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default="1,16", help="rows at once, comma-separated")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=1, help="of each program, in turn; figures are medians")
    parser.add_argument("--base", default="smollm2-135m", help="the bundled model, or a folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="veneer-benchmark-") as folder:
        job = {key: getattr(options, key) for key in ("tokens", "base", "dtype", "threads")}
        job |= {"folder": folder, "rows": [int(count) for count in options.rows.split(",")]}
        report = run(job, options.runs)
    print(json.dumps(report, indent=2) if options.json else table(report))


if __name__ == "__main__":
    import sys

    if len(sys.argv) == 4 and sys.argv[1] in ("prepare", "veneer", "transformers"):
        serve({"prepare": prepare, "veneer": veneer, "transformers": transformers})
    else:
        main()
