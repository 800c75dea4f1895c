"""The run folder: what lies where, what ``run.json`` says, and the model that a folder stands for. Imports no torch."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer import __version__
from veneer.errors import AdapterError, ModelError, UsageError, VeneerError, did_you_mean
from veneer.files import write_json

if TYPE_CHECKING:
    from veneer.adapters import AdaptedModel
    from veneer.data import Rows
    from veneer.models import Base
    from veneer.recipe import DataRecipe, Recipe

Status = Literal["running", "finished", "interrupted", "failed"]

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run; nothing is created by naming them."""

    path: Path

    @property
    def recipe_path(self) -> Path:
        """The recipe as it was run: every key, absolute paths."""
        return self.path / "recipe.yaml"

    @property
    def run_json(self) -> Path:
        """What the run was made of and how it went: :class:`RunInfo`."""
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, for each logged step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What ``--resume`` goes on from."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    @property
    def eval_folder(self) -> Path:
        """Evaluations with every row's answer."""
        return self.path / "eval"


@dataclass
class RunInfo:
    """What ``run.json`` holds: enough to say where an adapter came from and to make it again.

    Attributes:
        status: "running" until the run ends; a run that was killed keeps it.
        base: identity of the base model, as ``BaseIdentity.to_dict``.
        data: of ``train`` and ``eval``: source, content hash, rows and what was said about them.
        seed: ``train.seed``.
        hardware: as ``runtime.hardware``.
        versions: of Python, Veneer and the libraries that decide numbers.
        metrics: the last values, held-out ones of the kept checkpoint.
        training: steps, tokens, seconds, peak memory.
        started, finished: UTC, ISO 8601.
        error: why the run failed.
        extra: whatever else was in the file; written back as it was.
    """

    status: Status = "running"
    base: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    started: str = field(default_factory=lambda: utc_now())
    finished: str | None = None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` reads it back."""
        values = asdict(self)
        return {**values.pop("extra"), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunInfo:
        """Reads what :meth:`to_dict` wrote; keys of a later version are kept in ``extra``."""
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in known}
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    def write(self, folder: RunFolder) -> None:
        """Writes ``run.json``, whole or not at all.

        Raises:
            StorageError: full disk, no permission.
        """
        write_json(folder.run_json, self.to_dict())

    @classmethod
    def read(cls, folder: RunFolder) -> RunInfo:
        """Reads ``run.json``.

        Raises:
            UsageError: it is missing or broken.
        """
        try:
            values = json.loads(folder.run_json.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise _no_run(folder.path) from error
        except (OSError, ValueError) as error:
            fix = "the file was cut off or edited: train again, or load the adapter folder itself"
            raise UsageError(f"run.json cannot be read: {error}", where=str(folder.run_json), fix=fix) from error
        if not isinstance(values, dict):
            raise UsageError("run.json holds no object", where=str(folder.run_json), fix="train again")
        return cls.from_dict(values)


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    path: Path
    recipe: Recipe
    info: dict[str, Any]  # run.json

    @property
    def folder(self) -> RunFolder:
        """Its paths."""
        return RunFolder(self.path)

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return self.info.get("status") == "finished"


def package_versions() -> dict[str, str]:
    """The versions of Python, Veneer and the libraries that decide numbers."""
    found = {"python": platform.python_version(), "veneer": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is a run folder, finished or not."""
    return (Path(path) / "run.json").is_file()


def open_run(path: str | Path) -> Run:
    """Opens a run folder, finished or not.

    Raises:
        UsageError: it is no run folder, or its files are broken.
        RecipeError: its recipe cannot be read.
    """
    from veneer.recipe import load_recipe

    folder = RunFolder(Path(path).expanduser().absolute())
    info = RunInfo.read(folder)
    # The data may have moved since: a finished run can be used without it.
    recipe = load_recipe(folder.recipe_path, check_paths=False)
    return Run(folder.path, recipe, info.to_dict())


def held_out_rows(data: DataRecipe) -> Rows | None:
    """The rows that a recipe holds out, read again; None where it holds none out.

    Raises:
        DataError: they cannot be read.
    """
    from veneer.data.read import read
    from veneer.data.split import split

    options: dict[str, Any] = {"format": data.format, "columns": data.columns}
    if isinstance(data.eval, int | float):
        return split(read(data.train, limit=data.max_rows, **options), data.eval, data.split_seed)[1]
    return None if data.eval is None else read(data.eval, **options)


def load_model(
    spec: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    base: str | None = None,
    quantize: str = "auto",
    allow_base_mismatch: bool = False,
) -> Base | AdaptedModel:
    """The model that ``spec`` stands for: a run folder, an adapter folder, or a base.

    An adapter is put on its base as that was when it was trained: in the same codes, with the same weights left out.

    Args:
        spec: a run folder (its adapter over its base), a folder with an ``adapter_config.json``, or a base.
        dtype: of the base; "auto" is the run's own choice where ``spec`` is a run.
        device: where to put it.
        base: the base to put an adapter on, where it is not the one recorded (it has moved, for example).
        quantize: how to store the base: none, nf4, fp4 or int8; "auto" is as it was trained over.
        allow_base_mismatch: put the adapter on a base with other weights than those it was trained on.

    Returns:
        An ``AdaptedModel`` with the adapter active, or a ``Base``.

    Raises:
        UsageError: the folder is neither a run, nor an adapter, nor a model; the run is not finished; it is a
            classifier (:func:`load_classifier`).
        AdapterError: the adapter is missing or does not fit; the base has other weights (both hashes are named).
        ModelError: the base cannot be loaded.
    """
    path = Path(spec).expanduser()
    if is_classifier(path):
        fix = f'veneer generate {spec} "TEXT" and veneer eval {spec}, or load_classifier in Python'
        raise UsageError(f"'{spec}' is a classifier: it names classes and writes no text", where=str(path), fix=fix)
    if is_run(path):
        run = open_run(path)
        _require_adapter(run)
        chosen = dtype if dtype != "auto" else run.recipe.dtype
        name, revision = base or run.recipe.base, None if base else run.recipe.revision
        return _adapted(run.folder.adapter, name, revision, chosen, device, quantize, allow_base_mismatch)
    if (path / "adapter_config.json").is_file():
        name, revision = (base, None) if base else recorded_base(path)
        return _adapted(path, name, revision, dtype, device, quantize, allow_base_mismatch)
    if base is not None:
        fix = "leave the base out, or give the folder of an adapter"
        raise UsageError(f"'{spec}' is no adapter that could be put on '{base}'", where=str(path), fix=fix)
    _refuse_other_folder(path, str(spec))
    from veneer.models import load_base

    return load_base(str(spec), dtype=dtype, device=device, quantize=None if quantize == "auto" else quantize)


def is_classifier(spec: str | Path) -> bool:
    """Whether a run, an adapter folder or a model's folder holds a classifier."""
    path = Path(spec).expanduser()
    if is_run(path) and (path / "recipe.yaml").is_file():
        return open_run(path).recipe.is_classification
    try:
        if (path / "adapter_config.json").is_file():
            return _read_object(path / "adapter_config.json").get("task_type") == "SEQ_CLS"
        return bool(_own_labels(path))
    except AdapterError:
        return False  # whoever loads it says what is wrong with the file


def load_classifier(
    spec: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    base: str | None = None,
    allow_base_mismatch: bool = False,
) -> Base | AdaptedModel:
    """The classifier that a run, an adapter's folder or a model's stands for; its base names the classes, ``labels``.

    An adapter of another program, which does not say the names, gets ``LABEL_0``, ``LABEL_1``, ...

    Args:
        spec, dtype, device, base, allow_base_mismatch: as for :func:`load_model`.

    Raises:
        UsageError: it is no classifier, or the run is not finished.
        AdapterError, ModelError: as :func:`load_model`.
    """
    path = Path(spec).expanduser()
    if not is_classifier(path):
        fix = "give a run of task: classification, or an adapter whose task_type is SEQ_CLS"
        raise UsageError(f"'{spec}' is no classifier", where=str(path), fix=fix)
    if not is_run(path) and (labels := _own_labels(path)):
        if base is not None:
            raise UsageError(
                f"'{spec}' is no adapter that could be put on '{base}'", where=str(path), fix="leave it out"
            )
        from veneer.models import load_base

        return load_base(path, dtype=dtype, device=device, labels=labels)
    revision = None
    if is_run(path):
        run = open_run(path)
        _require_adapter(run)
        path = run.folder.adapter
        dtype = dtype if dtype != "auto" else run.recipe.dtype
        base, revision = (base, None) if base else (run.recipe.base, run.recipe.revision)
    if base is None:
        base, revision = recorded_base(path)
    labels = classifier_notes(spec)["labels"] or [f"LABEL_{index}" for index in range(_classes_in(path))]
    return _adapted(path, base, revision, dtype, device, "none", allow_base_mismatch, labels)


def _own_labels(folder: Path) -> list[str]:
    """The classes of a model's folder, a classifier's, in the order of its logits; none for any other folder."""
    config = _read_object(folder / "config.json")
    names = config.get("id2label")
    is_classifier = str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
    if not is_classifier or not isinstance(names, dict):
        return []
    return [str(names[key]) for key in sorted(names, key=int)]


def classifier_notes(spec: str | Path) -> dict[str, Any]:
    """What a classifier's adapter says of itself: ``labels`` in their order, the training rows' most frequent one as
    ``majority``, and whether they were ``pairs`` of texts; None for what another program did not write down.
    """
    path = Path(spec).expanduser()
    record = _read_object((RunFolder(path).adapter if is_run(path) else path) / "veneer.json")
    return {key: record.get(key) for key in ("labels", "majority", "pairs")}


def _classes_in(adapter: Path) -> int:
    """How many classes the head in an adapter's file has: the output layer is the narrowest of its whole matrices."""
    from veneer.adapters.save import read_adapter

    rows = [t.shape[0] for key, t in read_adapter(adapter)[1].items() if t.ndim == 2 and ".lora_" not in key]
    if not rows:
        fix = "save it again with the head in modules_to_save"
        raise AdapterError("the adapter holds no classification head", where=str(adapter), fix=fix)
    return min(rows)


def recorded_base(adapter: Path) -> tuple[str, str | None]:
    """Name and revision of the base that an adapter folder was trained on, by ``veneer.json`` or PEFT's own entry.

    Raises:
        AdapterError: neither names one.
    """
    ours = _read_object(adapter / "veneer.json").get("base")
    if isinstance(ours, dict) and ours.get("name"):
        return str(ours["name"]), ours.get("revision")
    config = _read_object(adapter / "adapter_config.json")
    if config.get("base_model_name_or_path"):
        return str(config["base_model_name_or_path"]), config.get("revision")
    raise AdapterError(
        "the adapter does not say which base it belongs to", where=str(adapter), fix="name it with --base"
    )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path.name} is broken: {error}", where=str(path), fix="save the adapter again") from error
    return values if isinstance(values, dict) else {}


def _require_adapter(run: Run) -> None:
    if not run.finished:
        resume = f"go on with  veneer train {run.folder.recipe_path} --resume"
        how = {
            "running": "is not finished: it is still training, or was killed",
            "interrupted": "was interrupted before its end",
            "failed": f"failed: {run.info.get('error') or 'its last message says why'}",
        }.get(str(run.info.get("status")), f"has the unknown status '{run.info.get('status')}'")
        raise UsageError(f"the run {how}", where=str(run.path), fix=resume)
    missing = [
        name
        for name in ("adapter_config.json", "adapter_model.safetensors")
        if not (run.folder.adapter / name).is_file()
    ]
    if missing:
        fix = "train again, or give another run"
        raise AdapterError(f"the run's adapter lacks {' and '.join(missing)}", where=str(run.folder.adapter), fix=fix)


def _adapted(
    adapter: Path,
    base: str,
    revision: str | None,
    dtype: str,
    device: str,
    quantize: str,
    allow_base_mismatch: bool,
    labels: Sequence[str] | None = None,
) -> AdaptedModel:
    from veneer.adapters import load_adapter
    from veneer.adapters.save import recorded_precision
    from veneer.models import load_base

    stored: dict[str, Any] = {"quantize": quantize}
    if quantize == "auto":
        trained = recorded_precision(adapter)
        stored = {} if trained is None else {"quantize": trained.config, "skip": trained.skip}
    try:
        loaded = load_base(base, revision=revision, dtype=dtype, device=device, labels=labels, **stored)
    except ModelError as error:
        what = f"the base of this adapter cannot be loaded: {error.what}"
        fix = " / ".join(part for part in (error.fix, "or say where it is with --base") if part)
        raise ModelError(what, where=error.where or str(adapter), fix=fix) from error
    return load_adapter(loaded, adapter, allow_base_mismatch=allow_base_mismatch)


def _refuse_other_folder(path: Path, spec: str) -> None:
    """A folder that is none of the three gets its own message, before anything looks for it on a hub."""
    if not path.exists():
        beside = "/" in spec and path.parent.is_dir()  # runs/tikets where runs/ is there: a slip, not a hub id
        if beside and path.suffix != ".gguf":
            raise _no_run(path)
        return
    if not path.is_dir() or (path / "config.json").is_file() or any(path.glob("*.gguf")):
        return
    if any(path.glob("*.safetensors")) and not (path / "recipe.yaml").exists():
        return  # a model without its config: load_base says what is missing
    raise _no_run(path)


def _no_run(path: Path) -> VeneerError:
    where = str(path.absolute())
    if not path.exists():
        near = [p.name for p in path.parent.glob("*") if is_run(p)] if path.parent.is_dir() else []
        fix = did_you_mean(path.name, near) or "give the folder that veneer train wrote"
        return UsageError(f"no folder '{path}'", where=where, fix=fix)
    if (path / "recipe.yaml").is_file():
        return UsageError(
            "this run has no run.json: training never began here",
            where=where,
            fix=f"veneer train {path / 'recipe.yaml'}",
        )
    runs = sorted(str(p) for p in path.iterdir() if is_run(p)) if path.is_dir() else []
    fix = f"did you mean {runs[-1]}?" if runs else "give a run folder, an adapter folder, or a base model"
    return UsageError(f"'{path}' is not a run folder, nor an adapter or a model", where=where, fix=fix)
