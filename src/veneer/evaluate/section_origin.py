"""The report's data, recipe and provenance: where the adapter came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from veneer.evaluate.markup import Html, clean_html, duration, esc, join, section, tag, yaml_html
from veneer.evaluate.record import RunRecord


def mask_example(record: RunRecord) -> Html:
    """One training row with its trained tokens coloured, as the trainer rendered it."""
    html = record.info.get("mask_example_html")
    if not isinstance(html, str) or not html.strip():
        return Html("")
    return section(
        "What was trained on",
        tag("div", clean_html(html), class_="mask"),
        intro="One training row under the model’s chat template. The loss is taken on the coloured tokens alone.",
    )


_DATA_LABELS = {
    "source": "source",
    "description": "read as",
    "rows": "rows",
    "examples": "examples",
    "tokens": "tokens",
    "total_tokens": "tokens",
    "trained_tokens": "trained tokens",
    "truncated_rows": "truncated rows",
    "truncated_tokens": "tokens cut off",
    "truncated_trained_tokens": "of them trained",
    "split_rows": "rows split by the template",
    "empty_turns": "empty turns",
    "dropped": "dropped rows",
    "content_hash": "content hash",
    "files": "files",
}
_HIDDEN_AT_ZERO = {"truncated_trained_tokens", "split_rows", "empty_turns"}  # rare, and of interest only then
_ELSEWHERE = {"warnings"}


def data_summary(record: RunRecord) -> Html:
    """The data in numbers, one column per split."""
    data = record.section("data")
    names = sorted(data, key=lambda name: (name != "train", name))
    splits = {name: data[name] for name in names if isinstance(data[name], dict)}
    if not splits:
        return Html("")
    flat = {name: _flat_data(value) for name, value in splits.items()}
    keys = dict.fromkeys([*(k for k in _DATA_LABELS if any(k in v for v in flat.values()))])
    keys |= dict.fromkeys(key for value in flat.values() for key in value)
    titles = {"train": "training", "eval": "held-out"}
    head = tag("tr", tag("th"), *[tag("th", titles.get(name, name), scope="col") for name in flat])
    rows = []
    for key in keys:
        if key in _ELSEWHERE or (key in _HIDDEN_AT_ZERO and not any(value.get(key) for value in flat.values())):
            continue
        cells = [_data_cell(key, value) for value in flat.values()]
        if any(cells):
            title = _DATA_LABELS.get(key, key.replace("_", " "))
            rows.append(tag("tr", tag("th", title, scope="row"), *[tag("td", cell) for cell in cells]))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="facts")
    return section("Data", _warnings(record, list(flat.values())), table)


def _warnings(record: RunRecord, splits: list[dict[str, Any]]) -> Html | None:
    """What the run warned of, each sentence once."""
    told = [record.info.get("warnings"), *(split.get("warnings") for split in splits)]
    texts = dict.fromkeys(str(text) for part in told if isinstance(part, list) for text in part)
    return tag("ul", *[tag("li", text) for text in texts], class_="notice") if texts else None


def _flat_data(value: Mapping[str, Any]) -> dict[str, Any]:
    """``stats`` stand beside the rest."""
    stats = value.get("stats")
    return {**{k: v for k, v in value.items() if k != "stats"}, **(stats if isinstance(stats, dict) else {})}


def _data_cell(key: str, value: Mapping[str, Any]) -> Html:
    item = value.get(key)
    if item is None or item in ({}, []):
        return esc("none") if key == "dropped" and item is not None else Html("")
    if key == "dropped" and isinstance(item, dict):
        parts = [f"{len(ids) if isinstance(ids, list) else ids:,} {reason}" for reason, ids in item.items()]
        return join(parts, "; ")
    if key == "trained_tokens":
        total = value.get("tokens", value.get("total_tokens"))
        share = f" ({100 * item / total:.1f} % of all)" if total else ""
        return esc(f"{item:,}{share}")
    if key == "files" and isinstance(item, dict):
        return join(tag("div", name, " ", tag("code", digest)) for name, digest in item.items())
    return esc(f"{item:,}") if type(item) is int else _value(item)


def recipe(record: RunRecord) -> Html:
    """The resolved recipe."""
    if not record.recipe.strip():
        return Html("")
    return section(
        "Recipe",
        tag("pre", yaml_html(record.recipe), class_="yaml"),
        intro="As it was resolved, defaults included: the same file trains the same adapter again.",
    )


def provenance(record: RunRecord) -> Html:
    """Where everything came from, and what it ran on."""
    info = record.info
    pairs: list[tuple[str, Html]] = []
    base = record.section("base")
    first = ("name", "revision", "weight_hash", "tokenizer_hash", "template_hash")
    ordered = [*(key for key in first if key in base), *(key for key in base if key not in first)]
    pairs += [("base" if key == "name" else key.replace("_", " "), _value(base[key])) for key in ordered]
    for key in ("seed", "status", "started", "finished", "processes"):
        if key in info:
            pairs.append((key, _value(info[key])))
    versions = (tag("span", f"{key} {value}", class_="nowrap") for key, value in record.section("versions").items())
    pairs.append(("versions", join(versions, ", ")))
    for key, value in record.section("hardware").items():
        gigabytes = key.endswith("_gb") and isinstance(value, int | float)
        shown = esc(f"{value:,.1f} GB") if gigabytes else _value(value)
        pairs.append((key.removesuffix("_gb").replace("_", " "), shown))
    for name, evaluation in record.evaluations.items():
        told = f"eval/{name}.json: {len(evaluation.rows):,} rows"
        if evaluation.seconds:
            told += f" in {duration(evaluation.seconds)}"
        pairs.append(("evaluation", join([told, tag("code", evaluation.data_hash)], " ")))
    items = [tag("div", tag("dt", key), tag("dd", value)) for key, value in pairs if value]
    coverage = info.get("coverage")
    table = tag("pre", coverage, class_="coverage") if isinstance(coverage, str) and coverage.strip() else None
    heading = tag("h3", "What the adapter covers") if table else None
    return section("Provenance", tag("dl", *items, class_="provenance") if items else None, heading, table)


def footer(record: RunRecord) -> Html:
    """Who wrote the page, and what it does not show."""
    version = record.section("versions").get("veneer")
    lines = ["Written by Veneer" + (f" {version}" if version else "") + " from the files of the run folder."]
    if record.not_shown:
        lines.append("Not shown, because they are no evaluations: " + ", ".join(record.not_shown) + ".")
    return tag("footer", *[tag("p", line) for line in lines])


def _value(value: Any) -> Html:
    if value is None:
        return Html("")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return tag("code", json.dumps(value, ensure_ascii=False, default=str))
    if isinstance(value, int | float):
        return esc(f"{value:,}" if abs(value) >= 10_000 else f"{value:g}" if isinstance(value, float) else str(value))
    return tag("code", value) if _is_hash(value) else esc(value)


def _is_hash(value: str) -> bool:
    return len(value) >= 16 and all(c in "0123456789abcdef:" for c in value.lower().removeprefix("sha256"))
