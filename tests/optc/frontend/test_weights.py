"""Reading checkpoints: formats, nesting, prefixes, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from optc.errors import WeightsError
from optc.frontend.weights import apply_checkpoint, classes_in_checkpoint, read_checkpoint


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def model(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


def same(first: dict[str, Tensor], second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_nested_and_prefixed_checkpoints(tmp_path: Path, nest: str | None, prefix: str) -> None:
    state = model().state_dict()
    named = {prefix + key: value for key, value in state.items()}
    torch.save({nest: named, "epoch": 7} if nest else named, tmp_path / "c.pth")
    assert same(state, read_checkpoint(tmp_path / "c.pth").state)


def test_legacy_format_is_read(tmp_path: Path) -> None:
    state = model().state_dict()
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    assert same(state, read_checkpoint(tmp_path / "c.pt").state)


def test_half_precision_is_converted_to_the_models(tmp_path: Path) -> None:
    source, target = model(), model()
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()},
        tmp_path / "c.safetensors",
    )
    apply_checkpoint(target, "m", read_checkpoint(tmp_path / "c.safetensors"))
    assert target[0].weight.dtype == torch.float32
    torch.testing.assert_close(target[0].weight, source[0].weight.half().float())


def test_pickled_objects_are_refused_and_not_executed(tmp_path: Path) -> None:
    torch.save({"w": Evil(str(tmp_path / "pwned"))}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="holds Python objects besides tensors"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("c.safetensors", b"not one", "not a readable safetensors file"),
        ("c.pth", b"not one either", "not a readable PyTorch checkpoint|holds Python objects"),
        ("c.onnx", b"", "no kind of checkpoint optc reads"),
    ],
)
def test_unreadable_files_give_one_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_file_without_a_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "c.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_checkpoint(tmp_path / "c.pt")


def test_misfits_are_counted_and_named(tmp_path: Path) -> None:
    state = model().state_dict()
    del state["1.running_mean"], state["1.num_batches_tracked"]
    state["0.weight"] = torch.ones(4, 3, 5, 5)
    for index in range(5):
        state[f"extra{index}"] = torch.ones(1)
    save_file(state, tmp_path / "c.safetensors")
    target = model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        apply_checkpoint(target, "tiny", read_checkpoint(tmp_path / "c.safetensors"))
    assert caught.value.message == (
        "'c.safetensors' does not fit tiny: 1 missing (1.running_mean), 5 unexpected (extra0; extra1; extra2; ...),"
        " 1 of another shape (0.weight is 4x3x5x5, the model's 4x3x3x3)"
    )
    assert same(before, target.state_dict())


def test_classes_are_inferred_only_from_the_head(tmp_path: Path) -> None:
    save_file(model(classes=10).state_dict(), tmp_path / "ten.safetensors")
    ten = read_checkpoint(tmp_path / "ten.safetensors")
    assert classes_in_checkpoint(model(classes=3), ten) == 10
    assert classes_in_checkpoint(model(classes=10), ten) is None
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 3))
    assert classes_in_checkpoint(wide, ten) is None


class Wrapped(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.model = model(classes)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_model_that_is_a_wrapper_itself_takes_its_own_checkpoint(tmp_path: Path, prefix: str) -> None:
    source, target = Wrapped(), Wrapped()
    nn.init.ones_(source.model[3].weight)
    save_file({prefix + key: value for key, value in source.state_dict().items()}, tmp_path / "c.safetensors")
    checkpoint = read_checkpoint(tmp_path / "c.safetensors")
    apply_checkpoint(target, "wrapped", checkpoint)
    assert same(source.state_dict(), target.state_dict())
    assert classes_in_checkpoint(Wrapped(5), checkpoint) == 3
    apply_checkpoint(model(), "plain", checkpoint)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    torch.save({0: torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_checkpoint(tmp_path / "c.pt")
