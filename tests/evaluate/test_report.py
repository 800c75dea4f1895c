"""The report: one page from a run folder, whatever is in it or missing, and nothing in it that runs or fetches."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import DataError, UsageError
from veneer.evaluate import Evaluation, MetricResult, RowResult, write_report
from veneer.evaluate.charts import MAX_POINTS, Series, line_chart, nice_ticks, number, smoothed, thinned
from veneer.evaluate.markup import clean_html, esc, marked, plain, tag
from veneer.evaluate.metrics import METRICS
from veneer.evaluate.section_answers import shared_opening
from veneer.recipe import METRICS as RECIPE_METRICS

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\x1b[31m\u202e"
UP = MetricResult(0.9, 0.85, 0.95, 0.1, 0.8, 0.72, 0.87, 0.05, 0.15, rows=4)


def lines_of(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")


def a_run(folder: Path, text: str = "plain") -> Path:
    """A whole run with ``text`` in every place that a person or a model can fill."""
    (folder / "eval").mkdir(parents=True)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 1_500_000)
    wrong, right = {"exact_match": 0.0}, {"exact_match": 1.0}
    near = ("one two three four", "one two 3 four")
    rows = [
        RowResult(f"{text}:1", f"p1 {text}", f"r {text}", f"a {text}", f"b {text}", right, wrong),
        RowResult(f"{text}:2", f"p2 {text}", *near, "x", wrong, wrong, "stop", "length"),
        RowResult(f"{text}:3", f"p3 {text}", "r", "wrong", "r", wrong, right),
        RowResult(f"{text}:4", f"p4 {text}", "r", "r", "r", right, right),
    ]
    metrics = {"exact_match": UP, "json_fields": UP, f"json_fields.{text}": UP}
    found = Evaluation(metrics, rows, text, {"name": text}, text, "ab" * 32, 64, 0.95, 10_000, 0, 12.0)
    found.save(folder / "eval" / "held_out.json")
    for step, answer in ((10, "first"), (20, "second")):
        sample = {"row_id": f"{text}:1", "prompt": text, "reference": text, "prediction": f"{answer} {text}"}
        (folder / "eval" / f"step-{step:06d}.json").write_text(
            json.dumps({"step": step, "metrics": {}, "samples": [sample]}), encoding="utf-8"
        )
    steps = [
        {"step": n, "epoch": n / 10, "loss": 2 / n, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 900.0}
        for n in range(1, 21)
    ]
    held = [{"step": n, "eval_loss": 2 / (n + 1), "eval_exact_match": n / 20} for n in (0, 10, 20)]
    lines_of(folder, steps + held)
    (folder / "recipe.yaml").write_text(f"# {text}\nbase: {text}\ntrain:\n  seed: 0\n", encoding="utf-8")
    stats = {"tokens": 1000, "trained_tokens": 250, "dropped": {text: 3}}
    info = {
        "base": {"name": text, "weight_hash": "cd" * 32, "revision": None},
        "recipe": {"eval": {"metric_for_best": "exact_match"}},
        "data": {"train": {"source": text, "rows": 1200, "stats": stats}, "eval": None},
        "versions": {"veneer": text},
        "seed": 7,
        "hardware": {"cpu": text},
        "status": "finished",
        "warnings": [text],
        "coverage": text,
        "trainable_parameters": 4_880_000,
        "peak_rss_gb": 1.94,
        "train_seconds": 283.4,
        "tokens_per_second": 1468.2,
        "mask_example_html": f'<figure><pre><span style="background:#b7e4c7">yes {text}</span></pre></figure>',
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Reads a page as a browser would: which elements and attributes it has, and whether all are closed."""

    VOID = ("meta", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"<{self.open[-1]}> is closed by </{tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data.replace("\u00a0", " ")


def test_the_page_tells_the_whole_run(tmp_path: Path) -> None:
    path = write_report(a_run(tmp_path / "demo"))
    page = Page(path)
    assert path == tmp_path / "demo" / "report.html"
    assert page.open == []
    for part in (
        "Exact match on 4 held-out rows rose from 10.0 % to 90.0 % (+80.0 points, 95 % interval +72.0 to +87.0).",
        "4.88 M", "4 min 43 s", "1,468", "1.94 GB", "1.5 MB",
        "Loss per trained token", "lowest 0.095 at step 20", "Learning rate", "Gradient norm", "Tokens per second",
        "Exact match, held-out",
        "1 fixed by the adapter", "1 right before and after", "1 wrong before and after", "1 broken by the adapter",
        "✓ right", "✗ wrong", "cut off: did not stop",
        "step 10", "second plain",
        "yes plain", "250 (25.0 % of all)", "3 plain", "1,200",
        "seed: 0", "cd" * 32, "eval/held_out.json: 4 rows in 12 s",
    ):  # fmt: skip
        assert part in page.text, part
    assert "one two <mark>3</mark> four" in path.read_text(encoding="utf-8")
    assert ("class", "trained") in page.attributes


def test_text_from_rows_answers_and_settings_stays_text(tmp_path: Path) -> None:
    path = write_report(a_run(tmp_path / "run", EVIL))
    page = Page(path)
    assert page.open == []
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert(1)" in page.text  # shown, not run
    source = path.read_text(encoding="utf-8")
    assert "\x00" not in source
    assert "\x1b" not in source


def test_the_folders_own_name_is_escaped_too(tmp_path: Path) -> None:
    page = Page(write_report(a_run(tmp_path / "<b>run & co")))
    assert "b" not in [tag for tag, _ in zip(page.tags, range(12))]
    assert "<b>run & co" in page.text


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    path = write_report(a_run(tmp_path / "run"))
    page = Page(path)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href", "srcset", "action")]
    source = path.read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source
    assert "http://" not in source
    assert "https://" not in source
    assert "default-src 'none'" in source


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run, tmp_path / "again.html").read_bytes()


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl", "recipe.yaml", "eval/held_out.json"])
def test_a_part_that_is_missing_leaves_a_page_without_it(tmp_path: Path, missing: str) -> None:
    run = a_run(tmp_path / "run")
    (run / missing).unlink()
    page = Page(write_report(run))
    assert page.open == []
    assert "None" not in page.text


def test_without_an_evaluation_the_held_out_loss_is_the_verdict_and_the_last_answers_are_shown(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "eval" / "held_out.json").unlink()
    page = Page(write_report(run))
    assert "The held-out loss fell from 2.000 at step 0 to 0.095 at step 20." in page.text
    assert "Held-out rows, at step 20." in page.text


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "Nothing has been measured yet."),
        (
            [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}],
            "went from 2.000 to 1.500; nothing was measured on held",
        ),
        ([{"step": 5, "eval_loss": 1.25}], "The held-out loss is 1.250 at step 5."),
        ([{"step": 0, "eval_loss": 1.0}, {"step": 9, "eval_loss": 1.5}], "did not fall: 1.000 at step 0"),
    ],
)
def test_the_verdict_never_says_more_than_was_measured(
    tmp_path: Path, lines: list[dict[str, Any]], sentence: str
) -> None:
    lines_of(tmp_path, lines)
    assert sentence in Page(write_report(tmp_path)).text


def test_a_run_that_failed_says_so_at_the_top(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(info | {"status": "failed", "error": "the loss is nan"}), encoding="utf-8")
    assert (
        "This run is failed: what follows is what it had reached. It said: the loss is nan."
        in Page(write_report(run)).text
    )


def test_a_resumed_runs_later_lines_count_and_a_torn_last_line_does_not(tmp_path: Path) -> None:
    first = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}]
    lines_of(tmp_path, [*first, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}], tail='{"step": 4, "lo')
    assert "The training loss went from 3.000 to 1.000" in Page(write_report(tmp_path)).text


def test_a_broken_line_in_the_midst_of_the_metrics_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1}\nbroken\n{"step": 2, "loss": 1}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match="cannot be read") as caught:
        write_report(tmp_path)
    assert str(caught.value.where).endswith("metrics.jsonl:2")
    assert not (tmp_path / "report.html").exists()


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path: Path) -> None:
    lines_of(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}])
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert not [path for path in re.findall(r' d="([^"]*)"', source) if "nan" in path or "inf" in path]
    assert "from 2.000 to 1.000" in source


def test_what_is_no_run_and_what_is_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not JSON") as caught:
        write_report(tmp_path)
    assert str(caught.value.where).endswith("run.json")


def test_of_several_evaluations_the_one_with_most_rows_gives_the_verdict_and_all_are_shown(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    row = RowResult("a:1", "p", "r", "a", "b", {"contains": 1.0}, {"contains": 0.0})
    Evaluation({"contains": UP}, [row]).save(run / "eval" / "a_small_one.json")
    page = Page(write_report(run))
    assert "Exact match on 4 held-out rows rose" in page.text
    assert "Before and after: a_small_one" in page.text
    assert "Before and after: held_out" in page.text


def test_bars_of_a_perplexity_are_measured_against_the_larger_one(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    lines_of(tmp_path, [])
    result = MetricResult(3.0, 3.0, 3.0, 6.0, -3.0, -3.0, -3.0, 6.0, 6.0, rows=1, higher_is_better=False)
    row = RowResult("a:1", "p", "r", None, None, {"perplexity": 3.0}, {"perplexity": 6.0})
    Evaluation({"perplexity": result}, [row]).save(tmp_path / "eval" / "x.json")
    source = write_report(tmp_path).read_text(encoding="utf-8")
    base, adapter = (float(width) for width in re.findall(r'class="bar \w+"[^>]*><span style="width:([\d.]+)%', source))
    assert base == pytest.approx(2 * adapter, abs=0.02)
    assert 80 < base < 100


def test_files_in_eval_that_are_no_evaluations_are_named_and_not_shown(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "eval" / "other.json").write_text("[1]", encoding="utf-8")
    assert "Not shown, because they are no evaluations: other.json." in Page(write_report(run)).text


# --- the pieces ------------------------------------------------------------------------------------------------------


def test_a_chart_places_its_points_where_they_belong() -> None:
    chart = line_chart("Loss", [Series("train", [(0, 0.0), (5, 1.0), (10, 2.0)], "train")], from_zero=True)
    assert "M0 1000L500 500L1000 0" in chart
    assert re.findall(r'bottom:([\d.]+)%">([\d.]+)<', chart)[-1] == ("100.00", "2.0")


def test_a_chart_of_one_point_or_of_equal_points_is_still_a_chart() -> None:
    assert "M500 500h0" in line_chart("x", [Series("a", [(3, 1.0)], "train")])
    assert "L1000 500" in line_chart("x", [Series("a", [(0, 1.0), (1, 1.0)], "train")])
    assert line_chart("x", [Series("a", [(0, math.nan)], "train")]) == ""


def test_thinning_keeps_the_peaks() -> None:
    points = [(float(n), 0.0) for n in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thinned(points)
    assert (4321.0, 99.0) in kept
    assert len(kept) <= MAX_POINTS
    assert kept == sorted(kept)


def test_smoothing_does_not_lag_and_keeps_the_ends() -> None:
    line = [(float(n), float(n)) for n in range(100)]
    assert [y for _, y in smoothed(line, half=5)] == pytest.approx([y for _, y in line])
    bumpy = smoothed([(0, 1.0), (1, 4.0), (2, 1.0), (3, 4.0), (4, 1.0)], half=1)
    assert bumpy == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 2.0), (4, 1.0)]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0", "0.25", "0.50", "0.75", "1.00"]),
        (0, 2e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0, 1800, ["0", "500", "1,000", "1,500", "2,000"]),
        (0, 2, ["0", "0.5", "1.0", "1.5", "2.0"]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, labels: list[str]) -> None:
    ticks = nice_ticks(low, high, 5)
    assert [number(tick, ticks) for tick in ticks] == labels


def test_differing_words_are_marked_and_strangers_are_left_alone() -> None:
    assert (
        marked("the red cat sat", "the big red cat sat")
        == 'the<mark class="gap" title="something is missing here"></mark> red cat sat'
    )
    assert marked("<a> b c", "<x> b c") == "&lt;<mark>a</mark>&gt; b c"
    assert marked("nothing alike at all", "12345") == "nothing alike at all"


def test_long_texts_say_how_much_is_not_shown() -> None:
    assert plain("x" * 1600, 1500).endswith(" … 100 more characters</span>")


def test_foreign_html_keeps_its_shape_and_loses_its_teeth() -> None:
    assert clean_html("<span class='a b' onclick='x()'>t</span>") == '<span class="a b">t</span>'
    assert clean_html("<script>x()</script>a<svg><path/></svg>b") == "ab"
    assert clean_html('<a href="javascript:x()">t</a>') == "t"
    assert clean_html("<div><b>open") == "<div><b>open</b></div>"
    assert clean_html("</div></main>&lt;i&gt;") == "&lt;i&gt;"
    assert clean_html('<span style="background:url(//x)">t</span>') == '<span class="trained">t</span>'
    assert clean_html('<span class="a&quot; onload=1">t</span>') == "<span>t</span>"


def test_html_is_escaped_once_and_only_where_it_is_text() -> None:
    assert tag("p", "<&>", tag("b", "x"), title='"') == '<p title="&quot;">&lt;&amp;&gt;<b>x</b></p>'
    assert esc(esc("<")) == "&lt;"


def test_what_all_prompts_begin_with_ends_at_a_turn() -> None:
    assert shared_opening(["system: s\n\nuser: one", "system: s\n\nuser: other"]) == "system: s\n\n"
    assert shared_opening(["what is one", "what is two"]) == ""
    assert shared_opening(["only\n\none"]) == ""


def test_recipes_know_the_metrics_that_exist() -> None:
    assert set(RECIPE_METRICS) == set(METRICS)
