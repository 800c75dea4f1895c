"""The main job, end to end: rows, training by the packaged recipe, base and adapter on held-out rows, figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.files import write_json, write_text
from veneer.inbox.parts import HELDOUT_ROWS, TRAIN_ROWS, VALIDATION_ROWS, as_jsonl, draw_parts
from veneer.recipe import Recipe, load_recipe
from veneer.run import RunFolder

if TYPE_CHECKING:
    from veneer.train.progress import Progress

METRICS = ("json_exact", "json_valid", "json_fields")


def write_data(
    folder: Path,
    *,
    seed: int = 0,
    train_rows: int = TRAIN_ROWS,
    validation_rows: int = VALIDATION_ROWS,
    heldout_rows: int = HELDOUT_ROWS,
) -> dict[str, Path]:
    """Writes ``train.jsonl``, ``validation.jsonl`` and ``heldout.jsonl``; the bytes depend on the arguments alone.

    Returns:
        the paths, by the files' names without suffix.
    """
    paths = {}
    for name, rows in draw_parts(seed, train_rows, validation_rows, heldout_rows).items():
        paths[name] = folder / f"{name}.jsonl"
        write_text(paths[name], as_jsonl(rows))
    return paths


def check_folder(folder: RunFolder) -> bool:
    """Whether a demo's rows are there already.

    Raises:
        TrainError: the folder holds a run that is not a demo.
    """
    from veneer.train.record import check_output

    demo_before = (folder.path / "data" / "heldout.jsonl").exists()
    check_output(folder, resume=False, overwrite=demo_before)
    return demo_before


def write_demo_data(output_dir: str | Path = "runs/demo") -> dict[str, Path]:
    """Writes the demo's rows where :func:`run_demo` would, and nothing else.

    Raises:
        TrainError: ``output_dir`` holds a run that is not a demo.
    """
    folder = RunFolder(Path(output_dir).expanduser().absolute())
    check_folder(folder)
    return write_data(folder.path / "data")


def demo_recipe(output_dir: Path, data: dict[str, Path], overrides: Sequence[str] = ()) -> Recipe:
    """The packaged recipe over these data files; ``overrides`` are ``key=value`` as on the command line."""
    places = {"data.train": data["train"], "data.eval": data["validation"], "output_dir": output_dir}
    own = [f"{key}={json.dumps(str(path.absolute()))}" for key, path in places.items()]
    with as_file(files("veneer.demo") / "demo.yaml") as path:
        return load_recipe(path, [*own, *overrides])


def run_demo(
    output_dir: str | Path = "runs/demo",
    progress: Progress | None = None,
    evaluation_progress: Callable[[str, int, int], None] | None = None,
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
    train_rows: int = TRAIN_ROWS,
    validation_rows: int = VALIDATION_ROWS,
    heldout_rows: int = HELDOUT_ROWS,
) -> dict[str, Any]:
    """Trains the bundled model on the demo's task and measures it before and after. Prints nothing.

    An earlier demo in the same folder is replaced; any other run is not touched.

    Args:
        output_dir: the run folder; the data files go into ``data/`` in it, the figures into ``demo.json``.
        progress: is told about the training.
        evaluation_progress: called as ``(what, done, total)`` while the held-out rows are answered.
        overrides: recipe keys to change, ``key=value``.
        seed: of the rows.
        train_rows, validation_rows, heldout_rows: how many of each.

    Returns:
        what ``demo.json`` holds: ``before`` and ``after`` (each metric, 0 to 1), ``train_seconds``, ``total_seconds``
        (training and both evaluations, with loading and rendering), ``adapter_mb``, ``peak_rss_gb`` (10^6 and 10^9
        bytes), ``tokens_per_second`` (while training), the numbers of rows, and the paths of run, report and rows.

    Raises:
        TrainError: ``output_dir`` holds a run that is not a demo.
        VeneerError: whatever else stops the training or the evaluation.
        KeyboardInterrupt: the training was interrupted.
    """
    from veneer.evaluate import evaluate, write_report
    from veneer.runtime import peak_rss_gb
    from veneer.train import train_recipe

    folder = RunFolder(Path(output_dir).expanduser().absolute())
    counts = {"train_rows": train_rows, "validation_rows": validation_rows, "heldout_rows": heldout_rows}
    began = time.perf_counter()
    demo_before = check_folder(folder)
    (folder.path / "demo.json").unlink(missing_ok=True)
    data = write_data(folder.path / "data", seed=seed, **counts)
    recipe = demo_recipe(folder.path, data, overrides)

    training_began = time.perf_counter()
    trained = train_recipe(recipe, overwrite=demo_before, progress=progress)
    train_seconds = time.perf_counter() - training_began
    if trained.interrupted:
        raise KeyboardInterrupt
    tokens_per_second = trained.training["tokens_per_second"]
    del trained  # the adapter is read back from the folder: the figures are those of the files on disk

    evaluation = evaluate(
        folder.path,
        data["heldout"],
        metrics=METRICS,
        max_new_tokens=recipe.eval.max_new_tokens,
        progress=evaluation_progress,
    )
    evaluation.save(folder.eval_folder / "heldout.json")
    write_report(folder.path)

    result: dict[str, Any] = {
        "before": {name: metric.base_value for name, metric in evaluation.metrics.items()},
        "after": {name: metric.value for name, metric in evaluation.metrics.items()},
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - began, 1),
        "adapter_mb": round((folder.adapter / "adapter_model.safetensors").stat().st_size / 1e6, 2),
        "peak_rss_gb": round(peak_rss_gb(), 2),
        "tokens_per_second": round(tokens_per_second, 1),
        **counts,
        "base": recipe.base,
        "run": str(output_dir),
        "report": str(Path(output_dir) / folder.report.name),
        "heldout": str(Path(output_dir) / "data" / data["heldout"].name),
    }
    write_json(folder.path / "demo.json", result)
    return result
