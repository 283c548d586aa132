from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optc
from optc import Lowered, PassContext, Program, Runner, Target, capture
from optc.errors import ArtifactError, BackendError
from optc.lowering.artifact import load_artifact, write_artifact
from optc.lowering.inductor import InductorBackend
from optc.machine import INT8_FLAGS, cpu_flags
from optc.passmanager.manager import build_passes
from optc.plugins.registry import registry

TARGET = Target(threads=1)
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets are read on x86 only")


def sqnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    noise = np.square(reference - output).sum()
    return float(10 * np.log10(np.square(reference).sum() / noise)) if noise else np.inf


class Noise:
    """Calibration data."""

    description = "noise"

    def __init__(self, *inputs: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        self._batch = tuple(torch.randn(8, *each.shape[1:], generator=generator) for each in inputs)

    def __iter__(self) -> object:
        return iter([self._batch])


def passed(program: Program, passes: str) -> Program:
    return build_passes(passes, None)(program, PassContext(TARGET, Noise(*program.example_inputs))).program


@dataclass(frozen=True)
class Made:
    """A compiled program and the folder its package is in."""

    program: Program
    lowered: Lowered
    folder: Path

    def load(self, threads: int = 1) -> Runner:
        return InductorBackend().load(self.folder, self.lowered.files, Target(threads=threads))

    def save(self, path: Path) -> Path:
        report = {"precision": self.load().precision}
        return write_artifact(path, self.folder, self.lowered, self.program, "inductor", report, TARGET)

    def wrapper(self) -> str:
        with zipfile.ZipFile(self.folder / "model.pt2") as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("wrapper.cpp"))).decode()


def make(program: Program, folder: Path) -> Made:
    return Made(program, InductorBackend().lower(program, TARGET, folder), folder)


@pytest.fixture(scope="session")
def floating(captured_cnn: Program, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(passed(captured_cnn, "fuse"), tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="session")
def int8(captured_cnn: Program, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(passed(captured_cnn, "fuse,quant"), tmp_path_factory.mktemp("int8"))


@pytest.fixture
def saved(int8: Made, tmp_path: Path) -> Path:
    return int8.save(tmp_path / "artifact")


def agreement(made: Made, shape: tuple[int, ...] = (3, 16, 16), batches: tuple[int, ...] = (1, 3, 8)) -> float:
    """The least SQNR over several batch sizes, none of which the program was captured or compiled with."""
    runner, worst = made.load(), np.inf
    for batch in batches:
        x = torch.randn(batch, *shape)
        for ours, graph in zip(runner(x.numpy()), made.program.run(x), strict=True):
            worst = min(worst, sqnr_db(graph.float().numpy(), ours))
    runner.close()
    return worst


def test_it_is_registered() -> None:
    assert registry().load("backend", "inductor") is InductorBackend


def test_a_float_program_gets_prepacked_onednn_kernels(floating: Made) -> None:
    runner = floating.load()
    assert re.fullmatch(r"inductor cpu \(AOT, \S+ \d+\S*\)", runner.provider)
    assert runner.precision == "float32"
    assert floating.lowered.details["layers"] == {"float32": 4}
    assert floating.lowered.details["kernels"] == {"mkldnn::_convolution_pointwise": 2, "mkldnn::_linear_pointwise": 2}
    assert not re.search(r"aoti_torch_\w*reorder\w*\(", floating.wrapper())
    assert float(floating.lowered.details["check"]["sqnr_db"]) > 100  # "inf": not a bit off
    assert agreement(floating) > 100
    assert runner(np.zeros((1, 3, 16, 16), np.float32))[0].dtype == np.float32


def test_an_int8_program_runs_int8_kernels_in_every_layer(int8: Made) -> None:
    assert int8.load().precision == "int8 (4 of 4 layers)"
    assert int8.lowered.details["not_int8"] == {}
    calls = re.findall(r"(?<!record_)aoti_torch_cpu__(qconv|qlinear)_pointwise\w*\(", int8.wrapper())
    assert sorted(calls) == ["qconv", "qconv", "qlinear", "qlinear"]
    assert not re.search(r"aoti_torch_cpu_(mkldnn_|convolution|addmm|mm)", int8.wrapper())
    assert agreement(int8) > 30


@pytest.mark.parametrize("name", ["floating", "int8"])
def test_a_profile_names_the_layers_of_the_graph(name: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(name)
    query = (np.ones((2, 3, 16, 16), np.float32),)
    times = InductorBackend().profile(made.folder, made.lowered.files, TARGET, query)
    kind = {node: kernel.kind for kernel in times for node in kernel.nodes}
    layers = [node for node in made.program.graph.nodes if re.search("conv2d|linear", str(node.target))]
    assert len(layers) == 4
    assert {kind.get(layer.name) for layer in layers} == {"int8" if name == "int8" else "float32"}
    assert set(kind) <= {node.name for node in made.program.graph.nodes}
    assert len({kernel.name for kernel in times}) == len(times)
    assert all(kernel.seconds >= 0 for kernel in times)
    slowest = max(times, key=lambda kernel: kernel.seconds)
    assert slowest.nodes


def test_the_code_holds_no_stack_traces_of_the_machine_it_was_made_on(floating: Made) -> None:
    traces = re.findall(r'KernelContextGuard \w+\("\w+", R"\((.*?)\)"\)', floating.wrapper(), re.DOTALL)
    assert len(traces) >= 4
    assert set(traces) == {""}


@pytest.mark.slow
def test_a_bfloat16_program_runs_bfloat16_kernels(captured_cnn: Program, tmp_path: Path) -> None:
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    made = make(passed(captured_cnn, "fuse,bf16"), tmp_path)
    assert made.load().precision == "bfloat16"
    onednn = {"mkldnn::_convolution_pointwise": 2, "mkldnn::_linear_pointwise": 2}
    assert made.lowered.details["kernels"] == (onednn if has_bf16 else {"aten::convolution": 2, "aten::addmm": 2})
    assert agreement(made) > 30


class PairAndTied(nn.Module):
    """Two inputs in another order than that of their names, and a layer that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shared = nn.Linear(4, 16), nn.Linear(16, 16)

    def forward(self, zulu: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return zulu - 2 * alpha, zulu * alpha, self.shared(torch.relu(self.shared(self.embed(alpha))))


def test_inputs_are_checked_and_in_order_and_layers_that_stay_in_float_have_reasons(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = passed(capture(PairAndTied(), (torch.randn(2, 4), torch.randn(2, 4))), "quant")
    capfd.readouterr()
    made = make(program, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    runner = made.load()
    assert runner.precision == "int8 (1 of 3 layers, 2 float32)"
    reason = "its input is not quantized in the graph"
    assert made.lowered.details["not_int8"] == {"linear_1 (shared)": reason, "linear_2 (shared)": reason}
    zulu, alpha = np.ones((4, 5), np.float32).T, np.full((5, 4), 3, np.float32)
    alpha.flags.writeable = False
    difference, product, _ = runner(zulu, alpha)
    np.testing.assert_array_equal(difference, zulu - 2 * alpha)
    np.testing.assert_array_equal(product, zulu * alpha)
    with pytest.raises(BackendError, match=r"input 'alpha' has the shape \(4, 4\), the model takes \(batch, 4\)"):
        runner(zulu, alpha[:4])
    with pytest.raises(BackendError, match=r"input 'zulu' has the shape \(5, 3\)"):
        runner(zulu[:, :3], alpha)
    with pytest.raises(BackendError, match=r"input 'zulu' has the shape \(\)"):
        runner(np.float32(1), alpha)
    with pytest.raises(BackendError, match="takes 2 inputs, not 1"):
        runner(zulu)
    runner.close()
    with pytest.raises(BackendError, match="closed"):
        runner(zulu, alpha)


def test_the_artifact_loads_and_computes_the_same(int8: Made, saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["manifest.json", "model.pt2", "run.py"]
    x = torch.randn(5, 3, 16, 16)
    assert sqnr_db(int8.program.run(x)[0].numpy(), optc.load(saved)(x.numpy())[0]) > 30


@X86
def test_the_artifact_needs_the_instructions_it_was_compiled_for(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    compiled = set(manifest["required_isa"]) - {"|".join(INT8_FLAGS)}
    assert compiled <= (cpu_flags() or frozenset())
    assert "fma" in manifest["required_isa"]
    assert {"avx2", "avx512f"} & set(manifest["required_isa"])
    manifest["required_isa"].append("amx_of_another_cpu")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"this CPU, .*, lacks amx_of_another_cpu"):
        optc.load(saved)


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_package_is_refused_before_its_code_is_loaded(damage: str, saved: Path) -> None:
    data = bytearray((saved / "model.pt2").read_bytes())
    (saved / "model.pt2").unlink()
    data[len(data) // 2] ^= 1
    (saved / "model.pt2").write_bytes(data if damage == "altered" else data[:-1000])
    with pytest.raises(ArtifactError, match=r"model\.pt2 (was altered|has \d+ bytes, its manifest says)"):
        load_artifact(saved)


def test_the_run_script_needs_numpy_and_torch_alone(int8: Made, saved: Path, tmp_path: Path) -> None:
    x = torch.randn(3, 3, 16, 16)
    np.save(tmp_path / "x.npy", x.numpy())
    code = textwrap.dedent(
        """
        import importlib.abc, runpy, sys

        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("optc", "optc_passes", "onnx", "safetensors", "pydantic", "torchvision"):
                    raise ImportError(f"{name} is out of bounds")

        sys.meta_path.insert(0, Refuse())
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        """
    )
    command = [sys.executable, "-I", "-c", code, str(saved / "run.py")]
    environment = {**os.environ, "PATH": str(tmp_path)}  # no compiler either
    bare = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert bare.stdout.strip() == "output 0 shape: (1, 10)"
    fed = subprocess.run([*command, "x.npy"], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    best = [line.split(": ", 1)[1].split(":")[0] for line in fed.stdout.splitlines() if line.startswith("top 5")]
    assert best == [str(row) for row in int8.load()(x.numpy())[0].argmax(1)]
    assert bare.stderr == fed.stderr == ""
    np.save(tmp_path / "x.npy", np.float32(1))
    number = subprocess.run([*command, "x.npy"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert number.stderr == "input x has the shape [], the model takes [1, 3, 16, 16]\n"


@X86
def test_the_run_script_refuses_a_cpu_that_lacks_instructions(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["required_isa"].append("amx_of_another_cpu")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run([sys.executable, "-I", saved / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "model.pt2 was compiled for a CPU with amx_of_another_cpu: optimize the model again here\n"


def rewrite(source: Path, folder: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """A copy of a package with other members, in ``folder``."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return folder


def edit_facts(**changes: object) -> Callable[[dict[str, bytes]], object]:
    name = "model/extra/optc.json"
    return lambda members: members.update({name: json.dumps({**json.loads(members[name]), **changes}).encode()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_facts(torch="1.0.0"), rf"compiled with torch 1\.0\.0, this is {re.escape(torch.__version__)}"),
        (edit_facts(device="cuda"), "compiled for cuda, not for cpu"),
        (edit_facts(architecture="sparc"), f"compiled for sparc, this is {platform.machine()}"),
        (lambda members: members.update({"model/data/weights/weight_0": b"\x80\x04."}), "data/weights/weight_0"),
        (lambda members: members.update({"model/models/model.json": b"{}"}), r"models/model\.json"),
        (lambda members: members.update({"model/data/constants/custom_obj_0": b""}), "custom_obj_0"),
        (lambda members: members.update({"model/data/aotinductor/model/../../../x.so": b""}), r"\.\./x\.so"),
        (lambda members: members.pop("model/extra/optc.json"), "does not say what it was compiled for"),
        (lambda members: members.update({"model/extra/optc.json": b"{"}), "no readable inductor package"),
    ],
)
def test_a_package_of_another_kind_is_refused(
    change: Callable[[dict[str, bytes]], object], message: str, int8: Made, tmp_path: Path
) -> None:
    folder = rewrite(int8.folder / "model.pt2", tmp_path, change)
    with pytest.raises(BackendError, match=message) as caught:
        InductorBackend().load(folder, ("model.pt2",), TARGET)
    assert "\n" not in str(caught.value)


def package(facts: bytes) -> bytes:
    """An archive that holds nothing but what it says of itself."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/extra/optc.json", facts)
        return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"not a package", package(b"{}"), package(b"1"), package(b"[" * 100_000), None],
    ids=["empty", "text", "no facts", "a number", "deep", "missing"],
)  # fmt: skip
def test_what_is_no_package_gets_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(BackendError, match=r"model\.pt2 is no readable inductor package") as caught:
        InductorBackend().load(tmp_path, ("model.pt2",), TARGET)
    assert "\n" not in str(caught.value)


def test_threads_are_those_of_the_target_at_load(int8: Made) -> None:
    code = textwrap.dedent(
        f"""
        import os
        import numpy as np
        from pathlib import Path
        from optc import Target
        from optc.lowering.inductor import InductorBackend

        x = np.zeros((32, 3, 16, 16), np.float32)
        for threads in (2, 4):
            InductorBackend().load(Path({str(int8.folder)!r}), ("model.pt2",), Target(threads=threads))(x)
            print(len(os.listdir("/proc/self/task")))
        """
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    two, four = map(int, done.stdout.split())
    assert four - two >= 2  # each OpenMP runtime in the process starts its own
    assert done.stderr == ""


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert InductorBackend.unavailable(TARGET) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert InductorBackend.unavailable(TARGET) == (
        "there is no C++ compiler 'no-such-compiler': apt install g++, or name one in the variable CXX"
    )
    monkeypatch.delenv("CXX")
    assert "not for 'tpu'" in (InductorBackend.unavailable(Target(device="tpu")) or "")
    if not torch.cuda.is_available():
        assert "no GPU" in (InductorBackend.unavailable(Target(device="cuda")) or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes", "precision", "least_db"),
    [
        ("alexnet", "fuse", "float32", 100),
        ("alexnet", "fuse,quant", "int8 (8 of 8 layers)", 30),
        ("resnet18", "fuse,quant", "int8 (21 of 21 layers)", 30),
        ("vit_tiny_patch16_224", "fuse", "float32", 100),
        ("vit_tiny_patch16_224", "fuse,quant", "int8 (50 of 50 layers)", 20),
    ],
)
def test_whole_models(name: str, passes: str, precision: str, least_db: float, tmp_path: Path) -> None:
    from optc.frontend.load import load_model

    model = load_model(name, "random").module
    program = passed(capture(model, (torch.randn(2, 3, 224, 224),)), passes)
    made = make(program, tmp_path)
    assert made.load().precision == precision
    assert agreement(made, (3, 224, 224), (1, 3)) > least_db


@pytest.mark.gpu
@pytest.mark.parametrize("passes", ["fuse", "fuse,quant"])
def test_on_a_gpu_triton_computes_the_same(passes: str, captured_cnn: Program, tmp_path: Path) -> None:
    target = Target(device="cuda", threads=1)
    if reason := InductorBackend.unavailable(target):
        pytest.skip(reason)
    program = passed(captured_cnn, passes)
    lowered = InductorBackend().lower(program, target, tmp_path)
    runner = InductorBackend().load(tmp_path, lowered.files, target)
    assert runner.provider.startswith("inductor cuda (AOT, triton ")
    assert runner.precision.startswith("float32")
    x = torch.randn(5, 3, 16, 16)
    assert sqnr_db(program.run(x)[0].numpy(), runner(x.numpy())[0]) > 20
