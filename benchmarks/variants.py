"""The variants of LoRA against each other: methods x seeds on two tasks, what the literature claims, what to use.

    python -m benchmarks.variants --results variants.jsonl [--data gsm8k_train.jsonl] [--write docs/variants.md]
    python -m benchmarks.variants --quick
    python -m benchmarks.variants --cost [--methods dora,pissa]

Each run is a process of its own. Its result goes into ``--results`` at once, so a run can be cut and goes on where it
was: what the file holds is not run again. ``--write`` makes the page and its pictures from the file alone.

A method's learning rate is the one of ``--rates`` with the lowest held-out loss at the first seed, on rows that are not
reported; where that is the largest, larger ones are tried too. The second task chooses between that one and the next
lower one. The other seeds then run at what was chosen. A method that fails is recorded with its error, and the others
go on. ``--workers 2 --threads 1`` makes two runs at a time, sooner done than one after another.

``--cost`` compares step time and memory instead: a method and its reference train in turn, block by block.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Job, commit, in_process
from benchmarks.quantisation import prepare_rows
from benchmarks.variants_methods import METHODS, QUICK, Method, chosen, settings_hash
from benchmarks.variants_results import Record, Results, key_of

MODULE = "benchmarks.variants_run"
RATES = (1e-4, 2.7e-4, 7.5e-4, 2e-3)
HIGHER_RATES = (5.5e-3, 1.5e-2)  # tried where the largest before was the best
PROBE_STEPS = 4
QUICK_SETTINGS: dict[str, Any] = {
    "seeds": 1,
    "steps": 12,
    "rows": 96,
    "held_out": 32,
    "answers": 8,
    "rates": "5e-4",
    "methods": ",".join(QUICK),
}


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows held out; ``answers`` is a file of rows to answer, or "" where answers are long."""

    label: str
    rows: Path
    held_out: Path
    answers: str
    digest: str


@dataclass
class Bench:
    """What all runs share.

    Attributes:
        common: settings that are part of every run's key, but for the task's rows.
        results: what was measured, and goes on being added to.
        folder: for the files of the runs.
    """

    common: dict[str, Any]
    results: Results
    folder: Path
    threads: int
    seeds: int
    rates: list[float]
    workers: int = 1

    def record_of(self, task: Task, method: Method | None, seed: int, rate: float) -> Record:
        """The record of a run that is still to be measured; without a method that of the base as it is."""
        common = {**self.common, "rows": task.digest}
        recipe = {} if method is None else method.recipe
        steps = 0 if method is None else max(1, round(common["steps"] * method.steps))
        settings = {**common, **recipe, "steps": steps, "learning_rate": rate}
        return {
            "method": "base" if method is None else method.name,
            "task": task.label,
            "seed": seed,
            "learning_rate": rate,
            "steps": steps,
            "recipe": recipe,
            "common": common,
            "settings_hash": settings_hash(settings),
        }

    def job_of(self, task: Task, record: Record) -> Job:
        return {
            **self.common,
            "quantize": "none",
            **record["recipe"],
            **{key: record[key] for key in ("steps", "learning_rate", "seed")},
            "rows": str(task.rows),
            "held_out": str(task.held_out),
            "answers": task.answers,
            "general": str(self.folder / "general.json"),
            "folder": str(self.folder),
            "threads": self.threads,
        }

    def phases(self, tasks: Sequence[Task], methods: list[Method]) -> Iterator[list[Record]]:
        """The runs, in lists: the runs of one are independent of each other, and what they find decides the next one.

        The first task searches the rates; the others try its choice and the next lower one. A task's own choice then
        holds for its other seeds.
        """
        from benchmarks.variants_figures import chosen_rate

        first = tasks[0]
        searching = [method for method in methods if method.rate_of is None]
        bases = [self.record_of(task, None, 0, 0.0) for task in tasks]
        yield [*bases, *(self.record_of(first, method, 0, rate) for method in searching for rate in self.rates)]
        tried = list(self.rates)

        def best(task: Task) -> dict[str, float | None]:
            common = {**self.common, "rows": task.digest}
            mine = [r for r in self.results if r["task"] == task.label and r.get("common") == common]
            mine = [r for r in mine if r["learning_rate"] in tried]
            return {method.name: chosen_rate(method.name, mine) for method in methods}

        rates = best(first)
        for rate in HIGHER_RATES if len(tried) > 1 else ():
            rising = [method for method in searching if rates[method.name] == max(tried)]
            if rate <= max(tried) or not rising:
                continue
            yield [self.record_of(first, method, 0, rate) for method in rising]
            tried.append(rate)
            rates = best(first)
        for task in tasks[1:]:
            near = {name: [r for r in sorted(tried) if r <= (rate or 0)][-2:] for name, rate in rates.items()}
            yield [self.record_of(task, method, 0, rate) for method in searching for rate in near[method.name]]
        for seed in range(self.seeds):
            for task in tasks:
                rates = best(task)
                yield [self.record_of(task, m, seed, rate) for m in methods if (rate := rates[m.name]) is not None]

    def measure(self, tasks: Sequence[Task], record: Record, machine: dict[str, Any]) -> Record:
        """Runs what a record stands for: the record with its figures, or with the error that stopped it."""
        task = next(task for task in tasks if task.label == record["task"])
        what = f"{record['method']}, seed {record['seed']}, rate {record['learning_rate']:g}, {record['steps']} steps"
        say(f"{task.label}: {what}")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            job = {**self.job_of(task, record), "folder": folder}
            try:
                figures = in_process(MODULE, "base" if record["method"] == "base" else "run", job)
            except SystemExit as failure:
                figures = {"error": reason(failure)}
                say(f"  {record['method']} failed: {figures['error']}")
        return {**record, **figures, "machine": machine, "wall_seconds": time.perf_counter() - began}

    def lacking(self, records: Iterable[Record]) -> list[Record]:
        """Those of the records that are not measured."""
        return [record for record in records if self.results.get(key_of(record)) is None]

    def measure_all(
        self, tasks: Sequence[Task], methods: list[Method], machine: dict[str, Any], minutes: float | None = None
    ) -> bool:
        """Measures what is lacking, some at a time, each added as it is found; False where the minutes were over."""
        end = time.monotonic() + 60 * minutes if minutes is not None else None

        def measured(record: Record) -> Record | None:
            return None if end is not None and time.monotonic() > end else self.measure(tasks, record, machine)

        with ThreadPoolExecutor(self.workers) as pool:
            for phase in self.phases(tasks, methods):
                for waiting in as_completed([pool.submit(measured, record) for record in self.lacking(phase)]):
                    found = waiting.result()
                    if found is None:
                        return False
                    self.results.add(found)
        return True


def estimate(bench: Bench, tasks: list[Task], methods: list[Method]) -> str:
    """How long the runs that are lacking will take, from a short run of LoRA on each task."""
    told, total = [], 0.0
    for place, task in enumerate(tasks):
        runs = planned(bench, tasks, place, methods)
        if not runs:
            told.append(f"{task.label}: nothing is lacking")
            continue
        record = bench.record_of(task, METHODS["lora"], 0, bench.rates[0])
        began = time.perf_counter()
        probe = in_process(MODULE, "run", {**bench.job_of(task, record), "steps": PROBE_STEPS})
        wall = time.perf_counter() - began
        step, around = probe["train_seconds"] / PROBE_STEPS, wall - probe["train_seconds"]
        seconds = runs * (around + record["steps"] * step) / bench.workers
        total += seconds
        told.append(
            f"{task.label}: {runs} runs x {record['steps']} steps x {step:.2f} s, and {around:.0f} s around each: "
            f"{seconds / 60:.0f} min"
        )
    return "\n".join([*told, f"estimated in all: {total / 60:.0f} min, {bench.workers} at a time"])


def planned(bench: Bench, tasks: Sequence[Task], place: int, methods: list[Method]) -> int:
    """How many runs of a task the file lacks; those whose rate is not known yet are counted as lacking, but
    for the lower rate that another task than the first tries."""
    label = tasks[place].label
    searching = sum(m.rate_of is None for m in methods) * (len(bench.rates) - 1) if place == 0 else 0
    total = 1 + len(methods) * bench.seeds + searching
    wanted = [record for phase in bench.phases(tasks, methods) for record in phase if record["task"] == label]
    lacking = {key_of(record) for record in bench.lacking(wanted)}
    return total - len({key_of(record) for record in wanted} - lacking)


def compare_costs(
    bench: Bench, task: Task, methods: list[Method], rounds: int, block: int, machine: dict[str, Any]
) -> None:
    """Step time and memory of every method against its reference, added to the results."""
    from benchmarks.variants_cost import compare
    from benchmarks.variants_figures import COST

    for method in methods:
        if method.reference is None or method.steps != 1.0:
            continue
        say(f"cost of {method.name} against {method.reference}")
        record = bench.record_of(task, method, 0, bench.rates[0])
        other = bench.record_of(task, METHODS[method.reference], 0, bench.rates[0])
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            jobs = [{**bench.job_of(task, r), "folder": folder, "block": block} for r in (record, other)]
            try:
                figures = compare(jobs[0], jobs[1], rounds)
            except SystemExit as failure:
                figures = {"error": reason(failure)}
                say(f"  failed: {figures['error']}")
        bench.results.add({**record, "task": COST, "reference": method.reference, **figures, "machine": machine})


def prepare_task(options: argparse.Namespace, data: Path | None, folder: Path) -> Task:
    """Writes a task's rows. The demo's answers are short: some of the rows that are reported are answered too."""
    folder.mkdir()
    wanted = argparse.Namespace(data=data, rows=options.rows, held_out=options.held_out)
    rows, held_out, label = prepare_rows(wanted, folder)
    answers = ""
    if data is None and options.answers:
        lines = held_out.read_text(encoding="utf-8").splitlines(keepends=True)
        path = folder / "answers.jsonl"
        path.write_text("".join(lines[len(lines) // 2 :][: options.answers]), encoding="utf-8")
        answers = str(path)
    digest = hashlib.sha256(rows.read_bytes() + b"\0" + held_out.read_bytes()).hexdigest()[:12]
    return Task(
        label.removesuffix(".jsonl"), rows, held_out, answers, f"{digest}, {options.answers if answers else 0} answered"
    )


def machine_of(options: argparse.Namespace, told: Record) -> dict[str, Any]:
    """Where the runs take place."""
    packages = ("veneer", "torch", "transformers")
    return {
        **{key: told[key] for key in ("dtype", "processor")},
        "device": options.device,
        "threads": options.threads,
        "workers": options.workers,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
    }


def reason(failure: SystemExit) -> str:
    """What went wrong, out of a traceback: the last error with the lines after it."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    errors = [place for place, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return " / ".join(lines[errors[-1] if errors else -1 :])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines; what it holds is not run again")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there (docs/variants.md)")
    parser.add_argument("--note", default="", help="a paragraph for the page: what a reader must know of these runs")
    parser.add_argument("--page-only", action="store_true", help="run nothing: the page from --results")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, few methods and steps")
    parser.add_argument("--cost", action="store_true", help="step time and memory against the reference, in turn")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"comma-separated: {', '.join(METHODS)}")
    parser.add_argument("--data", type=Path, help="JSONL with prompt and answer: a second task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES), help="one alone is not searched")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--rows", type=int, default=960, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=128, help="half of them choose the rates, half are reported")
    parser.add_argument("--answers", type=int, default=32, help="rows of the demo's that are answered; 0 answers none")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--rounds", type=int, default=8, help="of --cost: pairs of blocks")
    parser.add_argument("--block", type=int, default=3, help="of --cost: steps of a block")
    parser.add_argument("--base", default="smollm2-135m", help="the bundled model, or a folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK_SETTINGS)
    options = parser.parse_args(arguments)
    options.rates = [float(rate) for rate in options.rates.split(",")]
    options.methods = [name for name in options.methods.split(",") if name]
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"unknown method '{unknown[0]}'; use some of {', '.join(METHODS)}")
    if options.held_out < 4 or options.seeds < 1 or options.steps < 3:
        parser.error("--held-out must be at least 4, --seeds at least 1, --steps at least 3")
    if options.answers > options.held_out - options.held_out // 2:
        parser.error("--answers cannot be more than the rows that are reported: half of --held-out")
    if options.page_only and (options.results is None or not options.results.exists()):
        parser.error("--page-only needs the file of --results")
    return options


def main() -> None:
    options = parse()
    results = Results(options.results)
    if not options.page_only:
        with tempfile.TemporaryDirectory(prefix="veneer-benchmark-") as folder:
            run(options, results, Path(folder))
    report(options, results)


def run(options: argparse.Namespace, results: Results, folder: Path) -> None:
    """Measures what is lacking."""
    keys = ("base", "dtype", "device", "steps", "batch", "max_length")
    common = {key: getattr(options, key) for key in keys}
    bench = Bench(common, results, folder, options.threads, options.seeds, options.rates, options.workers)
    methods = chosen(options.methods)
    sources = [None] if options.data is None else [None, options.data]
    tasks = [prepare_task(options, data, folder / str(number)) for number, data in enumerate(sources)]
    general = {**common, "general": str(folder / "general.json"), "folder": str(folder), "threads": options.threads}
    if options.cost:
        machine = machine_of(options, in_process(MODULE, "where", general))
        methods = [METHODS[name] for name in options.methods]
        compare_costs(bench, tasks[-1], methods, options.rounds, options.block, machine)
        return
    machine = machine_of(options, in_process(MODULE, "general", general))
    if not options.quick or options.estimate:
        say(estimate(bench, tasks, methods))
    if options.estimate:
        return
    if not bench.measure_all(tasks, methods, machine, options.minutes):
        say("the minutes are over: go on with the same command")


def report(options: argparse.Namespace, results: Results) -> None:
    """Prints what was found, or writes the page."""
    from benchmarks.variants_figures import findings
    from benchmarks.variants_page import cost_table, page, write_page

    found = findings(results, results.failures())
    if options.write is not None:
        write_page(found, options.write, options.note)
        say(f"wrote {options.write}")
    elif options.cost:
        print(cost_table(found.costs))
        for failure in found.failures:
            print(f"{failure['method']} failed: {failure['error']}")
    elif not options.estimate:
        print(page(found))


if __name__ == "__main__":
    main()
