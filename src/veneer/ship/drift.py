"""What a merge is measured on, and how far the merged model is from the unmerged one there.

Several models are compared with one, and no two of them need memory at the same time: the logits of the unmerged model
are kept (whole: a KL divergence needs the tail of the vocabulary too), at no more positions than :data:`POSITIONS` and
:data:`BYTES` allow.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.adapters import MergeReport
from veneer.adapters.merge import compare_logits
from veneer.data import Conversation, render
from veneer.data.conversation import Rows
from veneer.data.label_batch import LabelledBatch, labelled_batches
from veneer.data.label_render import render_labelled
from veneer.data.labelled import LabelledRow
from veneer.errors import VeneerError
from veneer.models import Base
from veneer.models.classifier import class_logits, longest_row, pad_id_of_classifier
from veneer.run import Run, held_out_rows

POSITIONS = 2000
BYTES = 1 << 30  # of the logits that are kept, in float32
_BATCH = 16  # labelled rows at once

# Where there are no held-out rows: plain sentences, questions, numbers, code and another language.
PROBES = (
    "The committee will meet on Thursday at half past nine to discuss the budget for the coming year.",
    "What is the difference between a violin and a viola, and which of the two is tuned lower?",
    "If 3 boxes hold 12 apples each and 5 apples are eaten, 31 apples are left.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    '{"name": "Ada", "born": "1815-12-10", "languages": ["English", "French"]}',
    "Bitte senden Sie mir die Rechnung bis zum 3. März an die neue Adresse.",
)


class Row(Protocol):
    """What models are compared on at once: n places, over V tokens or classes."""

    @property
    def targets(self) -> Tensor | None: ...  # [n] int64: what is right there, where a perplexity is to be told

    def logits(self, module: nn.Module) -> Tensor:
        """``[n, V]`` in float32."""


@dataclass(frozen=True)
class TextRow:
    """A text of T tokens, and the n positions in it that are compared.

    It is run alone: no padding, and no mask that could differ between two models.
    """

    input_ids: Tensor  # [1, T] int64
    positions: Tensor  # [n] int64
    targets: Tensor  # [n] int64, the token after each position

    @torch.no_grad()
    def logits(self, module: nn.Module) -> Tensor:
        device = next(module.parameters()).device
        positions = self.positions.to(device)
        # Most models compute only the logits that they are asked for; of a long text the others would not fit.
        chooses = "logits_to_keep" in inspect.signature(module.forward).parameters
        options: dict[str, Any] = {"logits_to_keep": positions} if chooses else {}
        output: Any = module(input_ids=self.input_ids.to(device), use_cache=False, **options)
        logits: Tensor = output.logits[0] if chooses else output.logits[0, positions]
        return logits.float()


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of which a classifier is asked, n at a time."""

    batch: LabelledBatch
    targets: None = None

    @torch.no_grad()
    def logits(self, module: nn.Module) -> Tensor:
        return class_logits(module, self.batch)


@dataclass(frozen=True)
class Probe:
    """The rows that models are compared on."""

    rows: Sequence[Row]
    description: str  # where they come from, for people


def probe_of(base: Base, run: Run | None) -> Probe:
    """The answers of a run's own held-out rows, as ``veneer eval`` takes them for the perplexity, else built-in texts.

    A classifier is asked for the classes of those rows, or of the texts.

    A run can be merged when its data are gone: the description then says why they were not used.
    """
    config: Any = base.module.config
    most = max(1, min(POSITIONS, BYTES // (4 * config.get_text_config().vocab_size)))
    why = ""
    if run is not None and run.recipe.data.eval is not None:
        try:
            return _held_out_classes(base, run) if base.labels else _held_out(base, run, most)
        except VeneerError as error:
            reason = f"{error.what}, {error.where}" if error.where else error.what
            why = f" (the run's held-out rows cannot be used: {reason})"
    if base.labels:
        texts = [LabelledRow((), f"text {n}", text=text, kind="text") for n, text in enumerate(PROBES, 1)]
        return Probe(
            _labelled(base, Rows([*texts], "labelled", "texts", "texts")), f"{len(PROBES)} built-in texts{why}"
        )
    longest = _context_length(base)
    ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in PROBES]
    return Probe([_row(text, range(len(text) - 1)) for text in ids], f"{len(PROBES)} built-in texts{why}")


def logits_of(module: nn.Module, probe: Probe) -> list[Tensor]:
    """For each row its logits ``[n, V]`` in float32 on the CPU."""
    return [row.logits(module).cpu() for row in probe.rows]


def drift(kept: list[Tensor], module: nn.Module, probe: Probe) -> MergeReport:
    """How far ``module`` is from the model whose logits were kept."""
    pairs = ((before, row.logits(module), row.targets) for before, row in zip(kept, probe.rows))
    return compare_logits(pairs, next(module.parameters()).dtype)


def _held_out(base: Base, run: Run, most: int) -> Probe:
    rows = held_out_rows(run.recipe.data)
    assert rows is not None  # probe_of has seen that some are held out
    everything = rows.conversations
    picked = random.Random(0).sample(everything, min(len(everything), most))  # files are often sorted by topic
    dataset = render(
        [_plain_turns(row) for row in picked],
        base.tokenizer,
        max_length=_context_length(base),
        train_on="last",
        overlong="drop",
        chat_template=run.recipe.data.chat_template,
    )
    found: list[TextRow] = []
    for example in dataset:
        trained = example.trained.nonzero()[0][:most] - 1  # token t is predicted at position t - 1
        found.append(_row(example.input_ids.tolist(), trained.tolist()))
        most -= len(trained)
        if most <= 0:
            break
    return Probe(found, f"the answers of {_of_all(len(found), rows, run)}")


def _held_out_classes(base: Base, run: Run) -> Probe:
    rows = held_out_rows(run.recipe.data)
    assert rows is not None  # as above
    picked = random.Random(0).sample(range(len(rows)), min(len(rows), POSITIONS))
    found = _labelled(base, rows.subset(sorted(picked), rows.description), run.recipe.train.max_length)
    return Probe(found, _of_all(sum(len(texts.batch.classes) for texts in found), rows, run))


def _labelled(base: Base, rows: Rows, max_length: int | None = None) -> list[LabelledTexts]:
    limits = [limit for limit in (max_length, longest_row(base.module)) if limit is not None]
    pad_id = pad_id_of_classifier(base.module)
    dataset = render_labelled(rows, base.tokenizer, base.labels, max_length=min(limits, default=None), pad_id=pad_id)
    return [LabelledTexts(batch) for batch in labelled_batches(dataset, range(len(dataset)), _BATCH, pad_id)]


def _of_all(found: int, rows: Rows, run: Run) -> str:
    recorded = (run.info.get("data", {}).get("eval") or {}).get("content_hash")
    changed = " (its data have changed since the run)" if recorded not in (None, rows.content_hash) else ""
    some = "" if found == len(rows) else f"{found} of "
    return f"{some}the run's {len(rows)} held-out rows{changed}"


def _plain_turns(row: Conversation) -> Conversation:
    """The row without its turns' own ``train`` flags: it is always the last answer that counts."""
    return dataclasses.replace(row, messages=tuple(dataclasses.replace(turn, train=None) for turn in row.messages))


def _context_length(base: Base) -> int | None:
    config: Any = base.module.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _row(ids: list[int], positions: Any) -> TextRow:
    chosen, text = torch.tensor(list(positions)), torch.tensor(ids)
    return TextRow(text[None], chosen, text[chosen + 1])
