"""The quality report on a data file: what is in it, and what would go wrong in training. Without a tokenizer it takes
a second.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from veneer.data.conversation import Conversation, Rows
from veneer.errors import EXIT_FAILED

PERCENTILES = (50, 90, 95, 99, 100)
_LENGTHS = (512, 1024, 2048, 4096)
_EXAMPLES = 5
_ORDERED_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Problem:
    """Something found in the rows: an error would stop or spoil training, a warning is worth a look."""

    severity: Literal["error", "warning"]
    code: str
    message: str
    count: int
    row_ids: list[str]  # the first few

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.row_ids) else ""
        places = f" ({', '.join(self.row_ids)}{more})" if self.row_ids else ""
        return f"{self.severity}: {self.message}{places}"


@dataclass
class CheckReport:
    """What :func:`check` found. ``tokens`` is None where no tokenizer was given."""

    description: str
    format: str
    rows: int
    messages: dict[str, int]  # role -> count
    turns: dict[str, float]  # fewest, most and mean messages per row
    characters: dict[str, float]
    tools_rows: int
    exact_duplicates: int
    same_prompt_rows: int
    tokens: dict[str, Any] | None = None
    overlap: dict[str, int] | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        """The problems that would stop or spoil training."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def exit_status(self) -> int:
        """0 where there is no error, else 1."""
        return EXIT_FAILED if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**dataclasses.asdict(self), "exit_status": self.exit_status}

    def __str__(self) -> str:
        roles = ", ".join(f"{role} {count:,}" for role, count in self.messages.items())
        lines = [self.description]
        if self.messages:
            lines.append(
                f"messages: {roles}; per row {self.turns['fewest']:.0f} to {self.turns['most']:.0f}, "
                f"mean {self.turns['mean']:.1f}"
            )
        if self.tools_rows:
            lines.append(f"rows with tools: {self.tools_rows:,}")
        lines.append(
            f"exact duplicates: {self.exact_duplicates:,}; rows that share their prompt: {self.same_prompt_rows:,}"
        )
        if self.overlap is not None:
            lines.append(
                f"evaluation rows also in training: {self.overlap['exact']:,} exactly, "
                f"{self.overlap['same_prompt']:,} by prompt"
            )
        if self.tokens is not None:
            lines.extend(_token_lines(self.tokens))
        lines.extend(str(problem) for problem in self.problems)
        if not self.problems:
            lines.append("no problems found")
        return "\n".join(lines)


def check(
    rows: Rows,
    tokenizer: Any = None,
    max_length: int | None = None,
    eval_rows: Rows | None = None,
    *,
    train_on: Literal["all", "last", "prompt-too"] = "all",
    chat_template: str | Path | None = None,
) -> CheckReport:
    """Counts, roles, empty turns, duplicates and overlap; with a tokenizer also masks, stop tokens and lengths.

    Args:
        rows: the training rows.
        tokenizer: a transformers tokenizer; None for the checks that need none.
        max_length: the length that training would cut at, to say what is lost.
        eval_rows: held-out rows, to look for in the training rows.
        train_on, chat_template: as for :func:`veneer.data.render`.
    Raises:
        UsageError: a ``max_length`` below 1.
        DataError: the tokenizer or the template cannot be used at all.
    """
    conversations = rows.conversations
    digests = Counter(row.digest for row in conversations)
    groups = Counter(row.group for row in conversations)
    report = CheckReport(
        description=rows.description,
        format=rows.format,
        rows=len(rows),
        messages=dict(Counter(message.role for row in conversations for message in row.messages).most_common()),
        turns=_spread([len(row.messages) for row in conversations if row.messages]),
        characters=_spread([_characters(row) for row in conversations]),
        tools_rows=sum(bool(row.tools) for row in conversations),
        exact_duplicates=len(conversations) - len(digests),
        same_prompt_rows=sum(count for count in groups.values() if count > 1),
    )
    report.problems.extend(_row_problems(conversations))
    first = {row.digest: row.row_id for row in reversed(conversations)}
    again = [row.row_id for row in conversations if first[row.digest] != row.row_id]
    _add(report.problems, "warning", "duplicate", "{} repeating an earlier one word for word", again)
    if eval_rows is not None:
        _overlap(report, eval_rows, digests, groups)
    if tokenizer is not None:
        _tokens(report, conversations, tokenizer, max_length, train_on, chat_template)
    report.problems.sort(key=lambda problem: (problem.severity != "error", -problem.count))
    return report


def _row_problems(conversations: Sequence[Conversation]) -> list[Problem]:
    found: dict[str, list[str]] = {}
    for row in conversations:
        for code in _codes(row):
            found.setdefault(code, []).append(row.row_id)
    problems: list[Problem] = []
    for code, (severity, message) in _ROW_CHECKS.items():
        _add(problems, severity, code, message, found.get(code, []))
    return problems


_ROW_CHECKS: dict[str, tuple[Literal["error", "warning"], str]] = {
    "no_assistant": ("error", "{} without an assistant turn: nothing to train on"),
    "empty_text": ("error", "{} of raw text without any text"),
    "nothing_said": ("error", "{} whose assistant turns are all empty: nothing to train on"),
    "empty_answer": ("warning", "{} with an empty assistant turn among others"),
    "empty_prompt": ("warning", "{} with an empty user turn"),
    "same_role_twice": ("warning", "{} with two user or two assistant turns in a row: some templates refuse them"),
    "late_system": ("warning", "{} with a system turn that is not the first: most templates refuse or move it"),
    "ends_unanswered": ("warning", "{} ending with a turn that the assistant does not answer"),
}


def _codes(row: Conversation) -> list[str]:
    """The checks of ``_ROW_CHECKS`` that this row fails."""
    if row.text is not None:
        return [] if row.text.strip() else ["empty_text"]
    codes = []
    roles = [message.role for message in row.messages]
    answers = [message for message in row.messages if message.role == "assistant"]
    empty = [message for message in answers if message.is_empty]
    if not answers:
        codes.append("no_assistant")
    elif len(empty) == len(answers):
        codes.append("nothing_said")
    elif empty:
        codes.append("empty_answer")
    if any(message.role == "user" and not message.content.strip() for message in row.messages):
        codes.append("empty_prompt")
    if any(a == b and a in _ORDERED_ROLES for a, b in itertools.pairwise(roles)):
        codes.append("same_role_twice")
    if "system" in roles[1:]:
        codes.append("late_system")
    if answers and roles[-1] != "assistant":
        codes.append("ends_unanswered")
    return codes


def _overlap(report: CheckReport, eval_rows: Rows, digests: Counter[str], groups: Counter[str]) -> None:
    exact = [row.row_id for row in eval_rows.conversations if row.digest in digests]
    prompts = [row.row_id for row in eval_rows.conversations if row.group in groups and row.digest not in digests]
    report.overlap = {"rows": len(eval_rows), "exact": len(exact), "same_prompt": len(exact) + len(prompts)}
    _add(
        report.problems, "error", "eval_in_train", "{} of the evaluation data found in the training data as well", exact
    )
    _add(
        report.problems,
        "warning",
        "eval_prompt_in_train",
        "{} of the evaluation data with a prompt that the training data answers too",
        prompts,
    )


def _tokens(
    report: CheckReport,
    conversations: Sequence[Conversation],
    tokenizer: Any,
    max_length: int | None,
    train_on: Literal["all", "last", "prompt-too"],
    chat_template: str | Path | None,
) -> None:
    """Renders every row, and reports lengths, refusals, rows without labels and answers without their stop token."""
    import numpy as np

    from veneer.data.prompts import stop_token_ids
    from veneer.data.render import Renderer, check_options
    from veneer.data.spans import runs_together

    check_options(max_length, train_on, "truncate")
    renderer = Renderer(tokenizer, train_on, chat_template)
    stops = np.array(sorted(stop_token_ids(tokenizer, chat_template)))
    refused: dict[str, list[str]] = {}
    fixes: dict[str, str] = {}
    unlabelled, control, unstopped, split_rows = [], [], [], 0
    lengths: list[int] = []
    trained: list[int] = []
    last_trained: list[int] = []
    for result in renderer.results(conversations):
        if result.refused is not None:
            refused.setdefault(result.refused.reason, []).append(result.row_id)
            fixes[result.refused.reason] = result.refused.fix
            continue
        if not result.examples:
            unlabelled.append(result.row_id)
        if result.control_tokens:
            control.append(result.row_id)
        split_rows += len(result.examples) > 1
        for example in result.examples:
            places = np.flatnonzero(example.trained)
            lengths.append(len(example))
            trained.append(len(places))
            last_trained.append(int(places[0]))
            if not np.isin(example.input_ids[places], stops).any():
                unstopped.append(result.row_id)
    for reason, ids in refused.items():
        _add(report.problems, "error", "refused", f"{{}} cannot be masked exactly: {reason}; {fixes[reason]}", ids)
    _add(report.problems, "error", "no_labels", "{} with nothing to train on", unlabelled)
    _add(
        report.problems,
        "error",
        "no_stop",
        "{} with no stop token in the trained part: the model would not learn to end",
        unstopped,
    )
    _add(report.problems, "warning", "control_tokens", "{} with control tokens of the tokenizer in the text", control)
    if renderer.template is None:
        glued = [row.row_id for row in conversations if runs_together(row)]
        message = "{} with no white space between prompt and completion: without a chat template they run together"
        _add(report.problems, "warning", "glued", message, glued)
    report.tokens = _token_report(lengths, trained, max_length)
    report.tokens["split_rows"] = split_rows
    if max_length is not None and lengths:
        lost = sum(first >= max_length for first in last_trained)
        report.tokens["max_length_rows_without_labels"] = lost
        cut = report.tokens["cut"][str(max_length)]
        if cut["rows"]:
            message = (
                f"{_rows(cut['rows'])} longer than max_length {max_length}: "
                f"{cut['tokens']:,} tokens would be cut ({cut['share']:.1%})"
            )
            report.problems.append(Problem("warning", "overlong", message, cut["rows"], []))
        if lost:
            message = f"{_rows(lost)} would lose the whole answer to max_length {max_length}"
            report.problems.append(Problem("error", "answer_cut_away", message, lost, []))


def _token_report(lengths: list[int], trained: list[int], max_length: int | None) -> dict[str, Any]:
    import numpy as np

    if not lengths:
        return {"examples": 0, "total": 0, "trained": 0, "percentiles": {}, "trained_percentiles": {}, "cut": {}}
    array = np.array(lengths)
    total = int(array.sum())
    cuts = {}
    for limit in sorted({*_LENGTHS, *([max_length] if max_length else [])}):
        lost = int(np.maximum(array - limit, 0).sum())
        cuts[str(limit)] = {"rows": int((array > limit).sum()), "tokens": lost, "share": lost / total}
    return {
        "examples": len(lengths),
        "total": total,
        "trained": sum(trained),
        # "higher" gives a length that a row really has, not a mean of two.
        "percentiles": {str(p): int(np.percentile(array, p, method="higher")) for p in PERCENTILES},
        "trained_percentiles": {str(p): int(np.percentile(trained, p, method="higher")) for p in PERCENTILES},
        "cut": cuts,
    }


def _token_lines(tokens: dict[str, Any]) -> list[str]:
    if not tokens["examples"]:
        return ["tokens: none could be rendered"]
    said = ", ".join(f"{'longest' if p == '100' else p + '%'} {value:,}" for p, value in tokens["percentiles"].items())
    lines = [
        f"tokens: {tokens['total']:,} in {tokens['examples']:,} examples, {tokens['trained']:,} trained "
        f"({tokens['trained'] / tokens['total']:.0%})",
        f"tokens per example: {said}",
    ]
    for limit, cut in tokens["cut"].items():
        lines.append(
            f"max_length {limit} would cut {_rows(cut['rows'])} and {cut['tokens']:,} tokens ({cut['share']:.1%})"
        )
    return lines


def _add(
    problems: list[Problem], severity: Literal["error", "warning"], code: str, message: str, row_ids: list[str]
) -> None:
    if row_ids:
        problems.append(Problem(severity, code, message.format(_rows(len(row_ids))), len(row_ids), row_ids[:_EXAMPLES]))


def _characters(row: Conversation) -> int:
    return len(row.text) if row.text is not None else sum(len(message.content) for message in row.messages)


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {"fewest": 0, "most": 0, "mean": 0.0}
    return {"fewest": min(values), "most": max(values), "mean": sum(values) / len(values)}


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
