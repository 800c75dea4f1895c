"""Looking inside an adapter on disk: what is measured, what is advised, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.adapters import LoraConfig, attach, load_adapter
from veneer.errors import AdapterError, ModelError, UsageError
from veneer.models import load_base
from veneer.ship import Inspection, LayerReport, inspect_adapter
from veneer.ship.inspect import advised_rank, kinds_of, used_rank
from veneer.ship.inspect_charts import save_picture


def written(base: Path, folder: Path, quantize: str | None = None, **settings: Any) -> Path:
    """An adapter with a random update."""
    options: dict[str, Any] = {"r": 8, "lora_alpha": 4, "init_lora_weights": False} | settings
    loaded = load_base(base, dtype="float32", device="cpu", quantize=quantize)
    return attach(loaded, LoraConfig(**options), seed=0).save(folder)


@pytest.fixture(scope="module")
def adapter(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: it is shared."""
    return written(wide_base, tmp_path_factory.mktemp("adapter") / "a", rank_pattern={"v_proj": 3})


@pytest.fixture(scope="module")
def found(adapter: Path) -> Inspection:
    return inspect_adapter(adapter, device="cpu")


def test_every_layer_has_the_spectrum_and_the_sizes_of_its_dense_update(
    found: Inspection, adapter: Path, wide_base: Path
) -> None:
    adapted = load_adapter(load_base(wide_base, dtype="float32", device="cpu"), adapter)
    assert len(found.layers) == 14
    for layer in found.layers:
        slot: Any = adapted.module.get_submodule(layer.path)
        dense, weight = slot.adapters["default"].delta().double(), slot.weight.double()
        S = torch.linalg.svdvals(dense)[: layer.rank]
        torch.testing.assert_close(torch.tensor(layer.singular_values), S.float(), rtol=1e-5, atol=1e-6)
        assert layer.norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert layer.relative_norm == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-4)
        ratio = float(S[0] / torch.linalg.matrix_norm(weight, 2))
        assert layer.relative_spectral_norm == pytest.approx(ratio, rel=1e-3)
    assert {layer.rank for layer in found.kinds["v_proj"]} == {3}
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert sum(found.depth_profile.values()) == pytest.approx(1)
    assert found.base == str(wide_base)


def test_new_directions_are_those_of_the_dense_decompositions(
    found: Inspection, adapter: Path, wide_base: Path
) -> None:
    adapted = load_adapter(load_base(wide_base, dtype="float32", device="cpu"), adapter)
    seen = set()
    for layer in found.layers:
        slot: Any = adapted.module.get_submodule(layer.path)
        dense, weight = slot.adapters["default"].delta().double(), slot.weight.double()
        tuned = torch.linalg.svd(weight + dense, full_matrices=False)[0][:, :10]
        cosines = (torch.linalg.svd(weight, full_matrices=False)[0].t() @ tuned).abs().amax(0)
        assert layer.base is not None
        # Those near the threshold may fall on either side of it in float32.
        low, high = int((cosines < 0.45).sum()), int((cosines < 0.55).sum())
        assert low <= layer.base.new_directions <= high
        seen.add(layer.base.new_directions)
    assert len(seen) > 1  # the numbers tell layers apart


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_over_codes_the_update_is_compared_with_what_they_stand_for(
    wide_base: Path, tmp_path: Path, quantize: str
) -> None:
    folder = written(wide_base, tmp_path / "a", quantize, target_modules=["up_proj"])
    base = load_base(wide_base, dtype="auto", device="cpu", quantize=quantize)  # as a folder is loaded by itself
    for layer in inspect_adapter(folder, device="cpu").layers:
        slot: Any = base.module.get_submodule(layer.path)
        assert layer.base is not None
        assert layer.base.base_norm == pytest.approx(float(slot.weight.dequantize().float().norm()), rel=1e-5)


def test_dora_and_embeddings_are_looked_into(wide_base: Path, tmp_path: Path) -> None:
    dora = written(wide_base, tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    tensors = load_file(dora / "adapter_model.safetensors")
    doubled = {key: 2 * value if key.endswith("magnitude_vector") else value for key, value in tensors.items()}
    save_file(doubled, dora / "adapter_model.safetensors", metadata={"format": "pt"})
    found = inspect_adapter(dora, device="cpu")
    for layer in found.layers:
        assert layer.base is not None
        assert layer.base.row_scale == pytest.approx(1, abs=0.5)
        # Rows of twice the size alone change the weight by as much as it is.
        assert layer.relative_norm is not None
        assert layer.relative_norm > 0.7
        assert layer.base.change_norm > layer.norm
    assert "DoRA" in found.notes[0]

    embedding = written(wide_base, tmp_path / "embedding", target_modules=["embed_tokens", "q_proj"])
    layers = {layer.kind: layer for layer in inspect_adapter(embedding, device="cpu").layers}
    assert layers["embed_tokens"].depth is None
    assert layers["embed_tokens"].base is not None
    assert layers["embed_tokens"].base.cosines == ()


@pytest.mark.parametrize(("experts", "quantize"), [("all", None), ([1], None), ("all", "nf4")])
def test_each_expert_is_compared_with_its_own_slice_of_the_base(
    moe_base: Path, tmp_path: Path, experts: Any, quantize: str | None
) -> None:
    from veneer.adapters.fused_experts import stack_of

    folder = written(moe_base, tmp_path / "a", quantize, experts=experts)
    found = inspect_adapter(folder, device="cpu")
    stacks = {kind: layers for kind, layers in found.kinds.items() if "[" in layers[0].path}
    assert sorted(stacks) == ["experts.down_proj", "gate_up_proj"]
    adapted = load_adapter(load_base(moe_base, device="cpu", quantize=quantize), folder)
    for layer in (layer for layers in stacks.values() for layer in layers):
        path, _, rest = layer.path.rpartition(".")
        stack, expert = rest.removesuffix("]").split("[")
        slot: Any = adapted.module.get_submodule(path)
        factors = slot.stacks("default")[stack]
        at = int(expert) if factors.positions is None else factors.positions[int(expert)]
        dense = (factors.scaling * factors.B[at] @ factors.A[at]).detach()
        weight: Any = stack_of(slot.base_layer, stack)
        weight = (weight if quantize is None else weight.dequantize())[int(expert)].detach().float()
        assert layer.base is not None
        assert layer.relative_norm == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-2 if quantize else 1e-4)
        tuned = torch.linalg.svd((weight + dense).double(), full_matrices=False)[0][:, :10]
        cosines = (torch.linalg.svd(weight.double(), full_matrices=False)[0].t() @ tuned).abs().amax(0)
        low, high = int((cosines < 0.4).sum()), int((cosines < 0.6).sum())
        assert low <= layer.base.new_directions <= high
    assert len(stacks["gate_up_proj"]) == 2 * (4 if experts == "all" else 1)
    assert found.notes == ([] if experts == "all" else ["12 of 16 experts have no update: left out"])


def test_a_classifier_is_looked_into(wide_base: Path, tmp_path: Path) -> None:
    loaded = load_base(wide_base, dtype="float32", device="cpu", labels=["no", "yes"])
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["score"])
    folder = attach(loaded, dataclasses.replace(config, task_type="SEQ_CLS"), seed=0).save(tmp_path / "a")
    found = inspect_adapter(folder, device="cpu")
    assert [layer.kind for layer in found.layers] == ["q_proj", "q_proj"]
    assert all(layer.base is not None for layer in found.layers)
    assert sum(found.others.values()) == 2 * 64


def test_a_run_is_looked_into_through_its_adapter(lora_run: Path) -> None:
    found = inspect_adapter(lora_run, device="cpu", directions=0)
    assert found.adapter == lora_run / "adapter"
    assert all(layer.base is not None and not layer.base.cosines for layer in found.layers)
    assert not any("direction" in line for line in found.advice)


def test_without_a_base_there_is_a_note_or_an_error(adapter: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(adapter, tmp_path / "a")
    record = json.loads((alone / "veneer.json").read_text())
    record["base"]["name"] = str(tmp_path / "gone")
    (alone / "veneer.json").write_text(json.dumps(record))
    found = inspect_adapter(alone)
    assert found.base is None
    assert all(layer.base is None for layer in found.layers)
    assert "not compared with the base" in found.notes[0]
    with pytest.raises(ModelError, match="the base of this adapter cannot be loaded"):
        inspect_adapter(alone, compare=True)

    config = json.loads((alone / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (alone / "adapter_config.json").write_text(json.dumps(config))
    (alone / "veneer.json").unlink()
    assert "does not say which base" in inspect_adapter(alone).notes[0]
    assert inspect_adapter(alone, compare=False).notes == []


def test_another_base_is_refused_unless_it_is_meant(adapter: Path, make_tiny_base: Callable[..., Path]) -> None:
    other = make_tiny_base(hidden_size=64, intermediate_size=128, seed=1)
    with pytest.raises(AdapterError, match="was trained on"):
        inspect_adapter(adapter, base=str(other))
    assert inspect_adapter(adapter, base=str(other), allow_base_mismatch=True).base == str(other)


def test_what_is_no_adapter_or_broken_is_refused(adapter: Path, wide_base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no adapter here"):
        inspect_adapter(wide_base)
    with pytest.raises(AdapterError, match="no such folder"):
        inspect_adapter(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="-1 directions"):
        inspect_adapter(adapter, directions=-1)
    broken = shutil.copytree(adapter, tmp_path / "a")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="NaN or Inf"):
        inspect_adapter(broken)
    rows = written(wide_base, tmp_path / "rows", target_modules=[], trainable_token_indices=[1, 2])
    with pytest.raises(AdapterError, match="no low-rank update"):
        inspect_adapter(rows)


def layer(path: str, rank: int, rank_99: int, norm: float = 1.0) -> LayerReport:
    values = (norm,) * rank
    return LayerReport(path, "q", 0, rank, 1.0, values, rank, rank_99, rank_99, norm, norm, 1.0)


@pytest.mark.parametrize(
    ("rank", "used", "advised"),
    [(32, 9, 12), (32, 32, None), (32, 16, 20), (16, 12, None), (16, 11, None), (16, 10, None), (16, 9, 12), (8, 1, 2)],
)
def test_the_advised_rank_is_a_quarter_more_than_is_used(rank: int, used: int, advised: int | None) -> None:
    assert advised_rank([layer("a", rank, used)]) == advised


def test_one_layer_in_ten_may_need_more_than_is_advised(tmp_path: Path) -> None:
    layers = [layer(f"a.{n}", 32, 9) for n in range(9)] + [layer("a.9", 32, 30)]
    assert used_rank(layers) == 30
    layers.append(layer("a.10", 32, 9))
    assert used_rank(layers) == 9
    assert Inspection(tmp_path, layers).advice[0].startswith("you use 9 of 32 ranks")
    assert "try r 12" in Inspection(tmp_path, layers).advice[0]


def test_the_advised_command_can_be_typed(tmp_path: Path) -> None:
    layers = [layer("a", 32, 9)]
    said = Inspection(tmp_path / "my adapter", layers).advice[0]
    assert f"veneer resize '{tmp_path}/my adapter' --rank 12 --output 'my adapter-r12' --data FILE" in said
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    said = Inspection(tmp_path / "run" / "adapter", layers).advice[0]
    assert said.endswith(f"veneer resize {tmp_path}/run --rank 12 --output run-r12")  # a run has rows of its own


def test_an_adapter_that_does_nothing_is_told(wide_base: Path, tmp_path: Path) -> None:
    fresh = written(wide_base, tmp_path / "a", init_lora_weights=True)
    found = inspect_adapter(fresh, compare=False)
    assert "14 of 14 layers have no update at all" in found.advice[0]
    assert "this adapter does nothing" in found.advice[1]
    assert save_picture(found, tmp_path / "p.png").stat().st_size > 1000


def test_a_kind_is_the_shortest_end_of_a_path_that_tells_it_apart() -> None:
    paths = ["h.0.attn.c_proj", "h.1.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "mlp.experts.base_layer", "head"]
    assert list(kinds_of(paths).values()) == [
        "attn.c_proj", "attn.c_proj", "mlp.c_proj", "c_fc", "experts.base_layer", "head",
    ]  # fmt: skip


def test_the_picture_takes_embeddings_experts_and_single_directions(
    moe_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw))[1])
    targets = ["embed_tokens", "shared_expert_gate", "q_proj"]
    folder = written(
        moe_base, tmp_path / "a", target_modules=targets, experts="all", rank_pattern={"shared_expert_gate": 1}
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: 20 * value for key, value in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    found = inspect_adapter(folder, device="cpu")
    save_picture(found, tmp_path / "a.png")
    axes = drawn[0].axes
    texts = [text.get_text() for ax in axes for text in ax.texts]
    assert sum("outside of the layers" in text for text in texts) == 2  # the embedding's share and size
    assert all("\n" in ax.get_ylabel() or len(ax.get_ylabel()) < 20 for ax in axes)
    kinds = list(found.kinds)
    experts = axes[3 * kinds.index("gate_up_proj") + 2]
    numbers = [int(text.get_text()) for text in experts.texts if text.get_text().isdigit()]
    new = [layer.base.new_directions for layer in found.kinds["gate_up_proj"] if layer.base is not None]
    assert len(numbers) == 2  # one for each layer
    assert sum(numbers) == sum(new)


def test_the_picture_has_a_row_for_each_kind(found: Inspection, tmp_path: Path) -> None:
    from matplotlib.image import imread

    kinds = len(found.kinds)
    all_rows = imread(save_picture(found, tmp_path / "all.png"))
    two = [layer for layer in found.layers if layer.kind in ("q_proj", "v_proj")]
    two_rows = imread(save_picture(Inspection(found.adapter, two, base=found.base), tmp_path / "two.png"))
    assert kinds == 7
    assert all_rows.shape[0] > 2.5 * two_rows.shape[0]
    assert all_rows.shape[1] == two_rows.shape[1]
    assert all_rows[..., :3].min() < 0.5 < all_rows[..., :3].mean()


def test_the_numbers_are_jsonable(found: Inspection) -> None:
    values = json.loads(json.dumps(found.to_dict()))
    assert values["rank"] == 8
    assert len(values["layers"]) == 14
    assert values["layers"][0]["base"]["directions_looked_at"] == 10
