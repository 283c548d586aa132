"""The training example learns: above chance after little, and its pieces do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import nn

from optc.data.digits import DigitsDataset
from optc.data.evaluate import evaluate
from optc.frontend.load import load_model

SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learns_saves_and_is_loaded_back_with_its_classes(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made" / "digits.safetensors"
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--model", "test_efficientnet", "-o", str(target)])
    monkeypatch.setattr(example, "LEARNING_RATE", 5e-3)
    trained = example.train("test_efficientnet", DigitsDataset(), epochs=6, images=240)
    monkeypatch.setattr(example, "train", lambda *args, **kwargs: trained)
    assert example.main() == 0
    printed = capsys.readouterr().out
    assert "epoch 6/6" in printed
    assert "test accuracy" in printed
    assert list(target.parent.iterdir()) == [target]
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "test_efficientnet"
    assert (metadata["num_classes"], metadata["dataset"], metadata["split_seed"]) == ("10", "digits", "0")
    loaded = load_model("test_efficientnet", str(target))
    accuracy = evaluate(loaded.module, DigitsDataset().split("test", loaded.info.preprocessing), 64).top1
    assert accuracy == pytest.approx(float(metadata["test_accuracy"]), abs=0.006)
    assert accuracy > 0.3
    before = target.read_bytes()
    assert example.main() == 0
    assert "exists" in capsys.readouterr().out
    assert target.read_bytes() == before


def test_unit_variance_initialisation(example: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    x = torch.randn(32, 3, 8, 8)
    model.requires_grad_(False)
    example.scale_to_unit_variance(model, x)
    assert float(model[0](x).std()) == pytest.approx(1, abs=1e-4)
    assert float(model[:3](x).std()) == pytest.approx(1, abs=1e-4)
    assert float(model(x).std()) == pytest.approx(0.1, abs=1e-4)


def test_shaken_images_keep_their_place_roughly(example: ModuleType) -> None:
    images = torch.zeros(64, 1, 33, 33)
    images[:, :, 12:21, 12:21] = 1
    moved = example.shaken(images)
    assert moved.shape == images.shape
    assert not torch.equal(moved, images)
    torch.testing.assert_close(moved.mean(0)[0, 16, 16], torch.tensor(1.0), rtol=0, atol=0.2)
    assert float(moved[:, :, :4].abs().max()) == 0
