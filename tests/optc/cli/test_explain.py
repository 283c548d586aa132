"""``optc explain``: the account of an artifact as a table, a picture and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optc
from optc.cli.main import run
from optc.report.account import account_summary, by_layer

IMAGES = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def latencies_by_bytes(programs: Sequence[optc.Program], *_: object, **__: object) -> list[float]:
    """In place of measuring each layer in each format: the fewer bytes, the faster."""
    return [1e-9 * program.constant_bytes() for program in programs]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``int8``, ``auto`` and ``fused`` of one small network."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(256, 64), nn.Linear(64, 10))
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optc.api.latencies", latencies_by_bytes)
        for name, passes, options in (
            ("int8", "fuse,quant", {}),
            ("auto", "fuse,quant", {"quant": {"formats": "auto"}}),
            ("fused", "fuse", {}),
        ):
            made = optc.optimize(
                model,
                IMAGES[0][:1],
                passes,
                pass_options=options,
                backend="onnxruntime",
                calibration=IMAGES,
                measure=False,
                max_drop=50 if name == "auto" else None,
                target=optc.Target(threads=1),
            )
            made.save(folder / name)
    return folder


def test_every_layer_has_a_row_that_says_why(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(artifacts / "int8"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pass"] == "quant"
    layers = by_layer(told["account"])
    assert [layer.label for layer in layers] == ["0.0", "1", "2"]
    for layer in layers:
        assert layer.chosen["form"] == "int8"
        assert layer.chosen["sqnr_db"] > 15
        assert layer.unquantized["sqnr_db"] is None
        assert 3 < layer.unquantized["bytes"] / layer.chosen["bytes"] < 4
        assert layer.chosen["why"] == "as asked, within the budget"
    assert account_summary(told["account"]).startswith("3 layers: 3 in int8; 0.1 MB in float, 0.0 MB as chosen")


def test_the_table_of_auto_has_latencies_and_the_whole_models_noise(
    artifacts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["explain", str(artifacts / "auto"), "-v", "--plot", str(tmp_path / "formats.svg")]) == 0
    out = capsys.readouterr().out
    for column in ("own SQNR dB", "model SQNR dB", "µs in float", "MB in float"):
        assert column in out
    assert "int4-weights" in out
    assert "\nWhy\n" in out
    drawn = (tmp_path / "formats.svg").read_text()
    assert "<svg" in drawn
    assert [path.name for path in tmp_path.iterdir()] == ["formats.svg"]
    assert run(["explain", str(artifacts / "auto"), "--json"]) == 0
    account = json.loads(capsys.readouterr().out)["account"]
    tried = [row for row in account if row["drop"] is not None]  # where some format is faster than float here
    assert ("points lost" in out) is bool(tried)
    reasons = ("its fastest format on onnxruntime", "more noise than the budget", "the whole model takes ")
    assert all(any(reason in row["why"] for reason in reasons) for row in account if row["chosen"])


@pytest.mark.parametrize("change", [None, {"seconds": "3 µs"}, {"form": None}, {"chosen": False}])
def test_an_account_of_another_kind_is_not_shown(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any] | None
) -> None:
    manifest = json.loads((artifacts / "int8" / "manifest.json").read_text())
    notes = manifest["report"]["passes"][-1]["notes"]
    notes["account"] = [row | change for row in notes["account"]] if change else [{"layer": "conv", "votes": 3}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert run(["explain", str(tmp_path)]) == 2
    assert "kept an account of its choices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fused"], "kept an account of its choices"),
        (["nothing"], "is no optc artifact"),
        (["int8", "--plot", "formats.docx"], "end its name in .png"),
        (["int8", "--plot", "nowhere/formats.png"], "there is no folder"),
        (["int8", "--plot", "/proc/formats.png"], "cannot write the picture '/proc/formats.png': No such file"),
        (["int8", "--plot", f"{'a' * 300}.png"], "File name too long"),
    ],
)
def test_bad_input_is_one_line(
    artifacts: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["explain", str(artifacts / arguments[0]), *arguments[1:]]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
