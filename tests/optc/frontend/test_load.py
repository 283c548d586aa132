"""From what a user types to a model: look-up, weights, and what is said when either cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optc.errors import PluginError, UnknownNameError, WeightsError
from optc.frontend.load import find_source, load_model
from optc.frontend.source import ModelSource

TIMM_TINY = "test_resnet"


@pytest.mark.parametrize(
    ("spec", "source", "name"),
    [
        ("resnet18", "timm", "resnet18"),
        ("alexnet", "torchvision", "alexnet"),
        ("torchvision:resnet18", "torchvision", "resnet18"),
        ("timm:resnet18", "timm", "resnet18"),
        ("resnet18.a1_in1k", "timm", "resnet18.a1_in1k"),
        ("vit_huge_patch14_224", "timm", "vit_huge_patch14_224"),
        ("some.package:make", "factory", "some.package:make"),
        ("folder/model.pt2", "pt2", "folder/model.pt2"),
    ],
)
def test_source_of_a_name(spec: str, source: str, name: str) -> None:
    found, there = find_source(spec)
    assert (found.name, there) == (source, name)


@pytest.mark.parametrize(
    ("spec", "suggestion"),
    [
        ("alexnt", "alexnet"),
        ("resnet19", "resnet18"),
        ("torchvision:vit_h_1", "vit_h_14"),
        ("timm:resnet5", "resnet50"),
    ],
)
def test_unknown_name_suggests_the_closest(spec: str, suggestion: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(spec)
    assert suggestion in caught.value.close_matches


def test_name_like_no_other_says_what_can_be_given() -> None:
    with pytest.raises(UnknownNameError, match=r"package\.module:factory, or a \.pt2 file"):
        load_model("qqqqzzzz")


def test_random_weights_follow_the_seed_and_leave_torchs_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, again = (load_model(TIMM_TINY, "random", seed=3).module.state_dict() for _ in range(2))
    other = load_model(TIMM_TINY, "random", seed=4).module.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


def test_loaded_model_is_in_eval_mode_with_an_example_of_its_own_size() -> None:
    loaded = load_model(TIMM_TINY, "random")
    assert not loaded.module.training
    assert [tuple(t.shape) for t in loaded.example_inputs] == [(1, 3, 160, 160)]
    assert (loaded.info.weights, loaded.info.weights_detail, loaded.info.notes) == ("random", "seed 0", ())


def test_checkpoint_with_other_classes_sets_the_head(tmp_path: Path) -> None:
    ten = load_model(TIMM_TINY, "random", num_classes=10, seed=5)
    save_file(ten.module.state_dict(), tmp_path / "ten.safetensors")
    loaded = load_model(TIMM_TINY, str(tmp_path / "ten.safetensors"))
    x = torch.randn(2, 3, 160, 160)
    assert loaded.module(x).shape == (2, 10)
    torch.testing.assert_close(loaded.module(x), ten.module(x))
    assert loaded.info.weights == "ten.safetensors"
    assert loaded.info.weights_detail.startswith("sha256:")
    assert len(loaded.info.weights_detail) == len("sha256:") + 64


def test_checkpoint_of_another_model_names_the_keys(tmp_path: Path) -> None:
    save_file(load_model("test_vit", "random").module.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_model(TIMM_TINY, str(tmp_path / "vit.safetensors"))
    message = str(caught.value)
    assert "does not fit test_resnet" in message
    assert "missing (conv1.0.weight;" in message
    assert "unexpected (" in message
    assert "\n" not in message


def test_missing_checkpoint_fails_before_anything_is_built() -> None:
    with pytest.raises(WeightsError, match=r"'/no/such\.safetensors' does not exist"):
        load_model("vit_huge_patch14_224", "/no/such.safetensors")


def test_factory_brings_its_own_weights() -> None:
    with pytest.raises(WeightsError, match="brings its own weights"):
        load_model("torch.nn:Identity", "random")


def test_a_source_that_does_not_load_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from optc.frontend import load as load_module

    own = load_module._source

    def source(name: str) -> ModelSource:
        if name == "timm":
            raise PluginError("model source 'timm' needs timm")
        return own(name)

    monkeypatch.setattr(load_module, "_source", source)
    assert find_source("torchvision:alexnet")[1] == "alexnet"
    assert find_source("alexnet")[0].name == "torchvision"
    with pytest.raises(UnknownNameError, match="needs timm"):
        find_source("a model that nobody has")
