"""The recipe: what it accepts, what it refuses, and that all refusals come at once with their lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from veneer.adapters.config import LoraConfig
from veneer.data.shapes import FORMATS
from veneer.errors import RecipeError
from veneer.evaluate.metrics import METRICS as EVALUATE_METRICS
from veneer.recipe import METRICS, Recipe, RecipeProblems, all_keys, load_recipe, recipe_from, recipe_reference
from veneer.recipe.hints import FOREIGN, NEEDLESS, VALUES
from veneer.recipe.yamlio import dump, parse
from veneer.train.optimizer import OPTIMIZERS
from veneer.train.schedule import SCHEDULES
from veneer.train.track import TRACKERS

SOUND = "base: b\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml", overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """``what - fix`` of every problem, in the order of the report."""
    with pytest.raises(RecipeProblems) as caught:
        load(folder, text, *overrides)
    return [f"{p.what} - {p.fix}" for p in caught.value.problems]


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_a_recipe_needs_only_a_base_and_rows(folder: Path) -> None:
    recipe = load(folder, SOUND)
    assert (recipe.base, recipe.adapter.r, recipe.adapter.target_modules) == ("b", 16, "all-linear")
    assert recipe.train.learning_rate == 2e-4
    assert recipe.data.eval == 0.1


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.e-4", 2e-4), (".5", 0.5), ("1", 1.0), ("0.0001", 1e-4)]
)
def test_a_learning_rate_is_a_number_with_or_without_a_dot(folder: Path, text: str, number: float) -> None:
    assert load(folder, SOUND + f"train: {{learning_rate: {text}}}").train.learning_rate == number
    assert load(folder, SOUND, f"train.learning_rate={text}").train.learning_rate == number


def test_overrides_are_yaml_and_the_last_one_wins(folder: Path) -> None:
    recipe = load(
        folder,
        SOUND + "train: {seed: 1}",
        "train.seed=2",
        "train.seed=3",
        "data.eval=null",
        "adapter.target_modules=[q_proj,v_proj]",
        "train.packing=false",
        "adapter.rank_pattern={q_proj: 8}",
        "adapter.rank_pattern.layers.0.v_proj=4",
    )
    assert recipe.train.seed == 3
    assert recipe.data.eval is None
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.train.packing is False
    assert recipe.adapter.rank_pattern == {"q_proj": 8, "layers.0.v_proj": 4}


@pytest.mark.parametrize(
    ("line", "overrides", "expected"),
    [
        ("quantize: nf4", [], ("nf4", 64, [])),
        ("quantize: {scheme: fp4, block_size: 128, skip: [down_proj]}", [], ("fp4", 128, ["down_proj"])),
        ("quantize: nf4", ["quantize.block_size=128"], ("nf4", 128, [])),
        ("quantize: {scheme: nf4, block_size: 128}", ["quantize=int8"], ("int8", 64, [])),
        ("", ["quantize={scheme: nf4, skip: [o_proj]}"], ("nf4", 64, ["o_proj"])),
        ("quantize:", [], ("none", 64, [])),
    ],
)
def test_one_word_says_how_the_base_is_stored_and_a_section_says_more(
    folder: Path, line: str, overrides: list[str], expected: tuple[str, int, list[str]]
) -> None:
    found = load(folder, SOUND + line, *overrides).quantize
    assert (found.scheme, found.block_size, found.skip) == expected


def test_a_wrong_word_of_the_command_line_is_told_as_such(folder: Path) -> None:
    with pytest.raises(RecipeProblems) as caught:
        load(folder, SOUND, "quantize=nf5")
    assert [(p.key, p.where) for p in caught.value.problems] == [("quantize.scheme", "quantize=nf5 (command line)")]


def test_an_empty_section_means_its_defaults(folder: Path) -> None:
    assert load(folder, SOUND + "train:\neval:\n").train.learning_rate == 2e-4


def test_names_of_other_tools_for_a_value_are_understood_where_they_mean_the_same(folder: Path) -> None:
    recipe = load(folder, SOUND + "dtype: bf16\ntrain: {report_to: none}")
    assert (recipe.dtype, recipe.train.report_to) == ("bfloat16", [])
    assert load(folder, SOUND, "train.report_to=tensorboard").train.report_to == ["tensorboard"]


def test_data_lie_beside_the_recipe_or_else_in_the_working_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "rows.jsonl").write_text("{}")
    (here / "more.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    recipe = load(folder, "base: b\ndata: {train: [rows.jsonl, more.jsonl]}\n")
    assert recipe.data.train == [str(folder / "rows.jsonl"), str(here / "more.jsonl")]
    assert recipe.output_dir == str(here / "runs" / "recipe")


def test_a_hub_dataset_and_a_hub_base_keep_their_names(folder: Path) -> None:
    recipe = load(folder, "base: org/model\ndata: {train: org/rows, eval: org/other}\n")
    assert (recipe.base, recipe.data.train, recipe.data.eval) == ("org/model", "org/rows", "org/other")


def test_a_base_that_is_a_folder_becomes_absolute(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    assert load(folder, "base: model\ndata: {train: rows.jsonl}\n").base == str(folder / "model")


def test_the_text_of_a_template_file_stands_in_the_recipe(folder: Path) -> None:
    (folder / "chat.jinja").write_text("{{ messages }}\n")
    assert load(folder, SOUND, "data.chat_template=chat.jinja").data.chat_template == "{{ messages }}\n"
    assert load(folder, SOUND, "data.chat_template=tool_use").data.chat_template == "tool_use"


def test_a_recipe_cannot_be_changed() -> None:
    recipe = recipe_from({"base": "b", "data": {"train": "t"}})
    with pytest.raises(ValidationError):
        recipe.base = "c"  # type: ignore[misc]  # that is the point


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("train: {lerning_rate: 1}", ["unknown key 'train.lerning_rate'", "'train.learning_rate'"]),
        ("learning_rate: 1", ["unknown key 'learning_rate'", "another place: 'train.learning_rate'"]),
        ("seed: 1", ["unknown key 'seed'", "'train.seed'"]),
        ("train: {R: 1}", ["unknown key 'train.R'", "'adapter.r'"]),
        ("adapter: {R: 1}", ["unknown key 'adapter.R'", "Did you mean 'adapter.r'?"]),
        ("lora_r: 8", ["unknown key 'lora_r'", "'adapter.r' here"]),
        ("train: {lora-alpha: 8}", ["'adapter.lora_alpha'"]),
        ("max_seq_length: 8", ["'train.max_length' here"]),
        ("epochs: 8", ["'train.num_train_epochs' here"]),
        ("train: {micro_batch_size: 8}", ["'train.per_device_train_batch_size' here"]),
        ("val_set_size: 0.1", ["'data.eval' here"]),
        ("optim: adamw_8bit", ["it belongs to another place: 'train.optim'"]),
        ("zzzzzzzz: 1", ["unknown key 'zzzzzzzz'", "the keys here are base, revision"]),
        ("train: {max_length: 0}", ["train.max_length is 0; it must be a whole number of at least 2"]),
        ("train: {max_length: 1.5}", ["train.max_length is 1.5; it must be a whole number"]),
        ("train: {max_length: '8'}", ["train.max_length is '8'; it must be a whole number"]),
        ("train: {learning_rate: 0}", ["train.learning_rate is 0; it must be a number above 0"]),
        ("train: {learning_rate: -1e-4}", ["must be a number above 0"]),
        ("train: {learning_rate: .nan}", ["train.learning_rate is nan; it must be a number above 0"]),
        ("train: {learning_rate: fast}", ["train.learning_rate is 'fast'; it must be a number above 0"]),
        ("train: {warmup_ratio: 1.5}", ["it must be a number from 0 to 1"]),
        ("train: {adam_beta2: 1}", ["it must be a number from 0 to below 1"]),
        ("train: {packing: yes}", ["train.packing is 'yes'; it must be true or false"]),
        ("train: {seed: true}", ["train.seed is true; it must be a whole number"]),
        ("train: {lr_scheduler_type: cosin}", ["one of cosine, linear, constant", "Did you mean 'cosine'?"]),
        ("train: {lr_scheduler_type: constant_with_warmup}", ["train.warmup_ratio gives it its warm-up"]),
        ("optimizer: adamw_8bit", ["'train.optim' here"]),
        ("train: {optim: adamw_torch}", ["it must be one of adamw, adamw_8bit", "use adamw"]),
        ("train: {optim: paged_adamw_32bit}", ["use paged_adamw"]),
        ("train: {optim: adamw8bit}", ["Did you mean 'adamw_8bit'"]),
        (
            "train: {optim: adamw_bnb_8bit}\ndevice: cpu",
            ["bitsandbytes' optimizer for CUDA, and the device is cpu", "use adamw_8bit"],
        ),
        ("train: {method: dpo}", ["train.method is 'dpo'; it must be sft", "not available yet"]),
        ("train: {max_steps: -1}", ["write null for no limit"]),
        ("train: {max_grad_norm: 0}", ["write null to turn clipping off"]),
        ("train: {report_to: [tensorbord]}", ["Did you mean 'tensorboard'?"]),
        ("quantize: nf5", ["quantize.scheme is 'nf5'; it must be one of none, nf4", "Did you mean 'nf4'"]),
        ("quantize: 4bit", ["use nf4"]),
        ("quantize: 8bit", ["use int8"]),
        ("quantize: 4", ["quantize is 4; it must be a section of keys", "use nf4"]),
        ("load_in_4bit: true", ["it is called 'quantize' here"]),
        ("quantize: {scheme: nf4, block_size: 48}", ["quantize.block_size is 48; it must be one of 32, 64, 128"]),
        ("quantize: {scheme: nf4, blocksize: 64}", ["unknown key 'quantize.blocksize'", "'quantize.block_size'"]),
        ("quantize: {scheme: nf4, keep: 1.5}", ["quantize.keep is 1.5; it must be a number above 0 and below 1"]),
        ("quantize: {scheme: nf4, skip: down_proj}", ["quantize.skip is 'down_proj'; it must be a list of text"]),
        ("quantize: {scheme: nf4, skip: ['(q']}", ["quantize.skip holds '(q', no regular expression"]),
        ("quantize: {skip: [down_proj]}", ["quantize.skip does nothing with quantize.scheme none"]),
        ("quantize: {scheme: int8, block_size: 128}", ["quantize.block_size does nothing with quantize.scheme int8"]),
        ("quantize: nf4\ndevice: mps", ["is computed on cpu and cuda, and the device is mps"]),
        ("dtype: fp16", ["one of auto, bfloat16, float32", "float16 overflows"]),
        ("dtype: bfloat61", ["Did you mean 'bfloat16'"]),
        ("adapter: lora", ["adapter is 'lora'; it must be a section of keys", "adapter: {r: ...}"]),
        ("adapter: {r: 0}", ["adapter.r is 0; it must be a whole number of at least 1"]),
        ("adapter: {target_modules: []}", ["adapter.target_modules is []; it must be text or a list of text"]),
        ("adapter: {target_modules: '(q'}", ["adapter.target_modules is no regular expression"]),
        ("adapter: {rank_pattern: {'(q': 3}}", ["adapter.rank_pattern is no regular expression"]),
        ("adapter: {rank_pattern: {q: 0}}", ["adapter.rank_pattern is {q: 0}; it must be a mapping from names"]),
        ("adapter: {layers_to_transform: [-1]}", ["it must be a whole number of at least 0, a list of whole numbers"]),
        (
            "adapter: {target_modules: '.*q', layers_to_transform: [1]}",
            ["adapter.layers_to_transform goes with a list of target_modules"],
        ),
        ("adapter: {r: 3, init_lora_weights: orthogonal}", ["adapter.r holds the odd rank 3", "use an even rank"]),
        ("adapter: {init_lora_weights: gausian}", ["Did you mean 'gaussian'?"]),
        (
            "train: {max_length: 64, micro_batch_tokens: 32}",
            ["is 32, less than train.max_length (64)", "raise it to 64"],
        ),
        ("train: {packing: false, micro_batch_tokens: 4096}", ["does nothing without packing"]),
        ("eval: {metrics: [exact_mach]}", ["unknown metric 'exact_mach'", "Did you mean 'exact_match'?"]),
        ("eval: {metrics: [exact_match, exact_match]}", ["names 'exact_match' twice"]),
        ("eval: {metrics: ['regex:(']}", ["holds 'regex:(', whose pattern is wrong"]),
        ("eval: {metric_for_best: rouge_l}", ["'rouge_l', which is not in eval.metrics", "add 'rouge_l'"]),
        ("eval: {greater_is_better: true}", ["eval.greater_is_better says nothing without metric_for_best"]),
        ("output_dir: ''", ["output_dir is ''; it must be text"]),
    ],
)
def test_a_wrong_line_is_told_with_its_key_its_line_and_what_to_do(
    folder: Path, line: str, fragments: list[str]
) -> None:
    (said,) = problems(folder, SOUND + line)
    for fragment in fragments:
        assert fragment in said
    with pytest.raises(RecipeProblems) as caught:
        load(folder, SOUND + line)
    assert caught.value.where is not None
    assert caught.value.where.endswith("recipe.yaml:3")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("data", "rest", "key"),
    [
        ("eval: null", "train: {early_stopping_patience: 2}", "train.early_stopping_patience"),
        ("eval: null", "train: {eval_steps: 2}", "train.eval_steps"),
        ("eval: null", "eval: {metrics: [exact_match]}", "eval.metrics"),
        ("eval: null", "eval: {metric_for_best: loss}", "eval.metric_for_best"),
    ],
)
def test_what_needs_held_out_rows_is_refused_without_them(folder: Path, data: str, rest: str, key: str) -> None:
    (said,) = problems(folder, f"base: b\ndata: {{train: rows.jsonl, {data}}}\n{rest}")
    assert said.startswith(f"{key} needs held-out rows, and data.eval is null")
    assert "set data.eval" in said


@pytest.mark.parametrize("value", ["0", "0.0", "1.0", "1.5", "-3", "true", "''", "[]"])
def test_held_out_rows_are_a_share_a_count_or_files(folder: Path, value: str) -> None:
    (said,) = problems(folder, f"base: b\ndata: {{train: rows.jsonl, eval: {value}}}")
    assert "it must be a number above 0 and below 1, a whole number of at least 1, text" in said


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = "bse: b\ndata: {eval: 0.1}\nadapter: {r: 0}\ntrain:\n  max_length: 8\n  micro_batch_tokens: 4\n  lr: 1\n"
    with pytest.raises(RecipeProblems) as caught:
        load(folder, text, "train.sed=1")
    lines = [(p.key, (p.where or "").partition("recipe.yaml")[2]) for p in caught.value.problems]
    assert lines == [
        ("train.sed", ""),
        ("base", ""),
        ("bse", ":1"),
        ("data.train", ":2"),
        ("adapter.r", ":3"),
        ("train.micro_batch_tokens", ":6"),
        ("train.lr", ":7"),
    ]
    shown = str(caught.value)
    assert "has 7 problems" in shown
    assert all(p.what in shown for p in caught.value.problems)
    assert "'train.sed=1' (command line)" not in shown
    assert "train.sed=1 (command line)" in shown


def test_a_wrong_value_hides_no_contradiction_of_other_keys_and_invents_none(folder: Path) -> None:
    said = problems(folder, SOUND + "train: {max_length: 0, micro_batch_tokens: 4}\neval: {metric_for_best: f1}")
    assert len(said) == 2
    assert "train.max_length is 0" in said[0]
    assert "eval.metric_for_best" in said[1]


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.learning_rat=1", ["unknown key 'train.learning_rat'", "'train.learning_rate'"]),
        ("learning_rate=1", ["'train.learning_rate'"]),
        ("max_seq_length=1", ["'train.max_length' here"]),
        ("train.learning_rate", ["is not an override", "key=value"]),
        ("=1", ["is not an override"]),
        ("train.learning_rate=[", ["the value of train.learning_rate is not YAML"]),
        ("adapter={r: 8}", ["'adapter' is a section", "adapter.r="]),
        ("adapter.r.x=8", ["unknown key 'adapter.r.x'"]),
        ("adapter.r=many", ["adapter.r is 'many'; it must be a whole number"]),
        ("train.max_length=", ["train.max_length is null"]),
    ],
)
def test_a_wrong_override_names_itself_and_the_right_key(folder: Path, override: str, fragments: list[str]) -> None:
    with pytest.raises(RecipeProblems) as caught:
        load(folder, SOUND, override)
    for fragment in [*fragments, f"{override} (command line)"]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "fragment"),
    [
        (SOUND + "base: c\n", 3, "base stands twice (first in line 1)"),
        (SOUND + "train:\n  seed: 1\n  seed: 2\n", 5, "train.seed stands twice (first in line 4)"),
        ("base: b\ndata: [\n", None, "this is not YAML"),
        ("base: b\n\tdata: x\n", 2, "indent with spaces"),
        ("base: b: c\n", 1, "this is not YAML"),
        (SOUND + "train: !!python/object:os.system x\n", 3, "is not allowed in a recipe"),
        (SOUND + "train: !own x\n", 3, "the tag !own is not allowed"),
        ("base: &a [*a]\ndata: {train: rows.jsonl}\n", 1, "contains itself"),
        (SOUND + "? [a]\n: 1\n", 3, "a key must be a plain name"),
        ("base: b\n---\nbase: c\n", 2, "this is not YAML"),
        ("", None, "the recipe is empty"),
        ("# nothing\n", None, "the recipe is empty"),
        ("just text", None, "a recipe is a mapping of keys"),
        ("- base: b", None, "a recipe is a mapping of keys"),
    ],
)
def test_text_that_is_no_recipe_is_told_with_its_line(folder: Path, text: str, line: int | None, fragment: str) -> None:
    with pytest.raises(RecipeProblems) as caught:
        load(folder, text)
    assert fragment in str(caught.value)
    if line is not None:
        assert f"recipe.yaml:{line}" in str(caught.value)


def test_a_missing_recipe_names_the_nearest_file(folder: Path) -> None:
    (folder / "tickets.yaml").write_text(SOUND)
    with pytest.raises(RecipeError, match="no recipe") as caught:
        load_recipe(folder / "tikets.yaml")
    assert caught.value.fix == "Did you mean 'tickets.yaml'?"


def test_a_folder_and_a_binary_file_are_no_recipes(folder: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(folder)
    (folder / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(folder / "recipe.yaml")


def test_a_data_file_that_is_nowhere_is_told_before_anything_runs(folder: Path) -> None:
    (said,) = problems(folder, "base: b\ndata: {train: row.jsonl}\n")
    assert said == "data.train: no file 'row.jsonl' - Did you mean 'rows.jsonl'?"
    said_of_two = problems(folder, "base: b\ndata: {train: ./zz, eval: x.csv, chat_template: q.jinja}\n")
    assert [text.partition(":")[0] for text in said_of_two] == ["data.train", "data.eval", "data.chat_template"]


def test_a_missing_data_file_is_told_with_what_to_give_instead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (there,) = problems(folder, "base: b\ndata: {train: other.csv}\n")
    assert there == "data.train: no file 'other.csv' - data files there: rows.jsonl"
    (gone,) = problems(folder, "base: b\ndata: {train: runs/data/other.csv}\n")
    assert gone.startswith(
        f"data.train: no file 'runs/data/other.csv' - looked in {folder}; the folder 'runs/data' does"
    )
    assert gone.endswith("give a file that is there, or the demo's rows: demo-train, demo-validation, demo-heldout")
    (folder / "run").mkdir()
    (near,) = problems(folder, "base: b\ndata: {train: runs/data/other.csv}\n")
    assert "did you mean 'run'?" in near
    (folder / "demo.yaml").write_text("")
    (misspelt,) = problems(folder, "base: b\ndata: {train: demo-trian}\n")
    assert misspelt.startswith("data.train: no file 'demo-trian' - Did you mean 'demo-train'")
    assert load(folder, "base: b\ndata: {train: demo-train, eval: demo-validation}\n").data.train == "demo-train"


def test_a_finished_run_can_be_read_after_its_data_have_moved(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("base: b\ndata: {train: /nowhere/rows.jsonl}\n")
    assert load_recipe(folder / "recipe.yaml", check_paths=False).data.train == "/nowhere/rows.jsonl"


def test_recipes_made_in_python_are_checked_alike() -> None:
    with pytest.raises(RecipeProblems, match=r"unknown key 'train\.lr'"):
        recipe_from({"base": "b", "data": {"train": "t"}, "train": {"lr": 1}})
    with pytest.raises(ValidationError, match="does nothing without packing"):
        Recipe.model_validate(
            {"base": "b", "data": {"train": "t"}, "train": {"packing": False, "micro_batch_tokens": 2048}}
        )


# --- written out -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_equal(folder: Path) -> None:
    text = SOUND + (
        "adapter: {r: 8, lora_alpha: 12.5, rank_pattern: {'.*q': 4}, target_modules: '.*(q|v)_proj'}\n"
        "train: {learning_rate: 1e-05, adam_epsilon: 1e-10}\n"
        "eval: {metrics: ['regex:\\d+, #x', exact_match], metric_for_best: exact_match}\n"
    )
    recipe = load(folder, text, 'data.chat_template="{{ a }}\\n  {# b #}\\n"', "revision='1e5'")
    for comments in (True, False):
        (folder / "again.yaml").write_text(recipe.to_yaml(comments=comments))
        assert load_recipe(folder / "again.yaml") == recipe


def test_every_key_stands_in_the_yaml_and_in_the_reference_with_its_description() -> None:
    recipe = recipe_from({"base": "b", "data": {"train": "t"}})
    written, reference = recipe.to_yaml(), recipe_reference()
    for key in all_keys():
        assert f"{key.rpartition('.')[2]}:" in written
        section = Recipe if "." not in key else Recipe.model_fields[key.partition(".")[0]].annotation
        field = section.model_fields[key.rpartition(".")[2]]
        assert field.description, f"{key} has no description"
        if not hasattr(field.annotation, "model_fields"):
            assert f"| `{key}` |" in reference
            assert field.description in reference
            assert field.description in written


def test_the_resolved_recipe_is_json_with_every_key() -> None:
    resolved = recipe_from({"base": "b", "data": {"train": "t"}}).resolved()
    assert resolved["adapter"]["r"] == 16
    assert recipe_from(resolved).resolved() == resolved


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
        max_leaves=6,
    )
)
def test_any_value_that_is_dumped_is_parsed_back_the_same(value: Any) -> None:
    document = parse(f"key: {dump(value)}\n")
    assert document.flaws == []
    assert document.value == {"key": value}
    assert type(document.value["key"]) is type(value)


# --- lists that must not drift apart ---------------------------------------------------------------------------------


def test_the_recipe_knows_the_metrics_that_evaluation_has() -> None:
    assert set(METRICS) == set(EVALUATE_METRICS)


def test_the_recipe_offers_what_the_other_parts_understand() -> None:
    def choices(section: str, key: str) -> set[str]:
        schema = Recipe.model_json_schema()["$defs"][section]["properties"][key]
        return set(schema.get("items", schema)["enum"])

    assert choices("TrainRecipe", "lr_scheduler_type") == set(SCHEDULES)
    assert choices("TrainRecipe", "report_to") == set(TRACKERS)
    assert choices("TrainRecipe", "optim") == set(OPTIMIZERS)
    assert choices("DataRecipe", "format") == {"auto", "labelled", *FORMATS}


def test_every_key_of_the_adapter_section_is_a_field_of_lora_config() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    keys = {key.partition(".")[2] for key in all_keys() if key.startswith("adapter.")}
    assert keys <= fields
    recipe = recipe_from({"base": "b", "data": {"train": "t"}})
    config = LoraConfig(**recipe.adapter.model_dump())
    assert config == LoraConfig(), "the recipe's defaults and LoraConfig's have drifted apart"


def test_hints_lead_to_keys_that_exist_and_never_away_from_one() -> None:
    keys = set(all_keys())
    leaves = {key.rpartition(".")[2] for key in keys}
    assert set(FOREIGN.values()) <= keys
    assert {key for key, _ in VALUES} <= keys
    assert not (set(FOREIGN) | set(NEEDLESS)) & leaves
    assert not set(FOREIGN) & set(NEEDLESS)
