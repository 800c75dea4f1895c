"""The adapter remembers how its base was quantised, and says so when it meets it in another precision."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from veneer.adapters import LoraConfig, attach, load_adapter
from veneer.adapters.precision import Precision, precision_of
from veneer.adapters.save import read_record, recorded_precision
from veneer.errors import AdapterError
from veneer.quant import QuantConfig, QuantizedLinear

NF4 = QuantConfig("nf4")
PLAIN = "weights that are not quantised"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


@dataclass
class FakeBase:
    """A base with its linears in codes, that says so as ``load_base`` does."""

    quantization: QuantConfig | None = None
    skip: tuple[str, ...] = ()
    module: nn.Module = field(default_factory=net)
    identity: Any = field(
        default_factory=lambda: SimpleNamespace(
            name="tiny", revision=None, weight_hash="aaaa", to_dict=lambda: {"name": "tiny", "weight_hash": "aaaa"}
        )
    )

    def __post_init__(self) -> None:
        self.quantized = SimpleNamespace(skip=self.skip)
        for index in (0, 2):
            if self.quantization is not None:
                self.module[index] = QuantizedLinear.from_linear(self.module[index], self.quantization)


def saved_over(base: FakeBase, folder: Path) -> Path:
    return attach(base, LoraConfig(r=2, init_lora_weights=False), seed=0).save(folder)


@pytest.mark.parametrize(
    ("config", "skip"),
    [
        (None, ()),
        (NF4, ()),
        (QuantConfig("nf4", 128, False), ("layers.0", "down_proj")),
        (QuantConfig("fp4"), ()),
        (QuantConfig("int8"), ()),
    ],
    ids=str,
)
def test_the_record_says_how_the_base_was_stored(
    config: QuantConfig | None, skip: tuple[str, ...], tmp_path: Path
) -> None:
    base = FakeBase(config, skip)
    folder = saved_over(base, tmp_path / "a")
    assert recorded_precision(folder) == precision_of(base) == Precision(config, skip)
    in_file = read_record(folder)["quantization"]
    if config is None:
        assert in_file is None
    else:
        expected = {"scheme": config.scheme, "block_size": config.block_size, "double_quant": config.double_quant}
        assert in_file == {**expected, "skip": list(skip)}


@pytest.mark.parametrize(
    ("trained", "present", "said"),
    [
        (NF4, None, (f"here the base has {PLAIN}", "with quantize='nf4'")),
        (None, NF4, (f"trained over {PLAIN}", "here the base has weights in nf4 (blocks of 64", "without quantize")),
        (NF4, QuantConfig("fp4"), ("trained over weights in nf4", "has weights in fp4", "with quantize='nf4'")),
        (
            QuantConfig("nf4", 128, False),
            NF4,
            ("blocks of 128, without double", "quantize=QuantConfig(scheme='nf4', block_size=128, double_quant=False)"),
        ),
        (QuantConfig("int8"), NF4, ("trained over weights in int8, and", "with quantize='int8'")),
    ],
    ids=str,
)
def test_loading_over_another_precision_is_said_with_both_and_with_what_to_do(
    trained: QuantConfig | None,
    present: QuantConfig | None,
    said: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = saved_over(FakeBase(trained), tmp_path / "a")
    adapted = load_adapter(FakeBase(present), folder)
    assert adapted.active == "default"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("veneer.adapters", logging.WARNING)
    for part in (str(folder), "a little", *said):
        assert part in record.getMessage()
    caplog.clear()
    load_adapter(FakeBase(present), folder, allow_other_precision=True)
    assert not caplog.records


def test_another_skip_list_is_another_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_over(FakeBase(NF4, ("down_proj",)), tmp_path / "a")
    load_adapter(FakeBase(NF4), folder)
    assert "but for down_proj" in caplog.text
    assert "quantize='nf4', skip=['down_proj']" in caplog.text


@pytest.mark.parametrize(
    ("trained", "present"),
    [(None, None), (NF4, NF4), (QuantConfig("int8"), QuantConfig("int8", 128, False))],
    ids=str,
)
def test_the_same_precision_is_not_worth_a_word(
    trained: QuantConfig | None, present: QuantConfig | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_adapter(FakeBase(present), saved_over(FakeBase(trained), tmp_path / "a"))
    assert not caplog.records


def test_where_nothing_is_recorded_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_over(FakeBase(NF4), tmp_path / "a")
    load_adapter(net(), folder)  # a bare module does not say how it is stored
    (folder / "veneer.json").unlink()  # as another program writes it
    assert recorded_precision(folder) is None
    load_adapter(FakeBase(None), folder)
    assert not caplog.records


def test_a_load_that_fails_says_nothing_of_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_over(FakeBase(NF4), tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError):
        load_adapter(FakeBase(None), folder)
    assert not caplog.records


@pytest.mark.parametrize(
    "broken",
    [
        "nf4",
        {"scheme": "nf4"},
        {"scheme": "nf5", "block_size": 64, "double_quant": True},
        {"scheme": "nf4", "block_size": 64, "double_quant": True, "skip": "down_proj"},
        {"scheme": "nf4", "block_size": 64, "double_quant": True, "rotation": 3},
    ],
    ids=str,
)
def test_a_record_that_is_not_understood_is_an_error(broken: Any, tmp_path: Path) -> None:
    folder = saved_over(FakeBase(NF4), tmp_path / "a")
    record = json.loads((folder / "veneer.json").read_text())
    (folder / "veneer.json").write_text(json.dumps({**record, "quantization": broken}))
    base = FakeBase(NF4)
    with pytest.raises(AdapterError, match="how the base was quantised") as caught:
        load_adapter(base, folder)
    assert caught.value.where == str(folder / "veneer.json")
    assert isinstance(base.module[0], QuantizedLinear)  # untouched
