"""Pretrained weights with no network, from a cache, and where a hub cannot give them."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optc.errors import WeightsError
from optc.frontend import hub, timm_source, torchvision_source
from optc.frontend.load import load_model
from optc.frontend.timm_source import TimmSource
from optc.frontend.torchvision_source import TorchvisionSource


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Point every hub at a port nobody listens on, and every cache at an empty folder."""
    from huggingface_hub import constants

    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404 if "missing" in self.path else 200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_a_server_that_answers_is_reachable(server: str) -> None:
    assert hub.unreachable(f"{server}/weights") is None
    assert hub.unreachable(f"{server}/missing") == "127.0.0.1 answered 404 Not Found"


def test_a_closed_port_and_a_silent_server_give_reasons() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert hub.unreachable(f"http://127.0.0.1:{port}/x") == "127.0.0.1: Connection refused"
        silent.listen(0)
        start = time.perf_counter()
        assert hub.unreachable(f"http://127.0.0.1:{port}/x", timeout=0.3) is not None
        assert time.perf_counter() - start < 20


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("spec", ["timm:test_resnet", "torchvision:squeezenet1_1"])
def test_without_network_weights_are_random_and_that_is_noted(spec: str, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(spec)
    name = spec.partition(":")[2]
    assert (loaded.info.weights, loaded.info.weights_detail) == ("random", "seed 0")
    (note,) = loaded.info.notes
    assert note.startswith(f"pretrained weights for {name} could not be downloaded (")
    assert note.endswith("): using random weights; accuracy cannot be measured")
    same = load_model(spec, "random").module.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in loaded.module.state_dict().items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_network")
def test_model_without_published_weights_says_so() -> None:
    (note,) = load_model("regnetz_005").info.notes
    assert "timm publishes none for this model" in note


@pytest.mark.usefixtures("no_network")
def test_timm_weights_in_the_cache_are_used_without_network(tmp_path: Path) -> None:
    source = load_model("test_resnet", "random", seed=9).module
    repository = tmp_path / "hf" / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(source.state_dict(), snapshot / "model.safetensors")
    loaded = load_model("test_resnet")
    assert (loaded.info.weights, loaded.info.notes) == ("pretrained", ())
    assert loaded.info.weights_detail.endswith("test_resnet.r160_in1k")
    assert torch.equal(loaded.module.conv1[0].weight, source.conv1[0].weight)  # type: ignore[union-attr,index]


@pytest.mark.usefixtures("no_network")
def test_torchvision_weights_in_the_cache_are_used_without_network(tmp_path: Path) -> None:
    source = load_model("torchvision:squeezenet1_1", "random", seed=9).module
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(source.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    loaded = load_model("torchvision:squeezenet1_1")
    assert (loaded.info.weights, loaded.info.notes) == ("pretrained", ())
    assert loaded.info.weights_detail == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert torch.equal(loaded.module.state_dict()["features.0.weight"], source.state_dict()["features.0.weight"])
    (folder / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"cut short")
    with pytest.raises(WeightsError, match="is damaged"):
        load_model("torchvision:squeezenet1_1")


@pytest.mark.parametrize("source", [TimmSource(), TorchvisionSource()])
def test_pretrained_weights_have_their_own_number_of_classes(source: TimmSource | TorchvisionSource) -> None:
    with pytest.raises(WeightsError, match="have 1000 classes, not 10"):
        source.build("resnet18", pretrained=True, num_classes=10, seed=0)


def test_preprocessing_is_the_models_own() -> None:
    timm_model = TimmSource().build("mobilenetv3_small_100", pretrained=False, num_classes=None, seed=0)
    assert timm_model.preprocessing.interpolation == "bicubic"
    assert timm_model.preprocessing.resize == 256
    inception = TorchvisionSource().build("inception_v3", pretrained=False, num_classes=7, seed=0)
    assert inception.preprocessing.input_size == (3, 299, 299)
    assert inception.preprocessing.resize == 342
    assert inception.module.eval()(torch.randn(1, 3, 299, 299)).shape == (1, 7)


def test_names_are_many_and_torchvisions_are_classifiers_only() -> None:
    assert len(TimmSource().names()) > 1000
    names = TorchvisionSource().names()
    assert {"alexnet", "vit_h_14"} <= set(names)
    assert not {"fasterrcnn_resnet50_fpn", "raft_large", "deeplabv3_resnet50"} & set(names)
    assert timm_source.TimmSource.claims(TimmSource(), "resnet18.no_such_tag") is False
    assert torchvision_source.TorchvisionSource().claims("resnet18")
